"""Fit the synthetic routing model to recorded tokens, and compare the two statistic by statistic.

The fit looks at popularity, the correlation of a token's experts with earlier tokens' (which sets `repeat`,
`topic_*` and `domain_spread`), co-activation and affinity. Distinct experts a batch and the spread of the
load between batches are never fitted: they are what the fit must foretell. Legend: T tokens, L layers, E
experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.workload import routing_stats as stats
from moesim.workload.pool import RoutingSource
from moesim.workload.synthetic import NO_GROUPS, Groups, SyntheticSpec, generate

__all__ = ["Fitted", "Row", "compare", "fit_synthetic", "split_sequences"]

Floats = NDArray[np.float64]

_LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_TOPIC_TOKENS = (8, 16, 32, 64, 128)
_SPREADS: tuple[tuple[stats.Order, int], ...] = (
    ("consecutive", 16), ("consecutive", 64), ("consecutive", 256), ("scattered", 16), ("scattered", 64),
    ("scattered", 256), ("parallel", 16), ("parallel", 64),
)  # fmt: skip
_SPREAD_WORDS = {
    "expert_max": "expert max/mean, mean",
    "expert_sd": "expert max/mean, sd",
    "rank_max": "rank max/mean, mean",
    "rank_sd": "rank max/mean, sd",
    "dispersion": "variance over independent tokens'",
    "lag1": "lag-1 correlation",
}
_ROUNDS = 5
_SEEDS = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One statistic of two pools; `kind` is `fitted`, or `foretold` where the fit did not look at it."""

    name: str
    kind: str
    recorded: float
    synthetic: float

    @property
    def error(self) -> float:
        """Relative to the recorded value."""
        return self.synthetic / self.recorded - 1 if self.recorded else float("nan")


@dataclass(frozen=True, slots=True)
class Fitted:
    """The knobs and popularity of a fit, and how its pool compares with the recorded one (`report`)."""

    spec: SyntheticSpec
    weight_LE: Floats
    top_k: int
    groups: Groups
    report: tuple[Row, ...]

    def generate(self, seed: int, pool_tokens: int | None = None) -> RoutingSource:
        """A pool by the fitted model, of the spec's size or of `pool_tokens`."""
        size = {} if pool_tokens is None else {"pool_tokens": pool_tokens}
        return generate(self.spec.model_copy(update=size), self.weight_LE, self.top_k, seed, self.groups, "fitted")


def split_sequences(source: RoutingSource, part: int, parts: int = 2) -> RoutingSource:
    """Every `parts`-th sequence from `part` on: halves that mix early and late ones."""
    return source.take_sequences(np.arange(part, source.num_sequences, parts))


def fit_synthetic(
    source: RoutingSource, holdout: RoutingSource | None = None, groups: Groups = NO_GROUPS, seed: int = 0
) -> Fitted:
    """The model whose statistics are `source`'s; the report compares it with `holdout` (default: `source`).

    A pool of the model has the source's number of tokens and mean sequence length.
    """
    count_LE = source.count_LE()
    weight_LE = np.maximum(count_LE, 0.25) / source.num_tokens
    prefix = stats.common_prefix(source)
    length = max(1, round(source.num_tokens / source.num_sequences))
    lags = [lag for lag in _LAGS if lag < length - prefix]
    target = _moments(source, lags, prefix)
    spec = SyntheticSpec(
        pool_tokens=source.num_tokens,
        sequence_tokens=length,
        prefix_tokens=min(prefix, length - 1),
        domains=max(2, source.num_sequences),
        **_start(target, lags, source.top_k),
    )
    for _ in range(_ROUNDS):
        found = [
            _moments(generate(spec, weight_LE, source.top_k, seed + s, groups), lags, spec.prefix_tokens)
            for s in range(_SEEDS)
        ]
        spec = _step(spec, target, {k: np.mean([f[k] for f in found], axis=0) for k in target}, lags)
    fitted = Fitted(spec, weight_LE, source.top_k, groups, ())
    against = source if holdout is None else holdout
    pool = fitted.generate(seed + _SEEDS, against.num_tokens)
    return Fitted(spec, weight_LE, source.top_k, groups, tuple(compare(against, pool)))


# ---------------------------------------------------------------------------------------------------- fitting


def _moments(source: RoutingSource, lags: list[int], skip: int) -> dict[str, Any]:
    """Means over layers, past the first `skip` tokens of each sequence."""
    past = skip if skip < int(source.sequence_tokens_Q.max()) else 0
    return {
        "correlation": np.nan_to_num(stats.autocorrelation(source, lags, past).mean(1)) if lags else np.zeros(0),
        "coactivation": float(stats.coactivation(source, past).mean()),
        "tie": stats.tie(source, past),
    }


def _topic_shape(lags: Floats, topic_tokens: int) -> Floats:
    """Chance that two tokens `lag` apart share a stretch whose mean length is `topic_tokens`."""
    out: Floats = (1 - 1 / topic_tokens) ** lags
    return out


