"""A trial of a study as what one starts with: the scenario as it was simulated, engines' commands, expert maps.

One module an engine: `misfit(scenario)` says why it cannot run it, `settings(winner)` what to start it with.
Every command is held to the options that the engine's source has (`options`), every map to the engine's own rules
(`moesim.exports`), and what an engine has no option for is listed, never dropped.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from moesim.errors import BadInput, Problem
from moesim.exports import Target
from moesim.placement import initial_map
from moesim.policy import load_plugin
from moesim.results import json_text, rebased, write_texts
from moesim.run_result import RunResult
from moesim.scenario.load import Scenario, load_scenario_text
from moesim.scenario.yamlio import dump_yaml
from moesim.simulate import simulate
from moesim_tuner.definition import Definition, Study
from moesim_tuner.export.options import check
from moesim_tuner.export.sheet import Settings, Winner, leaves
from moesim_tuner.figures import figures_of
from moesim_tuner.records import Trial

__all__ = ["ENGINES", "MARKER", "Exported", "Settings", "Study", "Winner", "export", "scenario_of", "varied"]

MARKER = "export.json"
"""what was exported, beside the files"""
_ENGINE = re.compile(rb"^def misfit\(", re.MULTILINE)
ENGINES = tuple(sorted(f.stem for f in Path(__file__).parent.glob("[a-z]*.py") if _ENGINE.search(f.read_bytes())))
"""names of the files of this folder that know an engine"""


@dataclass(frozen=True)
class Exported:
    """What was written. left_out: engine -> why it cannot run the winner."""

    folder: Path
    study: str
    trial: int
    engines: tuple[Settings, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"trial {self.trial} of {self.study}: {self.folder}/scenario.yaml"]
        lines += [f"note: {note}" for note in self.notes]
        for one in self.engines:
            lines += ["", f"{one.engine}: {self.folder}/{one.engine}.sh", f"  {one.command}"]
            lines += [f"  not set by flags: {path} = {told}" for path, told in one.unset.items()]
            lines += [f"  note: {note}" for note in one.notes]
        if not self.engines:
            lines += [f"{engine}: {why}" for engine, why in self.left_out.items()]
        return "\n".join(lines)


def export(
    found: Study, number: int, out: Path, engines: Sequence[str] | None = None, *, keep_tune: bool = False
) -> Exported:
    """Write trial `number` into the folder `out`, whole or not at all. engines: None: all that can run it; keep_tune:
    leave the `tune` section in the scenario.

    Simulates the trial's last rung once, for its placement and memory. Raises BadInput for an engine that cannot run
    it, a trial that was never feasible, and a folder that holds something else.
    """
    trial = next((t for t in found.trials if t.number == number), None)
    if trial is None:
        raise BadInput(Problem(f"trial {number}", f"{found.name} has no such trial yet"))
    definition = found.definition
    scenario = scenario_of(definition, trial)
    chosen, left_out = _chosen(scenario, engines)
    result = simulate(scenario)
    if not result.feasible:
        raise BadInput(Problem(f"trial {number}", f"it does not fit, so no engine can run it: {result.reasons[0]}"))
    target, untold = _target(scenario, result)
    winner = Winner(scenario, varied(definition, trial), result, target, untold, str(out))
    notes = _notes(trial, scenario)
    files = {"scenario.yaml": _yaml(found.name, definition, trial, scenario, result, out, keep_tune)}
    made: list[Settings] = []
    for engine in chosen:
        settings: Settings = _module(engine).settings(winner)
        problems = check(engine, settings.words)
        assert not problems, problems
        made.append(settings)
        files |= dict(settings.files)
        files[f"{engine}.sh"] = _script(found.name, trial, settings)
    exported = Exported(out, found.name, number, tuple(made), left_out, notes)
    files[MARKER] = json_text(_report(exported, trial, scenario))
    write_texts(out, files, MARKER)
    return exported


def scenario_of(definition: Definition, trial: Trial) -> Scenario:
    """What the trial's last rung simulates, with its first seed: of the trial's own scenario hash."""
    task = definition.tasks(trial.point, len(definition.rungs) - 1)[0]
    for module in task.plugins:
        load_plugin(module)
    return load_scenario_text(task.text, Path(task.base), task.overrides, task.seed, task.name)


def varied(definition: Definition, trial: Trial) -> dict[str, Any]:
    """The scenario's fields that the trial's point sets: dotted path -> value, policies as kind and parameters."""
    out: dict[str, Any] = {}
    for p in definition.space.active(trial.point):
        if p.name in trial.point:
            for path, value in p.fields(trial.point[p.name]).items():
                out |= leaves(path, value)
    return out


def _module(engine: str) -> ModuleType:
    return importlib.import_module(f"moesim_tuner.export.{engine}")


def _chosen(scenario: Scenario, engines: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The engines to write for, and why others cannot run the scenario. Raises BadInput for one that was asked for."""
    unknown = [name for name in engines or () if name not in ENGINES]
    if unknown:
        raise BadInput(Problem("--emit", f"engines are {', '.join(ENGINES)}, got {', '.join(unknown)}"))
    why = {engine: _module(engine).misfit(scenario) for engine in (engines or ENGINES)}
    left_out = {engine: reason for engine, reason in why.items() if reason}
    if engines and left_out:
        raise BadInput([Problem(f"--emit {engine}", reason) for engine, reason in left_out.items()])
    return [engine for engine in why if engine not in left_out], left_out


