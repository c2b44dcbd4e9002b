"""Scores below the K-th, which traces do not hold: two models that differ in kind, and where their numbers come from.

Both give each expert that a token did not take a *depth* > 0, how far its log-probability lies below the K-th's, as a
function of uniform noise keyed by (seed, layer, row, expert). Where the tail's probability mass is known, one number a
token moves the depths until the tail carries it.

- `GumbelTail`: log-probabilities are temperature * (popularity + Gumbel noise), given that they lie below the K-th
  (Plackett-Luce: Plackett 1975, Luce 1959). Popular experts come out nearer to the K-th.
- `SpacedTail`: the curve of log-probability over rank that the K recorded ranks have goes on; which expert has which
  rank is random, popularity plays no part.

Legend: T tokens, E experts, K experts a token, N rows asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.rng import generator
from moesim.workload.replay import _splitmix64

__all__ = [
    "GumbelTail", "SpacedTail", "choice_fade", "choice_scale", "cut_time", "faded", "fit_spacing", "hill", "salt",
    "tail_scale", "uniform",
]  # fmt: skip

Floats32 = NDArray[np.float32]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FIT_TOKENS = 8192
"""Tokens a fit looks at: evenly spaced over the pool."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 30
_NEWTON = 5
"""After four steps the mass of ESFT's tails is right to 3e-7 of the whole; the fifth is for the
extremes. The number is fixed, so that a row's scores do not depend on its batch."""
_FADE_STEPS = 6
_FAR = np.float32(80.0)
"""exp of more is not needed: exp(-80) is 0 next to any probability"""
_START_ROWS = 128
_MOST_SHARE = 0.99
"""The tail carries at most this share of what it would if all its experts stood at the K-th's probability."""
_LEAST = 1e-4


def salt(seed: int, component: str, layer: int) -> np.uint64:
    """The key of a layer's noise."""
    return np.uint64(generator(seed, component, layer).integers(0, 1 << 63, dtype=np.int64))


