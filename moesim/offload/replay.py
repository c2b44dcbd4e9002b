"""Logical replay: what a cache finds of recorded routes, without a clock, a device or a prefetch.

Legend as in `moesim.offload`. A *call* is one look-up: its keys are judged against what the cache holds when it begins.
How routes are cut into calls is the granularity, and it decides hit rates:

- `each`: one key a call, in the order of tokens, layers and choices. The textbook's request string; the one for which
  Belady's optimality is a theorem.
- `layer`: one call a token and layer.
- `token`: one call a token, all its L * K keys (moe-lrc's convention).
- `batch`: one call a step and layer, over the union of what the step's tokens ask for, as `drive.Driver` does it.

Keys of one call ascend and stand in it once. Steps of one token make `batch` and `layer` the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Literal, NamedTuple

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.errors import BadInput
from moesim.offload import (
    CacheSemantics,
    Counters,
    EvictionPolicy,
    MissCosts,
    OffloadContext,
    RouteSample,
    StepRoutes,
)
from moesim.offload.cache import ExpertCache
from moesim.offload.drive import Event
from moesim.offload.future import NEVER, Future

__all__ = [
    "Call",
    "Granularity",
    "Replayed",
    "calls_of",
    "chunks",
    "context_of",
    "future_of",
    "most_hits",
    "replay",
    "side_by_side",
]

Granularity = Literal["each", "layer", "token", "batch"]

_NO_COSTS = MissCosts(1.0, lambda rows: 0.0, lambda rows: 0.0, 0.0, 0.0)
"""For policies that weigh costs; eviction does not."""


class Call(NamedTuple):
    """One look-up. keys: ascending, each once. rows: choices of each. layer: of its keys; -1: of several layers."""

    layer: int
    keys: list[int]
    rows: list[int]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found. events: where asked for, in the order of look-ups. cold: the semantics' word on first
    touches, which `hit_rate` follows."""

    counters: Counters
    events: list[Event] | None
    cache: ExpertCache
    cold: Literal["miss", "hit"]

    @property
    def hits(self) -> int:
        """Experts found, by the semantics; first touches into free room are hits where it says so."""
        return self.counters.hits + (self.counters.cold if self.cold == "hit" else 0)

    @property
    def hit_rate(self) -> float:
        """Of all experts asked for, once a call; 0 where nothing was."""
        return self.hits / self.counters.look_ups if self.counters.look_ups else 0.0


# ---- steps from recorded tokens


def chunks(expert_TLK: AnyArray, sequence_T: IntArray | None = None, tokens: int = 1) -> list[StepRoutes]:
    """Steps of `tokens` consecutive rows (the last one may be shorter). sequence_T: None: all are one sequence's."""
    if tokens < 1:
        raise BadInput(f"a step has at least one token, got {tokens}")
    sequence_T = np.zeros(len(expert_TLK), np.int64) if sequence_T is None else sequence_T
    starts = range(0, len(expert_TLK), tokens)
    return [StepRoutes(n, expert_TLK[s : s + tokens], sequence_T[s : s + tokens]) for n, s in enumerate(starts)]


def side_by_side(expert_TLK: AnyArray, sequence_T: IntArray, batch: int) -> list[StepRoutes]:
    """Steps of up to `batch` sequences, each giving its next row, as a decoding batch does; where a sequence ends the
    next one takes its place. Rows of a sequence are consecutive."""
    if batch < 1:
        raise BadInput(f"a step has at least one token, got {batch}")
    starts = np.flatnonzero(np.r_[True, sequence_T[1:] != sequence_T[:-1]]) if len(sequence_T) else np.zeros(0, int)
    waiting = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(sequence_T)], strict=True)][::-1]
    running: list[list[int]] = []
    steps: list[StepRoutes] = []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop()[::-1])
        rows = [sequence.pop() for sequence in running]
        steps.append(StepRoutes(len(steps), expert_TLK[rows], sequence_T[rows]))
        running = [sequence for sequence in running if sequence]
    return steps


# ---- calls of a step


def calls_of(step: StepRoutes, num_experts: int, granularity: Granularity = "batch") -> Iterator[Call]:
    """The look-ups of one step, in order. `token` and `layer` go through the tokens one after the other. Ids that are
    no expert are left out; a call may be empty."""
    layers = step.expert_TLK.shape[1]
    if granularity == "batch" and len(step.expert_TLK) == 1:
        granularity = "layer"  # the same, and quicker
    if granularity == "batch":
        for layer in range(layers):
            ids = step.expert_TLK[:, layer].ravel()
            count_E = np.bincount(ids[ids < num_experts], minlength=num_experts)
            experts = np.flatnonzero(count_E)
            yield Call(layer, (experts + layer * num_experts).tolist(), count_E[experts].tolist())
        return
    for expert_LK in step.expert_TLK.tolist():
        row = [[layer * num_experts + e for e in ids if e < num_experts] for layer, ids in enumerate(expert_LK)]
        if granularity == "layer":
            for layer, keys in enumerate(row):
                yield _counted(layer, keys)
        elif granularity == "token":
            yield _counted(-1, [key for keys in row for key in keys])
        else:
            for layer, keys in enumerate(row):
                yield from (Call(layer, [key], [1]) for key in keys)


def _counted(layer: int, keys: list[int]) -> Call:
    once = sorted(set(keys))
    return Call(layer, once, [1] * len(once) if len(once) == len(keys) else [keys.count(key) for key in once])


