"""A comparison on screen: figures down and candidates across, or candidates down where they are many.

Drawn from the JSON report (`Comparison.to_json()`), as `terminal` draws a run; fits any width from 60 columns.
"""

from __future__ import annotations

import re
import textwrap
from typing import IO, Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from moesim.observe import FIGURES
from moesim.terminal import _console, _number, _percent, _say, _section, _table, _write

__all__ = ["render", "shown", "tie_rule"]

_MARKS = {"best": "*", "tie": "="}
_STYLES = {"best": "bold green", "tie": "green"}
_GIB = 2**30
_ACROSS = 6
_LEAST = 9
"""characters of a column that holds a figure and its mark"""


def render(report: dict[str, Any], file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the report."""
    console = _console(file, width)
    fits = [c for c in report["candidates"] if c["feasible"]]
    with console.capture() as captured:
        _head(console, report)
        if fits:
            names = _across(console, report, fits)
            if names is None:
                names = _down(console, report, fits)
            _foot(console, report, fits, names)
        _unfit(console, report)
    _write(console, captured.get())


def _head(console: Console, report: dict[str, Any]) -> None:
    seeds = report["seeds"]
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}"
    total, fits = len(report["candidates"]), sum(c["feasible"] for c in report["candidates"])
    count = f"{total} candidates" + (f", {fits} of them fit" if fits < total else "")
    console.print(Text(count, style="bold"), Text(told, style="dim"))
    keys = dict.fromkeys(key for c in report["candidates"] for key in c["varied"])
    if keys:
        _say(console, f"varied: {', '.join(keys)}", "dim")


def _letters(fits: list[dict[str, Any]]) -> list[str]:
    return [chr(ord("A") + i) if len(fits) <= 26 else str(i + 1) for i in range(len(fits))]


def _legend(console: Console, fits: list[dict[str, Any]], names: list[str]) -> None:
    console.print()
    for name, candidate in zip(names, fits, strict=True):
        lines = textwrap.wrap(candidate["label"], console.width - 4 - len(name), break_on_hyphens=False)
        for i, line in enumerate(lines):
            console.print(Text(f"  {name if i == 0 else ' ' * len(name)}  {line}"))


# ---- figures down, candidates across


def _across(console: Console, report: dict[str, Any], fits: list[dict[str, Any]]) -> list[str] | None:
    """The table with a column a candidate; None where there are too many. Returns the columns' names."""
    labels = [FIGURES[f["name"]].label for f in report["figures"]]
    room = (console.width - 2 - max(map(len, labels))) // len(fits) - 2
    if len(fits) > _ACROSS or room < _LEAST:
        return None
    names = [c["label"] for c in fits]
    if max(map(len, names)) > room - 2:
        names = _letters(fits)
        _legend(console, fits, names)
    console.print()
    wide = all(len(_range(row)) + 2 <= room for c in fits for row in c["figures"].values())
    table = _table("", *(f">{name}  " for name in names))
    for figure, label in zip(report["figures"], labels, strict=True):
        cells = [_cell(c["figures"][figure["name"]], figure["name"], wide) for c in fits]
        table.add_row(label, *cells)
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    return names


def _cell(row: dict[str, Any] | None, name: str, wide: bool) -> Text:
    """The figure with its mark, and under it the interval: its ends where there is room, else half its width."""
    if row is None:
        return Text("-  ")
    text = Text(f"{shown(row['value'], name)} {_MARKS.get(row['mark'], ' ')}", style=_STYLES.get(row["mark"], ""))
    interval = _range(row, name) if wide else _half(row)
    if interval:
        text.append(f"\n{interval}  ", style="not bold dim default")
    return text


# ---- candidates down, figures across


def _down(console: Console, report: dict[str, Any], fits: list[dict[str, Any]]) -> list[str]:
    """Tables with a row a candidate, as many figures beside each other as fit. Returns the rows' names."""
    names = [c["label"] for c in fits]
    if max(map(len, names)) > console.width // 3:
        names = _letters(fits)
        _legend(console, fits, names)
    figures = report["figures"]
    at_once = max(1, (console.width - 4 - max(map(len, names))) // 19)
    for start in range(0, len(figures), at_once):
        part = [figure["name"] for figure in figures[start : start + at_once]]
        table = _table("", *(c for name in part for c in (f">{FIGURES[name].label}  ", "")))
        for name, candidate in zip(names, fits, strict=True):
            cells = []
            for figure in part:
                row = candidate["figures"][figure]
                mark = (row["mark"] if row else None) or ""
                value = shown(row["value"], figure) if row else "-"
                cells.append(Text(f"{value} {_MARKS.get(mark, ' ')}", style=_STYLES.get(mark, "")))
                cells.append(Text(_half(row) if row else "", style="dim"))
            table.add_row(name, *cells)
        console.print()
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
    return names


# ---- under the table


def _foot(console: Console, report: dict[str, Any], fits: list[dict[str, Any]], names: list[str]) -> None:
    console.print()
    if len(fits) > 1:
        _say(console, tie_rule(report), "dim")
    if len(fits) > 1 and len(report["seeds"]) == 1:
        _say(console, "one seed: judged within its traffic and routing; --seeds 5 judges over several", "dim")
    profiles = list(dict.fromkeys(c["profile"] for c in fits))
    _say(console, f"times from {'profile' if len(profiles) == 1 else 'profiles'} {', '.join(profiles)}", "dim")
    notes: dict[str, list[str]] = {}
    for name, candidate in zip(names, fits, strict=True):
        for warning in candidate["warnings"]:
            notes.setdefault(warning, []).append(name)
    for warning, whose in notes.items():
        of = "" if len(whose) == len(names) else f" ({', '.join(whose)})"
        _say(console, f"note: {warning}{of}", "yellow")


def tie_rule(report: dict[str, Any]) -> str:
    """One sentence: how ties are judged."""
    level = max(figure["tie_level"] for figure in report["figures"])
    text = f"* best, = tie: the {100 * level:.3g}% interval of the ratio to the best contains 1 (same seeds; "
    text += "of the profile's error, only what differs"
    return text + ("; HBM: within 0.1 GiB)" if any(f["name"] == "hbm_used_bytes" for f in report["figures"]) else ")")


def _unfit(console: Console, report: dict[str, Any]) -> None:
    unfit = [c for c in report["candidates"] if not c["feasible"]]
    if not unfit:
        return
    _section(console, "Does not fit")
    for candidate in unfit:
        # the bytes by use, in brackets at the end, are in the JSON
        reason = re.sub(r" \([^()]*\)\.?$", ".", candidate["reasons"][0])
        _say(console, f"{candidate['label']}: {reason}")


# ---- figures


def shown(value: float, name: str) -> str:
    """A figure as text, in the unit of its label."""
    if name.endswith("_bytes"):
        return f"{value / _GIB:.1f}"
    if name == "dropped_share":
        return _percent(value)
    return _number(value)


def _range(row: dict[str, Any] | None, name: str = "") -> str:
    if row is None or row["interval90"] is None:
        return ""
    low, high = (shown(end, name) for end in row["interval90"])
    return f"{low}..{high}"


def _half(row: dict[str, Any]) -> str:
    """Half the interval's width; that of the farther end."""
    if row["interval90"] is None or not row["value"]:
        return ""
    low, high = row["interval90"]
    return f"±{_percent(max(high / row['value'] - 1, 1 - low / row['value']))}"
