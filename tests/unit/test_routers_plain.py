"""Routers without a twist against their papers, one token at a time: top-k, groups, random, balanced."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.policy import load_policy
from moesim.routing import RoutingContext
from moesim.routing.capacity import CapacitySpec, capacity_of
from moesim.scenario.presets import presets


def scores(tokens, experts, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (tokens, experts))


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
    score = scores(300, 32)
    gate = 1 / (1 + np.exp(-score)) if scoring == "sigmoid" else np.exp(score) / np.exp(score).sum(1, keepdims=True)
    bias = np.random.default_rng(3).normal(0, 0.2, 32) if scoring == "sigmoid" else np.zeros(32)
    routed = load_policy("routing", "grouped_topk").route(
        score, RoutingContext(6, 8, 4, scoring, norm_topk_prob=False, bias_E=bias)
    )
    np.testing.assert_array_equal(routed.expert_TK, brute_grouped(gate + bias, 6, 8, 4, by))
    np.testing.assert_allclose(routed.gate_TK, np.take_along_axis(gate, routed.expert_TK.astype(int), 1))


def test_topk_then_softmax_is_softmax_over_the_chosen():
    score = scores(100, 8)
    routed = load_policy("routing", {"kind": "topk", "gates": "topk_softmax"}).route(score, RoutingContext(2))
    top = -np.sort(-score, axis=1)[:, :2]
    np.testing.assert_array_equal(routed.expert_TK, np.argsort(-score, axis=1)[:, :2])
    np.testing.assert_allclose(routed.gate_TK, np.exp(top) / np.exp(top).sum(1, keepdims=True))


@pytest.mark.parametrize("kind", ["topk", "grouped_topk"])
def test_gates_are_raw_where_the_model_does_not_normalise(kind):
    raw = load_policy("routing", kind).route(scores(40, 16), RoutingContext(4, norm_topk_prob=False))
    assert (raw.gate_TK.sum(1) < 1).all()
    scaled = load_policy("routing", {"kind": kind, "scaling_factor": 2.5}).route(scores(40, 16), RoutingContext(4))
    np.testing.assert_allclose(scaled.gate_TK.sum(1), 2.5)


@pytest.mark.parametrize("kind", ["topk", "grouped_topk", "growing_topk"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_papers_scoring_stands_before_the_models(kind, scoring):
    """`scoring` on a model that scores otherwise is what a model of that scoring gives."""
    other = {"softmax": "sigmoid", "sigmoid": "softmax"}[scoring]
    score = scores(200, 32)
    for bias in (None, np.random.default_rng(3).normal(0, 0.2, 32)):
        plain = load_policy("routing", kind).route(score, RoutingContext(6, 8, 4, scoring, bias_E=bias))
        asked = load_policy("routing", {"kind": kind, "scoring": scoring})
        told = asked.route(score, RoutingContext(6, 8, 4, other, bias_E=bias))
        np.testing.assert_array_equal(told.expert_TK, plain.expert_TK)
        np.testing.assert_array_equal(told.gate_TK, plain.gate_TK)
        unlike = load_policy("routing", kind).route(score, RoutingContext(6, 8, 4, other, bias_E=bias))
        assert abs(unlike.gate_TK - plain.gate_TK).max() > 0.01


def test_presets_keep_their_papers_gates_on_any_model():
    """By hand, logits ln 3, 0, 0, -ln 3: softmax 9, 3, 3, 1 of 16; sigmoid 3/4, 1/2, 1/2, 1/4."""
    score = np.log([[3.0, 1.0, 1.0, 1 / 3]])
    expected = {
        "mixtral": [3 / 4, 1 / 4], "switch": [9 / 16, 3 / 16], "gshard": [3 / 4, 1 / 4], "qwen_moe": [3 / 4, 1 / 4],
        "olmoe": [9 / 16, 3 / 16], "gpt_oss": [3 / 4, 1 / 4], "openmoe": [9 / 16, 3 / 16],
        "deepseek_v2": [9.0, 3.0], "deepseek_v3": [1.5, 1.0],
    }  # fmt: skip
    for name, gates in expected.items():
        row = presets()[name]
        policy = load_policy("routing", {"kind": row.kind, **row.parameters})
        for scoring in ("softmax", "sigmoid"):
            routed = policy.route(score, RoutingContext(2, scoring=scoring))
            assert routed.expert_TK.tolist() == [[0, 1]]
            np.testing.assert_allclose(routed.gate_TK, [gates], err_msg=name)


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


def test_thor_draws_once_for_a_batch_or_a_sequence():
    score, sequence = np.zeros((12, 32)), np.repeat([7, 2, 9], 4)
    batch = load_policy("routing", {"kind": "random", "per": "batch"})
    first = batch.route(score, RoutingContext(2, seed=3)).expert_TK
    assert (first == first[0]).all()
    assert (batch.route(score, RoutingContext(2, seed=3, step=1)).expert_TK[0] != first[0]).any()
    policy = load_policy("routing", {"kind": "random", "per": "sequence"})
    ids = policy.route(score, RoutingContext(2, seed=3, sequence_T=sequence)).expert_TK
    assert (ids.reshape(3, 4, 2) == ids.reshape(3, 4, 2)[:, :1]).all()
    assert len(np.unique(ids[::4], axis=0)) == 3
    # a sequence keeps its experts in later steps and in other company
    later = policy.route(score[:2], RoutingContext(2, seed=3, step=9, sequence_T=np.array([9, 11]))).expert_TK
    np.testing.assert_array_equal(later[0], ids[8])
    with pytest.raises(ValueError, match="the sequence of every token"):
        policy.route(score, RoutingContext(2))


def test_thor_leaves_the_layers_between_to_the_scores():
    policy = load_policy("routing", {"kind": "random", "every": 2})
    score = scores(200, 16)
    plain = load_policy("routing", "topk").route(score, RoutingContext(3, layer=1))
    np.testing.assert_array_equal(policy.route(score, RoutingContext(3, layer=1)).expert_TK, plain.expert_TK)
    assert (policy.route(score, RoutingContext(3, layer=2)).expert_TK != plain.expert_TK).any()
    assert policy.from_scores
    assert not load_policy("routing", "random").from_scores


def test_gshards_capacity_is_the_papers():
    """2 N / (G E) places in each of G groups of N / G tokens (arXiv:2006.16668): 1,024 tokens, 128 experts: 16."""
    row = presets()["gshard"]
    spec = CapacitySpec.model_validate(row.capacity)
    assert capacity_of(1024, row.model["top_k"], 128, spec.factor, spec.min_capacity) == 16
    assert capacity_of(64, row.model["top_k"], 128, spec.factor, spec.min_capacity) == 4