def future_of(steps: Sequence[StepRoutes], num_experts: int, granularity: Granularity = "batch") -> Future:
    """The look-ups of `steps`. With `batch`, those of a `drive.Driver` that neither prunes nor merges."""
    layers = steps[0].expert_TLK.shape[1] if steps else 0
    calls = (call.keys for step in steps for call in calls_of(step, num_experts, granularity))
    return Future(calls, layers * num_experts)


# ---- the replay


def context_of(
    steps: Sequence[StepRoutes],
    num_experts: int,
    capacity: int,
    *,
    semantics: CacheSemantics | None = None,
    size_LE: IntArray | None = None,
    fit: RouteSample | None = None,
    seed: int = 0,
    future: Future | None = None,
) -> OffloadContext:
    """What eviction policies are told in a replay. capacity: of all groups together, in the unit of size_LE; in
    experts, where that is None. Costs are not known."""
    if not steps:
        raise BadInput("a replay needs at least one step")
    _, layers, top_k = steps[0].expert_TLK.shape
    return OffloadContext(
        num_layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        size_LE=np.ones((layers, num_experts), np.int64) if size_LE is None else size_LE,
        capacity_bytes=capacity,
        staging=0,
        popularity_LE=np.ones((layers, num_experts)) if fit is None else fit.count_LE(num_experts),
        semantics=semantics or CacheSemantics(),
        costs=_NO_COSTS,
        seed=seed,
        fit=fit,
        upcoming=future,
    )


def replay(
    steps: Sequence[StepRoutes],
    policy: EvictionPolicy,
    num_experts: int,
    capacity: int,
    *,
    granularity: Granularity = "batch",
    semantics: CacheSemantics | None = None,
    size_LE: IntArray | None = None,
    fit: RouteSample | None = None,
    initial: Sequence[int] = (),
    seed: int = 0,
    keep_events: bool = False,
    future: Future | None = None,
) -> Replayed:
    """Look up all of `steps` in a cache that starts with the keys `initial`, in the order in which they came.

    capacity: of all groups together, in the unit of size_LE; in experts, where that is None. Where slots are not
    pooled, each layer has an equal part, rounded down. fit: what a policy may learn from. future: of the same steps and
    granularity, for use again; built where a policy asks for it. Raises BadInput for a replay without steps.
    """
    context = context_of(
        steps, num_experts, capacity, semantics=semantics, size_LE=size_LE, fit=fit, seed=seed, future=future
    )
    if policy.knows_future and future is None:
        context = replace(context, upcoming=future_of(steps, num_experts, granularity))
    words = context.semantics
    groups = 1 if words.pooled else context.num_layers
    capacity_G = np.full(groups, capacity // groups, np.int64)
    cache = ExpertCache(context.size_K, context.group_K, capacity_G, policy.start(context), words.miss == "bypass")
    cache.place(initial)
    counters = Counters()
    events: list[Event] | None = [] if keep_events else None
    for step in steps:
        cache.eviction.begin(step)
        for call in calls_of(step, num_experts, granularity):
            _look_up(cache, call, counters, events, step.number, num_experts)
    return Replayed(counters, events, cache, words.cold)


def _look_up(
    cache: ExpertCache, call: Call, counters: Counters, events: list[Event] | None, step: int, num_experts: int
) -> None:
    found = cache.look_up(call.keys)
    missed = [(one, rows) for one, rows in zip(found, call.rows, strict=True) if one.kind != "hit"]
    miss_rows = sum(rows for _, rows in missed)
    counters.calls += 1
    counters.hits += len(found) - len(missed)
    counters.hit_rows += sum(call.rows) - miss_rows
    counters.miss_rows += miss_rows
    for one, _ in missed:
        counters.cold += one.cold
        counters.evictions += len(one.evicted)
        if one.kind == "load":
            counters.loads += 1
        else:
            counters.streams += 1
    if events is not None:
        events.extend(Event(step, one.key // num_experts, one.key, one.kind) for one in found)
    cache.release()


# ---- the bound


def most_hits(
    steps: Sequence[StepRoutes],
    num_experts: int,
    capacity: int,
    *,
    granularity: Granularity = "batch",
    pooled: bool = False,
    future: Future | None = None,
) -> int:
    """The most hits that any cache can have that starts empty and holds `capacity` experts of one size between calls
    (of all groups together; where slots are not pooled each layer has an equal part), whatever a miss does.

    To find a key at its next use is to hold it from one use to the next, so the bound is the most intervals of which no
    more than the capacity overlap: wherever more do, those that end last are dropped. A single-key call makes it MIN
    with bypass (`belady` under `semantics.miss: bypass`); where a call asks for several, that policy may fall short of
    it, since what a call has found cannot give way before the call is over.
    """
    layers = steps[0].expert_TLK.shape[1] if steps else 0
    future = future or future_of(steps, num_experts, granularity)
    groups = 1 if pooled else layers
    slots = capacity // max(groups, 1)
    held: list[dict[int, int]] = [{} for _ in range(groups)]
    """by group: keys and their next uses"""
    latest: list[list[tuple[int, int]]] = [[] for _ in range(groups)]
    hits = number = 0
    for step in steps:
        for call in calls_of(step, num_experts, granularity):
            for key in call.keys:
                group = 0 if pooled else key // num_experts
                hits += held[group].pop(key, None) is not None
                if (after := future.next_call(key, number)) != NEVER:
                    held[group][key] = after
                    heappush(latest[group], (-after, key))
            for group in {0 if pooled else key // num_experts for key in call.keys}:
                while len(held[group]) > slots:
                    after, key = heappop(latest[group])
                    if held[group].get(key) == -after:
                        del held[group][key]
            number += 1
    return hits
