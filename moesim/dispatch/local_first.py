"""A replica on the token's own rank if there is one, else on its node, else any (SGLang's `static`, by node
too)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, IntArray
from moesim.dispatch import draw_below, flat_expert, hash_keys, hash_TLK, split
from moesim.optional import compiled
from moesim.placement import Placement
from moesim.spec import Spec

__all__ = ["Policy"]

_COMPILED_IDS = 1 << 21
"""choices from which compiled code is worth its loading"""
_CHOICES = 1 << 17
"""choices looked at together: what they need stays in cache"""


class Policy(Spec):
    """No parameters. Among equally near replicas the token draws, all alike."""

    def assign(
        self,
        expert_TLK: AnyArray,
        source_rank_T: AnyArray,
        placement: Placement,
        seed: int,
        token_T: AnyArray | None = None,
    ) -> NDArray[np.int32]:
        """See `moesim.dispatch.DispatchPolicy.assign`. `placement.rank_to_node` says which ranks share a
        node."""
        tokens, layers, choices = expert_TLK.shape
        token = np.arange(tokens) if token_T is None else np.asarray(token_T)
        rank_T = np.asarray(source_rank_T, dtype=np.int64)
        large = placement.max_replicas > 1 and layers == placement.num_layers and expert_TLK.size >= _COMPILED_IDS
        fast = compiled("moesim.dispatch.compiled") if large else None
        if fast is not None:
            key_T, place_C = hash_keys(seed, token, layers * choices)
            nearest: NDArray[np.int32] = fast.nearest_slots(expert_TLK, rank_T, key_T, place_C, placement)
            return nearest
        flat = flat_expert(expert_TLK, placement)
        if placement.max_replicas == 1:
            return placement.first_slot_LE.ravel()[flat]
        slot = placement.first_slot_LE.ravel()[flat]
        several = placement.replica_count_LE.ravel() > 1
        step = max(1, _CHOICES // (layers * choices))
        for lo in range(0, tokens, step):
            part = slice(lo, min(lo + step, tokens))
            where = np.nonzero(several[flat[part]])  # only experts with replicas leave a choice
            chosen = flat[part][where]
            first, number = _nearest(chosen, rank_T[part][where[0]], placement)
            replica = first + draw_below(hash_TLK(seed, token[part], layers, choices)[where], number)
            slot[part][where] = placement.expert_to_slots_LEX.ravel()[chosen * placement.max_replicas + replica]
        return slot

    def split(self, count_LE: IntArray, placement: Placement) -> IntArray:
        """See `moesim.dispatch.DispatchPolicy.split`: without source ranks the split is even.

        With them, `moesim.dispatch.split_local` splits [G, L, E].
        """
        return split(count_LE, placement, "uniform")


def _nearest(flat_N: IntArray, rank_N: IntArray, placement: Placement) -> tuple[IntArray, IntArray]:
    """First number and how many of the nearest replicas of each choice. Replicas are in order of rank, so
    those of a rank and those of a node stand together.
    """
    before = placement.replicas_before_rank_LEG.reshape(-1, placement.num_ranks + 1)
    on_rank = before[flat_N, rank_N].astype(np.int64)
    number = before[flat_N, rank_N + 1] - on_rank
    low_G, high_G = placement.node_range_G
    on_node = before[flat_N, low_G[rank_N]].astype(np.int64)
    number_on_node = before[flat_N, high_G[rank_N]] - on_node
    everywhere = before[flat_N, placement.num_ranks].astype(np.int64)
    first = np.where(number > 0, on_rank, np.where(number_on_node > 0, on_node, 0))
    return first, np.where(number > 0, number, np.where(number_on_node > 0, number_on_node, everywhere))
