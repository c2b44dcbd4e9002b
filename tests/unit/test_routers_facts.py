"""Routers that look at more than a token's own scores, worked by hand or by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.policy import load_policy
from moesim.routing import NONE, RoutingContext
from moesim.simulate import simulate
from tests.build import scenario


def scores(tokens, experts, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (tokens, experts))


def policy(kind, **parameters):
    return load_policy("routing", {"kind": kind, **parameters})


# --------------------------------------------------------------------------------------------------------- hash


def test_the_hash_table_is_fixed_and_even():
    token = np.arange(4096)
    made = policy("hash", vocab_size=4096)
    ids = made.route(np.zeros((4096, 16)), RoutingContext(3, token_T=token)).expert_TK
    assert np.bincount(ids[:, 0], minlength=16).tolist() == [256] * 16
    for k in (1, 2):
        assert abs(np.bincount(ids[:, k], minlength=16) - 256).max() < 80  # even on average: 5 deviations of 16
    again = made.route(np.zeros((3, 16)), RoutingContext(3, step=5, token_T=np.array([7, 4000, 7]))).expert_TK
    np.testing.assert_array_equal(again, ids[[7, 4000, 7]])
    assert (made.route(np.zeros((9, 16)), RoutingContext(3, layer=1, token_T=token[:9])).expert_TK != ids[:9]).any()


def test_modulo_and_closed_experts():
    made = policy("hash", table="modulo")
    context = RoutingContext(2, token_T=np.array([0, 5, 11]))
    score = np.zeros((3, 8))
    assert made.route(score, context).expert_TK.tolist() == [[0, 4], [5, 1], [3, 7]]
    score[:, [1, 5]] = -np.inf
    assert made.route(score, context).expert_TK.tolist() == [[0, 4], [6, 7], [3, 7]]
    with pytest.raises(ValueError, match="the vocabulary id of every token"):
        made.route(score, RoutingContext(2))


# ---------------------------------------------------------------------------------------------------- partition


def test_pools_by_class():
    """Quarters of their own for the two classes, half shared: 0-1, 2-3, 4-7."""
    score = np.array([[9.0, 1, 8, 7, 0, 0, 5, 0]] * 2)
    context = RoutingContext(3, class_T=np.array([0, 1]))
    made = policy("partition")
    assert made.sizes(8) == (2, 4)
    assert made.route(score, context).expert_TK.tolist() == [[0, 6, 1], [2, 3, 6]]
    each = policy("partition", from_own=1, from_shared=2)
    assert each.route(score, context).expert_TK.tolist() == [[0, 6, 4], [2, 6, 4]]
    assert each.width(3, 8) == 3
    small = policy("partition", pools=2, shared=0)
    assert small.route(np.zeros((1, 4)), RoutingContext(3, class_T=np.array([1]))).expert_TK.tolist() == [[2, 3]]


def test_pools_say_what_is_wrong():
    with pytest.raises(BadInput, match="both or neither"):
        policy("partition", from_own=1)
    with pytest.raises(ValueError, match="every class needs a pool"):
        policy("partition").route(np.zeros((1, 8)), RoutingContext(2, class_T=np.array([2])))
    with pytest.raises(ValueError, match="cannot be cut"):
        policy("partition", shared=9).route(np.zeros((1, 8)), RoutingContext(2, class_T=np.array([0])))
    with pytest.raises(ValueError, match="3 tokens, 2 values"):
        policy("partition").route(np.zeros((3, 8)), RoutingContext(2, class_T=np.array([0, 1])))


# ------------------------------------------------------------------------------------------------------ segment


def test_segments_share_the_decision_of_their_mean():
    score = np.zeros((7, 4))
    score[0, 1] = score[2, 0] = 3
    score[1, 2] = 4  # the mean of the first two rows is highest at 2, alone the first row would take 1
    score[3:, 3] = 1
    sequence, position = np.array([0, 0, 0, 5, 5, 5, 5]), np.array([4, 5, 6, 0, 1, 2, 3])
    made = policy("segment", tokens=2)
    context = RoutingContext(1, sequence_T=sequence, position_T=position)
    assert made.route(score, context).expert_TK[:, 0].tolist() == [2, 2, 0, 3, 3, 3, 3]
    odd = RoutingContext(1, sequence_T=sequence, position_T=position + 1)  # 5 | 6 7 | 1 | 2 3 | 4
    assert made.route(score, odd).expert_TK[:, 0].tolist() == [1, 2, 2, 3, 3, 3, 3]


def test_segment_lengths_go_through_the_layers():
    score = scores(8, 6)
    made = policy("segment", tokens=[1, 4])
    ids = [made.route(score, RoutingContext(2, layer=layer)).expert_TK for layer in range(3)]
    np.testing.assert_array_equal(ids[0], np.argsort(-score, axis=1)[:, :2])
    np.testing.assert_array_equal(ids[2], ids[0])
    mean = score.reshape(2, 4, 6).mean(1)
    np.testing.assert_array_equal(ids[1], np.repeat(np.argsort(-mean, axis=1)[:, :2], 4, axis=0))


# ---------------------------------------------------------------------------------------------------- recurrent


def test_the_state_of_the_layer_below_counts():
    low, high = np.array([[3.0, 0, 0, 0]]), np.array([[0.0, 0, 1, 0]])
    made = policy("recurrent", keep=0.6, shuffle=False)
    below = made.route(low, RoutingContext(1))
    above = made.route(high, RoutingContext(1, layer=1, carry=below.carry))
    np.testing.assert_allclose(above.carry["state_TE"], [[1.8, 0, 0.8, 0]])
    assert above.expert_TK.tolist() == [[0]]
    assert policy("recurrent", keep=0.0).route(high, RoutingContext(1, carry=below.carry)).expert_TK.tolist() == [[2]]
    with pytest.raises(ValueError, match="same tokens and experts"):
        made.route(scores(2, 4), RoutingContext(1, layer=1, carry=below.carry))


def test_states_of_neighbouring_layers_correlate_by_keep():
    made, carry, states = policy("recurrent", keep=0.7, shuffle=False), {}, []
    for layer in range(3):
        routed = made.route(scores(20_000, 8, seed=layer) / 2, RoutingContext(2, layer=layer, carry=carry))
        carry = dict(routed.carry)
        states.append(carry["state_TE"].ravel())
    assert abs(np.corrcoef(states[0], states[1])[0, 1] - 0.7) < 0.01
    assert abs(np.corrcoef(states[0], states[2])[0, 1] - 0.49) < 0.01
    assert abs(states[2].std() - 1) < 0.01


# ------------------------------------------------------------------------------------------------------ product


@pytest.mark.parametrize("sides", [(4, 4), (8, 8), (16, 16)])
@pytest.mark.parametrize("top_k", [1, 3, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_product_keys_find_the_best_of_all_sums(sides, top_k, tied):
    rng = np.random.default_rng(top_k)
    factors = rng.integers(0, 3, (200, sum(sides))).astype(float) if tied else rng.normal(size=(200, sum(sides)))
    routed = policy("product", columns="factors").route(factors, RoutingContext(top_k))
    total = (factors[:, : sides[0], None] + factors[:, None, sides[0] :]).reshape(200, -1)
    best = np.argsort(-total, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(routed.expert_TK, best)
    top = np.take_along_axis(total, best, 1)
    np.testing.assert_allclose(routed.gate_TK, np.exp(top) / np.exp(top).sum(1, keepdims=True))
    joint = policy("product", columns="factors", gates="joint").route(
        factors, RoutingContext(top_k, norm_topk_prob=False)
    )
    np.testing.assert_allclose(
        joint.gate_TK, np.take_along_axis(np.exp(total) / np.exp(total).sum(1)[:, None], best, 1)
    )


def test_product_of_given_experts_takes_the_best_of_rows_and_columns():
    score = np.array([[1.0, 2, 0, 7, 0, 0]])  # a grid of 2 x 3: rows (2, 7), columns (7, 2, 0)
    assert policy("product").route(score, RoutingContext(3)).expert_TK.tolist() == [[3, 0, 4]]
    score[0, 4] = -np.inf
    assert policy("product").route(score, RoutingContext(3)).expert_TK.tolist() == [[3, 0, 5]]
    with pytest.raises(ValueError, match="halves"):
        policy("product", columns="factors").route(np.zeros((1, 5)), RoutingContext(1))


def test_a_closed_row_does_not_hide_others():
    factors = np.array([[-np.inf, 1.0, -np.inf, 0.0]])
    ids = policy("product", columns="factors").route(factors, RoutingContext(1)).expert_TK
    assert ids.tolist() == [[3]]
    with pytest.raises(ValueError, match="-inf"):
        policy("product", columns="factors").route(factors, RoutingContext(2))


# -------------------------------------------------------------------------------------------------------- shift


def test_boosted_and_silenced_experts():
    score = np.array([[3.0, 2.0, 1.0, 0.0]])
    assert policy("shift").route(score, RoutingContext(2)).expert_TK.tolist() == [[0, 1]]
    assert policy("shift", silence=[0]).route(score, RoutingContext(2)).expert_TK.tolist() == [[1, 2]]
    boosted = policy("shift", boost={"ids": [3], "by": 2.5})
    routed = boosted.route(score, RoutingContext(2))
    assert routed.expert_TK.tolist() == [[0, 3]]
    np.testing.assert_allclose(routed.gate_TK, [[1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))]])
    assert not boosted.equivariant
    assert not boosted.couples
    late = policy("shift", silence=[0], last_layers=1)
    assert late.route(score, RoutingContext(1, layer=0, num_layers=2)).expert_TK.tolist() == [[0]]
    assert late.route(score, RoutingContext(1, layer=1, num_layers=2)).expert_TK.tolist() == [[1]]
    with pytest.raises(ValueError, match="does not exist: 4, 4 experts"):
        policy("shift", silence=[4]).route(score, RoutingContext(1))


def test_reinforced_gates_leave_the_choice():
    score = np.log([[0.5, 0.3, 0.2]])
    made = policy("shift", boost={"ids": [1, 2], "by": math.log(4.0), "chosen_only": True})
    routed = made.route(score, RoutingContext(2))
    assert routed.expert_TK.tolist() == [[0, 1]]
    np.testing.assert_allclose(routed.gate_TK, [[5 / 17, 12 / 17]])


def test_a_token_moves_towards_its_nearest_rows():
    """Row 0 is nearest to rows 1 and 2; gates are mixed by cosines, and the choice is by the mixed ones."""
    feature = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.2], [-1.0, 0.0]])
    score = np.array([[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 90.0]])
    unit = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    cosine = unit[0] @ unit[1:3].T
    gate = np.exp(score) / np.exp(score).sum(1, keepdims=True)
    near = (cosine @ gate[1:3]) / cosine.sum()
    for mix, order in ((0.2, [0, 1, 2]), (0.5, [1, 0, 2]), (1.0, [1, 0, 2])):
        expected = (1 - mix) * gate[0] + mix * near
        made = policy("shift", neighbours=2, mix=mix)
        routed = made.route(score, RoutingContext(3, feature_TD=feature))
        assert routed.expert_TK[0].tolist() == order
        np.testing.assert_allclose(routed.gate_TK[0], expected[order])
        assert made.couples


def test_neighbours_gates_take_the_place_of_a_tokens_own():
    """By hand: equally near, gates (0.8, 0.2, 0) and (0.02, 0.28, 0.7), whose mean scores would choose expert 1."""
    feature = np.ones((3, 1))
    score = np.array([[0.0, 0.0, 0.0], np.log([0.8, 0.2, 1e-30]), np.log([0.02, 0.28, 0.7])])
    last = RoutingContext(1, norm_topk_prob=False, feature_TD=feature, sequence_T=np.array([0, 1, 2]))
    routed = policy("shift", neighbours=2).route(score, last)
    assert routed.expert_TK[0].tolist() == [0]
    np.testing.assert_allclose(routed.gate_TK[0], [0.41])
    np.testing.assert_allclose(policy("shift", neighbours=2, mix=0.5).route(score, last).gate_TK[0], [0.41 / 2 + 1 / 6])
    closed = np.array([-np.inf, 0, 0]) + score[:1]  # an expert that is closed to the token itself is never taken
    routed = policy("shift", neighbours=2).route(np.concatenate([closed, score[1:]]), last)
    assert routed.expert_TK[0].tolist() == [2]
    np.testing.assert_allclose(routed.gate_TK[0], [0.35])


def test_who_has_no_neighbour_keeps_its_gates():
    score = np.log([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    apart = RoutingContext(3, feature_TD=np.array([[1.0, 0.0], [-1.0, 0.0]]))
    routed = policy("shift", neighbours=1).route(score, apart)
    np.testing.assert_allclose(routed.gate_TK, [[0.6, 0.3, 0.1], [0.7, 0.2, 0.1]])


def test_only_the_last_token_of_a_sequence_moves():
    score, sequence = scores(12, 8), np.repeat([0, 1, 2], 4)
    alone = np.argsort(-score, axis=1)[:, :8]
    made = policy("shift", neighbours=3, mix=1.0, last_token=True)
    ids = made.route(score, RoutingContext(8, sequence_T=sequence)).expert_TK
    moved = (ids != alone).any(1)
    assert moved.tolist() == [False, False, False, True] * 3
    assert (made.route(score, RoutingContext(8)).expert_TK != alone).any(1).tolist() == [False] * 11 + [True]


def test_the_contexts_delta_steps_towards_what_it_takes_now():
    """64 tokens that like expert 0, then 64 that like expert 1: at token 128 the step goes towards 1 and off 0."""
    first, second = np.tile([9.0, 0, 0, 0], (64, 1)), np.tile([0.0, 9, 0, 0], (64, 1))
    made, state = policy("shift", step=0.5, every=128), {}
    for score, moves in ((first, False), (second, True), (second, False)):
        state = dict(made.route(score, RoutingContext(1, state=state)).state)
        if moves:
            np.testing.assert_allclose(state["delta_E"][:2], [-0.5, 0.5], atol=1e-9)
            assert abs(state["delta_E"][2:]).max() < 1e-6
            delta = state["delta_E"]
    np.testing.assert_array_equal(state["delta_E"], delta)
    assert state["seen"].tolist() == [192]
    np.testing.assert_allclose(state["mean_E"].sum(), 1)
    even = made.route(np.zeros((1, 4)), RoutingContext(1, state=state))
    assert even.expert_TK.tolist() == [[1]]


def test_none_is_nowhere_but_behind():
    ids = policy("partition", shared=0).route(np.zeros((2, 4)), RoutingContext(4, class_T=np.array([0, 1]))).expert_TK
    assert ids.shape[1] == 2
    assert NONE not in ids


def test_a_router_that_cannot_serve_the_model_is_the_users_to_mend(tmp_path):
    silent = {"kind": "shift", "silence": [9999]}
    with pytest.raises(BadInput, match="does not exist: 9999, 64 experts"):
        simulate(scenario(tmp_path, policies={"routing": silent}, routing={"pool_tokens": 64}))
