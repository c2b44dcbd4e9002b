"""Replica counts and packing with the least largest load, by CP-SAT where a gap to the bound is left.

For every layer: EPLB's replica counts, replicas heaviest first and exchanged; then a bound (the mean load, and the
largest load of a replica, least possible by giving replicas where load / replicas is largest: DeepSeek's EPLB); where
they differ, the solver (`packing`). Above a size the counts stay EPLB's and the solver packs alone.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.arrays import FloatArray, IntArray
from moesim.errors import BadInput
from moesim.placement import EMPTY, Placement, PlacementContext, check_weights, slot_count
from moesim.placement.crossings import contiguous_ranks, descend, load_shares
from moesim.placement.eplb import replicate
from moesim.spec import Spec
from moesim_tuner.placement.packing import solved
from moesim_tuner.placement.solution import Part, Solution, joint_status, part_of

__all__ = ["Policy"]

_MOST_CELLS = 6_000
"""(expert, count, rank) triples of the whole programme; above, counts are fixed"""
_MOST_PACKED = 40_000


class Policy(Spec):
    """num_redundant_experts: slots beyond one an expert, all filled. uneven: ranks need not divide the slots; a rank
    then holds at most as many as the fullest must, and some stay empty. Copies of an expert share its load evenly and
    may share a rank.

    tolerance: gaps up to this share of the load are left. deterministic_time: the solver's, a layer (a unit took
    1 to 9 seconds).
    """

    exact: ClassVar[bool] = True

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    uneven: bool = False
    tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-4
    deterministic_time: Annotated[float, Field(gt=0, le=1e6)] = 2.0

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`."""
        return self.solve(weight_LE, ctx).placement

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> FloatArray:
        """Largest over mean rank load, [L]."""
        return placement.balance(check_weights(weight_LE))

    def solve(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Solution:
        """The placement; objective and bound are largest over mean load, mean over layers; parts: the layers.

        Raises BadInput without OR-Tools (where it is needed), and where there are fewer slots than ranks.
        """
        weight_LE = check_weights(weight_LE)
        share_LE, (layers, experts) = load_shares(weight_LE), weight_LE.shape
        slots, ranks = experts + self.num_redundant_experts, ctx.num_ranks
        if not self.uneven:
            slot_count(experts, self.num_redundant_experts, ranks)
        if slots < ranks:
            raise BadInput(
                f"every rank needs an expert: experts={experts} + num_redundant_experts={self.num_redundant_experts}"
                f" = {slots} slots, ranks={ranks}. Use num_redundant_experts = {ranks - experts} or more."
            )
        room = -(-slots // ranks)
        table_LS = np.full((layers, ranks * room), EMPTY, np.int64)
        parts: list[Part] = []
        for layer in range(layers):
            packed, part = self._layer(f"layer {layer}", share_LE[layer], slots, ranks)
            for rank in range(ranks):
                held = np.sort(packed.expert_S[packed.rank_S == rank])
                table_LS[layer, rank * room : rank * room + len(held)] = held
            parts.append(part)
        value = float(np.mean([p.objective for p in parts])) if parts else 1.0
        bound = float(np.mean([p.bound for p in parts])) if parts else 1.0
        return Solution(ctx.placement(table_LS, experts), value, bound, joint_status(parts), tuple(parts))

    def _layer(self, name: str, share_E: FloatArray, slots: int, ranks: int) -> tuple[_Packed, Part]:
        packed, largest = _greedy(share_E, slots, ranks)
        value = packed.largest(share_E, ranks) * ranks
        bound = max(1.0, largest * ranks)
        if value <= bound * (1 + self.tolerance):
            return packed, part_of(name, value, bound)
        experts = len(share_E)
        most = slots - experts + 1
        everything = experts * most * ranks <= _MOST_CELLS
        if not everything and slots * ranks > _MOST_PACKED:
            return packed, part_of(name, value, bound, "too_large")
        count_E = np.bincount(packed.expert_S, minlength=experts)
        counts = [range(1, most + 1) if everything else range(c, c + 1) for c in count_E.tolist()]
        hint_EG = np.zeros((experts, ranks), np.int64)
        np.add.at(hint_EG, (packed.expert_S, packed.rank_S), 1)
        held_EG, proven = solved(share_E, hint_EG, counts, (0, -(-slots // ranks)), self.deterministic_time)
        found = _Packed(*(np.repeat(at, held_EG.ravel()) for at in np.indices(held_EG.shape).reshape(2, -1)))
        if found.largest(share_E, ranks) * ranks < value:
            packed, value = found, found.largest(share_E, ranks) * ranks
        return packed, part_of(name, value, max(bound, proven * ranks) if everything else bound)


class _Packed(NamedTuple):
    """Copies of experts and the rank of each, [S]."""

    expert_S: IntArray
    rank_S: IntArray

    def largest(self, share_E: FloatArray, ranks: int) -> float:
        """Load of the fullest rank."""
        each_E = share_E / np.maximum(np.bincount(self.expert_S, minlength=len(share_E)), 1)
        return float(np.bincount(self.rank_S, weights=each_E[self.expert_S], minlength=ranks).max())


def _greedy(share_E: FloatArray, slots: int, ranks: int) -> tuple[_Packed, float]:
    """EPLB's counts, packed; and the largest load of a copy, which no counts can lower."""
    expert_RS, count_RE = replicate(share_E[None], slots)
    expert_S = np.asarray(expert_RS[0], np.int64)
    load_S = (share_E / count_RE[0])[expert_S]
    order = np.argsort(-load_S, kind="stable")
    turn = contiguous_ranks(1, slots, ranks)[0]  # how many each rank gets; dealt there and back, heaviest first
    size_G = np.bincount(turn, minlength=ranks)
    dealt = [g for r in range(int(size_G.max())) for g in np.flatnonzero(size_G > r)[:: 1 if r % 2 else -1].tolist()]
    rank_S = np.empty(slots, np.int64)
    rank_S[order] = dealt
    rank_S = descend(rank_S, np.zeros((slots, ranks)), load_S, 1.0)
    return _Packed(expert_S, _lower_peak(rank_S, load_S, ranks)), float(load_S.max())


def _lower_peak(rank_S: IntArray, load_S: FloatArray, ranks: int) -> IntArray:
    """Exchange a copy of the fullest rank for one elsewhere as long as both ranks end below its load."""
    rank_S = rank_S.copy()
    load_G = np.bincount(rank_S, weights=load_S, minlength=ranks)
    for _ in range(1000):
        full = int(load_G.argmax())
        mine, other = np.flatnonzero(rank_S == full), np.flatnonzero(rank_S != full)
        if not len(other):
            break
        lighter = load_S[mine][:, None] - load_S[other]
        peak = np.maximum(load_G[full] - lighter, load_G[rank_S[other]] + lighter)
        one, two = divmod(int(peak.argmin()), len(other))
        if peak[one, two] >= load_G[full] - 1e-12:
            break
        i, j = mine[one], other[two]
        load_G[full] -= lighter[one, two]
        load_G[rank_S[j]] += lighter[one, two]
        rank_S[i], rank_S[j] = rank_S[j], rank_S[i]
    return rank_S
