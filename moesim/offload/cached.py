"""A cache of experts on the device; what is missing is fetched when it is asked for, or before (`prefetch`)."""

from __future__ import annotations

import numpy as np

from moesim.arrays import BoolArray, IntArray
from moesim.errors import BadInput
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.offload.shares import Share, SlotsPerLayer, layer_capacity, popular
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """warm: the cache starts with the most popular experts of the traffic that may be learned from, else empty.

    share: how layers share the capacity where they have one each. equal: a layer's slots are allocated with the layer,
    so every system that says nothing else does it. entropy: by how many experts a layer's tokens really use. ours:
    ExpertFlow gives slots by predicted demand but not how. slots_per_layer: so many slots, each as large as the layer's
    largest expert; one number, or one a layer.
    """

    warm: bool = True
    share: Share = "equal"
    slots_per_layer: SlotsPerLayer = None

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. BadInput: layers that share one pool are given shares."""
        none = np.zeros(context.size_LE.shape, bool)
        if context.semantics.pooled:
            if self.share != "equal" or self.slots_per_layer is not None:
                raise BadInput(
                    "policies.offload cached: share and slots_per_layer divide the capacity among layers, and "
                    "tiers.pooled gives all layers one. Leave them out, or set tiers.pooled to false."
                )
            capacity_G = np.array([context.capacity_bytes], np.int64)
        else:
            capacity_G = layer_capacity(context, "cached", self.share, self.slots_per_layer)
        initial = popular(context, capacity_G) if self.warm else none
        return OffloadPlan(capacity_G, none, initial, none)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`."""
        return np.zeros(len(experts), bool)
