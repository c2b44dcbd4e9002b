"""A scenario served for real beside its simulated run: predicted with the steps, sealed with them, judged with them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput, Problem
from moesim.scenario.load import Scenario
from moesim.simulate import RunResult, simulate
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.strict import parse, read_bytes
from moesim_kernels.validate.bounds import MAX_PSI
from moesim_kernels.validate.noise import SAME_SPEED
from moesim_kernels.validate.served import BOUNDS, ServedJudgement, judge_served

__all__ = ["LONGEST_S", "host_of", "judge_served_runs", "predicted_run", "serve_command", "served_file"]

LONGEST_S = 180.0
"""of a run that is served for real"""
HOST_REQUESTS = 10
"""served before anything is predicted, to see what the host takes of a step"""
_COLUMNS = ("arrival_ns", "first_token_ns", "finish_ns", "output_tokens")
_MAX_BYTES = 256 << 20
_SHOWN = 8
_TITLES = {
    "tpot_mean_ms": "time per output token (TPOT), mean",
    "makespan_s": "makespan",
    "ttft_p50_ms": "time to first token (TTFT), p50",
}


def predicted_run(scenario: Scenario) -> tuple[dict[str, list[int]] | None, str]:
    """The simulated run's requests, as columns; or None and why it is not served for real."""
    if scenario.parallel.dp > 1:
        return None, "one rank is served for real, and the scenario has several"
    result = simulate(scenario)
    if not isinstance(result, RunResult) or result.outcome is None:
        return None, "nothing is served"
    requests = result.outcome.requests
    done = requests.completed
    span_s = float(requests.finish_ns.max() - requests.arrival_ns.min()) / 1e9
    if not done.any() or span_s > LONGEST_S:
        return (
            None,
            f"the run takes {span_s:.0f} s by simulation, and {LONGEST_S:.0f} s is the most that is served here",
        )
    return {name: getattr(requests, name).tolist() for name in _COLUMNS}, ""


def host_of(path: Path) -> float | None:
    """us a step that a served run spent on planning and index tensors, median. Raises BadInput for another file."""
    try:
        run = parse(read_bytes(path, _MAX_BYTES), str(path))
    except BadPlan as error:
        raise BadInput(Problem(error.where, error.message)) from None
    found = run.get("host_us_median") if isinstance(run, dict) else None
    return float(found) if isinstance(found, int | float) else None


def served_file(folder: Path, number: int) -> Path:
    """The record of the number-th served run, from 1."""
    return folder / f"served-{number}.json"


def serve_command(scenario: Path, out: Path, seal: str, device: str, clock: str, seed: int | None = None) -> list[str]:
    """The command that serves the scenario once. clock: wall or cpu. seed: other requests than the scenario's own, and
    no more than `HOST_REQUESTS` of them."""
    options = [str(scenario), "--out", str(out), "--seal", seal, "--device", device, "--clock", clock]
    if seed is not None:
        options += ["--seed", str(seed), "--requests", str(HOST_REQUESTS)]
    return [sys.executable, "-m", "moesim_kernels.real.served", *options]


def judge_served_runs(
    predicted: Mapping[str, Any], folder: Path, seal: str, calibrated_ns: float | None = None
) -> dict[str, Any] | None:
    """The served runs in a folder beside the simulated one; None where none was served. calibrated_ns: the reference
    product's time while the profile was measured: no bound binds where it took another time while serving, for a run
    cannot be said at another speed. Raises BadInput for a file that is none, or has another seal."""
    runs: list[dict[str, Any]] = []
    while (path := served_file(folder, len(runs) + 1)).exists():
        runs.append(_read(path, seal))
    if not runs:
        return None
    judged = judge_served(predicted, [run["requests"] for run in runs])
    psi = [x for run in runs for x in run["psi"] if x is not None]
    clocks = sorted({str(run["clock"]) for run in runs})
    quiet = clocks == ["wall"] and max(psi, default=0.0) < MAX_PSI and len(runs) > 1
    speed = [x for run in runs for x in run.get("reference_ns") or [] if isinstance(x, int | float)]
    shift = float(np.median(speed)) / calibrated_ns if speed and calibrated_ns else None
    same = shift is None or abs(float(np.log(shift))) < SAME_SPEED
    return {
        **judged.to_json(),
        "clocks": clocks,
        "psi_percent": max(psi, default=None),
        "speed_shift": None if shift is None else round(shift, 4),
        "bounds": [_bound(judged, name, quiet, same) for name in BOUNDS],
        "lines": _lines(judged, clocks, psi, shift),
    }


def _read(path: Path, seal: str) -> dict[str, Any]:
    try:
        run = parse(read_bytes(path, _MAX_BYTES), str(path))
    except BadPlan as error:
        raise BadInput(Problem(error.where, error.message)) from None
    fine = isinstance(run, dict) and isinstance(run.get("requests"), dict) and isinstance(run.get("psi"), list)
    columns = [run["requests"].get(name) for name in _COLUMNS] if fine else []
    if not fine or not all(_whole(c) and len(c) == len(columns[0]) for c in columns) or not columns[0]:
        raise BadInput(Problem(str(path), "this is no record of a served run; remove it, and validate again"))
    if run.get("seal") != seal:
        raise BadInput(Problem(str(path), "was served under another seal than the predictions have; remove it"))
    return dict(run)


def _whole(column: Any) -> bool:
    return isinstance(column, Sequence) and all(type(x) is int for x in column)


def _bound(judged: ServedJudgement, name: str, quiet: bool, same: bool) -> dict[str, Any]:
    error, bound = abs(judged.error[name]), BOUNDS[name]
    binds = quiet and same and judged.binds(name)
    return {
        "figure": _TITLES[name],
        "found": round(error, 5),
        "bound": bound,
        "at": "most",
        "met": error <= bound,
        "binds": binds,
        "why_not": "" if binds else ("one run alone" if judged.runs < 2 else "contended" if same else "speed changed"),
    }


def _lines(judged: ServedJudgement, clocks: Sequence[str], psi: Sequence[float], shift: float | None) -> list[str]:
    units = {"ms": "ms", "s": "s"}
    told = []
    for name in BOUNDS:
        unit = units[name.rsplit("_", 1)[1]]
        said, found = f"{judged.predicted[name]:.4g} {unit}", f"{judged.measured[name]:.4g} {unit}"
        off = f"{judged.error[name]:+.1%}; the runs spread by {judged.spread[name]:.1%}"
        told.append(f"{_TITLES[name]}: predicted {said}, measured {found} ({off})")
    places = [round(i * (len(judged.times_s) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]
    over_time = ", ".join(
        f"{judged.times_s[i]:.0f} s {judged.predicted_Q[i]:.0f}/{judged.measured_Q[i]:.1f}" for i in places
    )
    psi_told = "not told" if not psi else f"{max(psi):.0f} %"
    psi_told += "" if shift is None else f"; the machine's reference product took x {shift:.2f} of while calibrating"
    return [
        *told,
        f"requests in the system over time, predicted/measured: {over_time}; apart by {judged.queue_error:.1%}",
        f"{judged.runs} runs by {' and '.join('thread CPU' if c == 'cpu' else c for c in clocks)} time, PSI {psi_told}",
    ]
