"""The ideal: every expert gets T * K / E tokens (the remainder one more each), whatever the scores say.

The bound that real routers are compared with, not a mechanism anyone runs.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.rng import generator
from moesim.routing import Floats, Routed, Router, RoutingContext
from moesim.workload.pool import Ids, id_dtype
from moesim.workload.synthetic import Groups

__all__ = ["Policy"]


class Policy(Router):
    """No parameters."""

    from_scores: ClassVar[bool] = False
    replaces_ids: ClassVar[bool] = True
    ideal: ClassVar[bool] = True
    normalised: ClassVar[bool] = True
    couples: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Token t takes places t*K .. t*K + K - 1 of a shuffled ring of the experts; gates 1 / K."""
        tokens, experts = score_TE.shape
        if not 1 <= context.top_k <= experts:
            raise ValueError(f"between 1 and {experts} experts a token can be chosen, got {context.top_k}")
        ring = context.generator("routing/balanced").permutation(experts)
        expert_TK = ring[_places(tokens, context.top_k, experts)].astype(np.int32)
        return Routed(expert_TK, np.full(expert_TK.shape, 1 / context.top_k, score_TE.dtype))

    def draw(self, weight_LE: NDArray[np.float64], tokens: int, top_k: int, groups: Groups, seed: int) -> Ids:
        """Tokens whose loads over any run of rows differ by at most one; `weight_LE` gives the shape only."""
        layers, experts = weight_LE.shape
        place_TK = _places(tokens, top_k, experts)
        out = np.empty((tokens, layers, top_k), id_dtype(experts))
        for layer in range(layers):
            out[:, layer] = generator(seed, "routing/balanced/pool", layer).permutation(experts)[place_TK]
        return out


def _places(tokens: int, top_k: int, experts: int) -> NDArray[np.int64]:
    return np.arange(tokens * top_k).reshape(tokens, top_k) % experts
