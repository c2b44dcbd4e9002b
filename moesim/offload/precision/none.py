"""Experts are stored in the model's own number format, all of them, each its own."""

from __future__ import annotations

import numpy as np

from moesim.offload import Compressed, OffloadContext
from moesim.offload.precision.base import Precision, own_map

__all__ = ["Policy"]


class Policy(Precision):
    """No parameters."""

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`."""
        return Compressed(np.full((context.num_layers, context.num_experts), bits), own_map(context))
