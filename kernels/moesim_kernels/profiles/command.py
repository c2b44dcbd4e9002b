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


def _check_plot(path: Path | None) -> None:
    """Refuse a picture that cannot be drawn before anything is computed."""
    if path is not None:
        from moesim_kernels.profiles.figure import check_target

        check_target(path)


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
    _check_plot(plot)
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
    as_json: _Json = False,
    plot: _Plot = None,
) -> None:
    """Times of two profiles and their ratio, by operator, shape and size; what is within their errors is marked."""
    from moesim.errors import BadInput, Problem
    from moesim_kernels.profiles.compare import compare as run
    from moesim_kernels.profiles.compare import render
    from moesim_kernels.profiles.find import load_named, operators_of

    wanted = operators_of(operator or ())
    _check_plot(plot)
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
    render(report, every=model is not None)
    if plot is not None:
        print(f"plot: {plot}")


_import = typer.Typer(
    name="import",
    help="Turn public measured tables into a profile.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profile.add_typer(_import)


@_import.callback()
def _families() -> None:
    """Turn public measured tables into a profile."""


@_import.command()
def aic(
    system: Annotated[str | None, typer.Option(help="Which system, such as h200_sxm.", metavar="NAME")] = None,
    backend: Annotated[str | None, typer.Option(help="vllm, sglang or trtllm.", metavar="NAME")] = None,
    version: Annotated[
        str | None, typer.Option(help="Of the backend; else what the package serves.", metavar="V")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The profile to write; curves go beside it.", metavar="FILE.yaml")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Say which tables there are, and stop.")] = False,
) -> None:
    """Import tables of the optional package aiconfigurator-core: fitted, checked against the datasheet, held out."""
    from moesim.errors import BadInput, Problem
    from moesim_kernels.profiles.aic_package import installed
    from moesim_kernels.profiles.aic_report import imported_table, listing_table

    package = installed()
    if list_all:
        listing_table(package, system)
        return
    missing = [name for name, value in (("--system", system), ("--backend", backend), ("--out", out)) if value is None]
    if missing or system is None or backend is None or out is None:
        raise BadInput(
            Problem("", f"{', '.join(missing)} missing; `moesim profile import aic --list` shows what there is")
        )
    if out.suffix not in (".yaml", ".yml"):
        raise BadInput(Problem("--out", f"{out.name!r} must end in .yaml"))
    if not out.absolute().parent.is_dir():
        raise BadInput(Problem("--out", f"there is no folder {out.parent}; make it first"))
    from moesim_kernels.profiles.aic_import import import_tables, write_profile

    found = import_tables(package, system, backend, version, lambda text: print(text, file=sys.stderr))
    shown = f"moesim profile import aic --system {system} --backend {backend}"
    shown += (f" --version {version}" if version else "") + f" --out {out.name}"
    written = write_profile(found, package, system, out, shown)
    imported_table(found)
    for path in written:
        print(f"written: {path}")
