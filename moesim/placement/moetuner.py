"""MoETuner's placement (Go and Mahajan, arXiv:2502.06643) without a solver: balanced clusters, then clusters to ranks.

Stage 1, layer by layer: clusters of experts, one a rank, with the least sum of |load - mean load|. Stage 2: clusters to
ranks, one each a layer, with the least sum over layers of the dearest pair of ranks, tokens that go from the one to the
other times the price of their link. The paper gives both to an integer solver, as `moetuner_ilp` of the tuner does;
here stage 1 packs heaviest first and exchanges pairs, and stage 2 goes layer by layer there and back. Up to 5 ranks
stage 2 is exact, over all orders. So it is where all links cost the same: only which cluster follows which on a rank
matters, the dearest flows go first, and the first one that finds its rank taken is the least possible maximum.

Ours: clusters of equal size (the paper lets them differ, as long as each rank holds as many experts over all layers;
engines load equally many a layer), prices of links as told by the deployment, and ties, which go to fewer crossings.
"""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from moesim.arrays import FloatArray, IntArray
from moesim.placement import Placement, PlacementContext, check_weights
from moesim.placement.crossings import (
    FAR_COST,
    NEAR_COST,
    bin_loads,
    check_sizes,
    contiguous_ranks,
    descend,
    distance,
    load_shares,
    placement_of,
    rank_of,
    transitions,
)
from moesim.placement.eplb import pack
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Policy", "cluster_flows", "clusters", "dearest", "deviation", "link_prices", "to_ranks"]

_GAIN = 1e-12
_TIE = 1e-6
"""weight of all crossings beside the dearest ones: decides between equals alone"""
_ALL_ORDERS = 5
"""ranks up to which all orders of clusters are looked at"""


class Policy(Spec):
    """far_cost: price of a token's way between nodes over that inside one; None: by the deployment's links (2 where
    nobody told them). starts: drawn ones of stage 2. uneven: where ranks do not divide the experts, some have an
    empty slot; false refuses that. No expert is replicated."""

    uses_sample: ClassVar[bool] = True

    far_cost: Annotated[float, Field(gt=0, le=1e6)] | None = None
    starts: Annotated[int, Field(ge=0, le=1000)] = 16
    uneven: bool = True

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. Without a sample of tokens, layers count as independent."""
        weight_LE = check_weights(weight_LE)
        check_sizes(weight_LE.shape[1], ctx, self.uneven)
        cluster_LE = clusters(load_shares(weight_LE), ctx.num_ranks)
        flow_LCC = cluster_flows(transitions(weight_LE, ctx), cluster_LE, ctx.num_ranks)
        rank_LC = to_ranks(flow_LCC, link_prices(ctx, self.far_cost), len(weight_LE), self.starts)
        return placement_of(np.take_along_axis(rank_LC, cluster_LE, axis=1), ctx)

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> FloatArray:
        """Stage 1's, which comes first: sum over ranks of |load / mean - 1| by layer, [L]. Stage 2's: `dearest`."""
        return deviation(load_shares(check_weights(weight_LE)), rank_of(placement), ctx.num_ranks)


def link_prices(ctx: PlacementContext, far_cost: float | None) -> FloatArray:
    """Price of a token's way from rank to rank, 1 inside a node: [G, G]."""
    if far_cost is None:
        costs = ctx.costs
        far_cost = FAR_COST if costs is None else costs.near_bytes_per_ns / max(costs.far_bytes_per_ns, 1e-12)
    return distance(ctx, NEAR_COST, far_cost)


# ------------------------------------------------------------------------------------------- stage 1


def deviation(share_LE: FloatArray, cluster_LE: IntArray, bins: int) -> FloatArray:
    """Sum over clusters of |load / mean - 1|, [L]: arXiv:2502.06643, first ILP's objective, over the mean."""
    return np.asarray(np.abs(bin_loads(share_LE, cluster_LE, bins) * bins - 1.0).sum(axis=1))


def clusters(share_LE: FloatArray, bins: int) -> IntArray:
    """The cluster of each expert, equally many in each, with evenly spread loads: [L, E]. Never worse than experts in
    order."""
    layers, experts = share_LE.shape
    starts = [contiguous_ranks(layers, experts, bins)]
    if experts % bins == 0:
        order_LE = pack(share_LE, bins)
        packed_LE = np.empty((layers, experts), np.int64)
        np.put_along_axis(packed_LE, order_LE, starts[0], axis=1)
        starts.append(packed_LE)
    out = starts[0].copy()
    nothing = np.zeros((experts, bins))
    for layer in range(layers):
        share_LE1 = share_LE[layer : layer + 1]
        even = [descend(start[layer], nothing, share_LE[layer], 1.0) for start in starts]
        found = [starts[0][layer], *(_exchange(bin_E, share_LE[layer], bins) for bin_E in even)]
        out[layer] = min(found, key=lambda bin_E: deviation(share_LE1, bin_E[None], bins)[0])
    return out


