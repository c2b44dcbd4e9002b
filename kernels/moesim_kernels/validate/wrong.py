"""Is the profile wrong? Parts of a step whose times are off by more than the profile itself allows for.

One multiplicative error an operator and one of the device's speed is what a profile states (DESIGN.md, "Intervals"), so
they do not average away over settings: the median of ln(measured / predicted) over settings has them in it, and nothing
else but what is left of the noise. Where it lies beyond three of the stated sigmas and the median's own interval, and
is large enough to matter for the step, the profile (or what the simulator makes of it) does not describe this machine.

Between two runs a shared machine changes its speed by more than a profile's `speed_error` may say. A product that is
always the same is timed all along, while calibrating and while measuring: what its median has changed by counts as one
more sigma.

Legend: N settings, P operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.arrays import AnyArray, FloatArray
from moesim.rng import generator
from moesim_kernels.validate.noise import median_half_width
from moesim_kernels.validate.predict import SIGMAS

__all__ = ["Finding", "PartTimes", "blame", "findings"]

SIGMAS_BEYOND = 3.0
LEAST_SETTINGS = 5
LEAST_EFFECT = 0.05
"""on the step: what a part is off by, at its share"""


@dataclass(frozen=True)
class PartTimes:
    """One part over the settings in which it takes time. operator_ns: predicted, by operator [N] each; half_width_N: of
    the profile's 90 % interval of ln(ns); share_N: of the measured step; kind_N: of the settings."""

    part: str
    predicted_N: FloatArray
    measured_N: FloatArray
    half_width_N: FloatArray
    share_N: FloatArray
    kind_N: Sequence[str]
    operator_ns: Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class Finding:
    """A part that is off. factor: measured over predicted, median over `settings` settings of `where`; allowed: the
    factor up to which the profile's own errors and the noise could explain it; effect: on the step, at the part's
    share; operator: the one to blame, `operator_factor` what it takes over what the profile says."""

    part: str
    where: str
    settings: int
    factor: float
    allowed: float
    effect: float
    operator: str
    operator_factor: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "part": self.part,
            "where": self.where,
            "settings": self.settings,
            "factor": round(self.factor, 4),
            "allowed": round(self.allowed, 4),
            "effect_on_step": round(self.effect, 4),
            "operator": self.operator,
            "operator_factor": round(self.operator_factor, 4),
        }


def findings(parts: Sequence[PartTimes], speed_shift: float = 1.0) -> list[Finding]:
    """Of every part the stratum (all settings, or those of one kind) in which it is off most, if it is; the one with
    the largest effect first. speed_shift: the reference product's time while measuring over that while calibrating."""
    out = []
    variance = float(np.log(speed_shift)) ** 2
    for part in parts:
        kinds = ("all", *sorted(set(part.kind_N)))
        found = [one for where in kinds if (one := _look(part, where, variance)) is not None]
        if found:
            out.append(max(found, key=lambda f: f.effect))
    # what is off and matters little is told beside what matters, and alone it is none
    return sorted(out, key=lambda f: -f.effect) if any(f.effect >= LEAST_EFFECT for f in out) else []


def _look(part: PartTimes, where: str, variance: float) -> Finding | None:
    """variance: of ln(speed), beyond what the part's interval has in it."""
    chosen = np.array([where in ("all", kind) for kind in part.kind_N])
    count = int(chosen.sum())
    if count < LEAST_SETTINGS:
        return None
    log_N = np.log(part.measured_N[chosen] / part.predicted_N[chosen])
    off = float(np.median(log_N))
    noise = median_half_width(np.exp(log_N), generator(0, f"validate/wrong/{part.part}/{where}"))
    sigma = np.sqrt((float(np.median(part.half_width_N[chosen])) / SIGMAS) ** 2 + variance)
    allowed = SIGMAS_BEYOND * float(sigma) + noise
    effect = float(np.median(part.share_N[chosen])) * abs(1.0 - np.exp(-off))
    if abs(off) <= allowed:
        return None
    operator, factor = blame(part, chosen)
    return Finding(part.part, where, count, float(np.exp(off)), float(np.exp(allowed)), effect, operator, factor)


def blame(part: PartTimes, chosen_N: AnyArray) -> tuple[str, float]:
    """The operator whose time explains what the part is off by, and how much longer it takes than predicted.

    Each operator alone is asked for the factor a that makes (sum of the others + a x its own) fit the measured times
    best (least absolute relative error); the best fit wins.
    """
    measured = part.measured_N[chosen_N]
    predicted = part.predicted_N[chosen_N]
    best: tuple[float, str, float] | None = None
    for operator, ns in part.operator_ns.items():
        own = ns[chosen_N]
        if not own.any():
            continue
        rest = predicted - own
        factor = _factor(measured - rest, own, measured)
        miss = float(np.median(np.abs((rest + factor * own) / measured - 1.0)))
        if best is None or miss < best[0]:
            best = (miss, operator, factor)
    return (best[1], best[2]) if best is not None else ("", float("nan"))


def _factor(wanted_N: FloatArray, own_N: FloatArray, measured_N: FloatArray) -> float:
    """The a >= 0 that minimises sum |wanted - a own| / measured: a weighted median of wanted / own."""
    use = own_N > 0
    ratio, weight = wanted_N[use] / own_N[use], own_N[use] / measured_N[use]
    order = np.argsort(ratio)
    reached = np.cumsum(weight[order])
    return max(0.0, float(ratio[order][int(np.searchsorted(reached, reached[-1] / 2.0))]))
