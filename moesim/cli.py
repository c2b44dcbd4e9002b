"""The command line: verbs, exit codes, and one line a problem. A user never sees a traceback.

Exit codes: 0 done, 1 our own mistake, 2 bad input, 3 infeasible, 5 out of memory or disk, 130 interrupted.
Nothing heavy is imported before a verb needs it, so that `moesim --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from moesim import __version__
from moesim.cli_common import PluginOption, SetOption, load_plugins, show_notes
from moesim.cli_offload import offload
from moesim.cli_placement import explain, place
from moesim.errors import BadInput, Infeasible, MoesimError, Problem

if TYPE_CHECKING:
    from moesim.scenario.load import Scenario
    from moesim.simulate import RunResult
    from moesim.training.result import TrainingResult

__all__ = ["app", "main"]

EXIT_RESOURCES = 5
EXIT_INTERRUPTED = 130
COMMANDS = "moesim.commands"
CHECKS = "moesim.checks"


class _Group(TyperGroup):
    """Verbs of this module, then those that installed packages add by an entry point, loaded when called."""

    listing = False

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The verbs in --help; those of other packages are named without importing them."""
        self.listing = True
        try:
            super().format_commands(ctx, formatter)
        finally:
            self.listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Own verbs in the order of this file, then others by name."""
        own = list(self.commands)
        return own + sorted(e.name for e in metadata.entry_points(group=COMMANDS) if e.name not in own)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Our verb, or the one an entry point names: a function or a Typer app."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        found = [e for e in metadata.entry_points(group=COMMANDS) if e.name == cmd_name]
        if found and self.listing:
            return TyperCommand(cmd_name, help=f"Added by {_package(found[0])}.")
        return _outside(found[0]) if found else None


def _package(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _loaded(entry: metadata.EntryPoint) -> Any:
    """What an entry point names. Raises BadInput where its package cannot be imported."""
    try:
        return entry.load()
    except ImportError as error:
        raise BadInput(
            Problem(
                f"moesim {entry.name}",
                f"the package {_package(entry)} cannot be loaded: {error}. Install its extras",
            )
        ) from None


def _outside(entry: metadata.EntryPoint) -> Any:
    loaded = _loaded(entry)
    if not isinstance(loaded, typer.Typer):
        function, loaded = loaded, typer.Typer(add_completion=False, rich_markup_mode=None)
        loaded.command(entry.name)(function)
    command = typer.main.get_command(loaded)
    command.name = entry.name
    return command


app = typer.Typer(
    cls=_Group,
    name="moesim",
    help="Simulate Mixture-of-Experts deployments from recorded traffic, routing and measured hardware.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_File = Annotated[Path, typer.Argument(help="The scenario, a YAML file.", metavar="FILE")]


def _version(asked: bool) -> None:
    if asked:
        print(f"moesim {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    if not debug:
        sys.excepthook = _one_line


@app.command()
def simulate(
    file: _File,
    overrides: SetOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw.", min=0, metavar="N")] = None,
    out: Annotated[Path, typer.Option(help="Where results/<name>-<hash>/ goes.", metavar="DIR")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a summary.")] = False,
    timeline: Annotated[
        Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing.", metavar="FILE")
    ] = None,
    plugin: PluginOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")] = False,
) -> None:
    """Run a scenario: does it fit, how fast is it, what bounds it."""
    scenario = _load(file, overrides, seed, plugin)
    from moesim.results import json_text, replacing_file, write_results
    from moesim.simulate import RunResult
    from moesim.simulate import simulate as run
    from moesim.terminal import progress_bar, summary

    if timeline is not None and scenario.training is not None:
        raise BadInput(Problem("--timeline", "a timeline of training steps is not made yet; leave --timeline out"))

    with progress_bar(enabled=not quiet) as advance:
        result = run(scenario, progress=advance)
    report = result.to_json()
    if not result.feasible:
        if as_json:
            sys.stdout.write(json_text(report))
        raise Infeasible(list(result.reasons))
    folder = write_results(result, scenario, out, sys.argv)
    if timeline is not None and isinstance(result, RunResult):
        from moesim.timeline import write_timeline

        with replacing_file(timeline) as path:
            write_timeline(result, path)
    if as_json:
        sys.stdout.write(json_text(report))
    elif not quiet:
        summary(report, scenario)
    if not quiet:
        print(f"results: {folder}", file=sys.stderr if as_json else sys.stdout)


def _load(file: Path, overrides: list[str] | None, seed: int | None, plugins: list[str] | None) -> Scenario:
    load_plugins(plugins)
    from moesim.scenario.load import load_scenario

    scenario = load_scenario(file, overrides or (), seed)
    show_notes(scenario.warnings)
    return scenario


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Scenarios, YAML files.", metavar="FILE...")],
    overrides: SetOption = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary", help="One candidate a value, such as --vary parallel.ep=8,16. May be repeated.", metavar="KEY=V,V"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Run so many seeds, the same for all.", min=1, max=1000, metavar="N")] = 1,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Only this figure. May be repeated.", metavar="NAME")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write a picture, too: FILE.png, .svg or .pdf.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON instead of a table.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Keep comparison.json and every run's results here.", metavar="DIR")
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """Run candidates under the same seeds: which is better, and which cannot be told apart."""
    load_plugins(plugin)
    from moesim.candidates import load_candidates, parse_axes, run_candidates
    from moesim.compare import chosen_figures
    from moesim.compare import compare as judge
    from moesim.results import json_text, replacing_file, write_results
    from moesim.terminal import progress_bar

    figures = chosen_figures(metric or ())
    if plot is not None:
        from moesim.plot_compare import check_target

        check_target(plot)
    candidates, chosen = load_candidates(files, overrides or (), parse_axes(vary or ()), seeds)
    show_notes(warning for candidate in candidates for warning in candidate.scenario.warnings)

    def keep(result: RunResult | TrainingResult, scenario: Scenario) -> None:
        if out is not None:
            write_results(result, scenario, out, sys.argv)

    with progress_bar() as advance:
        comparison = judge(run_candidates(candidates, chosen, advance, keep), figures, chosen)
    report = comparison.to_json()
    if plot is not None and comparison.feasible:
        from moesim.plot_compare import draw

        draw(report, plot)
    if out is not None:
        with replacing_file(out / "comparison.json") as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json_text(report), encoding="utf-8")
    if as_json:
        sys.stdout.write(json_text(report))
    else:
        from moesim.terminal_compare import render

        render(report)
    for what, where in (("plot", plot if comparison.feasible else None), ("results", out)):
        if where is not None:
            print(f"{what}: {where}", file=sys.stderr if as_json else sys.stdout)
    if not comparison.feasible:
        raise typer.Exit(Infeasible.exit_code)


explain.command()(offload)
app.add_typer(explain, name="explain")
app.command()(place)


@app.command()
def check(file: _File, overrides: SetOption = None, plugin: PluginOption = None) -> None:
    """Check a scenario and the files it names without running it."""
    scenario = _load(file, overrides, None, plugin)
    notes, size = _check_training(scenario) if scenario.requests is None else _check_serving(scenario)
    more = _outside_checks(file, overrides or (), scenario)
    if scenario.tune is not None and not more:
        more = [f"tune: {len(scenario.tune.space)} parameters, {scenario.tune.trials:,} trials"]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    p = scenario.parallel
    print(
        f"ok: {scenario.name} ({scenario.hash}): {scenario.model.name} on {scenario.cluster.nodes} x "
        f"{scenario.cluster.gpus_per_node} {scenario.cluster.profile.name}, tp {p.tp}, dp {p.dp}, ep {p.ep}, "
        f"replicas {p.replicas}; {size}"
    )
    for line in more:
        print(line)


def _outside_checks(file: Path, overrides: Sequence[str], scenario: Scenario) -> list[str]:
    """What packages beside this one say of a scenario, a line each. Raises BadInput where they refuse it."""
    found = sorted(metadata.entry_points(group=CHECKS), key=lambda entry: entry.name)
    lines = [_loaded(entry)(file, overrides, scenario) for entry in found]
    return [line for line in lines if line is not None]


def _check_serving(scenario: Scenario) -> tuple[list[str], str]:
    """Notes about traffic and routing, and how many requests there are."""
    from moesim.cost.routed import pool_source
    from moesim.workload.requests import build_requests

    assert scenario.requests is not None
    stream = build_requests(scenario.requests, scenario.base, scenario.seed)
    notes = list(stream.warnings)
    if scenario.model.is_moe:
        notes += pool_source(scenario, scenario.seed).warnings
    return notes, f"{len(stream.prompt_tokens):,} requests"


def _check_training(scenario: Scenario) -> tuple[list[str], str]:
    """How many steps of how many tokens there are; the routing's files are read."""
    from moesim.training.scores import training_scores

    training = scenario.training
    assert training is not None
    if scenario.model.is_moe:
        training_scores(scenario, scenario.seed)
    tokens = training.global_batch_sequences * training.sequence_tokens
    return [], f"{training.steps:,} training steps of {tokens:,} tokens"


