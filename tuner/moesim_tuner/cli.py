"""The verb `moesim tune`: search, go on, look, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moesim.cli_common import PluginOption, SetOption, load_plugins, show_notes
from moesim.errors import BadInput, Problem

if TYPE_CHECKING:
    from moesim_tuner.tune import Session

__all__ = ["tune"]

DEFAULT_STORAGE = "sqlite:///results/tune.db"


class _Group(TyperGroup):
    """`moesim tune FILE` is `moesim tune run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The first word is a subcommand, or a file."""
        first = next((word for word in args if not word.startswith("-")), None)
        if args and first not in self.commands and not {"-h", "--help"} & set(args[:1]):
            args = ["run", *args]
        return list(super().parse_args(ctx, args))


tune = typer.Typer(
    cls=_Group,
    help="Find the deployment: `moesim tune FILE` searches what the scenario's `tune:` section says.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

StorageOption = Annotated[
    str, typer.Option(help="Where studies are kept: sqlite:///FILE or postgresql://...", metavar="URL")
]
WorkersOption = Annotated[int, typer.Option(help="Processes that simulate.", min=1, max=1024, metavar="N")]
ClusterOption = Annotated[
    str | None, typer.Option(help="Simulate on a Dask cluster that is there.", metavar="tcp://HOST:PORT")
]
StudyArgument = Annotated[str | None, typer.Argument(help="A study; without: the latest.", metavar="STUDY")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report.")]


@tune.command("run")
def run(
    file: Annotated[Path, typer.Argument(help="A scenario with a `tune:` section.", metavar="FILE")],
    overrides: SetOption = None,
    trials: Annotated[int | None, typer.Option(help="Configurations to try.", min=1, max=100_000, metavar="N")] = None,
    workers: WorkersOption = 1,
    study: Annotated[str | None, typer.Option(help="Its name; without: the scenario's.", metavar="NAME")] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    cluster: ClusterOption = None,
    asynchronous: Annotated[
        bool, typer.Option("--async", help="Never wait for a batch: faster, and not repeatable.")
    ] = False,
    batch: Annotated[int | None, typer.Option(help="Proposed together.", min=1, max=256, metavar="N")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the search and its runs.", min=0, metavar="N")] = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Search what the `tune:` section of a scenario says, or go on with a study that began with it."""
    load_plugins(plugin)
    from moesim_tuner.tune import begin, define

    changed: dict[str, int | None] = {"trials": trials, "batch": batch, "seed": seed}
    definition, notes = define(file, overrides or (), plugin or (), changed, asynchronous)
    show_notes(notes)
    session = begin(definition, study or definition.name, storage)
    _search(session, workers, cluster, as_json, quiet)


@tune.command("resume")
def resume(
    study: StudyArgument = None,
    storage: StorageOption = DEFAULT_STORAGE,
    workers: WorkersOption = 1,
    cluster: ClusterOption = None,
    trials: Annotated[int | None, typer.Option(help="Go on to so many in all.", min=1, metavar="N")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go on with a study from where it was stopped, or to more trials. The file it began with is not needed."""
    from moesim_tuner.tune import go_on

    _search(go_on(study, storage, trials), workers, cluster, as_json, quiet)


def _search(session: Session, workers: int, cluster: str | None, as_json: bool, quiet: bool) -> None:
    from moesim_tuner.progress import Progress
    from moesim_tuner.tune import search

    how = f"moesim tune resume {session.name}" + (
        "" if session.storage == DEFAULT_STORAGE else f" --storage {session.shown_storage}"
    )
    try:
        with session, Progress(session.definition, enabled=not quiet and not as_json) as progress:
            found = search(session, workers, cluster, progress.told, progress.stage)
    except KeyboardInterrupt:
        print(f"stopped; every finished trial is kept. Go on with: {how}", file=sys.stderr)
        raise
    except OSError:
        print(f"stopped; what is finished is kept. Once there is room, go on with: {how}", file=sys.stderr)
        raise
    if quiet and not as_json:
        return
    _show(found, as_json)


def _show(found: Any, as_json: bool) -> None:
    from moesim.results import json_text
    from moesim_tuner.report import render, to_json

    if as_json:
        sys.stdout.write(json_text(to_json(found)))
    else:
        render(found)


@tune.command("status")
def status(study: StudyArgument = None, storage: StorageOption = DEFAULT_STORAGE, as_json: JsonOption = False) -> None:
    """How far the studies are, also while they run."""
    from moesim_tuner.status import show_status

    show_status(study, storage, as_json)


@tune.command("report")
def report(study: StudyArgument = None, storage: StorageOption = DEFAULT_STORAGE, as_json: JsonOption = False) -> None:
    """What a study found: the winner, how sure that is, and why."""
    from moesim_tuner.tune import found_of

    _show(found_of(study, storage), as_json)


@tune.command("export")
def export(
    study: StudyArgument = None,
    out: Annotated[Path, typer.Option(help="The folder to write.", metavar="DIR")] = Path("results/tuned"),
    emit: Annotated[
        str | None, typer.Option(help="Engines, such as vllm,sglang; without: all that fit.", metavar="NAME,NAME")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="This trial instead of the winner.", min=0, metavar="N")] = None,
    canonical: Annotated[
        bool, typer.Option("--canonical", help="Print the study itself, without clocks, and write nothing.")
    ] = False,
    storage: StorageOption = DEFAULT_STORAGE,
) -> None:
    """Write the winner as a scenario, engines' flags and expert maps."""
    from moesim_tuner.tune import found_of

    found = found_of(study, storage)
    if canonical:
        from moesim_tuner.store import canonical_export

        sys.stdout.write(canonical_export(found.kept))
        return
    from moesim_tuner.export import export as write

    number = trial if trial is not None else found.winner
    if number is None:
        raise BadInput(
            Problem("moesim tune export", f"{found.name} has no feasible trial; `moesim tune report` says why")
        )
    if number >= len(found.trials):
        raise BadInput(Problem("--trial", f"{found.name} has trials 0 to {len(found.trials) - 1}, got {number}"))
    engines = None if emit is None else [name.strip() for name in emit.split(",")]
    print(write(found, number, out, engines))
