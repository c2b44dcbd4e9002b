"""Experts are stored in the model's own number format, all of them, each its own."""

from __future__ import annotations

import numpy as np

from moesim.offload import Compressed, OffloadContext, StepRoutes
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`."""
        shape = (context.num_layers, context.num_experts)
        own_E = np.arange(context.num_experts, dtype=np.int64)
        return Compressed(np.full(shape, bits), np.broadcast_to(own_E, shape))

    def prune(self, step: StepRoutes, layer: int) -> None:
        """See `moesim.offload.PrecisionPolicy.prune`."""
