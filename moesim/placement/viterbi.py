"""The exact minimum of crossings, over all assignments of equal size in every layer (Viterbi's algorithm).

A state is an assignment of a layer's experts to ranks; the cheapest way to each state of a layer follows from those of
the layer before. An oracle for small cases: 8 experts on 4 ranks have 2,520 states, 16 on 2 have 12,870. Renaming
ranks that are alike changes no cost, so that costs are worked out for one state of each class and all before it.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.arrays import FloatArray, IntArray
from moesim.errors import BadInput
from moesim.placement import Placement, PlacementContext, check_weights
from moesim.placement.crossings import (
    FAR_COST,
    NEAR_COST,
    check_sizes,
    crossing_cost,
    crossing_rows,
    distance,
    load_shares,
    placement_of,
    rank_of,
    spread,
    transitions,
)
from moesim.spec import Spec

__all__ = ["MAX_STATES", "Policy", "state_count"]

MAX_STATES = 20_000
_CELLS = 1 << 23
"""pairs of states looked at together"""


class Policy(Spec):
    """balance_weight: as of `affinity`, 0 by default: crossings alone. near_cost, far_cost: of a crossing inside a node
    and between nodes. uneven: where ranks do not divide the experts, some have an empty slot; false
    refuses that. Exact for the sum of both."""

    uses_sample: ClassVar[bool] = True

    exact: ClassVar[bool] = True

    balance_weight: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    near_cost: Annotated[float, Field(gt=0, le=1e6)] = NEAR_COST
    far_cost: Annotated[float, Field(gt=0, le=1e6)] = FAR_COST
    uneven: bool = True

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. Raises BadInput above MAX_STATES assignments a layer."""
        weight_LE = check_weights(weight_LE)
        layers, experts = weight_LE.shape
        check_sizes(experts, ctx, self.uneven)
        count = state_count(experts, ctx.num_ranks)
        if count > MAX_STATES:
            raise BadInput(
                f"viterbi looks at every assignment of a layer's experts to ranks, and {experts} experts on"
                f" {ctx.num_ranks} ranks have {count:,} of them (at most {MAX_STATES:,}). Use affinity, which comes"
                " near, or exflow_ip of the tuner, which proves a bound."
            )
        if not layers:
            return placement_of(np.zeros((0, experts), np.int64), ctx)
        cost_GG = distance(ctx, self.near_cost, self.far_cost)
        states = _states(experts, ctx.num_ranks, ctx.rank_to_node)
        own_LS = np.zeros((layers, count))
        if self.balance_weight:
            own_LS = _own_cost(states.rank_SE, load_shares(weight_LE), ctx.num_ranks) * self.balance_weight
        return placement_of(_cheapest(states, transitions(weight_LE, ctx), own_LS, cost_GG), ctx)

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> float:
        """What `place` minimises: mean cost of a transition + balance_weight * variance of the loads."""
        weight_LE = check_weights(weight_LE)
        rank_LE = rank_of(placement)
        crossing = crossing_cost(transitions(weight_LE, ctx), rank_LE, distance(ctx, self.near_cost, self.far_cost))
        return crossing + self.balance_weight * spread(load_shares(weight_LE), rank_LE, ctx.num_ranks)


def state_count(experts: int, ranks: int) -> int:
    """Assignments of experts to ranks with equally many each (one more on some where ranks do not divide them)."""
    size, more = divmod(experts, ranks)
    orders = math.factorial(experts) // (math.factorial(size) ** (ranks - more) * math.factorial(size + 1) ** more)
    return int(orders * math.comb(ranks, more))


class _States(NamedTuple):
    """rank_SE: all assignments [S, E]. kind_S: the class of each, whose representative is state_K[kind]; rename_S: row
    of `rename_PG` [P, G] that makes a state of its representative."""

    rank_SE: IntArray
    kind_S: IntArray
    state_K: IntArray
    rename_S: IntArray
    rename_PG: IntArray


