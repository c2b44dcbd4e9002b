"""What would have happened: placements fitted on past rows only, and later rows priced on them.

Legend: R rows, P periods (rows that one placement serves), L layers, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.cost.rebalancing import move_ns
from moesim.dispatch import DispatchPolicy
from moesim.errors import BadInput
from moesim.explain_eplb.prices import Batch, LayerTimes, StepPrices
from moesim.explain_eplb.traffic import Rows, thinned
from moesim.placement import PlacementContext
from moesim.placement.moves import moves, settle
from moesim.policy import load_policy
from moesim.rng import generator

__all__ = ["BASE", "Candidate", "Played", "Replay"]

Mode = Literal["none", "static", "sync", "async"]
_MOVED_LAYERS = 32
"""layers of changes of the map whose moves are counted; they stand for all of a candidate"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """mode none: experts in order. static: placed once, from the rows before those that are scored. sync, async: placed
    anew every `interval_rows` rows from the last `window_rows`."""

    mode: Mode
    redundant: int = 0
    interval_rows: int = 0
    window_rows: int = 0


BASE = Candidate("none")


@dataclass(frozen=True, slots=True)
class Moved:
    """One rebalance, all layers, mean over those that were looked at: slots by class, and ns of the transfers."""

    slots: dict[str, float]
    ns: float


@dataclass(frozen=True, eq=False)
class Played:
    """A candidate on the scored rows. step_ns_R: of a step, stalls spread over the steps they serve. stall_ns: of one
    rebalance that steps wait for; host_ns, moved: planning and moving, waited for or not. full_ns_R: of a step in the
    batch that fits without redundant experts and without stalls; lag_rows: rows until an asynchronous map is in use."""

    candidate: Candidate
    batch: Batch
    step_ns_R: FloatArray
    full_ns_R: FloatArray
    times: LayerTimes
    stall_ns: float = 0.0
    host_ns: float = 0.0
    moved: Moved | None = None
    lag_rows: int = 0

    @property
    def by_operator(self) -> dict[str, float]:
        """Mean ns of a step by operator, stalls apart."""
        moe = {"all_to_all": float(self.times.exchange.mean()), "moe": float(self.times.experts.mean())}
        return {**self.batch.own_ns, **moe}


@dataclass(eq=False)
class Replay:
    """Plays candidates on the rows from `start` on. host_ns: planning of one rebalance. policy: kind of the placement
    that is tried. mean_tokens: prompt and output of a request."""

    rows: Rows
    prices: StepPrices
    policy: str
    dispatch: DispatchPolicy
    start: int
    mean_tokens: tuple[float, float]
    host_ns: float
    seed: int
    _past: IntArray = field(init=False)
    _sized: dict[int, IntArray] = field(init=False, default_factory=dict)
    _times: dict[tuple[int, int, int, int, int], LayerTimes] = field(init=False, default_factory=dict)
    _moved: dict[tuple[int, int, int], Moved] = field(init=False, default_factory=dict)
    _maps: dict[tuple[int, int, int, int], IntArray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        seen = self.rows.seen_RLE
        self._past = np.concatenate([np.zeros((1, *seen.shape[1:]), np.int64), np.cumsum(seen, axis=0)])
        model = self.prices.model
        self.context = PlacementContext(
            num_ranks=self.prices.layout.ep,
            num_nodes=self.prices.nodes,
            num_groups=model.num_expert_groups,
            rank_to_node=self.prices.layout.node_of_part,
            seed=self.seed,
        )
        base = self.batch_of(0)
        if base is None:
            raise BadInput("not one request fits beside the experts; `moesim check` says what would")
        self.base_batch: Batch = base

    @property
    def scored(self) -> int:
        """Rows that are scored."""
        return self.rows.number - self.start

    def slots_of(self, redundant: int) -> int:
        """Expert slots of a rank and layer."""
        return -(-(self.prices.model.num_experts + redundant) // self.prices.layout.ep)

    def batch_of(self, redundant: int) -> Batch | None:
        """What fits beside so many redundant experts."""
        return self.prices.batch(self.slots_of(redundant), self.mean_tokens)

    # -- candidates ---------------------------------------------------------------------------------------------
    def play(self, candidate: Candidate) -> Played | None:
        """None where not one request fits."""
        batch = self.batch_of(candidate.redundant)
        if batch is None:
            return None
        if candidate.mode in ("none", "static"):
            return self._played(candidate, batch, 0)
        found = self.moved(candidate)
        if candidate.mode == "sync":
            return self._played(candidate, batch, 0, self.host_ns + found.ns, found)
        first = self._played(candidate, batch, 0)
        step = float(first.step_ns_R.mean())
        lag = round((self.host_ns + found.ns) / step / self.rows.row_steps)
        # weights and tokens share the ports half and half while both are on the wire (`moesim.cost.rebalancing`)
        return self._played(candidate, batch, lag, found.ns * float(first.times.exchange.mean()) / step, found)

    def _played(
        self, candidate: Candidate, batch: Batch, lag: int, stall: float = 0.0, found: Moved | None = None
    ) -> Played:
        times = self._layer_times(candidate, batch.tokens, lag)
        full = (
            times
            if batch.tokens == self.base_batch.tokens
            else self._layer_times(candidate, self.base_batch.tokens, lag)
        )
        steps = max(candidate.interval_rows, 1) * self.rows.row_steps
        own, full_own = sum(batch.own_ns.values()), sum(self.base_batch.own_ns.values())
        return Played(
            candidate=candidate,
            batch=batch,
            step_ns_R=own + times.exchange + times.experts + stall / steps,
            full_ns_R=full_own + full.exchange + full.experts,
            times=times,
            stall_ns=stall,
            host_ns=self.host_ns if found is not None else 0.0,
            moved=found,
            lag_rows=lag,
        )

    def _layer_times(self, candidate: Candidate, tokens: int, lag: int) -> LayerTimes:
        c = candidate
        key = (-1 if c.mode == "none" else c.redundant, c.interval_rows, c.window_rows, tokens, lag)
        if key not in self._times:
            maps_PLS = self.maps(candidate, lag)
            count = self.batches(tokens)[self.start :]
            period = c.interval_rows or self.scored
            self._times[key] = self.prices.layers(self.slot_counts(maps_PLS, count, period), tokens)
        return self._times[key]

    def batches(self, tokens: int) -> IntArray:
        """Batches of `tokens` tokens, those of fewer tokens drawn from those of more."""
        if tokens == self.rows.tokens:
            return self.rows.batch_RLE
        if tokens not in self._sized:
            target = float(tokens) * self.prices.model.top_k
            rng = generator(self.seed, "explain_eplb/fewer", tokens)
            self._sized[tokens] = thinned(self.rows.batch_RLE, target, rng)
        return self._sized[tokens]

    # -- maps ---------------------------------------------------------------------------------------------------
    def maps(self, candidate: Candidate, lag: int = 0) -> IntArray:
        """Expert of each slot for each period of the scored rows: [P, L, S]."""
        c = candidate
        layers = self.rows.seen_RLE.shape[1]
        if c.mode == "none":
            return np.broadcast_to(self.prices.base_map(), (1, layers, self.prices.base_map().size))
        key = (c.redundant, c.interval_rows, c.window_rows, lag)
        if key not in self._maps:
            end_P = np.arange(self.start, self.rows.number, c.interval_rows or self.scored) - lag
            end_P = np.maximum(end_P, 1)
            begin_P = np.maximum(end_P - (c.window_rows or self.start), 0)
            self._maps[key] = self.placed(self._past[end_P] - self._past[begin_P], c.redundant)
        return self._maps[key]

    def placed(self, weight_PLE: AnyArray, redundant: int) -> IntArray:
        """Placements of loads [P, L, E], all at once: [P, L, S]."""
        periods, layers, experts = weight_PLE.shape
        policy = load_policy("placement", {"kind": self.policy, "num_redundant_experts": redundant})
        placement = policy.place(weight_PLE.reshape(-1, experts).astype(np.float64), self.context)
        return np.asarray(placement.slot_to_expert_LS.reshape(periods, layers, -1))

    def slot_counts(self, maps_PLS: AnyArray, count_RLE: IntArray, period: int) -> IntArray:
        """Pairs of each slot [R, L, S] where row r is served by map r // period."""
        rows, layers, experts = count_RLE.shape
        periods = len(maps_PLS)
        pad = periods * period - rows
        whole = np.concatenate([count_RLE, np.zeros((pad, layers, experts), np.int64)]) if pad else count_RLE
        ordered = whole.reshape(periods, period, layers, experts).swapaxes(0, 1).reshape(period, -1, experts)
        placement = self.prices.placement(np.asarray(maps_PLS).reshape(periods * layers, -1))
        slots = self.dispatch.split(ordered, placement).reshape(period, periods, layers, -1)
        return np.asarray(slots.swapaxes(0, 1).reshape(periods * period, layers, -1)[:rows])

    def moved(self, candidate: Candidate) -> Moved:
        """What changes between consecutive maps: of evenly spaced ones, some layers."""
        c = candidate
        key = (c.redundant, c.interval_rows, c.window_rows)
        if key not in self._moved:
            maps = self.maps(candidate)
            periods, layers, slots = maps.shape
            if periods < 2:
                raise BadInput("a rebalance needs two placements; use shorter intervals or a longer recording")
            pairs = (periods - 1) * layers
            at = np.unique(np.linspace(0, pairs - 1, min(_MOVED_LAYERS, pairs)).round().astype(np.int64))
            old, new = (self.prices.placement(m.reshape(-1, slots)[at]) for m in (maps[:-1], maps[1:]))
            found = moves(old, settle(old, new))
            scale = layers * self.prices.layer_scale / len(at)
            ns = float(move_ns(found, self.prices.move_costs).sum()) * scale
            self._moved[key] = Moved({name: n * scale for name, n in found.counts().items()}, ns)
        return self._moved[key]

    # -- what bounds --------------------------------------------------------------------------------------------
    def even_ns(self, rows: slice) -> float:
        """Mean ns of a step if every layer's work were shared evenly by all ranks, those of the scored `rows`."""
        base = self.base_batch
        count = self.batches(base.tokens)[self.start :][rows]
        slots = self.slot_counts(self.maps(BASE), count, len(count))
        return float(sum(base.own_ns.values()) + self.prices.even_ns(slots, base.tokens).mean())

    def fresh_gain(self, redundant: int, rows: slice) -> float:
        """Gain in step time if every row had been placed from a random half of its own tokens and served the other:
        what no staler placement reaches but by luck."""
        tokens = self.base_batch.tokens
        rest = self.rows.rest_RLE[self.start :][rows]
        half = self.rows.half_RLE[self.start :][rows]
        base = self.prices.layers(self.slot_counts(self.maps(BASE), rest, len(rest)), tokens)
        new = self.prices.layers(self.slot_counts(self.placed(half, redundant), rest, 1), tokens)
        own = sum(self.base_batch.own_ns.values())
        before, after = ((own + t.exchange + t.experts).mean() for t in (base, new))
        return float(before / after - 1)
