"""A layer's own part: its checks (run with all operators' by test_ops_checks) can fail, and its parts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from moesim_kernels.ops import block
from moesim_kernels.ops.checks_block import BLOCKS, check_block

CPU = torch.device("cpu")


def test_order_by_hand() -> None:
    """Slots 4 to 6 of this rank; 9 stands for refused, 1 and 7 are others'."""
    found = block.order(torch.tensor([[5, 1], [9, 4], [6, 5], [7, 9]]), 4, 3, 4)
    assert found.choice_R.tolist() == [3, 0, 5, 4]
    assert found.token_R.tolist() == [1, 0, 2, 2]
    assert found.end_E.tolist() == [1, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_by_hand(dtype: torch.dtype) -> None:
    """Position 3, one head of two pairs: the first turns by 3, the second by 3 / 100; values stay."""
    heads = block.Heads(1, 1, 4)
    qkv = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(1, 3, 1).to(dtype)
    block.rotate(qkv, heads, block.phases(8, 4)[torch.tensor([3])])
    turned = torch.tensor([math.cos(3), math.sin(3), -math.sin(0.03), math.cos(0.03)])
    for head in range(2):
        torch.testing.assert_close(qkv[0, head], turned.to(dtype))
    assert qkv[0, 2].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_scores_between_positions_depend_on_their_distance() -> None:
    """What rotary positions are for: q at p and k at p - 2 give the same score for every p."""
    heads, phase = block.Heads(1, 1, 8), block.phases(64, 8)
    generator = torch.Generator().manual_seed(1)
    once = torch.randn(1, 3, 8, generator=generator)
    score = []
    for p in (2, 17, 63):
        at_p, before = once.clone(), once.clone()
        block.rotate(at_p, heads, phase[torch.tensor([p])])
        block.rotate(before, heads, phase[torch.tensor([p - 2])])
        score.append(float(at_p[0, 0] @ before[0, 1]))
    assert max(score) - min(score) < 1e-5
    assert abs(score[0] - float(once[0, 0] @ once[0, 1])) > 1e-3


@pytest.mark.parametrize("broken", ["rotate", "write_kv", "attention_out", "order"])
def test_checks_can_fail(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    case = next(c for c in BLOCKS if c.name == "gqa")
    assert check_block(case, torch.float32, CPU).ok
    right = getattr(block, broken)

    def rotate(qkv, heads, phase_TP):  # type: ignore[no-untyped-def]  # keys alone are missed
        right(qkv, heads._replace(query=heads.query - 1), phase_TP)

    def write_kv(cache, qkv, heads, place):  # type: ignore[no-untyped-def]
        right(cache, qkv, heads, place._replace(position_T=place.position_T - 1))

    def attention_out(own, attended, residual, eps=block.EPSILON):  # type: ignore[no-untyped-def]
        return right(own, attended, residual.clone(), eps)

    def order(slot_TK, first, slots, rows):  # type: ignore[no-untyped-def]
        return right(slot_TK.flip(1), first, slots, rows)

    monkeypatch.setattr(block, broken, locals()[broken])
    assert not check_block(case, torch.float32, CPU).ok
