"""A cache of experts on the device; what is missing is fetched when it is asked for, or before (`prefetch`)."""

from __future__ import annotations

import numpy as np

from moesim.arrays import BoolArray, IntArray
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """warm: the cache starts with the most popular experts of the traffic that may be learned from, else empty."""

    warm: bool = True

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. Layers get the capacity in equal parts."""
        none = np.zeros(context.size_LE.shape, bool)
        if context.semantics.pooled:
            capacity_G = np.array([context.capacity_bytes], np.int64)
        else:
            capacity_G = np.full(context.num_layers, context.capacity_bytes // context.num_layers, np.int64)
        initial = self._popular(context, capacity_G) if self.warm else none
        return OffloadPlan(capacity_G, none, initial, none)

    def _popular(self, context: OffloadContext, capacity_G: IntArray) -> BoolArray:
        """The most popular that fit into each group, the lower key first among equals."""
        out = np.zeros(context.num_keys, bool)
        left = capacity_G.tolist()
        group_K, size_K = context.group_K.tolist(), context.size_K.tolist()
        for key in np.argsort(-context.popularity_LE.reshape(-1), kind="stable").tolist():
            if left[group_K[key]] >= size_K[key]:
                left[group_K[key]] -= size_K[key]
                out[key] = True
        return out.reshape(context.size_LE.shape)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`."""
        return np.zeros(len(experts), bool)