@app.command()
def schema() -> None:
    """Print the JSON Schema of a scenario file, for editors."""
    from moesim.results import json_text
    from moesim.scenario.load import scenario_schema

    sys.stdout.write(json_text(scenario_schema()))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A routing trace (.npz).", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DST")],
    num_experts: Annotated[
        int | None, typer.Option(help="Experts of the model, where the trace does not say.", min=1, metavar="N")
    ] = None,
) -> None:
    """Turn a routing trace (.npz) into a folder that large runs map."""
    from moesim.traces.routing_npz import convert as run

    run(source, target, num_experts)
    print(f"written: {target}")


@app.command()
def models() -> None:
    """List the models that a scenario can name."""
    from moesim.terminal import model_table

    model_table()


@app.command()
def routers(
    as_json: Annotated[bool, typer.Option("--json", help="Print the presets as JSON, equations included.")] = False,
) -> None:
    """List the routers that a scenario can name: mechanisms, and presets that stand for papers."""
    if as_json:
        from moesim.results import json_text
        from moesim.scenario.presets import presets

        sys.stdout.write(json_text({name: dataclasses.asdict(p) for name, p in presets().items()}))
        return
    from moesim.terminal import router_table

    router_table()


@app.command()
def profiles() -> None:
    """List the device profiles that a scenario can name."""
    from moesim.terminal import profile_table

    profile_table()


