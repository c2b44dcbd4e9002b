"""What was predicted against what was measured. Pure: the same two files give the same report, whenever and wherever.

Legend: N settings, M samples in the order they were taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.errors import BadInput, Problem
from moesim.hardware import GRADES
from moesim_kernels.fit.conformal import clopper_pearson
from moesim_kernels.validate.bounds import BOUNDS, LEAST_SETTINGS, LEVEL, MAX_PSI, Bounds, kind_of
from moesim_kernels.validate.noise import Levels, at_speed, levels
from moesim_kernels.validate.predict import Predicted, Predictions
from moesim_kernels.validate.ranking import best_recall, pairs_by_gap, tau_b, tied_NN, top_quartile
from moesim_kernels.validate.record import Record, Sample
from moesim_kernels.validate.wrong import PartTimes, findings

__all__ = ["LAYER", "Measured", "calibrated_ns", "judge", "measured_of", "speed_shift", "steady"]

LAYER = ("dispatch", "experts", "combine")
"""the parts that make up what a layer's routed experts take"""


@dataclass(frozen=True)
class Measured:
    """Settings that were measured, by a clock. predicted: of each; at_M: setting of each sample; levels: of the step;
    part_ns: median over rounds, without drift, [N] by part."""

    predicted: tuple[Predicted, ...]
    clock: str
    levels: Levels
    part_ns: Mapping[str, FloatArray]
    psi: float | None
    quiet: bool
    wall_over_cpu: float | None
    same_speed: float | None = None
    """share of the samples taken while the machine was as fast as when it was calibrated, at which speed all times then
    are; None: not known, or no such samples"""


def measured_of(
    predictions: Predictions,
    record: Record,
    names: Sequence[str] | None = None,
    bounds: Bounds | None = None,
    thread: bool = False,
) -> Measured:
    """The samples of `names` (None: of all that has samples), by the clock that can be trusted: the wall where the
    machine was quiet, else the thread's CPU time where there is one (always with `thread`).

    Raises BadInput for samples of unknown settings and where nothing was measured.
    """
    known = {p.name: p for p in predictions.settings}
    strangers = sorted({s.setting for s in record.samples} - set(known))
    if strangers:
        raise BadInput(Problem("record", f"nothing was predicted for {', '.join(strangers[:5])}; measure anew"))
    wanted = set(known if names is None else names)
    samples = [s for s in record.samples if s.setting in wanted]
    have = {s.setting for s in samples}
    predicted = tuple(p for p in predictions.settings if p.name in have)
    if not predicted:
        raise BadInput(Problem("record", "no setting has been measured; run moesim validate again"))
    place = {p.name: n for n, p in enumerate(predicted)}
    at_M = np.array([place[s.setting] for s in samples], np.int64)
    drifts = str(predictions.facts.get("device", "cpu")) == "cpu"
    same = at_speed([s.reference_ns for s in samples], calibrated_ns(predictions.facts.get("profile"), record))
    wall = levels([s.wall_ns for s in samples], at_M, len(predicted), drifts, same)
    seen = [s.psi for s in samples if s.psi is not None]
    psi = float(np.median(seen)) if seen else None
    quiet = (psi is None or psi < MAX_PSI) and _firm(wall, bounds)
    by_cpu = (thread or not quiet) and all(s.cpu_ns > 0 for s in samples)
    found = levels([s.cpu_ns for s in samples], at_M, len(predicted), drifts, same) if by_cpu else wall
    clock = "thread CPU" if by_cpu else "wall"
    parts = _part_levels(samples, at_M, found.drift_M, len(predicted), by_cpu)
    ratio = [s.wall_ns / s.cpu_ns for s in samples if s.cpu_ns > 0]
    share = float(same.mean()) if same is not None and drifts else None
    return Measured(predicted, clock, found, parts, psi, quiet, float(np.median(ratio)) if ratio else None, share)


def _firm(found: Levels, bounds: Bounds | None) -> bool:
    """The repeats' spread is under half of what it is to judge."""
    if bounds is None:
        return True
    middle = float(np.median(found.half_width_N)) < bounds.median / 2.0
    return middle and (bounds.p90 is None or float(np.quantile(found.half_width_N, 0.9)) < bounds.p90 / 2.0)


