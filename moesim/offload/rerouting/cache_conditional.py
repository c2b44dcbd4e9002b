"""Cache-conditional routing: what is in the cache is preferred where the router nearly would have taken it anyway.

Skliar, van Rozendaal et al., "Mixture of Cache-Conditional Experts" (arXiv 2412.00099). The three rules change the
order of the experts alone, and the gates stay the router's. They move routes to the cache, so a bound that holds for
given routes (Belady's) does not hold for them: they may miss less than the optimum of the routes they replaced. What is
lost is that some tokens get other experts than their router's first K (`Counters.rerouted`).

Reconstructed: the paper averages the range of the logits (max - min) over tokens; that the average is one a layer, over
all tokens so far, the step's own included, is ours. Tokens of one step see the cache as it is when their layer is
looked up (the paper has one token a step).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.offload import OffloadContext
from moesim.offload.rerouting.scored import ScoredReroute, ranked
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """rule: `prior` adds bias times the average range of a token's scores to what is in the cache; `max_rank` takes
    cached experts first among the best `max_rank`; `cumsum` among the fewest whose probabilities add up to `mass`.
    keep: a token's best experts that it always gets (the paper's J; 1 by default, because the first expert has most of
    the weight). bias: the paper's lambda, 0: the router's own choice, 1: cached ones first nearly always. max_rank: the
    paper's M, below which experts are taken only as the router's own; None: 2 K.
    """

    rule: Literal["prior", "max_rank", "cumsum"] = "prior"
    bias: Annotated[float, Field(ge=0, le=1)] = 0.3
    max_rank: Annotated[int, Field(ge=1)] | None = None
    mass: Annotated[float, Field(ge=0, le=1)] = 0.7
    keep: Annotated[int, Field(ge=0)] = 1

    def start(self, context: OffloadContext, gone_LE: BoolArray | None = None) -> ScoredReroute:
        """See `moesim.offload.ReroutingPolicy.start`."""
        return _Conditional(self, context, gone_LE)


class _Conditional(ScoredReroute):
    def __init__(self, policy: Policy, context: OffloadContext, gone_LE: BoolArray | None) -> None:
        super().__init__(context, gone_LE)
        self.policy = policy
        self._range_L = np.zeros(context.num_layers)
        self._seen_L = np.zeros(context.num_layers)

    def order(self, score_TE: FloatArray, resident_E: BoolArray, layer: int) -> IntArray:
        order_TE = ranked(score_TE)
        if self.policy.rule == "prior":
            key_TE = score_TE + self.policy.bias * self._average_range(score_TE, layer) * resident_E
        else:
            wide_TE = np.arange(score_TE.shape[1]) < self._width(score_TE, order_TE)
            near_TE = np.empty_like(wide_TE)
            np.put_along_axis(near_TE, order_TE, wide_TE, axis=1)
            rank_TE = np.argsort(order_TE, axis=1, kind="stable")
            key_TE = -rank_TE + score_TE.shape[1] * (near_TE & resident_E)
        key_TE = np.where(np.isneginf(score_TE), -np.inf, key_TE)
        np.put_along_axis(key_TE, order_TE[:, : self.policy.keep], np.inf, axis=1)
        # of equals the router's better one: sorted along the router's own order
        turn_TE = np.argsort(-np.take_along_axis(key_TE, order_TE, axis=1), axis=1, kind="stable")
        return np.asarray(np.take_along_axis(order_TE, turn_TE, axis=1))

    def _average_range(self, score_TE: FloatArray, layer: int) -> float:
        """Mean over tokens of a token's highest less its lowest score (arXiv 2412.00099, Delta_avg)."""
        low_T = np.min(score_TE, axis=1, where=np.isfinite(score_TE), initial=np.inf)
        self._range_L[layer] += float((score_TE.max(axis=1) - low_T).sum())
        self._seen_L[layer] += len(score_TE)
        return float(self._range_L[layer] / max(self._seen_L[layer], 1.0))

    def _width(self, score_TE: FloatArray, order_TE: IntArray) -> IntArray:
        """How many of a token's best experts may be preferred, at least K: [T, 1]."""
        k = self.context.top_k
        if self.policy.rule == "max_rank":
            return np.full((len(score_TE), 1), max(k, self.policy.max_rank or 2 * k))
        best_TE = np.take_along_axis(score_TE, order_TE, axis=1)
        share_TE = np.exp(best_TE - best_TE[:, :1])
        mass_TE = np.cumsum(share_TE, axis=1) / share_TE.sum(axis=1, keepdims=True)
        number_T1 = 1 + (mass_TE < self.policy.mass).sum(axis=1, keepdims=True)
        return np.asarray(np.clip(number_T1, k, score_TE.shape[1]), np.int64)
