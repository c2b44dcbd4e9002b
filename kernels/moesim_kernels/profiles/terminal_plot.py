"""Lines over a logarithmic axis, drawn with characters: for a terminal of any width, with or without colour.

Each line has a sign of its own, so that colour only repeats what the signs say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from moesim.arrays import FloatArray

__all__ = ["COLOURS", "SIGNS", "Line", "duration", "percent", "plot", "size_text"]

SIGNS = ("●", "▲", "◆", "□", "+", "x")
_PLAIN_SIGNS = ("o", "^", "#", "*", "+", "x")
COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")
_AXIS = ("│", "┤", "└", "─", "┬")
_PLAIN_AXIS = ("|", "|", "+", "-", "+")


@dataclass(frozen=True, slots=True)
class Line:
    """One line: what it is called, its sizes and values, [N] each, all positive and finite."""

    label: str
    size: FloatArray
    value: FloatArray


def plot(
    lines: Sequence[Line],
    width: int,
    height: int,
    value_text: Callable[[float], str],
    size_name: Callable[[float], str],
    ceiling: float | None = None,
    plain: bool = False,
) -> list[Text]:
    """Rows of text, at most `width` wide, `height` rows of plot, an axis and a legend.

    ceiling: a linear axis from 0 to it (or to the largest value, if that is more); None: a logarithmic axis around
    the values. plain: ASCII signs only. Raises ValueError for no lines.
    """
    low, high, scale = _scale(np.concatenate([line.value for line in lines]), ceiling)
    first = math.log(min(float(line.size.min()) for line in lines))
    last = max(math.log(max(float(line.size.max()) for line in lines)), first + 1e-9)
    ticks = [value_text(scale(low + (high - low) * i / 4)) for i in range(5)]
    margin = max(map(len, ticks))
    columns = max(10, width - margin - 2)
    cells: list[list[int]] = [[-1] * columns for _ in range(height)]
    where = np.exp(first + (np.arange(columns) + 0.5) / columns * (last - first))
    for i, line in reversed(list(enumerate(lines))):  # the first line lies on top
        inside = np.flatnonzero((where >= line.size[0] * 0.999) & (where <= line.size[-1] * 1.001))
        value = np.interp(np.log(where[inside]), np.log(line.size), _unscale(line.value, ceiling))
        row = np.clip(np.rint((value - low) / (high - low) * (height - 1)), 0, height - 1).astype(int)
        for column, r in zip(inside.tolist(), row.tolist(), strict=True):
            cells[height - 1 - r][column] = i
    signs = _PLAIN_SIGNS if plain else SIGNS
    bar, tick, corner, dash, tee = _PLAIN_AXIS if plain else _AXIS
    at = {round((height - 1) * (1 - i / 4)): text for i, text in enumerate(ticks)}
    out = []
    for r, cell in enumerate(cells):
        text = Text(at.get(r, "").rjust(margin) + " " + (tick if r in at else bar))
        for i in cell:
            text.append(" " if i < 0 else signs[i % len(signs)], style="" if i < 0 else COLOURS[i % len(COLOURS)])
        out.append(text)
    axis, names = _size_axis(first, last, columns, size_name)
    ruler = "".join(tee if c in axis else dash for c in range(columns))
    out.append(Text(" " * (margin + 1) + corner + ruler))
    out.append(Text(" " * (margin + 2) + names))
    return out + legend(lines, width, plain)


def legend(lines: Sequence[Line], width: int, plain: bool) -> list[Text]:
    """One row for each line: its sign and its name."""
    signs = _PLAIN_SIGNS if plain else SIGNS
    out = []
    for i, line in enumerate(lines):
        text = Text("  ")
        text.append(signs[i % len(signs)], style=COLOURS[i % len(COLOURS)])
        text.append(f" {line.label}"[: max(width - 3, 1)])
        out.append(text)
    return out


def _unscale(value: FloatArray, ceiling: float | None) -> FloatArray:
    return np.log(value) if ceiling is None else value


def _scale(values: FloatArray, ceiling: float | None) -> tuple[float, float, Callable[[float], float]]:
    """Ends of the value axis, and how a place on it becomes a value."""
    if ceiling is not None:
        return 0.0, max(ceiling, float(values.max())), lambda v: v
    low, high = math.log(float(values.min())), math.log(float(values.max()))
    return low - 0.02, max(high, low + 0.1) + 0.02, math.exp


def _size_axis(first: float, last: float, columns: int, name: Callable[[float], str]) -> tuple[set[int], str]:
    """Columns of the powers of two that are named, and the line of names; names never touch."""
    powers = range(math.ceil(first / math.log(2) - 1e-6), math.floor(last / math.log(2) + 1e-6) + 1)
    text = [" "] * (columns + 8)
    chosen: set[int] = set()
    end = -2
    step = max(1, math.ceil(len(powers) * 9 / columns))
    for power in list(powers)[::step]:
        column = min(int((power * math.log(2) - first) / (last - first) * columns), columns - 1)
        label = name(2.0**power)
        start = max(0, column - len(label) // 2)
        if start < end + 2 or start + len(label) > columns:
            continue
        text[start : start + len(label)] = label
        chosen.add(column)
        end = start + len(label)
    return chosen, "".join(text).rstrip()


# ---- figures


def duration(ns: float) -> str:
    """A time with three significant digits and its unit."""
    for unit, size in (("ns", 1.0), ("us", 1e3), ("ms", 1e6), ("s", 1e9)):
        if ns < 999.5 * size or unit == "s":
            return f"{_three(ns / size)} {unit}"
    raise AssertionError


def size_text(size: float, of_bytes: bool) -> str:
    """A count (1, 512, 8k, 1M) or a number of bytes (64 KiB); powers of two come out short."""
    units = ("B", "KiB", "MiB", "GiB", "TiB") if of_bytes else ("", "k", "M", "G", "T")
    for unit in units:
        if size < 1024 or unit == units[-1]:
            break
        size /= 1024
    text = f"{size:.0f}" if abs(size - round(size)) < 0.005 * size else f"{size:.3g}"
    return f"{text} {unit}" if of_bytes else f"{text}{unit}"


def percent(share: float) -> str:
    """A share as a percentage; below 10 % with a digit more."""
    return f"{100 * share:.1f}%" if 0 < share < 0.0995 else f"{100 * share:.0f}%"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