def _part_levels(
    samples: Sequence[Sample], at_M: IntArray, drift_M: FloatArray, settings: int, by_cpu: bool
) -> dict[str, FloatArray]:
    """[N] by part, by the step's clock where a sample has both; 0 where a part was not timed."""
    out: dict[str, FloatArray] = {}
    for part in sorted({name for s in samples for name in s.part_ns}):
        ns = [(s.part_ns if by_cpu or not s.part_wall_ns else s.part_wall_ns).get(part, 0.0) for s in samples]
        clean = np.array(ns) / drift_M
        out[part] = np.array([np.median(clean[at_M == n]) for n in range(settings)])
    return out


def judge(predictions: Predictions, record: Record) -> dict[str, Any]:
    """The report, JSON through and through: all but candidates, the served run and a second measurement."""
    device, ranks = str(predictions.facts["device"]), int(predictions.facts["ranks"])
    bounds = BOUNDS[kind_of(device, ranks)]
    plain = [p.name for p in predictions.settings if p.name in set(predictions.facts["held_out"])]
    m = measured_of(predictions, record, plain, bounds)
    predicted = np.array([p.ns for p in m.predicted], float)
    parts = _parts(m)
    shift = speed_shift(predictions.facts["profile"], record)
    wrong = findings(parts, 1.0 if shift is None or m.same_speed is not None else shift)
    step = _errors(predicted, m.levels.ns_N)
    layer = _layer(m)
    tied = tied_NN(m.levels.ns_N, m.levels.half_width_N)
    out: dict[str, Any] = {
        "settings": {
            "measured": len(m.predicted),
            "predicted": len(plain),
            "rounds": [int(m.levels.rounds_N.min()), int(m.levels.rounds_N.max())],
        },
        "clock": m.clock,
        "noise": _noise(m)
        | {
            "speed_shift": None if shift is None else round(shift, 4),
            "same_speed": None if m.same_speed is None else round(m.same_speed, 4),
            "steady": m.same_speed is not None or steady(shift, bounds),
        },
        "step": step | {"by_kind": _by_kind(m)},
        "layer": layer,
        "parts": [_part_row(part) for part in parts],
        "ranking": _ranking(predicted, m.levels.ns_N, tied),
        "baselines": _baselines(m, tied),
        "coverage": _coverage(predictions, m, parts),
        "worst": _worst(m),
        "wrong": [f.to_json() for f in wrong],
        "rows": _rows(m),
    }
    out["bounds"] = _bounds(out, bounds, "" if m.quiet else "contended")
    return out


# ---- parts of the report


def _errors(predicted_N: FloatArray, measured_N: FloatArray) -> dict[str, Any]:
    """Of predicted / measured - 1: median and 90th percentile of its size, median with its sign."""
    error = predicted_N / measured_N - 1.0
    return {
        "settings": len(error),
        "median": round(float(np.median(np.abs(error))), 5),
        "p90": round(float(np.quantile(np.abs(error), 0.9)), 5),
        "bias": round(float(np.median(error)), 5),
    }


def calibrated_ns(profile: Mapping[str, Any] | None, record: Record) -> float | None:
    """The reference product's time while the profile was measured; None for another machine's."""
    if not profile or not profile.get("reference_ns") or profile.get("made_on") != _machine(record):
        return None
    return float(profile["reference_ns"])


def _machine(record: Record) -> Any:
    return record.machine.get("device" if record.machine.get("device") != "cpu" else "cpu")


def speed_shift(profile: Mapping[str, Any], record: Record) -> float | None:
    """The reference product's median while measuring over that while calibrating; None for another machine's profile.
    Where one of them is not known, as much as it changed by during the one that is: half of what lies between its 10th
    and 90th percentiles."""
    if profile.get("made_on") != _machine(record):
        return None  # the other machine's speed excuses nothing
    seen = [s.reference_ns for s in record.samples if s.reference_ns]
    if seen and profile.get("reference_ns"):
        return float(np.median(seen)) / float(profile["reference_ns"])
    here = float(np.percentile(seen, 90) / np.percentile(seen, 10)) if seen else 1.0
    return float(np.sqrt(max(here, float(profile.get("reference_drift") or 1.0))))


def steady(shift: float | None, bounds: Bounds) -> bool:
    """The machine is as fast as it was when it was calibrated, to half of what is to be judged."""
    return shift is None or abs(float(np.log(shift))) < bounds.median / 2.0


def _by_kind(m: Measured) -> dict[str, Any]:
    kinds = sorted({p.kind for p in m.predicted})
    out = {}
    for kind in kinds:
        chosen = np.array([p.kind == kind for p in m.predicted])
        predicted = np.array([p.ns for p in m.predicted], float)[chosen]
        out[kind] = _errors(predicted, m.levels.ns_N[chosen])
    return out


