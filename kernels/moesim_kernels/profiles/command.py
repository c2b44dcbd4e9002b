"""`moesim profile`: show what a profile says, compare two, import public measured tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["profile"]

profile = typer.Typer(
    name="profile",
    help="Look at device profiles: show one, compare two, import measured tables.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Operators = Annotated[
    list[str] | None, typer.Option("--operator", help="Only this operator. May be repeated.", metavar="NAME")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
_Plot = Annotated[
    Path | None, typer.Option("--plot", help="Write a picture, too: FILE.png, .svg or .pdf.", metavar="FILE")
]


@profile.command()
def show(
    name: Annotated[str, typer.Argument(help="A name in hw_profiles/ or a file.", metavar="PROFILE")],
    operator: _Operators = None,
    as_json: _Json = False,
    plot: _Plot = None,
    time: Annotated[bool, typer.Option("--time", help="Plot times, not efficiency.")] = False,
) -> None:
    """What a profile is, what it rests on, and how near the roofline it runs."""
    from moesim_kernels.profiles.find import load_named, operators_of
    from moesim_kernels.profiles.show import describe, render

    wanted = operators_of(operator or ())
    found = load_named(name)
    report = describe(found, wanted)
    if plot is not None:
        from moesim_kernels.profiles.figure import draw_profile

        draw_profile(report, plot, time)
    if as_json:
        from moesim.results import json_text

        sys.stdout.write(json_text(report))
        return
    render(report, time)
    if plot is not None:
        print(f"plot: {plot}")


@profile.command()
def compare(
    a: Annotated[str, typer.Argument(help="A name in hw_profiles/ or a file.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another.", metavar="B")],
    operator: _Operators = None,
    model: Annotated[str | None, typer.Option(help="Compare the shapes that this model runs.", metavar="MODEL")] = None,
    tp: Annotated[int, typer.Option(help="With --model: tensor-parallel ranks.", min=1, metavar="N")] = 1,
    dp: Annotated[int, typer.Option(help="With --model: data-parallel ranks.", min=1, metavar="N")] = 1,
    ep: Annotated[int | None, typer.Option(help="With --model: expert parts.", min=1, metavar="N")] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every shape, not the main ones.")] = False,
    as_json: _Json = False,
    plot: _Plot = None,
) -> None:
    """Times of two profiles and their ratio, by operator, shape and size; what is within their errors is marked."""
    from moesim.errors import BadInput, Problem
    from moesim_kernels.profiles.compare import compare as run
    from moesim_kernels.profiles.compare import render
    from moesim_kernels.profiles.find import load_named, operators_of

    wanted = operators_of(operator or ())
    first, second = load_named(a), load_named(b)
    shapes = None
    if model is not None:
        from moesim_kernels.profiles.deployment import deployed_shapes, load_model_named

        node = min(first.node.gpus_per_node, second.node.gpus_per_node)
        shapes = deployed_shapes(load_model_named(model), tp, dp, tp * dp if ep is None else ep, node)
    elif (tp, dp, ep) != (1, 1, None):
        raise BadInput(Problem("--tp, --dp, --ep", "say how a model is laid out; name it with --model"))
    report = run(first, second, wanted, shapes)
    if plot is not None:
        from moesim_kernels.profiles.figure import draw_comparison

        draw_comparison(first, second, wanted, shapes, plot)
    if as_json:
        from moesim.results import json_text

        sys.stdout.write(json_text(report))
        return
    render(report, every or model is not None)
    if plot is not None:
        print(f"plot: {plot}")
