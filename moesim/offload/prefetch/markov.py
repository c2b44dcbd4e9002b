"""Expert-to-expert transitions between layers, fitted on recorded tokens (the statistical predictors of EdgeMoE, arXiv
2308.14352, and of others: how often a token that took expert i here took expert j there)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import FloatArray
from moesim.offload import OffloadContext, RouteSample
from moesim.offload.prefetch.naming import Ahead, Limited, Named, best, fit_of

__all__ = ["Policy", "transitions"]


class Policy(Limited):
    """ahead: layers looked ahead; each distance has transitions of its own, so errors do not multiply. names: experts
    named for a token; None: as many as it takes. combine: a token's experts each have an opinion of the later layer;
    `product` multiplies them (as if they were independent evidence) and `sum` averages them. smoothing: activations
    that every pair of experts is credited with before counting, in multiples of what the later expert's popularity
    would give it.
    """

    ahead: Annotated[int, Field(ge=1, le=512)] = 1
    names: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    combine: Literal["sum", "product"] = "sum"
    smoothing: Annotated[float, Field(gt=0, le=1e6)] = 1.0

    def start(self, context: OffloadContext) -> _Markov:
        """See `moesim.offload.PrefetchPolicy.start`. Raises BadInput where there is nothing to fit on."""
        return _Markov(context, self, fit_of(context, "markov"))


def transitions(fit: RouteSample, layer: int, target: int, num_experts: int, smoothing: float) -> FloatArray:
    """Chance [E, E] that a token that takes i in `layer` takes j in `target`; a row adds up to the experts a token
    takes there."""
    here, there = (np.minimum(fit.expert_TLK[:, at].astype(np.int64), num_experts) for at in (layer, target))
    pair = here[:, :, None] * (num_experts + 1) + there[:, None, :]
    flat = np.bincount(pair.ravel(), minlength=(num_experts + 1) ** 2)
    counts = flat.reshape(num_experts + 1, num_experts + 1)[:num_experts, :num_experts]
    seen_E = np.bincount(here.ravel(), minlength=num_experts + 1)[:num_experts].astype(np.float64)
    popular_E = np.bincount(there.ravel(), minlength=num_experts + 1)[:num_experts] / max(len(there), 1)
    chance: FloatArray = (counts + smoothing * popular_E) / (seen_E[:, None] + smoothing)
    return chance


class _Markov(Ahead):
    def __init__(self, context: OffloadContext, policy: Policy, fit: RouteSample) -> None:
        super().__init__(context, policy.ahead, policy)
        self._policy, self._fit = policy, fit
        self._names = policy.names or context.top_k
        self._chance: dict[tuple[int, int], FloatArray] = {}

    def _table(self, layer: int, target: int) -> FloatArray:
        """Chances [E + 1, E]; the last row is of no expert, which says nothing."""
        if (layer, target) not in self._chance:
            experts = self.context.num_experts
            chance = transitions(self._fit, layer, target, experts, self._policy.smoothing)
            if self._policy.combine == "product":
                chance = np.log(np.maximum(chance, 1e-12))
            self._chance[layer, target] = np.vstack([chance, np.zeros(experts)])
        return self._chance[layer, target]

    def named(self, layer: int, target: int) -> Named:
        """See Ahead. Of the step it looks at the routes of `layer` and of no later one."""
        if layer < 0 or not len(self.step.expert_TLK):
            return []
        experts = self.context.num_experts
        here_TK = np.minimum(self.step.expert_TLK[:, layer].astype(np.int64), experts)
        opinion_TE = self._table(layer, target)[here_TK].sum(axis=1)
        asked_T = (here_TK < experts).any(axis=1)
        order_TN = np.argsort(-opinion_TE, axis=1, kind="stable")[:, : self._names]
        count_E = np.bincount(order_TN[asked_T].ravel(), minlength=experts) / len(here_TK)
        if len(here_TK) == 1:  # one token votes for each once, so its opinion orders them
            rank_E = np.zeros(experts)
            rank_E[order_TN[0]] = 1.0 - np.arange(order_TN.shape[1]) / (order_TN.shape[1] + 1)
            count_E = np.where(count_E > 0, rank_E, 0.0)
        return best(np.minimum(count_E, 1.0))
