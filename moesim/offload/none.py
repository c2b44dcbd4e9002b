"""No offloading: every expert stays in device memory, and nothing is ever fetched."""

from __future__ import annotations

import numpy as np

from moesim.arrays import BoolArray, IntArray
from moesim.errors import Infeasible
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`."""
        needed = int(context.size_LE.sum())
        if needed > context.capacity_bytes:
            raise Infeasible(
                [
                    f"Without offloading all experts are in device memory: they need {needed:,} bytes, "
                    f"{context.capacity_bytes:,} are free. Set policies.offload to cached."
                ],
                needed / max(context.capacity_bytes, 1) - 1,
            )
        every = np.ones(context.size_LE.shape, bool)
        groups = 1 if context.semantics.pooled else context.num_layers
        return OffloadPlan(np.zeros(groups, np.int64), every, ~every, ~every)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`."""
        return np.zeros(len(experts), bool)
