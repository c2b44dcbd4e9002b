"""From a finished log to a profile: machine, physics, residual curves, and how far held-out points are off.

Needs no torch: a log may come from another machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

import moesim
from moesim.errors import BadInput, Problem
from moesim.hardware import Curve, DeviceProfile
from moesim_kernels.bench.drift import usual_reference_ns
from moesim_kernels.bench.log import Point, Record, read_log, read_points, speed_error
from moesim_kernels.bench.plan import Plan
from moesim_kernels.bench.strict import canonical
from moesim_kernels.calibrate.machine import Machine, machine_of
from moesim_kernels.calibrate.points import (
    FLOP_OPS,
    Ceilings,
    Refused,
    Sorted,
    ceilings,
    least_work,
    priced_as,
    sort_points,
)
from moesim_kernels.fit.conformal import interval, log_error
from moesim_kernels.fit.curves import curves
from moesim_kernels.fit.model import Fitted, fit_operator, predict, with_fits
from moesim_kernels.fit.physics import PARAMETERS
from moesim_kernels.fit.samples import Samples

__all__ = ["Calibrated", "Judged", "calibrate_log"]

LEVEL = 0.9
_WORST_ERROR = 3.0  # 1 sigma of log; the most that a profile may state
_LEAST_POINTS = 3  # below it an operator keeps the default physics, and is not said to be measured
_SIGMAS_AT_LEVEL = 1.645  # of a normal distribution, two-sided 90 %


@dataclass(frozen=True)
class Judged:
    """One operator on its held-out points. Errors are |predicted / measured - 1|; `covered` of `points` lie within an
    interval made from the other points (none where they are too few); width: of that interval, factor minus 1.
    """

    operator: str
    points: int
    median: float
    p90: float
    tau: float
    covered: int | None
    width: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain figures, as the profile's provenance keeps them."""
        return {
            "points": self.points,
            "median": round(self.median, 4),
            "p90": round(self.p90, 4),
            "kendall_tau": None if np.isnan(self.tau) else round(self.tau, 3),
            "interval_90": {
                "covered": None if self.covered is None else f"{self.covered}/{self.points}",
                "half_width": None if self.width is None else round(self.width, 4),
            },
        }


@dataclass
class Calibrated:
    """A profile about to be written, and what there is to say about it."""

    spec: dict[str, Any]
    curves: dict[str, list[Curve]]
    judged: list[Judged]
    refused: list[Refused]
    failed: dict[str, str]
    facts: Mapping[str, Any]
    psi: float | None
    drift: float
    counts: dict[str, int] = field(default_factory=dict)


def calibrate_log(plan: Plan, log: Path, name: str, command: str) -> Calibrated:
    """Fit the points of `log` (JSON lines) into a profile called `name`. Raises BadPlan for a log that cannot be read,
    BadInput for one that says too little.
    """
    record = read_log(log, plan)
    points = read_points(plan, log)
    try:
        top = ceilings(points)
        _check_rates(points, top)
    except ValueError as error:
        message = f"{error}; {len(points)} of {len(plan.cases)} points are measured. Raise --budget and run it again"
        raise BadInput(Problem(str(log), message)) from None
    found = sort_points(points, top)
    if not found.grid:
        raise BadInput(Problem(str(log), "no operator was measured. Raise --budget and run the same command again"))
    machine = machine_of(points, top, record.machine)
    _raise_rates(machine, points, found)
    spec = {"name": name, "kind": "assumed", **machine.spec}
    base = DeviceProfile.from_spec(spec, Path())
    parts = _fit_all(found.grid, base)
    profile = with_fits(base, parts)
    if not any(profile.curves.values()):
        message = f"no operator has {_LEAST_POINTS} points, {len(points)} of {len(plan.cases)} points are measured"
        raise BadInput(Problem(str(log), f"{message}. Raise --budget and run the same command again"))
    judged, errors, intervals = _judge(profile, found.held_out)
    for op, sigma in errors.items():
        if sigma > _WORST_ERROR:
            message = f"times of {op} miss their held-out points by a factor of {math.exp(sigma):,.0f} (1 sigma)"
            raise BadInput(Problem(str(log), f"{message}: this log is of no use. Measure again with --fresh"))
    reached = {p.case.id for p in points}  # a case may fail in one run and be measured in another
    failed = {key: why for key, why in record.refused.items() if key not in reached}
    out = Calibrated(spec, dict[str, list[Curve]](), judged, found.refused, failed, record.machine, None, 1.0)
    out.psi, out.drift = _median([p.psi for p in points]), _drift(record)
    out.counts = _counts(plan, points, found, failed)
    out.curves = {op: list(found) for op, found in profile.curves.items() if found}
    out.spec |= {
        "kind": "measured",
        "fits": {op: dict(values) for op, values in sorted(profile.fits.items()) if values},
        "errors": {**errors, "host": 0.3},
        "intervals": intervals,
        "speed_error": round(speed_error(plan, record), 4),
        "curves": [f"{name}.json"],
    }
    if profile.moe_row_work:
        table = {d: {"rows": w.rows.tolist(), "work": w.work.tolist()} for d, w in profile.moe_row_work.items()}
        out.spec["moe_row_work"] = table
    out.spec["provenance"] = _provenance(plan, log, record, out, machine, command)
    return out


