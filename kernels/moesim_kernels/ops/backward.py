"""The backward of an MoE layer's parts, by explicit formulas, for training steps. CPU and CUDA, fp32 and bf16.

Forward:  x = row w13^T,  act = silu(x_gate) * x_up,  y = act w2^T,  out[token] += gate y.
`how` is "loop" or "grouped", with the constraints told in moe.py. Suffixes as there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from .dense import product
from .moe import GATE_FLOOR, How, Score, check_experts, grouped_rows, spans

__all__ = [
    "ExpertGrads",
    "combine_backward",
    "grouped_backward",
    "grouped_dgrad",
    "grouped_wgrad",
    "router_backward",
    "swiglu_backward",
]


class ExpertGrads(NamedTuple):
    """Gradients of the experts' rows [R, H] and weights, shaped as those."""

    row_RH: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor


def swiglu_backward(grad_RI: torch.Tensor, x_R2I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x [R, 2I], act [R, I]): with s = sigmoid(gate), silu' = s (1 + gate (1 - s)).

    `act`, which the weight gradient of w2 needs, is made again here instead of kept from the forward pass.
    """
    gate_RI, up_RI = x_R2I.chunk(2, dim=-1)
    grad_x_R2I = torch.empty_like(x_R2I)
    grad_gate_RI, grad_up_RI = grad_x_R2I.chunk(2, dim=-1)
    silu_RI = functional.silu(gate_RI)
    torch.mul(grad_RI, silu_RI, out=grad_up_RI)
    torch.ops.aten.silu_backward.grad_input(grad_RI * up_RI, gate_RI, grad_input=grad_gate_RI)
    return grad_x_R2I, silu_RI.mul_(up_RI)


def grouped_dgrad(
    grad_RH: torch.Tensor,
    x_R2I: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    end_E: torch.Tensor,
    how: How = "loop",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of the rows [R, H], gradient of x [R, 2I], act [R, I]) from that of the experts' output.

    `x_R2I` is the forward's first product, as kept for the backward.
    """
    check_experts(grad_RH, w13, w2, end_E)
    grad_x_R2I, act_RI = swiglu_backward(grouped_rows(grad_RH, w2, end_E, how), x_R2I)
    return grouped_rows(grad_x_R2I, w13, end_E, how), grad_x_R2I, act_RI


def grouped_wgrad(
    grad_RH: torch.Tensor,
    act_RI: torch.Tensor,
    grad_x_R2I: torch.Tensor,
    row_RH: torch.Tensor,
    end_E: torch.Tensor,
    how: How = "loop",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of w13 [E, 2I, H], of w2 [E, H, I]): each expert's grad^T input over its own rows; 0 without rows."""
    return _outer(grad_x_R2I, row_RH, end_E, how), _outer(grad_RH, act_RI, end_E, how)


def _outer(grad_RN: torch.Tensor, input_RM: torch.Tensor, end_E: torch.Tensor, how: How) -> torch.Tensor:
    """[E, N, M]: grad^T input over each expert's rows."""
    if how == "grouped" and grad_RN.shape[0]:
        return functional.grouped_mm(grad_RN.t(), input_RM, offs=end_E)
    out_ENM = grad_RN.new_zeros(end_E.shape[0], grad_RN.shape[1], input_RM.shape[1])
    for expert, begin, end in spans(end_E):
        product(grad_RN[begin:end].t(), input_RM[begin:end], out_ENM[expert])
    return out_ENM


def grouped_backward(
    grad_RH: torch.Tensor,
    row_RH: torch.Tensor,
    x_R2I: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    end_E: torch.Tensor,
    how: How = "loop",
) -> ExpertGrads:
    """Both data gradients and both weight gradients of the experts, given dL/dy [R, H]."""
    grad_row_RH, grad_x_R2I, act_RI = grouped_dgrad(grad_RH, x_R2I, w13, w2, end_E, how)
    return ExpertGrads(grad_row_RH, *grouped_wgrad(grad_RH, act_RI, grad_x_R2I, row_RH, end_E, how))


def combine_backward(
    grad_TH: torch.Tensor, out_RH: torch.Tensor, gate_R: torch.Tensor, token_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dL/dy [R, H] = gate x grad of the token, dL/dgate [R] float32 = grad of the token . y)."""
    grad_RH = grad_TH.index_select(0, token_R)
    grad_gate_R = (grad_RH.float() * out_RH).sum(dim=1)
    return grad_RH.mul_(gate_R.unsqueeze(1)), grad_gate_R


def router_backward(
    grad_TK: torch.Tensor,
    hidden_TH: torch.Tensor,
    router_EH: torch.Tensor,
    logit_TE: torch.Tensor,
    expert_TK: torch.Tensor,
    *,
    score: Score = "softmax",
    renormalise: bool = True,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of hidden [T, H], of the router's weight [E, H]) from that of the gates, float32 [T, K].

    The choice of experts is constant, so a correction bias and the groups have no gradient. With n = sum of chosen
    scores: d score_k = scale (g_k / n - sum_j g_j score_j / n^2). Softmax: d logit = score (d - sum_e d_e score_e);
    sigmoid: d logit = d score (1 - score). The two GEMMs run in the router's dtype.
    """
    score_TE = torch.softmax(logit_TE, dim=-1) if score == "softmax" else torch.sigmoid(logit_TE)
    score_TK = score_TE.gather(1, expert_TK)
    if renormalise:
        total_T1 = score_TK.sum(dim=-1, keepdim=True) + GATE_FLOOR
        inner_T1 = (grad_TK * score_TK).sum(dim=-1, keepdim=True)
        grad_TK = (grad_TK - inner_T1 / total_T1) / total_T1
    chosen_TK = scale * grad_TK * score_TK
    grad_TE = torch.zeros_like(score_TE)
    if score == "sigmoid":
        grad_TE.scatter_(1, expert_TK, chosen_TK * (1 - score_TK))
    else:
        grad_TE.scatter_(1, expert_TK, chosen_TK)
        grad_TE -= score_TE * chosen_TK.sum(dim=-1, keepdim=True)
    grad_logit_TE = grad_TE.to(router_EH.dtype)
    grad_hidden_TH = product(grad_logit_TE, router_EH).to(hidden_TH.dtype)
    return grad_hidden_TH, product(grad_logit_TE.t(), hidden_TH.to(router_EH.dtype))
