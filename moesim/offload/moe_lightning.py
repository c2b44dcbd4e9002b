"""MoE-Lightning (Cao et al., arXiv:2411.11217): weights stream through the device, layer after layer, while a large
batch keeps it busy; a share of each layer stays.

The paper's policy is (N, mu, A_g, F_g, r_w, r_c). Here: r_w, the share of weights that stays on the GPU, F_g = 1
(experts on the GPU), the batch N is the engine's, and the two weight buffers of a layer each (section 4.1), generalised
to `look_ahead` + 1 of them. Left out, because a layer of our model is one operation: micro-batches mu, the pages that a
layer's weights are cut into so that they interleave with activations on the link (only their total travels here), and
attention on the CPU (A_g = 0) with a share r_c of KV cache on the GPU: attention runs on the GPU, its cache too.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, IntArray
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.offload.shares import by_popularity, empty_capacity, too_much
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """r_w: share of each layer's experts that stays on the device, rounded down, the most popular ones; None: as large
    as fits. look_ahead: layers that are on their way beside the one that computes; 1 is the paper's double buffer.
    """

    r_w: Annotated[float, Field(ge=0, le=1)] | None = None
    look_ahead: Annotated[int, Field(ge=1, le=1024)] = 1

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. capacity_G holds the buffers, shared out among groups in any way.
        Raises Infeasible where not even they fit."""
        rank_LE = np.empty(context.size_LE.shape, np.int64)  # of each expert within its layer, most popular first
        order = by_popularity(context)
        for layer in range(context.num_layers):
            mine = order[order // context.num_experts == layer] % context.num_experts
            rank_LE[layer, mine] = np.arange(context.num_experts)
        asked = None if self.r_w is None else int(self.r_w * context.num_experts)
        numbers = range(context.num_experts, -1, -1) if asked is None else [asked]
        for number in numbers:
            fixed = rank_LE < number
            buffers = self._buffers(context, fixed)
            if (needed := int(context.size_LE[fixed].sum()) + buffers) <= context.capacity_bytes:
                break
        else:
            mend = "Lower r_w or look_ahead, or leave more memory to experts."
            raise too_much(f"moe_lightning (r_w {number / context.num_experts:.3g})", needed, context, mend)
        none = np.zeros(fixed.shape, bool)
        capacity_G = empty_capacity(context)
        capacity_G += buffers // len(capacity_G)
        capacity_G[: buffers % len(capacity_G)] += 1
        return OffloadPlan(capacity_G, fixed, none, none, paged=True, look_ahead=self.look_ahead)

    def _buffers(self, context: OffloadContext, fixed_LE: BoolArray) -> int:
        """Bytes of the buffers that layers stream through: each as large as what travels of the largest layer."""
        moved_L = np.where(fixed_LE, 0, context.size_LE).sum(axis=1)
        if context.layer_bytes_L is not None:
            moved_L = moved_L + context.layer_bytes_L
        return int(moved_L.max()) * min(self.look_ahead + 1, context.num_layers)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`: all are computed on the GPU (F_g = 1)."""
        return np.zeros(len(experts), bool)
