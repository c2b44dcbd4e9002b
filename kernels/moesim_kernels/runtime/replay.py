"""Routes as steps: sequences dealt to the lanes of a batch, one token of each lane a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moesim.errors import BadInput, Problem
from moesim.offload import RouteSample, StepRoutes
from moesim.traces.routing_npz import read
from moesim.workload.pool import RoutingSource
from moesim.workload.synthetic import SyntheticSpec, generate, popularity_weights
from moesim_kernels.runtime.sizes import ModelSizes

__all__ = ["Replay", "make_replay", "read_routes", "sample", "synthetic_routes"]


class Ended(NamedTuple):
    """Sequences whose last token stands in a step."""

    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """steps: in order. ended: of each step the sequences that end with it."""

    steps: tuple[StepRoutes, ...]
    ended: tuple[Ended, ...]


def synthetic_routes(spec: SyntheticSpec, sizes: ModelSizes, seed: int) -> RoutingSource:
    """Drawn by moesim's synthetic model (docs/routing.md)."""
    weight_LE = popularity_weights(spec, sizes.layers, sizes.experts, seed)
    return generate(spec, weight_LE, sizes.top_k, seed)


def read_routes(path: Path, sizes: ModelSizes) -> RoutingSource:
    """A recorded trace of which the model takes the first layers. Raises BadInput where it is another model's."""
    source = read(path, sizes.experts)
    problems = []
    if source.num_experts != sizes.experts:
        problems.append(f"{source.num_experts} experts, the model {sizes.experts}")
    if source.num_layers < sizes.layers:
        problems.append(f"{source.num_layers} MoE layers, the model {sizes.layers}")
    if problems:
        raise BadInput(
            Problem(str(path), f"the trace has {'; '.join(problems)}. Write a model of the trace's shape (--sizes)")
        )
    return source


def sample(source: RoutingSource, sizes: ModelSizes, sequences: range) -> RouteSample | None:
    """Those sequences as tokens to learn from; None where there are none."""
    if not len(sequences):
        return None
    rows = slice(int(source.sequence_start[sequences.start]), int(source.sequence_start[sequences.stop]))
    lengths = source.sequence_tokens_Q[sequences.start : sequences.stop]
    weight = None if source.weight_TLK is None else source.weight_TLK[rows, : sizes.layers].astype(np.float64)
    ids = np.asarray(source.expert_TLK[rows, : sizes.layers])
    return RouteSample(ids, np.repeat(np.arange(len(lengths)), lengths), weight)


def make_replay(
    source: RoutingSource, sizes: ModelSizes, batch: int, steps: int, first: int = 0, prompt: int = 0
) -> Replay:
    """`steps` steps of `batch` lanes. A lane that has ended its sequence takes the next one, beginning with number
    `first`; `prompt` first tokens of each are one step of their own. Raises BadInput where the sequences run out, or
    one is longer than the model's context."""
    feed = _Feed(source, sizes, first, prompt)
    lanes: list[_Lane] = [feed.next() for _ in range(batch)]
    out: list[StepRoutes] = []
    ended: list[Ended] = []
    while len(out) < steps:
        fresh = next((lane for lane in lanes if lane.prompt), None)
        parts = [fresh.take(fresh.prompt)] if fresh is not None else [lane.take(1) for lane in lanes]
        rows = np.concatenate(parts)
        owner = [fresh] if fresh is not None else lanes
        whose = np.concatenate([np.full(len(p), lane.sequence) for p, lane in zip(parts, owner, strict=True)])
        out.append(_step(source, sizes, len(out), rows, whose, fresh is not None))
        done = [i for i, lane in enumerate(lanes) if lane.at == lane.end]
        ended.append(Ended(tuple(lanes[i].sequence for i in done)))
        if len(out) < steps:
            for i in done:
                lanes[i] = feed.next()
    return Replay(tuple(out), tuple(ended))


@dataclass(slots=True)
class _Lane:
    sequence: int
    at: int
    end: int
    prompt: int

    def take(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        rows = np.arange(self.at, self.at + count)
        self.at, self.prompt = self.at + count, 0
        return rows


class _Feed:
    """Sequences in order."""

    def __init__(self, source: RoutingSource, sizes: ModelSizes, first: int, prompt: int) -> None:
        self._source, self._sizes, self._at, self._prompt = source, sizes, first, prompt

    def next(self) -> _Lane:
        source = self._source
        if self._at >= source.num_sequences:
            raise BadInput(
                f"the routes end: {source.num_sequences} sequences of {source.num_tokens} tokens are not enough. Run "
                "fewer steps, a smaller batch, or learn from fewer sequences"
            )
        begin, end = source.sequence_start[self._at : self._at + 2].tolist()
        if end - begin > self._sizes.max_context:
            raise BadInput(
                f"sequence {self._at} has {end - begin} tokens, the model's max_context is {self._sizes.max_context}. "
                "Write a model with a larger one"
            )
        lane = _Lane(self._at, begin, end, min(self._prompt, end - begin))
        self._at += 1
        return lane


def _step(
    source: RoutingSource,
    sizes: ModelSizes,
    number: int,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    whose: np.ndarray[tuple[int], np.dtype[np.int64]],
    prompt: bool,
) -> StepRoutes:
    ids = np.asarray(source.expert_TLK[rows, : sizes.layers]).astype(np.int64)
    weight = None if source.weight_TLK is None else source.weight_TLK[rows, : sizes.layers].astype(np.float64)
    return StepRoutes(number, ids, whose.astype(np.int64), weight, prompt)
