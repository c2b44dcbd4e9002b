"""Do two measurements of the same settings agree? Pure functions over what `judge.measured_of` finds."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim_kernels.fit.conformal import clopper_pearson
from moesim_kernels.validate.bounds import LEVEL
from moesim_kernels.validate.judge import Measured
from moesim_kernels.validate.predict import SIGMAS

__all__ = ["agreement"]


def agreement(first: Measured, second: Measured, speed_error: float) -> dict[str, Any]:
    """Of the settings in both: how much slower the second time was (median), and in how many the ratio lies within both
    medians' intervals and the device's own change of speed between runs.

    They agree unless that share is surely below the intervals' 90 % (Clopper and Pearson, 95 %).
    """
    place = {p.name: n for n, p in enumerate(second.predicted)}
    both = [(n, place[p.name]) for n, p in enumerate(first.predicted) if p.name in place]
    a, b = (np.array(x, np.int64) for x in zip(*both, strict=True))
    log = np.log(second.levels.ns_N[b] / first.levels.ns_N[a])
    # each run's speed is off by speed_error of its own
    half = np.sqrt(
        first.levels.half_width_N[a] ** 2 + second.levels.half_width_N[b] ** 2 + 2.0 * (SIGMAS * speed_error) ** 2
    )
    inside, count = int((np.abs(log) <= half).sum()), len(both)
    low, high = clopper_pearson(inside, count)
    return {
        "settings": count,
        "shift": round(float(np.expm1(np.median(log))), 5),
        "median_difference": round(float(np.expm1(np.median(np.abs(log)))), 5),
        "inside": inside,
        "clopper_pearson_95": [round(low, 4), round(high, 4)],
        "clocks": [first.clock, second.clock],
        "agree": bool(high >= LEVEL),
    }
