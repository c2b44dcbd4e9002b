"""A generator of router scores fitted to a trace: popularity, kinds of tokens, persistence and noise.

A logit is `temperature_l * (logit_cle + Gumbel noise)` for a token of kind c; what lies below the layer's cut is drawn
nearer by a factor, because real scores of experts that are not taken lie nearer than those that are taken tell. Kinds
are found by k-means on who takes what in all layers at once: a factor model whose factors are memberships, so that its
rank is the number of kinds less one. A token has one kind in all layers, which ties experts within a layer
(co-activation) and between layers (affinity). Along a sequence kinds follow a Markov chain, and a token may repeat the
one before. A token's ids are the K highest logits. (Normal factors were tried in place of kinds: experts of real tokens
come in clusters, and normal factors strong enough for the co-activation lose the popularity.)

The fit looks at popularity, co-activation, the correlation of neighbours and, of the gates, at two means: the distance
of rank 1 to rank K in log weight (for the temperature) and the mass of the top K (for the factor). All else (highest
weight, spread over tokens, entropy, gaps, affinity, longer correlations) is what the fit must foretell. Legend: T
tokens, L MoE layers, E experts, K experts a token, C kinds, Q sequences, N rows asked for, F coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.rng import generator
from moesim.workload import routing_stats as stats
from moesim.workload.pool import RoutingSource, id_dtype
from moesim.workload.scores_tail import salt, uniform

__all__ = ["SyntheticScores", "SyntheticScoresSpec", "fit"]

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]

_ROUNDS = 5
_TOKENS_A_KIND = 48
_COORDINATES = 32
_LLOYD = 20
_SHRINK = 2.0
"""Tokens of the pool's own popularity that are added to each kind"""


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticScoresSpec:
    """`logit_CLE`: in units of the Gumbel noise; `temperature_L`: of a layer's logits; `below_L`: factor
    on logits below 0, about where the K-th lies; `share_C`, `next_CC`: the kinds'
    shares and the chain along a sequence (rows add up to 1); `repeat`: chance that a token repeats the scores
    of the one before; `top_k`, `sequence_tokens`: of the pool that `SyntheticScores.pool` makes; `source`: what it was
    fitted to.
    """

    logit_CLE: Floats32
    temperature_L: Floats
    below_L: Floats
    share_C: Floats
    next_CC: Floats
    repeat: float
    top_k: int
    sequence_tokens: int
    source: str


