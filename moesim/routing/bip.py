"""BIP balancing: prices of experts from a few dual steps of the balanced assignment, before the choice.

Source: "Binary-Integer-Programming based Algorithm for Expert Load Balancing in Mixture-of-Experts Models", Sun 2025
(arXiv:2502.15451). The programme: choose x in {0, 1} with the highest sum of s x, at most K experts a token and
c = T K / E tokens an expert; p_t and q_e are the prices of the two constraints, and each step sets one side to its
best value given the other.

A step never worsens the dual, but it can stop short of the best (the dual is not smooth), and where prices are carried
from batch to batch (`warm`) each batch's noise raises them until no token has a price left: batches
after some tens are balanced less well than the first. `warm: false` with 14 iterations balances every batch to a few
per cent.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from moesim.routing import Floats, Routed, Router, RoutingContext, softmax, top_ids
from moesim.routing.select import check_top_k, close_as, gates_of, kth_highest

__all__ = ["Policy", "prices"]


class Policy(Router):
    """iterations: dual steps a batch. warm: start from the prices of the step before (else from zero).
    Outside training too the prices are solved anew for every batch; a simulation hands none on while it serves, so that
    each batch starts from those of the warm-up.

    norm_topk_prob: divide the chosen gates by their sum; none: as the model does. scaling_factor: multiplies the
    gates.
    """

    couples: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    iterations: int = Field(default=4, ge=1, le=10_000)
    warm: bool = True
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K highest s - q; state {"q_E"}: the prices, of the scores' dtype."""
        experts = score_TE.shape[1]
        check_top_k(context.top_k, experts)
        share_TE = softmax(score_TE)
        start_E = context.state.get("q_E") if self.warm else None
        q_E = np.zeros(experts, score_TE.dtype) if start_E is None else np.asarray(start_E, score_TE.dtype)
        if len(share_TE):
            q_E = prices(share_TE, context.top_k, self.iterations, q_E)[1]
        expert_TK = top_ids(close_as(score_TE, share_TE - q_E), context.top_k)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TK, gates_of(share_TE, expert_TK, normalise, self.scaling_factor), {"q_E": q_E})


def prices(share_TE: Floats, top_k: int, iterations: int, q_E: Floats) -> tuple[Floats, Floats]:
    """Prices p_T of tokens' places and q_E of experts' after `iterations` steps from `q_E`, of the shares' dtype.

    p_t = max(0, (K+1)-th highest of s_t - q), q_e = max(0, (c+1)-th highest of s_.e - p), c = max(1, floor(T K / E)).
    """
    tokens, experts = share_TE.shape
    room = max(1, tokens * top_k // experts)
    p_T = np.zeros(tokens, share_TE.dtype)
    share_ET = np.ascontiguousarray(share_TE.T)
    for _ in range(iterations):
        if top_k < experts:
            p_T = np.maximum(kth_highest(share_TE, top_k + 1, q_E), 0)
        q_E = np.maximum(kth_highest(share_ET, room + 1, p_T), 0) if room < tokens else np.zeros_like(q_E)
    return p_T, q_E
