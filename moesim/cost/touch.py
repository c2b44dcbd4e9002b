"""Which ranks and nodes a token's experts are on: the exchange's traffic, counted from whole tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.arrays import AnyArray, IntArray

__all__ = ["Touch", "count_slots", "touch"]

_IDS = 1 << 20
"""(token, layer, choice) triples looked at together"""


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


def count_slots(slot_TLK: AnyArray, group_T: AnyArray, groups: int, slots: int) -> IntArray:
    """(token, choice) pairs per group, layer and slot, [groups, L, S]; slot S, no expert, is not counted."""
    layers = slot_TLK.shape[1]
    columns = slots + (bool(slot_TLK.size) and int(slot_TLK.max()) >= slots)
    key = slot_TLK + (np.arange(layers, dtype=np.int64) * columns)[:, None]
    key = key + (np.asarray(group_T, np.int64) * (layers * columns))[:, None, None]
    count = np.bincount(key.ravel(), minlength=groups * layers * columns).reshape(groups, layers, columns)
    return count[..., :slots]


def touch(
    slot_TLK: AnyArray, source_T: AnyArray, starts_B: IntArray, slots_per_rank: int, node_of_rank_G: IntArray
) -> Touch:
    """Count copies for groups of tokens `starts_B[b] : starts_B[b + 1]` (the last runs to the end; none is empty).

    slot_TLK: slot of each (token, layer, choice), the number of all slots where there is no expert. source_T: the rank
    a token comes from. Exact.
    """
    tokens, layers, choices = slot_TLK.shape
    ranks = len(node_of_rank_G)
    nodes = int(node_of_rank_G.max()) + 1
    groups = len(starts_B)
    in_BLG = np.zeros(groups * layers * ranks, np.int64)
    node_in_BLN = np.zeros(groups * layers * nodes, np.int64)
    group_T = np.searchsorted(starts_B, np.arange(tokens), side="right") - 1
    cell_TL = group_T[:, None] * layers + np.arange(layers)
    node_or_none = np.append(node_of_rank_G, nodes)
    step = max(1, _IDS // (layers * choices))
    for lo in range(0, tokens, step):
        part = slice(lo, min(lo + step, tokens))
        rank_TLK = np.sort(slot_TLK[part] // slots_per_rank, axis=-1)
        source = np.asarray(source_T[part])
        in_BLG += _count(rank_TLK, source, cell_TL[part], ranks, len(in_BLG))
        if nodes > 1:
            node_TLK = node_or_none[rank_TLK]  # ranks fill nodes in order, so these are sorted too
            node_in_BLN += _count(node_TLK, node_of_rank_G[source], cell_TL[part], nodes, len(node_in_BLN))
    return Touch(in_BLG.reshape(groups, layers, ranks), node_in_BLN.reshape(groups, layers, nodes))


def _count(place_TLK: AnyArray, home_T: AnyArray, cell_TL: IntArray, places: int, cells: int) -> IntArray:
    """How many tokens of each cell reach each place other than their home; `place_TLK` sorted along K."""
    counts = (place_TLK != home_T[:, None, None]) & (place_TLK < places)  # `places`: no expert
    counts[..., 1:] &= place_TLK[..., 1:] != place_TLK[..., :-1]
    key = cell_TL[..., None] * places + place_TLK
    return np.bincount(key[counts], minlength=cells)
