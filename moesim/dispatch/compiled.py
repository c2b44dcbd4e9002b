"""What numba does better than NumPy for batches of whole tokens: counting slots and copies, and choosing near replicas.

The same whole numbers come out, so no result depends on whether numba is installed. Compiled code is kept beside this
file, else in the user's cache folder; where neither can be written each process compiles anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import int32, int64, uint16, uint64

__all__ = ["count_slots", "nearest_slots", "touch_distinct"]


def _read(scalar: Any, axes: int) -> Any:
    """An array that may be read-only."""
    return numba.types.Array(scalar, axes, "C", readonly=True)


def _compiled(*types: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for these types now, releasing the interpreter's lock; kept on disk where a folder can be written."""

    def compile_(function: Callable[..., None]) -> Callable[..., None]:
        signature = numba.void(*types)
        try:
            ready: Callable[..., None] = numba.njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):  # no folder for the cache
            ready = numba.njit(signature, nogil=True)(function)
        return ready

    return compile_


@_compiled(_read(int32, 3), _read(int64, 1), int64[:, :, ::1])
def _count_slots(slot_TLK: Any, group_T: Any, count_BLS: Any) -> None:
    tokens, layers, choices = slot_TLK.shape
    slots = count_BLS.shape[2]
    for t in range(tokens):
        b = group_T[t]
        for i in range(layers):
            for k in range(choices):
                s = slot_TLK[t, i, k]
                if s < slots:
                    count_BLS[b, i, s] += 1


def count_slots(slot_TLK: Any, group_T: Any, groups: int, slots: int) -> Any:
    """See `moesim.cost.touch.count_slots`."""
    out = np.zeros((groups, slot_TLK.shape[1], slots), np.int64)
    _count_slots(np.ascontiguousarray(slot_TLK, np.int32), np.ascontiguousarray(group_T, np.int64), out)
    return out


@_compiled(
    _read(int32, 3), _read(int64, 1), _read(int64, 1), int64, _read(int64, 1), int64[:, :, ::1], int64[:, :, ::1],
)  # fmt: skip
def _touch(
    slot_TLK: Any, source_T: Any, group_T: Any, per_rank: Any, node_G: Any, in_BLG: Any, node_in_BLN: Any
) -> None:
    tokens, layers, choices = slot_TLK.shape
    ranks, nodes = in_BLG.shape[2], node_in_BLN.shape[2]
    seen_G = np.full(ranks, -1, np.int64)
    seen_N = np.full(nodes, -1, np.int64)
    turn = -1
    for t in range(tokens):
        b, home = group_T[t], source_T[t]
        for i in range(layers):
            turn += 1
            seen_G[home] = turn
            seen_N[node_G[home]] = turn
            for k in range(choices):
                rank = slot_TLK[t, i, k] // per_rank
                if rank < ranks and seen_G[rank] != turn:
                    seen_G[rank] = turn
                    in_BLG[b, i, rank] += 1
                    node = node_G[rank]
                    if seen_N[node] != turn:
                        seen_N[node] = turn
                        node_in_BLN[b, i, node] += 1


def touch_distinct(slot_TLK: Any, source_T: Any, group_T: Any, groups: int, per_rank: int, node_G: Any) -> Any:
    """Copies received by ranks [B, L, G] and by nodes [B, L, N] where a token goes once to each, as of
    `moesim.cost.touch.touch`."""
    layers, nodes = slot_TLK.shape[1], int(node_G.max()) + 1
    in_BLG = np.zeros((groups, layers, len(node_G)), np.int64)
    node_in_BLN = np.zeros((groups, layers, nodes), np.int64)
    _touch(
        np.ascontiguousarray(slot_TLK, np.int32), np.ascontiguousarray(source_T, np.int64),
        np.ascontiguousarray(group_T, np.int64), per_rank, np.ascontiguousarray(node_G, np.int64), in_BLG, node_in_BLN,
    )  # fmt: skip
    return in_BLG, node_in_BLN


@_compiled(
    _read(int32, 3), _read(int64, 1), _read(uint64, 1), _read(uint64, 1), _read(int32, 2), _read(int32, 2),
    _read(int32, 3), _read(uint16, 3), _read(int64, 1), _read(int64, 1), int32[:, :, ::1],
)  # fmt: skip
def _nearest(
    expert_TLK: Any, rank_T: Any, key_T: Any, place_C: Any, first_slot_LE: Any, number_LE: Any, slots_LEX: Any,
    before_LEG: Any, low_G: Any, high_G: Any, out_TLK: Any,
) -> None:  # fmt: skip
    tokens, layers, choices = expert_TLK.shape
    ranks = before_LEG.shape[2] - 1
    for t in range(tokens):
        rank, key = rank_T[t], key_T[t]
        low, high = low_G[rank], high_G[rank]
        for i in range(layers):
            for k in range(choices):
                e = expert_TLK[t, i, k]
                if number_LE[i, e] == 1:
                    out_TLK[t, i, k] = first_slot_LE[i, e]
                    continue
                first = int64(before_LEG[i, e, rank])
                number = int64(before_LEG[i, e, rank + 1]) - first
                if number == 0:
                    first = int64(before_LEG[i, e, low])
                    number = int64(before_LEG[i, e, high]) - first
                if number == 0:
                    first, number = int64(0), int64(before_LEG[i, e, ranks])
                # SplitMix64's finaliser, as of `moesim.dispatch.hash_TLK`, then the upper half times the number
                bits = key + place_C[i * choices + k]
                bits = (bits ^ (bits >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
                bits = (bits ^ (bits >> uint64(27))) * uint64(0x94D049BB133111EB)
                bits = bits ^ (bits >> uint64(31))
                drawn = ((bits >> uint64(32)) * uint64(number)) >> uint64(32)
                out_TLK[t, i, k] = slots_LEX[i, e, first + int64(drawn)]


def nearest_slots(expert_TLK: Any, rank_T: Any, key_T: Any, place_C: Any, placement: Any) -> Any:
    """Slots [T, L, K] of `moesim.dispatch.local_first`. key_T, place_C: see `moesim.dispatch.hash_keys`."""
    low_G, high_G = placement.node_range_G
    out = np.empty(expert_TLK.shape, np.int32)
    _nearest(
        np.ascontiguousarray(expert_TLK, np.int32), np.ascontiguousarray(rank_T, np.int64), key_T, place_C,
        placement.first_slot_LE, placement.replica_count_LE, placement.expert_to_slots_LEX,
        placement.replicas_before_rank_LEG, low_G, high_G, out,
    )  # fmt: skip
    return out
