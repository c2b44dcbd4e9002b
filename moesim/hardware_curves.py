"""Measured residual curves: what one is, and how they are read from JSON and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import Problem

__all__ = ["OPERATORS", "Curve", "load_curves"]

OPERATORS = (
    "attention_prefill",
    "attention_decode",
    "gemm",
    "moe",
    "elementwise",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "host",
    "router",
    "router_backward",
    "block",
    "moe_dgrad",
    "moe_wgrad",
    "attention_backward",
    "copy",
    "storage",
)
"""Operator names used by curves, errors and time shares."""

_MAX_CURVE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Measured over physics for one shape of one operator: log ratio at the sizes that were measured.

    key: the shape, in the order the operator's own documentation gives. variant: whose physics (`fits`) it is
    relative to. axes: one increasing array of sizes for each dimension. log_ratio: ln(measured / physics),
    shape = the axes' lengths. grade: of each point (None: all measured); a point that was carried over from
    another kernel or filled in is weaker. source: place in `DeviceProfile.provenance["curve_sources"]`.
    """

    key: tuple[int | str, ...]
    variant: str
    axes: tuple[NDArray[np.float64], ...]
    log_ratio: NDArray[np.float64]
    grade: NDArray[np.uint8] | None = None
    source: int = 0


def load_curves(path: Path, problems: list[Problem]) -> Mapping[str, tuple[Curve, ...]]:
    """Read measured residual curves. JSON: `axes` (lists of sizes, shared) and `curves`: operator -> list of
    {key, variant, axes (places in the shared list), log_ratio, grade?, source?}.

    Appends what is wrong to `problems` and returns what is right; the caller raises.
    """
    where = str(path)
    try:
        size = path.stat().st_size
        if size > _MAX_CURVE_BYTES:
            problems.append(Problem(where, f"a curve file may hold {_MAX_CURVE_BYTES} bytes, this one has {size}."))
            return {}
        data = json.loads(path.read_bytes())
    except OSError as error:
        problems.append(Problem(where, f"cannot read the curve file: {error.strerror}."))
        return {}
    except (ValueError, RecursionError) as error:
        problems.append(Problem(where, f"the curve file is not JSON: {error}."))
        return {}
    if not isinstance(data, dict) or set(data) != {"axes", "curves"} or not isinstance(data["curves"], dict):
        problems.append(Problem(where, "a curve file is a mapping with the keys axes and curves."))
        return {}
    out: dict[str, tuple[Curve, ...]] = {}
    try:
        axes = [_axis(axis) for axis in data["axes"]]
    except (TypeError, ValueError) as error:
        problems.append(Problem(where, f"axes: {error}."))
        return {}
    for op, rows in data["curves"].items():
        curves = []
        if op not in OPERATORS:
            problems.append(Problem(where, f"{op} is not an operator; operators: {', '.join(OPERATORS)}."))
            continue
        for i, row in enumerate(rows if isinstance(rows, list) else [None]):
            try:
                curves.append(_curve(row, axes))
            except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
                problems.append(Problem(where, f"{op}[{i}] is not a curve: {error}."))
        problems.extend(Problem(where, f"{op}{list(c.key)}: {why}.") for c, why in _out_of_range(curves))
        out[op] = tuple(curves)
    return out


def _out_of_range(curves: list[Curve]) -> list[tuple[Curve, str]]:
    """Curves with values that cannot be; all are looked at in one sweep, and singly only where it finds any."""

    def wrong(some: list[Curve]) -> str:
        ratios = np.concatenate([c.log_ratio.ravel() for c in some])
        grades = np.concatenate([np.zeros(1, np.uint8)] + [c.grade.ravel() for c in some if c.grade is not None])
        if not (np.abs(ratios) <= 10).all():
            return "log_ratio must be finite and within +-10 (a factor of 22,000 of physics)"
        return "grade must be 0, 1, 2 or 3" if grades.max() > 3 else ""

    if not curves or not wrong(curves):
        return []
    return [(c, wrong([c])) for c in curves if wrong([c])]


def _axis(values: Any) -> NDArray[np.float64]:
    """Sizes along one axis: positive, finite, increasing."""
    axis = np.array(values, dtype=np.float64)
    if axis.ndim != 1 or not axis.size or not np.isfinite(axis).all() or axis[0] <= 0:
        raise ValueError("sizes must be positive and finite")
    if (np.diff(axis) <= 0).any():
        raise ValueError("sizes must increase")
    axis.setflags(write=False)
    return axis


def _curve(row: Any, shared: list[NDArray[np.float64]]) -> Curve:
    """One curve, checked. Raises ValueError, TypeError, KeyError or IndexError with what is wrong."""
    if not isinstance(row, dict):
        raise TypeError("a mapping with key, variant, axes and log_ratio is needed")
    key = tuple(row["key"])
    if not key or not all(type(k) is int or type(k) is str for k in key):
        raise ValueError(f"key must list integers and names, got {row['key']!r}")
    places = row["axes"]
    if not 1 <= len(places) <= 2 or not all(type(i) is int and i >= 0 for i in places):
        raise ValueError("axes must name 1 or 2 of the shared axes by their place")
    axes = tuple(shared[i] for i in places)
    ratio = np.array(row["log_ratio"], dtype=np.float64)
    if ratio.shape != tuple(map(len, axes)):
        raise ValueError(f"log_ratio has shape {ratio.shape}, its axes {tuple(map(len, axes))}")
    grade = row.get("grade")
    if grade is not None:
        grade = np.full(ratio.shape, grade, dtype=np.uint8) if type(grade) is int else np.array(grade, dtype=np.uint8)
        if grade.shape != ratio.shape:
            raise ValueError(f"grade has shape {grade.shape}, log_ratio {ratio.shape}")
    return Curve(key, str(row["variant"]), axes, ratio, grade, int(row.get("source", 0)))
