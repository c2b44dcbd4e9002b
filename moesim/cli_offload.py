"""The verb `moesim explain offload`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli_common import PluginOption, SetOption, load_plugins, show_notes

__all__ = ["offload"]


def offload(
    device: Annotated[str, typer.Option(help="A device profile, or a scenario file.", metavar="DEVICE|FILE")],
    model: Annotated[str | None, typer.Option(help="The model: a name or a file.", metavar="NAME")] = None,
    vram: Annotated[
        str | None, typer.Option(help="Device memory that may be used, such as 24GiB.", metavar="SIZE")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Recorded routing; without: the scenario's, or a synthetic one.", metavar="FILE"),
    ] = None,
    dram: Annotated[str | None, typer.Option(help="Host memory for experts, such as 64GiB.", metavar="SIZE")] = None,
    home: Annotated[str | None, typer.Option(help="Where all experts are: dram or nvme.", metavar="TIER")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests served at a time.", min=1, max=4096, metavar="N")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Of a request.", min=1, max=1 << 20, metavar="N")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Of a request.", min=2, max=1 << 20, metavar="N")] = 256,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind of offload. May be repeated.", metavar="KIND")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.", min=0, metavar="N")] = 0,
    overrides: SetOption = None,
    plugin: PluginOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """What fits into a device smaller than the model, how to split its memory, which policy, how fast, which flags."""
    load_plugins(plugin)
    from moesim.errors import BadInput, Problem
    from moesim.explain_offload import Ask, explain_offload, render, to_json
    from moesim.results import json_text
    from moesim.terminal import progress_bar
    from moesim.units import parse_quantity

    def gib(text: str | None, option: str) -> float | None:
        if text is None:
            return None
        try:
            size = parse_quantity(text, "GiB")
        except ValueError as error:
            raise BadInput(Problem(option, str(error))) from None
        if size <= 0:
            raise BadInput(Problem(option, f"a size above 0 is needed, such as 24GiB, got {text!r}"))
        return size

    ask = Ask(
        device, model, gib(vram, "--vram"), trace, concurrency, prompt_tokens, output_tokens, gib(dram, "--dram"), home,
        tuple(kind or ()), tuple(overrides or ()), seed,
    )  # fmt: skip
    with progress_bar(enabled=not as_json) as advance:
        report = to_json(explain_offload(ask, advance))
    show_notes(report["warnings"])
    sys.stdout.write(json_text(report) if as_json else render(report))
