"""Which ranks and nodes a token's experts are on: the exchange's traffic, counted from whole tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.arrays import AnyArray, BoolArray, IntArray

__all__ = ["Touch", "touch"]

_CELLS = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Touch:
    """Copies of tokens that travel, per group of consecutive tokens (axis 0, B groups).

    `in_BLG`: received by each rank from other ranks over NVLink (the last hop). `node_in_BLN`: received by each node
    from other nodes over NICs. `out_BL`, `node_out_BL`: copies sent in all: to other ranks, to other nodes.
    """

    in_BLG: IntArray
    node_in_BLN: IntArray

    @property
    def out_BL(self) -> IntArray:
        return np.asarray(self.in_BLG.sum(axis=-1))

    @property
    def node_out_BL(self) -> IntArray:
        return np.asarray(self.node_in_BLN.sum(axis=-1))


def touch(
    slot_TLK: AnyArray, source_T: AnyArray, starts_B: IntArray, slots_per_rank: int, node_of_rank_G: IntArray
) -> Touch:
    """Count copies for groups of tokens `starts_B[b] : starts_B[b + 1]` (the last runs to the end; none is empty).

    slot_TLK: slot of each (token, layer, choice). source_T: the rank a token comes from. Exact.
    """
    tokens, layers, _ = slot_TLK.shape
    ranks = len(node_of_rank_G)
    nodes = int(node_of_rank_G.max()) + 1
    groups = len(starts_B)
    in_BLG = np.zeros((groups, layers, ranks), np.int64)
    node_in_BLN = np.zeros((groups, layers, nodes), np.int64)
    group_T = np.searchsorted(starts_B, np.arange(tokens), side="right") - 1
    step = max(1, _CELLS // (layers * ranks))
    for lo in range(0, tokens, step):
        hi = min(lo + step, tokens)
        hit_TLG = _hits(slot_TLK[lo:hi] // slots_per_rank, ranks)
        source = np.asarray(source_T[lo:hi])
        group, first = np.unique(group_T[lo:hi], return_index=True)
        if nodes > 1:
            edges = np.searchsorted(node_of_rank_G, np.arange(nodes))
            node_TLN = np.logical_or.reduceat(hit_TLG, edges, axis=-1)
            node_TLN[np.arange(hi - lo), :, node_of_rank_G[source]] = False
            node_in_BLN[group] += np.add.reduceat(node_TLN, first, axis=0, dtype=np.int64)
        hit_TLG[np.arange(hi - lo), :, source] = False
        in_BLG[group] += np.add.reduceat(hit_TLG, first, axis=0, dtype=np.int64)
    return Touch(in_BLG, node_in_BLN)


def _hits(rank_TLK: AnyArray, ranks: int) -> BoolArray:
    tokens, layers, choices = rank_TLK.shape
    hit = np.zeros(tokens * layers * ranks, np.bool_)
    base = (np.arange(tokens * layers, dtype=np.int64) * ranks)[:, None]
    hit[base + rank_TLK.reshape(tokens * layers, choices)] = True
    return hit.reshape(tokens, layers, ranks)
