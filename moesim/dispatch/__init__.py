"""Dispatch: which replica of an expert serves a token that was routed to it.

Works on whole arrays of tokens. Draws are a counter-based hash of (seed, token, layer, choice), so a token
gets the same replica whatever batch it is looked up in and in whatever order.

Legend: T tokens, L MoE layers, K choices a token, E experts, S slots, G ranks, N nodes.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.arrays import AnyArray, IntArray
from moesim.placement import Placement

__all__ = ["DispatchPolicy", "assign_ragged", "draw_below", "hash_TLK", "hash_keys", "split", "split_local"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK_64 = (1 << 64) - 1
_HALF = np.uint64(32)


class DispatchPolicy(Protocol):
    """One file of this folder defines `class Policy(Spec)` with these methods."""

    def assign(
        self,
        expert_TLK: AnyArray,
        source_rank_T: AnyArray,
        placement: Placement,
        seed: int,
        token_T: AnyArray | None = None,
    ) -> NDArray[np.int32]:
        """The slot that serves each (token, layer, choice): int32 [T, L, K].

        expert_TLK: integer expert ids in [0, E). source_rank_T: rank each token comes from. token_T: the
        tokens' own numbers, which key the draws (default 0..T-1).
        """
        ...

    def split(self, count_LE: IntArray, placement: Placement) -> IntArray:
        """The same at count level: tokens per expert [..., L, E] -> tokens per slot [..., L, S], sums
        kept."""
        ...


def assign_ragged(
    policy: DispatchPolicy,
    expert_TLK: AnyArray,
    source_rank_T: AnyArray,
    placement: Placement,
    seed: int,
    token_T: AnyArray | None = None,
) -> NDArray[np.int32]:
    """`policy.assign` where ids may be E, which is no expert: its slot is S, the number of all slots."""
    none_TLK = expert_TLK == placement.num_experts
    if not none_TLK.any():
        return policy.assign(expert_TLK, source_rank_T, placement, seed, token_T)
    slot_TLK = policy.assign(np.where(none_TLK, 0, expert_TLK), source_rank_T, placement, seed, token_T)
    slot_TLK[none_TLK] = placement.num_slots
    return slot_TLK


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA'14, figure 16): a bijection that
    avalanches."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def hash_TLK(seed: int, token_T: ArrayLike, layers: int, choices: int) -> NDArray[np.uint64]:
    """64 hashed bits for each (token, layer, choice), keyed by `seed`: uint64 [T, L, K]."""
    key_T, place_C = hash_keys(seed, token_T, layers * choices)
    return _mix(key_T[:, None, None] + place_C.reshape(layers, choices))


def hash_keys(seed: int, token_T: ArrayLike, places: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """What `hash_TLK` mixes: a token's part [T] plus a place's [L * K]."""
    token = np.asarray(token_T).astype(np.uint64)
    seed_T = _mix(np.full(token.shape, seed & _MASK_64, np.uint64) + _GOLDEN)
    return _mix(seed_T ^ (token * _GOLDEN + _MIX_1)), np.arange(1, places + 1, dtype=np.uint64) * _GOLDEN


def draw_below(bits: NDArray[np.uint64], bound: AnyArray) -> IntArray:
    """A draw from 0..bound-1 out of 64 hashed bits: the upper 32 times the bound (bias below bound /
    2**32)."""
    return (((bits >> _HALF) * bound.astype(np.uint64)) >> _HALF).astype(np.int64)


def flat_expert(expert_TLK: AnyArray, placement: Placement) -> IntArray:
    """Index of each choice into tables [L * E]: layer * E + expert, int64 [T, L, K]."""
    layers = placement.num_layers
    if expert_TLK.ndim != 3 or expert_TLK.shape[1] != layers:
        raise ValueError(f"expert ids must be [T, {layers}, K], got shape {expert_TLK.shape}")
    offset_L11 = (np.arange(layers, dtype=np.int64) * placement.num_experts)[:, None]
    return expert_TLK.astype(np.int64) + offset_L11


def split(count_LE: ArrayLike, placement: Placement, kind: Literal["first", "uniform"] = "uniform") -> IntArray:
    """Tokens per slot from tokens per expert: [..., L, E] integers -> int64 [..., L, S]; sums by expert are
    kept.

    `first`: all to the lowest slot of the expert. `uniform`: evenly over its replicas, what does not divide
    one by one to the lowest.
    """
    count = np.asarray(count_LE, dtype=np.int64)
    here = placement.of_slots(count)
    index_LS = placement.replica_index_LS
    if kind == "first":
        return np.where(index_LS == 0, here, 0)
    replicas_LS = np.take_along_axis(placement.replica_count_LE, placement.expert_LS, axis=1).astype(np.int64)
    return here // replicas_LS + (index_LS < here % replicas_LS)


def split_local(count_GLE: ArrayLike, placement: Placement) -> IntArray:
    """Tokens per source rank and slot where each rank prefers its own replica, then its node's, then any.

    count_GLE: tokens per source rank and expert, [G, L, E] integers. Within the preferred set the split is
    even; what does not divide goes one by one, starting at a replica that depends on the source rank so that
    no slot collects every remainder. Returns int64 [G, L, S].
    """
    count = np.asarray(count_GLE, dtype=np.int64)
    node_G = placement.node_of_rank_G
    rank_S = placement.slot_to_rank_S
    out = np.zeros((*count.shape[:-1], placement.num_slots), np.int64)
    for rank in range(count.shape[0]):
        near_S = (rank_S == rank).astype(np.int64) + (node_G[rank_S] == node_G[rank])
        out[rank] = _split_near(count[rank], placement, near_S, rank)
    return out


def _split_near(count_LE: IntArray, placement: Placement, near_S: IntArray, turn: int) -> IntArray:
    """One source rank of `split_local`. near_S: 2 on the rank, 1 on its node, 0 elsewhere. -> [L, S]"""
    layers, slots = placement.slot_to_expert_LS.shape
    expert_LS, held_LS = placement.expert_LS, placement.held_LS
    layer_LS = np.broadcast_to(np.arange(layers)[:, None], (layers, slots))
    best_LE = np.full((layers, placement.num_experts), -1, np.int64)
    np.maximum.at(best_LE, (layer_LS, expert_LS), np.where(held_LS, near_S, -1))
    chosen_LS = held_LS & (near_S == np.take_along_axis(best_LE, expert_LS, axis=1))
    number_LE = np.zeros((layers, placement.num_experts), np.int64)
    np.add.at(number_LE, (layer_LS[chosen_LS], expert_LS[chosen_LS]), 1)
    order_LS = np.argsort(expert_LS, axis=1, kind="stable")
    flags = np.take_along_axis(chosen_LS, order_LS, axis=1).astype(np.int64)
    before = np.cumsum(flags, axis=1) - flags
    start_LE = np.cumsum(number_LE, axis=1) - number_LE
    index_LS = np.empty((layers, slots), np.int64)
    np.put_along_axis(index_LS, order_LS, before, axis=1)
    index_LS -= np.take_along_axis(start_LE, expert_LS, axis=1)
    number_LS = np.maximum(np.take_along_axis(number_LE, expert_LS, axis=1), 1)
    here = np.take_along_axis(count_LE, expert_LS, axis=1)
    extra = (index_LS + turn) % number_LS < here % number_LS
    return np.where(chosen_LS, here // number_LS + extra, 0)
