"""The least largest rank load that dividing experts' tokens among their replicas can reach, by maximum flows.

LPLB states it as a linear program (deepseek-ai/LPLB; SGLang `eplb/lplb_solver.py`): minimise M so that the replicas of
an expert serve its tokens and no rank serves more than M. That is a transportation problem: for a given whole
M, tokens flow from experts to the ranks that hold them and on through capacities M - (what a rank must serve), and M is
large enough if all get through. If not, the minimum cut names ranks whose own experts exceed M in the mean, hence a
larger M: Newton's method on the cut (Dinkelbach 1967), which ends at the least M after a few flows. Flows are
whole, so the plan is in whole tokens and its largest load is the linear program's optimum rounded up. All batches and
layers are one graph, a component each.

Legend: B batches, L layers, E experts, S slots, G ranks, F experts on several ranks, A (expert, rank) pairs of those.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from moesim.arrays import AnyArray, IntArray
from moesim.errors import BadInput
from moesim.placement import Placement

__all__ = ["min_max_split"]

_FLOW = 1 << 30
"""tokens of one graph: SciPy's flows are 32-bit"""


class _Net(NamedTuple):
    """Where experts can go. fixed_LE: the slot of an expert that sits on one rank, -1 of others. Experts on several
    ranks [F]: layer, expert. Their (expert, rank) pairs [A], in order: number of the expert, slot, rank."""

    fixed_LE: IntArray
    layer_F: IntArray
    expert_F: IntArray
    free_A: IntArray
    slot_A: IntArray
    rank_A: IntArray


