"""What each setting of the winner does: its neighbours, one parameter at a time, and each change put back.

Everything is run under the same seeds and traffic as the judged finalists, so it is compared as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moesim.compare import difference
from moesim.observe import Observation
from moesim_tuner.definition import Definition
from moesim_tuner.figures import figure, violation
from moesim_tuner.heldout import HeldOut
from moesim_tuner.judge import Ran, run_points, same_by_chance
from moesim_tuner.parameter import Parameter
from moesim_tuner.protocols import Workers
from moesim_tuner.records import Point

__all__ = ["Knob", "Moved", "Shape", "look_around"]

Shape = Literal["flat", "gentle", "steep"]
"""of the objectives around the winner: no neighbour can be told from it or is 1 % away; one is surely over 5 % worse"""
_FLAT, _STEEP = 0.01, 0.05
_LEVEL = 0.9
_BESIDE = 3
"""other values of a parameter without order that are tried at most"""


@dataclass(frozen=True, slots=True)
class Moved:
    """The winner with one parameter moved. value: to which; None: as the scenario has it, outside the space. state:
    `done`, `infeasible`, `illegal`, `failed`. breaks: constraints that it does not keep. ratios: objective -> (ratio to
    the winner's, or difference where it is compared so, its 90 % interval or None). worse, better: surely, by more than
    chance and the profile's errors, in some objective."""

    parameter: str
    value: Any
    state: str
    reasons: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()
    ratios: Mapping[str, tuple[float, tuple[float, float] | None]] | None = None
    worse: bool = False
    better: bool = False
    same: bool = False
    """chance alone could part the two in every objective"""
    as_good: bool = False
    """no worse in any objective, by its value or by less than 1 % that chance could make"""


@dataclass(frozen=True, slots=True)
class Knob:
    """One parameter of the winner. edge: it stands at the end of its range, and its one neighbour is no better. back:
    the change from the settings as written put back, where there is one."""

    parameter: str
    value: Any
    shape: Shape
    neighbours: tuple[Moved, ...]
    edge: bool = False
    untried: int = 0
    """values beside it that were not tried"""
    default: Any = None
    back: Moved | None = None


def look_around(
    definition: Definition,
    held: HeldOut,
    point: Point,
    default: Point,
    runs: Sequence[Observation],
    seeds: Sequence[int],
    workers: Workers,
) -> list[Knob]:
    """Every parameter of the winner's `point`. runs: the winner's, one for each of `seeds`."""
    space = definition.space
    asked: list[tuple[Parameter, Any, bool]] = []
    untried: dict[str, int] = {}
    for p in space.active(point):
        if p.name not in point:
            continue
        near, untried[p.name] = _beside(p, point[p.name])
        asked += [(p, value, False) for value in near]
        if default.get(p.name) != point[p.name]:
            asked.append((p, default.get(p.name), True))
    points = [_moved(definition, point, default, p, value) for p, value, _ in asked]
    tested = run_points(definition, held, points, seeds, workers)
    moved = [_weighed(definition, p, value, found, runs) for (p, value, _), found in zip(asked, tested, strict=True)]
    out = []
    for p in space.active(point):
        if p.name not in point:
            continue
        mine = [(m, back) for (q, _, back), m in zip(asked, moved, strict=True) if q is p]
        near = [m for m, back in mine if not back]
        back = next((m for m, is_back in mine if is_back), None)
        out.append(_knob(p, point[p.name], near, back, default.get(p.name), untried[p.name]))
    return out


def _beside(p: Parameter, value: Any) -> tuple[list[Any], int]:
    """The next value on either side; of a parameter without order at most three others. And how many were left out."""
    near = p.near(p.own(value))
    if not p.ordered and p.values is not None:
        return list(near[:_BESIDE]), max(0, len(near) - _BESIDE)
    if p.values is None:
        return list(near), 0
    at = p.position(value)
    assert at is not None
    return [p.values[i] for i in (at - 1, at + 1) if 0 <= i < len(p.values)], 0


def _moved(definition: Definition, point: Point, default: Point, p: Parameter, value: Any) -> dict[str, Any]:
    if value is None and p.name not in default:  # as the scenario has it
        return {name: v for name, v in point.items() if name != p.name}
    return dict(definition.space.complete({**point, p.name: value}, default))


def _weighed(definition: Definition, p: Parameter, value: Any, found: Ran, runs: Sequence[Observation]) -> Moved:
    moved = Moved(p.name, value, found.state, found.reasons)
    if not found.runs:
        return moved
    spec = definition.spec
    breaks = []
    for name, limit in spec.constraints.items():
        values = [run.figures[name].value for run in found.runs if name in run.figures]
        mean = {name: sum(values) / len(values)} if len(values) == len(found.runs) else {}
        if violation(mean, name, limit.min, limit.max) > 0:
            breaks.append(name)
    ratios: dict[str, tuple[float, tuple[float, float] | None]] = {}
    worse = better = False
    same = as_good = True
    for name in spec.objectives:
        of = figure(name)
        if not all(name in run.figures for run in (*found.runs, *runs)):
            return replace(moved, breaks=(*breaks, name))
        apart = difference(found.runs, runs, of, _LEVEL)
        gain = apart.centre * (1 if of.more_is_better else -1)
        sure = abs(apart.centre) > max(apart.half, of.resolution)
        worse, better = worse or (sure and gain < 0), better or (sure and gain > 0)
        alike = same_by_chance(apart, of)
        same = same and alike
        as_good = as_good and (gain >= 0 or (alike and abs(apart.centre) < _FLAT))
        ends = (apart.centre - apart.half, apart.centre + apart.half)
        if of.absolute:
            ratios[name] = apart.centre, ends if math.isfinite(apart.half) else None
        else:
            low_high = (math.exp(ends[0]), math.exp(ends[1])) if apart.half < 50 else None
            ratios[name] = math.exp(apart.centre), low_high
    return replace(moved, breaks=tuple(breaks), ratios=ratios, worse=worse, better=better, same=same, as_good=as_good)


def _off(m: Moved) -> float:
    """The largest relative change of an objective; of differences the change itself."""
    moved = (m.ratios or {}).items()
    return max((abs(ratio if figure(name).absolute else ratio - 1) for name, (ratio, _) in moved), default=0.0)


def _knob(p: Parameter, value: Any, near: list[Moved], back: Moved | None, default: Any, untried: int) -> Knob:
    ran = [m for m in near if m.ratios is not None]
    shape: Shape = "gentle"
    if any(m.worse and _off(m) > _STEEP for m in ran):
        shape = "steep"
    elif all(m.same or _off(m) < _FLAT for m in ran):
        shape = "flat"
    at = p.position(value) if p.ordered and p.values is not None else None
    ends = p.values is not None and at in (0, len(p.values) - 1) and len(p.values) > 1
    if p.values is None:
        ends = value in (p.low, p.high)
    edge = ends and shape != "flat" and bool(ran) and all(m.worse or m.breaks for m in ran)
    return Knob(p.name, value, shape, tuple(near), edge, untried, default, back)
