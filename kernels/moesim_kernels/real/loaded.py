"""A step's own share on its rank's device, laid out before any clock runs; and how a step's time is kept.

Suffixes: N tokens of the step (all ranks), T own tokens, L MoE layers, K choices a token, A tokens that arrive at this
rank's experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.errors import BadInput, Infeasible
from moesim_kernels.ops.block import Place
from moesim_kernels.real.cache import KvCache
from moesim_kernels.real.work import StepWork

__all__ = ["Arriving", "Group", "Loaded", "Sections", "StepTimes", "groups_of", "lay_out", "no_room", "own_tokens"]


@contextmanager
def no_room(what: str) -> Iterator[None]:
    """What torch says when the device's memory is used up, as Infeasible."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if not (full or isinstance(error, MemoryError)):
            raise
        told = (str(error).splitlines() or ["out of memory"])[0][:200]
        raise Infeasible([f"{what}: no memory left on this device: {told}"]) from None


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step in ns. wall_ns: by the wall; on CUDA between events. cpu_ns: CPU time of the thread, 0 on CUDA. part_ns:
    by part (names of `work.PART_OF`), in CPU time where one CPU thread computes, in wall time with more, on CUDA each
    part by itself between events. part_wall_ns: by the wall."""

    wall_ns: int
    cpu_ns: int
    part_ns: dict[str, int]
    part_wall_ns: dict[str, int]


class Sections:
    """The parts of a step as they pass: `lap(part)` adds what went by since the last lap. Off unless `begin` was called
    (a captured graph has no laps)."""

    def __init__(self, thread: bool) -> None:
        self._thread, self._on = thread, False
        self._cpu: dict[str, int] = {}
        self._wall: dict[str, int] = {}
        self._at = self._start = (0, 0)

    def begin(self) -> None:
        """The clock runs."""
        self._cpu, self._wall, self._on = {}, {}, True
        self._at = self._start = (time.thread_time_ns(), time.perf_counter_ns())

    def lap(self, part: str) -> None:
        """What went by belongs to `part`."""
        if not self._on:
            return
        now = (time.thread_time_ns(), time.perf_counter_ns())
        self._cpu[part] = self._cpu.get(part, 0) + now[0] - self._at[0]
        self._wall[part] = self._wall.get(part, 0) + now[1] - self._at[1]
        self._at = now

    def end(self) -> StepTimes:
        """All since `begin`."""
        self._on = False
        cpu, wall = self._at[0] - self._start[0], self._at[1] - self._start[1]
        return StepTimes(wall, cpu, dict(self._cpu if self._thread else self._wall), dict(self._wall))


@dataclass(frozen=True, slots=True)
class Group:
    """Own tokens `first` .. `first + tokens - 1` that attend in one call: sequences that decode, in consecutive rows of
    the cache from `row` on, or (chunk) consecutive tokens of one sequence whose last sees `context` keys. contexts:
    keys that each sequence sees, at most `context`; () where all see as many."""

    first: int
    tokens: int
    row: int
    context: int
    chunk: bool = False
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Arriving:
    """What reaches this rank's slots in one layer: slot_AK int64, `rows` choices of it are served here."""

    slot_AK: Any
    rows: int


