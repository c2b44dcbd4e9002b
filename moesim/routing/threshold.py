"""Thresholds: a token takes the experts whose score reaches a percentile of its own scores, between `least` and a
most that changes with depth.

Source: Guelmez 2026, DynaMoE (arXiv:2603.01697): percentile-thresholded gating with 1 to a layer-dependent maximum of
experts a token, and schedules of that maximum over depth (uniform, descending, ascending, pyramid, wave). The paper was
read in its abstract only; percentile 50 (tried: 30 to 70) and the layers' counts int(E r^2) are from others' accounts,
so all of it is a reconstruction. By those accounts r is l / L (ascending) and 1 - |l - L/2| / (L/2) (pyramid), which
give layer 0 nothing, and gates are the softmax over the chosen; ours are (l + 1) / L, the same about the middle of each
layer, and the model's rule. `estimate: rank` takes the percentile among the token's E scores as it stands, which
gives every token the same count; `normal` takes it of a normal distribution with their mean and deviation, so that the
count follows the shape of the token's scores.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from moesim.routing import NONE, Floats, Routed, Router, RoutingContext
from moesim.routing.gating import open_ids, probabilities, weigh
from moesim.routing.select import chosen

__all__ = ["Policy"]


class Policy(Router):
    """percentile: of the token's scores, in percent. least, most: experts a token (most none: all). schedule: the
    most over depth, most * r^power, r from 1 / L to 1 (`wave`: two waves from 1 to 0 and back)."""

    ragged: ClassVar[bool] = True

    percentile: float = Field(default=50.0, gt=0, lt=100)
    estimate: Literal["rank", "normal"] = "rank"
    least: int = Field(default=1, ge=1)
    most: int | None = Field(default=None, ge=1)
    schedule: Literal["uniform", "descending", "ascending", "pyramid", "wave"] = "uniform"
    power: float = Field(default=2.0, gt=0, le=8)
    norm_topk_prob: bool | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Policy:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most must be at least least: most {self.most}, least {self.least}")
        return self

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Experts at or above the token's threshold, the best `least` always and at most `most_in(layer)`."""
        most = self.most_in(context.layer, context.num_layers, score_TE.shape[1])
        picked_TK = open_ids(score_TE, most)
        reach_TK = chosen(score_TE, picked_TK) >= self._floor(score_TE)
        reach_TK[:, : self.least] = True
        expert_TW = np.where(reach_TK, picked_TK, NONE).astype(np.int32)
        expert_TW = expert_TW[:, : max(1, int((expert_TW != NONE).sum(1).max(initial=0)))]
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TW, weigh(probabilities(score_TE, context), expert_TW, normalise))

    def _floor(self, score_TE: Floats) -> Floats:
        """The score to be reached, [T, 1]."""
        open_TE = ~np.isneginf(score_TE)
        number_T1 = open_TE.sum(1, keepdims=True)
        if self.estimate == "rank":
            # the score at rank ceil(q (n - 1)) of the n open ones, counted from the lowest: no interpolation
            rank_T1 = np.ceil(np.maximum(number_T1 - 1, 0) * (self.percentile / 100)).astype(np.int64)
            rank_T1 += score_TE.shape[1] - number_T1
            floor: Floats = np.take_along_axis(
                np.sort(score_TE, axis=1), np.minimum(rank_T1, score_TE.shape[1] - 1), axis=1
            )
            return floor
        wide_TE = np.where(open_TE, score_TE, 0).astype(np.float64)
        mean_T1 = wide_TE.sum(1, keepdims=True) / np.maximum(number_T1, 1)
        deviation_T1 = np.sqrt((np.where(open_TE, wide_TE - mean_T1, 0) ** 2).sum(1, keepdims=True))
        deviation_T1 /= np.sqrt(np.maximum(number_T1, 1))
        normal: Floats = mean_T1 + NormalDist().inv_cdf(self.percentile / 100) * deviation_T1
        return normal

    def most_in(self, layer: int, num_layers: int, num_experts: int) -> int:
        """The most experts a token may take in `layer` of `num_layers`: int(most * r^power), at least `least`."""
        most = min(self.most or num_experts, num_experts)
        middle = (layer + 0.5) / num_layers
        share = {
            "uniform": 1.0,
            "descending": (num_layers - layer) / num_layers,
            "ascending": (layer + 1) / num_layers,
            "pyramid": 1 - abs(2 * middle - 1),
            "wave": (1 + math.cos(4 * math.pi * layer / max(num_layers - 1, 1))) / 2,
        }[self.schedule]
        return max(min(self.least, most), int(float(most * share**self.power) + 1e-9))

    def width(self, top_k: int, num_experts: int) -> int:
        """`most`, or all experts."""
        return min(self.most or num_experts, num_experts)
