"""How far a prediction may be off: split-conformal half widths of |ln(predicted / measured)|, and exact intervals of
their coverage.

Split-conformal (Vovk et al. 2005; Lei et al., JASA 2018, theorem 2.2): with n held-out residuals exchangeable with the
one to come, the ceil((n + 1) level)-th smallest bounds the new one with probability >= level. For 90 % that takes
n >= 9. Fewer, or points that were chosen rather than drawn, give an interval that is called empirical: the largest or
the same order statistic, without the promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from moesim.hardware import GRADES, Interval

__all__ = ["Coverage", "clopper_pearson", "clustered", "coverage", "interval", "log_error", "pools"]


class Coverage(NamedTuple):
    """`inside` of `points` within the half width, and the exact interval of that share."""

    inside: int
    points: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """inside / points."""
        return self.inside / self.points


def log_error(predicted: ArrayLike, measured: ArrayLike) -> NDArray[np.float64]:
    """|ln(predicted / measured)|, elementwise. Both positive."""
    return np.asarray(np.abs(np.log(np.asarray(predicted, np.float64) / np.asarray(measured, np.float64))))


def interval(error: ArrayLike, level: float = 0.9, exchangeable: bool = True) -> Interval:
    """The interval of held-out `error` (|ln ratio|, [points]) at `level`.

    exchangeable: the points were drawn as those to come will be. Raises ValueError for no or negative errors, or
    a level outside (0, 1).
    """
    sorted_error = np.sort(np.asarray(error, dtype=np.float64))
    n = len(sorted_error)
    if not n or not np.isfinite(sorted_error).all() or sorted_error[0] < 0:
        raise ValueError("an interval needs at least one error, each finite and >= 0")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    rank = math.ceil((n + 1) * level - 1e-9)
    method = "split-conformal" if exchangeable and rank <= n else "empirical"
    # rounded up: a narrower interval than the order statistic would not keep the promise
    width = min(math.ceil(sorted_error[min(rank, n) - 1] * 1e5) / 1e5, 10.0)
    return Interval.model_validate({"level": level, "half_width": width, "n": n, "method": method})


def pools(error: ArrayLike, grade: ArrayLike, level: float = 0.9, exchangeable: bool = True) -> dict[str, Interval]:
    """An interval for each grade that occurs. error: |ln ratio| [points]; grade: `Priced.grade` of the same points."""
    errors, grades = np.asarray(error, np.float64), np.asarray(grade)
    return {
        GRADES[code]: interval(errors[grades == code], level, exchangeable) for code in sorted(set(grades.tolist()))
    }


def clopper_pearson(inside: int, points: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share from `inside` of `points` independent trials (Clopper and Pearson, Biometrika 1934).

    Raises ValueError unless 0 <= inside <= points and points > 0.
    """
    if not 0 <= inside <= points or points <= 0:
        raise ValueError(f"inside must lie between 0 and points, points above 0; got {inside} of {points}")
    tail = (1.0 - level) / 2.0
    low = 0.0 if inside == 0 else float(beta.ppf(tail, inside, points - inside + 1))
    high = 1.0 if inside == points else float(beta.ppf(1.0 - tail, inside + 1, points - inside))
    return low, high


def coverage(error: ArrayLike, width: float, level: float = 0.95) -> Coverage:
    """Share of independent `error` (|ln ratio|) within `width`, with its Clopper-Pearson interval at `level`."""
    errors = np.asarray(error, np.float64)
    inside = int((errors <= width).sum())
    return Coverage(inside, len(errors), *clopper_pearson(inside, len(errors), level))


def clustered(
    inside: Mapping[object, ArrayLike], rng: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Share inside over all points of clusters (shapes), and its percentile interval from drawing whole clusters anew.

    inside: of each cluster, booleans [its points]; points of a cluster stand or fall together, so they are drawn
    together (cluster bootstrap).
    """
    flags = [np.asarray(v, dtype=np.bool_) for v in inside.values()]
    hits, sizes = np.array([v.sum() for v in flags]), np.array([len(v) for v in flags])
    take = rng.integers(0, len(flags), (draws, len(flags)))
    shares = hits[take].sum(axis=1) / sizes[take].sum(axis=1)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return float(hits.sum() / sizes.sum()), float(low), float(high)
