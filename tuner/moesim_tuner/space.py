"""The search space: parameters with their values, which of them mean something where, and the fields they set.

A point maps parameter to a scalar: the value itself, or the label of a choice that is a mapping or sets several fields.
Parameters whose `when` does not hold are not in the point. Everything here is plain Python: Optuna's view of a space is
made in `moesim_tuner.search`.

Counting does not enumerate. Parameters are visited in order; what a value decides about those to come is only which of
them are *dead* (their `when` cannot hold any more), a set of bits. The number of points from a parameter on is a
function of those bits, kept once computed; drawing, `at` and `index` walk down the same counts.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.tune_spec import ParameterSpec
from moesim.tune_values import MOST_VALUES, Scalar, identity
from moesim_tuner.parameter import Parameter, parameter_of
from moesim_tuner.records import Point, canonical

__all__ = ["MOST_VALUES", "Parameter", "Scalar", "Space"]

_MOST_POINTS = 10_000_000
_MOST_STATES = 200_000
_LEVELS = 100
"""a continuous parameter counts as so many values where a draw weighs branches of a space"""


class Space:
    """The parameters of a `tune` block, those that a `when` names before those it belongs to. Raises BadInput with
    every problem: a `when` that names no parameter or no value of it, one that depends on itself."""

    def __init__(self, specs: Mapping[str, ParameterSpec]) -> None:
        self.parameters = tuple(parameter_of(name, specs) for name in _in_order(specs))
        self.named: Mapping[str, Parameter] = {p.name: p for p in self.parameters}
        self._memo: dict[tuple[int, int], int] = {}

    # ---- points

    def active(self, point: Point) -> list[Parameter]:
        """Parameters that mean something beside the values of `point`, those they depend on before them."""
        out: list[Parameter] = []
        on: set[str] = set()
        for p in self.parameters:
            if p.when is None or all(name in on and _among(point, name, values) for name, values in p.when.items()):
                out.append(p)
                on.add(p.name)
        return out

    def __contains__(self, point: object) -> bool:
        """Is it a point of the space: a value of its own for every parameter that means something, and no other?"""
        if not isinstance(point, Mapping):
            return False
        active = self.active(point)
        return {p.name for p in active} == set(point) and all(point[p.name] in p for p in active)

    def complete(self, point: Point, defaults: Point | None = None) -> dict[str, Scalar]:
        """`point` without what means nothing in it, and with what is missing: the value of `defaults` where it is one,
        else the first. Raises ValueError for a value that its parameter does not take."""
        out: dict[str, Scalar] = {}
        for p in self.parameters:
            if p.when is not None and not all(_among(out, name, values) for name, values in p.when.items()):
                continue
            if p.name in point:
                out[p.name] = p.own(point[p.name])
            elif defaults is not None and p.name in defaults and defaults[p.name] in p:
                out[p.name] = p.own(defaults[p.name])
            else:
                out[p.name] = p.nearest(p.low) if p.values is None else p.values[0]
        return out

    def neighbours(self, point: Point, defaults: Point | None = None) -> list[dict[str, Scalar]]:
        """Points with one parameter changed: an ordered one to its next values and to a 20th of its range away, any
        other to every other value; completed by `defaults`."""
        return [
            self.complete({**point, p.name: value}, defaults)
            for p in self.active(point)
            if p.name in point
            for value in p.near(p.own(point[p.name]))
        ]

    def overrides(self, point: Point) -> tuple[str, ...]:
        """`a.b=c` texts that turn the scenario into this point: a field before those inside it, else in the order of
        the parameters. Raises ValueError for a value that its parameter does not take."""
        fields = [
            (path, value)
            for p in self.active(point)
            if p.name in point
            for path, value in p.fields(point[p.name]).items()
        ]
        return tuple(f"{path}={_yaml(value)}" for path, value in sorted(fields, key=lambda f: f[0].count(".")))

    def key(self, point: Point) -> str:
        """One spelling of a point."""
        on = [p for p in self.active(point) if p.name in point]
        return canonical({p.name: p.own(point[p.name]) if point[p.name] in p else point[p.name] for p in on})

    # ---- counting

    @cached_property
    def _kills(self) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]:
        """By parameter: (parameters that cannot mean anything any more, positions of the values that have it so), in
        the order of the values; a continuous one has no value and kills none."""
        out = []
        for p in self.parameters:
            groups: dict[int, list[int]] = {}
            after = [(1 << j, c.when[p.name]) for j, c in enumerate(self.parameters) if c.when and p.name in c.when]
            among = [(bit, {identity(v) for v in values}) for bit, values in after]
            for at, value in enumerate(p.values or ()):
                dead = sum(bit for bit, values in among if identity(value) not in values)
                groups.setdefault(dead, []).append(at)
            out.append(tuple((dead, tuple(ats)) for dead, ats in groups.items()) or ((0, ()),))
        return tuple(out)

    @cached_property
    def _below(self) -> tuple[int, ...]:
        """By parameter: those that name it in their `when`."""
        return tuple(
            sum(1 << j for j, c in enumerate(self.parameters) if c.when and p.name in c.when) for p in self.parameters
        )

    def _count(self, index: int, dead: int) -> int:
        """How many ways there are to go on from parameter `index`, where those of the bits `dead` mean nothing."""
        if index == len(self.parameters):
            return 1
        known = self._memo.get((index, dead))
        if known is not None:
            return known
        if len(self._memo) > _MOST_STATES:
            raise _TooEntangledError
        if dead >> index & 1:
            count = self._count(index + 1, dead & ~(1 << index) | self._below[index])
        else:
            count = sum((len(ats) or _LEVELS) * self._count(index + 1, dead | more) for more, ats in self._kills[index])
        self._memo[index, dead] = count
        return count

    @cached_property
    def count(self) -> int | None:
        """How many points there are, exactly, however many; None where a parameter is continuous (or conditions are
        entangled beyond counting)."""
        if any(p.values is None for p in self.parameters):
            return None
        try:
            return self._count(0, 0)
        except _TooEntangledError:
            return None

    @property
    def size(self) -> int | None:
        """How many points there are; None where a parameter is continuous or there are over 10 million."""
        return self.count if self.count is not None and self.count <= _MOST_POINTS else None

    def points(self) -> Iterator[dict[str, Scalar]]:
        """Every point, each once, in the order of the values. Raises BadInput for a continuous space."""
        if any(p.values is None for p in self.parameters):
            raise BadInput("a continuous parameter has no list of values; give it a step, or a factor")
        if not any(p.when for p in self.parameters):
            names = [p.name for p in self.parameters]
            yield from (
                dict(zip(names, v, strict=True)) for v in itertools.product(*(p.values or () for p in self.parameters))
            )
        else:
            yield from self._points(0, 0, {})

    def _points(self, index: int, dead: int, point: dict[str, Scalar]) -> Iterator[dict[str, Scalar]]:
        while index < len(self.parameters) and dead >> index & 1:
            index, dead = index + 1, dead & ~(1 << index) | self._below[index]
        if index == len(self.parameters):
            yield dict(point)
            return
        p = self.parameters[index]
        kills = {at: more for more, ats in self._kills[index] for at in ats}
        for at, value in enumerate(p.values or ()):
            point[p.name] = value
            yield from self._points(index + 1, dead | kills[at], point)
        del point[p.name]

    def index(self, point: Point) -> int:
        """Where a point stands in `points()`. Raises ValueError for what is no point."""
        if point not in self or self.count is None:
            raise ValueError(f"not a point of a space that can be enumerated: {dict(point)}")
        found, dead = 0, 0
        for i, p in enumerate(self.parameters):
            if dead >> i & 1:
                dead = dead & ~(1 << i) | self._below[i]
                continue
            place, chosen = p.position(point[p.name]), 0
            assert place is not None
            for more, ats in self._kills[i]:
                found += bisect_left(ats, place) * self._count(i + 1, dead | more)
                chosen = more if place in ats else chosen
            dead |= chosen
        return found

    def at(self, index: int) -> dict[str, Scalar]:
        """The point that stands at `index` in `points()`. Raises IndexError."""
        if self.count is None or not 0 <= index < self.count:
            raise IndexError(f"{index}: the space has {self.count} points that can be listed")
        point: dict[str, Scalar] = {}
        dead = 0
        for i, p in enumerate(self.parameters):
            if dead >> i & 1:
                dead = dead & ~(1 << i) | self._below[i]
                continue
            groups = self._kills[i]
            more, place = groups[0][0], 0
            if len(groups) == 1:
                place, index = divmod(index, self._count(i + 1, dead | more))
            else:
                for place, more in sorted((place, more) for more, ats in groups for place in ats):  # noqa: B007
                    size = self._count(i + 1, dead | more)
                    if index < size:
                        break
                    index -= size
            assert p.values is not None
            point[p.name] = p.values[place]
            dead |= more
        return point

    def random(self, rng: np.random.Generator) -> dict[str, Scalar]:
        """A point, each as likely. A continuous parameter is drawn uniformly (in equal ratios where log), and weighs
        as much as 100 values where branches of a space are chosen between."""
        point: dict[str, Scalar] = {}
        dead = 0
        for i, p in enumerate(self.parameters):
            if dead >> i & 1:
                dead = dead & ~(1 << i) | self._below[i]
                continue
            groups = self._kills[i]
            more, ats = groups[0]
            if len(groups) > 1:
                more, ats = groups[_pick([len(ats) * self._weight(i + 1, dead | more) for more, ats in groups], rng)]
            point[p.name] = p.draw(rng) if p.values is None else p.values[ats[int(rng.integers(len(ats)))]]
            dead |= more
        return point

    def _weight(self, index: int, dead: int) -> int:
        try:
            return self._count(index, dead)
        except _TooEntangledError:  # then each parameter alone is uniform
            return 1

    # ---- the scenario as it is written

    def point_of(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Scalar]:
        """The point that a scenario stands at, as far as its values are in the space: `raw` as written, `defaults`
        the fields it leaves out (both nested mappings: `Scenario.raw`, `Scenario.resolved`)."""
        from moesim_tuner.standing import value_at

        paths = {p.name: {path for fields in p.sets or ({p.name: 0},) for path in fields} for p in self.parameters}
        others = {name: {path for other in paths if other != name for path in paths[other]} for name in paths}
        point: dict[str, Scalar] = {}
        for p in self.parameters:
            if p.when is None or all(_among(point, name, values) for name, values in p.when.items()):
                found = value_at(p, raw, defaults, others[p.name])
                if found is not None:
                    point[p.name] = found[0]
        return point

    def outside(self, point: Point) -> tuple[str, ...]:
        """Parameters that a point of `point_of` lacks though they mean something there: the scenario's values for them
        are not in the space."""
        return tuple(p.name for p in self.active(point) if p.name not in point)


class _TooEntangledError(Exception):
    pass


def _among(point: Mapping[str, Any], name: str, values: tuple[Scalar, ...]) -> bool:
    return name in point and any(identity(point[name]) == identity(v) for v in values)


def _pick(weights: list[int], rng: np.random.Generator) -> int:
    """An index, as likely as its weight (whole numbers of any size)."""
    total = sum(weights)
    left = rng.random()
    for i, weight in enumerate(weights):
        left -= weight / total
        if left < 0:
            return i
    return max(i for i, weight in enumerate(weights) if weight)


_CONTROL = re.compile("[\x7f-\x9f\ufeff\ufffe\uffff\u2028\u2029]")


def _yaml(value: Any) -> str:
    """JSON that YAML reads as the same: characters as they are, but for those that YAML wants escaped."""
    return _CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", json.dumps(value, ensure_ascii=False))


# ---- from the spec


def _in_order(specs: Mapping[str, ParameterSpec]) -> list[str]:
    """Parameters in the file's order, but each right after the last of those that its `when` names: so few conditions
    are open at a time."""
    out: list[str] = []
    problems = []
    for name, spec in specs.items():
        problems += [
            f"tune.space.{name}: its `when` names {other}, which is no parameter"
            for other in spec.when or ()
            if other not in specs
        ]

    def place(name: str) -> None:
        out.append(name)
        for other, spec in specs.items():
            if other not in out and spec.when and name in spec.when and set(spec.when) <= set(out):
                place(other)

    for name, spec in specs.items():
        if name not in out and not spec.when:
            place(name)
    if not problems:
        problems += [f"tune.space.{name}: its `when` depends on itself" for name in specs if name not in out]
    if problems:
        raise BadInput("; ".join(problems))
    return out
