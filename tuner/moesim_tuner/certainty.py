"""How much a choice rests on the device profile: which operator's error would turn it, and how likely it is to hold.

The simulator's times are operators' times, each with an error that the profile states (1 sigma of a logarithm, one for
the whole run) and one that all of the device share. If operator o takes exp(e_o) times as long, a candidate's steps
take 1 + sum_o share_o (exp(e_o) - 1) times as long (share_o: of its steps' time), and a figure moves with that by its
slope (`moesim.observe`). Candidates on one profile share the errors, so only what differs in their shares can turn
their order; those on two profiles draw errors of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.arrays import FloatArray
from moesim.compare import value_of
from moesim.observe import Figure, Observation
from moesim.rng import generator

__all__ = ["Certainty", "Turn", "certainty", "chances"]

_DRAWS = 20_000
_FAR = math.log(10.0)
"""errors beyond ten times are no errors of a measurement"""
_GRID = 400


@dataclass(frozen=True, slots=True)
class Turn:
    """One operator. shares: of the steps' time of either candidate. factor: so many times as long as the profile says
    it would have to take for the two to be level, all else as stated; None: no error up to ten times does. sigmas: that
    in its stated errors. part: share of the variance of the two's ratio that is its error's."""

    operator: str
    shares: tuple[float, float]
    error: float
    factor: float | None
    sigmas: float | None
    part: float


@dataclass(frozen=True, slots=True)
class Certainty:
    """Of one candidate against another in one figure. holds: probability that it is better, given the profile's errors
    and nothing else (chance apart); 1 where these cannot turn it. turns: operators, the most doubtful first."""

    holds: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """One candidate in one figure: its value (or its logarithm) and how it moves with its operators."""

    value: float
    slope: float
    share: Mapping[str, float]
    profile: str
    absolute: bool

    def moved(self, scale: FloatArray) -> FloatArray:
        """Where steps take `scale` times as long."""
        return self.value + self.slope * np.log(np.maximum(scale, 1e-9))


def _line(runs: Sequence[Observation], of: Figure) -> _Line:
    value = value_of(runs, of)
    share: dict[str, float] = {}
    for run in runs:
        for operator, part in run.operator_share.items():
            share[operator] = share.get(operator, 0.0) + part / len(runs)
    slope = float(np.mean([run.figures[of.name].slope for run in runs]))
    return _Line(value if of.absolute else math.log(max(value, 1e-300)), slope, share, runs[0].profile, of.absolute)


def chances(candidates: Sequence[Sequence[Observation]], of: Figure, seed: int) -> list[float]:
    """Probability of each candidate to be the best one under errors that the profiles state, which add up to 1. Of
    candidates that the errors cannot part the first counts."""
    lines = [_line(runs, of) for runs in candidates]
    moved = np.array(_drawn(candidates, lines, seed))
    best = (moved if of.more_is_better else -moved).argmax(axis=0)
    return [float(share) for share in np.bincount(best, minlength=len(lines)) / _DRAWS]


def certainty(a: Sequence[Observation], b: Sequence[Observation], of: Figure, seed: int) -> Certainty:
    """How sure it is that a, which has the better value, is better than b."""
    one, other = _line(a, of), _line(b, of)
    sign = 1 if of.more_is_better else -1
    moved = _drawn([a, b], [one, other], seed)
    gain = sign * (moved[0] - moved[1])
    errors = {operator: error for run in (*a, *b) for operator, error in run.errors.items()}
    same = one.profile == other.profile
    slopes = {
        o: (one.slope * one.share.get(o, 0.0), other.slope * other.share.get(o, 0.0))
        for o in sorted({**one.share, **other.share})
    }
    variance = {
        o: errors[o] ** 2 * ((x - y) ** 2 if same else x**2 + y**2) for o, (x, y) in slopes.items()
    }  # to first order
    shared = [sum(s) for s in zip(*slopes.values(), strict=True)] or [0.0, 0.0]
    speed = a[0].speed_error ** 2 * ((shared[0] - shared[1]) ** 2 if same else shared[0] ** 2) + (
        0.0 if same else b[0].speed_error ** 2 * shared[1] ** 2
    )
    whole = sum(variance.values()) + speed
    turns = []
    for o in slopes if same else ():
        at = _turning(one, other, o)
        sigmas = None if at is None or not errors[o] else abs(at) / errors[o]
        factor = None if at is None else math.exp(at)
        part = variance[o] / whole if whole else 0.0
        turns.append(Turn(o, (one.share.get(o, 0.0), other.share.get(o, 0.0)), errors[o], factor, sigmas, part))
    turns.sort(key=lambda t: (math.inf if t.sigmas is None else t.sigmas, -t.part, t.operator))
    level = 0.5 * float((gain == 0).mean())
    return Certainty(float((gain > 0).mean()) + level, tuple(turns))


def _drawn(candidates: Sequence[Sequence[Observation]], lines: Sequence[_Line], seed: int) -> list[FloatArray]:
    """Each candidate's figure [draws] under errors that those of one profile share."""
    errors: dict[tuple[str, str], float] = {}
    for runs in candidates:
        for run in runs:
            errors |= {(run.profile, operator): error for operator, error in run.errors.items()}
            errors[run.profile, ""] = run.speed_error
    drawn = {
        key: error * generator(seed, f"tune/certainty/{key[0]}/{key[1]}").standard_normal(_DRAWS)
        for key, error in sorted(errors.items())
    }
    out = []
    for line in lines:
        speed = drawn[line.profile, ""]
        scale = np.ones(_DRAWS)
        for operator, share in sorted(line.share.items()):
            scale += share * np.expm1(drawn[line.profile, operator] + speed)
        out.append(line.moved(scale))
    return out


def _turning(one: _Line, other: _Line, operator: str) -> float | None:
    """The error of the operator, nearest to none, at which the two are level; they share the profile."""
    error = np.linspace(-_FAR, _FAR, 2 * _GRID + 1)

    def apart(e: FloatArray) -> FloatArray:
        more = np.expm1(e)
        return one.moved(1 + one.share.get(operator, 0.0) * more) - other.moved(
            1 + other.share.get(operator, 0.0) * more
        )

    gap = apart(error)
    crossed = np.flatnonzero(np.sign(gap[:-1]) != np.sign(gap[1:]))
    if not len(crossed):
        return None
    at = int(crossed[np.abs(error[crossed]).argmin()])
    low, high = error[at], error[at + 1]
    for _ in range(60):
        middle = (low + high) / 2
        if np.sign(apart(np.array([middle]))[0]) == np.sign(gap[at]):
            low = middle
        else:
            high = middle
    return float((low + high) / 2)