@lru_cache(maxsize=8)
def _states(experts: int, ranks: int, node_G: tuple[int, ...]) -> _States:
    rank_SE = _assignments(experts, ranks)
    rename_PG = _renamings(ranks, node_G)
    key = ranks ** np.arange(experts, dtype=np.int64)
    number_S = rank_SE @ key
    place = {int(n): s for s, n in enumerate(number_S)}
    kind_S = np.full(len(rank_SE), -1, np.int64)
    rename_S = np.zeros(len(rank_SE), np.int64)
    state_K: list[int] = []
    for state in range(len(rank_SE)):
        if kind_S[state] >= 0:
            continue
        renamed = [place[int(n)] for n in rename_PG[:, rank_SE[state]] @ key]
        for rename in range(len(rename_PG) - 1, -1, -1):  # the identity, row 0, has the last word
            kind_S[renamed[rename]] = len(state_K)
            rename_S[renamed[rename]] = rename
        state_K.append(state)
    return _States(rank_SE, kind_S, np.array(state_K), rename_S, rename_PG)


def _assignments(experts: int, ranks: int) -> IntArray:
    """All of `state_count`, in lexicographic order: [S, E]."""
    size, more = divmod(experts, ranks)
    rows = [np.zeros((1, 0), np.int64)]
    left = [np.zeros((1, ranks), np.int64)]
    for _ in range(experts):
        rank_SE, count_SG = rows.pop(), left.pop()
        state, rank = np.nonzero(count_SG < size + (more > 0))
        rank_SE = np.concatenate([rank_SE[state], rank[:, None]], axis=1)
        count_SG = count_SG[state]
        count_SG[np.arange(len(rank)), rank] += 1
        keep = (count_SG > size).sum(axis=1) <= more
        rows.append(rank_SE[keep])
        left.append(count_SG[keep])
    full = (left[0] >= size).all(axis=1)
    return rows[0][full]


def _renamings(ranks: int, node_G: tuple[int, ...]) -> IntArray:
    """Permutations of ranks that keep who shares a node, the identity first: [P, G] (alone above 6 ranks)."""
    if ranks > 6:
        return np.arange(ranks)[None]
    node = np.array(node_G)
    together = node[:, None] == node
    every = np.array(list(itertools.permutations(range(ranks))))
    keep = [bool((together[p][:, p] == together).all()) for p in every]
    return every[keep]


def _own_cost(rank_SE: IntArray, share_LE: FloatArray, ranks: int) -> FloatArray:
    """Variance of the rank loads of every state in every layer, over the number of layers: [L, S]."""
    square = np.zeros((len(share_LE), len(rank_SE)))
    for rank in range(ranks):
        square += (share_LE @ (rank_SE == rank).T.astype(np.float64)) ** 2
    own: FloatArray = (square * ranks - 1.0) / len(share_LE)
    return own


def _cheapest(states: _States, share_LEE: FloatArray, own_LS: FloatArray, cost_GG: FloatArray) -> IntArray:
    """Viterbi: the cheapest sequence of states, as ranks [L, E]."""
    rank_SE, kind_S, state_K, rename_S, rename_PG = states
    layers, ranks, experts = len(own_LS), len(cost_GG), rank_SE.shape[1]
    here_K = (rank_SE[state_K][:, :, None] == np.arange(ranks)).reshape(len(state_K), experts * ranks)
    here_K = here_K.astype(np.float64)
    value_K = own_LS[0, state_K]
    before: list[IntArray] = []
    chunk = max(1, _CELLS // len(state_K))
    for layer in range(1, layers):
        best_K, from_K = np.full(len(state_K), np.inf), np.zeros(len(state_K), np.int64)
        for lo in range(0, len(rank_SE), chunk):
            part = slice(lo, lo + chunk)
            cost_SK = crossing_rows(rank_SE[part], share_LEE[layer - 1], cost_GG) @ here_K.T
            cost_SK += value_K[kind_S[part], None]
            row_K = cost_SK.argmin(axis=0)
            least_K = cost_SK[row_K, np.arange(len(state_K))]
            better = least_K < best_K
            best_K[better], from_K[better] = least_K[better], row_K[better] + lo
        value_K = best_K + own_LS[layer, state_K]
        before.append(from_K)
    # backwards: a state's forerunner is its representative's, renamed as the state is
    out = np.empty((layers, experts), np.int64)
    kind, rename = int(value_K.argmin()), np.arange(ranks)
    for layer in range(layers - 1, -1, -1):
        out[layer] = rename[rank_SE[state_K[kind]]]
        if layer:
            state = int(before[layer - 1][kind])
            rename = rename[rename_PG[rename_S[state]]]
            kind = int(kind_S[state])
    return out
