"""Statistics of a pool of routed tokens: what a synthetic pool must share with the recorded one it stands
for.

Each is a mean over whole tokens with chance taken out where it says so, so that one knob of the synthetic
model moves one statistic. Legend: T tokens, L layers, E experts, K experts a token, Q sequences, B batch
sizes, N batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.rng import generator
from moesim.workload.pool import RoutingSource, count_steps

__all__ = [
    "BATCH_SIZES", "Order", "Spread", "affinity", "autocorrelation", "batches", "coactivation",
    "common_prefix", "distinct_curve", "popularity", "repeat_rate", "spread", "tie",
]  # fmt: skip

Floats = NDArray[np.float64]
Order = Literal["consecutive", "scattered", "parallel"]
"""How a batch takes rows: one after another in the pool (a prefill chunk), anywhere (many users' prompts, or
decodes of unrelated requests), or one of each of several sequences that go on together (decode steps)."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RUN_STEPS = 16
_MAX_BATCH_TOKENS = 1 << 16


def popularity(source: RoutingSource) -> Floats:
    """Each expert's share of a layer's choices, [L, E]; rows add up to 1."""
    count_LE = source.count_LE()
    out: Floats = count_LE / count_LE.sum(1, keepdims=True)
    return out


def _use(ids_TK: NDArray[Any], experts: int) -> Floats:
    """Chance that a token takes each expert, [E]."""
    return np.bincount(ids_TK.ravel(), minlength=experts) / max(1, len(ids_TK))


def _matches(a_TK: NDArray[Any], b_TK: NDArray[Any]) -> int:
    """Experts that both tokens of a row take, over all rows."""
    return sum(int(np.count_nonzero(a_TK[:, i, None] == b_TK)) for i in range(a_TK.shape[1]))


def repeat_rate(source: RoutingSource) -> Floats:
    """Chance that a slot's expert was used by the token before in its sequence, [L]; chance included."""
    later = _later(source, 1)
    out = np.empty(source.num_layers)
    for layer in range(source.num_layers):
        ids = source.expert_TLK[:, layer]
        out[layer] = _matches(ids[later], ids[later - 1]) / max(1, len(later) * source.top_k)
    return out


def _later(source: RoutingSource, lag: int, skip: int = 0) -> NDArray[np.int64]:
    """Rows that have a row `lag` before them in their sequence, both past its first `skip` tokens."""
    position = np.arange(source.num_tokens) - np.repeat(source.sequence_start[:-1], source.sequence_tokens_Q)
    return np.flatnonzero(position >= lag + skip)


def autocorrelation(source: RoutingSource, lags: Sequence[int], skip: int = 0) -> Floats:
    """Correlation between a token's experts and those `lag` tokens before, [lags, L], pooled over experts.

    sum_e Cov(x_e(t), x_e(t - lag)) / sum_e Var(x_e): the repeat rate with chance taken out. NaN where no
    sequence is long enough. `skip`: leave out each sequence's first tokens.
    """
    out = np.full((len(lags), source.num_layers), np.nan)
    rows = _later(source, 0, skip)
    later = [_later(source, lag, skip) for lag in lags]
    for layer in range(source.num_layers):
        ids, experts = source.expert_TLK[:, layer], source.num_experts
        mean = _use(ids[rows], experts)
        variance = float((mean * (1 - mean)).sum())
        for i, lag in enumerate(lags):
            if len(later[i]):
                a, b = ids[later[i]], ids[later[i] - lag]
                together = _matches(a, b) / len(a)
                apart = float(_use(a, experts) @ _use(b, experts))
                out[i, layer] = (together - apart) / variance if variance > 0 else 0.0
    return out


def coactivation(source: RoutingSource, skip: int = 0) -> Floats:
    """How many more of a token's other K - 1 experts one of them foretells than popularity does, [L].

    Measured as `affinity` is, within a layer. 0: slots are independent; with `coactivation` g: about (K - 1)
    g**2.
    """
    half_T = _halves(source, skip)
    out = np.zeros(source.num_layers)
    for layer in range(source.num_layers):
        here = [source.expert_TLK[half, layer] for half in half_T]
        out[layer] = _foretold(here, here, source.num_experts)
    return out


