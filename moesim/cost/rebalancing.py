"""Experts that move while a deployment serves: when, where to, how long it takes, and what steps cost meanwhile.

A `RebalancingPricer` is the step pricer of one group whose experts' cost changes with the map. Every
`interval_steps` steps it asks the placement policy again, with the loads of the steps that ran, and moves what
changed: synchronously, so that the step that follows waits, or while steps go on, layer after layer. What it does
depends on the steps that were executed alone, never on how runs were cut: a run is priced at most up to the next step
at which something may happen, and loads are looked up by step.

Moving: a layer's slots change together, its transfers take as long as the busiest port of a rank (`moesim.placement.
moves`), layers one after the other. While transfers and exchanges are on the same links each gets half of them, so a
step takes longer by its exchange, and transfers go on at half their rate in that time. What moves is written into a
buffer for one layer, as engines have it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.cost.attention import AttentionTables
from moesim.cost.bank import BankDetail, CountExperts
from moesim.cost.dense import DenseTables
from moesim.cost.experts import MoESums
from moesim.cost.pricer import Batch, Chunk, Run
from moesim.cost.split import SplitDetail, Splitter
from moesim.cost.step import MoECost, StepPricer
from moesim.cost.tokens import TokenExperts
from moesim.errors import BadInput, Problem
from moesim.hardware import DeviceProfile
from moesim.placement import Placement
from moesim.placement.moves import Moves, moves, settle
from moesim.rebalance_spec import RebalanceSpec

__all__ = ["HOST_NS_PER_LAYER", "MoveCosts", "Rebalanced", "RebalancingPricer", "move_ns"]

HOST_NS_PER_LAYER = 17e6
"""planning on the host: about a second for DeepSeek-V3's 58 layers (sgl-project/sglang#7879)"""
_GROUPS = 4
"""maps between the old and the new one that count fidelity draws batches for, whatever the chunks"""


@dataclass(frozen=True, slots=True)
class MoveCosts:
    """slot_bytes: weights of one expert slot of one layer on one rank. Rates in bytes a ns: one direction of a rank's
    NVLink and NIC, and of its memory. launch_ns: of a layer's transfers."""

    slot_bytes: int
    near: float
    far: float
    memory: float
    launch_ns: float

    @classmethod
    def of(cls, profile: DeviceProfile, slot_bytes: int) -> MoveCosts:
        """Links at the share of their rate that the profile states for gathers (0.75 and 0.85 where it states none)."""
        fit, node = profile.fits.get("all_gather", {}), profile.node
        return cls(
            slot_bytes,
            node.nvlink_bytes_per_s * fit.get("nvlink_eff", 0.75) * 1e-9,
            node.nic_bytes_per_s * fit.get("nic_eff", 0.85) * 1e-9,
            profile.hbm_bytes_per_s * 1e-9,
            node.nvlink_latency_ns + fit.get("launch_ns", profile.graph_launch_ns),
        )


def move_ns(moved: Moves, costs: MoveCosts) -> FloatArray:
    """ns of each layer's moves, float64 [L]: the busiest port, then copies inside ranks (read and written)."""
    near = np.maximum(moved.near_out_LG, moved.near_in_LG).max(axis=1) * costs.slot_bytes / costs.near
    far = np.maximum(moved.far_out_LG, moved.far_in_LG).max(axis=1) * costs.slot_bytes / costs.far
    copies = moved.copies_LG.max(axis=1) * (2.0 * costs.slot_bytes) / costs.memory
    return np.asarray(np.where(moved.moved_L > 0, costs.launch_ns + np.maximum(near, far) + copies, 0.0))


@dataclass(slots=True)
class Rebalanced:
    """What one group's rebalancing did. `balance_before`, `balance_after`: max over mean load of ranks, mean over
    layers, of the window's loads under the old and the new map (planned, not executed); one entry for each that moved.
    """

    asked: int = 0
    skipped_balanced: int = 0
    skipped_busy: int = 0
    moved: int = 0
    slots: dict[str, int] = field(default_factory=dict)
    transfer_ns: float = 0.0
    balance_before: list[float] = field(default_factory=list)
    balance_after: list[float] = field(default_factory=list)


class _Chunk(NamedTuple):
    """Layers that change together, and ns until their weights are there; no layers: the plan is being made."""

    layers: list[int]
    ns: float