def _check_rates(points: Sequence[Point], top: Ceilings) -> None:
    """Raises ValueError where an operator was measured in a format that the reference product was not."""
    needed = {"bf16", *(p.case.dtype for p in points if p.case.op in FLOP_OPS)}  # bf16: of elementwise passes
    missing = sorted(needed - set(top.flop))
    if missing:
        raise ValueError(f"the log has no point of peak_gemm in {', '.join(missing)}, which says what is possible")


def _raise_rates(machine: Machine, points: Sequence[Point], found: Sorted) -> None:
    """A profile's rates are a floor under every price, so no point that is fitted may beat them: memory and
    multiplication are set to the best that any of them showed. Held-out points have no say.
    """
    refused = {r.case.id for r in found.refused}
    memory, flop = machine.spec["hbm_gb_per_s"], machine.spec["flop_per_s"]
    for p in points:
        if p.case.id in refused or p.case.role != "grid":
            continue
        moved, work, _ = least_work(p.case)
        memory = max(memory, moved / p.ns_median)
        if p.case.dtype in flop:
            flop[p.case.dtype] = max(flop[p.case.dtype], work / p.ns_median * 1e9)
    machine.spec["hbm_gb_per_s"] = memory


def _fit_all(grid: Sequence[Samples], base: DeviceProfile) -> list[Fitted]:
    """Every operator variant that has enough points and physics. The experts' gradients come after the experts, whose
    row work they use; a block after all, for it is set against the prices of its parts."""
    parts: list[Fitted] = []
    profile = base
    for s in sorted(grid, key=lambda s: (s.op == "block", s.op in ("moe_dgrad", "moe_wgrad"))):
        least = _LEAST_POINTS + (s.op == "moe")  # the table of row work asks for one more
        if s.op in PARAMETERS and len(s.ns) >= least:
            if s.op == "block":
                profile = with_fits(base, parts)
            part = fit_operator(s, profile)
            whole = s.extra["kv"] <= s.size[:, 1] if "kv" in s.extra else np.ones(len(s.ns), bool)
            if "total" in s.extra:  # so do exchanges of unequal ranks; residuals are those of equal ones
                whole = np.isclose(s.extra["total"], s.size[:, 0] * s.extra["ranks"])
            if not whole.all():  # chunks on a prefix shape the physics; residuals are those of whole prompts
                part = replace(part, curves=curves(s.where(whole), part.values, profile))
            parts.append(part)
            if s.op == "moe":
                profile = with_fits(base, parts)
    return parts


def _judge(
    profile: DeviceProfile, held_out: Sequence[Samples]
) -> tuple[list[Judged], dict[str, float], dict[str, dict[str, Any]]]:
    """Held-out errors by operator: the table, 1 sigma of log for `errors`, and `intervals`."""
    by_op: dict[str, list[Samples]] = {}
    for s in held_out:
        if s.op in profile.curves:
            by_op.setdefault(s.op, []).append(s)
    judged, errors, intervals = [], dict[str, float](), dict[str, dict[str, Any]]()
    for op, found in by_op.items():
        predicted = np.concatenate([predict(profile, s) for s in found])
        measured = np.concatenate([s.ns for s in found])
        miss = log_error(predicted, measured)
        judged.append(_judged(op, predicted, measured, miss))
        errors[op] = round(float(np.quantile(miss, LEVEL)) / _SIGMAS_AT_LEVEL, 4)
        made = interval(miss, LEVEL).model_dump()
        # held-out points fall between knots or on them; a point beyond the grid is not among them
        intervals[op] = {"measured": made, "interpolated": dict(made)}
    return judged, errors, intervals


