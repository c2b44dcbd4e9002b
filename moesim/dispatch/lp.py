"""LP dispatch: in every batch the tokens of replicated experts are divided so that the busiest rank serves least
(deepseek-ai/LPLB; SGLang's `--ep-dispatch-algorithm lp`).

LPLB solves a linear program on the GPU and SGLang draws a replica for each token with the shares it gives; here the
optimum is exact, in whole tokens, and met to the token. What planning costs on the GPU (LPLB: about 100 us within a
node) is not priced.
"""

from __future__ import annotations

from moesim.dispatch.min_max import min_max_split
from moesim.dispatch.plan import Batches, Coupled, Plan, plan_of
from moesim.placement import Placement

__all__ = ["Policy"]


class Policy(Coupled):
    """No parameters."""

    def plan(self, batches: Batches, placement: Placement, seed: int) -> Plan:
        """See `moesim.dispatch.plan.Coupled.plan`."""
        return plan_of(placement, min_max_split(batches.count_BLE, placement))