def _parts(m: Measured) -> list[PartTimes]:
    """Those that were both predicted and timed, by time."""
    out = []
    for part, measured_N in m.part_ns.items():
        chosen = np.array([p.part_ns.get(part, 0) > 0 for p in m.predicted]) & (measured_N > 0)
        if not chosen.any():
            continue
        rows = [p for p, use in zip(m.predicted, chosen, strict=True) if use]
        operators = sorted({p.operator[name] for p in rows for name in _operations(p, part)})
        out.append(
            PartTimes(
                part,
                np.array([p.part_ns[part] for p in rows], float),
                measured_N[chosen],
                np.array([p.part_half_width[part] for p in rows]),
                measured_N[chosen] / m.levels.ns_N[chosen],
                [p.kind for p in rows],
                {op: np.array([_of_operator(p, part, op) for p in rows], float) for op in operators},
            )
        )
    return sorted(out, key=lambda p: -float(p.measured_N.sum()))


def _operations(p: Predicted, part: str) -> list[str]:
    from moesim_kernels.real.work import PART_OF

    return [name for name in p.operation_ns if PART_OF.get(name, name) == part]


def _of_operator(p: Predicted, part: str, operator: str) -> float:
    return float(sum(p.operation_ns[name] for name in _operations(p, part) if p.operator[name] == operator))


def _part_row(part: PartTimes) -> dict[str, Any]:
    error = _errors(part.predicted_N, part.measured_N)
    return {
        "part": part.part,
        "operators": sorted(part.operator_ns),
        "share": round(float(np.median(part.share_N)), 4),
        **error,
        "interval_median_width": round(float(np.expm1(np.median(part.half_width_N))), 4),
        "covered": int((np.abs(np.log(part.predicted_N / part.measured_N)) <= part.half_width_N).sum()),
    }


def _layer(m: Measured) -> dict[str, Any] | None:
    """What the routed experts of the layers take, exchange included."""
    measured = sum((m.part_ns.get(part, np.zeros(len(m.predicted))) for part in LAYER), np.zeros(len(m.predicted)))
    predicted = np.array([sum(p.part_ns.get(part, 0) for part in LAYER) for p in m.predicted], float)
    use = (np.asarray(measured) > 0) & (predicted > 0)
    if not use.any():
        return None
    tau = tau_b(predicted[use], np.asarray(measured)[use])
    return _errors(predicted[use], np.asarray(measured)[use]) | {"tau": _finite(tau)}


