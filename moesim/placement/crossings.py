"""Traffic from layer to layer under an assignment of experts to ranks: what placements by affinity share.

A token that leaves an expert of one layer on one rank and enters an expert of the next on another crosses. An
assignment is `rank_LE`, the rank of each expert, with as many experts on each rank as on the others (where ranks do
not divide the experts, one more on some).

Legend: L MoE layers, E experts, G ranks or other bins, M places (G times the largest number a bin holds).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.errors import BadInput
from moesim.placement import EMPTY, Placement, PlacementContext
from moesim.rng import generator

__all__ = [
    "alternate",
    "better_layer",
    "bin_loads",
    "check_sample",
    "check_sizes",
    "contiguous_ranks",
    "crossing_cost",
    "crossing_rows",
    "descend",
    "distance",
    "load_shares",
    "placement_of",
    "rank_of",
    "spread",
    "transitions",
    "transport",
]

NEAR_COST, FAR_COST = 1.0, 2.0
"""of a crossing inside a node and between nodes: what ExFlow's evaluation counts (arXiv:2401.08383, its code)"""
_GAIN = 1e-12
_SWAPS = 10_000
_LARGE, _KEPT = 1 << 18, 2
"""of transitions [L - 1, E, E] with more entries, only the best starts are improved"""


def load_shares(weight_LE: FloatArray) -> FloatArray:
    """Loads as shares of their layer, each row adding up to 1; equal ones where a layer has no load. [L, E]"""
    scaled = weight_LE / np.maximum(weight_LE.max(axis=1, keepdims=True, initial=0.0), np.finfo(float).tiny)
    total = scaled.sum(axis=1, keepdims=True)
    shares: FloatArray = np.where(total > 0, scaled / np.where(total > 0, total, 1.0), 1.0 / weight_LE.shape[1])
    return shares


def transitions(weight_LE: FloatArray, ctx: PlacementContext) -> FloatArray:
    """Share of all (token, choice, next choice) triples by expert and next expert: [L - 1, E, E], adding up to 1.

    Without a sample of tokens, layers count as independent: what their loads give. Raises BadInput where the sample has
    other layers or experts than the loads.
    """
    check_sample(weight_LE, ctx)
    count = ctx.transition_LEE
    if count is None or not count.any():
        share_LE = load_shares(weight_LE)
        count = share_LE[:-1, :, None] * share_LE[1:, None, :]
    return count / max(float(count.sum()), np.finfo(float).tiny)


def distance(ctx: PlacementContext, near: float = NEAR_COST, far: float = FAR_COST) -> FloatArray:
    """What a crossing costs by the ranks it leaves and enters: 0 on one, `near` on a node, `far` beyond. [G, G]"""
    node_G = np.array(ctx.rank_to_node)
    out = np.where(node_G[:, None] == node_G, near, far).astype(np.float64)
    np.fill_diagonal(out, 0.0)
    return out