# ---- errors


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of a traceback: our own mistake, in one line, and how to see more."""
    where = ""
    while trace is not None:
        where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    text = " ".join(str(error).split())[:300]
    print(
        f"moesim: internal error: {kind.__name__}: {text}{where}. This is a mistake of moesim, not yours; "
        "run `moesim --debug ...` for the traceback and report it",
        file=sys.stderr,
    )


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, so that unfinished results are removed


def _report(error: MoesimError) -> int:
    if isinstance(error, Infeasible):
        lines = [f"infeasible: {reason}" for reason in error.reasons]
    elif isinstance(error, BadInput):
        lines = [f"error: {problem}" for problem in error.problems]
    else:
        lines = [f"error: {error}"]
    for line in lines:
        print(" ".join(line.splitlines()), file=sys.stderr)
    return error.exit_code


def _quiet_pipe() -> None:
    """Whoever read our output is gone: drop the rest, so that the interpreter's last flush is silent too."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? for what it lacks
    code: int | str | None = 0
    try:
        try:
            typer.main.get_command(app).main(args=arguments, prog_name="moesim")
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except MoesimError as error:
        code = _report(error)
    except MemoryError as error:
        detail = f" ({error})" if str(error) else ""
        print(f"error: out of memory{detail}; use a smaller input or a machine with more", file=sys.stderr)
        code = EXIT_RESOURCES
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        _quiet_pipe()
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        code = EXIT_RESOURCES
    sys.exit(code)


if __name__ == "__main__":
    main()