class RebalancingPricer(StepPricer):
    """Prices runs of steps for one group and moves its experts (see the module)."""

    def __init__(
        self,
        dense: DenseTables,
        full: AttentionTables | None,
        window: AttentionTables | None,
        placement: Placement,
        build: Callable[[Placement, MoECost | None], MoECost],
        place: Callable[[FloatArray], Placement],
        spec: RebalanceSpec,
        costs: MoveCosts,
        splitter: Splitter | None = None,
    ) -> None:
        """build: the experts' cost under a map. place: the policy's map for loads [L, E]."""
        self.placement = placement
        self.done = Rebalanced()
        self._build, self._place, self._spec, self._costs = build, place, spec, costs
        self._host_ns = HOST_NS_PER_LAYER * placement.num_layers if spec.host_ms is None else spec.host_ms * 1e6
        first = spec.first_after_steps
        self._first = max(1, spec.interval_steps // 4) if first is None else first
        self._target: Placement | None = None
        self._chunks: list[_Chunk] = []
        self._left_ns = 0.0
        self._unbuilt = 0
        self._loads = _Loads(spec.window_steps)
        self._last: tuple[int, IntArray, IntArray | None] | None = None
        super().__init__(dense, full, window, self._watched(build(placement, None)), splitter)

    @property
    def slot_bytes(self) -> int:
        """Weights of one expert slot of one layer on one rank."""
        return self._costs.slot_bytes

    # -- what the engine asks -----------------------------------------------------------------------------------
    def decode(self, batch: Batch, steps: int) -> Run:
        """See StepPricer."""
        stall = self._arrive(batch.tick)
        return self._finish(super().decode(batch, min(steps, self._free_steps(batch.tick))), batch.tick, stall)

    def mixed(self, batch: Batch, chunks: list[Chunk], paused: list[int]) -> Run:
        """See StepPricer."""
        stall = self._arrive(batch.tick)
        return self._finish(super().mixed(batch, chunks, paused), batch.tick, stall)

    # -- time ---------------------------------------------------------------------------------------------------
    def _due(self, tick: int) -> bool:
        return tick >= self._first and (tick - self._first) % self._spec.interval_steps == 0

    def _free_steps(self, tick: int) -> int:
        """Steps until something may happen that is known beforehand."""
        if self._chunks and not self._spec.asynchronous:
            return 1
        if tick < self._first:
            return self._first - tick
        return self._spec.interval_steps - (tick - self._first) % self._spec.interval_steps

    def _arrive(self, tick: int) -> int:
        """Bring the maps up to step `tick`, before it runs; returns ns that it has to wait."""
        stall = 0.0
        if self._chunks and self._spec.asynchronous:
            self._travel(tick)
        elif self._chunks:
            stall += self._switch()
        if self._due(tick):
            self.done.asked += 1
            if self._chunks:
                self.done.skipped_busy += 1
            elif self._plan(tick):
                if self._spec.asynchronous:
                    self._chunks.insert(0, _Chunk([], self._host_ns))
                    self._left_ns = self._host_ns
                else:
                    stall += self._host_ns + (self._switch() if self._chunks else 0.0)
        return round(stall)

    def _travel(self, tick: int) -> None:
        """Transfers go on for as long as the steps since the last call took; what is there is used."""
        assert self._last is not None
        start, cumulative_ns, added_ns = self._last
        self._left_ns -= _progress(cumulative_ns, added_ns)[tick - start - 1]
        while self._chunks and self._left_ns <= 0:
            self._switch()
            if self._chunks:
                self._left_ns += self._chunks[0].ns

    def _finish(self, run: Run, tick: int, stall: int) -> Run:
        """Add what moving costs the steps of a run, end it where a transfer ends, and keep its loads."""
        steps = len(run.cumulative_ns)
        added = np.full(steps, stall, np.int64) if stall else None
        if self._chunks and self._spec.asynchronous:
            shares = bool(self._chunks[0].layers)
            added = np.cumsum(self._exchange_ns(run, steps)) if shares else np.zeros(steps, np.int64)
            steps = int(np.searchsorted(_progress(run.cumulative_ns + added, added), self._left_ns)) + 1
            steps = min(steps, len(added))
            added = added[:steps]
        if added is not None:
            run = Run(run.cumulative_ns[:steps] + added, run.key, run.detail, added)
        self._last = (tick, run.cumulative_ns, run.rebalance_ns)
        self._loads.record(tick, steps, self._counter(run))
        return run

    def _exchange_ns(self, run: Run, steps: int) -> IntArray:
        """Dispatch and combine of each step."""
        if isinstance(run.detail, BankDetail):
            row, entry = run.detail.row, cast(CountExperts, self.moe).sequence[run.detail.start :][:steps]
            return np.asarray((row.dispatch + row.combine)[entry])
        detail = cast(MoESums | SplitDetail, run.detail)
        return np.asarray(detail.dispatch[:steps] + detail.combine[:steps])

    # -- maps ---------------------------------------------------------------------------------------------------
    def _plan(self, tick: int) -> bool:
        """Ask the policy, and find what is to be moved, if anything; False where it is not asked."""
        load_LE = self._loads.sum(tick)
        before = self.placement.balance(load_LE)
        if not load_LE.any() or float((1.0 / before).mean()) > self._spec.threshold:
            self.done.skipped_balanced += 1
            return False
        wanted = self._place(load_LE)
        if wanted.slot_to_expert_LS.shape != self.placement.slot_to_expert_LS.shape:
            raise BadInput(
                Problem(
                    "rebalance",
                    "rebalancing needs a placement that keeps its number of slots, and this one went from "
                    f"{self.placement.num_slots} to {wanted.num_slots}. Use eplb or eplb_swap",
                )
            )
        target = settle(self.placement, wanted, self._spec.relabel_ranks)
        found = moves(self.placement, target)
        ns_L = move_ns(found, self._costs)
        ns_L += np.where(found.moved_L > 0, self._spec.layer_ms * 1e6, 0.0)
        changed = np.flatnonzero(found.moved_L).tolist()
        if not changed:
            self.done.skipped_balanced += 1
            return True
        self.done.moved += 1
        self.done.transfer_ns += float(ns_L.sum())
        self.done.balance_before.append(float(before.mean()))
        self.done.balance_after.append(float(target.balance(load_LE).mean()))
        for name, number in found.counts().items():
            self.done.slots[name] = self.done.slots.get(name, 0) + number
        size = self._spec.layers_per_chunk or len(changed)
        parts = [changed[i : i + size] for i in range(0, len(changed), size)]
        if self._spec.asynchronous and self._spec.layers_per_chunk is None:
            parts = [[layer] for layer in changed]
        self._chunks = [_Chunk(part, float(ns_L[part].sum())) for part in parts]
        self._target, self._unbuilt = target, 0
        return True

    def _switch(self) -> float:
        """The next chunk's layers take their new map; returns the ns that its transfers took."""
        chunk = self._chunks.pop(0)
        if not chunk.layers:
            return chunk.ns
        assert self._target is not None
        table_LS = self.placement.slot_to_expert_LS.copy()
        table_LS[chunk.layers] = self._target.slot_to_expert_LS[chunk.layers]
        old = self.placement
        self.placement = Placement(table_LS, old.num_experts, old.num_ranks, old.rank_to_node)
        self._unbuilt += 1
        every = 1 if isinstance(self.moe, TokenExperts) else -(-(len(self._chunks) + self._unbuilt) // _GROUPS)
        if not self._chunks or self._unbuilt >= every:
            before = self.moe
            self.moe = self._watched(self._build(self.placement, before))
            if isinstance(self.moe, CountExperts | TokenExperts) and isinstance(before, CountExperts | TokenExperts):
                self.moe.guests.most = max(self.moe.guests.most, before.guests.most)
            self._unbuilt = 0
        return chunk.ns

    def _watched(self, moe: MoECost) -> MoECost:
        if isinstance(moe, TokenExperts):
            moe.watched = True
        return moe

    def _counter(self, run: Run) -> Callable[[int, int], FloatArray]:
        """Pairs per expert [L, E] of steps lo..hi of a run that was just priced."""
        if isinstance(self.moe, TokenExperts):
            assert self.moe.last_counts_SLE is not None
            counts_SLE = self.moe.last_counts_SLE
            return lambda lo, hi: counts_SLE[lo:hi].sum(axis=0).astype(np.float64)
        moe = cast(CountExperts, self.moe)
        if isinstance(run.detail, SplitDetail):
            halves = run.detail
            return lambda lo, hi: moe.half_counts(halves, lo, hi)
        detail = cast(BankDetail, run.detail)
        return lambda lo, hi: moe.expert_counts(detail._replace(start=detail.start + lo), hi - lo)


def _progress(cumulative_ns: IntArray, added_ns: IntArray | None) -> FloatArray:
    """ns of undisturbed transfer that fit into steps so far, [S]: `added_ns`, by which they are longer, is exchange
    that shared the links half and half, as long again without it; so transfers lose as much as they took."""
    return np.asarray(cumulative_ns if added_ns is None else cumulative_ns - added_ns, np.float64)


class _Loads:
    """Loads of the steps that ran, by step, over the last `window` ones."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._ticks: list[int] = []
        self._runs: list[tuple[int, Callable[[int, int], FloatArray]]] = []

    def record(self, tick: int, steps: int, counter: Callable[[int, int], FloatArray]) -> None:
        """A run from step `tick` on; what was recorded from there on did not happen."""
        keep = bisect.bisect_left(self._ticks, tick)
        old = bisect.bisect_right(self._ticks, tick - self._window) - 1
        first = max(old, 0)
        self._ticks = [*self._ticks[first:keep], tick]
        self._runs = [*self._runs[first:keep], (steps, counter)]

    def sum(self, tick: int) -> FloatArray:
        """Pairs per expert [L, E] in the window before step `tick`; zeros where nothing ran."""
        total: FloatArray | None = None
        ends = [*self._ticks[1:], tick]
        for start, end, (steps, counter) in zip(self._ticks, ends, self._runs, strict=True):
            lo, hi = max(tick - self._window - start, 0), min(end - start, steps)
            if lo < hi:
                part = counter(lo, hi)
                total = part if total is None else total + part
        return np.zeros((1, 1)) if total is None else total
