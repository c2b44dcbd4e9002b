"""The whole report of a folder, from its predictions and records alone: no torch, no scenario, no clock.

`moesim validate judge DIR` is this, so that figures measured on a machine that is gone can be judged again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moesim
from moesim.errors import BadInput, Problem
from moesim.results import json_text, replacing_file
from moesim_kernels.validate.again import agreement
from moesim_kernels.validate.bounds import BOUNDS, kind_of
from moesim_kernels.validate.judge import calibrated_ns, judge, measured_of
from moesim_kernels.validate.pick import judge_candidates
from moesim_kernels.validate.predict import Predictions, read_predictions, seal_of
from moesim_kernels.validate.profile import strangeness
from moesim_kernels.validate.record import Record, read_record
from moesim_kernels.validate.serving import judge_served_runs
from moesim_kernels.validate.session import FIRST, FRESH, PREDICTIONS
from moesim_kernels.validate.verdict import verdict

__all__ = ["judge_folder", "winner", "write_report"]

SCHEMA = 1


def judge_folder(folder: Path) -> dict[str, Any]:
    """Judge what lies in a validation's folder. Raises BadInput where predictions or record are missing, broken, or do
    not belong together."""
    path = folder / PREDICTIONS
    if not path.is_file():
        raise BadInput(Problem(str(folder), f"holds no {PREDICTIONS}; name a folder that moesim validate has made"))
    predictions, seal = read_predictions(path), seal_of(path)
    record = read_record(folder / FIRST, seal)
    found = judge(predictions, record)
    facts = predictions.facts
    served = facts.get("served")
    report = {
        "schema": SCHEMA,
        "moesim": moesim.__version__,
        "scenario": facts["scenario"],
        "scenario_hash": facts["scenario_hash"],
        "device": facts["device"],
        "ranks": facts["ranks"],
        "machine": record.machine,
        "profile": facts["profile"],
        "seal": seal,
        "seed": facts["seed"],
        **found,
        "notes": [
            *strangeness(facts["profile"], record.machine),
            *_refused(facts["variants_refused"]),
            *([f"not served for real: {facts['not_served']}"] if facts.get("not_served") else []),
            *dict.fromkeys(f"{about}: {text}" if about else text for about, text in record.notes),
        ],
        "candidates": _candidates(predictions, record, folder, seal),
        "again": _again(predictions, record, folder, seal),
        "served": None
        if served is None
        else judge_served_runs(served, folder, seal, calibrated_ns(facts["profile"], record)),
    }
    return {"schema": report.pop("schema"), "verdict": verdict(report), **report}


def _refused(refused: dict[str, str]) -> list[str]:
    return [f"no settings with {name}: {why}" for name, why in refused.items() if "the scenario as it is" not in why]


def _candidates(predictions: Predictions, record: Record, folder: Path, seal: str) -> dict[str, Any] | None:
    study = predictions.facts.get("study")
    if study is None:
        return None
    names = [name for c in study["candidates"] for name in c["settings"]]
    if not {s.setting for s in record.samples} & set(names):
        return None
    fresh = None
    if (folder / FRESH).exists():
        second = read_record(folder / FRESH, seal)
        fresh = measured_of(predictions, second) if second.samples else None
    return judge_candidates(measured_of(predictions, record, names), study, fresh)


def winner(report: dict[str, Any], predictions: Predictions) -> list[str]:
    """Names of the fresh steps by which the measured winner, the pick and the default are judged again."""
    found = report["candidates"]
    if found is None:
        return []
    wanted = {found["best"], found["pick"]}
    return [
        n for c in predictions.facts["study"]["candidates"] if c["name"] in wanted or c["default"] for n in c["fresh"]
    ]


def _again(predictions: Predictions, record: Record, folder: Path, seal: str) -> list[dict[str, Any]]:
    facts = predictions.facts
    bounds = BOUNDS[kind_of(str(facts["device"]), int(facts["ranks"]))]
    out: list[dict[str, Any]] = []
    number = 2
    while (path := folder / f"measured-{number}.jsonl").exists():
        other = read_record(path, seal)
        if other.samples:
            first = measured_of(predictions, record, facts["held_out"], bounds)
            second = measured_of(predictions, other, facts["held_out"], bounds)
            if first.clock != second.clock:
                first, second = (measured_of(predictions, r, facts["held_out"], thread=True) for r in (record, other))
            repeat = judge(predictions, other)
            figures = {key: repeat[key] for key in ("clock", "noise", "step", "layer", "bounds")}
            compared = agreement(first, second, float(facts["profile"]["speed_error"]))
            out.append({"record": path.name, **compared, **figures, "tau": repeat["ranking"]["tau"]})
        number += 1
    return out


def write_report(folder: Path, report: dict[str, Any], command: str) -> None:
    """report.json and report.md, each whole or not at all."""
    from moesim_kernels.validate.markdown import markdown

    for name, text in (("report.json", json_text(report)), ("report.md", markdown(report, command))):
        with replacing_file(folder / name) as hidden:
            hidden.write_text(text, encoding="utf-8")
