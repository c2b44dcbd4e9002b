"""The parts of an MoE layer on torch, for CPU and CUDA, in fp32 and bf16.

    route -> permute -> grouped_swiglu -> combine        (moe_local: the rank's share of a layer, from routed rows)

Suffixes: T tokens, E experts (slots of this rank), K experts a token, H hidden, I intermediate, R rows = (token,
expert) pairs sorted by expert. Weights lie as in vLLM: w13 [E, 2I, H], gate rows first, then up rows; w2 [E, H, I].
Experts are gated (SwiGLU) only; two-matrix experts have no operator here.

`how`:
- "loop": two GEMMs per expert that has rows; rows are gathered, activated and summed all at once, since doing so
  expert by expert took up to a tenth longer. Needs `end_E` on the host: a CUDA `end_E` is copied there, which waits
  for the device and cannot stand in a CUDA graph.
- "grouped": `torch.nn.functional.grouped_mm` (torch >= 2.10). It takes int32 ends on the device, rows of a multiple
  of 16 bytes (H and I divisible by 4 in fp32, by 8 in bf16), and leaves rows past the last end unwritten. No host
  sync where `grouped_is_native`; elsewhere torch itself loops over the groups, after reading the ends on the host.
- "triton": the fused kernel of `triton_moe`, for `moe_local`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch.nn import functional

from .dense import gemm, product

__all__ = [
    "How",
    "HowLayer",
    "Permuted",
    "Score",
    "combine",
    "grouped_is_native",
    "grouped_rows",
    "grouped_swiglu",
    "has_grouped",
    "moe_local",
    "permute",
    "route",
    "router_logits",
    "shared_expert",
    "spans",
    "swiglu",
]

How = Literal["loop", "grouped"]
HowLayer = Literal["loop", "grouped", "triton"]
Score = Literal["softmax", "sigmoid"]

GATE_FLOOR = 1e-20  # keeps a token whose gates all underflow finite, as in DeepSeek-V3's released gate


class Permuted(NamedTuple):
    """Rows sorted by expert, stable in the token: expert e owns rows end_E[e-1]:end_E[e].

    `choice_R` is the row's place in the flattened [T, K] of choices: gate_R = gate_TK.flatten()[choice_R].
    """

    row_RH: torch.Tensor
    token_R: torch.Tensor
    choice_R: torch.Tensor
    end_E: torch.Tensor


def has_grouped() -> bool:
    """Whether this torch has `grouped_mm`."""
    return hasattr(functional, "grouped_mm")


def grouped_is_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` is one kernel here, without a host sync: bf16 on Hopper or Blackwell (SM 9.0, 10.x)."""
    if not has_grouped() or device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def route(
    hidden_TH: torch.Tensor,
    router_EH: torch.Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    bias_E: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    renormalise: bool = True,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_TK int64, gate_TK float32): the top_k experts of each token by score + bias, and their gates.

    Logits come of a GEMM in the router's dtype (an fp32 router lifts bf16 hidden states first), scores are float32.
    With groups > 1 only experts of the `top_groups` best groups are eligible; a group's worth is the sum of its two
    best biased scores under sigmoid (DeepSeek-V3, arXiv 2412.19437, 2.1.2 and released code), its best under softmax
    (DeepSeek-V2). Gates are unbiased scores, divided by their sum if `renormalise`, times `scale`. Among equal
    scores any may be chosen; a token's experts differ. Raises ValueError where top_k experts are not eligible.
    """
    tokens, experts = hidden_TH.shape[0], router_EH.shape[0]
    if (
        groups < 1
        or experts % groups
        or not 1 <= top_groups <= groups
        or not 1 <= top_k <= experts // groups * top_groups
    ):
        raise ValueError(
            f"groups must divide experts, and top_groups of them must hold top_k: experts={experts}, "
            f"groups={groups}, top_groups={top_groups}, top_k={top_k}"
        )
    logit_TE = router_logits(hidden_TH, router_EH)
    score_TE = torch.softmax(logit_TE, dim=-1) if score == "softmax" else torch.sigmoid(logit_TE)
    biased_TE = score_TE if bias_E is None else score_TE + bias_E
    if top_groups < groups:
        member_TGM = biased_TE.view(tokens, groups, experts // groups)
        best = 2 if score == "sigmoid" and experts > groups else 1
        worth_TG = member_TGM.topk(best, dim=-1).values.sum(dim=-1)
        dropped_TG = torch.ones_like(worth_TG, dtype=torch.bool)
        dropped_TG.scatter_(1, worth_TG.topk(top_groups, dim=-1, sorted=False).indices, False)
        biased_TE = member_TGM.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).view(tokens, experts)
    expert_TK = biased_TE.topk(top_k, dim=-1).indices
    gate_TK = score_TE.gather(1, expert_TK)
    if renormalise:
        gate_TK = gate_TK / (gate_TK.sum(dim=-1, keepdim=True) + GATE_FLOOR)
    return expert_TK, gate_TK * scale


def router_logits(hidden_TH: torch.Tensor, router_EH: torch.Tensor) -> torch.Tensor:
    """hidden router^T computed in the router's dtype, float32 [T, E]."""
    return gemm(hidden_TH.to(router_EH.dtype), router_EH).float()


