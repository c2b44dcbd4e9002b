"""A served run judged: what was simulated beside what was served, from the same kind of records.

The figures are the house's own (`moesim.metrics`), taken from records of requests alone, so both sides are counted
alike: time to first token, time per output token, makespan, and the requests in the system over time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim_kernels.validate.bounds import SERVED

__all__ = ["BOUNDS", "ServedJudgement", "in_system", "judge_served", "served_figures"]

BOUNDS: Mapping[str, float] = {
    "tpot_mean_ms": SERVED["tpot"], "makespan_s": SERVED["makespan"], "ttft_p50_ms": SERVED["ttft_p50"]
}  # fmt: skip
"""|predicted / measured - 1| that a quiet CPU is to keep"""
_BINS = 40


def served_figures(requests: Mapping[str, Any]) -> dict[str, float]:
    """ttft_p50_ms, ttft_mean_ms, tpot_mean_ms (mean over requests of more than one token), makespan_s (first arrival to
    last end), in_system_mean (time average). requests: columns arrival_ns, first_token_ns, finish_ns, output_tokens."""
    arrival, first, finish, output = _columns(requests)
    done = finish >= 0
    arrival, first, finish, output = arrival[done], first[done], finish[done], output[done]
    ttft = (first - arrival) / 1e6
    several = output > 1
    tpot = (finish - first)[several] / (output[several] - 1) / 1e6
    span = float(finish.max() - arrival.min())
    return {
        "ttft_p50_ms": float(np.median(ttft)),
        "ttft_mean_ms": float(ttft.mean()),
        "tpot_mean_ms": float(tpot.mean()) if len(tpot) else 0.0,
        "makespan_s": span / 1e9,
        "in_system_mean": float((finish - arrival).sum() / span),
    }


def in_system(requests: Mapping[str, Any], at_ns: IntArray) -> FloatArray:
    """Requests that have arrived and not ended, at each instant."""
    arrival, _, finish, _ = _columns(requests)
    done = finish >= 0
    there = np.searchsorted(np.sort(arrival[done]), at_ns, side="right")
    gone = np.searchsorted(np.sort(finish[done]), at_ns, side="right")
    return np.asarray(there - gone, np.float64)


@dataclass(frozen=True, slots=True)
class ServedJudgement:
    """predicted, measured (median of the runs) and error by figure; spread: largest less smallest of the runs over
    their median. times_s, predicted_Q, measured_Q: requests in the system over time, the runs' mean; queue_error: mean
    distance of the two over the measured mean. missed: figures beyond their bound."""

    predicted: dict[str, float]
    measured: dict[str, float]
    error: dict[str, float]
    spread: dict[str, float]
    times_s: FloatArray
    predicted_Q: FloatArray
    measured_Q: FloatArray
    queue_error: float
    runs: int

    @property
    def missed(self) -> list[str]:
        """By name; those whose spread over the runs is above half the bound are not judged."""
        return [name for name, bound in BOUNDS.items() if self.binds(name) and abs(self.error[name]) > bound]

    def binds(self, name: str) -> bool:
        """Whether the runs agree well enough among themselves."""
        return self.spread[name] <= BOUNDS[name] / 2

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "runs": self.runs,
            "figures": {
                name: {
                    "predicted": round(self.predicted[name], 4),
                    "measured": round(self.measured[name], 4),
                    "error": round(self.error[name], 4),
                    "spread": round(self.spread[name], 4),
                    "bound": BOUNDS.get(name),
                }
                for name in self.predicted
            },
            "queue": {
                "times_s": np.round(self.times_s, 3).tolist(),
                "predicted": np.round(self.predicted_Q, 3).tolist(),
                "measured": np.round(self.measured_Q, 3).tolist(),
                "error": round(self.queue_error, 4),
            },
            "missed": self.missed,
        }


def judge_served(predicted: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> ServedJudgement:
    """predicted, runs: columns of requests, of the simulated run and of each served one."""
    said = served_figures(predicted)
    each = [served_figures(run) for run in runs]
    measured = {name: float(np.median([one[name] for one in each])) for name in said}
    spread = {
        name: (max(one[name] for one in each) - min(one[name] for one in each)) / max(measured[name], 1e-12)
        for name in said
    }
    end = max(int(np.max(_columns(one)[2])) for one in (predicted, *runs))
    at_ns = np.linspace(0, end, _BINS, dtype=np.int64)
    predicted_Q = in_system(predicted, at_ns)
    measured_Q = np.mean([in_system(run, at_ns) for run in runs], axis=0)
    apart = float(np.abs(predicted_Q - measured_Q).mean() / max(measured_Q.mean(), 1e-12))
    error = {name: said[name] / max(measured[name], 1e-12) - 1.0 for name in said}
    return ServedJudgement(said, measured, error, spread, at_ns / 1e9, predicted_Q, measured_Q, apart, len(runs))


def _columns(requests: Mapping[str, Any]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    names = ("arrival_ns", "first_token_ns", "finish_ns", "output_tokens")
    a, b, c, d = (np.asarray(requests[name], np.int64) for name in names)
    return a, b, c, d