@dataclass(slots=True)
class Loaded:
    """A step ready to run. own_N: its own tokens in the order they are computed, as places in the StepWork. layers: the
    cache's tensors as they were arranged. sampled_S: own tokens that get logits; request_S theirs. arriving: one a MoE
    layer. foreign: what stands in for a group's states, results and gates where a rank plays alone. chosen_S: greedy
    choices of the step, once it has run. remark: about how it is timed."""

    work: StepWork
    own_N: IntArray
    token_T: Any
    place: Place
    groups: tuple[Group, ...]
    layers: list[Any]
    sampled_S: Any
    request_S: tuple[int, ...]
    position_S: tuple[int, ...]
    arriving: tuple[Arriving, ...]
    foreign: tuple[Any, Any, Any] = (None, None, None)
    chosen_S: list[int] = field(default_factory=list)
    remark: str = ""
    graphs: Any = None
    masks: dict[Any, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Own tokens."""
        return len(self.own_N)


def own_tokens(work: StepWork, rank: int, cache: KvCache, by_row: bool) -> tuple[IntArray, list[int]]:
    """(own_N, row_T): a rank's tokens in the order they are computed, and their rows of the cache, which new requests
    are given here by context: those that decode by row, or by context and row, then the chunks as they stand."""
    mine = np.flatnonzero(work.rank_N == rank)
    decode, chunks = mine[mine < work.decode], mine[mine >= work.decode]
    decode = decode[np.argsort(work.position_N[decode], kind="stable")]
    own = np.concatenate([decode, chunks])
    row = np.array(cache.rows(work.request_N[own].tolist()), np.int64)
    decode_row = row[: len(decode)]
    order = np.argsort(decode_row) if by_row else np.lexsort((decode_row, work.position_N[decode]))
    own[: len(decode)], row[: len(decode)] = decode[order], decode_row[order]
    return own, row.tolist()


def groups_of(work: StepWork, own_N: IntArray, row_T: Sequence[int], spared_tokens: float = 0.0) -> tuple[Group, ...]:
    """Own tokens by the calls of the attention kernel. spared_tokens: keys that may be read in vain, under a mask, to
    spare a call; 0: sequences of one context alone share one."""
    found: list[Group] = []
    decode = int((own_N < work.decode).sum())
    position, request = work.position_N[own_N].tolist(), work.request_N[own_N].tolist()
    context = [p + 1 for p in position[:decode]]
    for at, stop in _calls(context, row_T, spared_tokens):
        mixed = tuple(context[at:stop]) if min(context[at:stop]) < max(context[at:stop]) else ()
        found.append(Group(at, stop - at, row_T[at], max(context[at:stop]), contexts=mixed))
    at = decode
    for i in range(decode + 1, len(own_N) + 1):
        if i == len(own_N) or request[i] != request[at] or position[i] != position[i - 1] + 1:
            found.append(Group(at, i - at, row_T[at], position[i - 1] + 1, True))
            at = i
    return tuple(found)


def _calls(context: Sequence[int], row: Sequence[int], spared_tokens: float) -> list[tuple[int, int]]:
    """Where each call begins and ends: runs of consecutive rows, cut so that calls and keys read cost least (dynamic
    programming over the last call's beginning)."""
    best, cut = [0.0], [0]
    for stop in range(1, len(context) + 1):
        costs, most = dict[int, float](), 0
        for at in range(stop - 1, -1, -1):
            if at + 1 < stop and (row[at + 1] != row[at] + 1 or (not spared_tokens and context[at] != context[at + 1])):
                break
            most = max(most, context[at])
            costs[at] = best[at] + max(spared_tokens, 1.0) + (stop - at) * most
        cut.append(min(costs, key=lambda at: costs[at]))
        best.append(costs[cut[-1]])
    found, stop = [], len(context)
    while stop:
        found.append((cut[stop], stop))
        stop = cut[stop]
    return found[::-1]


def lay_out(work: StepWork, own_N: IntArray, first: int, slots: int, top_k: int, alone: bool) -> list[AnyArray]:
    """slot_AK of every MoE layer: of own tokens, or (alone) of all tokens that have a choice among slots first ..
    first + slots - 1. Raises BadInput where a token has more choices than the model's router has gates."""
    if work.slot_NLK.shape[2] > top_k:
        raise BadInput(
            f"this routing gives a token up to {work.slot_NLK.shape[2]} experts, and the model's router has {top_k} "
            "gates; execute a router of the model's top_k"
        )
    missing = top_k - work.slot_NLK.shape[2]
    slot_NLK = np.pad(work.slot_NLK, ((0, 0), (0, 0), (0, missing)), constant_values=work.num_slots)
    if not alone:
        return [np.ascontiguousarray(slot_NLK[own_N, layer]) for layer in range(slot_NLK.shape[1])]
    out = []
    for layer in range(slot_NLK.shape[1]):
        slot_NK = slot_NLK[:, layer]
        here = ((slot_NK >= first) & (slot_NK < first + slots)).any(axis=1)
        out.append(np.ascontiguousarray(slot_NK[here]))
    return out
