"""Scores for the tokens of a pool: what is recorded comes back exactly, what is drawn lies below it, rows are pure."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.workload.pool import RoutingSource
from moesim.workload.scores import DrawnScores, RecordedScores, ScoreModel, ScoreSpec, score_model
from moesim.workload.scores_tail import (
    GumbelTail,
    SpacedTail,
    choice_fade,
    choice_scale,
    cut_time,
    faded,
    fit_spacing,
    hill,
    tail_scale,
    uniform,
)  # fmt: skip
from moesim.workload.synthetic import SyntheticSpec, generate

Kind = Literal["gumbel", "spaced"]
TAILS: tuple[Kind, ...] = ("gumbel", "spaced")


def traced(tokens=300, layers=2, experts=16, top_k=4, seed=0, normalised=False, sigmoid=False):
    """A pool as a trace holds it, ids in no order, and the logits it was taken from."""
    rng = np.random.default_rng(seed)
    logit = rng.gumbel(size=(tokens, layers, experts)) * 0.7 + rng.normal(size=(layers, experts))
    gate = 1 / (1 + np.exp(-logit)) if sigmoid else np.exp(logit) / np.exp(logit).sum(-1, keepdims=True)
    ids = np.sort(np.argsort(-logit, axis=-1)[..., :top_k], axis=-1)
    weight = np.take_along_axis(gate, ids, -1)
    if normalised:
        weight /= weight.sum(-1, keepdims=True)
    start = np.array([0, tokens // 2, tokens])
    source = RoutingSource(
        ids.astype(np.uint8), start, experts, top_k, True, "test", weight_TLK=weight.astype(np.float16)
    )  # fmt: skip
    return source, logit


def top(score_NE, top_k):
    return np.argsort(-score_NE, axis=1, kind="stable")[:, :top_k]


def gate_order(source, layer):
    """Recorded ids by weight, the lowest id first among equals."""
    assert source.weight_TLK is not None
    order = np.lexsort((source.expert_TLK[:, layer], -source.weight_TLK[:, layer]), axis=-1)
    return np.take_along_axis(source.expert_TLK[:, layer], order, 1)


@pytest.mark.parametrize("model", TAILS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_top_k_are_the_recorded_ids_in_gate_order_and_the_others_lie_strictly_below(model, normalised, scoring):
    source, _ = traced(normalised=normalised, sigmoid=scoring == "sigmoid")
    scores = score_model(source, ScoreSpec(model=model), 3, normalised, scoring)
    rows = np.arange(source.num_tokens)
    for layer in range(2):
        score_NE = scores.scores(rows, layer)
        assert score_NE.dtype == np.float32
        assert score_NE.shape == (300, 16)
        assert np.isfinite(score_NE).all()
        np.testing.assert_array_equal(top(score_NE, 4), gate_order(source, layer))
        ordered = -np.sort(-score_NE, axis=1)
        assert (ordered[:, 4] < ordered[:, 3]).all()


@pytest.mark.parametrize("model", TAILS)
def test_softmax_gives_recorded_probabilities_back_because_the_tail_carries_the_rest(model):
    source, _ = traced()
    scores = score_model(source, ScoreSpec(model=model), 3, norm_topk_prob=False)
    score_NE = scores.scores(np.arange(source.num_tokens), 1).astype(np.float64)
    assert "share of the probability" not in scores.assumed
    # the sum of all is 1, not only up to a constant
    np.testing.assert_allclose(np.exp(score_NE).sum(1), 1, rtol=2e-4)
    found = np.take_along_axis(np.exp(score_NE), source.expert_TLK[:, 1].astype(np.int64), 1)
    np.testing.assert_allclose(found, source.weight_TLK[:, 1].astype(np.float64), rtol=1e-5)


def test_normalised_weights_keep_their_ratios_and_say_what_is_assumed():
    source, _ = traced(normalised=True)
    scores = score_model(source, ScoreSpec(), 0, norm_topk_prob=True)
    assert "share of the probability" in scores.assumed
    found = np.take_along_axis(
        scores.scores(np.arange(300), 0).astype(np.float64), source.expert_TLK[:, 0].astype(np.int64), 1
    )
    gate = np.exp(found) / np.exp(found).sum(1, keepdims=True)
    np.testing.assert_allclose(gate, source.weight_TLK[:, 0].astype(np.float64), rtol=2e-3)


def test_sigmoid_weights_come_back_exactly_and_normalised_ones_by_ratio():
    source, _ = traced(sigmoid=True)
    score_NE = score_model(source, ScoreSpec(), 0, False, "sigmoid").scores(np.arange(300), 0).astype(np.float64)
    ids = source.expert_TLK[:, 0].astype(np.int64)
    found = 1 / (1 + np.exp(-np.take_along_axis(score_NE, ids, 1)))
    np.testing.assert_allclose(found, source.weight_TLK[:, 0].astype(np.float64), rtol=1e-5)
    source, _ = traced(sigmoid=True, normalised=True)
    scores = score_model(source, ScoreSpec(), 0, True, "sigmoid")
    gate = 1 / (1 + np.exp(-np.take_along_axis(scores.scores(np.arange(300), 0).astype(np.float64), ids, 1)))
    np.testing.assert_allclose(gate / gate.sum(1, keepdims=True), source.weight_TLK[:, 0], rtol=2e-3)
    assert "level" in scores.assumed


@pytest.mark.parametrize("model", TAILS)
@pytest.mark.parametrize("weights", [True, False])
def test_a_row_gives_the_same_scores_in_any_batch_order_and_state_of_the_cache(model, weights):
    source, _ = traced(experts=19, top_k=3)
    if not weights:
        source = source.with_ids(source.expert_TLK, "ids alone")

    def fresh(seed=5) -> ScoreModel:
        return score_model(source, ScoreSpec(model=model), seed, False)

    whole = fresh().scores(np.arange(300), 1)
    rows = np.array([7, 299, 7, 0, 123])
    few = fresh()
    for _ in range(2):
        np.testing.assert_array_equal(few.scores(rows, 1), whole[rows])
    for row in (7, 299):
        np.testing.assert_array_equal(fresh().scores(np.array([row]), 1), whole[[row]])
    few.scores(np.arange(300), 0)
    few.scores(np.arange(300), 1)
    np.testing.assert_array_equal(few.scores(rows, 1), whole[rows])
    assert not np.array_equal(fresh(6).scores(rows, 1), whole[rows])
    assert not np.array_equal(fresh().scores(rows, 0), whole[rows])
    assert fresh().scores(np.zeros(0, np.int64), 1).shape == (0, 19)


@pytest.mark.parametrize("model", TAILS)
def test_extreme_weights_stay_finite_and_in_order(model):
    ids = np.tile(np.array([[[5, 2, 9]]], np.uint8), (6, 1, 1))
    weight = np.array(
        [[1.0, 0, 0], [0.5, 0.5, 0], [0.4, 0.3, 0.3], [0.9995, 1e-4, 1e-7], [0.334, 0.333, 0.333], [0.08, 0.08, 0.07]]
    )[:, None].astype(np.float16)
    source = RoutingSource(ids, np.array([0, 6]), 12, 3, True, "test", weight_TLK=weight)
    scores = RecordedScores(source, ScoreSpec(model=model), 0, norm_topk_prob=False)
    assert scores.whole
    score_NE = scores.scores(np.arange(6), 0)
    assert np.isfinite(score_NE).all()
    np.testing.assert_array_equal(top(score_NE, 3), gate_order(source, 0))
    prob = np.exp(score_NE.astype(np.float64))
    # 0.23 stand above; nine experts below 0.07 carry at most 0.63: as much as they can
    assert prob[5].sum() == pytest.approx(0.23 + 0.99 * 9 * 0.07, rel=1e-3)
    np.testing.assert_allclose(prob[2:5].sum(1), 1, atol=2e-3)


@pytest.mark.parametrize("model", TAILS)
def test_ids_alone_get_drawn_scores_whose_top_k_is_the_recorded_set(model):
    weight_LE = np.array([np.linspace(1, 4, 24), np.ones(24)])
    source = generate(SyntheticSpec(pool_tokens=4000, repeat=0.0), weight_LE, 4, 1)
    scores = score_model(source, ScoreSpec(model=model), 0, norm_topk_prob=True)
    assert isinstance(scores, DrawnScores)
    assert "drawn" in scores.assumed
    score_NE = scores.scores(np.arange(4000), 0)
    assert np.isfinite(score_NE).all()
    found = top(score_NE, 4)
    np.testing.assert_array_equal(np.sort(found, 1), np.sort(source.expert_TLK[:, 0], 1))
    # the order is drawn: a place in the pool's row says nothing (slots of a synthetic pool hold fixed strata)
    first = (source.expert_TLK[:, 0, 0] == found[:, 0]).mean()
    assert 0.15 < first < 0.4
    # popular experts stand higher also where they were not taken
    rank = np.argsort(np.argsort(-score_NE, axis=1), axis=1)
    below = [rank[(rank >= 4)[:, e], e].mean() for e in (0, 23)]
    if model == "gumbel":
        assert below[0] - below[1] > 2
    else:
        assert abs(below[0] - below[1]) < 1


def test_all_experts_taken_needs_no_tail():
    source, logit = traced(experts=4, top_k=4)
    score_NE = score_model(source, ScoreSpec(), 0, False).scores(np.arange(300), 0)
    np.testing.assert_array_equal(np.argmax(score_NE, 1), np.argmax(logit[:, 0], 1))
    drawn = score_model(source.with_ids(source.expert_TLK, "ids"), ScoreSpec(), 0, False)
    assert np.isfinite(drawn.scores(np.arange(300), 0)).all()


def test_given_temperature_and_popularity_override_the_fit():
    source, _ = traced(normalised=True)
    rows = np.arange(300)

    def spread(spec):
        score_NE = -np.sort(-score_model(source, spec, 0, True).scores(rows, 0), axis=1)
        return float((score_NE[:, 3] - score_NE[:, -1]).mean())

    assert spread(ScoreSpec(temperature=2)) == pytest.approx(2 * spread(ScoreSpec(temperature=1)), rel=1e-4)
    flat = score_model(source, ScoreSpec(popularity=0), 0, True).scores(rows, 0)
    tail = np.array([flat[~(source.expert_TLK[:, 0] == e).any(1), e].mean() for e in range(16)])
    fitted = score_model(source, ScoreSpec(), 0, True).scores(rows, 0)
    by_fit = np.array([fitted[~(source.expert_TLK[:, 0] == e).any(1), e].mean() for e in range(16)])
    assert np.ptp(tail) < 0.5 * np.ptp(by_fit)


def test_bad_rows_layers_and_pools_are_refused():
    source, _ = traced()
    scores = score_model(source, ScoreSpec(), 0, False)
    for rows, layer in (([300], 0), ([-1], 0), ([0], 2), ([0], -1)):
        with pytest.raises(IndexError, match="rows must lie in"):
            scores.scores(np.array(rows), layer)
    none = RoutingSource(np.zeros((3, 0, 4), np.uint8), np.array([0, 3]), 16, 4, True, "empty")
    with pytest.raises(BadInput, match="at least one layer"):
        score_model(none, ScoreSpec(), 0, False)


# -------------------------------------------------------------------------------------------------- the tail's parts


def test_noise_is_uniform_and_keyed():
    noise = uniform(np.uint64(12345), np.arange(20000), 7)
    assert noise.min() > 0
    assert noise.max() < 1
    assert np.abs(noise.mean(0) - 0.5).max() < 0.01
    assert np.abs(noise.var(0) - 1 / 12).max() < 0.002
    assert np.abs(np.corrcoef(noise.T) - np.eye(7)).max() < 0.03
    np.testing.assert_array_equal(uniform(np.uint64(12345), np.array([19]), 7)[0], noise[19])


def test_choice_scale_finds_plackett_luce_weights():
    rng = np.random.default_rng(0)
    v_E = np.exp(rng.normal(0, 1, 10))
    v_E /= v_E.mean()
    ranked = np.argsort(rng.exponential(1, (8000, 10)) / v_E, axis=1)[:, :4]
    np.testing.assert_allclose(choice_scale(ranked, 10), v_E, rtol=0.1)
    np.testing.assert_allclose(choice_scale(ranked, 10, first=2), v_E, rtol=0.15)


def test_popularity_fades_below_the_k_th_as_it_does_from_rank_to_rank():
    rng = np.random.default_rng(0)
    v_E = np.exp(rng.normal(0, 1, 20))
    plain = np.argsort(rng.exponential(1, (6000, 20)) / v_E, axis=1)[:, :4]
    np.testing.assert_allclose(choice_fade(plain, v_E), 1, atol=0.1)
    # tokens that want experts of their own beside the popular ones: each has a taste that lasts over its ranks
    taste = np.exp(rng.normal(0, 1.5, (6000, 20)))
    mixed = np.argsort(rng.exponential(1, (6000, 20)) / (v_E * taste), axis=1)
    fade = choice_fade(mixed[:, :4], choice_scale(mixed[:, :4], 20))
    assert (np.diff(fade) < 0).all()
    for ranked, low, high in ((plain[:, :4], 0.85, 1.0), (mixed[:, :4], 0.3, 0.9)):
        scale_E, cut = tail_scale(ranked, 20)
        slope = np.polyfit(np.log(choice_scale(ranked, 20)), np.log(scale_E), 1)[0]
        assert low < slope <= high + 1e-9
        assert cut_time(choice_scale(ranked, 20), 4) == cut
    # the next rank is foretold better with it than without
    scale_E, _ = tail_scale(mixed[:, :4], 20)
    found = np.bincount(mixed[:, 4], minlength=20) / 6000

    def foretold(v_E):
        left = np.ones((6000, 20)) * v_E
        np.put_along_axis(left, mixed[:, :4], 0.0, 1)
        return (left / left.sum(1, keepdims=True)).mean(0)

    apart = [np.abs(foretold(v) - found).sum() for v in (scale_E, choice_scale(mixed[:, :4], 20))]
    assert apart[0] < 0.7 * apart[1]


def test_fading_keeps_the_rate_just_after_the_cut():
    scale_E = np.array([0.1, 1.0, 3.0])
    left_E = np.exp(-0.5 * scale_E)
    out_E = faded(scale_E, 0.5, 0.5)
    assert (out_E * left_E).sum() == pytest.approx((scale_E * left_E).sum())
    assert out_E[2] / out_E[0] == pytest.approx(np.sqrt(30))


def test_cut_time_of_equal_experts_is_known():
    # 1 - exp(-t) = K / E
    assert cut_time(np.ones(8), 2) == pytest.approx(-np.log(0.75))
    assert cut_time(np.ones(8), 8) == np.inf


def test_hill_and_spacing_of_exponential_order_statistics():
    rng = np.random.default_rng(1)
    x = -np.sort(-rng.exponential(0.5, (40000, 2000 // 100 * 2)), axis=1)[:, :6]
    assert hill(x).mean() == pytest.approx(0.5, rel=0.02)
    scale, power = fit_spacing(x)  # gaps 0.5 / j
    assert scale == pytest.approx(0.5, rel=0.03)
    assert power == pytest.approx(1, abs=0.03)


def test_the_gumbel_tail_is_plackett_luce_given_the_taken():
    """The highest of the tail is expert e with chance v_e over those left; its depth is a gap between arrivals."""
    v_E = np.array([1.0, 2.0, 3.0, 4.0])
    tail = GumbelTail(v_E, 0.5, 1.0)
    noise = uniform(np.uint64(1), np.arange(40000), 4)
    taken = np.full((40000, 1), 3)
    depth = tail.depths(noise, taken, None)
    first = np.argmin(np.where(np.arange(4) == 3, np.inf, depth), axis=1)
    np.testing.assert_allclose(np.bincount(first, minlength=4)[:3] / 40000, v_E[:3] / 6, atol=0.01)
    # depth < 0.5 log 2 means an arrival before twice the cut: 1 - exp(-6)
    assert (depth[:, :3].min(1) < 0.5 * np.log(2)).mean() == pytest.approx(1 - np.exp(-6), abs=0.003)


@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
def test_the_spaced_tail_goes_on_with_the_recorded_spacing(power):
    """Sorted depths of many experts follow the sum of gaps 0.3 * j**-power."""
    experts, top_k = 2004, 4
    noise = uniform(np.uint64(9), np.arange(50), experts)
    depth = SpacedTail(0.3, power, top_k).depths(noise, np.tile(np.arange(top_k), (50, 1)), None)[:, top_k:]
    curve = np.sort(depth, axis=1).mean(0)
    expected = np.cumsum(0.3 * np.arange(top_k, experts, dtype=float) ** -power)
    np.testing.assert_allclose(curve[[50, 200, 1000, 1900]], expected[[50, 200, 1000, 1900]], rtol=0.1)