def _ranking(predicted_N: AnyArray, measured_N: FloatArray, tied: AnyArray) -> dict[str, Any]:
    top = top_quartile(measured_N)
    count = len(measured_N)
    return {
        "tau": _finite(tau_b(predicted_N, measured_N, tied)),
        "tau_without_ties": _finite(tau_b(predicted_N, measured_N)),
        "tau_top_quartile": _finite(tau_b(np.asarray(predicted_N)[top], measured_N[top], tied[np.ix_(top, top)])),
        "tied_pairs": int((tied.sum() - count) // 2),
        "pairs": count * (count - 1) // 2,
        "pairs_by_gap": [gap.to_json() for gap in pairs_by_gap(predicted_N, measured_N)],
        "top3_recall": round(best_recall(predicted_N, measured_N, tied), 4),
    }


def _baselines(m: Measured, tied: AnyArray) -> dict[str, Any]:
    """roofline: errors and ranking; tokens: the ranking of the number of tokens alone."""
    roofline = np.array([p.roofline_ns for p in m.predicted])
    tokens = np.array([p.tokens for p in m.predicted], float)
    return {
        "roofline": _errors(roofline, m.levels.ns_N) | {"tau": _finite(tau_b(roofline, m.levels.ns_N, tied))},
        "tokens": {"tau": _finite(tau_b(tokens, m.levels.ns_N, tied))},
    }


def _coverage(predictions: Predictions, m: Measured, parts: Sequence[PartTimes]) -> dict[str, Any]:
    miss = np.abs(np.log(np.array([p.ns for p in m.predicted]) / m.levels.ns_N))
    width = np.array([_half_width(p, m.clock) for p in m.predicted])
    inside, count = int((miss <= width).sum()), len(miss)
    low, high = clopper_pearson(inside, count)
    state = "holds" if low <= LEVEL <= high else ("too wide" if low > LEVEL else "too narrow")
    return {
        "level": LEVEL,
        "inside": inside,
        "settings": count,
        "clopper_pearson_95": [round(low, 4), round(high, 4)],
        "median_half_width": round(float(np.expm1(np.median(width))), 4),
        "state": state,
        "speed_error": predictions.facts.get("profile", {}).get("speed_error"),
        "anchors": predictions.facts.get("anchors"),
    }


def _half_width(p: Predicted, clock: str) -> float:
    return p.half_width if clock == "wall" or p.half_width_cpu is None else p.half_width_cpu


def _noise(m: Measured) -> dict[str, Any]:
    half, drift = m.levels.half_width_N, m.levels.drift_M
    finite = bool(np.isfinite(half).all())
    return {
        "psi_percent": None if m.psi is None else round(m.psi, 2),
        "half_width_median": round(float(np.median(half)), 5) if finite else None,
        "half_width_p90": round(float(np.quantile(half, 0.9)), 5) if finite else None,
        "rounds_spread_median": round(float(np.median(m.levels.spread_N)), 4),
        "drift": [round(float(np.quantile(drift, q)), 4) for q in (0.05, 0.95)],
        "wall_over_cpu": None if m.wall_over_cpu is None else round(m.wall_over_cpu, 4),
        "quiet": m.quiet,
    }


def _worst(m: Measured) -> dict[str, Any]:
    """The setting that is off most, and the part that explains it: the one whose own miss is largest in that
    direction, with how firm the profile is about it."""
    log = np.log(np.array([p.ns for p in m.predicted]) / m.levels.ns_N)
    n = int(np.argmax(np.abs(log)))
    p, measured = m.predicted[n], float(m.levels.ns_N[n])
    miss = {part: p.part_ns.get(part, 0) - float(ns[n]) for part, ns in m.part_ns.items() if ns[n] > 0}
    miss["not timed"] = (p.ns - measured) - sum(miss.values())
    sign = 1.0 if p.ns >= measured else -1.0
    part = max(miss, key=lambda name: sign * miss[name])
    grades = p.part_grade.get(part)
    return {
        "setting": p.name,
        "overrides": list(p.overrides),
        "error": round(p.ns / measured - 1.0, 4),
        "predicted_ns": p.ns,
        "measured_ns": round(measured),
        "part": part,
        "explains": round(miss[part] / (p.ns - measured), 4) if p.ns != measured else None,
        "part_error": round(p.part_ns.get(part, 0) / float(m.part_ns[part][n]) - 1.0, 4) if part in m.part_ns else None,
        "operators": sorted({p.operator[name] for name in _operations(p, part)}),
        "grade": {g: s for g, s in zip(GRADES, grades, strict=True) if s} if grades else {},
    }


def _rows(m: Measured) -> list[dict[str, Any]]:
    """Every setting, for plots and for whoever doubts."""
    return [
        {
            "setting": p.name,
            "overrides": list(p.overrides),
            "tokens": p.tokens,
            "context": p.context,
            "predicted_ns": p.ns,
            "half_width": _half_width(p, m.clock),
            "measured_ns": round(float(m.levels.ns_N[n])),
            "measured_half_width": _finite(float(m.levels.half_width_N[n])),
            "error": round(p.ns / float(m.levels.ns_N[n]) - 1.0, 5),
            "parts": {part: [p.part_ns.get(part, 0), round(float(ns[n]))] for part, ns in m.part_ns.items()},
        }
        for n, p in enumerate(m.predicted)
    ]


def _finite(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


# ---- bounds


def _bounds(report: Mapping[str, Any], bounds: Bounds, hinder: str) -> list[dict[str, Any]]:
    """Each figure beside its bound. hinder: what keeps them from binding, or empty."""
    rows = []
    for what in ("step", "layer"):
        found = report[what]
        if found is None:
            continue
        tau = report["ranking"]["tau"] if what == "step" else found["tau"]
        enough = found["settings"] >= LEAST_SETTINGS
        rows.append(_bound(f"{what} time, median error", found["median"], bounds.median, True, hinder, enough))
        if bounds.p90 is not None:
            rows.append(_bound(f"{what} time, p90 error", found["p90"], bounds.p90, True, hinder, enough))
        rows.append(_bound(f"{what} time, tau-b", tau, bounds.tau, False, hinder, enough))
    return rows


def _bound(name: str, found: float | None, bound: float, most: bool, hinder: str, enough: bool) -> dict[str, Any]:
    met = found is not None and (found <= bound if most else found >= bound)
    binds = not hinder and enough and found is not None
    why = "" if binds else (hinder or f"fewer than {LEAST_SETTINGS} settings")
    return {
        "figure": name,
        "found": found,
        "bound": bound,
        "at": "most" if most else "least",
        "met": met,
        "binds": binds,
        "why_not": why,
    }
