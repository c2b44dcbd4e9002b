"""Gains with intervals, which candidates tie, and when a rebalance is not worth its stall.

Rows that follow each other are alike, and rows of one period share a placement: so blocks of rows are resampled
(circular block bootstrap, Politis and Romano 1992), the same ones for all candidates, and the spread is widened as
Student's t asks for so few blocks. Popularity that wanders for longer than a block would still look settled: so the
interval is no narrower than that of a first-order autoregression with the correlation that all scored rows have from
row to row, corrected for its bias in short series (Kendall, Biometrika 41, 1954: -(1 + 3 r) / n).

Legend: R rows, B resamples, P periods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

from moesim.arrays import FloatArray, IntArray
from moesim.explain_eplb.replay import Played, Replay
from moesim.explain_eplb.traffic import Rows
from moesim.rng import generator

__all__ = ["Gain", "Persistence", "Skip", "block_rows", "compare_gain", "persistence", "profile_sigma", "skip_below"]

_DRAWS = 1000
_LEAST_BLOCKS = 6
_MOST_LAG = 0.97


class Gain(NamedTuple):
    """Throughput over another's, less 1, and its interval at the level asked for."""

    value: float
    low: float
    high: float


def block_rows(rows: int, interval_rows: int) -> int:
    """Rows of a block: the square root of all, or a period where that is longer; at least six blocks."""
    return max(1, min(max(math.isqrt(rows), interval_rows), rows // _LEAST_BLOCKS))


def compare_gain(base: Played, other: Played, rows: slice, seed: int, level: float = 0.9, sigma: float = 0.0) -> Gain:
    """Tokens a second of `other` over those of `base`, less 1, on the same rows. sigma: of the log ratio, from errors
    of the prices, added in quadrature."""
    base_R, other_R = base.step_ns_R[rows], other.step_ns_R[rows]
    block = block_rows(len(base_R), max(base.candidate.interval_rows, other.candidate.interval_rows))
    tokens = math.log(other.batch.tokens / base.batch.tokens)
    point = tokens + math.log(base_R.mean() / other_R.mean())
    below, above = _spread(base_R, other_R, block, seed, level)
    slow = _wander(base.step_ns_R, other.step_ns_R, len(base_R), level)
    below, above = max(below, slow), max(above, slow)
    priced = float(ndtri(0.5 + level / 2)) * sigma
    low, high = point - math.hypot(below, priced), point + math.hypot(above, priced)
    return Gain(math.expm1(point), math.expm1(low), math.expm1(high))


def _spread(base_R: FloatArray, other_R: FloatArray, block: int, seed: int, level: float) -> tuple[float, float]:
    """How far the log of the ratio of means may lie below and above."""
    rows = len(base_R)
    blocks = -(-rows // block)
    if blocks < 2:
        return math.inf, math.inf
    first_BK = generator(seed, "explain_eplb/blocks", block, rows).integers(rows, size=(_DRAWS, blocks))
    sums = [_circular(value, block)[first_BK].sum(axis=1) for value in (base_R, other_R)]
    draw_B = np.log(sums[0] / sums[1]) - math.log(base_R.sum() / other_R.sum())
    tail = 0.5 - level / 2
    low, high = np.quantile(draw_B, [tail, 1 - tail])
    few = float(stdtrit(blocks - 1, 1 - tail) / ndtri(1 - tail)) * math.sqrt(blocks / (blocks - 1))
    return max(0.0, -float(low)) * few, max(0.0, float(high)) * few


def _wander(base_R: FloatArray, other_R: FloatArray, judged: int, level: float) -> float:
    """Half an interval of the log of the ratio of means over `judged` rows, if it goes on as an autoregression does."""
    rows = len(base_R)
    if rows < 3 or judged < 2:
        return math.inf
    differ_R = base_R / base_R.mean() - other_R / other_R.mean()
    square = float((differ_R**2).sum())
    if square <= 0:
        return 0.0
    lag = float((differ_R[1:] * differ_R[:-1]).sum()) / square
    lag = min(max(lag + (1 + 3 * lag) / rows, 0.0), _MOST_LAG)
    alike = (1 + lag) / (1 - lag)  # rows that count as one
    sigma = math.sqrt(square / (rows - 1) * alike / judged)
    return float(stdtrit(max(judged / alike - 1, 3.0), 0.5 + level / 2)) * sigma


def _circular(value_R: FloatArray, block: int) -> FloatArray:
    """Sum of the `block` rows from each row on, round the end: [R]."""
    total = np.concatenate([[0.0], np.cumsum(np.concatenate([value_R, value_R[: block - 1]]))])
    return np.asarray(total[block:] - total[:-block])


def profile_sigma(base: Played, other: Played, replay: Replay) -> float:
    """Error of the log ratio from the device profile, whose operators are off alike for both: first order in the
    difference of their shares of time."""
    profile = replay.prices.cluster.profile
    ours, theirs = (p.by_operator for p in (base, other))
    sums = sum(ours.values()), sum(theirs.values())
    return math.sqrt(
        sum(
            ((ours.get(op, 0.0) / sums[0] - theirs.get(op, 0.0) / sums[1]) * profile.error(op)) ** 2
            for op in {*ours, *theirs} - {"host"}
        )
    )


@dataclass(frozen=True, slots=True)
class Persistence:
    """How uneven popularity is, and how long it stays. skew: standard deviation of the experts' shares over their mean,
    what chance adds taken out. correlation: of shares `lag_rows` apart, 1 where they stay."""

    skew: float
    lag_rows: int
    correlation: float
    next_row: float


def persistence(rows: Rows, lag_rows: int) -> Persistence:
    """From recorded counts. Chance is taken out by multiplying shares of two halves of a row's tokens, whose noise is
    independent."""
    experts = rows.seen_RLE.shape[-1]

    def share(count: IntArray) -> FloatArray:
        return np.asarray(count / np.maximum(count.sum(axis=-1, keepdims=True), 1) * experts - 1.0)

    now, half, rest = share(rows.seen_RLE), share(rows.half_RLE), share(rows.seen_RLE - rows.half_RLE)
    variance = float((half * rest).mean())
    if variance <= 0:
        return Persistence(0.0, lag_rows, 0.0, 0.0)

    def at(lag: int) -> float:
        if lag >= len(now):
            return 0.0
        pair = share(rows.seen_RLE) if lag == 0 else now
        return float(np.clip((pair[lag:] * now[: len(now) - lag]).mean() / variance, 0.0, 1.0))

    return Persistence(math.sqrt(variance), lag_rows, at(lag_rows), at(1))


class Skip(NamedTuple):
    """Rebalances of a candidate one by one: mean over max load before [P], ns that the new map saves until the next
    one, less what it costs [P]; and the utilisation from which on skipping them saves most (1: never skip)."""

    utilisation_P: FloatArray
    net_ns_P: FloatArray
    threshold: float

    @property
    def idle(self) -> int:
        """Rebalances that cost more than they saved."""
        return int((self.net_ns_P < 0).sum())

    @property
    def skipped(self) -> int:
        """Rebalances that the threshold leaves out."""
        return int((self.utilisation_P >= self.threshold).sum())


def skip_below(played: Played, replay: Replay) -> Skip:
    """What each rebalance of `played` brought against going on with the map before it."""
    period = played.candidate.interval_rows
    maps = replay.maps(played.candidate)
    count = replay.batches(played.batch.tokens)[replay.start :]
    old = replay.prices.layers(replay.slot_counts(maps[:-1], count[period:], period), played.batch.tokens)
    new = played.times
    saved_R = (old.exchange + old.experts) - (new.exchange + new.experts)[period:]
    edges = np.arange(0, len(saved_R), period)
    steps = replay.rows.row_steps
    net_P = np.add.reduceat(saved_R, edges) * steps - played.stall_ns
    before = new.utilisation[: len(edges) * period]
    rows_P = np.diff(np.append(np.arange(0, len(before), period), len(before)))
    used_P = np.add.reduceat(before, np.arange(0, len(before), period)) / rows_P
    order = np.argsort(-used_P)
    lost = np.concatenate([[0.0], np.cumsum(net_P[order])])  # skipping the k best used ones loses their net
    best = int(np.argmin(lost))
    threshold = 1.0 if best == 0 else float(used_P[order[best - 1]])
    return Skip(used_P, net_P, threshold)
