"""The least largest rank load, with a proof of how far from it the map is: greedy first, bound next, a solver last.

Every step takes only the layers whose gap to the proven bound is above the tolerance:

1. EPLB's map and swaps of slots; the bound by counting (`moesim.placement.bound`).
2. Other replica counts to start from: fewer spare slots for the heaviest experts, the rest to the lightest, so that
   ranks of a heavy copy are filled up with little (`starts`); swaps, then kicks out of local optima.
3. Small layers: all replica counts and all packings (`exhaust`).
4. The bound of the linear programme over rank patterns (`configuration`), and a search from the replica counts that it
   suggests.
5. CP-SAT, where its model is small enough (`packing`), with the map so far as a complete hint.

All steps are limited in work, none in seconds, so that the same input gives the same map.

Legend: L layers, E experts, S slots, G ranks.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.arrays import FloatArray, IntArray
from moesim.placement import EMPTY, Placement, PlacementContext, check_weights, initial_map, slot_count
from moesim.placement.bound import balance_bound
from moesim.placement.search import improve
from moesim.spec import Spec
from moesim_tuner.placement import starts
from moesim_tuner.placement.configuration import Patterns
from moesim_tuner.placement.exhaust import exhaust, small
from moesim_tuner.placement.packing import held_of, solved, table_of
from moesim_tuner.placement.pairs import fits, pair_counts, paired
from moesim_tuner.placement.solution import Part, Solution, Status, joint_status, part_of

__all__ = ["Policy"]

_SAME = 1e-10
"""values that differ by less are the same"""
_KICKS = 20
_MORE_KICKS = 60
_NEAR = 1e-3
"""gaps below are closed faster by kicks than by other starts"""
_WIDE = 4e-3
"""gaps below are left to the search: the programme over patterns rounds loads down by nearly as much"""
_MOST_CELLS = 6_000
"""(expert, count, rank) triples of CP-SAT's model; above, it is not asked"""
_PROGRAMMES = 9
"""linear programmes for a layer, at most"""
_GUIDES = 2
"""of the replica counts that they suggest, so many are tried"""


