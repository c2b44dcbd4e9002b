"""Routers that balance load: a bias that follows it, dual prices, optimal transport, a loss.

Sources: loss-free balancing, arXiv 2408.15664, algorithm 1; BIP, arXiv 2502.15451; selective Sinkhorn
routing, arXiv 2511.08972; the auxiliary loss, arXiv 2101.03961 (Switch), eq. 4-6.
"""

from __future__ import annotations

import math

import torch

from moesim_kernels.routers.select import (
    Choice,
    counts,
    detached_sigmoid,
    kept_gates,
    probabilities,
    take,
    top_ids,
)

__all__ = ["auxiliary_loss", "bip", "loss_free", "loss_free_step", "sinkhorn"]


def loss_free(
    score_TE: torch.Tensor, k: int, bias_E: torch.Tensor, *, scoring: str = "sigmoid", normalise: bool = True
) -> Choice:
    """The k highest of g + b with g the sigmoid (or softmax) of the scores; gates of g alone. `bias_E` is float64."""
    sigmoid = scoring == "sigmoid"
    worth_TE = (detached_sigmoid(score_TE) if sigmoid else probabilities(score_TE)) + bias_E.to(score_TE)
    expert_TK = top_ids(worth_TE, k)
    gate_TE = torch.sigmoid(score_TE) if sigmoid else torch.softmax(score_TE, 1)
    return Choice(expert_TK, kept_gates(take(gate_TE, expert_TK), normalise))


def loss_free_step(
    bias_E: torch.Tensor, expert_TK: torch.Tensor, *, rate: float = 1e-3, centre: bool = False
) -> torch.Tensor:
    """The bias after a training batch: b_e += rate * sign(mean count - count_e) (algorithm 1), float64 [E]."""
    count_E = counts(expert_TK, len(bias_E)).double()
    bias_E = bias_E.double() + rate * torch.sign(count_E.mean() - count_E)
    return bias_E - bias_E.mean() if centre else bias_E


def bip(
    score_TE: torch.Tensor, k: int, q_E: torch.Tensor | None = None, *, iterations: int = 4, normalise: bool = True
) -> tuple[Choice, torch.Tensor]:
    """The k highest of s - q, with prices q of the balanced assignment's dual (s: softmax). Also gives q [E].

    Each iteration: p_i = max(0, (k+1)-th highest of s_i - q), q_j = max(0, (c+1)-th highest of s_.j - p) with
    c = floor(T k / E), at least 1; no price where a token has no (k+1)-th expert or an expert no (c+1)-th token.
    `q_E`: prices to start from; None: zeros.
    """
    tokens, experts = score_TE.shape
    share_TE = probabilities(score_TE)
    q_E = torch.zeros(experts, dtype=share_TE.dtype, device=share_TE.device) if q_E is None else q_E.to(share_TE)
    fair = max(1, tokens * k // experts)
    for _ in range(iterations if tokens else 0):
        p_T1 = torch.zeros(tokens, 1, dtype=share_TE.dtype, device=share_TE.device)
        if k < experts:
            p_T1 = (share_TE - q_E).topk(k + 1, 1).values[:, k:].clamp(min=0)
        q_E = torch.zeros_like(q_E)
        if fair < tokens:
            q_E = (share_TE - p_T1).topk(fair + 1, 0).values[fair].clamp(min=0)
    expert_TK = top_ids(share_TE - q_E, k)
    return Choice(expert_TK, kept_gates(take(torch.softmax(score_TE, 1), expert_TK), normalise)), q_E


def sinkhorn(
    score_TE: torch.Tensor, k: int, *, temperature: float = 1.0, iterations: int = 8, normalise: bool = True
) -> Choice:
    """The k highest of each row of the transport plan with row sums 1 and column sums T / E; gates are the plan's.

    Kernel exp(score / temperature); column and row scalings alternate in the log domain. After the last row scaling a
    row of the plan is softmax(score / temperature + v) with v the columns' potentials, through which no gradient runs.
    """
    tokens, experts = score_TE.shape
    kernel_TE = score_TE / temperature
    log_TE, v_1E = kernel_TE.detach().clone(), torch.zeros(1, experts, dtype=score_TE.dtype, device=score_TE.device)
    if tokens:
        column = math.log(tokens / experts)
        for _ in range(iterations):
            step_1E = column - _log_sum(log_TE, 0)
            v_1E = v_1E + step_1E
            log_TE = log_TE + step_1E
            log_TE = log_TE - _log_sum(log_TE, 1)
    expert_TK = top_ids(log_TE.exp(), k)
    return Choice(expert_TK, kept_gates(take(torch.softmax(kernel_TE + v_1E, 1), expert_TK), normalise))


def _log_sum(log_TE: torch.Tensor, axis: int) -> torch.Tensor:
    """log of the sum of exp along `axis`, in the order of operations of `moesim.routing.sinkhorn`."""
    most = log_TE.amax(axis, keepdim=True)
    return most + (log_TE - most).exp().sum(axis, keepdim=True).log()


def auxiliary_loss(score_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e, a scalar, 1 under balance; multiply by alpha and add to the loss.

    f_e: share of the choices that expert e got, no gradient; P_e: mean softmax probability (Switch, eq. 5-6).
    """
    tokens, experts = score_TE.shape
    if tokens == 0:
        return score_TE.sum()
    share_E = counts(expert_TK, experts).to(score_TE.dtype)
    share_E = share_E / share_E.sum().clamp(min=1)
    return experts * (share_E * torch.softmax(score_TE, 1).mean(0)).sum()
