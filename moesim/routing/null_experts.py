"""Null experts: some columns of the router stand for doing nothing, and a token's choices among them are free.

Source: Zeng et al. 2024, AdaMoE (arXiv:2406.13233), sections 3.3-3.4: softmax over n true and m null experts, top-k
of all n + m, null experts output zero, weights renormalised over the chosen true ones. Reconstruction where the
scores have true columns only: the null columns' logits are then the row's mean + `null_logit` + `null_spread`
times the row's standard deviation times standard normal noise keyed by seed, step and layer (the paper starts them
as copies of true columns and trains them with a loss that sees the nulls' mean load); `null_logit` is fitted.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from moesim.routing import Floats, Routed, Router, RoutingContext, softmax
from moesim.routing.gating import compact, open_ids, weigh
from moesim.routing.select import check_top_k

__all__ = ["Policy"]


class Policy(Router):
    """null_experts: null columns. top_k: choices among true and null; none: the model's. given: the last columns of
    the scores are the null ones; else they are made from null_logit and null_spread."""

    ragged: ClassVar[bool] = True
    normalised: ClassVar[bool] = True

    null_experts: int = Field(default=8, ge=1, le=4096)
    top_k: int | None = Field(default=None, ge=1)
    given: bool = False
    null_logit: float = 0.0
    null_spread: float = Field(default=1.0, ge=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K best of true and null columns, less the nulls (arXiv:2406.13233, section 3.3); of equals the true."""
        columns = score_TE.shape[1]
        true = columns - self.null_experts if self.given else columns
        if true < 1:
            raise ValueError(f"{columns} columns of scores hold no true expert beside {self.null_experts} null experts")
        k = self.top_k or context.top_k
        check_top_k(k, true + self.null_experts)
        all_TE = score_TE if self.given else np.concatenate([score_TE, self._null(score_TE, context)], axis=1)
        picked_TK = open_ids(all_TE, k)
        expert_TW = compact(picked_TK, (picked_TK >= 0) & (picked_TK < true))[:, : self.width(context.top_k, true)]
        return Routed(expert_TW, weigh(softmax(all_TE)[:, :true], expert_TW, True))

    def _null(self, score_TE: Floats, context: RoutingContext) -> Floats:
        """Logits of the null columns, [T, n]."""
        mean_T1, spread_T1 = _moments(score_TE)
        shape = (len(score_TE), self.null_experts)
        noise_TE = context.generator("routing/null_experts").standard_normal(shape, np.float32)
        null: Floats = (mean_T1 + self.null_logit + self.null_spread * spread_T1 * noise_TE).astype(score_TE.dtype)
        return null

    def score_columns(self, num_experts: int) -> int:
        """The null experts have columns where they are given."""
        return num_experts + (self.null_experts if self.given else 0)

    def width(self, top_k: int, num_experts: int) -> int:
        """All K choices may be true."""
        return min(self.top_k or top_k, num_experts)


def _moments(score_TE: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each row's scores above -inf, [T, 1]."""
    if score_TE.min(initial=0) > -np.inf:
        mean_T1 = score_TE.mean(1, keepdims=True)
        away_TE = (score_TE - mean_T1).astype(np.float64)  # squares of huge scores leave float32
        return mean_T1, np.sqrt(np.einsum("te,te->t", away_TE, away_TE)[:, None] / score_TE.shape[1])
    open_TE = score_TE > -np.inf
    number_T1 = np.maximum(open_TE.sum(1, keepdims=True), 1)
    mean_T1 = np.where(open_TE, score_TE, 0).sum(1, keepdims=True) / number_T1
    away_TE = np.where(open_TE, score_TE - mean_T1, 0)
    return mean_T1, np.sqrt((away_TE**2).sum(1, keepdims=True) / number_T1)
