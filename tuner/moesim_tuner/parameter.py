"""One parameter of a search space: its values in order, what each sets, what is near what."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.tune_spec import ParameterSpec
from moesim.tune_values import Scalar, identity

__all__ = ["Parameter", "parameter_of"]

_FAR = 20
"""beside the next values, neighbours are so many to a range"""


@dataclass(frozen=True)
class Parameter:
    """One parameter. values: all of them in order, None where it is continuous (floats between low and high, in equal
    ratios where log; whole: integers; step: only low + i * step). sets: the fields that each of `values` sets, dotted
    path to value; None: the field that has the parameter's name. ordered: near values are alike. when: other parameter
    -> the values with which this one means something."""

    name: str
    values: tuple[Scalar, ...] | None
    sets: tuple[Mapping[str, Any], ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    ordered: bool = False
    when: Mapping[str, tuple[Scalar, ...]] | None = None
    whole: bool = False
    step: float | None = None

    @cached_property
    def _positions(self) -> dict[tuple[bool, Scalar], int]:
        return {identity(value): i for i, value in enumerate(self.values or ())}

    def position(self, value: Any) -> int | None:
        """Where `value` stands in `values`; None where it does not. 1.0 is 1, True is not."""
        if not isinstance(value, str | int | float | bool) and value is not None:
            return None
        return self._positions.get(identity(value))

    def __contains__(self, value: Any) -> bool:
        """Is it one of the parameter's values?"""
        if self.values is not None:
            return self.position(value) is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / (self.step or 1.0)
        return not (self.whole or self.step) or abs(steps - round(steps)) <= 1e-9 * max(1.0, abs(steps))

    def own(self, value: Any) -> Scalar:
        """The parameter's spelling of a value (1 for 1.0 where it lists 1). Raises ValueError where it has none."""
        at = self.position(value)
        if self.values is not None and at is not None:
            return self.values[at]
        if self.values is not None or value not in self:
            raise ValueError(f"{self.name} does not take {value!r}")
        return round(value) if self.whole else float(value)

    def fields(self, value: Scalar) -> Mapping[str, Any]:
        """Dotted path -> value that `value` sets. Raises ValueError for none of its values."""
        if self.sets is None:
            return {self.name: self.own(value)}
        at = self.position(value)
        if at is None:
            raise ValueError(f"{self.name} does not take {value!r}")
        return self.sets[at]

    def nearest(self, value: Any) -> Scalar:
        """The value nearest to `value`, by ratio where log, the smaller of two; of unordered ones, and of what is no
        number, the value itself. Raises ValueError where there is none."""
        if value in self:
            return self.own(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (self.values is not None and not self.ordered):
            raise ValueError(f"{self.name} does not take {value!r}, nor anything near")
        if self.values is None:
            inside = min(max(value, self.low), self.high)
            if self.step is not None:
                inside = self.low + min(round((inside - self.low) / self.step), self._steps) * self.step
            return round(inside) if self.whole else float(inside)
        by = sorted(v for v in self.values if isinstance(v, int | float))
        at = bisect_left(by, value)
        near = by[max(at - 1, 0) : at + 1]
        far = (lambda v: abs(math.log(v / value))) if self.log and value > 0 else (lambda v: abs(v - value))
        return self.own(min(near, key=far))

    @property
    def _steps(self) -> int:
        return math.floor((self.high - self.low) / (self.step or 1.0) + 1e-9)

    def draw(self, rng: np.random.Generator) -> Scalar:
        """One of its values, each as likely; of a continuous one uniform, in equal ratios where log."""
        if self.values is not None:
            return self.values[int(rng.integers(len(self.values)))]
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            return self.nearest(min(max(value, self.low), self.high) if not self.whole else round(value))
        if self.whole or self.step is not None:
            found = self.low + int(rng.integers(self._steps + 1)) * (self.step or 1)
            return round(found) if self.whole else float(min(found, self.high))
        return float(rng.uniform(self.low, self.high))

    def near(self, value: Scalar) -> list[Scalar]:
        """What `Space.neighbours` puts in the place of `value`."""
        if self.values is not None:
            at = self.position(value)
            assert at is not None
            if not self.ordered:
                return [v for i, v in enumerate(self.values) if i != at]
            far = len(self.values) // _FAR
            steps = sorted({-1, 1, -far, far} - {0})
            return [self.values[at + d] for d in steps if 0 <= at + d < len(self.values)]
        assert isinstance(value, int | float)
        if self.log:
            by = (self.high / self.low) ** (1 / _FAR)
            beside = (value / by, value * by)
        else:
            beside = (value - (self.high - self.low) / _FAR, value + (self.high - self.low) / _FAR)
        found = [self.nearest(round(v) if self.whole else v) for v in beside]
        return [v for v in dict.fromkeys(found) if v != value]


def parameter_of(name: str, specs: Mapping[str, ParameterSpec]) -> Parameter:
    """The parameter of that name. Raises BadInput where its `when` names no value."""
    spec = specs[name]
    when = None
    if spec.when:
        when = {other: specs[other].matching(wanted) for other, wanted in spec.when.items()}
        for other, found in when.items():
            if not found:
                raise BadInput(f"tune.space.{name}: its `when` names no value of {other}: {spec.when[other]!r}")
    values = spec.values
    if isinstance(spec.choices, dict):
        return Parameter(name, values, tuple(spec.choices.values()), when=when)
    if spec.choices is not None:
        assert values is not None
        ordered = all(isinstance(v, int | float) and not isinstance(v, bool) for v in spec.choices)
        return Parameter(name, values, tuple({name: v} for v in spec.choices), ordered=ordered, when=when)
    low, high = spec.bounds
    log = spec.log_range is not None
    step = None if values is not None or log else spec.stride
    return Parameter(name, values, None, low, high, log, True, when, spec.whole, step)
