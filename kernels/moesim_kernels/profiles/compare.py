"""Two profiles side by side: times of both, their ratio, and whether it is more than the errors of both explain.

`compare` gathers everything as plain JSON; `render` draws from that alone. A profile's error is one multiplicative
error for all sizes of an operator, so averaging a ratio over shapes does not narrow its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from moesim.arrays import FloatArray
from moesim.cost.operators import Operators, Priced
from moesim.errors import BadInput, Problem
from moesim.hardware import GRADES, DeviceProfile
from moesim_kernels.profiles.find import clean
from moesim_kernels.profiles.shapes import AXES, Key, Shape, knots, main_shapes, measured_shapes, price, span
from moesim_kernels.profiles.show import SCHEMA_VERSION, console_for, emit, half_width, say, section
from moesim_kernels.profiles.terminal_plot import duration, size_text

__all__ = ["common_sizes", "compare", "priced_pair", "render"]

_SIZES = 4
_SHOWN = 3
_ROOM = 110
"""Columns from which the grades stand beside the times"""

Pair = tuple[Operators, Operators]
Known = Mapping[Key, FloatArray]


def compare(
    a: DeviceProfile,
    b: DeviceProfile,
    operators: tuple[str, ...],
    shapes: list[tuple[Shape, FloatArray]] | None = None,
) -> dict[str, Any]:
    """Times of both at a few sizes of every shape that either measured (or of `shapes`), ratios b / a with 90 %
    intervals, and geometric means by operator.

    Raises BadInput where there is nothing both can price.
    """
    pair = (Operators(a), Operators(b))
    found = [_operator(pair, op, _wanted(a, b, op, shapes)) for op in operators if op in AXES]
    found = [row for row in found if row["shapes"]]
    if not found:
        names = ", ".join(op for op in AXES)
        raise BadInput(
            Problem("--operator", f"nothing to compare: {', '.join(operators)}. Operators with times: {names}")
        )
    heads = [{"name": p.name, "kind": p.kind, "device": p.device} for p in (a, b)]
    return {"schema_version": SCHEMA_VERSION, "a": heads[0], "b": heads[1], "operators": found}


def _wanted(
    a: DeviceProfile, b: DeviceProfile, op: str, shapes: list[tuple[Shape, FloatArray]] | None
) -> list[tuple[Shape, FloatArray]]:
    """Shapes with sizes, main ones first; well-known shapes where neither profile measured any."""
    if shapes is not None:
        return [(shape, size) for shape, size in shapes if shape.op == op]
    both = list(dict.fromkeys([*measured_shapes(a, op), *measured_shapes(b, op)])) or main_shapes(a, op, _SHOWN)
    main = list(dict.fromkeys([*main_shapes(a, op, _SHOWN), *main_shapes(b, op, _SHOWN)]))
    order = [s for s in main if s in both] + [s for s in both if s not in main]
    known = (knots(a, op), knots(b, op))
    return [(shape, common_sizes(a, shape, *known)) for shape in order]


def common_sizes(profile: DeviceProfile, shape: Shape, a: Known, b: Known, most: int = _SIZES) -> FloatArray:
    """At most `most` sizes: measured in both if there are enough of those, else in either; evenly by place. a, b: what
    `knots` says of the two; `profile` gives a usual range where neither has the shape.
    """
    none = np.zeros(0)
    first, second = a.get(shape.key, none), b.get(shape.key, none)
    sizes = np.intersect1d(first, second)
    if len(sizes) < 2:
        sizes = np.union1d(first, second)
    if len(sizes) < 2:
        low, high = span(profile, shape)
        sizes = np.exp2(np.arange(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1.0))
    places = np.unique(np.rint(np.linspace(0, len(sizes) - 1, min(most, len(sizes)))).astype(int))
    return np.asarray(sizes[places])


def priced_pair(pair: Pair, shape: Shape, size: FloatArray) -> tuple[Priced, Priced] | None:
    """Times of both at `size`; None where one device cannot run the shape."""
    try:
        return price(pair[0], shape, size), price(pair[1], shape, size)
    except BadInput:
        return None


def _operator(pair: Pair, op: str, wanted: list[tuple[Shape, FloatArray]]) -> dict[str, Any]:
    shapes, means, widths, unpriced = [], [], [], 0
    for shape, size in wanted:
        priced = priced_pair(pair, shape, size)
        if priced is None:
            unpriced += 1
            continue
        rows = _rows(pair, op, size, *priced)
        shapes.append(
            {"label": shape.label, "key": list(shape.key), "batch": shape.batch, "axis": shape.axis, "rows": rows}
        )
        means.append(float(np.mean([math.log(row["ratio"]) for row in rows])))
        widths.append(max(row["half_width90"] for row in rows))
    out: dict[str, Any] = {"operator": op, "shapes": shapes, "unpriced": unpriced}
    if shapes:
        out["geometric_mean"] = _ratio(float(np.mean(means)), max(widths))
    return out


def _rows(pair: Pair, op: str, size: FloatArray, first: Priced, second: Priced) -> list[dict[str, Any]]:
    """One row a size."""
    out = []
    for i, at in enumerate(size.tolist()):
        grades = [GRADES[int(p.grade[i])] for p in (first, second)]
        width = math.hypot(*(half_width(o.profile, op, g) for o, g in zip(pair, grades, strict=True)))
        a_ns, b_ns = float(first.ns[i]), float(second.ns[i])
        row = {"size": at, "a_ns": a_ns, "b_ns": b_ns, "a_grade": grades[0], "b_grade": grades[1]}
        out.append(row | _ratio(math.log(b_ns / a_ns), width))
    return out


def _ratio(log: float, width: float) -> dict[str, Any]:
    """b / a with its 90 % interval; a tie when the interval contains 1."""
    low, high = math.exp(log - width), math.exp(log + width)
    return {"ratio": math.exp(log), "interval90": [low, high], "half_width90": width, "tie": low <= 1.0 <= high}


# ---- the screen


def render(report: dict[str, Any], every: bool = False, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the tables: the main shapes (every: all) of each operator, then the geometric means."""
    console = console_for(file, width)
    with console.capture() as captured:
        for letter, head in (("A", report["a"]), ("B", report["b"])):
            text = Text(f"{letter}  ", style="bold")
            text.append(f"{clean(head['name'])} ({head['kind']}), {clean(head['device'])}", style="not bold")
            console.print(text)
        for row in report["operators"]:
            _table(console, row, every)
        _means(console, report)
    emit(console, captured.get())


