"""Every routing policy keeps the family's promises. A file added to moesim/routing/ is found here by itself."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.policy import load_policy, policy_kinds
from moesim.routing import RoutingContext
from moesim.workload.synthetic import Groups

KINDS = policy_kinds("routing")
SHAPES = [(0, 8, 2), (1, 8, 2), (33, 8, 8), (200, 64, 6), (50, 256, 8), (17, 12, 1)]


def context(top_k, experts, **more):
    groups = {"num_groups": 4, "top_groups": 3} if experts % 4 == 0 and top_k <= experts * 3 // 4 else {}
    return RoutingContext(top_k, **{**groups, "seed": 5, **more})


def scores(tokens, experts, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0, 2, (tokens, experts)).astype(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_ids_and_gates(kind, shape, scoring, dtype):
    tokens, experts, top_k = shape
    policy, score = load_policy("routing", kind), scores(tokens, experts, dtype=dtype)
    before = score.copy()
    routed = policy.route(score, context(top_k, experts, scoring=scoring))
    np.testing.assert_array_equal(score, before)
    assert routed.expert_TK.shape == routed.gate_TK.shape == (tokens, top_k)
    assert routed.expert_TK.dtype == np.int32
    assert routed.gate_TK.dtype == dtype
    assert ((routed.expert_TK >= 0) & (routed.expert_TK < experts)).all()
    ids = np.sort(routed.expert_TK, axis=1)
    assert (ids[:, 1:] > ids[:, :-1]).all(), "no expert twice in a token"
    assert np.isfinite(routed.gate_TK).all()
    assert (routed.gate_TK >= 0).all()
    np.testing.assert_allclose(routed.gate_TK.sum(1), 1, rtol=1e-5)
    again = load_policy("routing", kind).route(score, context(top_k, experts, scoring=scoring))
    np.testing.assert_array_equal(routed.expert_TK, again.expert_TK)
    np.testing.assert_array_equal(routed.gate_TK, again.gate_TK)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_and_huge_scores(kind):
    policy = load_policy("routing", kind)
    for score in (
        np.zeros((9, 16), np.float32),
        np.full((9, 16), 1e30, np.float32),
        np.full((9, 16), -1e30, np.float32),
    ):
        routed = policy.route(score, context(4, 16))
        ids = np.sort(routed.expert_TK, axis=1)
        assert (ids[:, 1:] > ids[:, :-1]).all()
        np.testing.assert_allclose(routed.gate_TK.sum(1), 1, rtol=1e-5)
        if not policy.replaces_ids:
            assert (routed.expert_TK == np.arange(4)).all(), "of equal scores the lowest ids"


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_experts_asked_for(kind):
    with pytest.raises(ValueError, match="expert"):
        load_policy("routing", kind).route(scores(3, 8), RoutingContext(9))


@pytest.mark.parametrize("kind", [k for k in KINDS if not load_policy("routing", k).replaces_ids])
def test_gates_are_raw_where_the_model_does_not_normalise(kind):
    policy = load_policy("routing", kind)
    routed = policy.route(scores(40, 16), context(4, 16, norm_topk_prob=False))
    assert (routed.gate_TK.sum(1) < 1).all()
    scaled = load_policy("routing", {"kind": kind, "scaling_factor": 2.5}).route(scores(40, 16), context(4, 16))
    np.testing.assert_allclose(scaled.gate_TK.sum(1), 2.5, rtol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if not load_policy("routing", k).replaces_ids])
def test_relabelling_experts_relabels_the_choice(kind):
    policy, score = load_policy("routing", kind), scores(60, 16, dtype=np.float64)
    swap = np.concatenate([np.random.default_rng(g).permutation(4) + 4 * g for g in (2, 0, 3, 1)])
    plain = policy.route(score, context(4, 16)).expert_TK
    moved = policy.route(score[:, swap], context(4, 16)).expert_TK
    np.testing.assert_array_equal(swap[moved], plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 500])
def test_drawn_pools(kind, tokens):
    policy = load_policy("routing", kind)
    weight = np.random.default_rng(1).random((3, 16)) + 0.1
    groups = policy.groups(4, 3)
    ids = policy.draw(weight, tokens, 4, groups, 7)
    assert ids.shape == (tokens, 3, 4)
    assert ids.dtype == np.uint8
    assert ids.max() < 16
    ordered = np.sort(ids, axis=2)
    assert (ordered[:, :, 1:] > ordered[:, :, :-1]).all()
    np.testing.assert_array_equal(ids, policy.draw(weight, tokens, 4, groups, 7))
    if policy.ideal:
        count = np.bincount(ids[:, 0].ravel(), minlength=16)
        assert count.max() - count.min() <= 1


def brute_grouped(score, top_k, groups, kept, by):
    """One token at a time, as the papers put it."""
    out = []
    for row in score:
        size = len(row) // groups
        parts = [sorted(row[g * size : (g + 1) * size]) for g in range(groups)]
        worth = [part[-1] if by == "max" else sum(part[-2:]) for part in parts]
        best = sorted(range(groups), key=lambda g: (-worth[g], g))[:kept]
        allowed = [e for e in range(len(row)) if e // size in best]
        out.append(sorted(allowed, key=lambda e: (-row[e], e))[:top_k])
    return np.array(out)


@pytest.mark.parametrize(("scoring", "by"), [("softmax", "max"), ("sigmoid", "top2")])
def test_grouped_topk_is_what_the_papers_say(scoring, by):
    score = scores(300, 32, dtype=np.float64)
    gate = 1 / (1 + np.exp(-score)) if scoring == "sigmoid" else np.exp(score) / np.exp(score).sum(1, keepdims=True)
    bias = np.random.default_rng(3).normal(0, 0.2, 32) if scoring == "sigmoid" else np.zeros(32)
    routed = load_policy("routing", "grouped_topk").route(
        score, RoutingContext(6, 8, 4, scoring, norm_topk_prob=False, bias_E=bias)
    )
    np.testing.assert_array_equal(routed.expert_TK, brute_grouped(gate + bias, 6, 8, 4, by))
    np.testing.assert_allclose(routed.gate_TK, np.take_along_axis(gate, routed.expert_TK.astype(int), 1))


def test_topk_then_softmax_is_softmax_over_the_chosen():
    score = scores(100, 8, dtype=np.float64)
    routed = load_policy("routing", {"kind": "topk", "gates": "topk_softmax"}).route(score, RoutingContext(2))
    top = -np.sort(-score, axis=1)[:, :2]
    np.testing.assert_array_equal(routed.expert_TK, np.argsort(-score, axis=1)[:, :2])
    np.testing.assert_allclose(routed.gate_TK, np.exp(top) / np.exp(top).sum(1, keepdims=True))


def test_random_is_uniform_and_keyed_by_step_and_layer():
    policy = load_policy("routing", "random")
    routed = policy.route(np.zeros((20_000, 16)), RoutingContext(4, seed=1))
    count = np.bincount(routed.expert_TK.ravel(), minlength=16)
    assert ((count - 5000) ** 2 / 5000).sum() < 37.7  # chi-squared, 15 degrees: 0.1 %
    for other in (RoutingContext(4, seed=2), RoutingContext(4, seed=1, step=1), RoutingContext(4, seed=1, layer=1)):
        assert (policy.route(np.zeros((50, 16)), other).expert_TK != routed.expert_TK[:50]).any()


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(64, 16, 4), (7, 16, 4), (100, 64, 6)])
def test_balanced_is_even(tokens, experts, top_k):
    routed = load_policy("routing", "balanced").route(scores(tokens, experts), RoutingContext(top_k, seed=1))
    count = np.bincount(routed.expert_TK.ravel(), minlength=experts)
    assert count.max() - count.min() == (0 if tokens * top_k % experts == 0 else 1)


def test_experts_ruled_out_are_not_taken():
    score = scores(30, 8)
    score[:, [1, 4, 6]] = -np.inf
    for kind in ("topk", "grouped_topk", "random"):
        ids = load_policy("routing", kind).route(score, RoutingContext(4)).expert_TK
        assert not np.isin(ids, [1, 4, 6]).any()
        with pytest.raises(ValueError, match="-inf"):
            load_policy("routing", kind).route(score, RoutingContext(6))


def test_only_grouped_topk_has_groups():
    assert {k: load_policy("routing", k).groups(8, 4) for k in KINDS if k != "grouped_topk"} == {
        k: Groups() for k in KINDS if k != "grouped_topk"
    }
    assert load_policy("routing", "grouped_topk").groups(8, 4) == Groups(8, 4)