def _start(target: dict[str, Any], lags: list[int], top_k: int) -> dict[str, Any]:
    """First guess of the knobs: least squares over a grid of repeat and topic length, two amplitudes >= 0
    each.

    correlation(lag) = c_d + c_t * same_topic(lag) + (1 - c_d - c_t) * repeat**lag.
    """
    knobs: dict[str, Any] = {"affinity": min(1.0, float(target["tie"]))}
    knobs["coactivation"] = float(np.clip(np.sqrt(max(0.0, target["coactivation"]) / max(1, top_k - 1)), 0.0, 1.0))
    if not lags:
        return {**knobs, "repeat": 0.0, "domain_spread": 0.0}
    at, goal = np.asarray(lags, np.float64), target["correlation"]
    weight = np.diff(np.log(np.append(at, at[-1] * 1.5)))
    best, chosen = np.inf, (0.0, 32, 0.0, 0.0)
    for repeat in np.linspace(0, 0.9, 91):
        copy = repeat**at
        for topic in _TOPIC_TOKENS:
            same = _topic_shape(at, topic)
            c_d, c_t = _two_nonnegative(1 - copy, same - copy, goal - copy, weight)
            rest = goal - copy - c_d * (1 - copy) - c_t * (same - copy)
            loss = float((weight * rest**2).sum())
            if loss < best - 1e-12:
                best, chosen = loss, (float(repeat), topic, c_d, c_t)
    repeat, topic, c_d, c_t = chosen
    knobs |= {"repeat": repeat, "topic_tokens": topic}
    knobs |= {"domain_spread": min(0.9, c_d), "topic_spread": min(0.9, c_t)}
    return knobs


def _two_nonnegative(a: Floats, b: Floats, y: Floats, weight: Floats) -> tuple[float, float]:
    """Weighted least squares y = p a + q b with p, q >= 0."""
    aa, bb, ab = (float((weight * x * z).sum()) for x, z in ((a, a), (b, b), (a, b)))
    ay, by = float((weight * a * y).sum()), float((weight * b * y).sum())
    det = aa * bb - ab * ab
    if det > 1e-12 * max(aa * bb, 1e-300):
        p, q = (ay * bb - by * ab) / det, (by * aa - ay * ab) / det
        if p >= 0 and q >= 0:
            return p, q
    alone = (max(0.0, ay / aa) if aa > 0 else 0.0, max(0.0, by / bb) if bb > 0 else 0.0)
    gain = (alone[0] * ay, alone[1] * by)
    return (alone[0], 0.0) if gain[0] >= gain[1] else (0.0, alone[1])


def _step(spec: SyntheticSpec, target: dict[str, Any], found: dict[str, Any], lags: list[int]) -> SyntheticSpec:
    """Knobs corrected by what a pool of the present ones shows."""
    at = np.asarray(lags, np.float64)
    change: dict[str, float] = {}
    if lags:
        goal, now = target["correlation"], found["correlation"]
        far, near = at > 2 * spec.topic_tokens, (at > 2) & (at <= spec.topic_tokens)
        if far.any() and spec.domain_spread > 0:
            change["domain_spread"] = min(0.9, spec.domain_spread * _root_ratio(goal[far].mean(), now[far].mean()) ** 2)
        if near.any() and spec.topic_spread > 0:
            change["topic_spread"] = min(0.9, spec.topic_spread * _root_ratio(goal[near].mean(), now[near].mean()) ** 2)
        change["repeat"] = float(np.clip(spec.repeat + (goal[0] - now[0]), 0, 1))
    if spec.coactivation > 0:
        ratio = _root_ratio(target["coactivation"], found["coactivation"])
        change["coactivation"] = min(1.0, spec.coactivation * ratio)
    if spec.affinity > 0:
        change["affinity"] = min(1.0, spec.affinity * _root_ratio(target["tie"], found["tie"]) ** 2)
    return spec.model_copy(update=change)


def _root_ratio(goal: float, now: float) -> float:
    """sqrt(goal / now), within a factor of two; 1/2 where the goal is not above 0."""
    if goal <= 0:
        return 0.5
    return float(np.clip(np.sqrt(goal / now), 0.5, 2.0)) if now > 0 else 2.0


# -------------------------------------------------------------------------------------------------- comparing


def compare(recorded: RoutingSource, synthetic: RoutingSource, ranks: int = 8) -> list[Row]:
    """Both pools' statistics side by side, means over layers. Prefixes common to all sequences are left out
    where a statistic is about one token and the next.
    """
    rows: list[Row] = []

    def add(name: str, kind: str, a: float, b: float) -> None:
        rows.append(Row(name, kind, float(a), float(b)))

    pools = (recorded, synthetic)
    skips = [stats.common_prefix(p) for p in pools]
    share = [np.sort(stats.popularity(p), axis=1)[:, ::-1] for p in pools]
    experts = recorded.num_experts
    add("popularity: hottest expert, max/mean", "fitted", *(s[:, 0].mean() * experts for s in share))
    add("popularity: share of the hottest quarter", "fitted", *(s[:, : experts // 4].sum(1).mean() for s in share))
    add("repeat rate (chance included)", "fitted", *(stats.repeat_rate(p).mean() for p in pools))
    for lag in (1, 4, 16):
        both = [np.nan_to_num(stats.autocorrelation(p, [lag], s)).mean() for p, s in zip(pools, skips, strict=True)]
        add(f"correlation with the token {lag} before", "fitted", *both)
    both = [stats.coactivation(p, s).mean() for p, s in zip(pools, skips, strict=True)]
    add("co-activation", "fitted", *both)
    both = [stats.affinity(p, s).mean() for p, s in zip(pools, skips, strict=True)]
    add("affinity of adjacent layers", "fitted", *both)
    if recorded.num_layers > 8:
        both = [stats.affinity(p, s, 8).mean() for p, s in zip(pools, skips, strict=True)]
        add("affinity eight layers on", "foretold", *both)
    curves: tuple[stats.Order, ...] = ("consecutive", "scattered")
    for order in curves:
        curve = [stats.distinct_curve(p, order=order).mean(1) for p in pools]
        for i, size in enumerate(stats.BATCH_SIZES):
            add(f"distinct experts, {order} batch of {size}", "foretold", curve[0][i], curve[1][i])
    for order, size in _SPREADS:
        a, b = (stats.spread(p, size, order, ranks) for p in pools)
        for name, words in _SPREAD_WORDS.items():
            add(f"{words}, {order} batch of {size}", "foretold", getattr(a, name), getattr(b, name))
    return rows
