"""Tiers: how much a token matters decides how dear an expert it takes, or none; or which of its experts run in an
approximate twin.

Source: Alizadeh et al. 2024, Duo-LLM (arXiv:2410.10846): each token takes the big module, the small one or skips the
layer; the paper's oracles search 2^n or 3^n paths, its routers are learnt. Reconstruction: importance is the entropy of
the token's gates over log E (a token the router is unsure of profits from more work), and stated shares or thresholds
cut it. Han et al. 2025, Informed Routing (arXiv:2510.13831): execute or approximate instead of execute or skip;
reconstruction: a chosen expert whose gate is below `approximate_below` runs as its twin, id + E / 2 (the paper learns
which unit to run under a stated share).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moesim.routing import Floats, Routed, Router, RoutingContext
from moesim.routing.gating import open_ids, plain, probabilities, weigh
from moesim.routing.select import check_top_k

__all__ = ["Policy"]

Share = Annotated[float, Field(ge=0, le=1)]
Numbers = Annotated[tuple[Share, ...], Field(strict=False, min_length=1, max_length=64)]


class Policy(Router):
    """shares: of the batch's tokens, by falling importance, for each tier of experts from the dearest on; what is left
    to 1 skips. thresholds: least importance (0 .. 1) of each tier instead, falling. The experts' columns are cut into
    as many even parts as there are tiers, in that order. approximate_below: no tiers; gates under it run the twin."""

    ragged: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False

    shares: Numbers = (0.5, 0.3)
    thresholds: Numbers | None = None
    approximate_below: float | None = Field(default=None, gt=0, le=1)
    norm_topk_prob: bool | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> Policy:
        if sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"shares of the tiers add up to 1 at most, the rest skips: {sum(self.shares):g}")
        if self.thresholds is not None and any(
            b > a for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)
        ):
            raise ValueError(f"thresholds fall from tier to tier: {self.thresholds}")
        return self

    @property
    def couples(self) -> bool:  # type: ignore[override]  # thresholds look at one token
        """Shares rank the tokens of a batch."""
        return self.thresholds is None and self.approximate_below is None

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """K experts of the token's tier (all of them where it has fewer), or none; or K with some as twins."""
        check_top_k(context.top_k, score_TE.shape[1])
        if self.approximate_below is not None:
            return self._approximate(score_TE, context, self.approximate_below)
        tier_T = self._tier(score_TE)
        tiers = len(self.thresholds or self.shares)
        part_E = np.arange(score_TE.shape[1]) * tiers // score_TE.shape[1]
        mine_TE = part_E == tier_T[:, None]
        expert_TK = open_ids(np.where(mine_TE, score_TE, -np.inf), context.top_k)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TK, weigh(probabilities(score_TE, context), expert_TK, normalise))

    def _tier(self, score_TE: Floats) -> NDArray[np.int64]:
        """Each token's tier, 0 the dearest; the number of tiers: it skips."""
        importance_T = importance(score_TE)
        if self.thresholds is not None:
            below_T: NDArray[np.int64] = (importance_T[:, None] < np.array(self.thresholds)).sum(1)
            return below_T
        last_J = np.rint(np.cumsum(self.shares) * len(score_TE)).astype(np.int64)
        tier_T = np.empty(len(score_TE), np.int64)
        tier_T[np.argsort(-importance_T, kind="stable")] = np.searchsorted(
            last_J, np.arange(len(score_TE)), side="right"
        )
        return tier_T

    def _approximate(self, score_TE: Floats, context: RoutingContext, below: float) -> Routed:
        experts = score_TE.shape[1]
        if experts % 2:
            raise ValueError(f"every expert needs a twin, so their number is even: {experts} experts")
        half = experts // 2
        check_top_k(context.top_k, half)
        routed = plain(score_TE[:, :half], context, normalise=self.norm_topk_prob)
        twin_TK = np.take_along_axis(score_TE, routed.expert_TK.astype(np.int64) + half, 1)
        swap_TK = (routed.gate_TK < below) & ~np.isneginf(twin_TK)
        return Routed((routed.expert_TK + half * swap_TK).astype(np.int32), routed.gate_TK)


def importance(score_TE: Floats) -> NDArray[np.float64]:
    """Entropy of each token's softmax over the highest possible, 0 .. 1, rounded to 5 digits (12 of float64 scores).

    H = log Z - sum over experts of p z, z the scores less the row's highest and Z the sum of their exponentials.
    """
    if not len(score_TE):
        return np.zeros(0)
    below_TE = score_TE - score_TE.max(1, keepdims=True)
    np.maximum(below_TE, -80, out=below_TE)  # whose exponential adds nothing
    weight_TE = np.exp(below_TE)
    total_T = weight_TE.sum(1, dtype=np.float64)
    nats_T = np.log(total_T) - np.einsum("te,te->t", weight_TE, below_TE) / total_T
    digits = 5 if score_TE.dtype == np.float32 else 12
    out: NDArray[np.float64] = np.round(nats_T / max(np.log(score_TE.shape[1]), 1e-300), digits)
    return np.clip(out, 0, 1)
