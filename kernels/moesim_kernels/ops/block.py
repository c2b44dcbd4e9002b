"""A decoder layer's own part: what a rank does for its own tokens around the attention kernel and the experts.

    project -> rotate -> write_kv -> [attention kernel] -> attention_out -> choose -> order -> [experts]

In it, in this order, each once a layer and in the dtype of the hidden states:
1. the residual add and RMS norm before attention (`norm_residual`), the fused product to queries, keys and values, its
   bias and the norm of query and key heads where the model has them (`project`);
2. rotary positions on queries and keys, in place (`rotate`), and keys and values into the cache (`write_kv`);
3. the product of the attention kernel's output, the second residual add and RMS norm (`attention_out`);
4. the router's scores in the router's dtype, top-k and gates (`choose`);
5. the choices that this rank's slots serve, sorted by slot: rows, and where each slot's rows end (`order`).
Not in it: the attention kernel, the experts (gather of rows, products, gate-weighted sum), shared experts, exchange,
embedding and head. `own_part` is all of it in one call, as it is measured.

Suffixes: T tokens of the step, H hidden, Q query heads, G key-value heads, D head dimension, N = Q + 2 G heads of the
fused projection, C context that a cache has room for, S sequences it has room for, E experts or slots, K choices a
token, R rows = (token, slot) pairs sorted by slot, P = D / 2 pairs that turn together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from .dense import gemm, norm_residual
from .moe import Score, route

__all__ = [
    "EPSILON",
    "Gates",
    "Heads",
    "Order",
    "Own",
    "OwnResult",
    "Place",
    "attention_out",
    "choose",
    "order",
    "own_part",
    "phases",
    "project",
    "rotate",
    "write_kv",
]

EPSILON = 1e-6
ROTARY_BASE = 10_000.0


class Heads(NamedTuple):
    """Query heads, key-value heads and their dimension."""

    query: int
    kv: int
    dim: int

    @property
    def fused(self) -> int:
        """Heads that the fused projection makes."""
        return self.query + 2 * self.kv


class Gates(NamedTuple):
    """How a router's logits become experts and gates: as of `moe.route`."""

    top_k: int
    score: Score = "softmax"
    groups: int = 1
    top_groups: int = 1
    renormalise: bool = True


class Own(NamedTuple):
    """Weights of one layer's own part, matrices in torch's linear layout.

    qkv_MH: [(Q + 2 G) D, H], queries first, then keys, then values. out_HM: [H, Q D]. bias_M: of qkv. head_norm_XD:
    weights of the RMS norm of each query and key head, [Q + G, D]. bias_E: added to scores for the choice alone.
    router_EH is None in a layer without experts.
    """

    before_H: torch.Tensor
    qkv_MH: torch.Tensor
    out_HM: torch.Tensor
    after_H: torch.Tensor
    router_EH: torch.Tensor | None = None
    bias_M: torch.Tensor | None = None
    head_norm_XD: torch.Tensor | None = None
    bias_E: torch.Tensor | None = None


class Place(NamedTuple):
    """Where a step's tokens stand: sequence_T and position_T int64, the cache's row of each token; phase_TP complex64,
    what its rotary pairs are multiplied by."""

    sequence_T: torch.Tensor
    position_T: torch.Tensor
    phase_TP: torch.Tensor


class Order(NamedTuple):
    """Rows sorted by slot, stable in the choice: slot e owns rows end_E[e-1]:end_E[e]. choice_R: the row's place in the
    flattened [T, K]; end_E int32."""

    token_R: torch.Tensor
    choice_R: torch.Tensor
    end_E: torch.Tensor


def phases(context: int, dim: int, base: float = ROTARY_BASE, device: torch.device | str = "cpu") -> torch.Tensor:
    """exp(i p base^(-2j/D)) of position p and pair j, complex64 [context, D/2] (RoFormer, arXiv 2104.09864, 3.2.2)."""
    turn_P = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle_CP = torch.arange(context, dtype=torch.float64).unsqueeze(1) * turn_P
    return torch.polar(torch.ones_like(angle_CP), angle_CP).to(torch.complex64).to(device)


def project(
    own: Own, heads: Heads, hidden_TH: torch.Tensor | None, residual_TH: torch.Tensor, eps: float = EPSILON
) -> torch.Tensor:
    """residual += hidden, in place; then norm and fused projection: queries, keys and values [T, N, D], not rotated.

    hidden_TH is what the layer below has to add; None in the first layer.
    """
    tokens = residual_TH.shape[0]
    if hidden_TH is None:
        normed_TH = functional.rms_norm(residual_TH, (residual_TH.shape[1],), own.before_H, eps)
    else:
        normed_TH = norm_residual(hidden_TH, residual_TH, own.before_H, eps)
    qkv_TM = gemm(normed_TH, own.qkv_MH)
    if own.bias_M is not None:
        qkv_TM += own.bias_M
    qkv_TND = qkv_TM.view(tokens, heads.fused, heads.dim)
    if own.head_norm_XD is not None:
        head_TXD = qkv_TND[:, : heads.query + heads.kv]
        head_TXD.copy_(functional.rms_norm(head_TXD, (heads.dim,), None, eps) * own.head_norm_XD)
    return qkv_TND


