"""Relative-norm halting: a token takes no experts any more once its hidden state has nearly stopped to change.

Source: Ternovtsii and Bilak 2026, Equifinality in MoE (arXiv:2604.14419): zero-shot halting by relative norm. Read in
its abstract, which gives neither the formula nor the threshold; there a token may stop between the hops of one layer,
here it stops from layer to layer. Hidden states are not simulated, so the change is a stated stand-in
(reconstruction): |p_t| / (1 + layer)^power, where |p_t| is the 2-norm of the token's gates over all experts (updates of
equal norm that point apart add up like that) and the residual stream grows by one such update a layer.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from moesim.routing import NONE, Floats, Routed, Router, RoutingContext, softmax
from moesim.routing.gating import plain
from moesim.routing.select import check_top_k

__all__ = ["Policy"]


class Policy(Router):
    """threshold: relative change under which a token stops after a layer (a fitted quantity). power: how fast the
    change falls with depth. free_layers: the first so many layers stop nobody."""

    ragged: ClassVar[bool] = True

    threshold: float = Field(default=0.05, ge=0)
    power: float = Field(default=1.0, ge=0, le=8)
    free_layers: int = Field(default=1, ge=0)
    norm_topk_prob: bool | None = None

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Top-k for tokens that still run, NONE for the rest; `carry` hands up who has stopped, `stopped_T`. Raises
        ValueError for a carry of other tokens."""
        tokens = len(score_TE)
        check_top_k(context.top_k, score_TE.shape[1])
        stopped_T = context.carry.get("stopped_T", np.zeros(tokens, bool))
        if len(stopped_T) != tokens:
            raise ValueError(f"who has stopped must be known of the same tokens: {len(stopped_T)}, scores of {tokens}")
        runs = np.flatnonzero(~stopped_T)
        routed = plain(score_TE[runs], context, normalise=self.norm_topk_prob)
        expert_TK = np.full((tokens, context.top_k), NONE, np.int32)
        gate_TK = np.zeros((tokens, context.top_k), score_TE.dtype)
        expert_TK[runs], gate_TK[runs] = routed.expert_TK, routed.gate_TK
        if context.layer >= self.free_layers:
            norm_T = np.sqrt((softmax(score_TE).astype(np.float64) ** 2).sum(1))
            stopped_T = stopped_T | (norm_T / (1 + context.layer) ** self.power < self.threshold)
        return Routed(expert_TK, gate_TK, carry={"stopped_T": np.array(stopped_T)})