def _target(scenario: Scenario, result: Any) -> tuple[Target | None, str]:
    """The placement that the trial ran with, where engines would start with another; else None, and why, if that is to
    be told."""
    experts = result.experts if isinstance(result, RunResult) else None
    if experts is None or scenario.tiers is not None or scenario.parallel.ep < 2:
        return None, ""
    placement, model = experts.placement, scenario.model
    if placement.num_layers != len(model.moe_layers):
        return None, "no expert map: layers that share experts are in no engine's file"
    if not placement.held_LS.all():
        return None, "no expert map: slots are empty, which no engine's file can say"
    start = initial_map(placement.num_experts, placement.num_slots)
    if (placement.slot_to_expert_LS == np.asarray(start)).all():
        return None, ""
    moves = scenario.rebalance
    told = (None, None) if moves is None else (moves.interval_steps, moves.window_steps)
    return Target(placement, tuple(model.moe_layers), model.num_layers, model.name, *told), ""


def _notes(trial: Trial, scenario: Scenario) -> tuple[str, ...]:
    notes = []
    if trial.state != "complete":
        notes.append(f"the trial is {trial.state}: its figures are not those of the whole scenario")
    elif trial.scenario_hash != scenario.hash:
        notes.append(
            f"the scenario's hash is {scenario.hash} now and was {trial.scenario_hash}: a file that it names, or"
            " moesim, has changed since the trial was run"
        )
    return tuple(notes)


# ------------------------------------------------------------------------------------------------------------ files


def _yaml(
    study: str, definition: Definition, trial: Trial, scenario: Scenario, result: Any, out: Path, keep_tune: bool
) -> str:
    """The scenario with the winner's fields in place, and comments that say where it comes from."""
    raw = rebased(scenario, out)
    if not keep_tune:
        raw.pop("tune", None)
    spec, figures = definition.spec, figures_of(result)
    shown = [*spec.objectives, *(name for name in spec.constraints if name not in spec.objectives)]
    task = definition.tasks(trial.point, len(definition.rungs) - 1)[0]
    point = definition.space.overrides(trial.point)
    others = [text for text in task.overrides if text not in point and text not in definition.overrides]
    lines = [
        f"Trial {trial.number} of the study {study} ({trial.origin}), as it was simulated: hash {scenario.hash}.",
        *(f"  {name} = {figures[name]:.6g}" for name in shown if name in figures),
        "Set by the search:" if point else "The scenario as written.",
        *(f"  {text}" for text in point),
        f"Of the search, not of the deployment: seed={task.seed}{''.join(', ' + text for text in others)}",
    ]
    return "".join(f"# {line}\n" for line in lines) + dump_yaml(raw)


def _script(study: str, trial: Trial, settings: Settings) -> str:
    """The command as a shell script, with what it leaves unsaid in front."""
    lines = ["#!/bin/sh", f"# {settings.engine}: trial {trial.number} of the study {study}"]
    lines += [f"# not set by flags: {path} = {told}" for path, told in settings.unset.items()]
    lines += [f"# note: {note}" for note in settings.notes]
    return "\n".join([*lines, settings.command]) + "\n"


def _report(exported: Exported, trial: Trial, scenario: Scenario) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "study": exported.study,
        "trial": trial.number,
        "origin": trial.origin,
        "point": dict(trial.point),
        "scenario_hash": scenario.hash,
        "engines": [
            {
                "engine": one.engine,
                "command": list(one.words),
                "files": sorted(one.files),
                "not_set_by_flags": dict(one.unset),
                "notes": list(one.notes),
            }
            for one in exported.engines
        ],
        "left_out": dict(exported.left_out),
        "notes": list(exported.notes),
    }
