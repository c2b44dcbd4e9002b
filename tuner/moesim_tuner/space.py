"""The search space: parameters with their values, which of them mean something where, and the fields they set.

A point maps parameter to a scalar: the value itself, or the label of a choice that is a mapping or sets several fields.
Parameters whose `when` does not hold are not in the point. Everything here is plain Python: Optuna's view of a space is
made in `moesim_tuner.search`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from moesim.errors import BadInput
from moesim.tune_spec import ParameterSpec
from moesim_tuner.records import Point, canonical

__all__ = ["MOST_VALUES", "Parameter", "Scalar", "Space"]

Scalar: TypeAlias = str | int | float | bool | None
MOST_VALUES = 100_000
"""a range of more steps counts as continuous"""


@dataclass(frozen=True)
class Parameter:
    """One parameter. values: all of them in order, None where it is continuous (floats between low and high, in equal
    ratios where log). sets: value -> the fields it sets, dotted path to value. ordered: near values are alike. when:
    other parameter -> the values with which this one means something."""

    name: str
    values: tuple[Scalar, ...] | None
    sets: Mapping[Scalar, Mapping[str, Any]] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    ordered: bool = False
    when: Mapping[str, tuple[Scalar, ...]] | None = None

    def fields(self, value: Scalar) -> Mapping[str, Any]:
        """Dotted path -> value that `value` sets."""
        return {self.name: value} if self.sets is None else self.sets[value]


class Space:
    """The parameters of a `tune` block. Raises BadInput with every problem: no values, a `when` that names no
    parameter or no value of it, or one that depends on itself."""

    def __init__(self, specs: Mapping[str, ParameterSpec]) -> None:
        self.parameters = tuple(_parameter(name, spec) for name, spec in _in_order(specs))

    def active(self, point: Point) -> list[Parameter]:
        """Parameters that mean something beside the values of `point`, those they depend on before them."""
        out: list[Parameter] = []
        on: set[str] = set()
        for p in self.parameters:
            if all(name in on and point.get(name) in values for name, values in (p.when or {}).items()):
                out.append(p)
                on.add(p.name)
        return out

    def overrides(self, point: Point) -> tuple[str, ...]:
        """`a.b=c` texts that turn the scenario into this point, in the order of the parameters."""
        return tuple(
            f"{path}={json.dumps(value)}"
            for p in self.active(point)
            if p.name in point
            for path, value in p.fields(point[p.name]).items()
        )

    def key(self, point: Point) -> str:
        """One spelling of a point."""
        return canonical({p.name: point[p.name] for p in self.active(point) if p.name in point})

    @cached_property
    def size(self) -> int | None:
        """How many points there are; None where a parameter is continuous or there are over 10 million."""
        if any(p.values is None for p in self.parameters):
            return None
        if not any(p.when for p in self.parameters):
            size = math.prod(len(p.values or ()) for p in self.parameters)
            return size if size <= 10_000_000 else None
        count = 0
        for count, _ in enumerate(self.points(), 1):
            if count > 10_000_000:
                return None
        return count

    def points(self) -> Iterator[dict[str, Scalar]]:
        """Every point, each once, in the order of the values. Raises BadInput for a continuous space."""
        if any(p.values is None for p in self.parameters):
            raise BadInput("a continuous parameter has no list of values; give it a step")
        yield from self._points(0, {})

    def _points(self, index: int, point: dict[str, Scalar]) -> Iterator[dict[str, Scalar]]:
        if index == len(self.parameters):
            yield dict(point)
            return
        p = self.parameters[index]
        if not all(point.get(name) in values for name, values in (p.when or {}).items()):
            yield from self._points(index + 1, point)
            return
        for value in p.values or ():
            yield from self._points(index + 1, {**point, p.name: value})

    def point_of(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Scalar]:
        """The point that a scenario stands at, as far as its values are in the space: `raw` as written, `defaults`
        the fields it leaves out (both nested mappings)."""
        point: dict[str, Scalar] = {}
        for p in self.parameters:
            if not all(point.get(name) in values for name, values in (p.when or {}).items()):
                continue
            found = _value_at(p, raw, defaults)
            if found is not None:
                point[p.name] = found[0]
        return point


def _value_at(p: Parameter, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Scalar] | None:
    """The parameter's value where every field that it sets stands in the scenario as it would set it."""

    def stands(path: str, value: Any) -> bool:
        for tree in (raw, defaults):
            here: Any = tree
            for key in path.split("."):
                here = here.get(key) if isinstance(here, Mapping) else None
            if here is not None:
                return bool(here == value or (isinstance(here, Mapping) and here == {"kind": value}))
        return value is None

    if p.values is None:
        here: Any = raw
        for key in p.name.split("."):
            here = here.get(key) if isinstance(here, Mapping) else None
        return (float(here),) if isinstance(here, int | float) and p.low <= here <= p.high else None
    for value in p.values:
        if all(stands(path, wanted) for path, wanted in p.fields(value).items()):
            return (value,)
    return None


def _in_order(specs: Mapping[str, ParameterSpec]) -> list[tuple[str, ParameterSpec]]:
    """Parameters after those that their `when` names."""
    left, out = dict(specs), []
    done: set[str] = set()
    while left:
        ready = [name for name, spec in left.items() if set(spec.when or ()) <= done]
        if not ready:
            name = next(iter(left))
            missing = sorted(set(left[name].when or ()) - set(specs))
            why = f"names {missing[0]}, which is no parameter" if missing else "depends on itself"
            raise BadInput(f"tune.space.{name}: its `when` {why}")
        for name in ready:
            out.append((name, left.pop(name)))
            done.add(name)
    return out


def _parameter(name: str, spec: ParameterSpec) -> Parameter:
    when = None
    if spec.when:
        when = {k: tuple(map(_label, v if isinstance(v, list) else [v])) for k, v in spec.when.items()}
    if isinstance(spec.choices, dict):
        labelled: dict[Scalar, Mapping[str, Any]] = dict(spec.choices.items())
        return Parameter(name, tuple(labelled), labelled, when=when)
    if spec.choices is not None:
        sets = {_label(value): {name: value} for value in spec.choices}
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in spec.choices)
        return Parameter(name, tuple(sets), sets, ordered=numbers, when=when)
    if spec.range is not None:
        low, high = spec.range
        step = spec.step if spec.step is not None else (1 if isinstance(low, int) and isinstance(high, int) else None)
        if step is None:
            return Parameter(name, None, low=low, high=high, when=when)
        steps = math.floor((high - low) / step + 1e-9) + 1
        whole = all(isinstance(v, int) for v in (low, high, step))
        values = tuple(low + i * step if whole else round(low + i * step, 12) for i in range(steps))
        return Parameter(name, values, low=low, high=high, ordered=True, when=when)
    assert spec.log_range is not None
    low, high = spec.log_range
    if spec.factor is None:
        return Parameter(name, None, low=low, high=high, log=True, when=when)
    out: list[Scalar] = []
    value: float = low
    while value <= high * (1 + 1e-12):
        out.append(round(value) if isinstance(low, int) and isinstance(high, int) else value)
        value *= spec.factor
    return Parameter(name, tuple(dict.fromkeys(out)), low=low, high=high, log=True, ordered=True, when=when)


def _label(value: Any) -> Scalar:
    """A scalar as it is; a policy as `kind(parameter=value)`; else JSON."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Mapping) and "kind" in value:
        rest = ", ".join(f"{k}={json.dumps(v)}" for k, v in value.items() if k != "kind")
        return f"{value['kind']}({rest})" if rest else str(value["kind"])
    return json.dumps(value)