def permute(hidden_TH: torch.Tensor, expert_TK: torch.Tensor, experts: int) -> Permuted:
    """Copies each token's hidden state once per chosen expert, rows sorted by expert. No host sync.

    Every choice lies in 0..experts-1.
    """
    sorted_R, choice_R = expert_TK.flatten().sort(stable=True)
    token_R = choice_R // expert_TK.shape[1]
    each_E = torch.arange(experts, dtype=sorted_R.dtype, device=sorted_R.device)
    end_E = torch.searchsorted(sorted_R, each_E, right=True, out_int32=True)
    return Permuted(hidden_TH.index_select(0, token_R), token_R, choice_R, end_E)


def swiglu(x_R2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [R, 2I], gate columns first; in place: the result is a view of the first I columns."""
    gate_RI, up_RI = x_R2I.chunk(2, dim=-1)
    return functional.silu(gate_RI, inplace=True).mul_(up_RI)


def grouped_swiglu(
    row_RH: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    end_E: torch.Tensor,
    how: How = "loop",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row through its own expert: (silu(x w1^T) * (x w3^T)) w2^T, [R, H]. Rows past end_E[-1] stay unwritten."""
    check_experts(row_RH, w13, w2, end_E)
    x_R2I = grouped_rows(row_RH, w13.transpose(1, 2), end_E, how)
    return grouped_rows(swiglu(x_R2I), w2.transpose(1, 2), end_E, how, out)


def grouped_rows(
    row_RK: torch.Tensor,
    matrix_EKN: torch.Tensor,
    end_E: torch.Tensor,
    how: How,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row times its own expert's matrix, [R, N]; matrices may be transposed views. See `how` above."""
    if how == "grouped" and row_RK.shape[0]:
        result_RN = functional.grouped_mm(row_RK, matrix_EKN, offs=end_E)
        return result_RN if out is None else out.copy_(result_RN)  # grouped_mm has no out
    out = row_RK.new_empty(row_RK.shape[0], matrix_EKN.shape[2]) if out is None else out
    for expert, begin, end in spans(end_E):
        product(row_RK[begin:end], matrix_EKN[expert], out[begin:end])
    return out


def spans(end_E: torch.Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row after the last) of each expert that has rows. Reads `end_E` on the host."""
    ends = end_E.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]


def combine(
    out_RH: torch.Tensor,
    gate_R: torch.Tensor,
    token_R: torch.Tensor,
    tokens: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gate-weighted sum of each token's rows, [T, H]; zero for a token without rows. Gates and sums are float32.

    On CUDA the order of the additions is not fixed, so the last bits may differ between runs.
    """
    out = out_RH.new_empty(tokens, out_RH.shape[1]) if out is None else out
    sum_TH = out.zero_() if out.dtype == torch.float32 else torch.zeros_like(out, dtype=torch.float32)
    sum_TH.index_add_(0, token_R, out_RH * gate_R.unsqueeze(1))
    return out if sum_TH is out else out.copy_(sum_TH)


def shared_expert(hidden_TH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """The expert every token passes: w13 [2I, H], w2 [H, I]; [T, H]."""
    return gemm(swiglu(gemm(hidden_TH, w13)), w2)


def moe_local(
    hidden_TH: torch.Tensor,
    token_R: torch.Tensor,
    gate_R: torch.Tensor,
    end_E: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    how: HowLayer = "loop",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rank's part of a layer after routing: gathers rows, runs the experts, sums by token with gates. [T, H].

    `token_R` int64 and `gate_R` float32 of rows sorted by expert, `end_E` int32 with end_E[-1] = R. `out` need not be
    zeroed.
    """
    check_experts(hidden_TH, w13, w2, end_E)
    out = torch.empty_like(hidden_TH) if out is None else out
    if how == "triton":
        from . import triton_moe  # Triton is imported only where it is asked for

        return triton_moe.fused_moe(hidden_TH, token_R, gate_R, end_E, w13, w2, out)
    row_RH = hidden_TH.index_select(0, token_R)
    return combine(grouped_swiglu(row_RH, w13, w2, end_E, how), gate_R, token_R, hidden_TH.shape[0], out)


def check_experts(row_RH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, end_E: torch.Tensor) -> None:
    """ValueError unless the shapes belong together: rows [*, H], w13 [E, 2I, H], w2 [E, H, I], ends int32 [E]."""
    experts, hidden, intermediate = w2.shape
    fits = tuple(w13.shape) == (experts, 2 * intermediate, hidden) and tuple(end_E.shape) == (experts,)
    if not fits or row_RH.shape[1] != hidden or end_E.dtype != torch.int32:
        raise ValueError(
            "experts need rows [R, H], w13 [E, 2I, H], w2 [E, H, I] and int32 ends [E]: "
            f"rows {list(row_RH.shape)}, w13 {list(w13.shape)}, w2 {list(w2.shape)}, "
            f"ends {list(end_E.shape)} of {end_E.dtype}"
        )