@lru_cache(maxsize=16)
def _net(placement: Placement) -> _Net:
    slots_LEX = placement.expert_to_slots_LEX.astype(np.int64)
    rank_LEX = np.where(slots_LEX >= 0, slots_LEX // placement.slots_per_rank, -1)
    # replicas of one expert on one rank share its tokens as they like: the first has them all
    first = slots_LEX >= 0
    first[:, :, 1:] &= rank_LEX[:, :, 1:] != rank_LEX[:, :, :-1]
    several_LE = first.sum(axis=2) > 1
    layer_F, expert_F = np.nonzero(several_LE)
    number_LE = np.full(several_LE.shape, -1, np.int64)
    number_LE[layer_F, expert_F] = np.arange(len(layer_F))
    at = np.nonzero(first & several_LE[:, :, None])
    fixed_LE = np.where(several_LE, -1, slots_LEX[:, :, 0])
    return _Net(fixed_LE, layer_F, expert_F, number_LE[at[0], at[1]], slots_LEX[at], rank_LEX[at])


def min_max_split(count_BLE: IntArray, placement: Placement) -> IntArray:
    """Tokens per slot from tokens per expert, [B, L, E] -> int64 [B, L, S]: no other whole split has a smaller largest
    rank load in any batch and layer. Raises BadInput beyond 2^30 tokens in one batch and layer."""
    count = np.asarray(count_BLE, np.int64)
    net = _net(placement)
    out = np.zeros((*count.shape[:2], placement.num_slots), np.int64)
    layer, expert = np.nonzero(net.fixed_LE >= 0)
    out[:, layer, net.fixed_LE[layer, expert]] = count[:, layer, expert]
    if not len(net.layer_F):
        return out
    load_BF = count[:, net.layer_F, net.expert_F]
    size_B = load_BF.sum(axis=1)
    if size_B.max(initial=0) > _FLOW:
        raise BadInput(f"lp dispatch plans at most {_FLOW} (token, expert) pairs a batch, got {int(size_B.max())}")
    fixed_BLG = out.reshape(*out.shape[:2], placement.num_ranks, -1).sum(axis=3)
    layer_A = net.layer_F[net.free_A]
    step = max(1, _FLOW // max(1, int(size_B.max(initial=0))))
    for lo in range(0, len(count), step):
        some = slice(lo, lo + step)
        out[some, layer_A, net.slot_A] = _flows(net, load_BF[some], fixed_BLG[some])
    return out


def _flows(net: _Net, load_BF: IntArray, fixed_BLG: IntArray) -> IntArray:
    """Tokens of every (expert, rank) pair [B, A]."""
    layers = fixed_BLG.shape[1]
    layer_A = net.layer_F[net.free_A]
    free_BL = _by_group(load_BF, net.layer_F, layers)
    most_BL = _lower_bound(net, load_BF, fixed_BLG, free_BL)
    out_BA = np.zeros((len(load_BF), len(net.free_A)), np.int64)
    open_BL = free_BL > 0
    while open_BL.any():
        flow_BA, left_BL, reached = _flow(net, load_BF, fixed_BLG, most_BL, open_BL)
        done = open_BL & (left_BL == 0)
        out_BA = np.where(done[:, layer_A], flow_BA, out_BA)
        open_BL &= left_BL > 0
        if open_BL.any():
            experts_BF, ranks_BLG = reached
            inside_BL = np.where(ranks_BLG, fixed_BLG, 0).sum(axis=2)
            inside_BL += _by_group(np.where(experts_BF, load_BF, 0), net.layer_F, layers)
            cut_BL = -(-inside_BL // np.maximum(ranks_BLG.sum(axis=2), 1))
            most_BL = np.where(open_BL, cut_BL, most_BL)
    return out_BA


def _lower_bound(net: _Net, load_BF: IntArray, fixed_BLG: IntArray, free_BL: IntArray) -> IntArray:
    """What some rank must serve at least: the mean, what is fixed, an expert's own ranks' mean: [B, L]."""
    ranks = fixed_BLG.shape[2]
    bound_BL = np.maximum(-(-(free_BL + fixed_BLG.sum(axis=2)) // ranks), fixed_BLG.max(axis=2))
    layer_A = net.layer_F[net.free_A]
    around_BF = load_BF + _by_group(fixed_BLG[:, layer_A, net.rank_A], net.free_A, load_BF.shape[1])
    own_BF = np.where(load_BF > 0, -(-around_BF // np.bincount(net.free_A)), 0)
    some, start = np.unique(net.layer_F, return_index=True)
    bound_BL[:, some] = np.maximum(bound_BL[:, some], np.maximum.reduceat(own_BF, start, axis=1))
    return np.asarray(bound_BL)


def _by_group(value_BX: IntArray, group_X: IntArray, groups: int) -> IntArray:
    """Sums over the last axis by group, whole below 2^53: int64 [B, groups]."""
    key = np.arange(len(value_BX))[:, None] * groups + group_X
    total = np.bincount(key.ravel(), weights=value_BX.ravel(), minlength=len(value_BX) * groups)
    return total.reshape(-1, groups).astype(np.int64)


def _flow(
    net: _Net, load_BF: IntArray, fixed_BLG: IntArray, most_BL: IntArray, open_BL: AnyArray
) -> tuple[IntArray, IntArray, tuple[AnyArray, AnyArray]]:
    """A maximum flow of the batches and layers that are open: tokens by pair [B, A], tokens that did not get through
    [B, L], and what a further token could reach: experts [B, F] and ranks [B, L, G]."""
    batches, layers, _ = fixed_BLG.shape
    free, pairs = len(net.layer_F), len(net.free_A)
    room_BLG = np.where(open_BL[:, :, None], np.maximum(most_BL[:, :, None] - fixed_BLG, 0), 0)
    load_BF = np.where(open_BL[:, net.layer_F], load_BF, 0)
    expert_BF = 2 + np.arange(batches * free).reshape(batches, free)
    rank_BLG = 2 + batches * free + np.arange(room_BLG.size).reshape(room_BLG.shape)
    from_BA = expert_BF[:, net.free_A]
    to_BA = rank_BLG[:, net.layer_F[net.free_A], net.rank_A]
    through_BA = load_BF[:, net.free_A]
    rows = np.concatenate([np.zeros(batches * free, np.int64), from_BA.ravel(), rank_BLG.ravel()])
    columns = np.concatenate([expert_BF.ravel(), to_BA.ravel(), np.ones(room_BLG.size, np.int64)])
    value = np.concatenate([load_BF.ravel(), through_BA.ravel(), room_BLG.ravel()]).astype(np.int32)
    keep = value > 0
    nodes = 2 + batches * free + room_BLG.size
    graph = csr_array((value[keep], (rows[keep], columns[keep])), shape=(nodes, nodes))
    flow = maximum_flow(graph, 0, 1).flow
    moved = flow.tocoo()
    forward = (moved.row >= 2) & (moved.row < 2 + batches * free) & (moved.col >= 2 + batches * free) & (moved.data > 0)
    key_M = moved.row[forward].astype(np.int64) * nodes + moved.col[forward]
    key_N = (from_BA.astype(np.int64) * nodes + to_BA).ravel()
    out_N = np.zeros(batches * pairs, np.int64)
    out_N[np.searchsorted(key_N, key_M)] = moved.data[forward]
    out_BA = out_N.reshape(batches, pairs)
    left_BL = _by_group(load_BF, net.layer_F, layers) - _by_group(out_BA, net.layer_F[net.free_A], layers)
    seen = np.zeros(nodes, bool)
    if left_BL.any():
        residual = csr_array(graph - flow)
        residual.eliminate_zeros()
        seen[breadth_first_order(residual, 0, return_predecessors=False)] = True
    return out_BA, left_BL, (seen[expert_BF], seen[rank_BLG])
