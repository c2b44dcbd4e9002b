"""What a calibration says on the terminal, drawn from what the profile's file says, so that the two agree."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["report"]

_NOISY_PSI = 20.0
_DRIFT = 1.10


def report(spec: Mapping[str, Any], file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the held-out table of a calibrated profile, its rates, and what to know about the run."""
    console = Console(file=file or sys.stdout, width=width, highlight=False, emoji=False)
    found = spec["provenance"]
    with console.capture() as captured:
        _head(console, spec, found)
        _table(console, found["held_out"])
        _speed(console, spec["speed_error"])
        _notes(console, found)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _head(console: Console, spec: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    counts = found["points"]
    console.print(Text(str(spec["name"]), style="bold"), Text(f"measured on {spec['device']}", style="dim"))
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in spec["flop_per_s"].items())
    threads = f"{found['threads']} CPU thread{'s' * (found['threads'] > 1)}"
    console.print(Text(f"memory {spec['hbm_gb_per_s']:.4g} GB/s, {rates}, {threads}"))
    console.print(
        Text(
            f"{counts['measured']} of {counts['planned']} points measured in {found['seconds']:.0f} s, "
            f"{counts['held_out']} of them held out, {counts['refused']} refused as impossible"
        )
    )
    console.print()


def _table(console: Console, held_out: Mapping[str, Mapping[str, Any]]) -> None:
    if not held_out:
        console.print(Text("No point was held out: how far the profile is off is not known.", style="yellow"))
        return
    table = Table(box=None, pad_edge=False, title="Error on held-out points", title_justify="left", title_style="bold")
    table.add_column("operator", no_wrap=True)
    for name in ("points", "median", "p90", "Kendall tau", "in interval", "half-width"):
        table.add_column(name, justify="right")
    for operator, row in held_out.items():
        interval, tau = row["interval_90"], row["kendall_tau"]
        table.add_row(
            operator,
            str(row["points"]),
            f"{row['median']:.1%}",
            f"{row['p90']:.1%}",
            "-" if tau is None else f"{tau:.2f}",
            interval["covered"] or "too few",
            "-" if interval["half_width"] is None else f"{interval['half_width']:.1%}",
        )
    console.print(table)
    console.print(Text("interval: 90 %, each point judged by the one that the other points give", style="dim"))
    console.print()


def _speed(console: Console, error: float) -> None:
    if not error:
        console.print(Text("speed of the machine from run to run: not known, the run was too short to tell"))
        console.print()
        return
    text = f"speed of the machine from run to run: +-{math.expm1(1.645 * error):.1%} (90 %), from the drift in this run"
    console.print(Text(f"{text}; not in the table"))
    console.print()


def _notes(console: Console, found: Mapping[str, Any]) -> None:
    psi, drift, counts = found["psi_percent"], found["reference_drift"], found["points"]
    told = "the kernel does not tell" if psi is None else f"{psi:.0f} %"
    console.print(
        Text(f"CPU pressure while measuring (PSI, median): {told}; reference product drifted by x{drift:.2f}")
    )
    if psi is not None and psi > _NOISY_PSI:
        console.print(Text("The machine was busy: errors and widths are larger than on a quiet one.", style="yellow"))
    if drift > _DRIFT:
        console.print(
            Text("The clock or the load changed during the run; measure again for a firm profile.", style="yellow")
        )
    for text in found["refused"]:
        console.print(Text(f"refused: {text}", style="yellow"))
    for case, text in found["could_not_run"].items():
        console.print(Text(f"could not run: {case}: {text}", style="yellow"))
    if counts["not_reached"]:
        text = f"{counts['not_reached']} points were not reached within the budget: the same command goes on from here"
        console.print(Text(text, style="yellow"))
    if found["priced_by_physics_alone"]:
        names = ", ".join(found["priced_by_physics_alone"])
        console.print(Text(f"too few points, so typical efficiencies: {names}", style="yellow"))
    if found["assumed"]:
        names = ", ".join(name.removeprefix("node.") for name in found["assumed"])
        console.print(Text(f"assumed, not measured: {names}"))
