"""A router that remembers: the scores of a layer are mixed with a state handed up from the layer below.

Source: Qiu et al. 2024, RMoE (arXiv:2408.06793): a GRU shared by the layers carries each token's routing state
up, and a layer routes by it. Reconstruction: the learnt GRU is replaced by a stated gate,
h_l = keep * h_(l-1) + sqrt(1 - keep^2) * s_l, which keeps the scores' scale and makes the states of neighbouring layers
correlate by `keep`, a quantity to be fitted. Ids of different layers have nothing to do with each other, so the state
is handed up under a shuffle of the ids keyed by seed and layer (`shuffle: false`: as it is).
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from moesim.rng import generator
from moesim.routing import Floats, Routed, Router, RoutingContext
from moesim.routing.gating import plain

__all__ = ["Policy"]


class Policy(Router):
    """keep: correlation of the routing states of neighbouring layers. shuffle: relabel experts from layer to layer."""

    equivariant: ClassVar[bool] = False

    keep: float = Field(default=0.5, ge=0, lt=1)
    shuffle: bool = True
    norm_topk_prob: bool | None = None

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Top-k of the state; `carry` hands it up as `state_TE`. Raises ValueError for a carry of another shape."""
        state_TE = np.where(np.isneginf(score_TE), 0, score_TE).astype(np.float64)
        below_TE = context.carry.get("state_TE")
        if below_TE is not None:
            if below_TE.shape != score_TE.shape:
                raise ValueError(
                    f"the state of the layer below must be of the same tokens and experts: {below_TE.shape},"
                    f" scores {score_TE.shape}"
                )
            order_E = np.arange(score_TE.shape[1])
            if self.shuffle:
                order_E = generator(context.seed, "routing/recurrent", context.layer).permutation(order_E)
            state_TE = self.keep * below_TE[:, order_E] + math.sqrt(1 - self.keep**2) * state_TE
        chosen_TE = np.where(np.isneginf(score_TE), -np.inf, state_TE).astype(score_TE.dtype)
        routed = plain(chosen_TE, context, normalise=self.norm_topk_prob)
        return Routed(routed.expert_TK, routed.gate_TK, carry={"state_TE": state_TE})
