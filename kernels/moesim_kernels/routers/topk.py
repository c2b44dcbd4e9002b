"""Token's choice by score: softmax before or after the K highest, and DeepSeek-V3's grouped sigmoid."""

from __future__ import annotations

import torch

from moesim_kernels.routers.select import (
    Choice,
    detached_sigmoid,
    kept_gates,
    probabilities,
    take,
    top_ids,
)

__all__ = ["grouped_sigmoid", "softmax_topk", "topk_softmax"]


def softmax_topk(score_TE: torch.Tensor, k: int, *, normalise: bool = True, scale: float = 1.0) -> Choice:
    """Softmax over all experts, then the k highest (Switch, Qwen, OLMoE); gates over their sum if `normalise`.

    With k = 1 a normalised gate is 1 and gives the router no gradient: Switch takes it as it is.
    """
    expert_TK = top_ids(score_TE, k)
    return Choice(expert_TK, kept_gates(take(torch.softmax(score_TE, 1), expert_TK), normalise, scale))


def topk_softmax(score_TE: torch.Tensor, k: int, *, scale: float = 1.0) -> Choice:
    """The k highest, then softmax over them alone (Shazeer et al., arXiv 1701.06538, eq. 3-5: Mixtral, gpt-oss)."""
    expert_TK = top_ids(score_TE, k)
    return Choice(expert_TK, torch.softmax(score_TE.gather(1, expert_TK), 1) * scale)


def grouped_sigmoid(
    score_TE: torch.Tensor,
    k: int,
    *,
    groups: int = 1,
    top_groups: int = 1,
    bias_E: torch.Tensor | None = None,
    scoring: str = "sigmoid",
    normalise: bool = True,
    scale: float = 1.0,
) -> Choice:
    """DeepSeek-V3 (arXiv 2412.19437, 2.1.2): sigmoid scores, k highest of score + bias in the best groups.

    A group is worth its two best under sigmoid, its best under softmax (V2); of equal groups the first. Gates are the
    scores without bias. Raises ValueError where the kept groups cannot hold k.
    """
    tokens, experts = score_TE.shape
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups or k > top_groups * experts // groups:
        raise ValueError(
            f"groups must divide the experts and the kept ones hold top_k: {experts} experts, {groups} groups,"
            f" {top_groups} kept, top_k {k}"
        )
    sigmoid = scoring == "sigmoid"
    worth_TE = detached_sigmoid(score_TE) if sigmoid else probabilities(score_TE)
    if bias_E is not None:
        worth_TE = worth_TE + bias_E
    if top_groups < groups:
        member_TGM = worth_TE.view(tokens, groups, experts // groups)
        best = 2 if sigmoid and experts > groups else 1
        group_TG = member_TGM.topk(best, 2).values.sum(2)
        closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, top_ids(group_TG, top_groups), False)
        worth_TE = member_TGM.masked_fill(closed_TG.unsqueeze(2), -torch.inf).view(tokens, experts)
    expert_TK = top_ids(worth_TE, k)
    gate_TE = torch.sigmoid(score_TE) if sigmoid else torch.softmax(score_TE, 1)
    return Choice(expert_TK, kept_gates(take(gate_TE, expert_TK), normalise, scale))
