"""The target that holds most of a request's experts, of those that are not much busier than the least busy one.

Request scheduling of Speculative MoE / Semantic Parallelism (arXiv:2503.04398): what a prompt's tokens will activate is
looked up in a table by vocabulary id, summed, and the request goes to the best rank. The paper lets every rank take one
request a round; here a target may be ahead of the least busy one by `slack`, which is ours. Goes with placement
`semantic`, works with any.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import FloatArray, IntArray
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """predict: `tokens` looks prompts up by vocabulary id in the traffic that the placement was made for; `experts`
    knows what a prompt really activates, which is the most that prediction can give. slack: load (4 for a waiting
    request, 1 for a running one) by which a target may exceed the least loaded one."""

    uses_affinity: ClassVar[bool] = True

    predict: Literal["tokens", "experts"] = "tokens"
    slack: Annotated[int, Field(ge=0, le=1 << 40)] = 8

    def pick(self, load_D: IntArray, request: int, session: int, count: int) -> int:
        """See `moesim.balancing.BalancingPolicy.pick`: of a request of which nothing is known, the least loaded."""
        return int(load_D.argmin())

    def pick_near(self, load_D: IntArray, near_D: FloatArray) -> int:
        """See `moesim.balancing.NearPolicy.pick_near`."""
        return int(np.where(load_D <= load_D.min() + self.slack, near_D, -1.0).argmax())
