"""Intervals of whole steps, from whole steps: split-conformal prediction.

A step is more than its operators, and a machine has another speed today than when it was calibrated. So some steps,
drawn like those that are judged later, are measured before anything is predicted. The k-th smallest of their |ln
(predicted / measured)|, k = ceil(0.9 (n + 1)), is the half width that a further step keeps with a chance of 90 %,
whatever the errors' distribution, as long as all are drawn and measured alike (Vovk et al., Algorithmic Learning in a
Random World, 2005, section 2.1; Lei et al., arXiv:1604.04173). The predictions themselves stay the simulator's.

A machine whose reference product takes another time than while it was calibrated is in another state, which need not be
that of the measurement to come: what all anchors are off by alike is then the machine's speed of that minute. The half
width is of what is left of them, and the profile's `speed_error` stands for the speed (in quadrature).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.errors import BadInput, Problem
from moesim_kernels.fit.conformal import interval
from moesim_kernels.validate.bounds import BOUNDS, LEVEL, kind_of
from moesim_kernels.validate.judge import measured_of, speed_shift, steady
from moesim_kernels.validate.predict import SIGMAS, Predictions
from moesim_kernels.validate.record import Record

__all__ = ["LEAST", "Anchored", "anchored_by"]

LEAST = 9
"""steps below which no quantile reaches 90 %"""


@dataclass(frozen=True, slots=True)
class Anchored:
    """half_width: of ln(ns), by the steps' wall time and by thread CPU time where there is one (else the same); bias:
    median of ln(predicted / measured), which is not taken out of any prediction; steps: how many; steady: the machine
    was as fast as when it was calibrated."""

    half_width: float
    half_width_cpu: float
    bias: float
    steps: int
    steady: bool = True

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "steps": self.steps,
            "half_width": round(self.half_width, 5),
            "half_width_cpu": round(self.half_width_cpu, 5),
            "bias": round(self.bias, 5),
            "steady": self.steady,
        }

    def applied(self, predictions: Predictions) -> Predictions:
        """Predictions of steps like these with their intervals. Parts keep those of the profile."""
        wall, cpu = round(self.half_width, 5), round(self.half_width_cpu, 5)
        rows = (replace(p, half_width=wall, half_width_cpu=cpu) for p in predictions.settings)
        return Predictions(tuple(rows), predictions.facts)


def anchored_by(predicted: Predictions, record: Record) -> Anchored:
    """What the anchors' record says of their predictions, whose facts have `device`, `ranks` and `profile`. Raises
    BadInput for fewer than LEAST that were measured."""
    facts = predicted.facts
    bounds = BOUNDS[kind_of(str(facts["device"]), int(facts["ranks"]))]
    shift = speed_shift(facts["profile"], record)
    calm = True
    widths = []
    bias, steps = 0.0, 0
    for thread in (False, True):
        found = measured_of(predicted, record, None, None, thread)
        miss = np.log(np.array([p.ns for p in found.predicted]) / found.levels.ns_N)
        steps = len(miss)
        if steps < LEAST:
            message = f"{steps} anchors were measured, and an interval of 90 % takes {LEAST}; raise --anchors"
            raise BadInput(Problem("anchors", message))
        calm = found.same_speed is not None or steady(shift, bounds)
        middle = float(np.median(miss))
        width = float(interval(np.abs(miss if calm else miss - middle), LEVEL).half_width)
        speed = 0.0 if calm else SIGMAS * float(facts["profile"]["speed_error"])
        widths.append(float(np.hypot(width, speed)))
        bias = bias if thread else middle
    return Anchored(widths[0], widths[1], bias, steps, calm)
