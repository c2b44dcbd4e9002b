"""Experts shared by several layers: a token may take those of adjacent layers too.

Columns are all experts of the pool, `layers` slices of equal size; slice `context.layer % layers` is the layer's own.
`softmax` (ReXMoE, arXiv:2510.17483, section 3.3, eq. 6): in training the candidates grow from the layer's own N experts
to all r N (progressive scaling: local up to 10k steps, linear to 30k steps); each step and layer draws which of the
foreign ones are masked, and these have gate 0. Steps as shares of 100 B tokens at 512 sequences of 4,096 a step, about
48k steps. Own experts are never masked, which the phase of local routing demands and eq. 6 leaves open. `norm_relu`
(UniPool: one pool, a router for each layer): the scores' row divided by its length, negative entries cut to 0, times
`scale`; no expert counts as foreign.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moesim.routing import Floats, Routed, Router, RoutingContext, softmax, top_ids
from moesim.routing.select import close_as, gates_of

__all__ = ["Policy"]


class Policy(Router):
    """layers: how many share the pool. gates: as above. local_until, full_from: shares of training up to which only the
    layer's own experts are open, and from which all are. scale: of the `norm_relu` gates.

    norm_topk_prob: divide `softmax` gates by their sum; none: as the model does. scaling_factor: multiplies the gates.
    """

    equivariant: ClassVar[bool] = False
    free_gates: ClassVar[bool] = True

    layers: int = Field(default=4, ge=1)
    gates: Literal["softmax", "norm_relu"] = "softmax"
    local_until: float = Field(default=0.21, ge=0, le=1)
    full_from: float = Field(default=0.63, ge=0, le=1)
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
        share_TE = softmax(score_TE)
        choice_TE = close_as(score_TE, share_TE.copy())
        choice_TE[:, self._masked(experts, context)] = -np.inf
        expert_TK = top_ids(choice_TE, context.top_k)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TK, gates_of(share_TE, expert_TK, normalise, self.scaling_factor))

    def candidates(self, progress: float, num_experts: int) -> int:
        """How many of the pool's experts a layer may take at `progress`."""
        if progress >= self.full_from:
            return num_experts
        grown = max(0.0, (progress - self.local_until) / (self.full_from - self.local_until))
        own = num_experts // self.layers
        # arXiv:2510.17483, eq. 6: N_t = floor((1 + (r - 1) (t - t_s) / (t_e - t_s)) N); 1e-9: 0.42 is half way
        return math.floor((1 + (self.layers - 1) * grown) * own + 1e-9)

    def _masked(self, num_experts: int, context: RoutingContext) -> NDArray[np.int64]:
        """Foreign experts that this step of this layer leaves out."""
        closed = num_experts - self.candidates(context.progress, num_experts)
        own = num_experts // self.layers
        at = (context.layer % self.layers) * own
        foreign = np.delete(np.arange(num_experts), slice(at, at + own))
        if not closed:
            return foreign[:0]
        drawn: NDArray[np.int64] = context.generator("routing/shared_pool").permutation(foreign)[:closed]
        return drawn


def _unit(score_TE: Floats) -> Floats:
    """Rows of length 1 over the finite scores."""
    open_TE = np.where(np.isneginf(score_TE), 0, score_TE)
    open_TE = open_TE / np.maximum(np.abs(open_TE).max(1, keepdims=True, initial=0), np.finfo(score_TE.dtype).tiny)
    out: Floats = open_TE / np.maximum(np.sqrt((open_TE * open_TE).sum(1, keepdims=True)), 1)
    return out