def affinity(source: RoutingSource, skip: int = 0, ahead: int = 1) -> Floats:
    """How many more of the experts `ahead` layers on one expert foretells than popularity does, [L - ahead].

    For each expert, the later layer's experts that follow it more often than their share are found on one
    half of the sequences (stretches of the pool where there are few); counted is, on the other half, how many
    more of them follow it than their share says; both halves take both parts. 0: layers are independent; with
    the knob `affinity` a: about a * (1 + coactivation) (`tie` divides that out).
    """
    half_T = _halves(source, skip)
    out = np.zeros(max(0, source.num_layers - ahead))
    for layer in range(len(out)):
        last = [source.expert_TLK[half, layer] for half in half_T]
        here = [source.expert_TLK[half, layer + ahead] for half in half_T]
        out[layer] = _foretold(last, here, source.num_experts)
    return out


def tie(source: RoutingSource, skip: int = 0) -> float:
    """Affinity of adjacent layers as a share of what a token's expert says of the same layer (itself
    included)."""
    if source.num_layers < 2:
        return 0.0
    return float(affinity(source, skip).mean() / (1 + coactivation(source, skip).mean()))


def _foretold(before: list[NDArray[Any]], after: list[NDArray[Any]], experts: int) -> float:
    """See `affinity`; ids [T, K] of the two halves. Where before and after are the same, an expert is not its own."""
    excess, weight = [], []
    for a, b in zip(before, after, strict=True):
        used = np.bincount(a.ravel(), minlength=experts)
        follow = _pairs(a, b, experts) / np.maximum(used, 1)[:, None] - _use(b, experts)
        if a is b:
            np.fill_diagonal(follow, 0)
        excess.append(follow)
        weight.append(used / max(1, a.size))
    gain = [float(weight[j] @ np.where(excess[i] > 0, excess[j], 0.0).sum(1)) for i, j in ((0, 1), (1, 0))]
    return (gain[0] + gain[1]) / 2


