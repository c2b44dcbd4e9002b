"""Steps of a deployment whose experts come and go between memories, priced by playing them.

A step is routed token by token (the same `Replay` as at token fidelity), and one or more passes run through the layers:
`moesim.offload.drive.Driver` asks the mechanisms what is there, what is fetched and who computes, `moesim.tiers`
answers in nanoseconds. One step at a time: what a step finds depends on the steps before, so none is priced that does
not run, and none is priced twice. Transfers that are under way when a step ends go on in the next one; links are not
told of a pause between steps, so nothing arrives in it (which errs on the slow side).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.cost.attention import AttentionTables
from moesim.cost.dense import DenseTables
from moesim.cost.experts import STATS
from moesim.cost.offload_times import OffloadTimes, Pass
from moesim.cost.pricer import Batch, Chunk, Key, Run
from moesim.cost.step import NoExperts, StepPricer
from moesim.offload import Counters, RebatchingPolicy, StepRoutes
from moesim.offload.drive import Driver, Event
from moesim.tiers.device import SimDevice
from moesim.tiers.links import LANES, REASONS
from moesim.tiers.records import PARTS
from moesim.workload.pool import RoutingSource
from moesim.workload.replay import Replay
from moesim.workload.scores import ScoreModel

__all__ = ["COUNTERS", "KINDS", "LookUpLog", "OffloadDetail", "OffloadedPricer", "Rank"]

COUNTERS = tuple(field.name for field in fields(Counters))
"""Names of `OffloadDetail.counters`."""


class OffloadDetail(NamedTuple):
    """One step. passes: what ran through the layers, one after the other. part_ns: by `records.PARTS`, of the rank that
    the others waited for [P]. moved: bytes that got through in the meantime, of all ranks, by lane and reason
    [X, R]. busy_ns: of each lane, of all ranks [X]. counters: what look-ups found, of all ranks, by `COUNTERS`. stats:
    as of `MoESums` [STATS, 1]. grade: the worst of the experts' products so far."""

    passes: tuple[Pass, ...]
    part_ns: IntArray
    moved: IntArray
    busy_ns: IntArray
    counters: IntArray
    stats: FloatArray
    grade: int


KINDS = ("hit", "late", "load", "stream", "cpu")
"""What a look-up found of an expert, by the number that `LookUpLog` has for it."""


class LookUpLog:
    """What a rank's look-ups found, compactly."""

    def __init__(self) -> None:
        self._parts: list[AnyArray] = []

    def take(self, events: list[Event]) -> None:
        """Keep what a driver has listed, and empty its list."""
        rows = [(event.step, event.layer, event.key, KINDS.index(event.kind)) for event in events]
        self._parts.append(np.array(rows, np.int32).reshape(-1, 4))
        events.clear()

    @property
    def table(self) -> AnyArray:
        """int32 [N, 4]: pass, layer, key and kind (`KINDS`) of each expert asked for, in order."""
        self._parts = [np.concatenate(self._parts) if self._parts else np.zeros((0, 4), np.int32)]
        return self._parts[0]


class Rank(NamedTuple):
    """One rank's mechanisms and device. local_LE: its number for each expert of each layer, `num_experts` of its own
    for those of other ranks and for none [L, E + 1]; None: it has a part of all of them."""

    driver: Driver
    device: SimDevice
    times: OffloadTimes
    local_LE: IntArray | None = None

    def routes(self, step: StepRoutes) -> StepRoutes:
        """The step as this rank sees it."""
        if self.local_LE is None:
            return step
        ids = np.minimum(step.expert_TLK, self.local_LE.shape[1] - 1)
        layers = np.arange(len(self.local_LE))[None, :, None]
        return StepRoutes(step.number, self.local_LE[layers, ids], step.sequence_T, step.weight_TLK, step.prompt)


