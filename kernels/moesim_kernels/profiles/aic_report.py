"""What an import says on screen: which tables there are, what became of each row, and the error on rows held out."""

from __future__ import annotations

from typing import IO

import numpy as np
from rich.padding import Padding
from rich.text import Text

from moesim_kernels.profiles.aic_import import Imported
from moesim_kernels.profiles.aic_package import FAMILIES, Package
from moesim_kernels.profiles.show import console_for, emit, new_table, say, section
from moesim_kernels.profiles.terminal_plot import percent

__all__ = ["imported_table", "listing_table"]


def listing_table(
    package: Package, system: str | None = None, file: IO[str] | None = None, width: int | None = None
) -> None:
    """Systems and backends with versions and kinds of their tables. Raises BadInput for an unknown system."""
    from moesim.errors import BadInput, Problem

    names = package.names()
    if system is not None and system not in names:
        raise BadInput(Problem("--system", f"unknown system {system[:60]!r}. Known: {', '.join(names)}"))
    console = console_for(file, width)
    table = new_table("system", "backend", "versions", "tables")
    for name in names if system is None else [system]:
        for backend in package.backends(name):
            kinds = [kind for kind in FAMILIES if kind != "nccl" and package.versions(name, backend, kind)]
            versions = sorted({v for kind in kinds for v in package.versions(name, backend, kind)})
            newest = [v for v in package.versions(name, backend, "gemm") if v in versions]
            shown = ", ".join(newest or versions)
            table.add_row(name, backend, shown, ", ".join(_short(kinds)))
    with console.capture() as captured:
        console.print(f"aiconfigurator-core {package.version}")
        console.print(table)
    emit(console, captured.get())


def _short(kinds: list[str]) -> list[str]:
    """Kinds in a word, once each: attention for both of its tables."""
    return list(dict.fromkeys("all_reduce" if kind.startswith("custom") else kind.split("_")[0] for kind in kinds))


def imported_table(found: Imported, file: IO[str] | None = None, width: int | None = None) -> None:
    """Operators with points used and held-out errors; tables with rows left out by reason; what is missing."""
    console = console_for(file, width)
    with console.capture() as captured:
        section(console, "Held out: 8 sizes of each shape kept, the others predicted")
        table = new_table("operator", "variant", ">shapes", ">points", ">held out", ">median", ">p90")
        for part in found.parts:
            s, miss = part.samples, np.expm1(part.held_out)
            figures = [percent(float(np.quantile(miss, q))) for q in (0.5, 0.9)] if len(miss) else ["-", "-"]
            counts = [f"{n:,}" for n in (len(s.by_key()), len(s.ns), len(miss))]
            table.add_row(s.op, s.variant or "-", *counts, *figures)
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
        section(console, "Rows left out, by table")
        for name, row in found.tables.items():
            if name:
                gone = sum(row["left_out"].values())
                place = "/".join(row["table"].split("/")[3:]).removesuffix(".parquet")
                say(console, f"{name}: {gone:,} of {row['rows']:,}, {place}", hang=4)
                for reason, count in row["left_out"].items():
                    console.print(Text(f"    {count:>9,}  {reason}"[: console.width - 1], style="dim"))
        for note in found.notes:
            say(console, f"note: {note}", "yellow", 4)
    emit(console, captured.get())
