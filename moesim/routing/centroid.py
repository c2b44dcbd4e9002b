"""Routing by nearness: the experts whose centroids point most nearly where a token's features point.

`cosine`: learned centroids and the cosine similarity (Chi et al. 2022, arXiv:2204.09179). `kmeans`: the
centroid is a running mean of the features that were routed to the expert (online K-means). Features are the hidden
states; where nobody knows them, a token's scores stand in, and the first centroids are the experts' own directions, so
that column e stands for expert e.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.rng import generator
from moesim.routing import Floats, Routed, Router, RoutingContext, top_ids
from moesim.routing.select import close_as, load_of, softmax_gates

__all__ = ["Policy"]


class Policy(Router):
    """method: as above. temperature: of the softmax over cosines. memory: share of a centroid kept in a training step
    that routed tokens to it. noise: spread of first centroids around the experts' directions, where scores stand in.

    norm_topk_prob: divide the chosen gates by their sum; none: as the model does. scaling_factor: multiplies the
    gates.
    """

    equivariant: ClassVar[bool] = False
    stateful: ClassVar[bool] = True

    method: Literal["cosine", "kmeans"] = "cosine"
    temperature: float = Field(default=0.1, gt=0)
    memory: float = Field(default=0.99, ge=0, le=1)
    noise: float = Field(default=0.02, ge=0)
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K highest cosines of experts that may be taken; state {"centroid_ED": float64}, unit rows at first."""
        experts = score_TE.shape[1]
        given = context.feature_TD
        feature_TD = _open(score_TE) if given is None else np.asarray(given)
        start_ED = context.state.get("centroid_ED")
        centroid_ED = self._first(experts, feature_TD.shape[1], context) if start_ED is None else np.asarray(start_ED)
        unit_TD = _unit(feature_TD)
        near_TE = (unit_TD @ _unit(centroid_ED).T.astype(unit_TD.dtype)).astype(score_TE.dtype, copy=False)
        expert_TK = top_ids(close_as(score_TE, near_TE), context.top_k)
        if context.training and self.method == "kmeans" and len(unit_TD):
            centroid_ED = self._moved(centroid_ED, unit_TD, expert_TK)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        near_TE /= near_TE.dtype.type(self.temperature)
        gate_TK = softmax_gates(near_TE, expert_TK, normalise)
        return Routed(expert_TK, gate_TK * gate_TK.dtype.type(self.scaling_factor), {"centroid_ED": centroid_ED})

    def _first(self, experts: int, wide: int, context: RoutingContext) -> NDArray[np.float64]:
        """Unit centroids, keyed by seed and layer; near the experts' own directions where scores stand in."""
        draw_ED = generator(context.seed, "routing/centroid", context.layer).normal(size=(experts, wide))
        return _unit(draw_ED if context.feature_TD is not None else np.eye(experts) + self.noise * draw_ED)

    def _moved(self, centroid_ED: Floats, unit_TD: Floats, expert_TK: NDArray[np.int32]) -> NDArray[np.float64]:
        """Running means: c += (1 - memory) * (mean of the features routed there - c), where any were."""
        experts = len(centroid_ED)
        load_E1 = load_of(expert_TK, experts)[:, None]
        one_TE = np.zeros((len(unit_TD), experts), unit_TD.dtype)
        np.put_along_axis(one_TE, expert_TK.astype(np.int64), 1, 1)
        mean_ED = (one_TE.T @ unit_TD).astype(np.float64) / np.maximum(load_E1, 1)
        moved_ED: NDArray[np.float64] = centroid_ED + (1 - self.memory) * (mean_ED - centroid_ED)
        return np.where(load_E1 > 0, moved_ED, centroid_ED)


def _open(score_TE: Floats) -> Floats:
    """Scores, 0 in place of -inf."""
    return np.where(score_TE == -np.inf, score_TE.dtype.type(0), score_TE) if score_TE.size else score_TE


def _unit(row_ND: Floats) -> Floats:
    """Rows of length 1; a row of zeros stays one. Divided by the largest first, so that no square overflows."""
    most_N = np.maximum(row_ND.max(1, initial=0), -row_ND.min(1, initial=0))
    unit_ND: Floats = row_ND / np.where(most_N > 0, most_N, 1)[:, None]
    length_N = np.sqrt(np.einsum("nd,nd->n", unit_ND, unit_ND))
    unit_ND /= np.maximum(length_N, 1)[:, None]  # the largest entry is 1, unless all are 0
    return unit_ND
