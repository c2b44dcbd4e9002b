"""Checks of a layer's own part (block.py) against float64. See checks.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from . import block, reference
from .bounds import UNIT, Ball, exact, rms_norm_ball, score_ball
from .checks import DTYPES, Outcome, agreeing, compare, holds, normal, poisoned

__all__ = ["BLOCKS", "Case", "block_checks", "check_block", "rotated_ball"]

FP32 = UNIT[torch.float32]
CONTEXT, SEQUENCES = 29, 7


@dataclass(frozen=True)
class Case:
    """A layer's own part: sizes, what the model has besides, and the share of choices that are refused."""

    name: str
    tokens: int
    hidden: int
    heads: block.Heads
    experts: int
    gates: block.Gates
    first_layer: bool = False
    biased: bool = False
    head_norm: bool = False
    refused: float = 0.0
    router: torch.dtype | None = None

    def make(self, dtype: torch.dtype, device: torch.device) -> block.Own:
        """Random weights."""
        make = {"dtype": dtype, "device": device}
        wide, router = self.heads.fused * self.heads.dim, self.router or dtype
        normed = self.heads.query + self.heads.kv
        scale = self.hidden**-0.5
        return block.Own(
            before_H=normal(1, self.hidden, **make),
            qkv_MH=normal(2, wide, self.hidden, scale=scale, **make),
            out_HM=normal(3, self.hidden, self.heads.query * self.heads.dim, scale=scale, **make),
            after_H=normal(4, self.hidden, **make),
            router_EH=normal(5, self.experts, self.hidden, scale=scale, dtype=router, device=device),
            bias_M=normal(6, wide, **make) if self.biased else None,
            head_norm_XD=normal(7, normed, self.heads.dim, **make) if self.head_norm else None,
        )


BLOCKS = (
    Case("gqa", 21, 48, block.Heads(4, 2, 8), 8, block.Gates(2)),
    Case("first-layer", 5, 32, block.Heads(3, 3, 4), 6, block.Gates(3, renormalise=False), first_layer=True),
    Case("bias-and-head-norm", 9, 40, block.Heads(6, 2, 16), 5, block.Gates(2), biased=True, head_norm=True),
    Case("refused", 17, 32, block.Heads(4, 1, 8), 4, block.Gates(4, "sigmoid"), refused=0.4),
    Case("router-of-another-dtype", 8, 32, block.Heads(2, 1, 8), 8, block.Gates(2), router=torch.float32),
    Case("one-token", 1, 32, block.Heads(2, 2, 8), 4, block.Gates(1)),
)


