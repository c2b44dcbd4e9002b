"""What repeated measurements of settings say: a level, how firm it is, and the machine's drift. Pure functions.

Legend: N settings, R rounds, M samples in the order they were taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.rng import generator
from moesim_kernels.bench.drift import drift_factors

__all__ = ["Levels", "levels", "median_half_width"]

_DRAWS = 400


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


def levels(ns_M: ArrayLike, setting_M: AnyArray, settings: int, take_out_drift: bool, seed: int = 0) -> Levels:
    """Of samples in the order they were taken, by setting. Every setting has at least one sample, each above 0."""
    ns, at = np.asarray(ns_M, float), np.asarray(setting_M, np.int64)
    drift = drift_factors(ns, at) if take_out_drift else np.ones(len(ns))
    clean = ns / drift
    rows = [clean[at == n] for n in range(settings)]
    tails = np.array([np.percentile(row, [10, 90]) for row in rows])
    return Levels(
        ns_N=np.array([np.median(row) for row in rows]),
        half_width_N=np.array([median_half_width(r, generator(seed, "validate/noise", n)) for n, r in enumerate(rows)]),
        spread_N=tails[:, 1] / tails[:, 0] - 1.0,
        rounds_N=np.array([len(row) for row in rows], np.int64),
        drift_M=drift,
    )
