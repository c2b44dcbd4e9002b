"""Every token draws a replica of its expert, all alike (SGLang's `dynamic`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, IntArray
from moesim.dispatch import draw_below, flat_expert, hash_TLK, split
from moesim.placement import Placement
from moesim.spec import Spec

__all__ = ["Policy"]


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
        """See `moesim.dispatch.DispatchPolicy.assign`."""
        flat = flat_expert(expert_TLK, placement)
        if placement.max_replicas == 1:
            return placement.first_slot_LE.ravel()[flat]
        tokens, layers, choices = flat.shape
        bits = hash_TLK(seed, np.arange(tokens) if token_T is None else token_T, layers, choices)
        replica = draw_below(bits, placement.replica_count_LE.ravel()[flat])
        slot_TLK: NDArray[np.int32] = placement.expert_to_slots_LEX.ravel()[flat * placement.max_replicas + replica]
        return slot_TLK

    def split(self, count_LE: IntArray, placement: Placement) -> IntArray:
        """See `moesim.dispatch.DispatchPolicy.split`; the expected even split."""
        return split(count_LE, placement, "uniform")
