"""Count fidelity: batches of whole tokens drawn once for each size and reused step after step.

The pool (a recorded trace, or a synthetic one) is cut into blocks of 32 tokens; a batch of T tokens is a sum of
T / 32 blocks drawn with replacement, so it is made of whole tokens with K distinct experts each, keeps what tokens
of one block share, and costs one matrix product. Prompts take blocks of consecutive tokens of a sequence; decode
takes blocks of tokens from all over the pool. Sizes lie on a grid (two to three an octave, every draw of a size
containing that of the next smaller one); between two sizes the *prices* of the same draw are interpolated.

Which of the entries a step uses is a Markov chain: with probability `rho` it stays, so that the load of one step
resembles the next as it does in the trace, where the same sequences decode on.

Where a token's experts depend on its batch (a router that balances, a capacity) the blocks' sums would not do: then
each entry's tokens are routed together (`moesim.cost.routed_bank`).

Where only the replica depends on it (a dispatch that plans), an entry's counts by expert are the blocks' sums still,
and the plan made of them says what every slot computes. What travels to a rank is estimated: as many copies for each of
its pairs as under a policy that looks at single tokens (`Coupled.stand_in`).
"""

from __future__ import annotations

import bisect
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.cost.blocks import BLOCK, Blocks, Sample, persistence
from moesim.cost.drawn import planned_ports
from moesim.cost.experts import Computed, Drawn, ExpertPrices, LayerPrices, MoESums, Ports, padded_slots
from moesim.cost.pricer import Batch, Chunk
from moesim.cost.routed_bank import RoutedBank, stack_drawn
from moesim.cost.split import HalfLayers, SplitDetail
from moesim.cost.weights import Guests, Moves
from moesim.dispatch import DispatchPolicy, assign_ragged
from moesim.dispatch.plan import Batches, Coupled, Plan, stack
from moesim.layout import Layout
from moesim.placement import Placement
from moesim.reuse import named, reused
from moesim.rng import generator
from moesim.routing.capacity import Phase
from moesim.workload.pool import RoutingSource

__all__ = ["BankDetail", "CountExperts"]

_POOL_BLOCKS = 256
_PLANNED, _PLANNED_SLOTS = 8, 1 << 17
"""entries of a size where dispatch plans for each; fewer, but at least half, beyond so many slots of all layers"""
_PERIOD = 1 << 16
_SKEWS = tuple(2 ** (i / 8) for i in range(129))
"""busiest rank's tokens over the mean, rounded up to one of these: at most 9 % above"""


class BankDetail(NamedTuple):
    """Which row and which entries a run used: entries `sequence[start : start + steps]`."""

    row: MoESums
    start: int


class _Cell(NamedTuple):
    """Batches of one size of the grid: kernels, ports, what was routed, weights that dispatch sends."""

    computed: Computed
    ports: Ports | None
    drawn: Drawn
    moves: Moves | None = None


