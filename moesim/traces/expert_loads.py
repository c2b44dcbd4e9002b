"""One recording of expert loads, whatever wrote it: find out which, and read it.

Formats: `routing` (moesim's routing traces), `counts` (per-layer counts), and those of the engines, one module each.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.errors import BadInput
from moesim.traces import routing_counts, routing_npz
from moesim.workload.loads import MAX_CELLS, ExpertLoads
from moesim.workload.pool import RoutingSource, count_steps

__all__ = ["FORMATS", "ReadOptions", "engine_formats", "from_tokens", "load_expert_loads", "recognise"]


@dataclass(frozen=True)
class ReadOptions:
    """What a reader may be told besides the path.

    tokens_per_row: how many tokens of a per-token trace make one row, at most. steps_per_row: forward passes that the
    one row of a total stands for, 0 where nobody knows. num_experts: of the model, where the file does not say.
    """

    tokens_per_row: int = 4096
    steps_per_row: int = 0
    num_experts: int | None = None


def _routing(path: Path, options: ReadOptions) -> ExpertLoads:
    return from_tokens(routing_npz.read(path, options.num_experts), options.tokens_per_row)


def _counts(path: Path, options: ReadOptions) -> ExpertLoads:
    counts = routing_counts.read(path)
    value_LE, warnings = counts.count_LE, []
    if not np.array_equal(value_LE, np.rint(value_LE)) or value_LE.sum(axis=1).max() > 2**53:
        value_LE = value_LE / value_LE.sum(axis=1).max() * 2**40
        warnings.append(f"{path.name} holds no whole numbers: they are taken as shares.")
    warnings.append(f"{path.name} is one total: nothing of it can be held out, and it shows no drift.")
    return ExpertLoads(
        np.rint(value_LE)[None].astype(np.int64),
        path.name,
        steps_per_row=options.steps_per_row,
        layer_index=counts.layer_index if counts.numbered else None,
        warnings=tuple(warnings),
    )


def from_tokens(source: RoutingSource, tokens_per_row: int, model_layers: int = 0) -> ExpertLoads:
    """A per-token trace as rows of consecutive tokens: as few equal ones as have at most `tokens_per_row`."""
    if tokens_per_row < 1:
        raise BadInput(f"a row needs at least one token, got tokens_per_row {tokens_per_row}", source.source)
    rows = -(-source.num_tokens // tokens_per_row)
    cells = rows * source.num_layers * source.num_experts
    if cells > MAX_CELLS:
        raise BadInput(
            f"{rows} rows of {source.num_layers} layers and {source.num_experts} experts are over {MAX_CELLS} counts."
            f" Give more than {tokens_per_row} tokens a row",
            source.source,
        )
    edge_S = np.linspace(0, source.num_tokens, rows + 1).astype(np.int64)
    count_SLE = count_steps(source, np.arange(source.num_tokens), edge_S).astype(np.int64)
    return ExpertLoads(
        count_SLE,
        source.source,
        top_k=source.top_k,
        layer_index=source.layer_index,
        model_layers=model_layers,
        tokens=source,
        row_tokens_S=np.diff(edge_S),
        warnings=source.warnings,
    )


FORMATS: dict[str, Callable[[Path, ReadOptions], ExpertLoads]] = {"routing": _routing, "counts": _counts}
"""Formats read here. The engines' are the modules of this folder with `recognise(path)` and `read(path, options)`."""
_READER = re.compile(rb"^def recognise\b", re.MULTILINE)


@functools.cache
def engine_formats() -> tuple[str, ...]:
    """Names of the files of this folder that define `recognise`, but this one."""
    files = Path(__file__).parent.glob("[a-z]*.py")
    return tuple(sorted(f.stem for f in files if f.stem != Path(__file__).stem and _READER.search(f.read_bytes())))


def recognise(path: Path) -> str:
    """The format of the file or folder at `path`. Raises BadInput, with the known ones, for none of them."""
    if not path.exists():
        raise BadInput("no such recording", str(path))
    for name in engine_formats():
        if importlib.import_module(f"moesim.traces.{name}").recognise(path):
            return name
    if path.suffix.lower() == ".npz" or (path / "meta.json").is_file():
        return "routing"
    if path.suffix.lower() in (".csv", ".json"):
        return "counts"
    known = ", ".join((*FORMATS, *engine_formats()))
    raise BadInput(f"no recording of expert loads that is known: {known}", str(path))


def load_expert_loads(
    path: Path,
    fmt: str | None = None,
    *,
    tokens_per_row: int = 4096,
    steps_per_row: int = 0,
    num_experts: int | None = None,
) -> ExpertLoads:
    """The recording at `path`, in format `fmt` (None: the one it looks like). See `ReadOptions` for the rest.

    Raises BadInput for whatever cannot be read or is not what it says.
    """
    options = ReadOptions(tokens_per_row, steps_per_row, num_experts)
    name = recognise(path) if fmt is None else fmt
    if name in FORMATS:
        return FORMATS[name](path, options)
    if name not in engine_formats():
        raise BadInput(f"unknown format {name!r}. Known: {', '.join((*FORMATS, *engine_formats()))}", str(path))
    loads: ExpertLoads = importlib.import_module(f"moesim.traces.{name}").read(path, options)
    return loads
