"""Drift of a machine during a run, seen in the run itself: all cases slow down and speed up together. numpy alone.

Samples are taken in interleaved rounds, so the neighbours of a sample in time are other cases under the same
conditions. log ns = case + drift(time) is fitted by medians in turn (Tukey's median polish, Exploratory Data Analysis,
1977, chapter 11): a case's level is the median of its samples without the drift, the drift at a sample the median over
the `2 NEIGHBOURS + 1` samples around it of what the levels leave. The drift's median is one, so levels stay where they
were. Measured on two shared cores over four runs of 34 cases: quartile range 15 % before, 9 % after; odd against even
samples of a case 4.0 % before, 1.8 % after. Dividing by a reference GEMM changed neither (16 %, 4.3 %): what disturbs
it is not what disturbs its neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_CASES", "SAME_SPEED", "drift_factors", "usual_reference_ns"]

NEIGHBOURS = 10
LEAST_CASES = 8  # with fewer a window would hold a case several times, and take its own spread for drift
_TURNS = 5
SAME_SPEED = 0.12
"""|ln| of two times of the reference product, up to which the machine counts as being as fast"""


def drift_factors(ns: NDArray[np.float64], case: NDArray[np.int64]) -> NDArray[np.float64]:
    """How much slower than usual the machine was at each sample, [N], median 1.

    ns: samples in the order they were taken, above 0; case: index of each sample's case. All ones where fewer than
    `LEAST_CASES` cases were measured.
    """
    _, case = np.unique(case, return_inverse=True)
    cases = int(case.max(initial=-1)) + 1
    if cases < LEAST_CASES:
        return np.ones(len(ns))
    log = np.log(ns)
    order = np.argsort(case, kind="stable")
    ends = np.cumsum(np.bincount(case, minlength=cases))[:-1]
    drift = np.zeros(len(ns))
    for _ in range(_TURNS):
        level = np.array([np.median(part) for part in np.split((log - drift)[order], ends)])
        drift = _running_median(log - level[case])
        drift -= np.median(drift)
    return np.exp(drift)


def _running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median of the window around each value; at the ends the window is what there is of it."""
    blank = np.full(NEIGHBOURS, np.nan)
    padded = np.concatenate([blank, values, blank])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBOURS + 1)
    parts = [np.nanmedian(windows[at : at + 4096], axis=1) for at in range(0, len(windows), 4096)]
    return np.concatenate(parts) if parts else np.zeros(0)


def usual_reference_ns(reference_ns: NDArray[np.float64]) -> float | None:
    """The reference product's time at the speed that the machine had most often; None for no times.

    A shared core has two speeds, by what its other thread does, half as fast again. The mean or median of the times may
    be neither; this is the median of the densest window of +-`SAME_SPEED`.
    """
    log = np.sort(np.log(reference_ns[reference_ns > 0]))
    if not len(log):
        return None
    held = np.searchsorted(log, log + 2.0 * SAME_SPEED, side="right") - np.arange(len(log))
    first = int(held.argmax())
    return float(np.exp(np.median(log[first : first + int(held[first])])))
