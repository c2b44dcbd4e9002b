"""`moesim runtime`: write a model, replay a trace on it, compare with the simulator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli_common import PluginOption, load_plugins
from moesim.errors import BadInput, Problem

if TYPE_CHECKING:
    from moesim_kernels.runtime.replay import Replay
    from moesim_kernels.runtime.run import Settings
    from moesim_kernels.runtime.sizes import ModelSizes
    from moesim_kernels.runtime.weights import WeightFile

__all__ = ["runtime"]

runtime = typer.Typer(
    name="runtime",
    help="Run a real MoE model whose experts are in slow memory, under the policies that the simulator runs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_File = Annotated[Path, typer.Argument(help="A model that `moesim runtime write` wrote.", metavar="MODEL.moe")]
_Link = Annotated[str, typer.Option("--link", help="disk, memory or cuda: how experts reach where they compute.")]
_Trace = Annotated[
    Path | None, typer.Option("--trace", help="A routing trace (.npz). Default: synthetic.", metavar="FILE")
]
_Prefetch = Annotated[str, typer.Option(help="Prefetch policy: a kind, or JSON with kind.", metavar="KIND")]
_Offload = Annotated[str, typer.Option(help="Offload policy: a kind, or JSON with kind.", metavar="KIND")]
_Pooled = Annotated[bool, typer.Option("--pooled", help="One cache for all layers.")]
_Bypass = Annotated[bool, typer.Option("--bypass", help="A miss may stream past the cache.")]
_Completion = Annotated[str, typer.Option(help="raced, or logical (a look-up waits for its transfer).")]
_Staging = Annotated[int, typer.Option(help="Buffers that streamed experts pass through.", min=1, max=256)]
_Chunk = Annotated[int, typer.Option(help="Bytes between which an urgent transfer may go first; 0: none.", min=0)]
_Batch = Annotated[int, typer.Option(help="Sequences that run together.", min=1, max=1024, metavar="N")]
_Steps = Annotated[int, typer.Option(help="Steps to run.", min=1, max=1_000_000, metavar="N")]
_Prompt = Annotated[int, typer.Option(help="First tokens of a sequence that are one step.", min=0, metavar="N")]
_Learn = Annotated[
    int, typer.Option("--learn", help="First sequences, which policies learn from and nobody replays.", min=0, max=4096)
]
_Seed = Annotated[int, typer.Option(help="Seed of routes and policies.", min=0, metavar="N")]
_Threads = Annotated[int, typer.Option(help="CPU threads of the products.", min=1, max=1024, metavar="N")]
_Json = Annotated[bool, typer.Option("--json", help="Print what was found as JSON instead of a table.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@runtime.command()
def write(
    out: Annotated[Path, typer.Argument(help="The file to write.", metavar="MODEL.moe")],
    sizes: Annotated[Path | None, typer.Option(help="JSON with the sizes.", metavar="FILE.json")] = None,
    model: Annotated[Path | None, typer.Option(help="A model file (workloads/models), made smaller.")] = None,
    divide: Annotated[int, typer.Option(help="With --model: widths are divided by it.", min=1, max=4096)] = 8,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="One size, such as layers=4. May be repeated.", metavar="NAME=N")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.", min=0, metavar="N")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Write a model with drawn weights: one file, the experts as blocks that are read one by one."""
    from moesim_kernels.runtime.sizes import ModelSizes, read_sizes, shrunk, sizes_from
    from moesim_kernels.runtime.weights import open_weights, write_weights

    if sizes is not None and model is not None:
        raise BadInput(Problem("--sizes", "sizes come from --sizes or from --model, not both"))
    chosen = ModelSizes()
    if sizes is not None:
        chosen = read_sizes(sizes)
    elif model is not None:
        from moesim.scenario.load import load_model

        chosen = shrunk(load_model(model), divide)
    if change:
        chosen = sizes_from(chosen.model_dump() | dict(_change(text) for text in change), "--set")
    write_weights(out, chosen, seed, None if quiet else _Bar("experts written"))
    file = open_weights(out)
    if not quiet:
        print(
            f"written: {out}, {file.file_bytes:,} bytes, {chosen.num_keys} experts of {chosen.slot_bytes:,}",
            file=sys.stderr,
        )