def _exchange(bin_E: IntArray, share_E: FloatArray, bins: int) -> IntArray:
    """Exchange pairs while the sum of |load - mean| falls."""
    bin_E, mean = bin_E.copy(), share_E.sum() / bins
    load_G = np.bincount(bin_E, weights=share_E, minlength=bins)
    lighter_EE = share_E[:, None] - share_E
    for _ in range(10_000):
        off_E = load_G[bin_E] - mean
        now = np.abs(off_E)[:, None] + np.abs(off_E)
        then = np.abs(off_E[:, None] - lighter_EE) + np.abs(off_E[None, :] + lighter_EE)
        gain = np.where(bin_E[:, None] == bin_E, 0.0, then - now)
        one, other = divmod(int(gain.argmin()), len(bin_E))
        if gain[one, other] >= -_GAIN:
            break
        load_G[bin_E[one]] -= lighter_EE[one, other]
        load_G[bin_E[other]] += lighter_EE[one, other]
        bin_E[one], bin_E[other] = bin_E[other], bin_E[one]
    return bin_E


# ------------------------------------------------------------------------------------------- stage 2


def cluster_flows(share_LEE: FloatArray, cluster_LE: IntArray, bins: int) -> FloatArray:
    """Transitions from cluster to cluster of the next layer: [L - 1, C, C]."""
    one_hot = (cluster_LE[:, :, None] == np.arange(bins)).astype(np.float64)
    flow: FloatArray = one_hot[:-1].transpose(0, 2, 1) @ share_LEE @ one_hot[1:]
    return flow


def dearest(flow_LCC: FloatArray, rank_LC: IntArray, price_GG: FloatArray) -> float:
    """Sum over layers of the dearest pair of different ranks (arXiv:2502.06643, objective of the second ILP).

    Flows are shares of all transitions, prices as of `link_prices`.
    """
    total = 0.0
    for layer, flow_CC in enumerate(flow_LCC):
        total += float((flow_CC * price_GG[rank_LC[layer]][:, rank_LC[layer + 1]]).max(initial=0.0))
    return total


def to_ranks(flow_LCC: FloatArray, price_GG: FloatArray, layers: int, starts: int) -> IntArray:
    """The rank of each cluster, one each a layer: [L, C]."""
    bins = len(price_GG)
    away = price_GG[~np.eye(bins, dtype=bool)]
    if bins == 1 or not layers:
        return np.zeros((layers, bins), np.int64)
    if (away == away[0]).all():
        return _followed(flow_LCC, layers)
    if bins <= _ALL_ORDERS:
        return _over_orders(flow_LCC, price_GG, layers)

    def value(rank_LC: IntArray) -> float:
        return dearest(flow_LCC, rank_LC, price_GG)

    first = [np.broadcast_to(np.arange(bins), (layers, bins)).copy(), _followed(flow_LCC, layers)]
    for start in range(starts):
        rng = generator(0, "placement/moetuner", start)
        first.append(np.stack([rng.permutation(bins) for _ in range(layers)]))
    best = min((_sweep(rank_LC, flow_LCC, price_GG) for rank_LC in first), key=value)
    while True:
        again = _sweep(best, flow_LCC, price_GG)
        if value(again) >= value(best) - _GAIN:
            return best
        best = again


def _followed(flow_LCC: FloatArray, layers: int) -> IntArray:
    """Each cluster on the rank of the one that it follows: exact where all links cost the same."""
    bins = flow_LCC.shape[1]
    rank_LC = np.empty((layers, bins), np.int64)
    rank_LC[0] = np.arange(bins)
    for layer, flow_CC in enumerate(flow_LCC):
        rank_LC[layer + 1, _matched(flow_CC)] = rank_LC[layer]
    return rank_LC


def _over_orders(flow_LCC: FloatArray, price_GG: FloatArray, layers: int) -> IntArray:
    """The exact minimum, over all orders of the clusters in every layer (Viterbi's algorithm)."""
    order_PC = np.array(list(itertools.permutations(range(len(price_GG)))))
    price_PQCC = price_GG[order_PC[:, None, :, None], order_PC[None, :, None, :]]
    value_P = np.zeros(len(order_PC))
    before = []
    for flow_CC in flow_LCC:
        cost_PQCC = price_PQCC * flow_CC
        cost_PQ = value_P[:, None] + cost_PQCC.max(axis=(2, 3)) + _TIE * cost_PQCC.sum(axis=(2, 3))
        before.append(cost_PQ.argmin(axis=0))
        value_P = cost_PQ.min(axis=0)
    rank_LC = np.empty((layers, len(price_GG)), np.int64)
    last = int(value_P.argmin())
    for layer in range(layers - 1, -1, -1):
        rank_LC[layer] = order_PC[last]
        last = int(before[layer - 1][last]) if layer else last
    return rank_LC


