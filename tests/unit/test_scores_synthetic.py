"""The generator of scores that is fitted to a trace: it finds what a known model was made of, and is pure."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.workload import routing_stats as stats
from moesim.workload.pool import RoutingSource
from moesim.workload.scores import RecordedScores, ScoreSpec
from moesim.workload.scores_synthetic import SyntheticScores, SyntheticScoresSpec, fit

LAYERS, EXPERTS, TOP_K, KINDS = 3, 16, 3, 4


def known(repeat=0.0, stay=0.6):
    rng = np.random.default_rng(0)
    share = np.array([0.4, 0.3, 0.2, 0.1])
    return SyntheticScoresSpec(
        (rng.normal(0, 1, (LAYERS, EXPERTS)) + 2 * rng.normal(0, 1, (KINDS, LAYERS, EXPERTS)) - 2).astype(np.float32),
        np.array([0.3, 0.6, 1.2]),
        np.array([0.6, 1.0, 0.8]),
        share,
        stay * np.eye(KINDS) + (1 - stay) * share,
        repeat,
        TOP_K,
        60,
        "known",
    )


@pytest.fixture(scope="module")
def fitted():
    trace = SyntheticScores(known(), 6000, 1).pool()
    return trace, fit(trace, kinds=KINDS)


def test_the_pool_s_ids_are_the_highest_scores_and_its_weights_their_softmax():
    model = SyntheticScores(known(), 500, 1)
    pool = model.pool()
    assert pool.sequence_start[-2:].tolist() == [480, 500]
    score_TE = model.scores(np.arange(500), 2)
    order = np.argsort(-score_TE, axis=1)[:, :TOP_K]
    np.testing.assert_array_equal(pool.expert_TLK[:, 2], order)
    prob = np.exp(score_TE) / np.exp(score_TE).sum(1, keepdims=True)
    np.testing.assert_allclose(pool.weight_TLK[:, 2], np.take_along_axis(prob, order, 1), rtol=2e-3)
    # so that a trace made of it gives its own scores back where they are recorded
    again = RecordedScores(pool, ScoreSpec(), 0, norm_topk_prob=False).scores(np.arange(500), 2)
    kept = np.take_along_axis(score_TE, order, 1)
    np.testing.assert_allclose(
        np.take_along_axis(again, order, 1) - again.max(1, keepdims=True), kept - kept[:, :1], atol=4e-3
    )


def test_the_fit_finds_popularity_kinds_chain_and_temperature(fitted):
    trace, spec = fitted
    made = SyntheticScores(spec, 6000, 9).pool()
    np.testing.assert_allclose(stats.popularity(made), stats.popularity(trace), atol=0.012)
    np.testing.assert_allclose(spec.temperature_L, [0.3, 0.6, 1.2], rtol=0.15)
    np.testing.assert_allclose(np.sort(spec.share_C), [0.1, 0.2, 0.3, 0.4], atol=0.05)
    # stays with chance 0.6 + 0.4 * share
    biggest = spec.share_C.argmax()
    assert spec.next_CC[biggest, biggest] == pytest.approx(0.6 + 0.4 * 0.4, abs=0.06)


def test_what_the_fit_looked_at_and_what_it_must_foretell(fitted):
    trace, spec = fitted
    made = SyntheticScores(spec, 6000, 9).pool()
    assert stats.coactivation(made).mean() == pytest.approx(stats.coactivation(trace).mean(), rel=0.1)
    assert stats.affinity(made).mean() == pytest.approx(stats.affinity(trace).mean(), rel=0.15)
    for layer in range(LAYERS):
        mass = [float(p.weight_TLK[:, layer].astype(np.float32).sum(1).mean()) for p in (made, trace)]
        assert mass[0] == pytest.approx(mass[1], rel=0.1)


def test_repeated_tokens_have_the_scores_of_the_one_before_within_their_sequence():
    model = SyntheticScores(known(repeat=1.0), 300, 2)
    score_TE = model.scores(np.arange(300), 0)
    np.testing.assert_array_equal(score_TE[:60], np.tile(score_TE[0], (60, 1)))
    assert not np.array_equal(score_TE[60], score_TE[59])


def test_rows_are_pure():
    rows = np.array([299, 3, 299, 0])
    whole = SyntheticScores(known(0.3), 300, 2).scores(np.arange(300), 1)
    np.testing.assert_array_equal(SyntheticScores(known(0.3), 300, 2).scores(rows, 1), whole[rows])
    assert np.isfinite(whole).all()
    assert not np.array_equal(SyntheticScores(known(0.3), 300, 3).scores(rows, 1), whole[rows])
    for bad_rows, layer in (([300], 0), ([-1], 0), ([0], LAYERS)):
        with pytest.raises(IndexError, match="rows must lie in"):
            SyntheticScores(known(), 300, 2).scores(np.array(bad_rows), layer)


def test_traces_that_cannot_be_fitted_are_refused():
    trace = SyntheticScores(known(), 100, 1).pool()
    with pytest.raises(ValueError, match="no gate weights"):
        fit(trace.with_ids(trace.expert_TLK, "bare"))
    same = np.tile(trace.expert_TLK[:1], (100, 1, 1))
    weight = np.tile(trace.weight_TLK[:1], (100, 1, 1))
    one = RoutingSource(same, np.array([0, 50, 100]), EXPERTS, TOP_K, True, "same", weight_TLK=weight)
    with pytest.raises(ValueError, match="past the common prefix"):
        fit(one)