def block_checks(device: torch.device) -> dict[str, Callable[[], Outcome]]:
    """Every check of this file, by name."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return {
        f"block-{case.name}-{short[dtype]}": partial(check_block, case, dtype, device)
        for case, dtype in itertools.product(BLOCKS, DTYPES)
    }


def check_block(case: Case, dtype: torch.dtype, device: torch.device) -> Outcome:
    """`own_part` against its steps in float64: queries, keys, values, cache, residual, normed states, gates, order."""
    own, heads, tokens = case.make(dtype, device), case.heads, case.tokens
    make = {"dtype": dtype, "device": device}
    hidden = None if case.first_layer else normal(11, tokens, case.hidden, **make)
    residual = normal(12, tokens, case.hidden, **make)
    attended = normal(13, tokens, heads.query * heads.dim, **make)
    cache = normal(14, 2, SEQUENCES, heads.kv, CONTEXT, heads.dim, **make)
    generator = torch.Generator().manual_seed(15)
    cell_T = torch.randperm(SEQUENCES * CONTEXT, generator=generator)[:tokens]
    sequence_T, position_T = cell_T // CONTEXT, cell_T % CONTEXT
    slot_TK = torch.rand(tokens, case.experts, generator=generator).argsort(1)[:, : case.gates.top_k]
    slot_TK = torch.where(torch.rand(slot_TK.shape, generator=generator) < case.refused, case.experts, slot_TK)
    rows = int((slot_TK < case.experts).sum())
    phase = block.phases(CONTEXT, heads.dim, device=device)[position_T.to(device)]
    place = block.Place(sequence_T.to(device), position_T.to(device), phase)
    before, residual_before = cache.clone(), exact(residual)
    with poisoned(device):
        found = block.own_part(
            own, heads, case.gates, hidden, residual, attended, cache, place, slot_TK.to(device), case.experts, rows
        )
    unit = UNIT[dtype]
    first = residual_before if hidden is None else residual_before.plus(exact(hidden), unit)
    qkv = _projected(case, own, first, position_T.tolist(), unit)
    second = exact(attended).matmul(exact(own.out_HM).t, unit).plus(first, unit)
    normed = rms_norm_ball(second, exact(own.after_H), block.EPSILON, unit)
    expected = reference.norm_residual_reference(
        attended.double().cpu() @ own.out_HM.double().cpu().t(), first.value, own.after_H.cpu(), block.EPSILON
    )
    laws = (
        _cache_is(before, cache, found.qkv_TND[:, heads.query :], place),
        _order_is(found.order, slot_TK, case.experts),
    )
    gate = _gates(case, own, normed, found)
    if gate is None or not all(laws):
        return holds(False)
    return compare(
        (found.qkv_TND, qkv),
        (residual, second),
        (found.normed_TH, agreeing(normed, expected)),
        (found.gate_R, gate[found.order.choice_R.cpu()]),
    )


def rotated_ball(head_TXD: Ball, position_T: list[int], unit: float) -> Ball:
    """Heads turned in fp32 by phases that are stored in fp32."""
    dim = head_TXD.value.shape[-1]
    turn_P = block.ROTARY_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle_T1P = torch.tensor(position_T, dtype=torch.float64)[:, None, None] * turn_P
    cos, sin = (Ball(x, FP32 * x.abs()) for x in (torch.cos(angle_T1P), torch.sin(angle_T1P)))
    x, y = head_TXD[..., 0::2], head_TXD[..., 1::2]
    real = x.times(cos, FP32).minus(y.times(sin, FP32), FP32).rounded(unit)
    imaginary = x.times(sin, FP32).plus(y.times(cos, FP32), FP32).rounded(unit)
    pairs = ((real.value, imaginary.value), (real.error, imaginary.error))
    turned = Ball(*(torch.stack(pair, dim=-1).flatten(-2) for pair in pairs))
    return agreeing(turned, reference.rotary_reference(head_TXD.value, position_T, block.ROTARY_BASE))


def _projected(case: Case, own: block.Own, first: Ball, position_T: list[int], unit: float) -> Ball:
    """Queries, keys and values [T, N, D], the first two rotated."""
    heads = case.heads
    qkv = rms_norm_ball(first, exact(own.before_H), block.EPSILON, unit).matmul(exact(own.qkv_MH).t, unit)
    if own.bias_M is not None:
        qkv = qkv.plus(exact(own.bias_M), unit)
    qkv = Ball(*(x.view(case.tokens, heads.fused, heads.dim) for x in (qkv.value, qkv.error)))
    turning = qkv[:, : heads.query + heads.kv]
    if own.head_norm_XD is not None:
        turning = rms_norm_ball(turning, exact(own.head_norm_XD), block.EPSILON, unit)
    turned, value = rotated_ball(turning, position_T, unit), qkv[:, heads.query + heads.kv :]
    return Ball(torch.cat((turned.value, value.value), 1), torch.cat((turned.error, value.error), 1))


def _gates(case: Case, own: block.Own, normed: Ball, found: block.OwnResult) -> Ball | None:
    """Gates [T K] of the experts that the operator chose from its own states; None where others scored higher."""
    assert own.router_EH is not None
    chosen, _ = block.choose(own, case.gates, found.normed_TH)
    chosen = chosen.cpu()
    lifted = normed.rounded(UNIT[own.router_EH.dtype])
    score = score_ball(lifted.matmul(exact(own.router_EH).t, UNIT[own.router_EH.dtype]), case.gates.score)
    gate = Ball(score.value.gather(1, chosen), score.error.gather(1, chosen))
    others = (score.value - score.error).scatter(1, chosen, -1.0).amax(1)
    if not bool((others <= (gate.value + gate.error).amin(1)).all()):
        return None
    if case.gates.renormalise:
        gate = gate.over(gate.sum(1), FP32)
    return Ball(gate.value.flatten(), gate.error.flatten())


def _cache_is(before: torch.Tensor, after: torch.Tensor, kv_TXD: torch.Tensor, place: block.Place) -> bool:
    """Every token's keys and values stand in its place, and nothing else has changed."""
    kv_heads = before.shape[2]
    for t, (s, p) in enumerate(zip(place.sequence_T.tolist(), place.position_T.tolist(), strict=True)):
        before[0, s, :, p], before[1, s, :, p] = kv_TXD[t, :kv_heads], kv_TXD[t, kv_heads:]
    return bool(torch.equal(before, after))


def _order_is(found: block.Order, slot_TK: torch.Tensor, slots: int) -> bool:
    """Rows in the order of (slot, choice), refused choices left out."""
    flat = slot_TK.flatten().tolist()
    choices = sorted((slot, i) for i, slot in enumerate(flat) if slot < slots)
    ends = [sum(slot <= e for slot, _ in choices) for e in range(slots)]
    laws = (
        found.choice_R.tolist() == [i for _, i in choices],
        found.token_R.tolist() == [i // slot_TK.shape[1] for _, i in choices],
        found.end_E.dtype == torch.int32,
        found.end_E.tolist() == ends,
    )
    return all(laws)
