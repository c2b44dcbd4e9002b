"""Fiddler (Kamahori et al., arXiv:2402.07033; github.com/efeslab/fiddler): the most popular experts are on the GPU for
good; of what is missing the CPU computes experts with few tokens, and those with many are copied over for once.

As in `src/fiddler/mixtral.py`: n = floor((0.95 * memory - used) / bytes) experts, the first of a list over all layers
(0.95 is the scenario's `engine.gpu_memory_utilization`); in each layer the set S of experts for the CPU is chosen by
CPU time proportional to tokens, GPU time of one transfer for a missing expert and 0 for one that is there. The comment
says that max(CPU's sum, GPU's sum) is made least, the code that their sum is.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, IntArray
from moesim.offload import MissCosts, OffloadContext, OffloadPlan
from moesim.offload.shares import by_popularity, empty_capacity, fill, shortest_layer
from moesim.spec import Spec

__all__ = ["Policy"]

Ms = Annotated[float, Field(gt=0, le=1e6)]


class Policy(Spec):
    """objective: what the choice makes least: `sum` as the code has it, `max` as its comment has it. latency_cpu_ms: of
    one token in one expert on the CPU, latency_gpu_ms: of copying one expert; the code has 7 and 70 for every machine.
    None: what one row costs the scenario's CPU, and what one expert takes on its links.
    """

    objective: Literal["sum", "max"] = "sum"
    latency_cpu_ms: Ms | None = None
    latency_gpu_ms: Ms | None = None

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. Nothing that is fetched stays: there is no cache."""
        everyone = np.zeros(context.num_keys, np.int64)
        capacity = np.array([context.capacity_bytes], np.int64)
        fixed = fill(context, by_popularity(context), capacity, everyone)
        none = np.zeros(fixed.shape, bool)
        return OffloadPlan(empty_capacity(context), fixed, none, none)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`. An expert that is there costs nothing on the GPU, so only missing
        ones are chosen from. A sum is least where each term is; equals go to the GPU, as in the code."""
        token_ns = costs.cpu_ns(1) if self.latency_cpu_ms is None else self.latency_cpu_ms * 1e6
        copy_ns = costs.transfer_ns if self.latency_gpu_ms is None else self.latency_gpu_ms * 1e6
        cpu_ns = np.asarray(rows, np.float64) * token_ns
        if self.objective == "sum":
            return cpu_ns < copy_ns
        return shortest_layer(cpu_ns, copy_ns, 0.0)