class Policy(Spec):
    """num_redundant_experts: slots beyond one an expert, all filled. Copies of an expert share its load evenly and may
    share a rank. uneven: ranks need not divide the slots; they then hold S // G experts or one more, which moesim
    simulates and engines refuse.

    tolerance: gaps to the proven bound up to this share are left. deterministic_time: CP-SAT's, a layer (a unit takes 1
    to 9 seconds); 0: it is not asked.
    """

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    uneven: bool = True
    tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-4
    deterministic_time: Annotated[float, Field(ge=0, le=1e6)] = 1.0

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`."""
        return self.solve(weight_LE, ctx).placement

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> FloatArray:
        """Largest over mean rank load, [L]."""
        return placement.balance(check_weights(weight_LE))

    def solve(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Solution:
        """The placement; objective and bound are largest over mean load, mean over layers; parts: the layers.

        Raises BadInput where loads are no loads, where ranks must divide the slots and do not, and without OR-Tools
        where it is needed.
        """
        weight_LE = check_weights(weight_LE)
        layers, experts = weight_LE.shape
        slots = experts + self.num_redundant_experts
        if not self.uneven:
            slot_count(experts, self.num_redundant_experts, ctx.num_ranks)
        idle_L = weight_LE.max(axis=1, initial=0.0) <= 0
        work = _Layers(_shares(weight_LE, ctx.num_ranks), slots, ctx, self.tolerance)
        work.search()
        work.try_all()
        work.programmes()
        asked = work.ask(self.deterministic_time)
        work.value_L[idle_L] = work.bound_L[idle_L] = 1.0  # as `Placement.balance` has it
        parts = tuple(work.part(layer, layer in asked) for layer in range(layers))
        value, bound = (
            float(np.mean([getattr(p, n) for p in parts])) if parts else 1.0 for n in ("objective", "bound")
        )
        return Solution(
            ctx.placement(_sorted(work.table_LS, ctx.num_ranks), experts), value, bound, joint_status(parts), parts
        )


def _shares(weight_LE: FloatArray, ranks: int) -> FloatArray:
    """Loads in units of the mean rank load; equal ones in a layer without any."""
    most_L = weight_LE.max(axis=1, initial=0.0)
    scaled_LE = np.where((most_L > 0)[:, None], np.ldexp(weight_LE, -np.frexp(most_L)[1][:, None]), 1.0)
    return np.asarray(scaled_LE * (ranks / scaled_LE.sum(axis=1, keepdims=True)))


def _sorted(table_LS: IntArray, ranks: int) -> IntArray:
    """Experts of a rank in order, its empty slot last."""
    last = np.iinfo(np.int64).max
    room = table_LS.shape[1] // ranks
    key_LGQ = np.sort(np.where(table_LS == EMPTY, last, table_LS).reshape(len(table_LS), ranks, room), axis=2)
    return np.where(key_LGQ == last, EMPTY, key_LGQ).reshape(table_LS.shape)


class _Layers:
    """The maps so far and the bounds so far, all in units of the mean rank load."""

    def __init__(self, share_LE: FloatArray, slots: int, ctx: PlacementContext, tolerance: float) -> None:
        self.share_LE, self.slots, self.ctx, self.tolerance = share_LE, slots, ctx, tolerance
        self.ranks = ctx.num_ranks
        self.bound_L = balance_bound(share_LE, slots, self.ranks)
        self.table_LS = np.full((len(share_LE), self.ranks * -(-slots // self.ranks)), EMPTY, np.int64)
        self.value_L = np.full(len(share_LE), np.inf)
        self.linear_programmes = 0

    @property
    def open_L(self) -> IntArray:
        """Layers whose gap is above the tolerance."""
        return np.flatnonzero(self.value_L > self.bound_L * (1 + max(self.tolerance, _SAME)))

    def part(self, layer: int, asked: bool) -> Part:
        """What is known of a layer."""
        near = self.value_L[layer] <= self.bound_L[layer] * (1 + self.tolerance)
        status: Status = "feasible" if asked or near else "too_large"
        return part_of(f"layer {layer}", float(self.value_L[layer]), float(self.bound_L[layer]), status)

    def keep(self, layer_L: IntArray, table_LS: IntArray) -> None:
        """Keep maps of some layers where they are better."""
        value_L = self.ctx.placement(table_LS, self.share_LE.shape[1]).balance(self.share_LE[layer_L])
        better = value_L < self.value_L[layer_L]
        self.table_LS[layer_L[better]] = table_LS[better]
        self.value_L[layer_L[better]] = value_L[better]

    def improve(self, kicks: int) -> None:
        """Local search from the maps so far."""
        left = self.open_L
        if len(left):
            bound_L = self.bound_L[left]
            self.keep(left, improve(self.share_LE[left], self.table_LS[left], self.ranks, kicks, bound_L))

    def search(self) -> None:
        """Steps 1 and 2."""
        if self.slots % self.ranks == 0:
            plain_S = initial_map(self.share_LE.shape[1], self.slots).astype(np.int64)
            self.keep(np.arange(len(self.share_LE)), np.tile(plain_S, (len(self.share_LE), 1)))
        for number, part in enumerate(starts.PARTS):
            left = self.open_L
            if not len(left):
                return
            if number == 1 and small(self.share_LE.shape[1], self.slots, self.ranks):
                self.try_all()
                left = self.open_L
            if number:
                left = left[self.value_L[left] > self.bound_L[left] * (1 + _NEAR)]
            if not len(left):
                break
            count_LE = starts.counts(self.share_LE[left], self.slots, self.ranks, self.bound_L[left], part)
            table_LS = starts.pack_counts(self.share_LE[left], count_LE, self.ranks)
            self.keep(left, improve(self.share_LE[left], table_LS, self.ranks, 0, self.bound_L[left]))
        if fits(self.slots, self.ranks):
            for layer in self.open_L.tolist():
                self.pair(layer, np.bincount(self.table_LS[layer][self.table_LS[layer] != EMPTY]))
        self.improve(_KICKS)

    def pair(self, layer: int, count_E: IntArray) -> None:
        """The search of replica counts alone."""
        share_E = self.share_LE[layer]
        count_E = pair_counts(share_E, count_E, self.ranks)
        self.keep(np.array([layer]), paired(share_E, count_E, self.ranks)[None])

    def try_all(self) -> None:
        """Step 3."""
        for layer in self.open_L.tolist():
            found = exhaust(self.share_LE[layer], self.slots, self.ranks, float(self.value_L[layer]))
            if found is None:
                continue
            if found.table_S is not None:
                self.keep(np.array([layer]), found.table_S[None])
            self.bound_L[layer] = max(self.bound_L[layer], self.value_L[layer] * (1 - 0.1 * _SAME))

    def programmes(self) -> None:
        """Step 4."""
        layers, tables = [], []
        for layer in self.open_L.tolist():
            patterns = Patterns(self.share_LE[layer], self.slots, self.ranks, float(self.value_L[layer]))
            if not patterns.useful or self.value_L[layer] <= self.bound_L[layer] * (1 + _WIDE):
                continue
            self.bound_L[layer] = patterns.bound(float(self.bound_L[layer]), self.tolerance, _PROGRAMMES)
            self.linear_programmes += patterns.rounds
            for share_CR in patterns.fractions[-_GUIDES:]:
                count_E = patterns.counts(share_CR)
                if fits(self.slots, self.ranks):
                    self.pair(layer, count_E)
                    continue
                layers.append(layer)
                tables.append(starts.pack_counts(self.share_LE[[layer]], count_E[None], self.ranks)[0])
        if layers:
            every = np.array(layers)
            found_LS = improve(self.share_LE[every], np.array(tables), self.ranks, _KICKS, self.bound_L[every])
            for turn in range(_GUIDES):  # a layer comes up to so many times, next to each other
                mine = np.array([i for i in range(len(every)) if list(every[:i]).count(every[i]) == turn], np.int64)
                self.keep(every[mine], found_LS[mine])
        self.improve(_MORE_KICKS)

    def ask(self, deterministic_time: float) -> set[int]:
        """Step 5: the layers that CP-SAT was asked about."""
        asked: set[int] = set()
        experts, most = self.share_LE.shape[1], self.slots - self.share_LE.shape[1] + 1
        if not deterministic_time or self.ranks == 1 or experts * most * self.ranks > _MOST_CELLS:
            return asked
        low, more = divmod(self.slots, self.ranks)
        for layer in self.open_L.tolist():
            held_EG, proven = solved(
                self.share_LE[layer],
                held_of(self.table_LS[layer], experts, self.ranks),
                [range(1, most + 1)] * experts,
                (low, low + (more > 0)),
                deterministic_time,
            )
            asked.add(layer)
            self.keep(np.array([layer]), table_of(held_EG, low + (more > 0))[None])
            self.bound_L[layer] = min(max(self.bound_L[layer], proven), self.value_L[layer])
        return asked
