"""Experts split between the device and the CPU so that each layer ends first: what a planner would want.

No system of its own; Fiddler and KTransformers are corners of it (a fixed rule for misses, and no fetches at all).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, IntArray
from moesim.errors import BadInput
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.offload.shares import Share, SlotsPerLayer, by_popularity, fill, layer_capacity, popular, shortest_layer
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """share, slots_per_layer: how layers share the device, as in `cached`. fixed_share: of a layer's part, how much
    holds its most popular experts for good; the rest is a cache that fetched experts enter. 1: where the CPU can take
    misses, a fetch to keep seldom pays, and a static placement cannot thrash.
    """

    share: Share = "equal"
    slots_per_layer: SlotsPerLayer = None
    fixed_share: Annotated[float, Field(ge=0, le=1)] = 1.0

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. Raises BadInput where layers share one pool."""
        if context.semantics.pooled:
            raise BadInput(
                "policies.offload expert_split: each layer has a part of the device, and tiers.pooled gives all layers "
                "one pool. Set tiers.pooled to false."
            )
        part_L = layer_capacity(context, "expert_split", self.share, self.slots_per_layer)
        fixed = popular(context, np.floor(part_L * self.fixed_share).astype(np.int64))
        cache_L = part_L - np.where(fixed, context.size_LE, 0).sum(axis=1)
        if self.fixed_share == 1:
            cache_L = np.zeros_like(cache_L)
            fixed = self._filled_up(context, fixed)
        order = np.argsort(-np.where(fixed, -np.inf, context.popularity_LE).reshape(-1), kind="stable")
        initial = fill(context, order[: int((~fixed).sum())], cache_L, context.group_K)
        return OffloadPlan(cache_L, fixed, initial, np.zeros(fixed.shape, bool))

    def _filled_up(self, context: OffloadContext, fixed: BoolArray) -> BoolArray:
        """Parts of layers are no whole experts: what that leaves goes to the most popular of all layers."""
        if self.slots_per_layer is not None:
            return fixed
        left = np.array([context.capacity_bytes - int(context.size_LE[fixed].sum())], np.int64)
        order = by_popularity(context)
        order = order[~fixed.reshape(-1)[order]]
        return fixed | fill(context, order, left, np.zeros(context.num_keys, np.int64))

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`: see `shares.shortest_layer`."""
        cpu_ns = np.array([costs.cpu_ns(int(n)) for n in rows.tolist()], np.float64)
        return shortest_layer(cpu_ns, costs.transfer_ns, costs.sync_ns)
