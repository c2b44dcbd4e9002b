"""Router scores over a training run: popularity, how even it is, and temperature change with progress.

After "Three Phases of Expert Routing" (arXiv:2604.04230, abstract), which fits a congestion coefficient gamma_eff to
the load of checkpoints of OLMoE-1B-7B: it surges from 14 to 36-39 (steps 30K-40K of 1.2M), is stable while experts
specialise (100K-400K) and relaxes from 27 to 9 by the end; more gamma is more even a load. The formula of that fit
could not be read, so this is a *reconstruction*: the load m of a layer is the equilibrium of a congestion game,

    log m_e + gamma * m_e = q_e + constant,

whose deviations from an even load are those of a softmax of temperature 1 + gamma / E (hence "reduces to a
temperature-scaled softmax"). gamma is an input, not a prediction. The qualities q turn with progress (which experts
are popular drifts); tokens have features of their own, which no bias an expert can remove.

Legend: L MoE layers, E experts, K experts a token, F features, N rows asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.rng import generator
from moesim.spec import Spec
from moesim.workload.scores_tail import salt, uniform

__all__ = ["TrainingScores", "TrainingScoresSpec", "congestion_load", "fitted_gamma", "gamma_eff"]

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]

_STEPS = (0.0, 30e3, 35e3, 40e3, 400e3, 1200e3)
_GAMMA = (14.0, 36.0, 39.0, 36.0, 27.0, 9.0)
"""arXiv:2604.04230, abstract: 14 at first, a peak of 36-39 at steps 30K-40K, 27 at 400K, 9 at 1.2M; straight lines
between (ours)"""
_GRID = 32
_SAMPLE = 1024


class TrainingScoresSpec(Spec):
    """How scores of a training run are made.

    quality_spread: standard deviation over experts of the qualities q. drift: turns of the popularity over the run;
    after a quarter turn it is unrelated to the start's. feature_spread: standard deviation of a token's own
    preferences, in units of the noise; features: their number. sequence_tokens, sequence_share: rows this many in a row
    are a sequence, and this share of a feature's variance is common to it. temperature_start, temperature_end:
    factor on the logits (times scale), straight between: routers start flat (ours). scale, noise: factors on all logits
    and on their Gumbel noise.
    """

    quality_spread: float = Field(default=0.8, ge=0, le=4)
    drift: float = Field(default=0.25, ge=0, le=100)
    features: int = Field(default=8, ge=0, le=64)
    feature_spread: float = Field(default=0.7, ge=0, le=4)
    sequence_tokens: int = Field(default=512, ge=1)
    sequence_share: float = Field(default=0.2, ge=0, le=1)
    temperature_start: float = Field(default=0.2, gt=0, le=20)
    temperature_end: float = Field(default=0.55, gt=0, le=20)
    scale: float = Field(default=1.0, gt=0, le=20)
    noise: float = Field(default=1.0, gt=0, le=20)


def gamma_eff(progress: float) -> float:
    """The congestion coefficient at this share of the run: 14 -> 36-39 -> 27 -> 9."""
    return float(np.interp(progress * _STEPS[-1], _STEPS, _GAMMA))


def congestion_load(quality_LE: Floats, gamma: float) -> Floats:
    """Loads m [L, E], rows adding up to 1, with log m + gamma * m = quality + constant in each row.

    For a constant c each expert's m solves m * exp(gamma * m) = exp(q + c), by Newton's steps on log m (the left side
    increases); c by bisection on the sum of m.
    """
    quality_LE = quality_LE - quality_LE.max(1, keepdims=True)
    low = np.full((len(quality_LE), 1), -30.0)
    high = np.full((len(quality_LE), 1), gamma + 1.0)
    log_m = quality_LE + low
    for _ in range(60):
        middle = (low + high) / 2
        log_m = np.minimum(quality_LE + middle, 0.0)
        for _ in range(12):
            m = np.exp(log_m)
            log_m = log_m - (log_m + gamma * m - quality_LE - middle) / (1 + gamma * m)
        above = np.exp(log_m).sum(1, keepdims=True) > 1
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    out: Floats = np.exp(log_m)
    out /= out.sum(1, keepdims=True)
    return out


def fitted_gamma(load_LE: Floats, quality_LE: Floats) -> float:
    """The gamma of loads: least squares of quality - log(load) = gamma * load + a constant a layer."""
    y = quality_LE - np.log(load_LE)
    x = load_LE - load_LE.mean(1, keepdims=True)
    return float((x * (y - y.mean(1, keepdims=True))).sum() / (x * x).sum())


class TrainingScores:
    """A `ScoreModel` for any rows (from 0): row r is the r-th token of an endless stream, place
    r mod sequence_tokens of its sequence."""

    def __init__(self, spec: TrainingScoresSpec, num_layers: int, num_experts: int, top_k: int, seed: int) -> None:
        if not 1 <= top_k <= num_experts or num_layers < 1:
            raise ValueError(f"1 to {num_experts} experts a token and a layer, got {top_k} and {num_layers}")
        self.spec, self.seed, self.top_k = spec, seed, top_k
        self.num_layers, self.num_experts = num_layers, num_experts
        self.name = "training scores"
        self.assumed = (
            "All scores are drawn: evenness of the load after arXiv:2604.04230 (a reconstruction), drift, features and"
            " temperatures by assumption."
        )
        rng = generator(seed, "routing/scores/training")
        self._quality_2LE = rng.standard_normal((2, num_layers, num_experts))
        loading = rng.standard_normal((num_layers, spec.features, num_experts))
        self._loading_LFE = (loading * (spec.feature_spread / max(1, spec.features) ** 0.5)).astype(np.float32)
        self._bias: dict[tuple[int, int], Floats32] = {}
        self._load: dict[float, Floats] = {}
        self._middle: dict[int, tuple[Floats32, Floats]] = {}

    def quality_LE(self, progress: float) -> Floats:
        """Qualities q: two fixed draws, turned into each other."""
        turn = 2 * np.pi * self.spec.drift * progress
        first, second = self._quality_2LE
        q_LE = np.cos(turn) * first + np.sin(turn) * second
        out: Floats = self.spec.quality_spread * (q_LE - q_LE.mean(1, keepdims=True))
        return out

    def load_LE(self, progress: float) -> Floats:
        """The expected share of a layer's choices that each expert has, [L, E], without any balancing."""
        if progress not in self._load:
            self._load[progress] = congestion_load(self.quality_LE(progress), gamma_eff(progress))
        return self._load[progress]

    def temperature(self, progress: float) -> float:
        """Factor on the logits: the higher, the sharper a token's softmax; the choice does not depend on it."""
        start, end = self.spec.temperature_start, self.spec.temperature_end
        return self.spec.scale * (start + (end - start) * min(max(progress, 0.0), 1.0))

    def scores(self, rows_N: Ints, layer: int, progress: float = 1.0) -> Floats32:
        """Logits [N, E]; see `moesim.workload.scores.ScoreModel.scores`. Raises IndexError for a negative row or a
        layer that is not there."""
        rows = np.asarray(rows_N, np.int64)
        if not 0 <= layer < self.num_layers or (rows.size and rows.min() < 0):
            raise IndexError(f"rows must not be negative and layers lie in 0..{self.num_layers - 1}, layer {layer}")
        uniform_NE = uniform(salt(self.seed, "routing/scores/training", layer), rows, self.num_experts)
        out_NE: Floats32 = np.log(-np.log(uniform_NE)) * np.float32(-self.spec.noise)
        out_NE += self._bias_E(layer, progress)
        for x_N, loading_E in zip(self._features(rows), self._loading_LFE[layer], strict=True):
            out_NE += x_N[:, None] * loading_E  # not a matrix product, whose rounding depends on the number of rows
        out_NE *= np.float32(self.temperature(progress))
        return out_NE

    def _features(self, rows_N: Ints) -> Floats32:
        """[F, N], the same in all layers: normal, a share common to a row's sequence."""
        own = _normal(salt(self.seed, "routing/scores/token", 0), rows_N, self.spec.features)
        common = _normal(
            salt(self.seed, "routing/scores/sequence", 0), rows_N // self.spec.sequence_tokens, self.spec.features
        )
        share = self.spec.sequence_share
        out: Floats32 = (np.float32((1 - share) ** 0.5) * own + np.float32(share**0.5) * common).T
        return np.ascontiguousarray(out)

    def _bias_E(self, layer: int, progress: float) -> Floats32:
        """The constant part of an expert's logits: straight between 33 points of the run."""
        at = min(max(float(progress), 0.0), 1.0) * _GRID
        point = min(int(at), _GRID - 1)
        share = np.float32(at - point)
        out: Floats32 = (1 - share) * self._settled(layer, point) + share * self._settled(layer, point + 1)
        return out

    def _settled(self, layer: int, point: int) -> Floats32:
        """Biases with which the expected inclusion is K times the load (at most 0.98).

        A token takes e with chance 1 - exp(-exp(bias + preference + cut)), all in units of the noise, its cut such that
        K are expected; biases are settled on a sample of tokens, in full at the middle of the run and from there on
        (not from the last point asked for: that would make results depend on the order of calls).
        """
        key = (layer, point)
        if key not in self._bias:
            if layer not in self._middle:
                goal_E = _spread_over(self.load_LE(0.5)[layer], self.top_k)
                rows = generator(self.seed, "routing/scores/sample").integers(0, 1 << 40, _SAMPLE)
                taste_NE = (self._features(rows).T @ self._loading_LFE[layer]) / np.float32(self.spec.noise)
                start_E = _log_rate(goal_E)
                self._middle[layer] = (taste_NE, _settle(taste_NE, start_E, goal_E, self.top_k, 16) - start_E)
            taste_NE, more_E = self._middle[layer]
            goal_E = _spread_over(self.load_LE(point / _GRID)[layer], self.top_k)
            bias_E = _settle(taste_NE, _log_rate(goal_E) + more_E, goal_E, self.top_k, 5)
            self._bias[key] = (bias_E * self.spec.noise).astype(np.float32)
        return self._bias[key]


