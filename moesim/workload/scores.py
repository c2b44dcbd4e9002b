"""Scores (a router's logits) for the tokens of a pool, because a routing policy chooses by scores and traces hold the
top K alone.

- `RecordedScores`: a trace with gate weights. The K recorded scores are exact (logarithms of the weights, up to a
  constant a token); those below the K-th are drawn from a fitted model (`scores_tail`), always strictly below it.
- `DrawnScores`: ids without weights (a trace without, a synthetic pool): the recorded experts are the K highest, all
  scores are drawn.

A score is a pure function of (seed, row, layer). What is assumed stands in `assumed`, and a result that depends on it
is to be shown under both tail models. Legend: T tokens, L MoE layers, E experts, K experts a token, N rows asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.errors import BadInput, Problem
from moesim.spec import Spec
from moesim.workload.pool import RoutingSource
from moesim.workload.scores_tail import (
    FIT_TOKENS,
    GumbelTail,
    SpacedTail,
    cut_time,
    faded,
    fit_spacing,
    hill,
    salt,
    tail_scale,
    uniform,
)  # fmt: skip

__all__ = ["AsChosen", "DrawnScores", "RecordedScores", "ScoreModel", "ScoreSpec", "WholeScores", "score_model"]

Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Scoring = Literal["softmax", "sigmoid"]

DEFAULT_TEMPERATURE = 0.55
"""Of the Gumbel noise where no gate weights tell: with it drawn scores have the spread between ranks 1 and 6 of ESFT's
DeepSeek-V2-Lite trace (intent, mean of 26 layers), benchmarks/routing/fit_scores.py."""
TOP_SIGMOID = 0.8
"""Assumed: the sigmoid of a token's highest score where sigmoid gates were recorded normalised, so that their level is
lost."""
_LEAST_WEIGHT = 2.0**-25
"""Below the smallest float16; stands for a weight that was stored as 0"""
_LEAST_MASS = 1e-5
_WHOLE = 2e-2
"""Sums of K float16 weights that lie this near to each other (relative) are normalised."""
DEFAULT_FADE = 0.45
"""Exponent on the popularity below the K-th where recorded ids have no weights: what `scores_tail.tail_scale` finds in
the same trace"""
_LATEST = 1e6
"""Stands for a time that never comes (all experts are taken)"""
_CACHE_BYTES = 256 << 20
_BLOCK_CELLS = 1 << 20
"""Scores worked on at once: their arrays stay in cache"""


class ScoreModel(Protocol):
    """Router logits for rows of a pool."""

    name: str
    """for reports, such as "trace + gumbel tail" """
    assumed: str
    """"" or one sentence: what part of the scores is assumed"""
    num_experts: int
    num_layers: int

    def scores(self, rows_N: Ints, layer: int, progress: float = 1.0) -> Floats32:
        """Logits [N, E], finite; a pure function of (seed, row, layer, progress): the same row gives the same scores in
        any batch and order."""
        ...


class ScoreSpec(Spec):
    """`routing.scores:` of a scenario: how scores that no trace holds are made.

    model: `gumbel` (popularity and Gumbel noise) or `spaced` (the recorded ranks' spacing goes on, experts in random
    order) below a token's K-th; or `generator`, which is fitted to the trace and draws 8,192 tokens of its own in its
    place. temperature: of the Gumbel noise, or the scale of the spacing; none: fitted to the trace, 0.55 where there
    are no weights. popularity: exponent on the fitted popularity of the `gumbel` model, 0: all experts alike.
    """

    model: Literal["gumbel", "spaced", "generator"] = "gumbel"
    temperature: float | None = Field(default=None, ge=0.2, le=20)
    popularity: float = Field(default=1.0, ge=0, le=4)


def score_model(
    source: RoutingSource, spec: ScoreSpec, seed: int, norm_topk_prob: bool, scoring: Scoring = "softmax"
) -> ScoreModel:
    """The model of `source`'s scores; `norm_topk_prob`, `scoring`: of the router whose gate weights it holds.

    Raises BadInput for a source without layers or with more ids a token than experts.
    """
    if not source.num_layers or not source.top_k or source.top_k > source.num_experts:
        raise BadInput(
            Problem(
                "routing.scores",
                f"scores need at least one layer and 1 to E experts a token, but {source.source} has"
                f" {source.num_layers} layers and {source.top_k} of {source.num_experts} experts. Use another pool.",
            )
        )
    if source.score_TLE is not None:
        return WholeScores(source, spec, seed)
    if source.weight_TLK is None:
        return DrawnScores(source, spec, seed, scoring)
    return RecordedScores(source, spec, seed, norm_topk_prob, scoring)


@dataclass(slots=True)
class _Layer:
    """One layer of a trace, most wanted expert first: ids, logits of the K, and the tail's mass over the K-th's
    probability (None: not known)."""

    expert_TK: Ints
    score_TK: Floats32
    ratio_T: Floats32 | None
    tail: GumbelTail | SpacedTail


class _Pool:
    """Layers made when first asked for; scores of whole layers kept while they take at most _CACHE_BYTES."""

    name: str
    assumed: str

    def __init__(self, source: RoutingSource, spec: ScoreSpec, seed: int) -> None:
        self.source, self.spec, self.seed = source, spec, seed
        self.num_experts, self.num_layers = source.num_experts, source.num_layers
        self._layers: dict[int, Any] = {}
        self._kept: dict[int, Floats32] = {}

    def scores(self, rows_N: Ints, layer: int, progress: float = 1.0) -> Floats32:
        """See `ScoreModel.scores`; `progress` is not looked at. Raises IndexError for a row or layer that is not
        there."""
        rows = np.asarray(rows_N, np.int64)
        tokens = self.source.num_tokens
        if not 0 <= layer < self.num_layers or (rows.size and not 0 <= rows.min() <= rows.max() < tokens):
            raise IndexError(f"rows must lie in 0..{tokens - 1} and layers in 0..{self.num_layers - 1}, layer {layer}")
        if layer in self._kept:
            return self._kept[layer][rows]
        whole_bytes = 4 * tokens * self.num_experts
        if len(rows) >= tokens // 4 and whole_bytes * (len(self._kept) + 1) <= _CACHE_BYTES:
            self._kept[layer] = self._blocks(np.arange(tokens), layer)
            return self._kept[layer][rows]
        return self._blocks(rows, layer)

    def _blocks(self, rows_N: Ints, layer: int) -> Floats32:
        size = max(1, _BLOCK_CELLS // (4 * self.num_experts))
        out = np.empty((len(rows_N), self.num_experts), np.float32)
        for at in range(0, len(rows_N), size):
            out[at : at + size] = self._make(rows_N[at : at + size], layer)
        return out

    def _make(self, rows_N: Ints, layer: int) -> Floats32:
        raise NotImplementedError


class WholeScores(_Pool):
    """Scores of a trace that holds all of them: nothing is assumed."""

    assumed = ""

    def __init__(self, source: RoutingSource, spec: ScoreSpec, seed: int) -> None:
        super().__init__(source, spec, seed)
        if source.score_TLE is None:
            raise ValueError(f"{source.source} has no scores")
        self.name = "recorded scores"
        self._score_TLE = source.score_TLE

    def _make(self, rows_N: Ints, layer: int) -> Floats32:
        return np.asarray(self._score_TLE[rows_N, layer], np.float32)


class RecordedScores(_Pool):
    """Scores of a trace with gate weights.

    Softmax weights that do not add up to 1 are probabilities over all experts: the scores are their logarithms and the
    softmax of a token's scores gives the weights back, because the tail carries the rest of the probability. Normalised
    (or scaled) weights leave the tail's mass open, and the fitted model gives it. With sigmoid scoring a score is the
    logit of the weight; where weights are normalised, the highest score of a token is assumed (`TOP_SIGMOID`).

    A trace whose router chose by scores plus a bias, or within groups, may have left out experts of higher score; the
    scores here are those of a router that would choose the same experts without.
    """

    def __init__(
        self, source: RoutingSource, spec: ScoreSpec, seed: int, norm_topk_prob: bool, scoring: Scoring = "softmax"
    ) -> None:
        super().__init__(source, spec, seed)
        if source.weight_TLK is None:
            raise ValueError(f"{source.source} has no gate weights")
        self.scoring = scoring
        self.whole = _are_probabilities(source.weight_TLK, norm_topk_prob, scoring)
        """the weights are probabilities (or sigmoids) as the router made them, not normalised"""
        self.name = f"trace + {spec.model} tail"
        self.assumed = f"Scores below each token's {source.top_k}-th are drawn from a fitted {spec.model} model" + (
            "."
            if self.whole
            else ", and the level of all of them, because the trace holds normalised weights."
            if scoring == "sigmoid"
            else ", and so is their share of the probability, because the trace holds normalised weights."
        )

    def _layer(self, layer: int) -> _Layer:
        if layer not in self._layers:
            self._layers[layer] = self._read(layer)
        made: _Layer = self._layers[layer]
        return made

    def _read(self, layer: int) -> _Layer:
        assert self.source.weight_TLK is not None
        expert_TK = self.source.expert_TLK[:, layer].astype(np.int64)
        weight_TK = np.maximum(self.source.weight_TLK[:, layer].astype(np.float32), np.float32(_LEAST_WEIGHT))
        # most wanted first, the lowest id first among equals
        order_TK = np.lexsort((expert_TK, -weight_TK), axis=-1)
        expert_TK = np.take_along_axis(expert_TK, order_TK, 1)
        weight_TK = np.take_along_axis(weight_TK, order_TK, 1)
        ratio_T = None
        if self.scoring == "sigmoid":
            level = 1.0 if self.whole else TOP_SIGMOID / weight_TK[:, :1]
            gate_TK = np.minimum(weight_TK * level, np.float32(1 - 2.0**-12))
            score_TK = np.log(gate_TK) - np.log1p(-gate_TK)
        else:
            score_TK = np.log(weight_TK)
            if self.whole:
                ratio_T = np.maximum(1 - weight_TK.sum(1), np.float32(_LEAST_MASS)) / weight_TK[:, -1]
        tail = _fit_tail(expert_TK, score_TK, self.num_experts, self.spec)
        return _Layer(expert_TK, score_TK.astype(np.float32), ratio_T, tail)

    def _make(self, rows_N: Ints, layer: int) -> Floats32:
        made = self._layer(layer)
        taken_NK, top_NK = made.expert_TK[rows_N], made.score_TK[rows_N]
        if taken_NK.shape[1] == self.num_experts:
            out_NE = np.empty((len(rows_N), self.num_experts), np.float32)
        else:
            noise = uniform(salt(self.seed, "routing/scores", layer), rows_N, self.num_experts)
            depth_NE = made.tail.depths(noise, taken_NK, None if made.ratio_T is None else made.ratio_T[rows_N])
            out_NE = _below(top_NK[:, -1:], depth_NE)
        np.put_along_axis(out_NE, taken_NK, top_NK, 1)
        return out_NE


class DrawnScores(_Pool):
    """Scores where only the ids are known: Plackett-Luce logits given that the recorded experts are the K highest.

    Expert e arrives at an exponential time of rate v_e (its popularity in the layer); the recorded K come first and in
    an order that is drawn too, the others after the K-th; a score is -temperature * log(time). With the `spaced` model
    the tail is that of `scores_tail.SpacedTail`.
    """

    def __init__(self, source: RoutingSource, spec: ScoreSpec, seed: int, scoring: Scoring = "softmax") -> None:
        super().__init__(source, spec, seed)
        self.scoring = scoring
        self.temperature = DEFAULT_TEMPERATURE if spec.temperature is None else spec.temperature
        self.name = f"ids + drawn scores, {spec.model} tail"
        self.assumed = (
            f"All scores are drawn (temperature {self.temperature:g}), only the chosen experts are those of the pool."
        )

    def _layer(self, layer: int) -> tuple[NDArray[np.float64], float, GumbelTail | SpacedTail]:
        if layer not in self._layers:
            count_E = np.bincount(self.source.expert_TLK[:, layer].ravel(), minlength=self.num_experts)
            share_E = np.clip((count_E + 0.5) / (self.source.num_tokens + 1), 1e-6, 1 - 1e-3)
            # the chance that e is among those that came by time 1 is its share: 1 - exp(-v) = share
            scale_E = (-np.log1p(-share_E)) ** self.spec.popularity
            # given the time of the first arrival after the K, the K came at any time before it
            cut = min(cut_time(scale_E, self.source.top_k + 1), _LATEST)
            tail_E = faded(scale_E, DEFAULT_FADE, cut) if self.source.recorded and cut < _LATEST else scale_E
            tail: GumbelTail | SpacedTail = GumbelTail(tail_E, self.temperature, cut)
            if self.spec.model == "spaced":
                tail = SpacedTail(self.temperature, 1.0, self.source.top_k)
            self._layers[layer] = (scale_E, cut, tail)
        made: tuple[NDArray[np.float64], float, GumbelTail | SpacedTail] = self._layers[layer]
        return made

    def _make(self, rows_N: Ints, layer: int) -> Floats32:
        scale_E, cut, tail = self._layer(layer)
        taken_NK = self.source.expert_TLK[rows_N, layer].astype(np.int64)
        noise_NE = uniform(salt(self.seed, "routing/scores", layer), rows_N, self.num_experts)
        scale_NK = scale_E.astype(np.float32)[taken_NK]
        # an exponential time given that it lies before the cut: -log(1 - u (1 - exp(-v cut))) / v
        early_NK = np.take_along_axis(noise_NE, taken_NK, 1) * np.expm1(-scale_NK * np.float32(cut))
        time_NK = np.maximum(-np.log1p(early_NK) / scale_NK, np.float32(1e-30))
        score_NK = np.float32(-self.temperature) * np.log(time_NK)
        if taken_NK.shape[1] == self.num_experts:
            out_NE = np.empty((len(rows_N), self.num_experts), np.float32)
        else:
            depth_NE = tail.depths(noise_NE, taken_NK, None, time_NK.max(1))
            out_NE = _below(score_NK.min(1, keepdims=True), depth_NE)
        np.put_along_axis(out_NE, taken_NK, score_NK, 1)
        return out_NE


class AsChosen:
    """Recorded scores of a router that chose the recorded experts by them alone. A trace holds logits without the bias
    (or the groups) that its router selected by, too; experts that it took in spite of lower logits are raised just
    above the best of those that it left."""

    def __init__(self, source: RoutingSource, inner: WholeScores) -> None:
        self.source, self.inner = source, inner
        self.name, self.num_experts, self.num_layers = inner.name, inner.num_experts, inner.num_layers
        rows = np.unique(np.linspace(0, source.num_tokens - 1, min(source.num_tokens, 256)).astype(np.int64))
        differ = any((self.scores(rows, layer) != inner.scores(rows, layer)).any() for layer in range(self.num_layers))
        self.assumed = (
            "The recorded router chose by more than its recorded scores (a bias, or groups), so those of its choices "
            "that others exceed are raised above them."
            if differ
            else inner.assumed
        )

    def scores(self, rows_N: Ints, layer: int, progress: float = 1.0) -> Floats32:
        """See `ScoreModel.scores`."""
        rows = np.asarray(rows_N, np.int64)
        out_NE = np.pad(self.inner.scores(rows, layer, progress), ((0, 0), (0, 1)), constant_values=-np.inf)
        taken_NK = np.minimum(self.source.expert_TLK[rows, layer].astype(np.int64), self.num_experts)
        left_NE = out_NE.copy()
        np.put_along_axis(left_NE, taken_NK, np.float32(-np.inf), 1)
        edge_N1 = np.nextafter(left_NE.max(axis=1, keepdims=True), np.float32(np.inf))
        raised_NK = np.maximum(np.take_along_axis(out_NE, taken_NK, 1), edge_N1)
        np.put_along_axis(out_NE, taken_NK, raised_NK, 1)
        return np.ascontiguousarray(out_NE[:, :-1])


def _below(edge_N1: Floats32, depth_NE: Floats32) -> Floats32:
    """Scores `depth_NE` below the edge: strictly, whatever rounding does, and finite."""
    out_NE = edge_N1 - np.minimum(depth_NE, np.float32(1e3))
    np.minimum(out_NE, np.nextafter(edge_N1, np.float32(-np.inf)), out=out_NE)
    return out_NE


def _are_probabilities(weight_TLK: NDArray[np.float16], norm_topk_prob: bool, scoring: Scoring) -> bool:
    """Whether weights are as the router's softmax or sigmoid made them: not one sum for all tokens, nor more than
    that allows."""
    tokens, _, top_k = weight_TLK.shape
    if not tokens:
        return not norm_topk_prob
    rows = np.unique(np.linspace(0, tokens - 1, min(tokens, FIT_TOKENS // 8)).astype(np.int64))
    some = weight_TLK[rows].astype(np.float32)
    sum_TL = some.sum(2)
    if sum_TL.max() - sum_TL.min() <= _WHOLE * sum_TL.max():
        # one token's sum, or top_k 1: nothing but the model's flag tells, and a sum of 1 leaves no tail
        return not norm_topk_prob and bool(sum_TL.max() < 1 - _WHOLE)
    if scoring == "sigmoid":
        return bool(some.max() <= 1)
    return bool(sum_TL.max() <= 1 + 1e-3 * top_k)


def _fit_tail(expert_TK: Ints, score_TK: Floats32, num_experts: int, spec: ScoreSpec) -> GumbelTail | SpacedTail:
    """The tail model of one layer, fitted to its ids and scores, most wanted first."""
    tokens, top_k = expert_TK.shape
    if spec.model == "gumbel":
        temperature = spec.temperature
        if temperature is None:
            known = float(hill(score_TK).mean()) if top_k > 1 and tokens else DEFAULT_TEMPERATURE
            temperature = float(np.clip(known, 0.2, 20.0))
        scale_E, cut = tail_scale(expert_TK, num_experts)
        if spec.popularity != 1.0 and np.isfinite(cut):
            scale_E = faded(scale_E, spec.popularity, cut)
        return GumbelTail(scale_E, temperature, cut)
    scale, power = fit_spacing(score_TK) if top_k > 1 and tokens else (DEFAULT_TEMPERATURE, 1.0)
    return SpacedTail(scale if spec.temperature is None else spec.temperature, power, top_k)
