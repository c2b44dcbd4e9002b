"""Histograms and assignments: what every kind keeps, and each kind's own law."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moesim_kernels.ops.routing import assign, histogram


@st.composite
def cases(draw):
    slots, tokens = draw(st.integers(1, 40)), draw(st.integers(0, 60))
    kind = draw(st.sampled_from(["uniform", "balanced", "zipf:0.5", "zipf:1.2", "zipf:10", "few", "one"]))
    opened = slots
    if kind == "few":
        opened = draw(st.integers(1, slots))
        kind = f"few:{opened}"
    elif kind == "one":
        opened = 1
    return kind, draw(st.integers(0, opened * tokens)), slots, tokens, draw(st.integers(0, 2**31))


@given(cases())
def test_counts_sum_fit_and_repeat(case):
    kind, rows, slots, tokens, seed = case
    count_E = histogram(kind, rows, slots, tokens, seed)
    assert count_E.dtype == np.int64
    assert count_E.shape == (slots,)
    assert count_E.sum() == rows
    assert count_E.min() >= 0
    assert count_E.max() <= tokens
    np.testing.assert_array_equal(count_E, histogram(kind, rows, slots, tokens, seed))


@given(cases())
def test_assignment_keeps_counts_and_gives_no_token_a_slot_twice(case):
    kind, rows, slots, tokens, seed = case
    count_E = histogram(kind, rows, slots, tokens, seed)
    token_R, expert_R = assign(count_E, tokens, seed)
    np.testing.assert_array_equal(np.bincount(expert_R, minlength=slots), count_E)
    assert (np.diff(expert_R) >= 0).all()
    assert len({*zip(token_R.tolist(), expert_R.tolist(), strict=True)}) == rows
    if rows:
        each_T = np.bincount(token_R, minlength=tokens)
        assert len(each_T) == tokens
        assert each_T.max() - each_T.min() <= 1
    again = assign(count_E, tokens, seed)
    np.testing.assert_array_equal(again[0], token_R)


def test_balanced_is_as_even_as_integers_allow():
    count_E = histogram("balanced", 29, 8, 12, seed=1)
    assert sorted(count_E) == [3, 3, 3, 4, 4, 4, 4, 4]


def test_few_and_one_leave_the_others_empty():
    assert histogram("few:3", 10, 5, 9, seed=0)[3:].tolist() == [0, 0]
    assert histogram("one", 7, 3, 9, seed=0).tolist() == [7, 0, 0]


def test_uniform_has_the_mean_and_variance_of_its_law():
    rows, slots, tokens, draws = 60, 12, 20, 4000
    count_DE = np.array([histogram("uniform", rows, slots, tokens, seed) for seed in range(draws)])
    p = 1 / slots
    cells = slots * tokens
    variance = rows * p * (1 - p) * (cells - rows) / (cells - 1)  # multivariate hypergeometric, one margin
    standard_error = np.sqrt(variance / draws)
    assert np.abs(count_DE.mean(axis=0) - rows * p).max() < 5 * standard_error
    assert count_DE.var(axis=0).mean() == pytest.approx(variance, rel=0.05)


def test_zipf_counts_follow_their_ranks():
    """With room enough, the sorted mean counts are the Zipf weights; ranks move between seeds."""
    slots, rows, draws = 6, 600, 300
    count_DE = np.array([histogram("zipf:1.2", rows, slots, 10_000, seed) for seed in range(draws)])
    weight = np.arange(1, slots + 1) ** -1.2
    np.testing.assert_allclose(-np.sort(-count_DE, axis=1).mean(axis=0), rows * weight / weight.sum(), rtol=0.05)
    assert len(set(count_DE.argmax(axis=1).tolist())) == slots


def test_one_token_takes_distinct_slots():
    assert sorted(histogram("zipf:10", 3, 5, 1, seed=3)) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("uniform", 9, 2, 4, 0), "a token goes to a slot once"),
        (("one", 5, 8, 4, 0), "slots=1"),
        (("uniform", -1, 2, 4, 0), "rows >= 0"),
        (("uniform", 0, 0, 4, 0), "slots >= 1"),
        (("balanced", 1, 100_000, 100_000, 0), "tokens x slots <"),
        (("zipf", 1, 2, 4, 0), "no histogram 'zipf'"),
        (("zipf:0", 1, 2, 4, 0), "no histogram"),
        (("zipf:nan", 1, 2, 4, 0), "no histogram"),
        (("few:9", 1, 2, 4, 0), "no histogram"),
        (("few:x", 1, 2, 4, 0), "no histogram"),
        (("uniform:2", 1, 2, 4, 0), "no histogram"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        histogram(*arguments)


def test_more_rows_than_tokens_in_a_slot_cannot_be_assigned():
    with pytest.raises(ValueError, match=r"takes 0\.\.2 rows"):
        assign(np.array([3]), tokens=2, seed=0)
