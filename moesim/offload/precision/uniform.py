"""All experts in the same number of bits.

What is lost: accuracy, the more the fewer bits; GPTQ, AWQ and HQQ differ in how much, not in bytes.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.offload import Compressed, OffloadContext
from moesim.offload.precision.base import Precision, own_map, scaled

__all__ = ["Policy"]


class Policy(Precision):
    """width: bits of a weight. group: weights that share a scale of `scale_bits` (128 and fp16: the defaults of GPTQ
    and AWQ, which makes 4.125 bits of 4); None: one scale a row."""

    width: Annotated[float, Field(gt=0, le=16)] = 4.0
    group: Annotated[int, Field(ge=1)] | None = 128
    scale_bits: Annotated[int, Field(ge=0, le=64)] = 16

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`. Raises BadInput where that is not smaller."""
        stored = scaled(self.width, self.group, self.scale_bits, bits)
        return Compressed(np.full((context.num_layers, context.num_experts), stored), own_map(context))
