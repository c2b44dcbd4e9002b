"""Token fidelity: every token of every step takes its own row of the trace; steps are priced from exact counts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.cost.experts import Drawn, ExpertPrices, LayerPrices, MoESums, Ports, padded_slots
from moesim.cost.pricer import Batch, Chunk
from moesim.cost.routed_bank import drawn_of, room_of, stack_drawn
from moesim.cost.split import HalfLayers
from moesim.cost.touch import count_slots, touch
from moesim.cost.weights import Guests
from moesim.dispatch import DispatchPolicy
from moesim.dispatch.plan import Plan, Served, couples, serve_batches
from moesim.layout import Layout
from moesim.placement import Placement
from moesim.routing.batch import BatchRouter
from moesim.routing.capacity import Phase
from moesim.workload.pool import RoutingSource, count_steps
from moesim.workload.replay import Replay

__all__ = ["TokenExperts"]

_KEPT = 256
_IDS = 1 << 21
"""expert ids priced at once in a run of decode steps"""


class _PricedSteps(NamedTuple):
    """Steps, layer by layer and summed."""

    layers: LayerPrices
    sums: MoESums


class TokenExperts:
    """`moesim.cost.step.MoECost` at token fidelity."""

    def __init__(
        self,
        source: RoutingSource,
        replay: Replay,
        placement: Placement,
        dispatch: DispatchPolicy,
        layout: Layout,
        prices: ExpertPrices,
        seed: int,
        router: BatchRouter | None = None,
    ) -> None:
        """`router`: routes every step's tokens together; None: the source's ids stand."""
        self._source = source
        self._replay = replay
        self._placement = placement
        self._dispatch = dispatch
        self._layout = layout
        self._prices = prices
        self._seed = seed
        self._router = router
        self._node_G = np.arange(layout.ranks) // layout.gpus_per_node
        self._plain = placement.max_replicas == 1 and not layout.exchanges and router is None and not couples(dispatch)
        self.kept: dict[int, LayerPrices] = {}
        """layer by layer, the first runs' prices by the tick they start at (for a timeline)"""
        self.last_counts_SLE: IntArray | None = None
        """tokens per expert of the steps priced last, kept where `watched`"""
        self.watched = False
        self._slot_total_LS = np.zeros((placement.num_layers, placement.num_slots), np.int64)
        self.guests = Guests(placement)

    def slot_load_LS(self) -> FloatArray:
        """Tokens per slot [L, S] of every step that was priced (steps that an arrival cut off included)."""
        return self._slot_total_LS.astype(np.float64)

    def decode_ns(self, batch: Batch, steps: int) -> tuple[IntArray, MoESums]:
        """See MoECost."""
        request, position, rank = batch.tokens()
        sums = self._decode(request, position, rank, steps, batch.tick).sums
        return sums.total, sums

    def _decode(self, request: IntArray, position: IntArray, rank: IntArray, steps: int, tick: int) -> _PricedSteps:
        tokens = len(request)
        steps = min(steps, max(1, _IDS // (tokens * self._source.num_layers * self._source.top_k)))
        ahead = np.arange(steps, dtype=np.int64)[:, None]
        request_N, position_N = np.tile(request, steps), (position + ahead).ravel()
        offsets = np.arange(steps + 1, dtype=np.int64) * tokens
        busiest = int(np.bincount(rank).max())
        rank_N, busiest_S = np.tile(rank, steps), np.full(steps, busiest)
        return self._price(request_N, position_N, offsets, rank_N, busiest_S, tick, "decode")

    def mixed_ns(self, batch: Batch, chunks: list[Chunk], paused: list[int], busiest: int) -> tuple[int, MoESums]:
        """See MoECost."""
        request, position, rank = self._mixed(batch, chunks, paused)
        offsets = np.array([0, len(request)])
        prompts = sum(chunk.tokens for chunk in chunks)
        phase: Phase = "prefill" if 2 * prompts > len(request) else "decode"  # as the bank does
        sums = self._price(request, position, offsets, rank, np.array([busiest]), batch.tick, phase).sums
        return int(sums.total[0]), sums

    def _mixed(self, batch: Batch, chunks: list[Chunk], paused: list[int]) -> tuple[IntArray, IntArray, IntArray]:
        """Request, position and rank of every token of a step."""
        request, position, rank = batch.tokens()
        if paused:
            keep = ~np.isin(rank, paused)
            request, position, rank = request[keep], position[keep], rank[keep]
        for chunk in chunks:
            request = np.concatenate([request, np.full(chunk.tokens, chunk.request)])
            position = np.concatenate([position, np.arange(chunk.start, chunk.start + chunk.tokens)])
            rank = np.concatenate([rank, np.full(chunk.tokens, chunk.rank)])
        return request, position, rank

    def halves(
        self, batch: Batch, chunks: list[Chunk], paused: list[int], tokens_2D: IntArray, phase: Phase, steps: int
    ) -> HalfLayers:
        """See MoECost. The first of a rank's tokens, in their order, are its first half."""
        request, position, rank = self._mixed(batch, chunks, paused)
        order = np.argsort(rank, kind="stable")
        start_D = np.cumsum(tokens_2D.sum(axis=0)) - tokens_2D.sum(axis=0)
        turn = np.arange(len(rank)) - start_D[rank[order]]
        first = np.zeros(len(rank), bool)
        first[order] = turn < tokens_2D[0][rank[order]]
        found: list[_PricedSteps] = []
        counts: list[IntArray] = []
        for half in (first, ~first):
            part = request[half], position[half], rank[half]
            if chunks:
                offsets, busiest = np.array([0, len(part[0])]), np.array([int(np.bincount(part[2]).max())])
                priced = self._price(part[0], part[1], offsets, part[2], busiest, batch.tick, phase)
            else:
                priced = self._decode(*part, steps, batch.tick)
                steps = len(priced.layers.experts)
            found.append(priced)
            if self.last_counts_SLE is not None:
                counts.append(self.last_counts_SLE[:steps])
        if self.watched:
            self.last_counts_SLE = counts[0][:steps] + counts[1]
        dispatch, experts, combine = (
            np.stack([getattr(x.layers, name)[:steps].T for x in found], axis=1)
            for name in ("dispatch", "experts", "combine")
        )
        entry_2S = np.tile(np.arange(steps), (2, 1))
        return HalfLayers(dispatch, experts, combine, (found[0].sums, found[1].sums), entry_2S)

    def _price(
        self, request_N: IntArray, position_N: IntArray, offsets: IntArray, rank_N: IntArray, busiest_S: IntArray,
        tick: int, phase: Phase,
    ) -> _PricedSteps:  # fmt: skip
        rows = self._replay.rows(request_N, position_N)
        tokens_S = np.diff(offsets) * float(self._source.num_layers)
        ports = pad_LS = drawn = plan = None
        if self._plain:
            count_SLE = count_steps(self._source, rows, offsets)
            slot_SLS: AnyArray = self._placement.of_slots(count_SLE)
        else:
            # a token's own number keys its draws, so that they do not depend on the steps priced with it
            token_N = request_N.astype(np.int64) * (1 << 32) + position_N
            ids = self._source.expert_TLK[rows]
            if self._router is not None:
                ids, drawn, pad_LS = self._routed(rows, request_N, position_N, offsets, rank_N, tick, phase)
            slot_SLS, ports, plan = self._slots(ids, token_N, offsets, rank_N)
        kept_S = self._tally(slot_SLS, plan)
        busy_S = busiest_S / np.diff(offsets) / self._layout.tp
        computed, ports = self._prices.padded(slot_SLS, ports, pad_LS, busy_S, plan)
        moves = self._prices.moves(plan)
        self.guests.sent(moves)
        priced = self._prices.price(computed, busiest_S, ports, moves=moves)
        if len(self.kept) < _KEPT:
            self.kept[tick] = priced.first()
        if drawn is None:
            drawn = Drawn.plain(tokens_S, kept_S)
        return _PricedSteps(priced, priced.sums(ports, drawn))

    def slots_of(
        self, request_N: IntArray, position_N: IntArray, rank_N: IntArray, tick: int, phase: Phase
    ) -> AnyArray:
        """The slot that serves each choice of one step's tokens, as `decode_ns` and `mixed_ns` price them: integers
        [N, L, K], where the number of all slots stands for nothing (refused, or a null expert)."""
        rows = self._replay.rows(request_N, position_N)
        token_N = request_N.astype(np.int64) * (1 << 32) + position_N
        ids, offsets = self._source.expert_TLK[rows], np.array([0, len(rows)])
        if self._router is not None:
            ids = self._routed(rows, request_N, position_N, offsets, rank_N, tick, phase)[0]
        return self._served(ids, token_N, offsets, rank_N)[0].slot_TLK

    def _served(self, ids: AnyArray, token_N: IntArray, offsets: IntArray, rank_N: IntArray) -> tuple[Served, IntArray]:
        """What dispatch makes of ids [N, L, K], and the rank that each token is sent from [N]."""
        layout = self._layout
        # a data-parallel rank's tokens are dealt out to its tensor-parallel ranks for the exchange
        turn_N = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
        source = rank_N * layout.tp + turn_N % layout.tp
        part = source if layout.exchanges else source // layout.expert_tp
        return serve_batches(self._dispatch, ids, part, offsets[:-1], self._placement, self._seed, token_N), source

    def _tally(self, slot_SLS: AnyArray, plan: Plan | None) -> FloatArray:
        """Keep what slots and experts served; returns the routed experts' pairs of each step [S]."""
        if plan is None or not plan.guests:
            self._slot_total_LS += slot_SLS.sum(axis=0)
            if self.watched:
                self.last_counts_SLE = _per_expert(slot_SLS, self._placement)
            return np.asarray(slot_SLS.sum(axis=(1, 2), dtype=np.float64))
        self._slot_total_LS += plan.own(slot_SLS).sum(axis=0)
        self.guests.serve(plan, 1.0)
        if self.watched:
            self.last_counts_SLE = plan.count_BLE()
        return np.asarray(plan.rows_BLG(shared=False).sum(axis=(1, 2)))

    def _routed(
        self, rows: IntArray, request_N: IntArray, position_N: IntArray, offsets: IntArray, rank_N: IntArray,
        tick: int, phase: Phase,
    ) -> tuple[AnyArray, Drawn, FloatArray | None]:  # fmt: skip
        """Ids [N, L, W] of steps routed one by one, what was drawn, and rows of each slot [S, L, slots] where kernels
        pad to the capacity."""
        assert self._router is not None
        none, ids, drawn, room = self._source.num_experts, [], [], []
        place_N = self._replay.tenth(request_N, position_N)
        for step, (lo, hi) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            part = slice(lo, hi)
            batch = self._router.route(
                rows[part], phase, tick + step, rank_N=rank_N[part], request_N=request_N[part],
                position_N=position_N[part],
            )  # fmt: skip
            ids.append(batch.expert_NLW)
            drawn.append(drawn_of(batch, place_N[part], None))
            room.append(room_of(batch, None))
        wide = max(x.shape[2] for x in ids)
        padded = [np.pad(x, ((0, 0), (0, 0), (0, wide - x.shape[2])), constant_values=none) for x in ids]
        capacity = self._router.capacity
        pad = padded_slots(np.array(room), self._placement) if capacity is not None and capacity.pad else None
        return np.concatenate(padded), stack_drawn(drawn), pad

    def _slots(
        self, ids: AnyArray, token_N: IntArray, offsets: IntArray, rank_N: IntArray
    ) -> tuple[AnyArray, Ports | None, Plan | None]:
        """Tokens per slot [S, L, slots] and ports, from the slot that dispatch chooses for every token, and its
        plan, where it makes one."""
        layout, steps = self._layout, len(offsets) - 1
        served, source = self._served(ids, token_N, offsets, rank_N)
        slot_TLK = served.slot_TLK
        step_N = np.repeat(np.arange(steps), np.diff(offsets))
        count = count_slots(slot_TLK, step_N, steps, served.slots)
        if not layout.exchanges:
            return count, None, served.plan
        copies = touch(slot_TLK, source, offsets[:-1], served.slots_per_rank, self._node_G, layout.copies)
        out_SG = np.zeros((steps, layout.ranks))
        np.add.at(out_SG, (step_N, source), 1.0)
        busiest = (out_SG.max(axis=-1) / np.diff(offsets))[:, None]
        ports = Ports(
            nvlink=np.maximum(copies.in_BLG.max(axis=-1), copies.out_BL * busiest),
            nic=np.maximum(copies.node_in_BLN.max(axis=-1) / layout.nics_shared, copies.node_out_BL * busiest),
            nvlink_total=copies.out_BL.astype(np.float64),
            nic_total=copies.node_out_BL.astype(np.float64),
        )
        return count, ports, served.plan


def _per_expert(slot_SLS: AnyArray, placement: Placement) -> IntArray:
    """Pairs per expert [S, L, E] from pairs per slot [S, L, slots]."""
    steps, (layers, experts) = len(slot_SLS), placement.replica_count_LE.shape
    key_LS = np.arange(layers)[:, None] * experts + placement.expert_LS  # empty slots have no pairs
    out = np.zeros((steps, layers * experts), np.int64)
    for step in range(steps):
        out[step] = np.bincount(key_LS.ravel(), weights=slot_SLS[step].ravel(), minlength=layers * experts)
    return out.reshape(steps, layers, experts)
