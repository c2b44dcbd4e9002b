"""`moesim validate`: predict, write it down, measure for real, judge."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moesim.cli_common import SetOption

if TYPE_CHECKING:
    from moesim_kernels.validate.session import Options

__all__ = ["validate"]


class _Validate(TyperGroup):
    """What is no verb of this group is a scenario to validate."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`moesim validate SCENARIO` is `moesim validate run SCENARIO`."""
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


validate = typer.Typer(
    cls=_Validate,
    name="validate",
    help="Predict steps of a scenario, run them with real kernels, and judge the prediction.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@validate.command(epilog="moesim validate judge DIR judges again what lies in a folder; it needs no torch.")
def run(
    scenario: Annotated[Path, typer.Argument(help="The scenario, a YAML file.", metavar="SCENARIO")],
    profile: Annotated[
        str | None,
        typer.Option(help="Predict with this profile, a file or a name. Default: one measured now.", metavar="PROFILE"),
    ] = None,
    calibrate_budget: Annotated[
        str | None, typer.Option(help="Time to measure a profile, such as 150s. Default: 150s.", metavar="TIME")
    ] = None,
    settings: Annotated[int, typer.Option(help="Held-out steps.", min=4, max=10_000, metavar="N")] = 44,
    anchors: Annotated[
        int,
        typer.Option(
            help="Steps measured before anything is predicted, from which intervals are taken; 0: the profile's own.",
            min=0,
            max=10_000,
            metavar="N",
        ),
    ] = 29,
    rounds: Annotated[int, typer.Option(help="Times that each is measured.", min=1, max=10_000, metavar="N")] = 9,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Processes of an expert-parallel group. Default: the scenario's.", min=1, max=64, metavar="N"
        ),
    ] = None,
    from_study: Annotated[
        str | None, typer.Option("--from", help="Measure candidates of this study of moesim tune.", metavar="STUDY")
    ] = None,
    storage: Annotated[str, typer.Option(help="Where studies are kept.", metavar="URL")] = "sqlite:///results/tune.db",
    top: Annotated[
        int,
        typer.Option(
            help="Candidates: the N best, N of the middle, N at random, the default.", min=1, max=50, metavar="N"
        ),
    ] = 5,
    predict_only: Annotated[
        bool,
        typer.Option("--predict-only", help="Stop once predictions are sealed; with --profile, needs no torch."),
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure once more, and say whether both agree.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where torch finds it.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of a process.", min=1, max=1024, metavar="N")] = 1,
    backend: Annotated[str, typer.Option(help="Kernels of the routed experts, as of moesim calibrate.")] = "torch",
    seed: Annotated[
        int | None, typer.Option(help="Seed of steps, weights and order. Default: the scenario's.", min=0, metavar="N")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Serve the scenario's requests for real, too (one rank).")
    ] = True,
    out: Annotated[Path, typer.Option(help="Where validate-<name>-<hash>/ goes.", metavar="DIR")] = Path("results"),
    overrides: SetOption = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Predict steps of SCENARIO, write the prediction down, run them with real kernels, judge."""
    from moesim.scenario.files import find_named
    from moesim_kernels.calibrate.command import seconds_of
    from moesim_kernels.calibrate.run import require_torch
    from moesim_kernels.validate.session import Options

    if profile is not None and calibrate_budget is not None:
        raise _bad("--calibrate-budget", "--profile names the profile; leave out one of the two")
    if predict_only and profile is None:
        raise _bad("--predict-only", "what is not measured needs a profile; name one with --profile")
    budget_s = seconds_of(calibrate_budget or "150s", "--calibrate-budget")
    if not predict_only:
        require_torch()
    kind = _device(device, not predict_only)
    named = None if profile is None else find_named(profile, "hw_profiles", Path(), "", "device profile")
    before = 0 if predict_only else anchors
    options = Options(
        scenario, tuple(overrides or ()), named, budget_s, settings, before, rounds, ranks, from_study, storage, top,
        kind, threads, backend, seed, serve, quiet or as_json,
    )  # fmt: skip
    if predict_only:
        _predicted(options, out, as_json)
        return
    _finish(*_validated(options, out, again), shlex.join(["moesim", *sys.argv[1:]]), as_json, quiet)


@validate.command()
def judge(
    folder: Annotated[Path, typer.Argument(help="A folder that moesim validate has made.", metavar="DIR")],
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Judge again what was predicted and measured in DIR, and write its report anew. Needs no torch."""
    from moesim_kernels.validate.assemble import judge_folder

    _finish(folder, judge_folder(folder), shlex.join(["moesim", *sys.argv[1:]]), as_json, quiet)


def _bad(option: str, message: str) -> Exception:
    from moesim.errors import BadInput, Problem

    return BadInput(Problem(option, message))


def _device(name: str | None, needs_torch: bool) -> str:
    from moesim_kernels.calibrate.command import device_of

    return device_of(name, needs_torch=needs_torch)


def _predicted(options: Options, out: Path, as_json: bool) -> None:
    """The first stages alone; tells where the predictions lie, and their seal."""
    from moesim.results import json_text
    from moesim_kernels.validate.predict import seal_of
    from moesim_kernels.validate.session import PREDICTIONS, Session

    session = Session(options, out)
    session.open()
    found = session.predictions(session.profile())
    path = session.folder / PREDICTIONS
    if as_json:
        sys.stdout.write(json_text(found.to_json()))
    else:
        print(f"{len(found.settings)} steps predicted: {path}\nseal (SHA-256): {seal_of(path)}")


def _validated(options: Options, out: Path, again: bool) -> tuple[Path, dict[str, Any]]:
    """All stages; the folder and its report."""
    from moesim_kernels.validate.assemble import judge_folder, winner
    from moesim_kernels.validate.session import Session

    session = Session(options, out)
    session.open()
    if not options.quiet:
        print(f"folder: {session.folder}", file=sys.stderr)
    predictions = session.predictions(session.profile())
    session.measure(predictions, again)
    report = judge_folder(session.folder)
    session.measure_fresh(winner(report, predictions))
    session.serve(predictions, bool(report["noise"]["quiet"]))
    return session.folder, judge_folder(session.folder)


def _finish(folder: Path, report: dict[str, Any], command: str, as_json: bool, quiet: bool) -> None:
    """Write, tell, and exit with the verdict's code."""
    from moesim.results import json_text
    from moesim_kernels.validate.assemble import write_report
    from moesim_kernels.validate.terminal import show

    write_report(folder, report, command)
    if as_json:
        sys.stdout.write(json_text(report))
    elif not quiet:
        show(report)
        print(f"\nreport: {folder / 'report.md'}")
    if report["verdict"]["exit_code"]:
        raise SystemExit(report["verdict"]["exit_code"])