def _judged(
    op: str, predicted: NDArray[np.float64], measured: NDArray[np.float64], miss: NDArray[np.float64]
) -> Judged:
    """The row of one operator. Coverage leaves each point out of the interval that it is tested against."""
    error = np.abs(predicted / measured - 1.0)
    tau = float(kendalltau(predicted, measured).statistic) if len(error) > 2 else float("nan")
    covered, width = None, None
    others = [interval(np.delete(miss, i), LEVEL) for i in range(len(miss))] if len(miss) > 1 else []
    if others and all(o.method == "split-conformal" for o in others):
        covered = sum(bool(m <= o.half_width) for m, o in zip(miss.tolist(), others, strict=True))
        width = float(np.expm1(np.median([o.half_width for o in others])))
    return Judged(op, len(error), float(np.median(error)), float(np.quantile(error, LEVEL)), tau, covered, width)


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None


def _drift(record: Record) -> float:
    """90th over 10th percentile of the reference product's times over the whole run."""
    seen = [line.reference_ns for line in record.lines if line.reference_ns]
    return float(np.percentile(seen, 90) / np.percentile(seen, 10)) if seen else 1.0


def _counts(plan: Plan, points: Sequence[Point], found: Sorted, failed: Mapping[str, str]) -> dict[str, int]:
    """How many points of each kind there are; they add up to the plan's."""
    return {
        "planned": len(plan.cases),
        "measured": len(points),
        "held_out": sum(p.case.role == "heldout" for p in points),
        "refused": len(found.refused),
        "could_not_run": len(failed),
        "not_reached": len(plan.cases) - len(points) - len(failed),
        "samples_least": min((p.samples for p in points), default=0),
    }


def _provenance(
    plan: Plan, log: Path, record: Record, made: Calibrated, machine: Machine, command: str
) -> dict[str, Any]:
    """Where the profile comes from: everything needed to judge it, or to make it again."""
    facts = record.machine
    named = ("torch", "triton", "cuda", "cudnn", "numpy", "python")
    versions = {name: facts[name] for name in named if facts.get(name)}
    last = record.ends[-1] if record.ends else {}
    out: dict[str, Any] = {
        "date": facts.get("date"),
        "command": command,
        "device": facts.get("device") if facts.get("device") != "cpu" else facts.get("cpu"),
        "driver": facts.get("driver") or "none",
        "versions": {"moesim": moesim.__version__, **versions},
        "kernel": facts.get("kernel"),
        "threads": plan.threads,
        "budget_s": last.get("budget_s"),
        "seconds": round(sum(float(e.get("seconds") or 0.0) for e in record.ends), 1),
        "psi_percent": None if made.psi is None else round(made.psi, 1),
        "reference_drift": round(made.drift, 3),
        "reference_ns": usual_reference_ns(np.array([x.reference_ns or 0.0 for x in record.lines])),
        "points": made.counts,
        "held_out": {j.operator: j.to_json() for j in made.judged},
        "refused": [str(r) for r in made.refused[:20]],
        "priced_by_physics_alone": sorted({priced_as(c) for c in plan.cases} & set(PARAMETERS) - set(made.curves)),
        "could_not_run": dict(list(made.failed.items())[:20]),
        "assumed": machine.assumed,
        "sources": {
            "hbm_gb_per_s": "read_bandwidth of this run, raised to the best point that was fitted",
            "flop_per_s": "peak_gemm of this run, raised to the best point that was fitted",
            **{name: f"assumed: {origin}" for name, origin in machine.assumed.items()},
            "the rest": "measured by this run",
        },
        "deployments": json.loads(canonical(plan.note.get("deployments", []))),  # keys in the order of a saved plan
        "plan": plan.plan_id,
        "log_blake2b": hashlib.blake2b(log.read_bytes(), digest_size=16).hexdigest(),
        "curve_sources": [f"moesim calibrate, kernels {facts.get('kernel')}"],
    }
    return out
