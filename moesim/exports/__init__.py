"""Placements as the files that engines load, one module an engine, and back.

A module has `FILE` (a name), `write(target) -> str`, `read(text, ...)`, `command(target, path)` (what to start the
engine with) and `notes(target)`. The rules that an engine holds a file to stand in `checks/`, written from the engine's
source and not from the writer: `check(text, ...)` returns what is wrong. `moesim.exports.emit` writes and checks.

Legend as in `moesim.placement`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from moesim.errors import BadInput, Problem
from moesim.placement import Placement
from moesim.scenario.yamlio import read_text

__all__ = ["ENGINES", "Emitted", "Target", "emit", "full_slots", "load_map"]

_WRITER = re.compile(rb"^FILE = ", re.MULTILINE)


def _engines() -> tuple[str, ...]:
    """Names of the files of this folder that have a `FILE`, with - for _."""
    files = Path(__file__).parent.glob("[a-z]*.py")
    return tuple(sorted(f.stem.replace("_", "-") for f in files if _WRITER.search(f.read_bytes())))


ENGINES = _engines()


@dataclass(frozen=True, eq=False)
class Target:
    """What an engine is told: the placement of some layers, and where they stand in the model.

    layer_index: the number of each placed layer in the model. model_layers: layers of the model, dense ones too; 0
    where unknown. model: what to call it on a command line. interval, window: steps between rebalances and steps whose
    counts they use, of engines that make maps themselves; None: the engine's own.
    """

    placement: Placement
    layer_index: tuple[int, ...]
    model_layers: int = 0
    model: str = "MODEL"
    interval: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if len(self.layer_index) != self.placement.num_layers:
            raise BadInput(f"{len(self.layer_index)} layer numbers for {self.placement.num_layers} placed layers")
        if self.model_layers and max(self.layer_index, default=0) >= self.model_layers:
            raise BadInput(f"layer {max(self.layer_index)} of a model of {self.model_layers} layers (from 0 on)")

    @cached_property
    def redundant(self) -> int:
        """Slots beyond one an expert."""
        return self.placement.num_slots - self.placement.num_experts


@dataclass(frozen=True)
class Emitted:
    """One file for one engine: its text, and how to use it."""

    engine: str
    file: str
    text: str
    command: str
    notes: tuple[str, ...]


def full_slots(target: Target, engine: str) -> None:
    """Raises BadInput where a slot is empty: no engine's file can say so."""
    empty = int((~target.placement.held_LS).sum(axis=1).max(initial=0))
    if empty:
        ranks, experts = target.placement.num_ranks, target.placement.num_experts
        low = max(target.redundant - ranks, -experts % ranks)
        raise BadInput(
            f"{engine} needs an expert in every slot, but up to {empty} slots of a layer are empty: experts and"
            f" redundant ones must be a multiple of {ranks} ranks. Use num_redundant_experts = {low} or"
            f" {target.redundant}",
            f"--emit {engine}",
        )


def load_map(
    path: Path, num_experts: int, num_ranks: int, layer_index: Sequence[int], moe_layers: Sequence[int]
) -> Placement:
    """The placement of the layers `layer_index` in a file of SGLang, TensorRT-LLM or vllm-ascend.

    moe_layers: all MoE layers of the model, by which vllm-ascend's rows are counted. Raises BadInput for what the
    engine would refuse, and where a layer is not in the file.
    """
    text, where = read_text(path), str(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        placement, numbers = _module("trtllm").read(text, num_experts, num_ranks, where)
    elif '"layer_list"' in text:
        placement, numbers = _module("vllm-ascend").read(text, num_experts, where), tuple(moe_layers)
    else:
        placement = _module("sglang").read(text, num_experts, num_ranks, None, where)
        numbers = tuple(range(placement.num_layers))
    missing = sorted(set(layer_index) - set(numbers[: placement.num_layers]))
    if missing or placement.num_ranks != num_ranks:
        problem = f"layer {missing[0]} is not in it" if missing else f"it is for {placement.num_ranks} ranks"
        raise BadInput(
            f"{problem}; the recording has layers {layer_index[0]} to {layer_index[-1]}, --ep {num_ranks}", where
        )
    rows = [numbers.index(layer) for layer in layer_index]
    return Placement(placement.slot_to_expert_LS[rows], num_experts, num_ranks)


def _module(engine: str) -> ModuleType:
    return importlib.import_module(f"moesim.exports.{engine.replace('-', '_')}")


def emit(target: Target, engines: Sequence[str], folder: str = ".") -> tuple[Emitted, ...]:
    """The engines' files, each accepted by its checker. folder: where they will lie, for the command lines.

    Raises BadInput, with every reason, where an engine cannot express the placement or its checker refuses the file.
    """
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown or not engines:
        raise BadInput(f"engines are {', '.join(ENGINES)}, got {', '.join(unknown) or 'none'}", "--emit")
    out: list[Emitted] = []
    problems: list[Problem] = []
    for engine in dict.fromkeys(engines):
        module = _module(engine)
        try:
            text = module.write(target)
        except BadInput as error:
            problems += error.problems
            continue
        problems += [Problem(f"--emit {engine}", problem) for problem in module.check_target(text, target)]
        path = f"{folder}/{module.FILE}"
        out.append(Emitted(engine, module.FILE, text, module.command(target, path), module.notes(target)))
    if problems:
        raise BadInput(problems)
    return tuple(out)
