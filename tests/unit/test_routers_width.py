"""Routers whose tokens take more or fewer experts, worked by hand or by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.policy import load_policy
from moesim.routing import NONE, RoutingContext


def scores(tokens, experts, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (tokens, experts))


def policy(kind, **parameters):
    return load_policy("routing", {"kind": kind, **parameters})


# ------------------------------------------------------------------------------------------------------- top-p


def test_top_p_takes_the_expert_that_exceeds_p():
    score = np.log([[0.5, 0.3, 0.15, 0.05], [0.05, 0.35, 0.35, 0.25], [0.97, 0.01, 0.01, 0.01]])
    for p, expected in (
        (0.4, [[0, NONE], [1, 2], [0, NONE]]),
        (0.6, [[0, 1], [1, 2], [0, NONE]]),
        (0.9, [[0, 1, 2], [1, 2, 3], [0, NONE, NONE]]),
    ):
        routed = policy("top_p", p=p).route(score, RoutingContext(2, norm_topk_prob=False))
        np.testing.assert_array_equal(routed.expert_TK, expected)
    np.testing.assert_allclose(routed.gate_TK[0], [0.5, 0.3, 0.15])  # the probabilities as they are
    np.testing.assert_array_equal(policy("top_p", p=0.9, most=2).route(score, RoutingContext(2)).expert_TK[0], [0, 1])
    assert (policy("top_p", p=1.0).route(score, RoutingContext(2)).expert_TK != NONE).all()


def test_top_p_by_brute_force():
    score = scores(300, 24)
    routed = policy("top_p", p=0.7).route(score, RoutingContext(4))
    for row, ids in zip(score, routed.expert_TK, strict=True):
        prob = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order, taken, total = sorted(range(24), key=lambda e: (-row[e], e)), [], 0.0
        while total <= 0.7:
            taken.append(order[len(taken)])
            total += prob[taken[-1]]
        assert ids[ids != NONE].tolist() == taken


def test_top_p_that_the_sum_only_equals_takes_one_more():
    score = np.zeros((1, 4), np.float32)  # 0.25 each, and 0.25 + 0.25 does not exceed 0.5
    assert policy("top_p", p=0.5).route(score, RoutingContext(2)).expert_TK.tolist() == [[0, 1, 2]]


# ------------------------------------------------------------------------------------------------ null experts


def test_null_experts_leave_the_true_ones_among_the_best():
    score = np.array([[3.0, 1.0, 2.0, 0.0, 5.0], [3.0, 1.0, 2.0, 4.0, 5.0], [0.0, 1.0, 2.0, 2.0, 2.0]])
    routed = policy("null_experts", null_experts=2, top_k=3, given=True).route(score, RoutingContext(2))
    np.testing.assert_array_equal(routed.expert_TK, [[0, 2, NONE], [0, NONE, NONE], [2, NONE, NONE]])
    np.testing.assert_allclose(routed.gate_TK[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0])
    np.testing.assert_allclose(routed.gate_TK[1], [1, 0, 0])
    assert policy("null_experts", null_experts=2, top_k=3, given=True).width(2, 3) == 3


def test_made_null_experts_follow_their_offset():
    score, context = scores(4000, 8), RoutingContext(2, seed=1)
    mean = [
        (policy("null_experts", top_k=3, null_logit=x).route(score, context).expert_TK != NONE).sum(1).mean()
        for x in (-50.0, -1.0, 0.0, 1.0, 50.0)
    ]
    assert mean[0] == 3
    assert mean[-1] == 0
    assert (np.diff(mean) < 0).all()


def test_alike_columns_give_each_the_same_share():
    made = policy("null_experts", null_experts=8, top_k=3, given=True)
    ids = made.route(scores(20_000, 16), RoutingContext(2)).expert_TK
    assert abs((ids != NONE).sum(1).mean() - 3 * 8 / 16) < 0.02  # k n / (n + m); a deviation of 0.006


# --------------------------------------------------------------------------------------------------- threshold


def test_threshold_takes_the_upper_share_and_keeps_its_bounds():
    score = np.array([[8.0, 7, 6, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(
        policy("threshold", percentile=75.0).route(score, RoutingContext(2)).expert_TK, [[0, 1], [7, 6]]
    )
    assert policy("threshold", percentile=75.0, most=1).route(score, RoutingContext(2)).expert_TK.shape == (2, 1)
    assert policy("threshold", percentile=75.0, least=4).route(score, RoutingContext(2)).expert_TK.shape == (2, 4)


def test_threshold_of_a_normal_estimate_follows_the_shape():
    """A peaked token takes one, a token with two heights its upper half."""
    score = np.array([[10.0, 0, 0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 0, 0, 0]])
    routed = policy("threshold", percentile=75.0, estimate="normal").route(score, RoutingContext(2))
    np.testing.assert_array_equal((routed.expert_TK != NONE).sum(1), [1, 4])


@pytest.mark.parametrize(
    ("schedule", "most"),
    [
        ("uniform", [16, 16, 16, 16]),
        ("descending", [16, 9, 4, 1]),
        ("ascending", [1, 4, 9, 16]),
        ("pyramid", [1, 9, 9, 1]),
        ("wave", [16, 1, 1, 16]),
    ],
)
def test_schedules_over_depth(schedule, most):
    made = policy("threshold", schedule=schedule)
    assert [made.most_in(layer, 4, 16) for layer in range(4)] == most
    ids = made.route(scores(5, 16), RoutingContext(2, layer=3, num_layers=4)).expert_TK
    assert ids.shape[1] == min(most[3], 8)  # half of 16 reach the median


def test_threshold_refuses_crossed_bounds():
    with pytest.raises(BadInput, match="most must be at least least"):
        policy("threshold", least=3, most=2)


# -------------------------------------------------------------------------------------------------- growing k


def test_k_grows_with_progress():
    made = policy("growing_topk", first=2, last=6, inference=3)
    for progress, k in ((0.0, 2), (0.25, 3), (0.5, 4), (1.0, 6)):
        context = RoutingContext(4, training=True, progress=progress)
        assert made.route(scores(7, 16), context).expert_TK.shape == (7, k)
    assert made.route(scores(7, 16), RoutingContext(4)).expert_TK.shape == (7, 3)
    assert made.width(4, 16) == 6
    assert policy("growing_topk").width(4, 16) == 16


def test_the_frozen_router_is_the_same_in_every_step():
    score = scores(50, 16)
    one, other = (policy("growing_topk").route(score, RoutingContext(4, step=s)).expert_TK for s in (0, 9))
    np.testing.assert_array_equal(one, other)
    assert (policy("growing_topk").route(score, RoutingContext(4, layer=1)).expert_TK != one).any()
    same = policy("growing_topk", router="scores").route(score, RoutingContext(4)).expert_TK
    np.testing.assert_array_equal(same, np.argsort(-score, axis=1)[:, :4])


# ------------------------------------------------------------------------------------------------------ halting


def test_a_token_halts_from_a_layer_on():
    """One-hot gates have norm 1: the change is 1 / (1 + layer), so 0.3 stops after layer 3 (1/4); even gates over 16
    have norm 1/4 and stop as soon as they may."""
    score = np.array([[60.0] + [0.0] * 15, [0.0] * 16])
    made, carry, taken = policy("halting", threshold=0.3, free_layers=2), {}, []
    for layer in range(6):
        routed = made.route(score, RoutingContext(2, layer=layer, num_layers=6, carry=carry))
        carry = dict(routed.carry)
        taken.append((routed.expert_TK != NONE).sum(1).tolist())
    assert taken == [[2, 2], [2, 2], [2, 2], [2, 0], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match="same tokens"):
        made.route(scores(3, 16), RoutingContext(2, layer=1, carry=carry))


# -------------------------------------------------------------------------------------------------------- tiers


def test_tiers_share_out_tokens_by_importance():
    """Columns 0-1 are the dear experts, 2-3 the cheap ones; flat tokens matter most."""
    score = np.array([[9.0, 0, 0, 8], [0.0, 0, 0, 0], [0.0, 1, 0, 2], [90.0, 0, 0, 0]])
    routed = policy("tiers", shares=[0.5, 0.25]).route(score, RoutingContext(1))
    assert routed.expert_TK[:, 0].tolist() == [3, 0, 1, NONE]
    two = policy("tiers", shares=[0.5, 0.25]).route(score, RoutingContext(3))
    assert two.expert_TK.tolist() == [[3, 2, NONE], [0, 1, NONE], [1, 0, NONE], [NONE, NONE, NONE]]


def test_tiers_by_thresholds_look_at_one_token():
    score = np.array([[0.0, 0, 0, 0], [1.0, 0, 0, 2], [60.0, 0, 0, 0]])
    made = policy("tiers", thresholds=[0.99, 0.5])
    assert not made.couples
    assert policy("tiers").couples
    assert made.route(score, RoutingContext(1)).expert_TK[:, 0].tolist() == [0, 3, NONE]
    with pytest.raises(BadInput, match="thresholds fall"):
        policy("tiers", thresholds=[0.5, 0.9])
    with pytest.raises(BadInput, match="add up to 1"):
        policy("tiers", shares=[0.5, 0.6])


def test_experts_of_low_gate_run_as_their_twins():
    score = np.log([[0.7, 0.2, 0.1, 1.0, 1.0, 1.0], [0.4, 0.35, 0.25, 1.0, 1.0, 1.0]])
    routed = policy("tiers", approximate_below=0.3).route(score, RoutingContext(2))
    assert routed.expert_TK.tolist() == [[0, 4], [0, 1]]
    np.testing.assert_allclose(routed.gate_TK[0], [7 / 9, 2 / 9])
    with pytest.raises(ValueError, match="twin"):
        policy("tiers", approximate_below=0.3).route(score[:, :5], RoutingContext(2))