def _pairs(a_TK: NDArray[Any], b_TK: NDArray[Any], experts: int) -> NDArray[np.int64]:
    """How often a token takes expert e in `a` and expert f in `b`, [E, E]."""
    count = np.zeros(experts * experts, np.int64)
    step = max(1, _MAX_BATCH_TOKENS // a_TK.shape[1])
    for at in range(0, len(a_TK), step):
        key = a_TK[at : at + step, :, None].astype(np.int64) * experts + b_TK[at : at + step, None, :]
        count += np.bincount(key.ravel(), minlength=len(count))
    return count.reshape(experts, experts)


def _halves(source: RoutingSource, skip: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two halves of the rows: every other sequence, or every other of 16 stretches where there are under
    16."""
    if source.num_sequences >= 16:
        part = np.repeat(np.arange(source.num_sequences) % 2, source.sequence_tokens_Q)
    else:
        part = np.arange(source.num_tokens) * 16 // source.num_tokens % 2
    rows = _later(source, 0, skip)
    return rows[part[rows] == 0], rows[part[rows] == 1]


def common_prefix(source: RoutingSource, least: float = 0.9) -> int:
    """Tokens at the start of every sequence whose experts agree in at least `least` of the slots across
    sequences."""
    if source.num_sequences < 2:
        return 0
    longest = int(source.sequence_tokens_Q.min())
    starts = source.sequence_start[:-1]
    for p in range(longest):
        ids = source.expert_TLK[starts + p]
        same = (ids[1:, :, :, None] == ids[:-1, :, None, :]).sum((2, 3)).mean() / source.top_k
        if same < least:
            return p
    return longest


# ------------------------------------------------------------------------------------------------- batches


def batches(source: RoutingSource, batch: int, order: Order, seed: int = 0) -> NDArray[np.int64]:
    """Rows of the pool in batches, [runs, steps, batch]; within a run the steps follow each other in time."""
    tokens = source.num_tokens
    rng = generator(seed, f"routing/batches/{order}", batch)
    if order == "consecutive":
        steps = max(1, tokens // batch)
        return (np.arange(steps * batch) % tokens).reshape(1, steps, batch)
    if order == "scattered":
        steps = max(4, min(256, _MAX_BATCH_TOKENS // batch))
        return rng.integers(0, tokens, (1, steps, batch))
    runs = max(4, min(128, 4 * _MAX_BATCH_TOKENS // (batch * _RUN_STEPS)))
    length_Q = source.sequence_tokens_Q
    usable = np.flatnonzero(length_Q >= _RUN_STEPS)
    if usable.size == 0:
        usable = np.arange(source.num_sequences)
    picked = usable[_picks(len(usable), runs, batch, rng)]
    steps = int(min(_RUN_STEPS, length_Q[usable].min()))
    room = length_Q[picked] - steps + 1
    first = source.sequence_start[picked] + np.floor(rng.random(picked.shape) * room).astype(np.int64)
    return first[:, None, :] + np.arange(steps)[:, None]


def _picks(among: int, runs: int, batch: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[runs, batch] of range(among), each used as often as any other within a run, as nearly as that goes."""
    turns = -(-batch // among)
    rows = [np.concatenate([rng.permutation(among) for _ in range(turns)])[:batch] for _ in range(runs)]
    return np.stack(rows)


def distinct_curve(
    source: RoutingSource, sizes: Sequence[int] = BATCH_SIZES, order: Order = "scattered", seed: int = 0
) -> Floats:
    """Mean distinct experts that a batch takes, [B, L], for batches of `sizes` tokens."""
    out = np.empty((len(sizes), source.num_layers))
    for i, size in enumerate(sizes):
        rows = batches(source, size, order, seed)
        rows = rows[:, : max(1, 4 * _MAX_BATCH_TOKENS // size // len(rows))].reshape(-1, size)
        count = count_steps(source, rows.ravel(), np.arange(len(rows) + 1) * size)
        out[i] = (count > 0).sum(2).mean(0)
    return out


@dataclass(frozen=True, slots=True)
class Spread:
    """Load of experts and ranks from batch to batch, each a mean over layers.

    `*_max`: mean over batches of max/mean load; `*_sd`: its standard deviation; `dispersion`: variance of the
    experts' loads over that of independent tokens of the same popularity; `lag1`: correlation of the loads of
    a batch and the next.
    """

    expert_max: float
    expert_sd: float
    rank_max: float
    rank_sd: float
    dispersion: float
    lag1: float


def spread(source: RoutingSource, batch: int, order: Order, ranks: int = 8, seed: int = 0) -> Spread:
    """Spread of the load between batches of `batch` tokens, experts standing in id order on `ranks` ranks."""
    rows = batches(source, batch, order, seed)
    runs, steps = rows.shape[:2]
    layers, experts = source.num_layers, source.num_experts
    count = count_steps(source, rows.ravel(), np.arange(runs * steps + 1) * batch).astype(np.float64)
    mean_LE = source.count_LE() / source.num_tokens
    even = batch * source.top_k / experts
    hottest = count.max(2) / even
    edges = [experts * g // ranks for g in range(ranks)]
    load = np.add.reduceat(count, edges, axis=2) if experts >= ranks else count
    rank = load.max(2) / (batch * source.top_k / load.shape[2])
    alone = batch * (mean_LE * (1 - mean_LE)).sum(1)
    dispersion = count.var(0).sum(1) / np.maximum(alone, 1e-12)
    off = (count - count.mean(0)).reshape(runs, steps, layers, experts)
    lag1 = 0.0
    if steps > 1:
        pair = (off[:, 1:] * off[:, :-1]).sum((0, 1, 3)) / (runs * (steps - 1))
        lag1 = float((pair / np.maximum((off**2).sum((0, 1, 3)) / (runs * steps), 1e-12)).mean())
    return Spread(
        float(hottest.mean()), float(hottest.std(0).mean()), float(rank.mean()), float(rank.std(0).mean()),
        float(dispersion.mean()), lag1,
    )  # fmt: skip
