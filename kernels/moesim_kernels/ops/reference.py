"""What each operator should return, in float64 and plain loops; slow, and differentiable by torch.

No shared code with the operators. Suffixes as in moe.py and attention.py.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "attention_reference",
    "decode_mla_reference",
    "expert_reference",
    "gates_reference",
    "moe_reference",
    "norm_residual_reference",
    "rotary_reference",
    "router_reference",
    "scores_reference",
]


def scores_reference(logit_TE: torch.Tensor, score: str) -> torch.Tensor:
    """Softmax over a token's experts, or each expert's sigmoid; float64 [T, E]."""
    exp_TE = torch.exp(logit_TE.double())
    return exp_TE / exp_TE.sum(dim=1, keepdim=True) if score == "softmax" else exp_TE / (1 + exp_TE)


def router_reference(
    score_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, score: str, groups: int, top_groups: int
) -> list[list[int]]:
    """The experts of each token, best first: by score + bias, among the experts of the best groups.

    Ties go to the lower index. A group's worth is the sum of its two best under sigmoid, its best under softmax.
    """
    chosen = []
    for biased in (score_TE.double() + bias_E.double()).tolist():
        size = len(biased) // groups
        worth = []
        for group in range(groups):
            best_first = sorted(biased[group * size : (group + 1) * size], reverse=True)
            worth.append(sum(best_first[:2]) if score == "sigmoid" else best_first[0])
        kept = sorted(range(groups), key=lambda group: -worth[group])[:top_groups]
        eligible = [e for e in range(len(biased)) if e // size in kept]
        chosen.append(sorted(eligible, key=lambda e: -biased[e])[:top_k])
    return chosen


def gates_reference(score_TE: torch.Tensor, expert_TK: torch.Tensor, renormalise: bool, scale: float) -> torch.Tensor:
    """Unbiased scores of the chosen experts, over their sum if `renormalise`, times `scale`; float64 [T, K]."""
    rows = []
    for score_E, expert_K in zip(score_TE.double(), expert_TK.tolist(), strict=True):
        gate_K = torch.stack([score_E[e] for e in expert_K])
        rows.append(scale * (gate_K / gate_K.sum() if renormalise else gate_K))
    return torch.stack(rows) if rows else torch.zeros(expert_TK.shape, dtype=torch.float64)


def expert_reference(x_H: torch.Tensor, w13_e: torch.Tensor, w2_e: torch.Tensor) -> torch.Tensor:
    """One token through one expert: w2 (silu(w1 x) * (w3 x)) with silu(a) = a / (1 + exp(-a)); float64 [H]."""
    intermediate = w2_e.shape[1]
    gate_I = w13_e[:intermediate].double() @ x_H.double()
    up_I = w13_e[intermediate:].double() @ x_H.double()
    return w2_e.double() @ (gate_I / (1 + torch.exp(-gate_I)) * up_I)


def moe_reference(
    hidden_TH: torch.Tensor,
    token_R: torch.Tensor,
    expert_R: torch.Tensor,
    gate_R: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
) -> torch.Tensor:
    """Row by row: gate x expert(hidden of the token), added to its token; float64 [T, H]."""
    out_T = [torch.zeros(hidden_TH.shape[1], dtype=torch.float64) for _ in range(hidden_TH.shape[0])]
    for row, (token, expert) in enumerate(zip(token_R.tolist(), expert_R.tolist(), strict=True)):
        out_T[token] = out_T[token] + gate_R[row] * expert_reference(hidden_TH[token], w13[expert], w2[expert])
    return torch.stack(out_T) if out_T else torch.zeros(hidden_TH.shape, dtype=torch.float64)


def attention_reference(
    query_BQLD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSV: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention, query token by query token; the last query sees all S keys; float64 [B, Q, L, V].

    With `window`, a query sees itself and the window - 1 tokens before it. Query head h reads head h // (Q / G).
    """
    batch, heads, length, dim = query_BQLD.shape
    kv_heads, total = key_BGSD.shape[1:3]
    factor = dim**-0.5 if scale is None else scale
    out = []
    for b in range(batch):
        for h in range(heads):
            key_SD = key_BGSD[b, h * kv_heads // heads].double()
            value_SV = value_BGSV[b, h * kv_heads // heads].double()
            for i in range(length):
                last = total - length + i
                first = 0 if window is None else max(0, last - window + 1)
                weight_S = torch.exp(factor * (key_SD[first : last + 1] @ query_BQLD[b, h, i].double()))
                out.append(weight_S / weight_S.sum() @ value_SV[first : last + 1])
    return torch.stack(out).reshape(batch, heads, length, -1)


def decode_mla_reference(
    query_BQC: torch.Tensor, latent_BSC: torch.Tensor, value_dim: int, scale: float
) -> torch.Tensor:
    """Every query head against the one latent head; values are its first `value_dim` dimensions; float64 [B, Q, V]."""
    out = []
    for query_QC, latent_SC in zip(query_BQC.double(), latent_BSC.double(), strict=True):
        for query_C in query_QC:
            weight_S = torch.exp(scale * (latent_SC @ query_C))
            out.append(weight_S / weight_S.sum() @ latent_SC[:, :value_dim])
    return torch.stack(out).reshape(*query_BQC.shape[:2], value_dim)


def norm_residual_reference(
    hidden_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> torch.Tensor:
    """(hidden + residual) over its root mean square, times weight; float64 [T, H]."""
    sum_TH = hidden_TH.double() + residual_TH.double()
    return sum_TH / torch.sqrt((sum_TH * sum_TH).mean(dim=1, keepdim=True) + eps) * weight_H.double()


def rotary_reference(head_TXD: torch.Tensor, position_T: list[int], base: float) -> torch.Tensor:
    """Each pair of neighbouring elements turned by position x base^(-2j/D); float64 [T, X, D] (arXiv 2104.09864)."""
    out, dim = head_TXD.double().clone(), head_TXD.shape[-1]
    for t, position in enumerate(position_T):
        for j in range(dim // 2):
            angle = position * base ** (-2 * j / dim)
            x, y = head_TXD[t, :, 2 * j].double(), head_TXD[t, :, 2 * j + 1].double()
            out[t, :, 2 * j] = x * math.cos(angle) - y * math.sin(angle)
            out[t, :, 2 * j + 1] = x * math.sin(angle) + y * math.cos(angle)
    return out
