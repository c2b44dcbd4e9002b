"""Replicas chosen so that a token reaches as few nodes as possible; on a node its own rank's replica, else one drawn.

The router's choice stands: only replicas are chosen (DeepSeek-V3, arXiv:2412.19437, section 2.1.2, limits the nodes
in the router instead). What a paper or an engine does in this place is not public in detail; the rule here is ours:
the token's own node and the nodes of experts with replicas on one node alone are reached anyway; then, as long as
an expert is not on a node reached, the node that holds most of what is left is added (greedy set cover).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, IntArray
from moesim.dispatch import draw_below, flat_expert, hash_TLK, split
from moesim.placement import Placement
from moesim.spec import Spec

__all__ = ["Policy"]

_CELLS = 1 << 20
"""(token, layer, choice, node) looked at together"""


class Policy(Spec):
    """No parameters."""

    def assign(
        self,
        expert_TLK: AnyArray,
        source_rank_T: AnyArray,
        placement: Placement,
        seed: int,
        token_T: AnyArray | None = None,
    ) -> NDArray[np.int32]:
        """See `moesim.dispatch.DispatchPolicy.assign`. `placement.rank_to_node` says which ranks share a node."""
        flat = flat_expert(expert_TLK, placement)
        slot = placement.first_slot_LE.ravel()[flat]
        if placement.max_replicas == 1:
            return slot
        tokens, layers, choices = flat.shape
        token = np.arange(tokens) if token_T is None else np.asarray(token_T)
        rank_T = np.asarray(source_rank_T, np.int64)
        nodes = np.unique(placement.node_of_rank_G)
        bounds = np.searchsorted(placement.node_of_rank_G, np.append(nodes, nodes[-1] + 1))
        before = placement.replicas_before_rank_LEG.reshape(-1, placement.num_ranks + 1)
        home_T = np.searchsorted(nodes, placement.node_of_rank_G[rank_T])
        step = max(1, _CELLS // max(1, layers * choices * len(nodes)))
        for lo in range(0, tokens, step):
            part = slice(lo, min(lo + step, tokens))
            low = before[flat[part][..., None], bounds[:-1]].astype(np.int64)
            number = before[flat[part][..., None], bounds[1:]] - low
            node = _nodes(number > 0, home_T[part])[..., None]
            first = np.take_along_axis(low, node, 3)[..., 0]
            many = np.take_along_axis(number, node, 3)[..., 0]
            own = before[flat[part], rank_T[part, None, None]].astype(np.int64)
            mine = before[flat[part], rank_T[part, None, None] + 1] - own
            first, many = np.where(mine > 0, own, first), np.where(mine > 0, mine, many)
            replica = first + draw_below(hash_TLK(seed, token[part], layers, choices), many)
            slot[part] = placement.expert_to_slots_LEX.ravel()[flat[part] * placement.max_replicas + replica]
        return slot

    def split(self, count_LE: IntArray, placement: Placement) -> IntArray:
        """See `moesim.dispatch.DispatchPolicy.split`: without tokens and source ranks the split is even."""
        return split(count_LE, placement, "uniform")


def _nodes(holds_TLKN: AnyArray, home_T: IntArray) -> IntArray:
    """The node that serves each choice [T, L, K]: the token's own, else the lowest of those it reaches that hold it."""
    tokens, layers, _, nodes = holds_TLKN.shape
    home_TLN = np.broadcast_to((np.arange(nodes) == home_T[:, None])[:, None], (tokens, layers, nodes))
    only = holds_TLKN.sum(axis=3) == 1
    reached_TLN = home_TLN | (holds_TLKN & only[..., None]).any(axis=2)
    while True:
        open_TLKN = holds_TLKN & ~(holds_TLKN & reached_TLN[:, :, None]).any(axis=3, keepdims=True)
        left_TLN = open_TLKN.sum(axis=2)
        if not left_TLN.any():
            break
        best_TL1 = left_TLN.argmax(axis=2)[..., None]
        add = np.take_along_axis(left_TLN, best_TL1, 2) > 0
        np.put_along_axis(reached_TLN, best_TL1, add | np.take_along_axis(reached_TLN, best_TL1, 2), 2)
    usable = holds_TLKN & reached_TLN[:, :, None]
    return np.asarray((usable * (1 + home_TLN[:, :, None])).argmax(axis=3))
