"""Capacity limits against a loop over choices in the order that the rule states."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.routing import NONE
from moesim.routing.capacity import CapacitySpec, capacity_of, dropped_by_position, limit


def brute(expert_TW, gate_TW, score_TE, capacity, spec, scope_T):
    """Choice after choice: (experts by place, dropped, rerouted), places as they were."""
    tokens, width = expert_TW.shape
    choices = [(t, w) for t in range(tokens) for w in range(width) if expert_TW[t, w] != NONE]
    if spec.drop == "score":
        choices.sort(key=lambda c: (-gate_TW[c], c))
    elif spec.order == "choice":
        choices.sort(key=lambda c: (c[1], c[0]))
    room = {}
    out = np.full(expert_TW.shape, NONE)
    late = []

    def take(t, w, e):
        cell = (scope_T[t], e)
        room.setdefault(cell, capacity[scope_T[t]])
        if room[cell] > 0:
            room[cell] -= 1
            out[t, w] = e
            return True
        return False

    for t, w in choices:
        if not take(t, w, expert_TW[t, w]):
            late.append((t, w))
    rerouted = np.zeros(expert_TW.shape, bool)
    if spec.drop == "reroute":
        for t, w in late:
            mine = {*expert_TW[t].tolist(), *out[t].tolist()}
            others = [e for e in range(score_TE.shape[1]) if e not in mine and score_TE[t, e] > -np.inf]
            for e in sorted(others, key=lambda e: (-score_TE[t, e], e)):
                if take(t, w, e):
                    rerouted[t, w] = True
                    break
    return out, (expert_TW != NONE) & (out == NONE), rerouted


def case(seed):
    """Few experts and levels, so that capacities bind and scores tie; ragged rows; some experts ruled out."""
    rng = np.random.default_rng(seed)
    tokens, experts = int(rng.integers(0, 15)), int(rng.integers(1, 8))
    width = int(rng.integers(1, min(3, experts) + 1))
    score = rng.integers(0, int(rng.integers(1, 6)), (tokens, experts)).astype(np.float32)
    score += np.float32(rng.random() < 0.5) * rng.random(experts, np.float32)
    expert = np.argsort(-score, 1, kind="stable")[:, :width].astype(np.int32)
    gate = np.take_along_axis(score, expert.astype(int), 1) / 8 + np.float32(0.1)
    short = rng.random(tokens) < 0.3
    expert[short, width // 2 :] = NONE
    gate[expert == NONE] = 0
    if rng.random() < 0.4:
        score = np.where((rng.random(score.shape) < 0.2), -np.inf, score).astype(np.float32)
    scopes = int(rng.integers(1, 4))
    capacity = rng.integers(0, max(2, 2 * tokens * width // experts), scopes)
    return expert, gate, score, capacity, rng.integers(0, scopes, tokens)


@pytest.mark.parametrize("drop", ["position", "score", "reroute"])
@pytest.mark.parametrize("order", ["choice", "token"])
def test_against_one_choice_after_the_other(drop, order):
    spec = CapacitySpec(factor=1.0, drop=drop, order=order)
    dropped = rerouted = 0
    for seed in range(600):
        expert, gate, score, capacity, scope = case(seed)
        before = [a.copy() for a in (expert, gate, score)]
        limited = limit(expert, gate, score, capacity, spec, scope)
        for a, b in zip((expert, gate, score), before, strict=True):
            np.testing.assert_array_equal(a, b)
        out, gone, moved = brute(expert, gate, score, capacity, spec, scope)
        np.testing.assert_array_equal(limited.dropped_TW, gone)
        np.testing.assert_array_equal(limited.rerouted_TW, moved)
        np.testing.assert_array_equal(limited.wanted_TW, expert != NONE)
        for t in range(len(expert)):
            left = [(e, g) for e, g in zip(out[t], gate[t], strict=True) if e != NONE]
            empty = expert.shape[1] - len(left)
            assert limited.expert_TW[t].tolist() == [e for e, _ in left] + [NONE] * empty
            assert limited.gate_TW[t].tolist() == [g for _, g in left] + [0] * empty
            assert len({e for e, _ in left}) == len(left)
        assert limited.wanted - limited.dropped == (limited.expert_TW != NONE).sum()
        assert limited.expert_TW.dtype == np.int32
        assert limited.gate_TW.dtype == gate.dtype
        dropped += limited.dropped
        rerouted += int(limited.rerouted_TW.sum())
    assert dropped > 500, "the cases bind"
    assert (rerouted > 250) == (drop == "reroute")


def test_one_scope_without_scores():
    expert = np.array([[0, 1], [0, 2], [0, 1], [1, NONE]], np.int32)
    gate = np.array([[0.5, 0.1], [0.9, 0.1], [0.7, 0.3], [0.2, 0]], np.float32)
    late = limit(expert, gate, None, 2, CapacitySpec(factor=1.0))
    np.testing.assert_array_equal(late.expert_TW, [[0, 1], [0, 2], [NONE, NONE], [1, NONE]])
    low = limit(expert, gate, None, 2, CapacitySpec(factor=1.0, drop="score"))
    np.testing.assert_array_equal(low.expert_TW, [[NONE, NONE], [0, 2], [0, 1], [1, NONE]])
    with pytest.raises(ValueError, match="scores"):
        limit(expert, gate, None, 2, CapacitySpec(factor=1.0, drop="reroute"))


def test_reroute_is_fast_enough_to_need_no_loop_over_tokens():
    """4,096 tokens that all want the same two of 64 experts: the rounds end, and everyone finds a place."""
    score = np.tile(np.arange(64, 0, -1, dtype=np.float32), (4096, 1))
    expert = np.tile(np.array([0, 1], np.int32), (4096, 1))
    limited = limit(expert, np.ones((4096, 2), np.float32), score, 128, CapacitySpec(factor=1.0, drop="reroute"))
    assert limited.dropped == 0
    assert (np.bincount(limited.expert_TW.ravel(), minlength=64) == 128).all()


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "least", "expected"),
    [
        (10, 1, 1, 1.1, 0, 11), (100, 2, 8, 1.0, 0, 25), (100, 2, 8, 1.25, 0, 32), (1, 1, 64, 1.0, 0, 1),
        (1, 1, 64, 1.0, 4, 4), (0, 2, 8, 1.0, 0, 0), (8192, 8, 64, 0.8, 0, 820), (30, 2, 6, 0.7, 0, 7),
    ],
)  # fmt: skip
def test_capacity_is_the_ceiling_of_the_exact_share(tokens, top_k, experts, factor, least, expected):
    assert capacity_of(tokens, top_k, experts, factor, least) == expected


def test_factors_by_layer_then_phase_then_model():
    spec = CapacitySpec(factor=1.25, layers={3: 2.0}, decode=4.0)
    phases = ("prefill", "decode", "training")
    assert [spec.factor_of(3, p) for p in phases] == [2.0, 2.0, 2.0]
    assert [spec.factor_of(0, p) for p in phases] == [1.25, 4.0, 1.25]
    assert [CapacitySpec(prefill=1.0).factor_of(0, p) for p in phases] == [1.0, None, None]
    for wrong in ({}, {"factor": 0.0}, {"layers": {-1: 1.0}}, {"layers": {0: 0.0}}):
        with pytest.raises(ValueError, match=r"factor|greater than 0"):
            CapacitySpec.model_validate(wrong)


def test_drops_by_position_are_counts():
    dropped = np.array([[True, False], [False, False], [True, True], [False, True]])
    wanted = np.array([[True, True], [True, False], [True, True], [True, True]])
    gone, all_ = dropped_by_position(dropped, wanted, np.array([0.0, 0.49, 0.5, 1.0]), bins=2)
    assert gone.tolist() == [1, 3]
    assert all_.tolist() == [3, 4]
