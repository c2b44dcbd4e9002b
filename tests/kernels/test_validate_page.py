"""docs/validate.md says what the program does: its options, its bounds, its exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from moesim_kernels.validate.bounds import BOUNDS, LEAST_SETTINGS, MAX_PSI, SERVED
from moesim_kernels.validate.command import validate

PAGE = Path("docs/validate.md").read_text(encoding="utf-8")


def test_the_page_names_the_options_that_there_are() -> None:
    usage = PAGE.split("```text\n")[1].split("```")[0]
    named = set(re.findall(r"--[a-z-]+", usage))
    group = typer.main.get_command(validate)
    there = {
        option
        for command in group.commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--") and option != "--help"
    }
    assert named == there


def test_the_page_gives_the_bounds_that_are_judged_by() -> None:
    rows = {line.split("|")[1].strip(): line.split("|")[2:5] for line in PAGE.splitlines() if line.startswith("| ")}
    for bounds in BOUNDS.values():
        median, p90, tau = (cell.strip() for cell in rows[bounds.title])
        assert float(median.rstrip(" %")) / 100 == bounds.median
        assert (None if p90 == "-" else float(p90.rstrip(" %")) / 100) == bounds.p90
        assert float(tau) == bounds.tau
    assert f"{SERVED['tpot']:.0%}".replace("%", " %") in "".join(rows["served run"])
    assert f"{SERVED['ttft_p50']:.0%}".replace("%", " %") in "".join(rows["served run"])
    assert f"fewer than {LEAST_SETTINGS} settings" in PAGE
    assert f"is {MAX_PSI:.0f} % or more" in PAGE
