"""Selective Sinkhorn routing: the K largest entries of a token's row of an entropic transport plan.

The plan is the matrix exp(score / temperature) scaled so that each token gives away 1 in all and each expert receives
T / E (Cuturi 2013, arXiv:1306.0895; for routing: Clark et al. 2022, arXiv:2202.01169). Selective Sinkhorn Routing uses
it in a small share of training steps and takes the gates from the plan; at other times the router is softmax top-k.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from moesim.rng import generator
from moesim.routing import Floats, Routed, Router, RoutingContext, softmax, top_ids
from moesim.routing.select import check_top_k, gates_of

__all__ = ["Policy", "plan"]


class Policy(Router):
    """iterations: column and row scalings. temperature: of the entropy. share: of the training steps that use the
    plan (drawn by step, the same for all layers). inference: use it outside training too.

    norm_topk_prob: divide the chosen gates by their sum; none: as the model does. scaling_factor: multiplies the
    gates.
    """

    couples: ClassVar[bool] = True

    iterations: int = Field(default=8, ge=1, le=100_000)
    temperature: float = Field(default=1.0, gt=0)
    share: float = Field(default=1.0, ge=0, le=1)
    inference: bool = True
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K largest of each token's row of the plan (where it is not used: of its softmax)."""
        check_top_k(context.top_k, score_TE.shape[1])
        if self._uses_plan(context):
            gate_TE = plan(score_TE, self.temperature, self.iterations)
            choice_TE = np.where(np.isneginf(score_TE), -np.inf, gate_TE)
        else:
            gate_TE, choice_TE = softmax(score_TE), score_TE
        expert_TK = top_ids(choice_TE, context.top_k)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TK, gates_of(gate_TE, expert_TK, normalise, self.scaling_factor))

    def _uses_plan(self, context: RoutingContext) -> bool:
        if not context.training:
            return self.inference
        return bool(generator(context.seed, "routing/sinkhorn", context.step).random() < self.share)


def plan(score_TE: Floats, temperature: float, iterations: int) -> Floats:
    """exp(score / temperature) after `iterations` scalings of columns (sum T / E) then rows (sum 1); in logs.

    Of the scores' dtype; rows sum to 1 exactly up to rounding, columns as far as the iterations have come.
    """
    tokens, experts = score_TE.shape
    log_TE: Floats = score_TE / score_TE.dtype.type(temperature)
    if not tokens:
        return score_TE.copy()
    column = score_TE.dtype.type(np.log(tokens / experts))
    for _ in range(iterations):
        log_TE += column - _log_sum(log_TE, 0)
        log_TE -= _log_sum(log_TE, 1)
    return np.exp(log_TE, out=log_TE)


def _log_sum(log_TE: Floats, axis: int) -> Floats:
    """log of the sum of exp along `axis`, kept as a dimension; 0 where all are -inf, so that they stay so."""
    most = log_TE.max(axis, keepdims=True)
    most = np.where(np.isneginf(most), 0, most)
    total = np.exp(log_TE - most).sum(axis, keepdims=True)
    out: Floats = most + np.log(np.where(total > 0, total, 1))
    return out
