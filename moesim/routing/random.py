"""K distinct experts at random, all alike: what routing costs when it follows nothing (THOR's router in
inference)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.routing import Floats, Routed, Router, RoutingContext, top_ids
from moesim.workload.pool import Ids
from moesim.workload.synthetic import Groups, SyntheticSpec, generate, uniform_weights

__all__ = ["Policy"]


class Policy(Router):
    """No parameters. Scores count only for which experts may be taken (those above -inf)."""

    from_scores: ClassVar[bool] = False
    replaces_ids: ClassVar[bool] = True
    normalised: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Uniform over the sets of K experts; gates 1 / K."""
        draw_TE = context.generator("routing/random").random(score_TE.shape, np.float32)
        draw_TE[np.isneginf(score_TE)] = -np.inf
        expert_TK = top_ids(draw_TE, context.top_k)
        return Routed(expert_TK, np.full(expert_TK.shape, 1 / context.top_k, score_TE.dtype))

    def draw(self, weight_LE: NDArray[np.float64], tokens: int, top_k: int, groups: Groups, seed: int) -> Ids:
        """Independent tokens, every expert with chance K / E; `weight_LE` gives the shape only."""
        uniform = uniform_weights(*weight_LE.shape)
        return generate(SyntheticSpec(pool_tokens=tokens), uniform, top_k, seed, groups).expert_TLK
