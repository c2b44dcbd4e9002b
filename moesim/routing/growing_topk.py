"""A frozen random router whose K grows over training.

Source: Chen et al. 2023, SMoE-Dropout (arXiv:2303.01610): router weights are drawn once and never trained,
the number of experts a token rises linearly over training, and at inference any number may be used. The authors'
scripts go from 8 to all 16; gates are the softmax over the chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from moesim.rng import generator
from moesim.routing import Floats, Routed, Router, RoutingContext
from moesim.routing.gating import plain
from moesim.routing.select import check_top_k

__all__ = ["Policy"]


class Policy(Router):
    """first, last: experts a token at the start and the end of training (last none: all). inference: outside training;
    none: the model's K. router: `frozen` draws the router's weights from the seed and the layer and applies them to
    the hidden states (to the scores' rows where there are none); `scores` takes the scores for the frozen router's.
    scoring: gates of the chosen, normalised: softmax or sigmoid; none: as the model does."""

    ragged: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False
    normalised: ClassVar[bool] = True

    first: int = Field(default=1, ge=1)
    last: int | None = Field(default=None, ge=1)
    inference: int | None = Field(default=None, ge=1)
    router: Literal["frozen", "scores"] = "frozen"
    scoring: Literal["softmax", "sigmoid"] | None = None

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The k best of the frozen router's logits, k = round(first + (last - first) * progress) in training."""
        experts = score_TE.shape[1]
        check_top_k(context.top_k, experts)
        k = self.number(context, experts)
        logit_TE = self._frozen(score_TE, context) if self.router == "frozen" else score_TE
        scored = context if self.scoring is None else replace(context, scoring=self.scoring)
        return plain(logit_TE, scored, k, normalise=True)

    def number(self, context: RoutingContext, num_experts: int) -> int:
        """Experts a token takes now, at most E."""
        if not context.training:
            return min(self.inference or context.top_k, num_experts)
        last = self.last or num_experts
        return min(round(self.first + (last - self.first) * context.progress), num_experts)

    def _frozen(self, score_TE: Floats, context: RoutingContext) -> Floats:
        feature_TD = score_TE if context.feature_TD is None else context.feature_TD
        wide_TD = np.where(np.isneginf(feature_TD), 0, feature_TD).astype(np.float64)
        wide_TD /= np.maximum(np.abs(wide_TD).max(1, keepdims=True, initial=0), 1e-300)
        wide_TD /= np.maximum(np.sqrt((wide_TD**2).sum(1, keepdims=True)), 1e-300)
        rng = generator(context.seed, "routing/growing_topk", context.layer)
        logit_TE = wide_TD @ rng.standard_normal((wide_TD.shape[1], score_TE.shape[1]))
        frozen: Floats = np.where(np.isneginf(score_TE), -np.inf, logit_TE).astype(score_TE.dtype)
        return frozen

    def width(self, top_k: int, num_experts: int) -> int:
        """The most that any progress allows."""
        return min(max(self.first, self.last or num_experts, self.inference or top_k), num_experts)
