"""Which ranks and nodes a token's experts are on: the exchange's traffic, counted from whole tokens.

What travels depends on the back end (`moesim.layout.Copies`):

- `distinct`: a token goes once to each rank that holds one of its experts, across nodes once to each node over a NIC
  and from there over NVLink (DeepEP's normal kernels);
- `pairs`: once for each (token, expert) pair, inside a node over NVLink, across nodes straight to the rank (DeepEP's
  low-latency kernels; NCCL's all-to-all of tokens permuted by expert, as Megatron-Core, DeepSpeed and Tutel run it);
- `two_level`: each pair first to the rank of its own node that has the target's number, then to the target (Tutel's
  2DH, arXiv:2206.03382, section 3.4);
- `coherent`: `distinct`, but a token starts a layer where its expert of the last layer was (ExFlow,
  arXiv:2401.08383): its expert of the first choice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.layout import Copies
from moesim.optional import compiled

__all__ = ["Touch", "count_slots", "touch"]

_COMPILED_IDS = 1 << 21
"""(token, layer, choice) triples from which compiled code is worth its loading"""
_IDS = 1 << 20
"""(token, layer, choice) triples looked at together"""


@dataclass(frozen=True, slots=True, eq=False)
class Touch:
    """Copies of tokens that travel, per group of consecutive tokens (axis 0, B groups).

    `in_BLG`: received by each rank from other ranks over NVLink. `node_in_BLN`: received over NICs from other nodes, by
    node (`distinct`, `coherent`) or by rank. `out_BL`, `node_out_BL`: copies sent in all over either.
    """

    in_BLG: IntArray
    node_in_BLN: IntArray

    @property
    def out_BL(self) -> IntArray:
        return np.asarray(self.in_BLG.sum(axis=-1))

    @property
    def node_out_BL(self) -> IntArray:
        return np.asarray(self.node_in_BLN.sum(axis=-1))


def _large(slot_TLK: AnyArray) -> bool:
    return bool(slot_TLK.size >= _COMPILED_IDS) or "moesim.dispatch.compiled" in sys.modules


def count_slots(slot_TLK: AnyArray, group_T: AnyArray, groups: int, slots: int) -> IntArray:
    """(token, choice) pairs per group, layer and slot, [groups, L, S]; slot S, no expert, is not counted."""
    fast = compiled("moesim.dispatch.compiled") if _large(slot_TLK) else None
    if fast is not None:
        counted: IntArray = fast.count_slots(slot_TLK, group_T, groups, slots)
        return counted
    layers = slot_TLK.shape[1]
    columns = slots + (bool(slot_TLK.size) and int(slot_TLK.max()) >= slots)
    key = slot_TLK + (np.arange(layers, dtype=np.int64) * columns)[:, None]
    key = key + (np.asarray(group_T, np.int64) * (layers * columns))[:, None, None]
    count = np.bincount(key.ravel(), minlength=groups * layers * columns).reshape(groups, layers, columns)
    return count[..., :slots]


def touch(
    slot_TLK: AnyArray,
    source_T: AnyArray,
    starts_B: IntArray,
    slots_per_rank: int,
    node_of_rank_G: IntArray,
    copies: Copies = "distinct",
) -> Touch:
    """Count copies for groups of tokens `starts_B[b] : starts_B[b + 1]` (the last runs to the end; none is empty).

    slot_TLK: slot of each (token, layer, choice), the number of all slots where there is no expert. source_T: the rank
    a token comes from. Exact.
    """
    tokens, layers, choices = slot_TLK.shape
    ranks = len(node_of_rank_G)
    nodes = int(node_of_rank_G.max()) + 1
    groups = len(starts_B)
    by_rank = copies in ("pairs", "two_level")
    far = ranks if by_rank else nodes
    in_BLG = np.zeros(groups * layers * ranks, np.int64)
    node_in_BLN = np.zeros(groups * layers * far, np.int64)
    group_T = np.searchsorted(starts_B, np.arange(tokens), side="right") - 1
    fast = compiled("moesim.dispatch.compiled") if copies == "distinct" and _large(slot_TLK) else None
    if fast is not None:
        return Touch(*fast.touch_distinct(slot_TLK, source_T, group_T, groups, slots_per_rank, node_of_rank_G))
    cell_TL = group_T[:, None] * layers + np.arange(layers)
    node_or_none = np.append(node_of_rank_G, nodes)
    step = max(1, _IDS // (layers * choices))
    for lo in range(0, tokens, step):
        part = slice(lo, min(lo + step, tokens))
        rank_TLK = slot_TLK[part] // slots_per_rank
        source = np.asarray(source_T[part])
        if by_rank:
            near, away = _pairs(rank_TLK, source, cell_TL[part], node_or_none, copies == "two_level")
            in_BLG += np.bincount(near, minlength=len(in_BLG))
            node_in_BLN += np.bincount(away, minlength=len(node_in_BLN))
            continue
        home_TL = _homes(rank_TLK, source, ranks) if copies == "coherent" else source[:, None]
        rank_TLK = np.sort(rank_TLK, axis=-1)
        in_BLG += _count(rank_TLK, home_TL, cell_TL[part], ranks, len(in_BLG))
        if nodes > 1:
            node_TLK = node_or_none[rank_TLK]  # ranks fill nodes in order, so these are sorted too
            node_in_BLN += _count(node_TLK, node_of_rank_G[home_TL], cell_TL[part], nodes, len(node_in_BLN))
    return Touch(in_BLG.reshape(groups, layers, ranks), node_in_BLN.reshape(groups, layers, far))


def _count(place_TLK: AnyArray, home_TL: AnyArray, cell_TL: IntArray, places: int, cells: int) -> IntArray:
    """How many tokens of each cell reach each place other than their home; `place_TLK` sorted along K."""
    counts = (place_TLK != home_TL[..., None]) & (place_TLK < places)  # `places`: no expert
    counts[..., 1:] &= place_TLK[..., 1:] != place_TLK[..., :-1]
    key = cell_TL[..., None] * places + place_TLK
    return np.bincount(key[counts], minlength=cells)


def _homes(rank_TLK: AnyArray, source_T: AnyArray, ranks: int) -> IntArray:
    """Where each token starts each layer [T, L]: the rank of its first expert of the layer before; a layer in which it
    has none leaves it where it is."""
    home_TL = np.empty(rank_TLK.shape[:2], np.int64)
    home_TL[:, 0] = source_T
    for layer in range(1, rank_TLK.shape[1]):
        last = rank_TLK[:, layer - 1, 0]
        home_TL[:, layer] = np.where(last < ranks, last, home_TL[:, layer - 1])
    return home_TL


def _pairs(
    rank_TLK: AnyArray, source_T: AnyArray, cell_TL: IntArray, node_or_none_G: IntArray, two_level: bool
) -> tuple[IntArray, IntArray]:
    """Keys (cell, rank) of every pair that comes to a rank over NVLink, and over its NIC. two_level: over NVLink to the
    rank of the source's node that has the target's number in its node."""
    ranks = len(node_or_none_G) - 1
    node_S = node_or_none_G[source_T][:, None, None]
    real = rank_TLK < ranks
    away = real & (node_or_none_G[rank_TLK] != node_S)
    stop = rank_TLK
    if two_level:
        first_N = np.searchsorted(node_or_none_G[:-1], np.arange(int(node_or_none_G[-1])))
        stop = first_N[node_S] + (rank_TLK - first_N[np.minimum(node_or_none_G[rank_TLK], len(first_N) - 1)])
        near = real & (stop != source_T[:, None, None])
    else:
        near = real & ~away & (rank_TLK != source_T[:, None, None])
    cell = cell_TL[..., None] * ranks
    return (cell + stop)[near], (cell + rank_TLK)[away]