def _log_rate(share_E: Floats) -> Floats:
    out: Floats = np.log(-np.log1p(-share_E))
    return out


def _spread_over(load_E: Floats, top_k: int) -> Floats:
    """Chances of inclusion K * load, those over 0.98 cut there and the rest raised in proportion."""
    goal_E = np.minimum(load_E * top_k, 0.98)
    for _ in range(20):
        free = goal_E < 0.98
        lack = top_k - goal_E.sum()
        if lack < 1e-9 or not free.any():
            break
        goal_E[free] *= 1 + lack / goal_E[free].sum()
        np.minimum(goal_E, 0.98, out=goal_E)
    return goal_E


def _settle(taste_NE: Floats32, start_E: Floats, goal_E: Floats, top_k: int, rounds: int) -> Floats:
    """Biases with mean inclusion `goal_E` over tokens, each token's cut such that its inclusions add up to K: Newton's
    steps on both in turn."""
    if top_k >= len(goal_E):
        return np.zeros(len(goal_E))
    bias_E: Any = start_E.copy()
    cut_N1 = np.zeros((len(taste_NE), 1), np.float32)
    for _ in range(rounds):
        for over in (1, 0):
            rate_NE = np.exp(np.clip(taste_NE + bias_E.astype(np.float32) + cut_N1, -30, 8))
            left_NE = np.exp(-rate_NE)
            rate_NE *= left_NE
            if over == 1:
                lack_N1 = (1 - left_NE).sum(1, keepdims=True) - top_k
                cut_N1 -= np.clip(lack_N1 / np.maximum(rate_NE.sum(1, keepdims=True), 1e-9), -1, 1)
            else:
                lack_E = (1 - left_NE).mean(0) - goal_E
                bias_E -= np.clip(lack_E / np.maximum(rate_NE.mean(0), 1e-9), -1, 1)
    out: Floats = bias_E
    return out


def _normal(key: np.uint64, rows_N: Ints, columns: int) -> Floats32:
    """Standard normal, float32 [N, columns] (Box and Muller 1958), a hash as `uniform` is."""
    half = -(-columns // 2)
    u = uniform(key, rows_N, 2 * half)
    radius = np.sqrt(np.float32(-2) * np.log(u[:, :half]))
    angle = np.float32(2 * np.pi) * u[:, half:]
    out: Floats32 = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :columns]
    return out