def _matched(flow_CC: FloatArray) -> IntArray:
    """The next layer's cluster that stays with each: the largest flows as long as they do not meet, then most of the
    rest. [C]"""
    bins = len(flow_CC)
    follower_C = np.full(bins, -1, np.int64)
    for flat in np.argsort(-flow_CC, axis=None, kind="stable").tolist():
        one, other = divmod(flat, bins)
        if follower_C[one] >= 0 or other in follower_C:
            break
        follower_C[one] = other
    rows = np.flatnonzero(follower_C < 0)
    columns = np.setdiff1d(np.arange(bins), follower_C)
    row, column = linear_sum_assignment(flow_CC[np.ix_(rows, columns)], maximize=True)
    follower_C[rows[row]] = columns[column]
    return follower_C


def _sweep(rank_LC: IntArray, flow_LCC: FloatArray, price_GG: FloatArray) -> IntArray:
    """Every layer in turn, there and back, for its neighbours as they are."""
    rank_LC = rank_LC.copy()
    layers, bins = rank_LC.shape
    for layer in (*range(layers), *range(layers - 2, -1, -1)):
        entering_CG = leaving_CG = crossing_CG = np.zeros((bins, bins))
        if layer:
            cost = flow_LCC[layer - 1][:, :, None] * price_GG[rank_LC[layer - 1]][:, None, :]
            entering_CG, crossing_CG = cost.max(axis=0), cost.sum(axis=0)
        if layer + 1 < layers:
            cost = flow_LCC[layer][:, :, None] * price_GG[rank_LC[layer + 1]][None, :, :]
            leaving_CG, crossing_CG = cost.max(axis=1), crossing_CG + cost.sum(axis=1)
        parts = (entering_CG, leaving_CG, crossing_CG * _TIE)
        rank_LC[layer] = _reassign(rank_LC[layer], *parts)
    return rank_LC


def _reassign(rank_C: IntArray, entering_CG: FloatArray, leaving_CG: FloatArray, tie_CG: FloatArray) -> IntArray:
    """Minimise max entering + max leaving + sum of ties, from the given ranks and from those least in eighth powers."""
    each = np.arange(len(rank_C))

    def value(rank_C: IntArray) -> float:
        largest = entering_CG[each, rank_C].max() + leaving_CG[each, rank_C].max()
        return float(largest + tie_CG[each, rank_C].sum())

    power = sum((part / max(part.max(), 1e-300)) ** 8 * part.max() for part in (entering_CG, leaving_CG))
    guess_C = np.asarray(linear_sum_assignment(power + tie_CG)[1], np.int64)
    found = [_exchange_ranks(start, entering_CG, leaving_CG, tie_CG) for start in (rank_C, guess_C)]
    best = min(found, key=value)
    return best if value(best) < value(rank_C) - _GAIN else rank_C


def _exchange_ranks(rank_C: IntArray, entering_CG: FloatArray, leaving_CG: FloatArray, tie_CG: FloatArray) -> IntArray:
    """Exchange the ranks of two clusters, the pair that gains most first, until none gains."""
    rank_C, each = rank_C.copy(), np.arange(len(rank_C))
    for _ in range(1000):
        tie = tie_CG[:, rank_C]
        gain = tie + tie.T - np.diag(tie)[:, None] - np.diag(tie)
        for part_CG in (entering_CG, leaving_CG):
            part = part_CG[:, rank_C]
            here = np.diag(part)
            gain += np.maximum(np.maximum(part, part.T), _largest_but(here)) - here.max()
        np.fill_diagonal(gain, 0.0)
        one, other = divmod(int(gain.argmin()), len(each))
        if gain[one, other] >= -_GAIN:
            break
        rank_C[one], rank_C[other] = rank_C[other], rank_C[one]
    return rank_C


def _largest_but(value_C: FloatArray) -> FloatArray:
    """The largest value apart from those of two: [C, C]; 0 where no others are."""
    top = np.argsort(-value_C, kind="stable")[:3]
    first, second, third = (*value_C[top], 0.0, 0.0)[:3]
    each = np.arange(len(value_C))
    not_first = (each != top[0])[:, None] & (each != top[0])
    not_second = (each != top[1])[:, None] & (each != top[1])
    largest: FloatArray = np.where(not_first, first, np.where(not_second, second, third))
    return largest
