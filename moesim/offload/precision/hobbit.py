"""HOBBIT's misses: an expert that matters little to its tokens is fetched as a copy of fewer bits.

Tang et al., "HOBBIT" (arXiv 2411.01433): host memory keeps each expert in several precisions, and on a miss the gate
weight says which copy travels. A reconstruction: the thresholds and the score that they are compared with are not
public in the text that was read; here the score is the largest gate weight among the rows that wait for the expert,
over its token's largest, and both thresholds are parameters. Ours, too: a copy of fewer bits has the room of a whole
one, so that bytes on the link are saved, not bytes of the cache (the paper keeps two caches, and its eviction weighs
recency, frequency and precision: an eviction policy, not in this file); a hit whose copy is too coarse for the tokens
at hand fetches the better one (`Counters.upgrades`).
What is lost: the paper reports less than 1 % of accuracy at its own thresholds (quoted, not computed).
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from moesim.arrays import BoolArray
from moesim.errors import BadInput
from moesim.offload import Compressed, OffloadContext, StepRoutes
from moesim.offload.precision.base import Precision, own_map

__all__ = ["Policy"]

Share = Annotated[float, Field(ge=0, le=1)]
QUALITY = "less than 1 % accuracy lost (arXiv 2411.01433)"


class Policy(Precision):
    """high: share of the token's largest gate weight from which the stored copy is fetched; from `low` on one of
    `middle_width` bits, below that one of `low_width`. skip: choices below this share are not computed at all; 0: all
    are."""

    high: Share = 0.6
    low: Share = 0.3
    middle_width: Annotated[float, Field(gt=0, le=16)] = 4.0
    low_width: Annotated[float, Field(gt=0, le=16)] = 2.0
    skip: Share = 0.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.skip <= self.low <= self.high or self.low_width > self.middle_width:
            raise ValueError("shares must be in order, skip <= low <= high, and low_width <= middle_width")
        return self

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`."""
        copies = ((self.high, bits), (self.low, min(self.middle_width, bits)), (0.0, min(self.low_width, bits)))
        stored_LE = np.full((context.num_layers, context.num_experts), bits)
        return Compressed(stored_LE, own_map(context), miss_bits=copies, quality=QUALITY)

    def prune(self, step: StepRoutes, layer: int) -> BoolArray | None:
        """Choices below `skip`. Raises BadInput where it is set and gate weights are not known."""
        if self.skip == 0.0:
            return None
        if step.weight_TLK is None:
            raise BadInput("policies.precision.skip is a share of gate weights, which these routes lack. Use 0.")
        weight = step.weight_TLK[:, layer]
        return np.asarray(weight < self.skip * weight.max(axis=1, keepdims=True))
