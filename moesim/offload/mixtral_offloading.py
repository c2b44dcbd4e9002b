"""Mixtral-offloading (Eliseev and Mazur, arXiv:2312.17238; github.com/dvmazur/mixtral-offloading): in each layer so
many experts are off the device at any time, and who comes swaps with who leaves.

What else belongs to the system is said elsewhere: it evicts the least recently used (`policies.eviction: lru`), has
four buffers of one expert on the device (`tiers.staging: 4`), and in the paper, not in the repository, guesses the next
layer's experts by that layer's gate (`policies.prefetch`).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, IntArray
from moesim.errors import BadInput
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.offload.shares import largest_L, too_much
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """offload_per_layer: experts of each layer that are off the device; the same in all. The authors' notebook sets 4
    of 8 for a GPU of 16 GB, and 5 for one of 12. None: as few as the capacity asks for. swap: an expert that leaves
    travels back, because the host keeps no second copy of what is on the device (`ExpertCache._swap`); False: it is
    dropped, as systems do that keep one.
    """

    offload_per_layer: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    swap: bool = True

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. At the start the experts with the highest numbers are on the device
        (`build_model`). Raises BadInput where layers share one pool, Infeasible where the slots do not fit."""
        if context.semantics.pooled:
            raise BadInput(
                "policies.offload mixtral_offloading: each layer has slots of its own, and tiers.pooled gives all "
                "layers one pool. Set tiers.pooled to false, or policies.offload to cached."
            )
        slot_L, experts = largest_L(context), context.num_experts
        kept = min(experts, context.capacity_bytes // int(slot_L.sum()))
        if self.offload_per_layer is not None:
            wanted = experts - self.offload_per_layer
            if wanted < 0:
                raise BadInput(
                    f"policies.offload mixtral_offloading: a layer has {experts} experts, and offload_per_layer is "
                    f"{self.offload_per_layer}. Set it to {experts} at most."
                )
            if wanted > kept:
                needed = wanted * int(slot_L.sum())
                mend = f"Set offload_per_layer to {experts - kept}."
                raise too_much(
                    f"mixtral_offloading (offload_per_layer {self.offload_per_layer})", needed, context, mend
                )
            kept = wanted
        none = np.zeros(context.size_LE.shape, bool)
        initial = none.copy()
        initial[:, experts - kept :] = True
        return OffloadPlan(kept * slot_L, none, initial, none, write_back=self.swap)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`: whatever is missing is fetched."""
        return np.zeros(len(experts), bool)