class OffloadedPricer(StepPricer):
    """Prices the steps of one group (see the module)."""

    def __init__(
        self,
        dense: DenseTables,
        full: AttentionTables | None,
        window: AttentionTables | None,
        ranks: Sequence[Rank],
        play: Callable[[Sequence[StepRoutes]], None],
        source: RoutingSource,
        replay: Replay,
        rebatching: RebatchingPolicy,
        window_tokens: int = 0,
        scores: ScoreModel | None = None,
    ) -> None:
        """play: runs one pass on all ranks, each with its own routes. window_tokens: of attention with a window.
        scores: of all experts, where routing looks at the cache."""
        super().__init__(dense, full, window, NoExperts())
        self.ranks = list(ranks)
        self.passes = 0
        self._play, self._source, self._replay = play, source, replay
        self._rebatching = rebatching
        self._window_tokens = window_tokens
        self._scores = scores
        self.logs = [LookUpLog() for _ in self.ranks]
        """what look-ups found, rank by rank"""
        self._seen = np.zeros((len(self.ranks), len(COUNTERS)), np.int64)

    # -- what the engine asks -----------------------------------------------------------------------------------
    def decode(self, batch: Batch, steps: int) -> Run:
        """See StepPricer; always one step."""
        request, position, _ = batch.tokens()
        decoding = len(request)
        _, context, growing, context_window = batch.alone
        routes = self._routes(request, position, False)
        parts: list[IntArray] = []
        if self._rebatching.pool > 1 and decoding > 1:
            parts = self._rebatching.split(routes, self._source.num_experts, -(-decoding // self._rebatching.pool))
        if len(parts) < 2:
            now = Pass(self._padded_alone(decoding), decoding, decoding, context, context_window)
            work = [(now, routes)]
        else:
            work = [self._part(routes, position, part, not number) for number, part in enumerate(parts)]
        ns, detail = self._step(work)
        tokens = work[0][0].tokens
        key = Key(batch.tick, tokens, decoding, decoding, context, context_window, growing, 0, decoding, 0, decoding)
        return Run(np.array([ns], np.int64), key, detail)

    def mixed(self, batch: Batch, chunks: list[Chunk], paused: list[int]) -> Run:
        """See StepPricer. A step with prompts runs as one pass: a token attends to those before it in its prompt."""
        request, position, _ = batch.tokens()
        if paused:
            request, position = request[:0], position[:0]
        decoding = len(request)
        for chunk in chunks:
            request = np.concatenate([request, np.full(chunk.tokens, chunk.request)])
            position = np.concatenate([position, np.arange(chunk.start, chunk.start + chunk.tokens)])
        prefill = sum(chunk.tokens for chunk in chunks)
        sampled = decoding + sum(chunk.last for chunk in chunks)
        _, context, _, context_window = batch.alone
        full_ns = sum(self.full.prefill(c.start, c.tokens) for c in chunks) if self.full is not None else 0
        window_ns = sum(self.window.prefill(c.start, c.tokens) for c in chunks) if self.window is not None else 0
        tokens = self._padded_alone(len(request))
        now = Pass(tokens, sampled, decoding, context, context_window, full_ns, window_ns)
        ns, detail = self._step([(now, self._routes(request, position, True))])
        spent = self.dense.full_layers * full_ns + self.dense.window_layers * window_ns
        key = Key(
            batch.tick, tokens, sampled, decoding, context, context_window, 0, spent, decoding, prefill, len(request)
        )
        return Run(np.array([ns], np.int64), key, detail)

    # -- parts of it --------------------------------------------------------------------------------------------
    def _padded_alone(self, tokens: int) -> int:
        return self._pad[tokens] if tokens <= self._largest else tokens

    def _routes(self, request_N: IntArray, position_N: IntArray, prompt: bool) -> StepRoutes:
        source = self._source
        rows = self._replay.rows(request_N, position_N)
        weight = None if source.weight_TLK is None else np.asarray(source.weight_TLK[rows], np.float64)
        score = None
        if self._scores is not None:
            each = [self._scores.scores(rows, layer) for layer in range(source.num_layers)]
            score = np.stack(each, axis=1).astype(np.float64)
        self.passes += 1
        return StepRoutes(self.passes - 1, source.expert_TLK[rows], request_N, weight, prompt, score)

    def _part(self, routes: StepRoutes, position_N: IntArray, part: IntArray, first: bool) -> tuple[Pass, StepRoutes]:
        """A micro-batch of decode tokens: those of its own requests attend."""
        context_N = position_N[part] + 1
        window = int(np.minimum(context_N, self._window_tokens).sum()) if self._window_tokens else 0
        number = len(part)
        self.prepare(number)
        now = Pass(self._padded_alone(number), number, number, int(context_N.sum()), window, host=first)
        taken = StepRoutes(
            routes.number,
            routes.expert_TLK[part],
            routes.sequence_T[part],
            None if routes.weight_TLK is None else routes.weight_TLK[part],
            routes.prompt,
            None if routes.score_TLE is None else routes.score_TLE[part],
        )
        return now, taken

    def _step(self, work: list[tuple[Pass, StepRoutes]]) -> tuple[int, OffloadDetail]:
        """Run the passes of a step; ns, and what happened."""
        start_ns = self.ranks[0].device.now_ns
        part_ns = np.zeros(len(PARTS), np.int64)
        moved = np.zeros((len(LANES), len(REASONS)), np.int64)
        busy = np.zeros(len(LANES), np.int64)
        stats = np.zeros((STATS, 1))
        for now, routes in work:
            seen = [rank.routes(routes) for rank in self.ranks]
            self._tell(now, seen, stats)
            self._play(seen)
            records = [rank.device.records for rank in self.ranks]
            part_ns += np.array(min((r.part_ns[-1] for r in records), key=lambda p: p[PARTS.index("meet")]), np.int64)
            for record, rank, log in zip(records, self.ranks, self.logs, strict=True):
                moved += record.moved[-1]
                busy += record.busy[-1]
                if rank.driver.events is not None:
                    log.take(rank.driver.events)
        counted = np.array([astuple(rank.driver.counters) for rank in self.ranks], np.int64)
        found, self._seen = (counted - self._seen).sum(axis=0), counted
        stats[8] = max(stats[7, 0] - sum(int(found[COUNTERS.index(name)]) for name in _ROWS), 0)
        grade = max(rank.times.grade for rank in self.ranks)
        ns = self.ranks[0].device.now_ns - start_ns
        return ns, OffloadDetail(tuple(now for now, _ in work), part_ns, moved, busy, found, stats, grade)

    def _tell(self, now: Pass, seen: list[StepRoutes], stats: FloatArray) -> None:
        """Say to the ranks' prices what runs next, and add up what goes where (as `MoESums.stats`)."""
        own_RL = np.stack([_pairs_L(s.expert_TLK, r.driver.context.num_experts)
                           for s, r in zip(seen, self.ranks, strict=True)])  # fmt: skip
        all_L = own_RL.sum(axis=0)
        for rank, own_L in zip(self.ranks, own_RL, strict=True):
            rank.times.start(now, (all_L - own_L).tolist() if len(self.ranks) > 1 else ())
        most_L, mean_L = own_RL.max(axis=0), own_RL.mean(axis=0)
        used = mean_L > 0
        stats[0] += most_L.sum()
        stats[1] += mean_L.sum()
        stats[2] += float((most_L[used] / mean_L[used]).mean()) if used.any() else 1.0
        stats[6] += len(seen[0].expert_TLK) * own_RL.shape[1]
        stats[7] += all_L.sum()


_ROWS = ("hit_rows", "late_rows", "miss_rows", "cpu_rows")


def _pairs_L(expert_TLK: AnyArray, none: int) -> IntArray:
    """(token, choice) pairs of each layer that are some expert's, int64 [L]."""
    return np.asarray((expert_TLK < none).sum(axis=(0, 2)), np.int64)
