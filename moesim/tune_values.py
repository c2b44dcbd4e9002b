"""The values of a search parameter: what a choice is called, which two are the same, grids and geometric series.

A value of a parameter is a scalar: the value of a field itself, or the label of a choice. `true` is not 1 here, though
Python has them equal; 1 and 1.0 are the same number.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, TypeAlias

__all__ = ["MOST_VALUES", "Scalar", "grid", "identity", "label", "nearest_name", "series", "shown"]

Scalar: TypeAlias = str | int | float | bool | None
MOST_VALUES = 100_000
"""a range of more steps counts as continuous"""

_NEAR = Decimal("1e-9")


def label(value: Any) -> Scalar:
    """A scalar as it is; a policy as `kind(parameter=value)`; else JSON."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Mapping) and "kind" in value:
        rest = ", ".join(f"{k}={json.dumps(v)}" for k, v in value.items() if k != "kind")
        return f"{value['kind']}({rest})" if rest else str(value["kind"])
    return json.dumps(value)


def shown(value: Any) -> str:
    """A value as YAML has it, at most 80 characters of it."""
    text = str(label(value)) if isinstance(label(value), str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, of two alike the one that begins like it; None where none is."""
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)

    def like(other: str) -> tuple[float, int]:
        alike = next((i for i, (a, b) in enumerate(zip(other, name, strict=False)) if a != b), len(other))
        return difflib.SequenceMatcher(None, other, name).ratio(), alike

    return max(near, key=like, default=None)


def identity(value: Scalar) -> tuple[bool, Scalar]:
    """A key for dictionaries: equal for 1 and 1.0, not for 1 and True."""
    return isinstance(value, bool), value


def grid(low: float, high: float, step: float, whole: bool) -> tuple[float, ...] | None:
    """low, low + step, ... up to high, in decimal arithmetic (0.1 steps end at 1.0). None: more than MOST_VALUES."""
    start, end, by = (Decimal(str(v)) for v in (low, high, step))
    steps = int((end - start) / by + _NEAR)
    if steps >= MOST_VALUES:
        return None
    if whole:
        return tuple(int(start) + i * int(by) for i in range(steps + 1))
    return tuple(float(min(start + i * by, end)) for i in range(steps + 1))


def series(low: float, high: float, factor: float, whole: bool) -> tuple[float, ...] | None:
    """low, low * factor, ... up to high; whole: rounded, each once. None: more than MOST_VALUES."""
    if math.log(high / low) / math.log(factor) >= MOST_VALUES:
        return None
    value, end, by = (Decimal(str(v)) for v in (low, high, factor))
    out: list[float] = []
    while value <= end * (1 + _NEAR):
        out.append(round(value) if whole else float(min(value, end)))
        value *= by
    return tuple(dict.fromkeys(out))
