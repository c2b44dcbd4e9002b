"""What repeated measurements of settings say: a level, how firm it is, and the machine's drift. Pure functions.

Legend: N settings, R rounds, M samples in the order they were taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim.rng import generator
from moesim_kernels.bench.drift import SAME_SPEED, drift_factors

__all__ = ["SAME_SPEED", "Levels", "at_speed", "levels", "median_half_width"]

_DRAWS = 400
_LEAST_SHARE, _LEAST_SAMPLES = 0.05, 10


@dataclass(frozen=True, slots=True)
class Levels:
    """ns_N: median over rounds, drift taken out; half_width_N: of the 90 % interval of ln(ns), by bootstrap;
    spread_N: 90th over 10th percentile of the rounds less 1; drift_M: how much slower than usual the machine was."""

    ns_N: FloatArray
    half_width_N: FloatArray
    spread_N: FloatArray
    rounds_N: IntArray
    drift_M: FloatArray


def median_half_width(sample_R: AnyArray, rng: np.random.Generator, level: float = 0.9) -> float:
    """Half width of the interval of ln(median): percentile bootstrap (Efron 1979). Infinite for fewer than three."""
    log = np.log(np.asarray(sample_R, float))
    if len(log) < 3:
        return float("inf")
    medians = np.median(log[rng.integers(0, len(log), (_DRAWS, len(log)))], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(high - low) / 2.0


def at_speed(reference_M: Sequence[float | None], calibrated_ns: float | None) -> BoolArray | None:
    """Samples that were taken while the machine was as fast as when it was calibrated, by its reference product; None
    where that is not known, or of too few of them."""
    if not calibrated_ns or any(not r for r in reference_M):
        return None
    same = np.abs(np.log(np.array(reference_M, float) / calibrated_ns)) < SAME_SPEED
    return same if same.sum() >= max(_LEAST_SAMPLES, _LEAST_SHARE * len(same)) else None


def levels(
    ns_M: ArrayLike, setting_M: AnyArray, settings: int, take_out_drift: bool, same_M: BoolArray | None = None
) -> Levels:
    """Of samples in the order they were taken, by setting. Every setting has at least one sample, each above 0. same_M:
    where the machine was as fast as when it was calibrated: times are then those of that speed; None: those of the
    machine's usual speed in these samples."""
    ns, at = np.asarray(ns_M, float), np.asarray(setting_M, np.int64)
    drift = drift_factors(ns, at) if take_out_drift else np.ones(len(ns))
    if take_out_drift and same_M is not None:
        drift = drift / np.median(drift[same_M])
    clean = ns / drift
    rows = [clean[at == n] for n in range(settings)]
    tails = np.array([np.percentile(row, [10, 90]) for row in rows])
    return Levels(
        ns_N=np.array([np.median(row) for row in rows]),
        half_width_N=np.array([median_half_width(r, generator(0, "validate/noise", n)) for n, r in enumerate(rows)]),
        spread_N=tails[:, 1] / tails[:, 0] - 1.0,
        rounds_N=np.array([len(row) for row in rows], np.int64),
        drift_M=drift,
    )