def rotate(qkv_TND: torch.Tensor, heads: Heads, phase_TP: torch.Tensor) -> None:
    """Rotary positions on queries and keys, in place and in float32: neighbouring elements turn together."""
    head_TXD = qkv_TND[:, : heads.query + heads.kv]
    phase_T1P = phase_TP.unsqueeze(1)
    if qkv_TND.dtype == torch.float32:
        torch.view_as_complex(head_TXD.unflatten(-1, (-1, 2))).mul_(phase_T1P)
        return
    pair_TXP = torch.view_as_complex(head_TXD.float().unflatten(-1, (-1, 2))).mul_(phase_T1P)
    head_TXD.copy_(torch.view_as_real(pair_TXP).flatten(-2))


def write_kv(cache_2SGCD: torch.Tensor, qkv_TND: torch.Tensor, heads: Heads, place: Place) -> None:
    """Keys and values of the tokens into the cache: keys [0, S, G, C, D], values [1, S, G, C, D]."""
    kv_T2GD = qkv_TND[:, heads.query :].unflatten(1, (2, heads.kv))
    cache_2SGCD[:, place.sequence_T, :, place.position_T] = kv_T2GD


def attention_out(own: Own, attended_TM: torch.Tensor, residual_TH: torch.Tensor, eps: float = EPSILON) -> torch.Tensor:
    """residual += attended out^T, in place; then the norm before the experts. attended_TM: [T, Q D]; [T, H]."""
    return norm_residual(gemm(attended_TM, own.out_HM), residual_TH, own.after_H, eps)


def choose(own: Own, gates: Gates, normed_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_TK int64, gate_TK float32) of the router's own top-k, best first."""
    if own.router_EH is None:
        raise ValueError("a layer without experts has no router")
    return route(
        normed_TH,
        own.router_EH,
        gates.top_k,
        score=gates.score,
        bias_E=own.bias_E,
        groups=gates.groups,
        top_groups=gates.top_groups,
        renormalise=gates.renormalise,
    )


def order(slot_TK: torch.Tensor, first: int, slots: int, rows: int) -> Order:
    """Choices that slots first .. first + slots - 1 serve, sorted by slot. No host sync.

    slot_TK: int64, any other number where a choice is refused or served elsewhere. rows: how many are served here,
    which the host knows.
    """
    local_R = slot_TK.flatten() - first
    key_R = local_R.masked_fill((local_R < 0) | (local_R >= slots), slots)
    sorted_R, choice_R = key_R.sort(stable=True)
    each_E = torch.arange(slots, dtype=sorted_R.dtype, device=sorted_R.device)
    end_E = torch.searchsorted(sorted_R, each_E, right=True, out_int32=True)
    choice_R = choice_R[:rows]
    return Order(choice_R // slot_TK.shape[1], choice_R, end_E)


class OwnResult(NamedTuple):
    """What `own_part` hands to the attention kernel (qkv_TND), to the experts (normed_TH, order) and to the sum of
    their results (gate_R, float32, of each row)."""

    qkv_TND: torch.Tensor
    normed_TH: torch.Tensor
    gate_R: torch.Tensor
    order: Order


def own_part(
    own: Own,
    heads: Heads,
    gates: Gates,
    hidden_TH: torch.Tensor | None,
    residual_TH: torch.Tensor,
    attended_TM: torch.Tensor,
    cache_2SGCD: torch.Tensor,
    place: Place,
    slot_TK: torch.Tensor,
    slots: int,
    rows: int,
) -> OwnResult:
    """All of a layer's own part; `attended_TM` stands in for what the attention kernel returns. Slots are 0 .. slots-1.

    residual_TH is added to and cache_2SGCD is written, both in place.
    """
    qkv_TND = project(own, heads, hidden_TH, residual_TH)
    rotate(qkv_TND, heads, place.phase_TP)
    write_kv(cache_2SGCD, qkv_TND, heads, place)
    normed_TH = attention_out(own, attended_TM, residual_TH)
    _, gate_TK = choose(own, gates, normed_TH)
    found = order(slot_TK, 0, slots, rows)
    return OwnResult(qkv_TND, normed_TH, gate_TK.flatten()[found.choice_R], found)
