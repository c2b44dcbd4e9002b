"""The K experts of highest score; gates by softmax before or after the choice, or by sigmoid.

Source: Shazeer et al. 2017 (arXiv:1701.06538), eq. 3-5 (softmax over the K kept: Mixtral, gpt-oss); softmax
over all experts, then the K highest (Switch, Qwen, OLMoE, DeepSeekMoE eq. 5), renormalised where the model
says so. `scoring` holds a paper to its own gates on a model that scores otherwise.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.routing import Floats, Routed, Router, RoutingContext, sigmoid, softmax, top_ids
from moesim.routing.select import gates_of, softmax_gates
from moesim.workload.pool import Ids
from moesim.workload.synthetic import Groups, SyntheticSpec, generate

__all__ = ["Policy"]


class Policy(Router):
    """gates: `softmax_topk` (over all experts, then the choice) or `topk_softmax` (over the chosen K).

    scoring: softmax or sigmoid gates; none: as the model does. norm_topk_prob: divide the chosen gates by their sum;
    none: as the model does. scaling_factor: multiplies the gates.
    """

    from_scores: ClassVar[bool] = False
    replaces_ids: ClassVar[bool] = False

    gates: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
    scoring: Literal["softmax", "sigmoid"] | None = None
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K highest scores (with context.bias_E added), the lowest id first among equals."""
        by_sigmoid = (self.scoring or context.scoring) == "sigmoid"
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        if context.bias_E is None and not by_sigmoid:
            expert_TK = top_ids(score_TE, context.top_k)
            gate_TK = softmax_gates(score_TE, expert_TK, normalise or self.gates == "topk_softmax")
            return Routed(expert_TK, gate_TK * gate_TK.dtype.type(self.scaling_factor))
        gate_TE = sigmoid(score_TE) if by_sigmoid else softmax(score_TE)
        chosen_by = score_TE
        if context.bias_E is not None:
            chosen_by = np.where(np.isneginf(score_TE), -np.inf, gate_TE + context.bias_E)
        expert_TK = top_ids(chosen_by, context.top_k)
        if self.gates == "topk_softmax" and not by_sigmoid:
            gate_TK = softmax(np.take_along_axis(score_TE, expert_TK.astype(np.int64), 1))
        else:
            gate_TK = gates_of(gate_TE, expert_TK, normalise)
        return Routed(expert_TK, gate_TK * gate_TK.dtype.type(self.scaling_factor))

    def draw(self, weight_LE: NDArray[np.float64], tokens: int, top_k: int, groups: Groups, seed: int) -> Ids:
        """Tokens whose experts have the popularity `weight_LE`, independent of each other."""
        return generate(SyntheticSpec(pool_tokens=tokens), weight_LE, top_k, seed, groups).expert_TLK