def _table(console: Console, found: dict[str, Any], every: bool) -> None:
    section(console, found["operator"])
    shown = found["shapes"] if every else found["shapes"][:_SHOWN]
    for shape in shown:
        of_bytes = shape["axis"] == "bytes"
        console.print(Text(f"  {shape['label']}"[: console.width - 1]))
        head = f"  {shape['axis']:>10} {'A':>9} {'B':>9} {'B/A':>7}   90% interval"
        console.print(Text(head, style="dim"))
        for row in shape["rows"]:
            size = size_text(row["size"], of_bytes)
            text = Text(
                f"  {size:>10} {duration(row['a_ns']):>9} {duration(row['b_ns']):>9} {figure(row['ratio']):>7}   "
            )
            text.append(f"{_interval(row):<15}  ")
            text.append(*_verdict(row))
            if console.width >= _ROOM:
                text.append(f"{'':<{14 - len(_verdict(row)[0])}}{_grades(row)}", style="dim")
            console.print(text)
    left = len(found["shapes"]) - len(shown)
    notes = [f"{left:,} more shapes with --json"] if left else []
    if found["unpriced"]:
        notes.append(f"{found['unpriced']:,} that one device cannot run")
    if notes:
        say(console, "; ".join(notes), "dim")


def _means(console: Console, report: dict[str, Any]) -> None:
    section(console, "Geometric mean of B/A over all shapes")
    wide = max(len(row["operator"]) for row in report["operators"])
    head = f"  {'operator':<{wide}} {'shapes':>7} {'B/A':>7}   90% interval"
    console.print(Text(head, style="dim"))
    for row in report["operators"]:
        mean = row["geometric_mean"]
        text = Text(f"  {row['operator']:<{wide}} {len(row['shapes']):>7,} {figure(mean['ratio']):>7}   ")
        text.append(f"{_interval(mean):<15}  ")
        console.print(text.append(*_verdict(mean)))
    say(console, "intervals: the held-out errors of both profiles together; within error: 1 lies inside", "dim")


def _verdict(row: dict[str, Any]) -> tuple[str, str]:
    if row["tie"]:
        return "within error", "dim"
    return ("A is faster", "yellow") if row["ratio"] > 1 else ("B is faster", "green")


def _grades(row: dict[str, Any]) -> str:
    """What the two times rest on."""
    a, b = row["a_grade"], row["b_grade"]
    return a if a == b else f"A {a}, B {b}"


def _interval(row: dict[str, Any]) -> str:
    return " .. ".join(figure(end) for end in row["interval90"])


def figure(ratio: float) -> str:
    """A ratio with three significant digits."""
    return f"{ratio:,.0f}" if ratio >= 99.5 else f"{ratio:.3g}" if ratio < 0.01 else f"{ratio:#.3g}"