def uniform(key: np.uint64, rows_N: Ints, columns: int) -> Floats32:
    """Uniform in (0, 1), float32 [N, columns]: a hash of (`key`, row, column), so that a row's numbers do not depend
    on the others. Two 23-bit numbers a SplitMix64 output (Steele, Lea, Flood, OOPSLA'14)."""
    state = rows_N.astype(np.uint64)
    state *= _GOLDEN
    state += key
    state = _splitmix64(state)
    words = state[:, None] + np.arange(1, columns // 2 + columns % 2 + 1, dtype=np.uint64) * _GOLDEN
    bits = _splitmix64(words).view(np.uint32)[:, :columns]
    bits = bits >> np.uint32(9)
    out = bits.astype(np.float32)
    out += np.float32(0.5)
    out *= np.float32(2.0**-23)
    return out


# ------------------------------------------------------------------------------------------------------- fits


def _some(tokens: int) -> Ints:
    return np.unique(np.linspace(0, tokens - 1, min(tokens, FIT_TOKENS)).astype(np.int64))


def choice_scale(expert_TK: NDArray[Any], num_experts: int, first: int = 0) -> Floats:
    """Plackett-Luce weights v [E], mean 1: the chance of an expert to come next is v over the sum of those not taken.

    expert_TK: most wanted first; choices from rank `first` (from 0) on are looked at, as those nearest to the tail.
    Maximum likelihood by Hunter's minorise-maximise steps (Annals of Statistics 32, 2004, eq. 30); half a choice is
    added to each expert, so that none is impossible.
    """
    id_TK = expert_TK[_some(len(expert_TK))].astype(np.int64) if len(expert_TK) else np.zeros((0, 1), np.int64)
    tokens = len(id_TK)
    won_E = np.bincount(id_TK[:, first:].ravel(), minlength=num_experts) + 0.5
    v_E: Floats = won_E / won_E.mean()
    for _ in range(_ROUNDS):
        taken_TK = np.cumsum(v_E[id_TK], axis=1)
        left_TK = v_E.sum() - np.concatenate([np.zeros((tokens, 1)), taken_TK[:, :-1]], axis=1)
        turn_TK = 1.0 / np.maximum(left_TK, 1e-12)
        turn_TK[:, :first] = 0.0
        # an expert taken at rank i is not there at the ranks after i
        missed_TK = turn_TK[:, ::-1].cumsum(1)[:, ::-1] - turn_TK
        missed_E = np.bincount(id_TK.ravel(), missed_TK.ravel(), minlength=num_experts)
        prior = 0.5 * num_experts / v_E.sum()
        new_E = won_E / (turn_TK.sum() - missed_E + prior)
        new_E /= new_E.mean()
        done = float(np.abs(np.log(new_E / v_E)).max()) < 1e-4
        v_E = new_E
        if done:
            break
    return v_E


def choice_fade(expert_TK: NDArray[Any], scale_E: Floats) -> Floats:
    """Exponents [K]: at rank j experts come with chances in proportion to v**exponent_j. Maximum likelihood, a rank by
    itself (Newton's steps from 1).

    They fall from rank to rank in recorded traces: a token that has not taken a popular expert so far is one that does
    not want it. 1 where the scales are all alike.
    """
    id_TK = expert_TK[_some(len(expert_TK))].astype(np.int64)
    log_E = np.log(scale_E)
    out = np.ones(id_TK.shape[1])
    for j in range(len(out)):
        gain = float(log_E[id_TK[:, j]].sum())
        for _ in range(_FADE_STEPS):
            weight_E = np.exp(out[j] * log_E)
            sums = []
            for power in range(3):
                term_E = weight_E * log_E**power
                sums.append(term_E.sum() - term_E[id_TK[:, :j]].sum(1))
            mean_T = sums[1] / sums[0]
            variance = float(np.sum(sums[2] / sums[0] - mean_T**2))
            if variance < 1e-9 * max(1, len(id_TK)):
                break
            out[j] = np.clip(out[j] + np.clip((gain - mean_T.sum()) / variance, -0.5, 0.5), -1.0, 3.0)
    return out


def tail_scale(expert_TK: NDArray[Any], num_experts: int) -> tuple[Floats, float]:
    """Plackett-Luce weights of the experts below the K-th [E], and the `cut_time` of the K-th.

    The exponents' straight line over ranks 1 .. K is followed to rank K + K / 3 (0.1 to 1 there), and the scale keeps
    the rate with which experts come just after the K-th. expert_TK: most wanted first.
    """
    top_k = expert_TK.shape[1]
    scale_E = choice_scale(expert_TK, num_experts)
    cut = cut_time(scale_E, top_k)
    if top_k < 2 or top_k >= num_experts or not len(expert_TK):
        return scale_E, cut
    fade_K = choice_fade(expert_TK, scale_E)
    slope, level = np.polyfit(np.arange(1, top_k + 1), fade_K, 1)
    fade = float(np.clip(level + slope * (top_k + max(1.0, top_k / 3)), 0.1, 1.0))
    return faded(scale_E, fade, cut), cut


def faded(scale_E: Floats, fade: float, cut: float) -> Floats:
    """scale**fade, with the same total rate of those that have not come by the cut."""
    left_E = np.exp(-scale_E * cut)
    out_E: Floats = scale_E**fade
    out_E *= (scale_E * left_E).sum() / (out_E * left_E).sum()
    return out_E


def cut_time(scale_E: Floats, top_k: int) -> float:
    """t with sum_e 1 - exp(-v_e t) = K: until then K arrivals are expected, when expert e arrives at rate v_e.

    Taking experts by time of arrival is Plackett-Luce, and -log(time) is log v + Gumbel noise.
    """
    if top_k >= len(scale_E):
        return float("inf")
    lo, hi = -60.0, 60.0
    for _ in range(80):
        mid = (lo + hi) / 2
        lo, hi = (lo, mid) if -np.expm1(-scale_E * np.exp(mid)).sum() > top_k else (mid, hi)
    return float(np.exp((lo + hi) / 2))


def hill(log_TK: NDArray[Any]) -> NDArray[Any]:
    """Each token's temperature [T] by Hill's estimator (Annals of Statistics 3, 1975): mean of x_j - x_K over j < K.

    log_TK: log-probabilities, highest first, K >= 2.
    """
    out: NDArray[Any] = (log_TK[:, :-1] - log_TK[:, -1:]).mean(1)
    return out


def fit_spacing(log_TK: NDArray[Any]) -> tuple[float, float]:
    """(scale, power) of mean gaps scale * j**-power between ranks j and j + 1 (from 1): least squares of logs.

    Needs K >= 3; with K = 2 the power is 1 (exponential order statistics, Renyi 1953). log_TK: highest first.
    """
    gap_J = -np.diff(log_TK.astype(np.float64), axis=1).mean(0)
    rank_J = np.arange(1, len(gap_J) + 1)
    gap_J = np.maximum(gap_J, 1e-3)
    if len(gap_J) < 2:
        return float(gap_J[0]), 1.0
    x = np.log(rank_J)
    slope = float(((x - x.mean()) * np.log(gap_J)).sum() / ((x - x.mean()) ** 2).sum())
    power = float(np.clip(-slope, 0.0, 1.5))
    return float(np.exp((np.log(gap_J) + power * x).mean())), power


# ------------------------------------------------------------------------------------------------------ tails


def _logit(mass_N: NDArray[Any], most: int) -> Floats32:
    """log(F / (n - F)): what the tail's mass is nearly linear in, so that Newton's steps converge in a few."""
    mass = np.clip(mass_N, _LEAST * most, _MOST_SHARE * most)
    out: Floats32 = np.log(mass / (most - mass)).astype(np.float32)
    return out


@dataclass(frozen=True, slots=True)
class GumbelTail:
    """`scale_E`: Plackett-Luce weights of one layer; `temperature`: of the noise; `cut`: `cut_time` of the K-th."""

    scale_E: Floats
    temperature: float
    cut: float

    def depths(
        self, noise_NE: Floats32, taken_NK: Ints, ratio_N: Floats32 | None, time_N: Floats32 | None = None
    ) -> Floats32:
        """Depths below the K-th [N, E], of no meaning at `taken_NK`.

        ratio_N: the tail's mass over the K-th's probability; None: not known, and the time `time_N` of the K-th's
        arrival gives it, or the layer's `cut` for all tokens.

        Arrivals: the K-th came at time t, expert e after it at t + X / v_e with X ~ Exp(1), and a log-probability is
        -temperature * log(time): a Gumbel variable truncated from above. So depth = temperature * log(1 + X / (v_e t)).
        """
        late_NE = np.log(-np.log(noise_NE))
        late_NE -= np.log(self.scale_E).astype(np.float32)
        np.put_along_axis(late_NE, taken_NK, np.float32(1e4), 1)
        if ratio_N is None:
            time = np.full(len(late_NE), self.cut, np.float32) if time_N is None else time_N
            return self._at(late_NE, -np.log(time)[:, None])[0]
        return _carry(self._at, late_NE, taken_NK.shape[1], ratio_N)

    def _at(self, late_NE: Floats32, shift_N1: Floats32) -> tuple[Floats32, Floats32]:
        """Depths and their derivatives by the shift -log(t)."""
        grown = late_NE + shift_N1
        np.minimum(grown, _FAR, out=grown)
        np.exp(grown, out=grown)
        one = grown + np.float32(1)
        grown /= one
        np.log(one, out=one)
        temperature = np.float32(self.temperature)
        one *= temperature
        grown *= temperature
        return one, grown


@dataclass(frozen=True, slots=True)
class SpacedTail:
    """Gaps `scale` * j**-`power` between ranks j and j + 1, from rank K = `top_k` on to E."""

    scale: float
    power: float
    top_k: int

    def depths(
        self, noise_NE: Floats32, taken_NK: Ints, ratio_N: Floats32 | None, time_N: Floats32 | None = None
    ) -> Floats32:
        """As `GumbelTail.depths`. An expert's rank is K + u * (E - K), u its noise; where the mass is known, all gaps
        of a token are stretched alike."""
        rest = noise_NE.shape[1] - taken_NK.shape[1]
        rank_NE: Floats32 = noise_NE * np.float32(rest)
        rank_NE += np.float32(self.top_k)
        if abs(self.power - 1) < 1e-3:
            depth_NE: Floats32 = np.log(rank_NE / np.float32(self.top_k))
        else:
            left = np.float32(1 - self.power)
            depth_NE = np.exp(np.log(rank_NE) * left)
            depth_NE -= np.float32(self.top_k**left)
            depth_NE /= left
        depth_NE *= np.float32(self.scale)
        np.put_along_axis(depth_NE, taken_NK, np.float32(1e30), 1)
        if ratio_N is None:
            return depth_NE
        return _carry(self._at, depth_NE, taken_NK.shape[1], ratio_N)

    def _at(self, depth_NE: Floats32, shift_N1: Floats32) -> tuple[Floats32, Floats32]:
        stretched = depth_NE * np.exp(shift_N1)
        return stretched, stretched


def _carry(at: Any, base_NE: Floats32, taken: int, ratio_N: Floats32) -> Floats32:
    """Depths at(base, shift) with sum of exp(-depth) = `ratio_N` over the experts not taken: Newton's steps on the
    logit of the sum, each token by itself."""
    rest = base_NE.shape[1] - taken
    goal_N = _logit(ratio_N, rest)
    shift_N1 = np.zeros((len(base_NE), 1), np.float32)
    for _ in range(_NEWTON):
        depth_NE, slope_NE = at(base_NE, shift_N1)
        prob_NE = np.exp(-depth_NE)
        mass_N = np.clip(prob_NE.sum(1), np.float32(1e-6), np.float32(rest * (1 - 1e-6)))
        prob_NE *= slope_NE
        slope_N = -prob_NE.sum(1) * np.float32(rest) / (mass_N * (rest - mass_N))
        error_N = np.log(mass_N / (rest - mass_N)) - goal_N
        step_N = error_N / np.minimum(slope_N, np.float32(-0.1))
        shift_N1 -= np.clip(step_N, -3, 3)[:, None]
    out: Floats32 = at(base_NE, shift_N1)[0]
    return out
