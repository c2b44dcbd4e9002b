"""What the records mean: latencies, throughput, goodput, balance, with 90 % intervals.

An interval has three parts, kept apart in `error`: *profile*, one multiplicative error per operator for the whole run
(independent between operators, held-out error of the profile), carried to first order through the operators' time
shares; *bank*, from having drawn few batches of routing; *sampling*, batch means over 20 batches of consecutive
requests (or steps). Latencies scale with step time; throughput of an open loop only as far as the run is not paced
by its arrivals (the share of the makespan after the last arrival).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.record import NOT_YET, RequestRecords, StepRecords
from moesim.scenario.spec import SloSpec

__all__ = [
    "Errors", "distribution", "interval", "latencies", "meets_slo", "pacing", "request_latencies", "throughput",
]  # fmt: skip

Z90 = 1.6448536269514722
_BATCHES = 20
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative standard deviations (of log) of step time: from the profile's operators and from the bank."""

    profile: float
    bank: float

    @property
    def step(self) -> float:
        return math.hypot(self.profile, self.bank)


def interval(value: float, relative: float) -> list[float]:
    """The 90 % interval of a positive figure with a relative (log) standard deviation."""
    spread = math.exp(Z90 * min(relative, 50.0))
    return [value / spread, value * spread]


def distribution(values: FloatArray, weights: IntArray | None, errors: Errors) -> dict[str, Any] | None:
    """Mean and percentiles of `values` (in their order of time) with intervals; None where there are none.

    Percentiles are order statistics (the smallest value with at least that share at or below it). `weights`: how many
    times each value counts.
    """
    if not len(values):
        return None
    figures = _figures(values, weights)
    out: dict[str, Any] = dict(figures)
    sampling = _sampling(values, weights)
    out["interval90"] = {
        name: interval(value, math.hypot(errors.step, sampling[name] / value)) if value > 0 else [0.0, 0.0]
        for name, value in figures.items()
    }
    return out


def _figures(values: FloatArray, weights: IntArray | None) -> dict[str, float]:
    if weights is None:
        ordered = np.sort(values)
        mean = float(values.mean())
        at = {name: ordered[max(0, math.ceil(q * len(ordered)) - 1)] for name, q in _QUANTILES.items()}
    else:
        order = np.argsort(values, kind="stable")
        cumulative = np.cumsum(weights[order])
        mean = float(np.average(values, weights=weights))
        at = {
            name: values[order[int(np.searchsorted(cumulative, q * cumulative[-1], side="left"))]]
            for name, q in _QUANTILES.items()
        }
    return {"mean": mean, **{name: float(value) for name, value in at.items()}}


def _sampling(values: FloatArray, weights: IntArray | None) -> dict[str, float]:
    """Standard error of each figure by batch means (Law and Kelton, Simulation Modeling and Analysis, 9.5.3)."""
    names = ("mean", *_QUANTILES)
    if len(values) < 2 * _BATCHES:
        spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return dict.fromkeys(names, spread)
    parts = np.array_split(np.arange(len(values)), _BATCHES)
    table = np.array([list(_figures(values[p], None if weights is None else weights[p]).values()) for p in parts])
    error = table.std(axis=0, ddof=1) / math.sqrt(_BATCHES)
    return dict(zip(names, error.tolist(), strict=True))


def latencies(requests: RequestRecords, steps: StepRecords, errors: Errors) -> dict[str, Any]:
    """ttft_ms, tpot_ms, itl_ms, e2e_ms over completed requests, each `distribution` or None.

    ITL: gaps between output tokens of one request: one for each decode token, the length of its step (or of the stall
    a preemption caused). The others: `request_latencies`.
    """
    of_requests = {name: values for name, (_, values) in request_latencies(requests).items()}
    weights = steps.per_step(steps.run_decoding)
    gaps = np.concatenate([steps.duration_ns, steps.stall_ns]) / 1e6
    weights = np.concatenate([weights, np.ones(len(steps.stall_ns), np.int64)])
    kept = weights > 0
    return {
        "ttft_ms": distribution(of_requests["ttft_ms"], None, errors),
        "tpot_ms": distribution(of_requests["tpot_ms"], None, errors),
        "itl_ms": distribution(gaps[kept], weights[kept], errors),
        "e2e_ms": distribution(of_requests["e2e_ms"], None, errors),
    }