class CountExperts:
    """`moesim.cost.step.MoECost` at count fidelity."""

    def __init__(
        self,
        source: RoutingSource,
        placement: Placement,
        dispatch: DispatchPolicy,
        layout: Layout,
        prices: ExpertPrices,
        entries: int,
        seed: int,
        routed: RoutedBank | None = None,
        before: CountExperts | None = None,
    ) -> None:
        """`routed`: draws batches whose tokens are routed together; None: the source's ids stand. `before`: the same
        deployment under another placement, whose entries are used in the same order."""
        self._routed = routed
        self._routed_LS = np.zeros((placement.num_layers, placement.num_slots))
        self.guests = Guests(placement)
        self._source = source
        self._placement = placement
        self._dispatch = dispatch
        self._layout = layout
        self._prices = prices
        self._entries = 1 if source.ideal else entries if routed is None else routed.entries(entries)
        self._planner = dispatch if isinstance(dispatch, Coupled) else None
        if self._planner is not None:
            room = max(_PLANNED // 2, _PLANNED_SLOTS // max(1, placement.num_layers * placement.num_slots))
            self._entries = min(self._entries, _PLANNED, room)
        self._seed = seed
        self._pool: Sample | None = None
        self._blocks: dict[str, Blocks] = {}
        self._cells: dict[tuple[str, int, float], _Cell] = {}
        self._priced: dict[tuple[str, int, float], MoESums] = {}
        self._rows: dict[tuple[str, int, float], MoESums] = {}
        self._layered: dict[tuple[str, int, float], IntArray] = {}
        self._deck = named("bank", self._deck_key)
        for phase in ("prefill", "decode"):
            key = partial(self._of_deck, phase)
            self._blocks[phase] = reused("bank blocks", key, partial(self._cut, phase))
        self._cards = named("bank cells", self._cells_key)
        self._count_BLE: dict[tuple[str, int, float], FloatArray] = {}
        self._sizes: dict[int, tuple[str, int, float, int]] = {}
        self.rho: float = self._persistence() if before is None else before.rho
        self.sequence: IntArray = self._draw_sequence() if before is None else before.sequence

    def _persistence(self) -> float:
        def measure() -> float:
            pool = self._sampled()
            return persistence(pool.slot_TLK, pool.rows_T, self._source, self._placement, self._seed)

        return reused("bank persistence", self._of_deck, measure)

    # -- what runs may share (moesim.reuse) --------------------------------------------------------------------------
    def _deck_key(self) -> tuple[Any, ...]:
        """Everything that the sample, its blocks and their persistence rest on."""
        source, placement, layout = self._source, self._placement, self._layout
        return (
            source.expert_TLK, source.sequence_start, source.num_experts, source.top_k, source.ideal,
            placement.slot_to_expert_LS.tobytes(), placement.num_slots, placement.num_experts, placement.num_ranks,
            placement.rank_to_node, self._dispatch, layout.ranks, layout.gpus_per_node, layout.exchanges,
            layout.expert_tp, layout.copies, self._seed,
        )  # fmt: skip

    def _of_deck(self, *more: Any) -> tuple[Any, ...] | None:
        return None if self._deck is None else (self._deck, *more)

    def _cells_key(self) -> tuple[Any, ...]:
        """Everything that prices of the bank rest on."""
        return (self._deck, self._entries, self._layout, self._prices.made_of)

    def _of_cells(self, *more: Any) -> tuple[Any, ...] | None:
        """None, too, where batches are routed or planned as one: then drawing them has side effects."""
        if self._deck is None or self._cards is None or self._routed is not None or self._planner is not None:
            return None
        return (self._cards, *more)

    def _draw_sequence(self) -> IntArray:
        """Entry of every step: a Markov chain that stays with probability rho; repeats after 65,536 steps."""
        rng = generator(self._seed, "bank/sequence")
        fresh = rng.random(_PERIOD) >= self.rho
        fresh[0] = True
        drawn = rng.integers(self._entries, size=_PERIOD)
        at = np.maximum.accumulate(np.where(fresh, np.arange(_PERIOD), 0))
        return np.concatenate([drawn[at], drawn[at][:8192]])

    # -- what the step pricer asks -------------------------------------------------------------------------------
    def decode_ns(self, batch: Batch, steps: int) -> tuple[IntArray, BankDetail]:
        """See MoECost."""
        total = batch.total_decoding
        row = self.row("decode", total, batch.busiest())
        start = batch.tick & (_PERIOD - 1)
        return row.total[self.sequence[start : start + steps]], BankDetail(row, start)

    def mixed_ns(self, batch: Batch, chunks: list[Chunk], paused: list[int], busiest: int) -> tuple[int, BankDetail]:
        """See MoECost. A step with more prompt than decode tokens draws from the prompts' blocks."""
        prefill = sum(c.tokens for c in chunks)
        decode = batch.running(paused)
        row = self.row("prefill" if prefill > decode else "decode", prefill + decode, busiest)
        start = batch.tick & (_PERIOD - 1)
        return int(row.total[self.sequence[start]]), BankDetail(row, start)

    def halves(
        self, batch: Batch, chunks: list[Chunk], paused: list[int], tokens_2D: IntArray, phase: Phase, steps: int
    ) -> HalfLayers:
        """See MoECost. The second half is another draw, half the bank further on."""
        start = batch.tick & (_PERIOD - 1)
        entry = self.sequence[start : start + steps]
        entry_2S = np.stack([entry, (entry + self._entries // 2) % self._entries])
        sizes = zip(tokens_2D.sum(axis=1).tolist(), tokens_2D.max(axis=1).tolist(), strict=True)
        (row_0, ns_0), (row_1, ns_1) = (self._half(phase, tokens, busiest) for tokens, busiest in sizes)
        dispatch, experts, combine = np.stack([ns_0[..., entry_2S[0]], ns_1[..., entry_2S[1]]], axis=2)
        return HalfLayers(dispatch, experts, combine, (row_0, row_1), entry_2S)

    def _half(self, phase: Phase, tokens: int, busiest: int) -> tuple[MoESums, IntArray]:
        """`row`, and ns of dispatch, experts and combine layer by layer [3, L, entries]."""
        row, skew = self.row(phase, tokens, busiest), self._skew(tokens, busiest)
        found = self._layered.get((phase, tokens, skew))
        if found is None:
            low, high = _grid(tokens, self._routed is not None)
            found = self._layer_ns(phase, low, skew)
            if high > low:
                more = self._layer_ns(phase, high, skew) - found
                found = found + np.rint(more * ((tokens - low) / (high - low))).astype(np.int64)
            self._layered[phase, tokens, skew] = found
        return row, found

    def _layer_ns(self, phase: Phase, tokens: int, skew: float) -> IntArray:
        priced = self._price_layers(phase, tokens, skew)[0]
        return np.stack([priced.dispatch.T, priced.experts.T, priced.combine.T])

    def half_counts(self, detail: SplitDetail, lo: int, hi: int) -> FloatArray:
        """`expert_counts` of both halves of the steps lo to hi of a run."""
        total: FloatArray | float = 0.0
        for row, entry_S in zip(detail.rows, detail.entry_2S, strict=True):
            phase, low, skew, tokens = self._sizes[id(row)]
            count_BLE = self._counts_of(phase, low, skew)
            used = np.bincount(entry_S[lo:hi], minlength=len(count_BLE))
            total = total + np.tensordot(used, count_BLE, 1) * (tokens / low)
        return np.asarray(total, np.float64)

    def expert_counts(self, detail: BankDetail, steps: int) -> FloatArray:
        """Pairs per expert in the first `steps` steps of a run, float64 [L, E]: those of the entries, at the next
        smaller size of the grid, scaled to the run's."""
        phase, low, skew, tokens = self._sizes[id(detail.row)]
        count_BLE = self._counts_of(phase, low, skew)
        used = np.bincount(self.sequence[detail.start : detail.start + steps], minlength=len(count_BLE))
        return np.tensordot(used, count_BLE, 1) * (tokens / low)

    def slot_load_LS(self) -> FloatArray:
        """Mean tokens per slot [L, S] over the blocks drawn from, the phases that occurred together."""
        if self._routed_LS.any():
            return self._routed_LS.copy()
        means = [blocks.mean_LS for _, blocks in sorted(self._blocks.items())]
        if not means:
            return np.zeros((self._placement.num_layers, self._placement.num_slots))
        return np.asarray(np.mean(means, axis=0))

    def row(self, phase: Phase, tokens: int, busiest: int) -> MoESums:
        """Prices of a batch of `tokens` tokens of which `busiest` sit on one data-parallel rank."""
        skew = self._skew(tokens, busiest)
        found = self._rows.get((phase, tokens, skew))
        if found is None:
            low, high = _grid(tokens, self._routed is not None)
            found = self._price(phase, low, skew)
            if high > low:
                found = _between(found, self._price(phase, high, skew), (tokens - low) / (high - low))
            self._rows[phase, tokens, skew] = found
            self._sizes[id(found)] = (phase, low, skew, tokens)
        return found

    def _skew(self, tokens: int, busiest: int) -> float:
        if not self._layout.meets:
            return 1.0
        ratio = busiest * self._layout.dp / tokens
        at = bisect.bisect_left(_SKEWS, ratio)
        return min(_SKEWS[at] if at < len(_SKEWS) else ratio, float(self._layout.dp))

    def layers(self, phase: Phase, tokens: int, busiest: int) -> LayerPrices:
        """Layer by layer, the prices behind the next smaller size of the grid (for a timeline)."""
        low, _ = _grid(tokens, self._routed is not None)
        ratio = busiest * self._layout.dp / tokens if self._layout.meets else 1.0
        computed, ports, _, moves = self._cell(phase, low, ratio)
        return self._prices.price(computed, np.full(len(computed.grade), busiest * low / tokens), ports, moves=moves)

    # -- drawing ------------------------------------------------------------------------------------------------
    def _price(self, phase: Phase, tokens: int, skew: float) -> MoESums:
        key = (phase, tokens, skew)
        found = self._priced.get(key)
        if found is None:
            found = reused("bank prices", lambda: self._of_cells(*key), lambda: self._priced_anew(phase, tokens, skew))
            self._priced[key] = found
        return found

    def _priced_anew(self, phase: Phase, tokens: int, skew: float) -> MoESums:
        priced, ports, drawn = self._price_layers(phase, tokens, skew)
        return priced.sums(ports, drawn)

    def _price_layers(self, phase: Phase, tokens: int, skew: float) -> tuple[LayerPrices, Ports | None, Drawn]:
        computed, ports, drawn, moves = self._cell(phase, tokens, skew)
        busiest = tokens / self._layout.dp * skew
        if ports is not None:
            # the busiest sender's copies: its tokens times the copies a token needs
            sent = busiest / self._layout.tp / tokens
            ports = ports._replace(
                nvlink=np.maximum(ports.nvlink, ports.nvlink_total * sent),
                nic=np.maximum(ports.nic, ports.nic_total * sent),
            )
        priced = self._prices.price(computed, np.full(len(computed.grade), busiest), ports, moves=moves)
        return priced, ports, drawn

    def _cell(self, phase: Phase, tokens: int, skew: float) -> _Cell:
        """Expert kernels and ports of the batches of one size of the grid, and what was routed. The skew, the busiest
        rank's tokens over the mean, counts for capacities of ranks, to the next half octave."""
        skew = self._cell_skew(skew)
        key = (phase, tokens, skew)
        found = self._cells.get(key)
        if found is None:
            if self._routed is not None:
                found = self._routed_cell(phase, tokens, skew)
            else:
                # perfectly even routing leaves nothing to plan but the shared expert
                plain = self._planner is None or (self._source.ideal and not self._planner.shared)
                if plain:
                    key_of = partial(self._of_cells, phase, tokens)
                    found = reused("bank cell", key_of, lambda: self._plain_cell(phase, tokens))
                else:
                    found = self._planned_cell(phase, tokens)
            self._cells[key] = found
        return found

    def _cell_skew(self, skew: float) -> float:
        capacity = None if self._routed is None else self._routed.router.capacity
        if capacity is None or capacity.scope != "rank":
            return 1.0
        return float(min(2.0 ** (round(2 * math.log2(max(skew, 1.0))) / 2), float(self._layout.dp)))

    def _plain_counts(self, phase: str, tokens: int) -> tuple[FloatArray, Ports | None]:
        count_BLS, ports = self._blocks[phase].draw(tokens, self._entries, self._seed, phase)
        if self._source.ideal:
            count_BLS = np.full_like(count_BLS, tokens * self._source.top_k / count_BLS.shape[-1])
        return count_BLS, ports

    def _counts_of(self, phase: str, tokens: int, skew: float) -> FloatArray:
        """Pairs per expert of the entries of a cell [B, L, E]; of a plain one drawn again when first asked for."""
        key = (phase, tokens, self._cell_skew(skew))
        if key not in self._count_BLE:
            self._count_BLE[key] = self._per_expert(self._plain_counts(phase, tokens)[0])
        return self._count_BLE[key]

    def _plain_cell(self, phase: Phase, tokens: int) -> _Cell:
        count_BLS, ports = self._plain_counts(phase, tokens)
        kept_B = count_BLS.sum(axis=(1, 2), dtype=np.float64)
        passes = np.full(len(kept_B), float(tokens * self._placement.num_layers))
        return _Cell(self._prices.compute(count_BLS), ports, Drawn.plain(passes, kept_B))

    def _planned_cell(self, phase: Phase, tokens: int) -> _Cell:
        """Batches whose replicas a plan chooses."""
        assert self._planner is not None
        drawn = self._blocks[phase].draw_all(tokens, self._entries, self._seed, phase)
        count_BLE = self._per_expert(drawn.count_BLS)
        if self._source.ideal:  # in whole pairs, as even as can be
            even = np.arange(1, count_BLE.shape[-1] + 1) * (tokens * self._source.top_k) // count_BLE.shape[-1]
            count_BLE = np.broadcast_to(np.diff(even, prepend=0).astype(np.float64), count_BLE.shape)
        self._count_BLE[phase, tokens, 1.0] = count_BLE
        ranks = self._placement.num_ranks
        reach: list[AnyArray | None] = [None, None]
        if drawn.in_BLG is not None and drawn.node_in_BLN is not None and self._layout.copies == "distinct":
            # those that come from a rank or node itself reach it, too
            places = (drawn.in_BLG, ranks), (drawn.node_in_BLN, self._layout.nodes)
            reach = [np.minimum(copies * (n / max(n - 1, 1)), tokens) for copies, n in places]
        from_BG = np.full((len(count_BLE), ranks), tokens / ranks)
        seen = Batches(np.rint(count_BLE).astype(np.int64), from_BG, reach[0], reach[1])
        plan = self._planner.plan(seen, self._placement, self._seed)
        computed = self._prices.compute(plan.count_BLW, plan)
        moves = self._tally(plan, tokens)
        kept_B = count_BLE.sum(axis=(1, 2))
        passes = np.full(len(kept_B), float(tokens * self._placement.num_layers))
        return _Cell(computed, planned_ports(drawn, plan, self._layout, tokens), Drawn.plain(passes, kept_B), moves)

    def _tally(self, plan: Plan, tokens: int) -> Moves | None:
        """Keep the mean load of slots and guests; returns the weights that the plan sends."""
        self._routed_LS += plan.own(plan.count_BLW).mean(axis=0) / tokens
        self.guests.serve(plan, 1.0 / (tokens * len(plan.count_BLW)))
        moves = self._prices.moves(plan)
        self.guests.sent(moves)
        return moves

    def _routed_cell(self, phase: Phase, tokens: int, skew: float) -> _Cell:
        """Batches whose tokens are routed together."""
        assert self._routed is not None
        drawn = [self._routed.entry(phase, tokens, skew, i, self._entries) for i in range(self._entries)]
        plans = [d.plan for d in drawn if d.plan is not None]
        plan = moves = None
        if plans:
            plan = stack(plans)
            count_BLS: AnyArray = plan.count_BLW
            self._count_BLE[phase, tokens, skew] = plan.count_BLE().astype(np.float64)
            moves = self._tally(plan, tokens)
        else:
            count_BLS = np.stack([d.count_LS for d in drawn])
            self._routed_LS += count_BLS.mean(axis=0) / tokens
            self._count_BLE[phase, tokens, skew] = self._per_expert(count_BLS)
        capacity, pad = self._routed.router.capacity, None
        if capacity is not None and capacity.pad:
            pad = padded_slots(np.stack([d.room_L for d in drawn]), self._placement)
        ports = None
        if self._layout.exchanges:
            ports = Ports(*(np.stack([d.ports[i] for d in drawn]) for i in range(4)))
        # the busiest sender's copies are added where the skew is known
        computed, ports = self._prices.padded(count_BLS, ports, pad, np.zeros(len(drawn)), plan)
        return _Cell(computed, ports, stack_drawn([d.drawn for d in drawn]), moves)

    def _per_expert(self, count_BLS: AnyArray) -> FloatArray:
        """Pairs per expert of every entry, float64 [B, L, E]."""
        layers, experts = self._placement.replica_count_LE.shape
        out = np.zeros((len(count_BLS), layers * experts))
        key_LS = np.arange(layers)[:, None] * experts + self._placement.expert_LS
        for entry in range(len(count_BLS)):
            out[entry] = np.bincount(key_LS.ravel(), weights=count_BLS[entry].ravel(), minlength=layers * experts)
        return out.reshape(-1, layers, experts)

    def _sample(self) -> Sample:
        """Blocks of 32 consecutive tokens from all over the source, each token with the slots that serve it."""
        available = self._source.num_tokens
        rng = generator(self._seed, "bank/pool")
        whole = max(1, available // BLOCK)
        starts = np.sort(rng.permutation(whole)[:_POOL_BLOCKS]) * BLOCK
        rows = (starts[:, None] + np.arange(BLOCK)).ravel() % available
        # tokens come from all ranks alike
        source_T = rng.integers(self._layout.ranks, size=len(rows))
        part_T = source_T if self._layout.exchanges else source_T // self._layout.expert_tp
        ids = np.ascontiguousarray(self._source.expert_TLK[rows])
        alone = self._dispatch if self._planner is None else self._planner.stand_in()
        slot_TLK = assign_ragged(alone, ids, part_T, self._placement, self._seed, rows)
        return Sample(rows, slot_TLK, source_T, rng.permutation(len(rows)))

    def _sampled(self) -> Sample:
        if self._pool is None:
            self._pool = reused("bank sample", self._of_deck, self._sample)
        return self._pool

    def _cut(self, phase: str) -> Blocks:
        """The sample in blocks: as it is for prompts, shuffled for decode."""
        _, slot_TLK, source_T, shuffle = self._sampled()
        if phase == "decode":
            slot_TLK, source_T = slot_TLK[shuffle], source_T[shuffle]
        return Blocks(slot_TLK, source_T, self._placement, self._layout)


def _between(low: MoESums, high: MoESums, share: float) -> MoESums:
    """The same draws at a size between two of the grid: linear, each part rounded to a nanosecond."""
    parts = [a + np.rint((b - a) * share).astype(np.int64) for a, b in zip(low[1:4], high[1:4], strict=True)]
    stats = low.stats + (high.stats - low.stats) * share
    grade = np.maximum(np.maximum(low.grade, high.grade), 1)
    exchange_grade = np.maximum(np.maximum(low.exchange_grade, high.exchange_grade), 1)
    return MoESums(parts[0] + parts[1] + parts[2], parts[0], parts[1], parts[2], stats, grade, exchange_grade)


def _grid(tokens: int, coarse: bool = False) -> tuple[int, int]:
    """The sizes of the grid around `tokens`: every size to 4, then 2^k and 3 * 2^(k-1), whole blocks from 32 on.

    coarse: 2^k alone, where batches are dear to draw.
    """
    if tokens <= 4:
        return tokens, tokens
    power = 1 << (tokens.bit_length() - 1)
    sizes = [power, power + power // 2, 2 * power]
    if power == BLOCK or coarse:
        sizes = [power, 2 * power]
    low = max(s for s in sizes if s <= tokens)
    high = min(s for s in sizes if s >= tokens)
    return low, high