def contiguous_ranks(layers: int, experts: int, bins: int) -> IntArray:
    """Experts in order, the first on rank 0; where bins do not divide them, one more on some. [L, E]"""
    return np.broadcast_to(np.arange(experts, dtype=np.int64) * bins // experts, (layers, experts)).copy()


def rank_of(placement: Placement) -> IntArray:
    """The rank of each expert's first slot: [L, E]."""
    return (placement.first_slot_LE // placement.slots_per_rank).astype(np.int64)


def check_sample(weight_LE: FloatArray, ctx: PlacementContext) -> None:
    """Raises BadInput where the sample of tokens, if there is one, has other layers or experts than the loads."""
    layers, experts = weight_LE.shape
    if ctx.sample is None:
        return
    have = (ctx.sample.expert_TLK.shape[1], ctx.sample.num_experts)
    if have != (layers, experts):
        raise BadInput(
            "a placement by affinity follows tokens from layer to layer, so that tokens and loads need the same layers"
            f" and experts: the tokens have {have[0]} layers of {have[1]} experts, the loads {layers} of {experts}."
            " Models whose layers share one set of experts need another placement, such as eplb."
        )


def check_sizes(experts: int, ctx: PlacementContext, uneven: bool) -> None:
    """Raises BadInput where ranks do not divide the experts, unless they need not."""
    if uneven or experts % ctx.num_ranks == 0:
        return
    legal = ", ".join(str(g) for g in range(1, experts + 1) if experts % g == 0)
    raise BadInput(
        "a placement by affinity gives every expert one slot and every rank equally many, so that the ranks must divide"
        f" the experts: experts={experts}, ranks={ctx.num_ranks}. Use {legal} ranks, or set uneven: true, with which"
        " some ranks hold one expert fewer and leave that slot empty."
    )


def placement_of(rank_LE: IntArray, ctx: PlacementContext) -> Placement:
    """The placement of an assignment: experts of a rank in increasing order, empty slots where it holds fewer."""
    layers, experts = rank_LE.shape
    size_LG = np.stack([(rank_LE == g).sum(axis=1) for g in range(ctx.num_ranks)], axis=1)
    room = max(1, -(-experts // ctx.num_ranks), int(size_LG.max(initial=0)))
    table = np.full((layers, ctx.num_ranks * room), EMPTY, np.int32)
    order_LE = np.argsort(rank_LE, axis=1, kind="stable")
    sorted_LE = np.take_along_axis(rank_LE, order_LE, axis=1)
    first_LG = np.cumsum(size_LG, axis=1) - size_LG
    slot_LE = sorted_LE * room + np.arange(experts) - np.take_along_axis(first_LG, sorted_LE, axis=1)
    np.put_along_axis(table, slot_LE, order_LE.astype(np.int32), axis=1)
    return ctx.placement(table, experts)


def crossing_cost(share_LEE: FloatArray, rank_LE: IntArray, cost_GG: FloatArray) -> float:
    """Mean cost of a transition. share_LEE: as of `transitions`; cost_GG: as of `distance`."""
    total = 0.0
    for layer, share_EE in enumerate(share_LEE):
        total += float((share_EE * cost_GG[rank_LE[layer]][:, rank_LE[layer + 1]]).sum())
    return total


def bin_loads(share_LE: FloatArray, rank_LE: IntArray, bins: int) -> FloatArray:
    """Load of each bin, [L, G], from expert loads and the bin of each expert."""
    layers = len(share_LE)
    flat = (np.arange(layers)[:, None] * bins + rank_LE).ravel()
    load: FloatArray = np.bincount(flat, weights=share_LE.ravel(), minlength=layers * bins).astype(np.float64)
    return load.reshape(layers, bins)


def spread(share_LE: FloatArray, rank_LE: IntArray, bins: int) -> float:
    """Variance of the bins' loads over the square of their mean, mean over layers."""
    if not len(share_LE):
        return 0.0
    load_LG = bin_loads(share_LE, rank_LE, bins) * bins
    return float(((load_LG - 1.0) ** 2).mean())


# ------------------------------------------------------------------------------------------- one layer


def transport(cost_EG: FloatArray) -> IntArray:
    """The cheapest assignment of experts to bins of equal size: [E]. Kuhn-Munkres over places (scipy)."""
    experts, bins = cost_EG.shape
    room = -(-experts // bins)
    fillers = room * bins - experts
    if not fillers:
        return np.asarray(linear_sum_assignment(np.repeat(cost_EG, room, axis=1))[1] // room, np.int64)
    # a filler may take the last place of a bin only, so that no bin holds two
    forbidden = 1.0 + 2.0 * experts * float(np.abs(cost_EG).max(initial=0.0))
    cost_MM = np.zeros((room * bins, room * bins))
    cost_MM[:experts] = np.repeat(cost_EG, room, axis=1)
    cost_MM[experts:] = np.where(np.arange(room * bins) % room == room - 1, 0.0, forbidden)
    return np.asarray(linear_sum_assignment(cost_MM)[1][:experts] // room, np.int64)


def layer_cost(rank_E: IntArray, cost_EG: FloatArray, share_E: FloatArray, weight: float) -> float:
    """Cost of one layer's assignment: its linear part, and `weight` times the squared loads (see `descend`)."""
    bins = cost_EG.shape[1]
    load_G = np.bincount(rank_E, weights=share_E, minlength=bins)
    return float(cost_EG[np.arange(len(rank_E)), rank_E].sum() + weight * bins * (load_G**2).sum())


def descend(rank_E: IntArray, cost_EG: FloatArray, share_E: FloatArray, weight: float) -> IntArray:
    """Exchange experts of different bins, the pairs that gain most first, until none gains: [E].

    The cost is sum_e cost[e, rank_e] + weight * G * sum_g load_g^2; with shares that add up to 1 the latter is weight
    times (1 + the variance of the loads over their squared mean). Exchanges made together touch different bins, so that
    each gains what it gains alone.
    """
    experts, bins = cost_EG.shape
    room = -(-experts // bins)
    fillers = room * bins - experts  # stand in the places that stay empty, one a bin at most
    cost = np.concatenate([cost_EG, np.zeros((fillers, bins))])
    share = np.concatenate([share_E, np.zeros(fillers)])
    size_G = np.bincount(rank_E, minlength=bins)
    bin_M = np.concatenate([rank_E, np.flatnonzero(size_G < room)[:fillers]]).astype(np.int64)
    load_G = np.bincount(bin_M, weights=share, minlength=bins)
    each = np.arange(len(bin_M))
    lighter_MM = share[:, None] - share
    filler_M = each >= experts
    for _ in range(_SWAPS):
        there = cost[:, bin_M] - cost[each, bin_M][:, None]
        gain = there + there.T
        if weight:
            load_M = load_G[bin_M]
            gain += (2 * weight * bins) * lighter_MM * (lighter_MM - (load_M[:, None] - load_M))
        if fillers:
            has_filler_G = np.zeros(bins, bool)
            has_filler_G[bin_M[filler_M]] = True
            blocked = filler_M[:, None] & ~filler_M & has_filler_G[bin_M]
            gain[blocked | blocked.T] = np.inf
        partner_M = gain.argmin(axis=1)
        best_M = gain[each, partner_M]
        if best_M.min() >= -_GAIN:
            break
        used_G = np.zeros(bins, bool)
        for one in np.argsort(best_M, kind="stable").tolist():
            other = int(partner_M[one])
            if best_M[one] >= -_GAIN:
                break
            here, away = int(bin_M[one]), int(bin_M[other])
            if used_G[here] or used_G[away]:
                continue
            used_G[here] = used_G[away] = True
            load_G[here] -= lighter_MM[one, other]
            load_G[away] += lighter_MM[one, other]
            bin_M[one], bin_M[other] = away, here
    return bin_M[:experts].copy()


def better_layer(rank_E: IntArray, cost_EG: FloatArray, share_E: FloatArray, weight: float) -> IntArray:
    """A better assignment of one layer for the given neighbours, or the one given."""
    found = [transport(cost_EG)]
    if weight:
        found = [descend(found[0], cost_EG, share_E, weight), descend(rank_E, cost_EG, share_E, weight)]
    best = min(found, key=lambda r: layer_cost(r, cost_EG, share_E, weight))
    gain = layer_cost(rank_E, cost_EG, share_E, weight) - layer_cost(best, cost_EG, share_E, weight)
    return best if gain > _GAIN else rank_E


# ------------------------------------------------------------------------------------------- all layers


def alternate(
    share_LEE: FloatArray,
    share_LE: FloatArray,
    cost_GG: FloatArray,
    weight: float,
    starts: int,
    key: int = 0,
) -> IntArray:
    """Assign layer after layer for the neighbours as they are, forward and backward, until nothing gains: [L, E].

    Minimises the mean cost of a transition + `weight` * `spread`. Starts: experts in order, and `starts` seeded ones
    whose first layer is drawn and whose others follow it; all (of large problems the best two of those drawn) go there
    and back once, then the best goes on. share_LEE: `transitions`, share_LE: loads, rows adding up to 1, cost_GG
    [G, G], symmetric. key: tells draws apart.
    """
    layers, experts = share_LE.shape
    bins = len(cost_GG)
    per_layer = weight / max(layers, 1)

    def cost_EG(rank_LE: IntArray, layer: int, first: bool = True, last: bool = True) -> FloatArray:
        cost = np.zeros((experts, bins))
        if first and layer > 0:
            cost += share_LEE[layer - 1].T @ cost_GG[rank_LE[layer - 1]]
        if last and layer + 1 < layers:
            cost += share_LEE[layer] @ cost_GG[rank_LE[layer + 1]]
        return cost

    def value(rank_LE: IntArray) -> float:
        return crossing_cost(share_LEE, rank_LE, cost_GG) + weight * spread(share_LE, rank_LE, bins)

    def sweep(rank_LE: IntArray) -> IntArray:
        rank_LE = rank_LE.copy()
        for layer in (*range(layers), *range(layers - 2, -1, -1)):
            rank_LE[layer] = better_layer(rank_LE[layer], cost_EG(rank_LE, layer), share_LE[layer], per_layer)
        return rank_LE

    def chained(start: int) -> IntArray:
        rank_LE = np.empty((layers, experts), np.int64)
        order = generator(0, "placement/affinity", key, start).permutation(experts)
        for layer in range(layers):
            if not layer:
                rank_LE[0, order] = contiguous_ranks(1, experts, bins)[0]
            else:
                rank_LE[layer] = transport(cost_EG(rank_LE, layer, last=False))
        return rank_LE

    if not layers or bins == 1:
        return contiguous_ranks(layers, experts, bins)
    drawn = list(map(chained, range(starts)))
    if share_LEE.size > _LARGE:
        drawn = sorted(drawn, key=value)[:_KEPT]
    best = min(map(sweep, (contiguous_ranks(layers, experts, bins), *drawn)), key=value)
    reached = value(best)
    while True:
        best = sweep(best)
        now = value(best)
        if now >= reached - _GAIN:
            return best
        reached = now


def crossing_rows(assignment_SE: AnyArray, share_EE: FloatArray, cost_GG: FloatArray) -> FloatArray:
    """For each of S assignments of a layer, the cost of putting each expert of the next layer on each rank:
    [S, E * G]."""
    states, experts = assignment_SE.shape
    # cost[s, e', g'] = sum_e share[e, e'] * cost[rank_s(e), g']
    by_rank = cost_GG[assignment_SE]
    rows: FloatArray = np.tensordot(by_rank, share_EE, axes=(1, 0)).transpose(0, 2, 1)
    return rows.reshape(states, experts * len(cost_GG))
