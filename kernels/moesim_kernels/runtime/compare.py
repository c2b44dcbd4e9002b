"""Real against simulated: times measured once on other routes, everything predicted, then measured in turns.

The order is the method: `calibrate` never sees the routes or the cache sizes that are judged, every prediction is made
before the first judged run starts, and rounds run each case once in a fresh order, so drift of the machine meets all
alike. A case's step time is the median over its steps, its measured one the median of that over the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moesim.rng import generator
from moesim_kernels.bench.pressure import cpu_pressure
from moesim_kernels.runtime.backings import make_home
from moesim_kernels.runtime.predict import Calibrated, Deciding, Prediction, calibrated, deciding_of, run_simulated
from moesim_kernels.runtime.replay import Replay
from moesim_kernels.runtime.run import RealRun, Settings, run_real
from moesim_kernels.runtime.source import MemorySource
from moesim_kernels.runtime.weights import WeightFile

__all__ = [
    "Case", "Comparison", "Measured", "calibrate", "compare", "first_difference", "hit_rate", "measure", "predict",
    "rank_agreement",
]  # fmt: skip

_DECIDING_STEPS = 16

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A set of settings by name."""

    name: str
    settings: Settings


@dataclass(slots=True)
class Measured:
    """A case: what was predicted, then what was measured round by round (R)."""

    case: Case
    prediction: Prediction
    deciding: Deciding
    step_ns_R: list[float] = field(default_factory=list)
    mean_ns_R: list[float] = field(default_factory=list)
    stall_ns_R: list[float] = field(default_factory=list)
    hit_rate_R: list[float] = field(default_factory=list)
    same_events_R: list[bool] = field(default_factory=list)
    bytes_R: list[int] = field(default_factory=list)
    running_R: list[float] = field(default_factory=list)
    """CPU time of the computing thread over the time in which it did not wait for transfers: under 1 others ran"""
    psi_R: list[float | None] = field(default_factory=list)
    digests: set[int] = field(default_factory=set)

    @property
    def predicted_ns(self) -> float:
        return float(np.median(self.prediction.step_ns_S))

    @property
    def predicted_mean_ns(self) -> float:
        return float(self.prediction.step_ns_S.mean())

    @property
    def predicted_hit_rate(self) -> float:
        return hit_rate(self.prediction.driver)

    @property
    def measured_ns(self) -> float:
        return float(np.median(self.step_ns_R))

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_ns / self.measured_ns - 1.0

    @property
    def mean_error(self) -> float:
        """The same for means over steps."""
        return self.predicted_mean_ns / float(np.median(self.mean_ns_R)) - 1.0

    @property
    def spread(self) -> float:
        """Largest less smallest of the rounds over their median."""
        return float((max(self.step_ns_R) - min(self.step_ns_R)) / self.measured_ns)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, ns rounded."""
        return {
            "case": self.case.name,
            "capacity_bytes": self.case.settings.capacity_bytes,
            "predicted_ms": round(self.predicted_ns / 1e6, 3),
            "measured_ms": round(self.measured_ns / 1e6, 3),
            "error": round(self.error, 4),
            "mean_error": round(self.mean_error, 4),
            "spread": round(self.spread, 4),
            "step_ms": [round(x / 1e6, 3) for x in self.step_ns_R],
            "stall_ms": [round(x / 1e6, 3) for x in self.stall_ns_R],
            "deciding_ms": [round(self.deciding.look_ns / 1e6, 4), round(self.deciding.ahead_ns / 1e6, 4)],
            "predicted_hit_rate": round(self.predicted_hit_rate, 5),
            "hit_rate": [round(x, 5) for x in self.hit_rate_R],
            "same_events": self.same_events_R,
            "bytes_a_step": [round(x) for x in self.bytes_R],
            "running": [round(x, 4) for x in self.running_R],
            "psi": self.psi_R,
        }


@dataclass(slots=True)
class Comparison:
    """All cases, the calibration they were predicted from, and what the link says of itself."""

    found: Calibrated
    cases: list[Measured]
    remark: str

    @property
    def median_error(self) -> float:
        """Of |error| over the cases."""
        return float(np.median([abs(one.error) for one in self.cases]))

    @property
    def median_spread(self) -> float:
        return float(np.median([one.spread for one in self.cases]))

    @property
    def tau(self) -> float:
        """Kendall's tau-b between predicted and measured step times."""
        return rank_agreement([c.predicted_ns for c in self.cases], [c.measured_ns for c in self.cases])

    @property
    def noise_tau(self) -> float:
        """The same between the medians of odd and of even rounds: what measuring again agrees with itself."""
        if any(len(c.step_ns_R) < 2 for c in self.cases):
            return float("nan")
        return rank_agreement(*([float(np.median(c.step_ns_R[at::2])) for c in self.cases] for at in (0, 1)))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "calibration": self.found.to_json(),
            "median_error": round(self.median_error, 4),
            "median_mean_error": round(float(np.median([abs(c.mean_error) for c in self.cases])), 4),
            "median_spread": round(self.median_spread, 4),
            "tau_b": round(self.tau, 4),
            "tau_b_of_halves": None if np.isnan(self.noise_tau) else round(self.noise_tau, 4),
            "runs": sum(len(one.step_ns_R) for one in self.cases),
            "digests": sorted(f"{digest:08x}" for digest in set().union(*(one.digests for one in self.cases))),
            "remark": self.remark,
            "cases": [one.to_json() for one in self.cases],
        }


