"""A surrogate of training with an auxiliary balance loss: the shift of the logits that its gradient would have made.

The loss is Switch's (arXiv:2101.03961, eq. 4-6), L = alpha * E * sum_e f_e P_e, with f_e the share of the batch's
choices that fell on expert e and P_e its mean probability. A reconstruction: the scores of a simulation do not learn,
so the router's reply is kept as one shift b_e of each expert's logit, moved against dL/db with f held fixed. `pull`
stands for the language-model loss, which draws a router back to where the text wants it; papers give neither figure.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.routing import Floats, Routed, Router, RoutingContext, softmax, top_ids
from moesim.routing.select import gates_of, load_of

__all__ = ["Policy"]

_ROWS = 512
"""Summed in the scores' dtype, before sums go on in float64."""


class Policy(Router):
    """alpha: weight of the loss. rate: how far a step moves the logits, against E dL/db (with E, a mean probability's
    1 / E does not slow large models down). pull: share of the shift that a step undoes, per unit of rate.

    norm_topk_prob: divide the chosen gates by their sum; none: as the model does. scaling_factor: multiplies the
    gates.
    """

    stateful: ClassVar[bool] = True

    alpha: float = Field(default=0.01, ge=0)
    rate: float = Field(default=1.0, ge=0)
    pull: float = Field(default=0.0, ge=0)
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K highest score + shift, gates from the shifted scores; state {"bias_E": float64}, zeros at first."""
        experts = score_TE.shape[1]
        bias_E = np.asarray(context.state.get("bias_E", np.zeros(experts)), np.float64)
        shifted_TE = score_TE + bias_E.astype(score_TE.dtype)
        expert_TK = top_ids(shifted_TE, context.top_k)
        share_TE = softmax(shifted_TE)
        if context.training and len(score_TE):
            step_E = experts * self.alpha * _slope(share_TE, load_of(expert_TK, experts)) + self.pull * bias_E
            bias_E = bias_E - self.rate * step_E
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TK, gates_of(share_TE, expert_TK, normalise, self.scaling_factor), {"bias_E": bias_E})


def _slope(share_TE: Floats, load_E: NDArray[np.int64]) -> NDArray[np.float64]:
    """d/db of E sum_e f_e P_e, f fixed: E / T sum_t p_te (f_e - sum_j f_j p_tj), [E]."""
    tokens, experts = share_TE.shape
    share_E = load_E / load_E.sum()
    narrow_E = share_E.astype(share_TE.dtype)
    total_2E = np.zeros((2, experts))
    for at in range(0, tokens, _ROWS):
        block = share_TE[at : at + _ROWS]
        total_2E[0] += block.sum(0)
        total_2E[1] += np.einsum("t,te->e", np.einsum("te,e->t", block, narrow_E), block)
    slope_E: NDArray[np.float64] = experts * (share_E * total_2E[0] - total_2E[1]) / tokens
    return slope_E
