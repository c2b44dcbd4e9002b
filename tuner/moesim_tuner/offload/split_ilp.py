"""The device and the CPU share experts so that the expected step ends first: who stays is chosen with a proof.

Where `expert_split` lets the most used experts of each layer stay, this asks what each set of them saves: a layer whose
misses come together pays the hand-over once, the first of them may hide behind the device's own work, and link and CPU
take the others side by side. So resident sets are judged by the time of a layer (`layer_times`) over steps of the
sample, as many tokens at a time as the scenario serves, and one budget is divided over all layers by a
multiple-choice knapsack (`resident`, `moesim_tuner.knapsack`): the layers that gain most from another expert get it.
A miss goes to the CPU or over the link so that its layer ends first, as in `expert_split`.

No system of its own. Steps of prompts are not looked at: they take nearly all experts whoever stays.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.offload import MissCosts, OffloadContext, OffloadPlan, Proof
from moesim.offload.shares import by_popularity, empty_capacity, fill, shortest_layer
from moesim.spec import Spec
from moesim_tuner.offload.layer_times import active_LSE, ns_AM
from moesim_tuner.offload.resident import Problem, Resident, solve

__all__ = ["Policy"]

_LEAST_STEPS = 64


class Policy(Spec):
    """sample: steps of one token that sets are judged by, at most; of n tokens 1/sqrt(n) of that. With an eighth of
    them a set was better on these and worse on others. running: tokens of a step; None: as many requests as decode
    together in the scenario. tolerance: a gap to the bound up to this share is left. deterministic_time: the solver's
    (a unit took 1 to 9 seconds).
    """

    sample: Annotated[int, Field(ge=1, le=1 << 20)] = 4096
    running: Annotated[int, Field(ge=1, le=65536)] | None = None
    tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-3
    deterministic_time: Annotated[float, Field(gt=0, le=1e6)] = 0.5

    def plan(self, context: OffloadContext) -> OffloadPlan:
        """See `moesim.offload.OffloadPolicy.plan`. Without a sample the most popular experts stay, and nothing is
        proven."""
        found = self.solve(context)
        if found is None:
            fixed = np.zeros(context.size_LE.shape, bool)
            proof = None
        else:
            fixed, part = found.stays_LE, found.part
            proof = Proof("ns of a step's experts", part.objective, part.bound, part.status, part.units)
        left = np.array([context.capacity_bytes - int(context.size_LE[fixed].sum())], np.int64)
        order = by_popularity(context)
        order = order[~fixed.reshape(-1)[order]]
        fixed = fixed | fill(context, order, left, np.zeros(context.num_keys, np.int64))
        none = np.zeros(fixed.shape, bool)
        return OffloadPlan(empty_capacity(context), fixed, none, none, proof=proof)

    def solve(self, context: OffloadContext) -> Resident | None:
        """The resident set and what is proven of it; None where there is nothing to learn from."""
        problem = self.problem(context)
        return None if problem is None else solve(problem, self.tolerance, self.deterministic_time)

    def problem(self, context: OffloadContext) -> Problem | None:
        """What is to be solved; None where the context has no sample."""
        if context.fit is None or not len(context.fit.expert_TLK):
            return None
        running = self.running or context.costs.running
        # the same tokens stand in several steps, beside others: fewer steps than that are learned by heart
        steps = max(_LEAST_STEPS, round(self.sample / math.sqrt(running)))
        active = active_LSE(context.fit, context, running, steps)
        rows = running * context.top_k
        return Problem(active, ns_AM(context.costs, active.sum(axis=2), rows), context.size_LE, context.capacity_bytes)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        """See `moesim.offload.OffloadPolicy.on_cpu`: see `shares.shortest_layer`."""
        cpu_ns: FloatArray = np.array([costs.cpu_ns(int(n)) for n in rows.tolist()], np.float64)
        return shortest_layer(cpu_ns, costs.transfer_ns, costs.sync_ns)
