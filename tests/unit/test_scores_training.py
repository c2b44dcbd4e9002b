"""Scores of a training run: evenness follows the schedule, popularity drifts, and balancing acts on them as on a real
router's."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.workload.scores_training import (
    TrainingScores,
    TrainingScoresSpec,
    congestion_load,
    fitted_gamma,
    gamma_eff,
)  # fmt: skip

EXPERTS, TOP_K, TOKENS = 32, 4, 4096


def made(seed=0, **spec):
    return TrainingScores(TrainingScoresSpec(**spec), 2, EXPERTS, TOP_K, seed)


def choose(value_TE):
    return np.argpartition(-value_TE, TOP_K - 1, axis=1)[:, :TOP_K]


def load(value_TE):
    return np.bincount(choose(value_TE).ravel(), minlength=EXPERTS) / (len(value_TE) * TOP_K)


def max_violation(value_TE):
    return load(value_TE).max() * EXPERTS - 1


def softmax(score_TE):
    prob = np.exp(score_TE.astype(np.float64))
    return prob / prob.sum(1, keepdims=True)


def test_gamma_has_the_paper_s_three_phases():
    assert gamma_eff(0.0) == 14
    assert 36 <= gamma_eff(30e3 / 1.2e6) <= 39
    assert 36 <= gamma_eff(40e3 / 1.2e6) <= 39
    assert gamma_eff(400e3 / 1.2e6) == pytest.approx(27)
    assert gamma_eff(1.0) == 9
    run = [gamma_eff(p) for p in np.linspace(0, 1, 101)]
    assert int(np.argmax(run)) in (3, 4)


def test_congestion_load_by_hand():
    # no congestion: the softmax of the qualities
    quality = np.log(np.array([[1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(congestion_load(quality, 0.0), [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-9)
    load_LE = congestion_load(quality, 10.0)
    level = np.log(load_LE) + 10 * load_LE - quality
    np.testing.assert_allclose(level, level[0, 0], atol=1e-8)
    assert load_LE.sum() == pytest.approx(1)
    np.testing.assert_allclose(congestion_load(np.zeros((1, 4)), 30.0), 0.25)
    # small qualities: a softmax of temperature 1 + gamma / E
    small = np.array([[0.02, -0.01, -0.01, 0.0]])
    expected = np.exp(small / (1 + 12 / 4))
    np.testing.assert_allclose(congestion_load(small, 12.0), expected / expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("progress", [0.0, 0.01, 35e3 / 1.2e6, 0.1, 1 / 3, 0.7, 1.0])
def test_the_gamma_of_the_load_follows_the_schedule(progress):
    scores = made(3)
    assert fitted_gamma(scores.load_LE(progress), scores.quality_LE(progress)) == pytest.approx(
        gamma_eff(progress), rel=1e-4
    )


@pytest.mark.parametrize(
    "spec", [{}, {"feature_spread": 0}, {"feature_spread": 1.5, "sequence_share": 0}, {"noise": 2}]
)
@pytest.mark.parametrize("progress", [0.0, 0.03, 0.6])
def test_scores_have_the_load_that_is_said(spec, progress):
    scores = made(1, sequence_tokens=16, **spec)
    rows = np.arange(1 << 14)
    expected = scores.load_LE(progress)[1]
    found = load(scores.scores(rows, 1, progress))
    # within a tenth of a mean load: sampling is 2 %, the sample of tokens that biases are settled on 5 %
    np.testing.assert_allclose(found * EXPERTS, expected * EXPERTS, atol=0.2)
    assert np.corrcoef(found, expected)[0, 1] > 0.98


def test_the_load_of_scores_surges_stays_and_relaxes():
    scores, rows = made(2, drift=0), np.arange(1 << 14)
    violation = [max_violation(scores.scores(rows, 0, p)) for p in (0.0, 0.03, 1 / 3, 1.0)]
    assert violation[1] < violation[0]
    assert violation[1] < violation[2] < violation[3]


def test_popularity_drifts_and_stays_where_there_is_no_drift():
    def similar(drift):
        scores = made(4, drift=drift)
        first, last = scores.quality_LE(0.0), scores.quality_LE(1.0)
        return np.corrcoef(first.ravel(), last.ravel())[0, 1]

    assert similar(0.0) == pytest.approx(1)
    assert abs(similar(0.25)) < 0.35
    assert similar(1.0) == pytest.approx(1)


def test_rows_are_pure_whatever_was_asked_before():
    rows = np.array([5, 1 << 40, 17, 5])
    fresh = made(6).scores(rows, 1, 0.3)
    used = made(6)
    used.scores(np.arange(1000), 1, 0.9)
    used.scores(np.arange(1000), 0, 0.31)
    np.testing.assert_array_equal(used.scores(rows, 1, 0.3), fresh)
    np.testing.assert_array_equal(made(6).scores(rows[::-1], 1, 0.3)[::-1], fresh)
    np.testing.assert_array_equal(made(6).scores(rows[2:3], 1, 0.3), fresh[2:3])
    assert np.isfinite(fresh).all()
    assert fresh.dtype == np.float32
    assert not np.array_equal(made(7).scores(rows, 1, 0.3), fresh)
    assert not np.array_equal(used.scores(rows, 0, 0.3), fresh)


def test_scale_moves_gates_and_not_the_choice():
    rows = np.arange(512)
    one, two = made(0), made(0, scale=2.0)
    np.testing.assert_allclose(two.scores(rows, 0, 0.5), 2 * one.scores(rows, 0, 0.5), rtol=1e-6)
    np.testing.assert_array_equal(choose(one.scores(rows, 0)), choose(two.scores(rows, 0)))


def test_all_experts_and_one_expert_are_allowed():
    for experts, top_k in ((4, 4), (1, 1), (2, 1)):
        scores = TrainingScores(TrainingScoresSpec(), 1, experts, top_k, 0)
        assert scores.scores(np.arange(9), 0, 0.2).shape == (9, experts)
    with pytest.raises(ValueError, match="experts a token"):
        TrainingScores(TrainingScoresSpec(), 1, 4, 5, 0)
    with pytest.raises(IndexError, match="not be negative"):
        made().scores(np.array([-1]), 0)


def test_a_loss_free_bias_converges_over_steps():
    """b += u * sign(mean - count) on sigmoid gates, u = 1e-3 (arXiv:2408.15664, algorithm 1); each step has its own
    tokens."""
    scores, bias_E, violation = made(5), np.zeros(EXPERTS), []
    for step in range(120):
        score_TE = scores.scores(np.arange(TOKENS) + step * TOKENS, 0, step / 4000).astype(np.float64)
        gate_TE = 1 / (1 + np.exp(-score_TE))
        load_E = load(gate_TE + bias_E)
        violation.append(load_E.max() * EXPERTS - 1)
        bias_E += 1e-3 * np.sign(1 / EXPERTS - load_E)
    assert violation[0] > 0.8
    assert np.mean(violation[-20:]) < 0.3
    assert np.mean(violation[20:40]) > np.mean(violation[-20:])


def test_bip_balances_from_the_first_step_on():
    """Four sweeps of the dual (arXiv:2502.15451): p from the rows, q from the columns, then the K highest of s - q."""
    scores = made(5)
    for step in (0, 50):
        gate_TE = softmax(scores.scores(np.arange(TOKENS) + step * TOKENS, 0, step / 4000))
        q_E = np.zeros(EXPERTS)
        room = TOKENS * TOP_K // EXPERTS
        for _ in range(4):
            p_T = np.maximum(0, np.sort(gate_TE - q_E, axis=1)[:, -TOP_K - 1])
            q_E = np.maximum(0, np.sort(gate_TE - p_T[:, None], axis=0)[-room - 1])
        assert max_violation(gate_TE) > 0.8
        assert max_violation(gate_TE - q_E) < 0.15


def test_tokens_keep_preferences_that_no_bias_removes():
    """With a bias that balances, tokens of a sequence still agree on experts more than tokens of different ones."""
    scores = made(8, sequence_tokens=8, sequence_share=0.9, feature_spread=1.5)
    score_TE = scores.scores(np.arange(4096), 0)
    taken = np.zeros((4096, EXPERTS))
    np.put_along_axis(taken, choose(score_TE), 1, 1)
    taken -= taken.mean(0)
    within = (taken[0::8] * taken[1::8]).sum(1).mean()
    between = (taken[0:-8:8] * taken[8::8]).sum(1).mean()
    assert within > 5 * abs(between)
