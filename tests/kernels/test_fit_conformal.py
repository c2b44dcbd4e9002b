"""Conformal half widths: the order statistic by brute force, the promised coverage on drawn data, exact intervals."""

from __future__ import annotations

import numpy as np
import pytest
from moesim_kernels.fit.conformal import clopper_pearson, clustered, coverage, interval, log_error, pools
from scipy.stats import binomtest


def test_the_rank_is_the_smallest_that_keeps_the_promise() -> None:
    # Of n + 1 exchangeable errors the new one is equally likely to have any rank: the r-th smallest of the others
    # bounds it in r of n + 1 cases. Count them all.
    rng = np.random.default_rng(0)
    for n in (9, 10, 18, 19, 29, 99):
        values = rng.permutation(n + 1) / 100
        held = [interval(np.delete(values, i)).half_width >= values[i] for i in range(n + 1)]
        assert sum(held) >= 0.9 * (n + 1)
        if n > 9:  # one rank lower would not do
            lower = [np.sort(np.delete(values, i))[int(np.ceil(0.9 * (n + 1))) - 2] >= values[i] for i in range(n + 1)]
            assert sum(lower) < 0.9 * (n + 1)


def test_too_few_or_chosen_points_are_called_empirical() -> None:
    error = np.linspace(0.01, 0.08, 8)
    assert interval(error).method == "empirical"
    assert interval(error).half_width == pytest.approx(0.08)
    nine = interval(np.append(error, 0.3))
    assert (nine.method, nine.half_width, nine.n, nine.level) == ("split-conformal", pytest.approx(0.3), 9, 0.9)
    assert interval(np.linspace(0.01, 0.5, 50), exchangeable=False).method == "empirical"
    assert interval([0.1] * 3, level=0.5).method == "split-conformal"


@pytest.mark.parametrize("heavy", [False, True])
def test_coverage_of_drawn_data_lies_in_its_binomial_limits(heavy: bool) -> None:
    rng = np.random.default_rng(7)
    trials, held = 4000, 0
    for _ in range(trials):
        error = np.abs(rng.standard_t(1.5, 20) if heavy else rng.normal(0, 1, 20))
        held += bool(np.clip(error[-1], 0, 9) <= interval(np.clip(error[:-1], 0, 9)).half_width)
    # 19 held-out points: exactly 18/20
    assert binomtest(held, trials, 0.9).pvalue > 1e-3


def test_clopper_pearson_against_scipy_and_known_values() -> None:
    for inside, points in [(0, 10), (10, 10), (1, 7), (45, 50), (9, 10), (180, 200)]:
        for level in (0.9, 0.95):
            exact = binomtest(inside, points).proportion_ci(level, method="exact")
            assert clopper_pearson(inside, points, level) == pytest.approx((exact.low, exact.high), abs=1e-9)
    # the rule of three, exactly: none of ten
    assert clopper_pearson(0, 10)[1] == pytest.approx(1 - 0.025 ** (1 / 10))
    for wrong in [(-1, 5), (6, 5), (0, 0)]:
        with pytest.raises(ValueError, match="inside"):
            clopper_pearson(*wrong)


def test_pools_keep_grades_apart() -> None:
    error = np.concatenate([np.full(10, 0.05), np.full(12, 0.4)])
    found = pools(error, np.repeat(np.array([1, 2], np.uint8), [10, 12]))
    assert {name: (v.half_width, v.n) for name, v in found.items()} == {
        "interpolated": (pytest.approx(0.05, abs=1e-5), 10),
        "extrapolated": (pytest.approx(0.4, abs=1e-5), 12),
    }


def test_coverage_counts_and_clusters_are_drawn_whole() -> None:
    found = coverage(log_error([1.0, 2.0, 4.0, 1.1], [1.0, 1.0, 1.0, 1.0]), 0.7)
    assert (found.inside, found.points, found.share) == (3, 4, 0.75)
    assert found.low < 0.75 < found.high
    # twenty clusters that stand or fall whole: as wide as twenty trials, not as two thousand
    inside = {i: np.full(100, i >= 4) for i in range(20)}
    share, low, high = clustered(inside, np.random.default_rng(1))
    assert share == 0.8
    assert low < 0.65
    assert high > 0.92


@pytest.mark.parametrize(("error", "level"), [([], 0.9), ([float("nan")], 0.9), ([-0.1], 0.9), ([0.1], 1.0)])
def test_errors_that_are_none_are_refused(error: list[float], level: float) -> None:
    with pytest.raises(ValueError, match=r"an interval|level"):
        interval(error, level)
