"""The words and tables of results/validation/README.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesim_kernels.fit.conformal import clopper_pearson

from benchmarks.validation.rows import Beside, Bound, Row, percent
from benchmarks.validation.verdict import Parts, verdict

__all__ = ["page_text"]

HEAD = "| predicted | calibrated on | held out | n | median | p90 | beside it | bound | verdict |"
SAYS = {"missed": "**missed**"}


def page_text(parts: Parts, groups: Sequence[str], folder: Path) -> str:
    """The whole page."""
    bounds = legend(parts)
    lines = [INTRO, verdict(parts), "", *summary(parts, groups), "", READING]
    for group in groups:
        lines += [f"## {group[0].upper()}{group[1:]}", ""]
        for name, (module, rows) in parts.items():
            if group == module.GROUP and rows:
                lines += section(name, module, rows, bounds)
    lines += [*bounds_text(bounds), *others(folder)]
    return "\n".join(lines)


def summary(parts: Parts, groups: Sequence[str]) -> list[str]:
    """Verdicts by group."""
    lines = ["| | rows | within | missed | not judged | points |", "|---|---|---|---|---|---|"]
    for group in groups:
        rows = [row for module, found in parts.values() if group == module.GROUP for row in found]
        says = [row.verdict() for row in rows]
        points = sum(row.found.n for row in rows)
        link = group.replace(" ", "-")
        judged = [says.count(v) for v in ("within", "missed")]
        counts = " | ".join(str(n) for n in (*judged, len(says) - sum(judged)))
        lines.append(f"| [{group}](#{link}) | {len(rows)} | {counts} | {points:,} |")
    return lines


def section(name: str, module: Any, rows: list[Row], bounds: dict[tuple[object, ...], str]) -> list[str]:
    """One check: its source, its command, its rows, and what has to be said of them."""
    s = module.SOURCE
    command = getattr(module, "COMMAND", "") or f"python benchmarks/validation/page.py --measure {name}"
    files = shown(s.files) if s.files else f"`{getattr(module, 'TABLES', '')}`"
    where = f"{s.repository}@{s.commit}, {s.licence}" if s.commit else s.repository
    lines = [f"### {module.TITLE}", "", f"{s.machine}. {where}: {files}.  ", f"`{command}`", ""]
    lines += [HEAD, "|---|---|---|---|---|---|---|---|---|"]
    lines += [line(row, bounds) for row in rows]
    notes = [f"*{row.what}*: {row.note}." for row in rows if row.note]
    return [*lines, "", *([*(f"{note}  " for note in notes), ""] if notes else [])]


def shown(files: Sequence[str]) -> str:
    """Names of files; of many of one folder their number. All of them stand in the check's file."""
    if len(files) <= 3:
        return ", ".join(f"`{file.removeprefix('kernels/')}`" for file in files)
    return f"{len(files)} tables of `{os.path.commonpath(files).removeprefix('kernels/')}`"


def line(row: Row, bounds: dict[tuple[object, ...], str]) -> str:
    """A row of a table."""
    f = row.found
    if row.inside is not None:
        low, high = clopper_pearson(row.inside, f.n)
        cells = [
            f"{row.inside} inside",
            f"{100 * low:.0f} to {100 * high:.0f} %",
            "",
            f"contains {100 * row.level:.0f} %",
        ]
    else:
        cells = [*figures(row), "; ".join(alternative(row, b) for b in row.beside)]
        cells.append(bound(row, bounds))
    texts = [row.what, row.calibrated, row.held_out, f"{f.n:,}", *cells, SAYS.get(row.verdict(), row.verdict())]
    return "| " + " | ".join(texts) + " |"


def figures(row: Row) -> list[str]:
    """Median and p90 (or worst), with tau where there is one."""
    f, unit = row.found, " pt" if "points" in row.unit else " %"
    if row.unit == "wrong":
        return [f"{100 * f.median:.1f} % wrong", ""]
    if row.unit in ("regret", "one"):
        return [f"{percent(f.median)} %", "" if f.tau is None else f"tau {f.tau:.2f}"]
    tau = f", tau {f.tau:.2f}" if f.tau is not None else ""
    worst = " worst" if "worst" in row.unit else ""
    return [percent(f.median) + unit, percent(f.p90) + unit + worst + tau]


def alternative(row: Row, b: Beside) -> str:
    """Something simpler on the same points."""
    if row.unit in ("wrong", "regret"):
        return f"{b.name} {percent(b.median)} %"
    tau = f", tau {b.tau:.2f}" if b.tau is not None else ""
    return f"{b.name} {percent(b.median)} / {percent(b.p90)}{tau}"


def limits(b: Bound) -> str:
    """A bound's figures."""
    parts = [f"{100 * v:g}" if v is not None else "-" for v in (b.median, b.p90)]
    shown = [" / ".join(parts)] if b.median is not None or b.p90 is not None else []
    return ", ".join([*shown, *([f"tau {b.tau:g}"] if b.tau is not None else [])])


def legend(parts: Parts) -> dict[tuple[object, ...], str]:
    """A letter for each bound that occurs."""
    out: dict[tuple[object, ...], str] = {}
    for _, rows in parts.values():
        for b in (row.bound for row in rows):
            if b is not None:
                out.setdefault((b.why, b.median, b.p90, b.tau), chr(ord("a") + len(out)))
    return out


def bound(row: Row, bounds: dict[tuple[object, ...], str]) -> str:
    """A bound and its letter."""
    b = row.bound
    return "" if b is None else f"{limits(b)} ({bounds[b.why, b.median, b.p90, b.tau]})"


def bounds_text(bounds: dict[tuple[object, ...], str]) -> list[str]:
    """Where bounds come from."""
    lines = ["## Bounds", "", "Median / p90 in per cent (points where the row says so), and the least tau-b.", ""]
    for (why, *rest), letter in bounds.items():
        lines.append(f"- ({letter}) {limits(Bound('', *rest))}: {why}")  # type: ignore[arg-type]
    return [*lines, ""]


def others(folder: Path) -> list[str]:
    """Links to every other page of the folder."""
    lines = ["## Pages with more", ""]
    for path in sorted(folder.glob("*.md")):
        if path.name != "README.md":
            title = path.read_text("utf-8").splitlines()[0].lstrip("# ")
            lines.append(f"- [{title}]({path.name})")
    return [*lines, ""]


INTRO = """# How well moesim predicts

Every prediction here stands beside a measurement that nothing was fitted to; a miss is a row like any other.
"""

READING = """\
Made by `python benchmarks/validation/page.py` (`make validation`) from committed figures; the command over a table
makes its rows anew where its data is. Error: |predicted / measured - 1|. *Beside it*: something simpler on the same
points, its median / p90: the same timed points *interpolated* (log time over log size), a model that is *load-blind*,
the formula without its measured curve (*physics alone*). A letter says where a bound comes from.
"""
