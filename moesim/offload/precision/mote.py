"""MoTE: routed experts whose weights are -1, 0 or 1.

Wang et al., "MoTE" (arXiv 2506.14435): the dense model's feed-forward block stays as a shared expert in full precision,
and the routed experts are trained ternary. The shared expert is no routed one, so it stands in the model, not here.
What is lost: it must be trained; the paper reports the full-precision MoE-LLaVA's level (quoted, not computed).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from moesim.offload import Compressed, OffloadContext
from moesim.offload.precision.base import Precision, own_map, scaled

__all__ = ["Policy"]

QUALITY = "4.3 % more average accuracy than MoE-LLaVA at the same 3.4 GB of experts (arXiv 2506.14435, abstract)"


class Policy(Precision):
    """packing: `two_bits` as kernels store a weight, or `ideal`, log2(3) bits: five weights in eight bits nearly reach
    it."""

    packing: Literal["two_bits", "ideal"] = "two_bits"

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`."""
        width = scaled(2.0 if self.packing == "two_bits" else math.log2(3), None, 0, bits)
        shape = (context.num_layers, context.num_experts)
        return Compressed(np.full(shape, width), own_map(context), quality=QUALITY)
