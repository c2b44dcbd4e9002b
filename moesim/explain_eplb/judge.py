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
_LEAST_PERIODS = 8
_SHARES = (0.1, 0.3, 0.5, 0.7)
"""quantiles of utilisation that are tried as thresholds"""


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
    """A threshold of utilisation (mean over max load of ranks, executed since the last time of asking) from which on a
    rebalance is skipped, 1: never; chosen on the first half of the periods. Of the second half: times that one was due
    and skipped, and the gain in tokens a second over never skipping."""

    threshold: float
    due: int
    skipped: int
    gain: float


def skip_below(played: Played, replay: Replay) -> Skip | None:
    """Replay `played` with thresholds; None where it has fewer than eight periods."""
    period, steps = played.candidate.interval_rows, replay.rows.row_steps
    maps = replay.maps(played.candidate, played.lag_rows)
    periods = len(maps)
    if periods < _LEAST_PERIODS:
        return None
    count = replay.batches(played.batch.tokens)[replay.start :]
    own = sum(played.batch.own_ns.values())
    known: dict[tuple[int, int], tuple[float, float]] = {}

    def seen(at: int, when: int) -> tuple[float, float]:
        """ns of all steps of period `when` under map `at`, and the mean utilisation."""
        if (at, when) not in known:
            part = count[when * period : (when + 1) * period]
            slots = replay.slot_counts(maps[at : at + 1], part, len(part))
            times = replay.prices.layers(slots, played.batch.tokens)
            ns = float((own + times.exchange + times.experts).sum()) * steps
            known[at, when] = ns, float(times.utilisation.mean())
        return known[at, when]

    def run(threshold: float) -> tuple[FloatArray, IntArray]:
        """ns of each period, and whether it began with a new map."""
        spent, moved, at = [seen(0, 0)[0]], [1], 0
        for when in range(1, periods):
            due = seen(at, when - 1)[1] < threshold
            at = when if due else at
            spent.append(seen(at, when)[0] + (played.stall_ns if due else 0.0))
            moved.append(int(due))
        return np.array(spent), np.array(moved)

    always = run(1.0)[0]
    first, second = slice(1, periods // 2), slice(periods // 2, None)
    used = np.array([seen(when, when)[1] for when in range(periods)])
    tried = {round(float(x), 2) for x in np.quantile(used, _SHARES)} | {
        round(float(used.min()) * x, 2) for x in (0.8, 0.9)
    }
    threshold = min(sorted(tried | {1.0}, reverse=True), key=lambda u: run(u)[0][first].sum())
    spent, moved = run(threshold)
    return Skip(
        threshold,
        len(moved[second]),
        int((moved[second] == 0).sum()),
        float(always[second].sum() / spent[second].sum() - 1),
    )
