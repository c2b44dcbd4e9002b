"""Loss-free balancing: a bias per expert, moved a fixed step against its load after each training step.

Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1: the choice is by gate plus bias, gates leave the bias out,
and b_e += u * sign(mean load - load_e) after the batch, so that a batch never sees its own loads. Sigmoid gates and
u = 1e-3 are the paper's. `centre` takes the mean off the biases after each step, as torchtitan does, which keeps them
small and changes no choice but by rounding. While serving the bias stays as a simulation's warm-up left it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from moesim.routing import Floats, Routed, Router, RoutingContext, sigmoid, softmax, top_ids
from moesim.routing.select import close_as, gates_of, load_of

__all__ = ["Policy"]


class Policy(Router):
    """rate: step of the bias (u). centre: keep the mean bias at 0. scoring: gates; none: as the model does.

    norm_topk_prob: divide the chosen gates by their sum; none: as the model does. scaling_factor: multiplies the
    gates.
    """

    stateful: ClassVar[bool] = True

    rate: float = Field(default=1e-3, ge=0)
    centre: bool = False
    scoring: Literal["softmax", "sigmoid"] | None = None
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K highest gate + bias; state {"bias_E": float64}, at first the model's own bias or zeros."""
        experts = score_TE.shape[1]
        start_E = np.zeros(experts) if context.bias_E is None else context.bias_E
        bias_E = np.asarray(context.state.get("bias_E", start_E), np.float64)
        by_sigmoid = (self.scoring or context.scoring) == "sigmoid"
        gate_TE = sigmoid(score_TE) if by_sigmoid else softmax(score_TE)
        expert_TK = top_ids(close_as(score_TE, gate_TE + bias_E.astype(score_TE.dtype)), context.top_k)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        if context.training:
            load_E = load_of(expert_TK, experts)
            bias_E = bias_E + self.rate * np.sign(load_E.mean() - load_E)  # arXiv:2408.15664, algorithm 1
            bias_E = bias_E - bias_E.mean() if self.centre else bias_E
        gate_TK = gates_of(gate_TE, expert_TK, normalise, self.scaling_factor)
        return Routed(expert_TK, gate_TK, {"bias_E": bias_E})
