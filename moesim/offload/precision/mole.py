"""MoLE: experts as products with a matrix that they share.

Liu et al., "Mixture of Latent Experts" (arXiv 2503.23100, later MoLAE): W_e = A_e B with B [m, d] for a group of
experts and A_e [n, m] an expert's own, d the hidden and n the intermediate size. Parameters over the original's:
m/d + m/(N n) for a group of N experts. All three matrices of an expert are factored alike (ours: the
paper leaves some whole where their spectrum says so). A_e is what is cached and fetched; B stays on the device.
What is lost: accuracy where the experts' matrices share no row space; the paper reports comparable results after
training (quoted, not computed).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.errors import BadInput
from moesim.offload import Compressed, OffloadContext
from moesim.offload.precision.base import Precision, own_map

__all__ = ["Policy"]

QUALITY = "performance comparable to the whole experts' (arXiv 2503.23100, abstract)"


class Policy(Precision):
    """latent: m as a share of the hidden size d. group: experts that share a matrix; None: all of a layer."""

    latent: Annotated[float, Field(gt=0, le=1)] = 0.5
    group: Annotated[int, Field(ge=1)] | None = None

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`. Raises BadInput where the context has no `expert_shape`, or
        the factors would be no smaller."""
        if context.expert_shape is None:
            raise BadInput(
                "precision mole needs the hidden and intermediate sizes of an expert (context.expert_shape)."
            )
        hidden, inner = context.expert_shape
        group = min(self.group or context.num_experts, context.num_experts)
        latent = round(self.latent * hidden)
        # arXiv 2503.23100: m/d of an expert's own, m/(N n) of what N experts share
        own, shared = latent / hidden, latent / (group * inner)
        if latent < 1 or own + shared >= 1:
            raise BadInput(
                f"factors must be smaller than what they replace: m/d + m/(N n) = {own + shared:.3f} with m = {latent},"
                f" d = {hidden}, n = {inner}, N = {group}. Lower policies.precision.latent or raise group."
            )
        groups = -(-context.num_experts // group)
        mean_L = context.size_LE.mean(axis=1)
        extra = int(np.ceil(mean_L * groups * latent / inner).sum())
        stored_LE = np.full((context.num_layers, context.num_experts), bits * own)
        return Compressed(stored_LE, own_map(context), extra_bytes=extra, quality=QUALITY)