class SyntheticScores:
    """A `ScoreModel` of `tokens` rows in sequences of `spec.sequence_tokens` (the last may be shorter)."""

    def __init__(self, spec: SyntheticScoresSpec, tokens: int, seed: int) -> None:
        if tokens < 1:
            raise ValueError(f"at least one token, got {tokens}")
        self.spec, self.seed, self.num_tokens = spec, seed, tokens
        _, self.num_layers, self.num_experts = spec.logit_CLE.shape
        self.name = f"synthetic scores fitted to {spec.source}"
        self.assumed = f"All scores are drawn from a model fitted to {spec.source}."
        length = spec.sequence_tokens
        self._sequences = -(-tokens // length)
        self.sequence_start = np.minimum(np.arange(self._sequences + 1) * length, tokens).astype(np.int64)
        kind_QP, origin_QP = _chains(spec, self._sequences, seed)
        self.kind_T = kind_QP.ravel()[:tokens]
        self._origin_T = origin_QP.ravel()[:tokens]

    def scores(self, rows_N: Ints, layer: int, progress: float = 1.0) -> Floats32:
        """See `moesim.workload.scores.ScoreModel.scores`; `progress` is not looked at. Raises IndexError."""
        rows = np.asarray(rows_N, np.int64)
        if not 0 <= layer < self.num_layers or (rows.size and not 0 <= rows.min() <= rows.max() < self.num_tokens):
            raise IndexError(
                f"rows must lie in 0..{self.num_tokens - 1} and layers in 0..{self.num_layers - 1}, layer {layer}"
            )
        key = salt(self.seed, "routing/scores/synthetic", layer)
        noise = uniform(key, self._origin_T[rows], self.num_experts)
        out_NE: Floats32 = -np.log(-np.log(noise))
        out_NE += self.spec.logit_CLE[self.kind_T[rows], layer]
        out_NE = np.where(out_NE < 0, out_NE * np.float32(self.spec.below_L[layer]), out_NE)
        out_NE *= np.float32(self.spec.temperature_L[layer])
        return out_NE

    def pool(self) -> RoutingSource:
        """All rows as a pool: ids most wanted first, weights the softmax over all experts."""
        top_k, rows = self.spec.top_k, np.arange(self.num_tokens)
        expert_TLK = np.empty((self.num_tokens, self.num_layers, top_k), id_dtype(self.num_experts))
        weight_TLK = np.empty(expert_TLK.shape, np.float16)
        for layer in range(self.num_layers):
            expert_TLK[:, layer], weight_TLK[:, layer] = _top(self.scores(rows, layer), top_k)
        return RoutingSource(
            expert_TLK, self.sequence_start, self.num_experts, top_k, False, self.name, weight_TLK=weight_TLK
        )


def _top(score_TE: Floats32, top_k: int) -> tuple[Ints, Floats32]:
    """The K highest, most wanted first, and their share of the softmax."""
    expert_TK = np.argpartition(-score_TE, top_k - 1, axis=1)[:, :top_k] if top_k < score_TE.shape[1] else None
    if expert_TK is None:
        expert_TK = np.tile(np.arange(top_k), (len(score_TE), 1))
    order_TK = np.argsort(-np.take_along_axis(score_TE, expert_TK, 1), axis=1, kind="stable")
    expert_TK = np.take_along_axis(expert_TK, order_TK, 1)
    prob_TE = np.exp(score_TE - score_TE.max(1, keepdims=True))
    weight_TK: Floats32 = np.take_along_axis(prob_TE, expert_TK, 1) / prob_TE.sum(1, keepdims=True)
    return expert_TK, weight_TK


def _chains(spec: SyntheticScoresSpec, sequences: int, seed: int) -> tuple[Ints, Ints]:
    """Kind of each token, and the row that it repeats (its own where it does not), [Q, sequence_tokens]."""
    length, rng = spec.sequence_tokens, generator(seed, "routing/scores/kinds")
    kinds = len(spec.share_C)
    draw_PQ = rng.random((length, sequences))
    copy_PQ = rng.random((length, sequences)) < spec.repeat
    next_CC = np.cumsum(spec.next_CC, axis=1)
    kind_PQ = np.empty((length, sequences), np.int64)
    kind_PQ[0] = np.searchsorted(np.cumsum(spec.share_C), draw_PQ[0] * spec.share_C.sum(), side="right")
    for p in range(1, length):
        kind_PQ[p] = (draw_PQ[p][:, None] >= next_CC[kind_PQ[p - 1]]).sum(1)
    np.minimum(kind_PQ, kinds - 1, out=kind_PQ)
    origin_QP = np.arange(sequences * length).reshape(sequences, length)
    copied_QP = copy_PQ.T.copy()
    copied_QP[:, 0] = False
    origin_QP = np.maximum.accumulate(np.where(copied_QP, 0, origin_QP), axis=1)
    return kind_PQ.T.ravel()[origin_QP], origin_QP


# ------------------------------------------------------------------------------------------------------- fit


def fit(trace: RoutingSource, kinds: int | None = None, seed: int = 0) -> SyntheticScoresSpec:
    """The model of a trace with gate weights, with one kind for each 48 tokens (2 to 256) unless `kinds` says.

    Tokens of a prefix common to all sequences are left out.

    Raises ValueError for a trace without weights or with fewer than eight tokens past the prefix.
    """
    if trace.weight_TLK is None:
        raise ValueError(f"{trace.source} has no gate weights to fit temperatures to. Give a trace that has.")
    body = _past_prefix(trace)
    tokens, layers, experts = body.num_tokens, body.num_layers, body.num_experts
    wanted = int(np.clip(tokens // _TOKENS_A_KIND, 2, 256)) if kinds is None else kinds
    sequence_T = np.repeat(np.arange(body.num_sequences), body.sequence_tokens_Q)
    taken_TC = _taken(body)
    kind_T = _clusters(taken_TC, wanted, generator(seed, "routing/scores/clusters"))
    count_C = np.bincount(kind_T, minlength=wanted)
    sums_CX = np.stack([taken_TC[kind_T == c].sum(0) for c in range(wanted)]).astype(np.float64)
    share_X = taken_TC.mean(0, dtype=np.float64)
    share_CX = (sums_CX + _SHRINK * share_X) / (count_C + _SHRINK)[:, None]
    next_CC = 0.5 * np.tile(count_C / tokens, (wanted, 1))
    goes_on = sequence_T[1:] == sequence_T[:-1]
    np.add.at(next_CC, (kind_T[:-1][goes_on], kind_T[1:][goes_on]), 1.0)
    share_CX = np.clip(share_CX, 0.1 / tokens, 0.99)
    spec = SyntheticScoresSpec(
        # the chance to be among those that came by time 1 is 1 - exp(-e**logit), see scores_tail.cut_time
        np.log(-np.log1p(-share_CX)).reshape(wanted, layers, experts).astype(np.float32),
        np.ones(layers), np.full(layers, 0.7), count_C / tokens, next_CC / next_CC.sum(1, keepdims=True), 0.0,
        body.top_k, max(2, round(tokens / body.num_sequences)), trace.source,
    )  # fmt: skip
    return _settle(spec, body, seed)


def _past_prefix(trace: RoutingSource) -> RoutingSource:
    assert trace.weight_TLK is not None
    prefix = stats.common_prefix(trace)
    position_T = np.arange(trace.num_tokens) - np.repeat(trace.sequence_start[:-1], trace.sequence_tokens_Q)
    sequence_T = np.repeat(np.arange(trace.num_sequences), trace.sequence_tokens_Q)
    rows = np.flatnonzero(position_T >= prefix)
    if len(rows) < 8:
        raise ValueError(f"{trace.source}: {len(rows)} tokens past the common prefix of {prefix}. Give a longer trace.")
    start = np.append(np.flatnonzero(np.diff(sequence_T[rows], prepend=-1)), len(rows)).astype(np.int64)
    return replace(
        trace, expert_TLK=trace.expert_TLK[rows], weight_TLK=trace.weight_TLK[rows], sequence_start=start,
        domain_Q=None, window_Q=None,
    )  # fmt: skip


def _taken(body: RoutingSource) -> Floats32:
    """1 where a token takes an expert, [T, L * E]."""
    out = np.zeros((body.num_tokens, body.num_layers * body.num_experts), np.float32)
    column = body.expert_TLK.astype(np.int64) + body.num_experts * np.arange(body.num_layers)[:, None]
    np.put_along_axis(out, column.reshape(body.num_tokens, -1), np.float32(1), 1)
    return out


def _clusters(taken_TC: Floats32, kinds: int, rng: np.random.Generator) -> Ints:
    """Each token's kind: k-means (Lloyd 1982) on the first principal coordinates of who takes what."""
    centred = taken_TC - taken_TC.mean(0)
    tokens, columns = centred.shape
    gram = (centred @ centred.T if columns > tokens else centred.T @ centred).astype(np.float64)
    value, vector = np.linalg.eigh(gram)
    value, vector = value[::-1][:_COORDINATES], vector[:, ::-1][:, :_COORDINATES]
    x_TF = vector * np.sqrt(np.maximum(value, 0)) if columns > tokens else centred @ vector
    centre_CF = _far_apart(x_TF, kinds, rng)
    kind_T = np.zeros(tokens, np.int64)
    for _ in range(_LLOYD):
        kind_T = ((centre_CF**2).sum(1) - 2 * x_TF @ centre_CF.T).argmin(1)
        for c in np.unique(kind_T):
            centre_CF[c] = x_TF[kind_T == c].mean(0)
    return kind_T


def _far_apart(x_TF: Floats, kinds: int, rng: np.random.Generator) -> Floats:
    """First centres: tokens drawn one after another by squared distance from those drawn (k-means++, Arthur and
    Vassilvitskii 2007)."""
    chosen = [int(rng.integers(len(x_TF)))]
    distance_T = ((x_TF - x_TF[chosen[0]]) ** 2).sum(1)
    for _ in range(kinds - 1):
        cumulative_T = np.cumsum(distance_T)
        chosen.append(min(len(x_TF) - 1, int(np.searchsorted(cumulative_T, rng.random() * cumulative_T[-1], "right"))))
        np.minimum(distance_T, ((x_TF - x_TF[chosen[-1]]) ** 2).sum(1), out=distance_T)
    out: Floats = x_TF[chosen]
    return out


def _settle(spec: SyntheticScoresSpec, body: RoutingSource, seed: int) -> SyntheticScoresSpec:
    """Popularity, contrast between kinds, repetition and temperatures, corrected by what a pool of the present ones
    shows."""
    share_LE = np.maximum(body.count_LE(), 0.25) / body.num_tokens
    goal, spread_L = float(stats.coactivation(body).mean()), _spread(body)
    near, mass_L = _neighbours(body), _mass(body)
    for turn in range(_ROUNDS):
        made = SyntheticScores(spec, body.num_tokens, seed + turn).pool()
        found_LE = np.maximum(made.count_LE(), 0.25) / body.num_tokens
        shift_LE = np.log(np.log1p(-np.minimum(share_LE, 0.99)) / np.log1p(-np.minimum(found_LE, 0.99)))
        logit_CLE = spec.logit_CLE.astype(np.float64)
        if goal > 0:
            contrast = np.clip((goal / max(float(stats.coactivation(made).mean()), 1e-3)) ** 0.5, 0.8, 1.25)
            mean_LE = np.tensordot(spec.share_C, logit_CLE, 1)
            logit_CLE = mean_LE + contrast * (logit_CLE - mean_LE)
        logit_CLE = np.clip(logit_CLE + shift_LE, -14, 4)
        found = _neighbours(made)
        spec = replace(
            spec,
            logit_CLE=logit_CLE.astype(np.float32),
            temperature_L=spec.temperature_L * spread_L / np.maximum(_spread(made), 1e-6),
            below_L=_nearer(spec, made, mass_L),
            repeat=float(np.clip(spec.repeat + near - found, 0, 0.9)),
        )
    return spec


def _neighbours(pool: RoutingSource) -> float:
    """Mean correlation of a token's experts with those of the one before; 0 where no sequence has two."""
    return float(np.nan_to_num(stats.autocorrelation(pool, [1])).mean())


def _mass(pool: RoutingSource) -> Floats:
    """Mean sum of a token's K weights, [L]."""
    assert pool.weight_TLK is not None
    out: Floats = pool.weight_TLK.astype(np.float64).sum(2).mean(0)
    return out


def _nearer(spec: SyntheticScoresSpec, made: RoutingSource, mass_L: Floats) -> Floats:
    """`below_L` moved so that the mass goes where it was recorded: the mass of what is not taken over the K's, in log,
    falls about in proportion to the mean depth of the logits below 0."""
    found_L = _mass(made)
    odds_L = np.log((1 - found_L) / found_L) - np.log(np.maximum(1 - mass_L, 1e-3) / np.maximum(mass_L, 1e-3))
    if spec.below_L.shape != odds_L.shape or not np.isfinite(odds_L).all():
        return spec.below_L
    # a depth d costs temperature * d of log probability; tails of a few units are drawn together by half of that
    out: Floats = np.clip(spec.below_L * np.exp(0.5 * odds_L / np.maximum(spec.temperature_L, 0.1)), 0.05, 2.0)
    return out


def _spread(pool: RoutingSource) -> Floats:
    """Mean log of highest over lowest recorded weight, [L]."""
    assert pool.weight_TLK is not None
    weight: NDArray[Any] = np.maximum(pool.weight_TLK.astype(np.float32), np.float32(2.0**-25))
    out: Floats = np.log(weight.max(2) / weight.min(2)).mean(0).astype(np.float64)
    return out
