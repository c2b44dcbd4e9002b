"""A report on the terminal, drawn from what report.json says, so that the two agree."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from moesim_kernels.validate.tables import Table, profile_words, tables

__all__ = ["show"]

_COLOUR = {"within": "green", "contended": "yellow", "few settings": "yellow", "missed": "red", "wrong profile": "red"}


def show(report: Mapping[str, Any], file: IO[str] | None = None, width: int | None = None) -> None:
    """Print it; the verdict first. Fits any width from 60 columns."""
    console = Console(file=file or sys.stdout, width=width, highlight=False, emoji=False)
    with console.capture() as captured:
        console.print(Text(str(report["scenario"]), style="bold"), Text(f"seed {report['seed']}", style="dim"))
        console.print(Text(report["verdict"]["sentence"], style=f"bold {_COLOUR[report['verdict']['state']]}"))
        console.print(
            Text(
                f"{profile_words(report['profile'])}; predictions sealed before measuring: {report['seal'][:16]}",
                style="dim",
            )
        )
        for table in tables(report):
            console.print()
            _table(console, table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _table(console: Console, table: Table) -> None:
    if not table.rows:
        console.print(Text(table.title, style="bold"))
    else:
        grid = Grid(box=None, pad_edge=False, title=table.title, title_justify="left", title_style="bold")
        for i, name in enumerate(table.header):
            last = i == len(table.header) - 1
            grid.add_column(name, justify="left" if i == 0 or (last and not _figures(table)) else "right")
        for row in table.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
    for line in table.lines:
        console.print(Text(line, style="dim" if table.rows else ""))


def _figures(table: Table) -> bool:
    """Whether the last column holds figures, which are set flush right."""
    return all(row[-1][:1].isdigit() or row[-1][:1] in ("", "-", "+", "x") for row in table.rows)
