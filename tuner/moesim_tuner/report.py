"""What a study found, as JSON and on screen: the question, the search, the front beside the defaults, the judged
finalists with their intervals, why the winner wins, what was excluded by what, and how to go on.

No clock is in it: equal studies have equal reports. The screen is drawn from the JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moesim_tuner.definition import Definition, Study
from moesim_tuner.diagnose import diagnose
from moesim_tuner.figures import more_is_better
from moesim_tuner.pareto import best_so_far, front
from moesim_tuner.records import Trial
from moesim_tuner.terminal_report import render_report

__all__ = ["SCHEMA_VERSION", "Finding", "render", "to_json"]

SCHEMA_VERSION = 1
_STATES = ("complete", "pruned", "infeasible", "illegal", "failed")


class Finding(Study, Protocol):
    """What a report knows of a study besides (`moesim_tuner.tune.Found`). judgement, why: JSON, None before there is
    one."""

    @property
    def judgement(self) -> Mapping[str, Any] | None: ...

    @property
    def why(self) -> Mapping[str, Any] | None: ...


def to_json(found: Finding) -> dict[str, Any]:
    """The stable report: docs/tune.md lists its keys."""
    definition, trials = found.definition, sorted(found.trials, key=lambda t: t.number)
    spec = definition.spec
    return {
        "schema_version": SCHEMA_VERSION,
        "study": found.name,
        "scenario": definition.name,
        "scenario_hash": definition.scenario_hash,
        "objectives": [
            {"name": name, "better": "more" if more_is_better(name) else "less"} for name in spec.objectives
        ],
        "constraints": {name: limit.model_dump(exclude_none=True) for name, limit in spec.constraints.items()},
        "space": {
            "parameters": {
                p.name: {"values": None if p.values is None else len(p.values), "when": sorted(p.when or {})}
                for p in definition.space.parameters
            },
            "points": definition.space.size,
        },
        "search": {
            "sampler": definition.sampler,
            "seed": spec.seed,
            "batch": spec.batch,
            "asynchronous": definition.asynchronous,
            "rungs": [rung.model_dump(mode="json") for rung in definition.rungs],
            "fields": list(definition.fields),
            "wanted": spec.trials,
            "trials": len(trials),
            "states": {state: sum(t.state == state for t in trials) for state in _STATES},
            "feasible": sum(t.feasible for t in trials),
            "origins": dict(Counter(t.origin for t in trials)),
        },
        "best_so_far": [{"trial": number, "value": value} for number, value in best_so_far(definition, trials)],
        "front": [_trial(definition, t) for t in front(definition, trials)],
        "beside": [_trial(definition, t) for t in _beside(definition, trials)],
        "excluded": diagnose(definition, trials).to_json(),
        "judgement": None if found.judgement is None else dict(found.judgement),
        "why": None if found.why is None else dict(found.why),
    }


def _trial(definition: Definition, trial: Trial) -> dict[str, Any]:
    spec = definition.spec
    last = trial.rungs[-1] if trial.rungs else {}
    return {
        "trial": trial.number,
        "origin": trial.origin,
        "state": trial.state,
        "feasible": trial.feasible,
        "values": dict(zip(spec.objectives, trial.values, strict=False)),
        "constraints": {name: last.get(name) for name in spec.constraints},
        "broken": sorted(name for name, v in trial.violations.items() if v > 0),
        "point": dict(trial.point),
    }


def _beside(definition: Definition, trials: Sequence[Trial]) -> list[Trial]:
    """What the winner is measured against: the scenario as written, and the best of the heuristics and starts."""
    default = [t for t in trials if t.origin == "default"][:1]
    known = [t for t in trials if t.origin == "start" or t.origin.startswith("heuristic")]
    return default + front(definition, known)[:2]


def render(found: Finding, file: Any = None, width: int | None = None) -> None:
    """Print the report. file: stdout unless given; width: the terminal's."""
    definition = found.definition
    lines = diagnose(definition, found.trials).lines()
    render_report(to_json(found), lines, file, width)
