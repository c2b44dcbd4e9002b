"""A step runs as the engine batched it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moesim.arrays import IntArray
from moesim.offload import StepRoutes
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    pool: ClassVar[int] = 1

    def split(self, step: StepRoutes, num_experts: int, limit: int) -> list[IntArray]:
        """See `moesim.offload.RebatchingPolicy.split`."""
        tokens = np.arange(len(step.expert_TLK), dtype=np.int64)
        return [tokens[i : i + limit] for i in range(0, len(tokens), limit)]
