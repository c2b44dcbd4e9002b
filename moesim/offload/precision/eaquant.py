"""EAQuant: weights and activations in few bits, with the router kept where it was.

Fu et al., "EAQuant" (arXiv 2506.13329): smoothing, router alignment and calibration change how accurate W4A4 and W3A4
are, not how many bytes they take. What a simulator sees are the bytes, and routes that move because the router's input
was rounded: `drift_share`, a parameter (the paper reports none that could be read; its router alignment is there to
make it small). With the scores of all experts known, a token whose route moves takes its next best in place of its
weakest choice, else any other (ours).
What is lost: accuracy against the unrounded model, but 1.15 to 2.28 % less of it than with earlier methods (quoted).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import IntArray
from moesim.offload import Compressed, OffloadContext, StepRoutes
from moesim.offload.precision.base import Precision, own_map, scaled
from moesim.rng import generator

__all__ = ["Policy"]

QUALITY = "1.15 to 2.28 % higher average score than earlier methods at W4A4 and W3A4 (arXiv 2506.13329v2, abstract)"


class Policy(Precision):
    """width: bits of a weight, 4 (W4A4) or 3 (W3A4), one scale a row unless `group` says otherwise. drift_share: of
    tokens, in each layer, whose weakest choice is another expert than the unrounded model's. seed: of its draws."""

    width: Annotated[float, Field(gt=0, le=8)] = 4.0
    group: Annotated[int, Field(ge=1)] | None = None
    scale_bits: Annotated[int, Field(ge=0, le=64)] = 16
    drift_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`."""
        stored = scaled(self.width, self.group, self.scale_bits, bits)
        shape = (context.num_layers, context.num_experts)
        return Compressed(np.full(shape, stored), own_map(context), quality=QUALITY)

    def drift(self, step: StepRoutes, layer: int, num_experts: int) -> IntArray | None:
        """See `moesim.offload.PrecisionPolicy.drift`."""
        ids = np.array(step.expert_TLK[:, layer], np.int64)
        tokens, k = ids.shape
        if self.drift_share == 0.0 or k >= num_experts:
            return None
        rng = generator(self.seed, "eaquant/drift", step.number, layer)
        moves_T = rng.random(tokens) < self.drift_share
        wish_TE = rng.random((tokens, num_experts))
        if step.score_TLE is not None:
            wish_TE = np.asarray(step.score_TLE[:, layer], np.float64).copy()
        taken_TE = np.zeros((tokens, num_experts + 1), bool)
        np.put_along_axis(taken_TE, np.minimum(ids, num_experts), True, axis=1)
        wish_TE[taken_TE[:, :-1]] = -np.inf
        weakest_T = np.full(tokens, k - 1)
        if step.weight_TLK is not None:
            weakest_T = np.asarray(step.weight_TLK[:, layer].argmin(axis=1))
        rows = np.flatnonzero(moves_T)
        ids[rows, weakest_T[rows]] = wish_TE[rows].argmax(axis=1)
        return ids
