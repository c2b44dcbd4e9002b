"""Dynamic top-p: the likeliest experts until their probabilities add up to more than p, the last one included.

Source: Huang et al. 2024, "Harder Tasks Need More Experts" (arXiv:2403.07652); p = 0.4, probabilities
are the weights as they are (`norm_topk_prob: false`). As in the authors' code the sum must exceed p, and one that
only equals it takes one expert more; where it never exceeds p all experts are taken. The entropy loss of training
shapes the scores and is no part of the rule.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.routing import NONE, Floats, Routed, Router, RoutingContext, softmax
from moesim.routing.gating import descending, weigh
from moesim.routing.select import chosen

__all__ = ["Policy"]

_FEW = 16


class Policy(Router):
    """p: probability to be exceeded. most: cap on experts a token; none: all. norm_topk_prob: divide the chosen
    gates by their sum; none: as the model does."""

    ragged: ClassVar[bool] = True

    p: float = Field(default=0.4, gt=0, le=1)
    most: int | None = Field(default=None, ge=1)
    norm_topk_prob: bool | None = None

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The smallest prefix, by falling probability, whose sum exceeds p (arXiv:2403.07652).

        As wide as the hungriest token of the batch. Always softmax, whatever the model scores by.
        """
        prob_TE = softmax(score_TE)
        most = self.width(context.top_k, score_TE.shape[1])
        order_TE = descending(score_TE)[:, :most].astype(np.int32)
        taken_TE = self._prefix(prob_TE, order_TE[:, :_FEW])  # mostly few experts do
        if most > _FEW and (self.p == 1 or taken_TE[:, -1].any()):
            taken_TE = self._prefix(prob_TE, order_TE)
        order_TE = order_TE[:, : taken_TE.shape[1]]
        taken_TE &= chosen(score_TE, order_TE) > -np.inf
        widest = max(1, int(taken_TE.sum(1).max(initial=0)))
        expert_TW = np.where(taken_TE, order_TE, NONE)[:, :widest].astype(np.int32)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TW, weigh(prob_TE, expert_TW, normalise))

    def _prefix(self, prob_TE: Floats, order_TE: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of a row's experts are needed: those before which the sum is at most p."""
        if self.p == 1:
            return np.ones(order_TE.shape, bool)
        sorted_TE = chosen(prob_TE, order_TE)
        before_TE = np.zeros_like(sorted_TE)
        np.cumsum(sorted_TE[:, :-1], axis=1, out=before_TE[:, 1:])
        needed_TE: NDArray[np.bool_] = before_TE <= self.p
        return needed_TE

    def width(self, top_k: int, num_experts: int) -> int:
        """`most`, or all experts."""
        return min(self.most or num_experts, num_experts)
