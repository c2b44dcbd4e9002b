"""Replica counts to begin a search with, and their packing.

EPLB gives each spare slot to the expert whose copies are heaviest, which makes the heaviest copy least. Where a heavy
copy fills most of a rank, that is too much of a good thing: ranks of middling copies cannot be filled to the mean,
while a rank with one copy near the mean wants neighbours that weigh next to nothing. So a part of the spare slots goes
to the lightest experts instead, whose copies then weigh half; how large a part is tried out.

Legend: L layers (or any rows), E experts, S slots, G ranks.
"""

from __future__ import annotations

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.placement import EMPTY
from moesim.placement.eplb import pack, replicate
from moesim.placement.search import pack_uneven

__all__ = ["PARTS", "counts", "pack_counts"]

PARTS = (1.0, 0.0, 0.25, 0.5, 0.75)
"""of the spare slots that heavy experts need not have, the part that they get; the first is EPLB"""


def counts(share_LE: FloatArray, slots: int, ranks: int, bound_L: FloatArray, part: float) -> IntArray:
    """Replica counts [L, E]. share_LE: loads, mean rank load 1. bound_L: the largest rank load aimed at."""
    layers, experts = share_LE.shape
    expert_LS, count_LE = replicate(share_LE, slots)
    spare = slots - experts
    if part == 1.0 or spare == 0:
        return count_LE
    order_LE = np.argsort(share_LE, axis=1, kind="stable")
    light_LE = np.take_along_axis(share_LE, order_LE, axis=1)
    beside_L = light_LE[:, : max(slots // ranks - 1, 0)].sum(axis=1)
    alone_L1 = np.maximum(bound_L - beside_L, 1e-9)[:, None]
    must_L = np.minimum((np.maximum(np.ceil(share_LE / alone_L1 - 1e-9), 1.0) - 1).sum(axis=1), spare)
    heavy_L = (must_L + np.rint(part * (spare - must_L))).astype(np.int64)
    turn = np.arange(spare)
    light = np.take_along_axis(order_LE, (turn % experts)[None].repeat(layers, axis=0), axis=1)
    late = np.maximum(turn[None] - heavy_L[:, None], 0)
    expert_LS[:, experts:] = np.where(
        turn < heavy_L[:, None], expert_LS[:, experts:], np.take_along_axis(light, late, axis=1)
    )
    flat = expert_LS + np.arange(layers)[:, None] * experts
    return np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts)


def pack_counts(share_LE: FloatArray, count_LE: IntArray, ranks: int) -> IntArray:
    """Copies packed heaviest first: the expert of each slot, [L, G * ceil(S / G)], EMPTY where there is none."""
    layers, experts = share_LE.shape
    expert_LS = np.repeat(np.tile(np.arange(experts), layers), count_LE.ravel()).reshape(layers, -1)
    load_LS = np.take_along_axis(share_LE / count_LE, expert_LS, axis=1)
    item_LS = pack_uneven(load_LS, ranks) if expert_LS.shape[1] % ranks else pack(load_LS, ranks)
    return np.where(item_LS == EMPTY, EMPTY, np.take_along_axis(expert_LS, np.maximum(item_LS, 0), axis=1))