def request_latencies(requests: RequestRecords) -> dict[str, tuple[IntArray, FloatArray]]:
    """ttft_ms, tpot_ms, e2e_ms: rows of `requests` and their values, of completed requests.

    TPOT of a request: (last - first token) / (output - 1), where it has more than one.
    """
    row = np.flatnonzero(requests.completed)
    first, finish, arrival = (x[row] for x in (requests.first_token_ns, requests.finish_ns, requests.arrival_ns))
    output = requests.output_tokens[row]
    several = output > 1
    per_token = (finish - first)[several] / (output[several] - 1)
    return {
        "ttft_ms": (row, (first - arrival) / 1e6),
        "tpot_ms": (row[several], per_token / 1e6),
        "e2e_ms": (row, (finish - arrival) / 1e6),
    }


def pacing(requests: RequestRecords, closed_loop: bool) -> float:
    """How far throughput moves with step time: 1 in a closed loop, else the share of the makespan after the last
    arrival, for until then the arrivals set the pace. 0 where nothing completed."""
    done = requests.completed
    if not done.any():
        return 0.0
    start, end = int(requests.arrival_ns[done].min()), int(requests.finish_ns[done].max())
    return 1.0 if closed_loop else (end - int(requests.arrival_ns[done].max())) / max(end - start, 1)


def throughput(
    requests: RequestRecords, closed_loop: bool, devices: int, slo: SloSpec | None, errors: Errors
) -> dict[str, Any]:
    """duration_s, throughput{}, goodput_req_per_s and slo_met_share with intervals. The share is of the requests that
    came: one that was refused, or was not done when the run was cut off, has missed its limits."""
    done = requests.completed
    count, came = int(done.sum()), int((requests.target != NOT_YET).sum())
    if not count:
        empty: dict[str, Any] = dict.fromkeys(
            ("output_tok_per_s", "total_tok_per_s", "req_per_s", "output_tok_per_s_per_device")
        )
        return {"duration_s": 0.0, "throughput": {**empty, "interval90": None}, "goodput_req_per_s": None,
                "slo_met_share": None if slo is None else 0.0}  # fmt: skip
    start = int(requests.arrival_ns[done].min())
    end = int(requests.finish_ns[done].max())
    duration = (end - start) / 1e9
    output = int(requests.output_tokens[done].sum())
    total = output + int(requests.prompt_tokens[done].sum())
    relative = errors.step * pacing(requests, closed_loop)
    rates = {
        "output_tok_per_s": output / duration,
        "total_tok_per_s": total / duration,
        "req_per_s": count / duration,
        "output_tok_per_s_per_device": output / duration / devices,
    }
    good = spread = None
    if slo is not None:
        good = int(meets_slo(requests, slo).sum())
        stretch = math.exp(Z90 * errors.step)
        spread = sorted(int(meets_slo(requests, slo, s).sum()) for s in (stretch, 1 / stretch))
    return {
        "duration_s": duration,
        "throughput": {**rates, "interval90": {k: interval(v, relative) for k, v in rates.items()}},
        "goodput_req_per_s": None if good is None else good / duration,
        "slo_met_share": None if good is None else good / came,
        "interval90": {
            "duration_s": interval(duration, relative),
            "goodput_req_per_s": None if spread is None else [n / duration for n in spread],
            "slo_met_share": None if spread is None else [n / came for n in spread],
        },
    }


def meets_slo(requests: RequestRecords, slo: SloSpec, stretch: float = 1.0) -> BoolArray:
    """Which completed requests meet every limit when all their latencies are `stretch` times as long."""
    done = requests.completed
    first, finish, arrival = (x[done] for x in (requests.first_token_ns, requests.finish_ns, requests.arrival_ns))
    gaps = np.maximum(requests.output_tokens[done] - 1, 1)
    measured: dict[str, Callable[[], FloatArray]] = {
        "ttft_ms": lambda: (first - arrival) / 1e6,
        "tpot_ms": lambda: (finish - first) / gaps / 1e6,
        "e2e_ms": lambda: (finish - arrival) / 1e6,
    }
    good: BoolArray = np.ones(len(first), np.bool_)
    for name, values in measured.items():
        limit = getattr(slo, name)
        if limit is not None:
            good &= values() * stretch <= limit
    return good
