"""Experts shared by several layers: a token may take those of adjacent layers too.

Columns are all experts of the pool, `layers` slices of equal size; slice `context.layer % layers` is the layer's own.
`softmax` (ReXMoE: candidates of r adjacent layers): probabilities of experts that are not the layer's own are scaled by
a factor that goes from 0 to 1 in training (progressive scaling: local up to 10k steps, linear to 30k steps); taken as
shares of a run of 100k steps, which is ours. `norm_relu` (UniPool: one pool, a router for each layer): the scores' row
divided by its length, negative entries cut to 0, times `scale`; no expert counts as foreign.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from moesim.routing import Floats, Routed, Router, RoutingContext, softmax, top_ids
from moesim.routing.select import close_as, gates_of

__all__ = ["Policy"]


class Policy(Router):
    """layers: how many share the pool. gates: as above. local_until, full_from: shares of training at which scaling of
    foreign experts leaves 0 and reaches 1. scale: of the `norm_relu` gates.

    norm_topk_prob: divide `softmax` gates by their sum; none: as the model does. scaling_factor: multiplies the gates.
    """

    equivariant: ClassVar[bool] = False
    free_gates: ClassVar[bool] = True

    layers: int = Field(default=4, ge=1)
    gates: Literal["softmax", "norm_relu"] = "softmax"
    local_until: float = Field(default=0.1, ge=0, le=1)
    full_from: float = Field(default=0.3, ge=0, le=1)
    scale: float = Field(default=1.0, gt=0)
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.local_until > self.full_from:
            raise ValueError(
                f"local_until must not lie beyond full_from, got {self.local_until:g} and {self.full_from:g}"
            )
        return self

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K best of the pool. Raises ValueError where the layers do not divide it, or too few are open."""
        experts = score_TE.shape[1]
        if experts % self.layers:
            raise ValueError(
                f"layers that share a pool own equal slices: {experts} experts, {self.layers} layers. Set `layers` to a"
                " divisor."
            )
        if self.gates == "norm_relu":
            expert_TK = top_ids(score_TE, context.top_k)
            gate_TK = np.maximum(gates_of(_unit(score_TE), expert_TK, False), 0)
            return Routed(expert_TK, gate_TK * gate_TK.dtype.type(self.scale * self.scaling_factor))
        factor_E = np.full(experts, self._foreign(context.progress), score_TE.dtype)
        own = experts // self.layers
        factor_E[(context.layer % self.layers) * own :][:own] = 1
        share_TE = softmax(score_TE) * factor_E
        choice_TE = close_as(score_TE, share_TE.copy())
        choice_TE[:, factor_E == 0] = -np.inf
        expert_TK = top_ids(choice_TE, context.top_k)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TK, gates_of(share_TE, expert_TK, normalise, self.scaling_factor))

    def _foreign(self, progress: float) -> float:
        """The factor of experts that are not the layer's own."""
        if progress >= self.full_from:
            return 1.0
        return max(0.0, (progress - self.local_until) / (self.full_from - self.local_until))


def _unit(score_TE: Floats) -> Floats:
    """Rows of length 1 over the finite scores."""
    open_TE = np.where(np.isneginf(score_TE), 0, score_TE)
    open_TE = open_TE / np.maximum(np.abs(open_TE).max(1, keepdims=True, initial=0), np.finfo(score_TE.dtype).tiny)
    out: Floats = open_TE / np.maximum(np.sqrt((open_TE * open_TE).sum(1, keepdims=True)), 1)
    return out