def _change(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found:
        raise BadInput(Problem("--set", f"NAME=VALUE is needed, got {text!r:.60}"))
    return name, int(value) if value.lstrip("-").isdigit() and len(value) < 20 else value


class _Bar:
    """A counter on a terminal, nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._shown = what, sys.stderr.isatty()

    def __call__(self, done: int, whole: int) -> None:
        if self._shown and (done % 16 == 0 or done == whole):
            print(f"\r{self._what}: {done} of {whole}", end="\n" if done == whole else "", file=sys.stderr)


@runtime.command()
def run(
    file: _File,
    cache: Annotated[str, typer.Option(help="Share of all experts' bytes (0.25), or bytes (64MiB).")] = "0.25",
    link: _Link = "disk",
    eviction: Annotated[str, typer.Option(help="Eviction policy: a kind, or JSON with kind.", metavar="KIND")] = "lru",
    prefetch: _Prefetch = "none",
    offload: _Offload = "cached",
    pooled: _Pooled = False,
    bypass: _Bypass = False,
    completion: _Completion = "raced",
    staging: _Staging = 2,
    chunk: _Chunk = 0,
    trace: _Trace = None,
    batch: _Batch = 1,
    steps: _Steps = 64,
    prompt: _Prompt = 0,
    learn: _Learn = 8,
    seed: _Seed = 0,
    threads: _Threads = 1,
    check: Annotated[str, typer.Option(help="Compare checksums of experts: first, always or never.")] = "first",
    as_json: _Json = False,
    plugin: PluginOption = None,
) -> None:
    """Replay routes on the model: hits, transfers, waits and step times, as they really happen."""
    load_plugins(plugin)
    _one_of("--link", link, ("disk", "memory", "cuda"))
    opened, replay, fit = _prepared(file, trace, batch, steps, prompt, learn, seed, threads)
    from moesim_kernels.runtime.run import run_real

    _one_of("--check", check, ("first", "always", "never"))
    settings = _settings(
        opened.sizes, cache, _policy(eviction), _policy(prefetch), offload, pooled, bypass, completion, staging, chunk,
        seed,
    )  # fmt: skip
    found = run_real(opened, settings, replay, link, fit, check)
    from moesim_kernels.runtime.report import run_table, run_to_json

    report = run_to_json(found, settings, opened, link)
    _print(report, as_json, run_table)


@runtime.command()
def compare(
    file: _File,
    policies: Annotated[
        str, typer.Option(help="Eviction, or eviction+prefetch, parted by commas.", metavar="A,B+C,...")
    ] = "lru,lfu,belady,lru+markov",
    caches: Annotated[str, typer.Option(help="Shares of all experts' bytes.", metavar="S,S,...")] = "0.25,0.5,0.75",
    link: _Link = "disk",
    pooled: _Pooled = False,
    bypass: _Bypass = False,
    completion: _Completion = "raced",
    staging: _Staging = 2,
    chunk: _Chunk = 0,
    trace: _Trace = None,
    batch: _Batch = 2,
    steps: _Steps = 40,
    rounds: Annotated[int, typer.Option(help="Times that every case is measured.", min=1, max=1000)] = 5,
    learn: _Learn = 8,
    seed: _Seed = 0,
    threads: _Threads = 1,
    as_json: _Json = False,
    quiet: _Quiet = False,
    plugin: PluginOption = None,
) -> None:
    """Measure times on other routes, have the simulator predict every case, then run them for real."""
    load_plugins(plugin)
    _one_of("--link", link, ("disk", "memory", "cuda"))
    opened, replay, fit = _prepared(file, trace, batch, steps, 0, learn, seed, threads)
    from moesim_kernels.runtime.compare import Case
    from moesim_kernels.runtime.compare import compare as judge
    from moesim_kernels.runtime.report import comparison_table

    shares = _shares(caches)
    cases = []
    for name in policies.split(","):
        eviction, _, ahead = name.partition("+")
        for share in shares:
            settings = _settings(
                opened.sizes, str(share), eviction, ahead or "none", "cached", pooled, bypass, completion, staging,
                chunk, seed,
            )  # fmt: skip
            cases.append(Case(f"{name} at {share:g}", settings))
    _, other, _ = _prepared(file, None, batch, steps, 0, 0, seed + 1, threads)
    between = [(a + b) / 2 for a, b in pairwise(shares)] or [shares[0] * 0.9]
    found = judge(
        opened, cases, replay, other, [shares[0] * 0.8, *between], rounds, link, fit,
        None if quiet or not sys.stderr.isatty() else lambda text: print(text, file=sys.stderr), seed,
    )  # fmt: skip
    _print(found.to_json(), as_json, comparison_table)


# ---- options


def _prepared(
    path: Path, trace: Path | None, batch: int, steps: int, prompt: int, learn: int, seed: int, threads: int
) -> tuple[WeightFile, Replay, Any]:
    """The model's file, the routes as steps, and what policies learn from."""
    try:
        import torch
    except ImportError:
        raise BadInput("the runtime needs torch; install moesim's extra `kernels`") from None
    from moesim.workload.synthetic import SyntheticSpec
    from moesim_kernels.runtime.replay import make_replay, read_routes, sample, synthetic_routes
    from moesim_kernels.runtime.weights import open_weights

    torch.set_num_threads(threads)
    opened = open_weights(path)
    sizes = opened.sizes
    if trace is not None:
        source = read_routes(trace, sizes)
    else:
        length = min(128, sizes.max_context)
        tokens = (learn + batch * (-(-steps // length) + 1)) * length
        spec = SyntheticSpec(popularity_zipf=0.5, repeat=0.25, pool_tokens=tokens, sequence_tokens=length)
        source = synthetic_routes(spec, sizes, seed)
    if learn >= source.num_sequences:
        raise BadInput(Problem("--learn", f"the routes have {source.num_sequences} sequences; learn from fewer"))
    return opened, make_replay(source, sizes, batch, steps, learn, prompt), sample(source, sizes, range(learn))


def _settings(
    sizes: ModelSizes,
    cache: str,
    eviction: Any,
    prefetch: Any,
    offload: str,
    pooled: bool,
    bypass: bool,
    completion: str,
    staging: int,
    chunk: int,
    seed: int,
) -> Settings:
    from moesim_kernels.runtime.run import Settings
    from moesim_kernels.runtime.sizes import ALIGN

    _one_of("--completion", completion, ("raced", "logical"))
    if chunk % ALIGN:
        raise BadInput(Problem("--chunk", f"pieces are multiples of {ALIGN} bytes, not {chunk}"))
    return Settings(
        _bytes(cache, sizes.num_keys * sizes.slot_bytes), eviction, prefetch, _policy(offload), pooled,
        "bypass" if bypass else "evict", "miss", completion, staging, chunk, seed,
    )  # fmt: skip


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BadInput(Problem(option, f"one of {', '.join(known)} is needed, not {value!r:.40}"))


def _policy(text: str) -> Any:
    """A kind, or a JSON mapping with `kind`."""
    if not text.lstrip().startswith("{"):
        return text
    from moesim.strict_json import parse_json

    return parse_json(text, "policy")


def _bytes(text: str, whole: int) -> int:
    """`0.25` of `whole`, or `64MiB`."""
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "B": 1}
    unit = next((u for u in units if text.endswith(u)), "")
    try:
        value = float(text.removesuffix(unit))
    except ValueError:
        value = -1.0
    most = float(1 << 50) if unit else 1.0
    if not 0.0 < value <= most:
        raise BadInput(
            Problem("--cache", f"a share of all experts' bytes in (0, 1] or a size such as 64MiB, not {text!r:.40}")
        )
    return int(value * units[unit]) if unit else int(value * whole)


def _shares(text: str) -> list[float]:
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0.0 < share <= 1.0 for share in shares):
        raise BadInput(Problem("--caches", f"shares in (0, 1] parted by commas are needed, not {text!r:.60}"))
    return shares


def _print(report: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], str]) -> None:
    from moesim.results import json_text

    sys.stdout.write(json_text(report) if as_json else table(report))
    remark = report.get("remark")
    if remark:
        print(f"note: {remark}", file=sys.stderr)