def rank_agreement(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b; nan for fewer than two values, or where one side is all alike."""
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic) if len(a) > 1 else float("nan")


def first_difference(real: RealRun, simulated: Prediction) -> str:
    """Where two runs' events part, in words; empty: nowhere."""
    ours, theirs = real.events, simulated.driver.events or []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"event {number}: {a} is real, {b} simulated"
    return "" if len(ours) == len(theirs) else f"{len(ours)} events are real, {len(theirs)} simulated"


def hit_rate(driver: Any) -> float:
    """Of experts looked up, those whose weights were there."""
    return float(driver.counters.hits / max(1, driver.counters.look_ups))


def calibrate(
    file: WeightFile,
    replay: Replay,
    shares: Sequence[float],
    kind: str = "disk",
    like: Settings | None = None,
    repeats: int = 2,
    home: MemorySource | None = None,
) -> Calibrated:
    """Run `replay` under LRU without prefetch at these shares of all experts' bytes, and keep what the parts took. The
    first run of all is thrown away: it warms the machine up."""
    whole = file.sizes.num_keys * file.sizes.slot_bytes
    like = like if like is not None else Settings(0)
    sets = [
        Settings(int(whole * share), staging=like.staging, chunk_bytes=like.chunk_bytes, seed=like.seed)
        for share in shares
    ]
    run_real(file, sets[0], replay, kind, check="never", home=home)
    runs = [run_real(file, one, replay, kind, check="never", home=home) for _ in range(repeats) for one in sets]
    return calibrated(runs, file.sizes)


def predict(
    found: Calibrated,
    file: WeightFile,
    cases: Sequence[Case],
    replay: Replay,
    other: Replay,
    kind: str,
    fit: Any,
    home: MemorySource | None = None,
) -> list[Measured]:
    """Every case by the simulator. other: the calibration's replay, of which a part is run for real under each pair of
    policies, at one cache size, to see how long they take to decide."""
    sizes = file.sizes
    part = Replay(other.steps[:_DECIDING_STEPS], other.ended[:_DECIDING_STEPS])
    half = sizes.num_keys * sizes.slot_bytes // 2
    known: dict[str, Deciding] = {}
    out = []
    for case in cases:
        settings = replace(case.settings, capacity_bytes=half)
        name = repr(settings)
        if name not in known:
            run = run_real(file, settings, part, kind, fit, check="never", home=home)
            known[name] = deciding_of(run, found.ask, settings, sizes, part, kind, fit)
        one = run_simulated(found, case.settings, sizes, replay, kind, fit, known[name])
        out.append(Measured(case, one, known[name]))
    return out


def measure(
    file: WeightFile,
    cases: Sequence[Measured],
    replay: Replay,
    rounds: int,
    kind: str = "disk",
    fit: Any = None,
    told: Told | None = None,
    seed: int = 0,
    home: MemorySource | None = None,
) -> str:
    """Run every case once a round, each round in a fresh order, and note what was found. Returns the link's remark."""
    remark = ""
    for number in range(rounds):
        order = generator(seed, "runtime/rounds", number).permutation(len(cases)).tolist()
        for at in order:
            if told is not None:
                told(f"round {number + 1} of {rounds}: {cases[at].case.name}")
            run = run_real(file, cases[at].case.settings, replay, kind, fit, check="never", home=home)
            _note(cases[at], run)
            remark = run.remark
    return remark


def compare(
    file: WeightFile,
    cases: Sequence[Case],
    replay: Replay,
    other: Replay,
    shares: Sequence[float],
    rounds: int,
    kind: str = "disk",
    fit: Any = None,
    told: Told | None = None,
    seed: int = 0,
) -> Comparison:
    """Calibrate on `other` at `shares`, predict all cases, then measure them in `rounds` rounds."""
    if told is not None:
        told("calibrating, predicting")
    home = make_home(kind, file)
    found = calibrate(file, other, shares, kind, cases[0].settings, home=home)
    measured = predict(found, file, cases, replay, other, kind, fit, home)
    remark = measure(file, measured, replay, rounds, kind, fit, told, seed, home)
    return Comparison(found, measured, remark)


def _note(one: Measured, run: RealRun) -> None:
    steps = run.steps
    step_ns = np.array([s.step_ns for s in steps], np.float64)
    stall_ns = np.array([s.stall_ns for s in steps], np.float64)
    one.step_ns_R.append(float(np.median(step_ns)))
    one.mean_ns_R.append(float(step_ns.mean()))
    one.stall_ns_R.append(float(np.median(stall_ns)))
    one.hit_rate_R.append(hit_rate(run.driver))
    one.same_events_R.append(not first_difference(run, one.prediction))
    one.bytes_R.append(int(sum(s.arrived_bytes for s in steps) / len(steps)))
    one.running_R.append(float(sum(s.cpu_ns for s in steps) / max(1.0, (step_ns - stall_ns).sum())))
    one.psi_R.append(cpu_pressure())
    one.digests.add(run.digest)
