"""A replica on the token's own rank if there is one, else on its node, else any (SGLang's `static`, by node
too)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, IntArray
from moesim.dispatch import draw_below, flat_expert, hash_TLK, split
from moesim.placement import Placement
from moesim.spec import Spec

__all__ = ["Policy"]


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
        flat = flat_expert(expert_TLK, placement)
        if placement.max_replicas == 1:
            return placement.first_slot_LE.ravel()[flat]
        tokens, layers, choices = flat.shape
        rank_T11 = np.asarray(source_rank_T, dtype=np.int64)[:, None, None]
        first, number = _nearest(flat, rank_T11, placement)
        bits = hash_TLK(seed, np.arange(tokens) if token_T is None else token_T, layers, choices)
        replica = first + draw_below(bits, number)
        return placement.expert_to_slots_LEX.ravel()[flat * placement.max_replicas + replica]

    def split(self, count_LE: IntArray, placement: Placement) -> IntArray:
        """See `moesim.dispatch.DispatchPolicy.split`: without source ranks the split is even.

        With them, `moesim.dispatch.split_local` splits [G, L, E].
        """
        return split(count_LE, placement, "uniform")


def _nearest(flat: IntArray, rank_T11: IntArray, placement: Placement) -> tuple[IntArray, IntArray]:
    """First number and how many of the nearest replicas of each choice. Replicas are in order of rank, so
    those of a rank and those of a node stand together.
    """
    before = placement.replicas_before_rank_LEG.reshape(-1, placement.num_ranks + 1)
    on_rank = before[flat, rank_T11].astype(np.int64)
    number = before[flat, rank_T11 + 1] - on_rank
    low_G, high_G = placement.node_range_G
    on_node = before[flat, low_G[rank_T11]].astype(np.int64)
    number_on_node = before[flat, high_G[rank_T11]] - on_node
    everywhere = before[flat, placement.num_ranks].astype(np.int64)
    first = np.where(number > 0, on_rank, np.where(number_on_node > 0, on_node, 0))
    return first, np.where(number > 0, number, np.where(number_on_node > 0, number_on_node, everywhere))
