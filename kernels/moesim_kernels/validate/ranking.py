"""How well predictions order what was measured. Pure functions over arrays.

Legend: N things that are ordered (settings, candidates); smaller is better throughout.

Two things whose measured times differ by less than the measurement can tell are tied: nothing is asked of how a
prediction orders them. h is the half width of the interval of ln(measured), so that of a ratio is sqrt(h_i^2 + h_j^2),
and the band is twice that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moesim.arrays import AnyArray, FloatArray

__all__ = ["GAPS", "Gap", "best_recall", "pairs_by_gap", "regret", "tau_b", "tied_NN", "top_quartile"]

GAPS: tuple[tuple[float, float], ...] = ((0.02, 0.05), (0.05, 0.10), (0.10, float("inf")))
"""of measured times, larger over smaller less one"""
BAND = 2.0
_LEAST = 3


@dataclass(frozen=True, slots=True)
class Gap:
    """Pairs whose measured times differ by a share in [low, high), and those of them that were predicted in the right
    order."""

    low: float
    high: float
    pairs: int
    right: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values; no upper end as None."""
        high = None if np.isinf(self.high) else self.high
        share = round(self.right / self.pairs, 4) if self.pairs else None
        return {"low": self.low, "high": high, "pairs": self.pairs, "right": self.right, "share": share}


def tied_NN(measured_N: AnyArray, half_width_N: AnyArray) -> AnyArray:
    """Which pairs the measurement cannot tell apart, bool [N, N]. half_width_N: of ln(measured)."""
    log, half = np.log(np.asarray(measured_N, float)), np.asarray(half_width_N, float)
    band = BAND * np.sqrt(half[:, None] ** 2 + half[None, :] ** 2)
    return np.asarray(np.abs(log[:, None] - log[None, :]) <= band)


def tau_b(predicted_N: ArrayLike, measured_N: ArrayLike, tied: AnyArray | None = None) -> float:
    """Kendall's tau-b (Kendall 1945): (concordant - discordant) / sqrt(pairs not tied in one x not tied in the other).

    tied: pairs to leave out of both sides, bool [N, N]. nan where no pair is left.
    """
    predicted, measured = np.asarray(predicted_N, float), np.asarray(measured_N, float)
    first, second = np.triu_indices(len(predicted), 1)
    if tied is not None:
        keep = ~np.asarray(tied)[first, second]
        first, second = first[keep], second[keep]
    a, b = np.sign(predicted[first] - predicted[second]), np.sign(measured[first] - measured[second])
    scale = float(np.sqrt(np.count_nonzero(a) * np.count_nonzero(b)))
    return float((a * b).sum()) / scale if scale else float("nan")


def top_quartile(measured_N: AnyArray) -> AnyArray:
    """The quarter with the smallest measured times, at least three: places, int [n]."""
    measured = np.asarray(measured_N)
    return np.argsort(measured, kind="stable")[: max(_LEAST, -(-len(measured) // 4))]


def pairs_by_gap(predicted_N: AnyArray, measured_N: AnyArray) -> list[Gap]:
    """Of the pairs in each class of `GAPS`, how many are in the right order; one predicted equal is not."""
    predicted, measured = np.asarray(predicted_N, float), np.asarray(measured_N, float)
    first, second = np.triu_indices(len(predicted), 1)
    gap = np.exp(np.abs(np.log(measured[first] / measured[second]))) - 1.0
    right = (predicted[first] - predicted[second]) * (measured[first] - measured[second]) > 0
    out = []
    for low, high in GAPS:
        inside = (gap >= low) & (gap < high)
        out.append(Gap(low, high, int(inside.sum()), int(right[inside].sum())))
    return out


def best_recall(predicted_N: AnyArray, measured_N: AnyArray, tied: AnyArray | None = None, best: int = 3) -> float:
    """Share of the predicted `best` that are among the measured `best`, or tied with the last of these."""
    predicted, measured = np.asarray(predicted_N), np.asarray(measured_N)
    order = np.argsort(measured, kind="stable")
    count = min(best, len(order))
    good = set(order[:count].tolist())
    if tied is not None:
        good |= set(np.flatnonzero(np.asarray(tied)[order[count - 1]]).tolist())
    chosen = np.argsort(predicted, kind="stable")[:count].tolist()
    return sum(place in good for place in chosen) / count


def regret(measured_N: FloatArray, pick: int | None) -> float:
    """How much more the pick takes than the best: measured[pick] / min - 1; None: the mean over all, a random pick."""
    measured = np.asarray(measured_N, float)
    chosen = measured.mean() if pick is None else measured[pick]
    return float(chosen / measured.min() - 1.0)
