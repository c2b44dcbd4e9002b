"""The verbs about placement: `moesim explain eplb` and `moesim place`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli_common import PluginOption, SetOption, load_plugins, show_notes

__all__ = ["explain", "place"]

explain = typer.Typer(
    help="Answer a question about a deployment: is it worth it, and why.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@explain.callback()
def _explain_options() -> None:
    """A group, also while it has one command."""


@explain.command()
def eplb(
    cluster: Annotated[
        str, typer.Option(help="A scenario file, or a device profile with --model and --ep.", metavar="FILE|DEVICE")
    ],
    dump: Annotated[
        Path | None, typer.Option(help="A recording of expert loads; without: the scenario's routing.", metavar="FILE")
    ] = None,
    fmt: Annotated[str | None, typer.Option("--format", help="Of the recording.", metavar="NAME")] = None,
    steps_per_row: Annotated[
        int | None, typer.Option(help="Steps that a row stands for, where no file says it.", min=1, metavar="N")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model.", metavar="NAME")] = None,
    nodes: Annotated[int | None, typer.Option(help="Servers.", min=1, metavar="N")] = None,
    ep: Annotated[int | None, typer.Option(help="Expert-parallel ranks.", min=1, metavar="N")] = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel ranks; EP / TP if not given.", min=1, metavar="N")
    ] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks of attention.", min=1, metavar="N")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Of a request.", min=1, metavar="N")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Of a request.", min=1, metavar="N")] = None,
    redundant: Annotated[
        list[int] | None, typer.Option(help="Redundant experts to try. May be repeated.", min=0, metavar="N")
    ] = None,
    interval: Annotated[
        list[int] | None, typer.Option(help="Steps between rebalances to try. May be repeated.", min=1, metavar="N")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="Only this: static, sync or async. May be repeated.", metavar="MODE")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Placement to try.", metavar="KIND")] = None,
    host_ms: Annotated[
        float | None, typer.Option(help="Planning of a rebalance on the host.", min=0, metavar="MS")
    ] = None,
    worth: Annotated[float, typer.Option(help="Least gain worth having, in percent.", min=0, max=100)] = 1.0,
    overrides: SetOption = None,
    plugin: PluginOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Is expert load balancing worth enabling for this traffic, how, at what cost, and why."""
    load_plugins(plugin)
    from moesim.explain_eplb import Ask, explain_eplb, render, to_json
    from moesim.explain_eplb.deployment import Deployment, placement_kind, read_loads
    from moesim.results import json_text

    given = Deployment(cluster, model, nodes, tp, dp, ep, prompt_tokens, output_tokens, tuple(overrides or ()))
    scenario = given.scenario()
    show_notes(scenario.warnings)
    kind = placement_kind(scenario, policy)
    ask = Ask(tuple(redundant or ()), tuple(interval or ()), kind, host_ms, worth / 100, recorded=dump is not None)
    if mode:
        ask = dataclasses.replace(ask, modes=tuple(mode))
    report = to_json(explain_eplb(read_loads(scenario, dump, fmt, steps_per_row), scenario, ask))
    sys.stdout.write(json_text(report) if as_json else render(report))


def place(
    dump: Annotated[
        Path, typer.Option(help="A recording of expert loads: a file, or an engine's folder.", metavar="X")
    ],
    ep: Annotated[int | None, typer.Option(help="Ranks that the experts are spread over.", min=1, metavar="N")] = None,
    fmt: Annotated[
        str | None, typer.Option("--format", help="The recording's format, where it is not recognised.", metavar="F")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model it was recorded on: a name or a file.", metavar="M")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes that the ranks fill evenly.", min=1, metavar="N")] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="A scenario, for its model, nodes and what experts cost there.", metavar="FILE")
    ] = None,
    policy: Annotated[str, typer.Option(help="The placement, such as eplb.", metavar="KIND")] = "eplb_swap",
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter of it, such as num_redundant_experts=32.", metavar="KEY=VALUE"),
    ] = None,
    engines: Annotated[
        str, typer.Option("--emit", help="Write files for these: sglang,trtllm,vllm,vllm-ascend.", metavar="ENGINE,...")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="The folder for the files; maps, where some are asked for.", metavar="DIR")
    ] = None,
    current: Annotated[
        Path | None,
        typer.Option(help="A map in use (SGLang, TensorRT-LLM, vllm-ascend) to compare with.", metavar="FILE"),
    ] = None,
    score_on: Annotated[
        Path | None, typer.Option(help="Score on this recording, not on a part of the first.", metavar="Y")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the rows to score on, not to fit to. Default 0.5.", metavar="SHARE")
    ] = None,
    tokens_per_row: Annotated[
        int, typer.Option(help="Tokens that make one step, in a recording of single tokens.", min=1, metavar="N")
    ] = 4096,
    interval: Annotated[
        int | None, typer.Option(help="Steps between rebalances, for vLLM's file.", min=1, metavar="STEPS")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Steps whose counts a rebalance uses, for vLLM's file.", min=1, metavar="STEPS")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.", min=0, metavar="N")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a summary.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Place experts for recorded traffic, score it on what was held out, and write the files that engines load."""
    load_plugins(plugin)
    from moesim.place import Ask, check_options, render, write
    from moesim.place import place as run
    from moesim.results import json_text

    wanted = tuple(engine.strip() for engine in engines.split(",") if engine.strip())
    ask = Ask(
        dump, ep, fmt, model, nodes, cluster, policy, tuple(parameters or ()), wanted, current, score_on,
        held_out, tokens_per_row, interval, window, seed,
    )  # fmt: skip
    check_options(ask, out)
    out = out or (Path("maps") if wanted else None)
    placed = run(ask)
    show_notes(placed.warnings)
    emitted = write(placed, wanted, out) if out is not None else ()
    sys.stdout.write(json_text(placed.to_json(emitted)) if as_json else render(placed, emitted))
    if out is not None:
        print(f"written: {out}", file=sys.stderr if as_json else sys.stdout)
