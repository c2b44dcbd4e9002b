"""A synthetic routing model: a pool of whole tokens from a few named, independent knobs.

Each token, layer and slot holds a latent number that stands for an expert (moesim.workload.strata): every
expert is taken with exactly its probability and K experts of a token are distinct. Copying a latent, from the
token before (`repeat`), from the layer before (`affinity`) or from a number that the token's slots share
(`coactivation`), changes no expert's popularity. Domains, topics and drift tilt the probabilities of groups
of tokens and leave the pool's mean. On recorded prefill (ESFT, DeepSeek-V2-Lite) the variance of an expert's
share between stretches of text goes with p * (1 - p): tilts are Dirichlet. Legend: T tokens, L layers, E
experts, K experts a token, B tilts.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moesim.rng import generator
from moesim.spec import Spec
from moesim.workload.pool import RoutingSource, id_dtype
from moesim.workload.strata import Strata, Tilts

__all__ = ["Groups", "SyntheticSpec", "generate", "inclusion", "popularity_weights", "uniform_weights"]

Floats = NDArray[np.float64]

_LOW_BITS = 65536.0
MOST = 0.999
"""No expert is taken by more than this share of the tokens."""


class SyntheticSpec(Spec):
    """The knobs. Each moves its own statistic (moesim.workload.routing_stats) and, to first order, no other.

    popularity_zipf: experts' shares fall as rank**-s, ranks shuffled per layer. popularity_lognormal_sigma:
    shares are lognormal. Neither: equal shares. coactivation: chance that a slot follows its token's kind, so
    that the same experts go together. affinity: chance that a token's experts follow from those of the layer
    before by a fixed map. repeat: chance that a slot keeps the expert of the token before. domains,
    domain_spread: number of request domains, and the correlation of expert use that tokens of one domain
    share. topic_tokens, topic_spread: the same for stretches of text inside a sequence, of that mean length.
    drift, drift_windows: the same from window to window of the pool, adding up; requests pass through the
    windows in order. prefix_tokens: first tokens that all sequences share, as a chat
    template or system prompt is. pool_tokens, sequence_tokens: size.
    """

    popularity_zipf: float | None = Field(default=None, ge=0, le=5)
    popularity_lognormal_sigma: float | None = Field(default=None, ge=0, le=5)
    coactivation: float = Field(default=0.0, ge=0, le=1)
    affinity: float = Field(default=0.0, ge=0, le=1)
    repeat: float = Field(default=0.0, ge=0, le=1)
    domains: int = Field(default=1, ge=1, le=4096)
    domain_spread: float = Field(default=0.05, ge=0, le=0.9)
    topic_tokens: int = Field(default=32, ge=1, le=1 << 20)
    topic_spread: float = Field(default=0.0, ge=0, le=0.9)
    drift: float = Field(default=0.0, ge=0, le=0.9)
    drift_windows: int = Field(default=8, ge=1, le=4096)
    prefix_tokens: int = Field(default=0, ge=0, le=1 << 20)
    pool_tokens: int = Field(default=8192, ge=1, le=1 << 24)
    sequence_tokens: int = Field(default=256, ge=1, le=1 << 20)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.popularity_zipf is not None and self.popularity_lognormal_sigma is not None:
            raise ValueError("popularity_zipf and popularity_lognormal_sigma both set the popularity; give one of them")
        return self


@dataclass(frozen=True, slots=True)
class Groups:
    """Group-limited routing (DeepSeek): experts stand in `number` equal groups, a token takes from `kept` of
    them."""

    number: int = 1
    kept: int = 1

    @property
    def limited(self) -> bool:
        return self.kept < self.number


NO_GROUPS = Groups()


# ------------------------------------------------------------------------------------------------- popularity


def uniform_weights(num_layers: int, num_experts: int) -> Floats:
    """Equal shares, [L, E]."""
    return np.full((num_layers, num_experts), 1.0 / num_experts)


def popularity_weights(spec: SyntheticSpec, num_layers: int, num_experts: int, seed: int) -> Floats:
    """Each layer's shares [L, E], rows adding up to 1, by the popularity knobs of `spec`."""
    weight_LE = np.ones((num_layers, num_experts))
    if spec.popularity_zipf is not None:
        weight_LE *= np.arange(1, num_experts + 1, dtype=np.float64) ** -spec.popularity_zipf
    for layer in range(num_layers):
        rng = generator(seed, "routing/popularity", layer)
        if spec.popularity_lognormal_sigma is not None:
            weight_LE[layer] = np.exp(spec.popularity_lognormal_sigma * rng.standard_normal(num_experts))
        weight_LE[layer] = rng.permutation(weight_LE[layer])
    shares: Floats = weight_LE / weight_LE.sum(1, keepdims=True)
    return shares


def _capped(weight_BE: Floats, total: Floats | float, most: Floats | float) -> Floats:
    """Rows in proportion to `weight_BE`, adding up to `total`, no entry over `most` (water filling)."""
    total_B = np.broadcast_to(np.asarray(total, np.float64), weight_BE.shape[:1])
    full = np.zeros(weight_BE.shape, bool)
    out = weight_BE
    for _ in range(weight_BE.shape[1]):
        free = np.where(full, 0.0, weight_BE)
        left = total_B - np.where(full, most, 0.0).sum(1)
        mass = free.sum(1)
        scale = np.divide(left, mass, out=np.zeros_like(left), where=mass > 0)
        out = np.where(full, most, weight_BE * scale[:, None])
        over = ~full & (out > most)
        if not over.any():
            break
        full |= over
    return out


def inclusion(weight_BE: Floats, top_k: int, groups: Groups = NO_GROUPS) -> Floats:
    """Chance that a token takes each expert, [B, E]: proportional to the weights as far as a token's K
    distinct experts and its kept groups allow; rows add up to K. Weights of zero stay zero unless fewer than
    K are left.
    """
    experts = weight_BE.shape[1]
    if top_k == experts:
        return np.ones_like(weight_BE)
    weight = np.maximum(weight_BE, 1e-9 * weight_BE.max(1, keepdims=True))
    most = max(MOST, (top_k + 0.5) / experts) if top_k < experts * MOST else 1.0
    if not groups.limited:
        return _capped(weight, float(top_k), most)
    size = experts // groups.number
    split = weight.reshape(-1, groups.number, size)
    mass = _capped(split.sum(2), float(top_k), most * top_k / groups.kept)
    reach = np.minimum(mass * groups.kept / top_k, most)
    within = _capped(split.reshape(-1, size), mass.reshape(-1), np.repeat(reach.reshape(-1, 1), size, axis=1))
    return within.reshape(weight.shape)


# ------------------------------------------------------------------------------------------------------ tilts


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which tilt each token has: `tilt_T` numbers the B combinations of domain, topic stretch and window;
    tilt B is the common prefix, whose tokens are those of the first sequence (`alike_T`: the row each token
    is like)."""

    starts: NDArray[np.int64]
    tilt_T: NDArray[np.int64]
    domain_B: NDArray[np.int64]
    window_B: NDArray[np.int64]
    topic_B: NDArray[np.int64]
    share_B: Floats
    prefix: int
    prefix_share: float
    alike_T: NDArray[np.int64] | None
    domain_Q: NDArray[np.int16] | None
    window_Q: NDArray[np.int16] | None


def _layout(spec: SyntheticSpec, seed: int) -> _Layout:
    tokens, length = spec.pool_tokens, min(spec.sequence_tokens, spec.pool_tokens)
    starts = np.append(np.arange(0, tokens, length), tokens).astype(np.int64)
    sequences = len(starts) - 1
    domain_Q = np.zeros(sequences, np.int64)
    if spec.domains > 1 and spec.domain_spread > 0:
        turns = -(-sequences // spec.domains)
        many = np.tile(np.arange(spec.domains), turns)[:sequences]
        domain_Q = generator(seed, "routing/domain").permutation(many)
    windows = min(spec.drift_windows, sequences) if spec.drift > 0 else 1
    window_Q = np.arange(sequences) * windows // sequences
    sequence_T = np.repeat(np.arange(sequences), np.diff(starts))
    position_T = np.arange(tokens) - starts[sequence_T]
    prefix = min(spec.prefix_tokens, length - 1)
    rest_T = position_T >= prefix
    topic_T = np.zeros(tokens, np.int64)
    if spec.topic_spread > 0:
        begins = generator(seed, "routing/topic").random(tokens) < 1 / spec.topic_tokens
        begins[starts[:-1]] = True
        topic_T = np.cumsum(begins) - 1
    key = (topic_T * windows + window_Q[sequence_T]) * spec.domains + domain_Q[sequence_T]
    unique, inverse, counts = np.unique(key[rest_T], return_inverse=True, return_counts=True)
    tilt_T = np.full(tokens, len(unique), np.int64)
    tilt_T[rest_T] = inverse
    topics = np.unique(unique // spec.domains // windows, return_inverse=True)[1]
    rest = int(rest_T.sum())
    return _Layout(
        starts, tilt_T, unique % spec.domains, unique // spec.domains % windows, topics.astype(np.int64),
        counts / rest, prefix, 1 - rest / tokens, np.where(rest_T, np.arange(tokens), position_T) if prefix else None,
        domain_Q.astype(np.int16) if domain_Q.any() else None,
        window_Q.astype(np.int16) if windows > 1 else None,
    )  # fmt: skip


def _tilts(spec: SyntheticSpec, layout: _Layout, columns: int, scale: float, seed: int, name: str) -> Tilts | None:
    """Densities of `columns` latents for each tilt, and a uniform one last (the prefix); None where all are
    uniform.

    `scale`: correlations times this; `name`: which latents.
    """
    if len(layout.share_B) == 1:
        return None
    kinds = [
        (min(0.95, correlation * scale), index_B, int(index_B.max()) + 1, kind)
        for correlation, index_B, kind in (
            (spec.domain_spread, layout.domain_B, "domain"),
            (spec.topic_spread, layout.topic_B, "topic"),
            (spec.drift, layout.window_B, "drift"),
        )
        if correlation > 0 and index_B.any()
    ]
    bins = min(Tilts.bins(correlation, rows) for correlation, _, rows, _ in kinds)
    weight = np.ones((len(layout.share_B), columns, bins))
    for correlation, index_B, rows, kind in kinds:
        rng = generator(seed, f"routing/tilt/{name}/{kind}")
        part = Tilts.dirichlet(correlation, (rows, columns, bins), rng)
        part /= part.mean(2, keepdims=True)
        weight *= (np.cumprod(part, axis=0) if kind == "drift" else part)[index_B]
        weight /= weight.mean(2, keepdims=True)
    return Tilts(np.concatenate([weight, np.ones((1, *weight.shape[1:]))]), np.append(layout.share_B, 0.0))


# --------------------------------------------------------------------------------------------------- sampling


class _Latents:
    """Latents of all tokens for some slots, layer after layer.

    A slot follows its token's common latent or has one of its own. A token tied to the layer before keeps its
    latents and which of its slots are copies of the token before.
    """

    def __init__(self, layout: _Layout, slots: int, coactivation: float, keep: float, tilts: Tilts | None) -> None:
        """`tilts`: densities of slots + 1 columns, the last for the token's common latent."""
        self._shape = (len(layout.tilt_T), slots)
        self._tilt_T, self._tilts = layout.tilt_T, tilts
        self._starts = layout.starts[:-1]
        self._coactivation, self._keep = coactivation, keep
        self._latent_TK: Floats = np.zeros(0)
        self._copied_TK: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def layer(self, coins: _Coins, tied_T: NDArray[np.bool_] | None, copier_T: NDArray[np.bool_] | None) -> Floats:
        """[T, slots] for the next layer; `tied_T`: tokens tied to the layer before; `copier_T`: that may
        copy."""
        tied_TK = None if tied_T is None else tied_T[:, None]
        drawn = coins.uniform((self._shape[0], self._shape[1] + 1))
        if self._tilts is not None:
            drawn = self._tilts(self._tilt_T, drawn)
        latent_TK = drawn[:, :-1]
        if self._coactivation > 0:
            latent_TK = np.where(coins.toss(self._shape, self._coactivation), drawn[:, -1:], latent_TK)
        if tied_TK is not None:
            latent_TK = np.where(tied_TK, self._latent_TK, latent_TK)
        self._latent_TK = latent_TK
        if copier_T is None:
            return latent_TK
        copied_TK = coins.toss(self._shape, self._keep)
        if tied_TK is not None:
            copied_TK = np.where(tied_TK, self._copied_TK, copied_TK)
        self._copied_TK = copied_TK
        copied_TK = copied_TK & copier_T[:, None]
        copied_TK[self._starts] = False
        origin = np.where(copied_TK, 0, np.arange(self._shape[0])[:, None])
        np.maximum.accumulate(origin, axis=0, out=origin)
        return np.take_along_axis(latent_TK, origin, 0)


def _latents(
    spec: SyntheticSpec, layout: _Layout, top_k: int, groups: Groups, keep: float, seed: int
) -> tuple[_Latents, _Latents | None]:
    """Latents of a token's K slots and, where groups limit, of its kept groups."""
    scale = groups.number / groups.kept if groups.limited else 1.0
    tilts = _tilts(spec, layout, top_k + 1, scale, seed, "slot")
    slots = _Latents(layout, top_k, spec.coactivation, keep, tilts)
    if not groups.limited:
        return slots, None
    tilts = _tilts(spec, layout, groups.kept + 1, 1.0, seed, "group")
    return slots, _Latents(layout, groups.kept, spec.coactivation, keep, tilts)


class _Coins:
    """Draws of a layer, the same for tokens that are alike (a prefix common to all sequences)."""

    def __init__(self, rng: np.random.Generator, alike_T: NDArray[np.int64] | None) -> None:
        self._rng, self._alike_T = rng, alike_T

    def uniform(self, shape: tuple[int, ...]) -> Floats:
        drawn = self._rng.random(shape)
        return drawn if self._alike_T is None else drawn[self._alike_T]

    def toss(self, shape: tuple[int, ...], chance: float) -> NDArray[np.bool_]:
        drawn = self._rng.random(shape, np.float32) < chance
        return drawn if self._alike_T is None else drawn[self._alike_T]


class _Layer:
    """One layer's experts: how latents choose them."""

    def __init__(self, prob_E: Floats, top_k: int, groups: Groups, rng: np.random.Generator) -> None:
        """`prob_E`: inclusion probabilities; the experts' order, and that of the groups, is drawn from
        `rng`."""
        self.groups, self.top_k = groups, top_k
        self._size = len(prob_E) // groups.number if groups.limited else len(prob_E)
        if not groups.limited:
            self.strata = {(0, top_k): Strata(prob_E, rng.permutation(len(prob_E)), top_k)}
            return
        split = prob_E.reshape(groups.number, self._size)
        self.group_strata = Strata(split.sum(1) * groups.kept / top_k, rng.permutation(groups.number), groups.kept)
        # Where K does not divide by the kept groups, which of them give one more goes round from token to token.
        sizes = np.diff([top_k * j // groups.kept for j in range(groups.kept + 1)])
        turns = groups.kept if len(set(sizes.tolist())) > 1 else 1
        self.edges = [
            list(itertools.pairwise(np.concatenate([[0], np.cumsum(np.roll(sizes, turn))]).tolist()))
            for turn in range(turns)
        ]
        self.strata = {}
        for g in range(groups.number):
            order = rng.permutation(self._size)
            for slots in set(sizes.tolist()) - {0}:
                within = _capped(split[g : g + 1], float(slots), 1.0)[0]
                self.strata[g, slots] = Strata(within, order, slots)

    def draw(self, group_TJ: Floats | None, latent_TK: Floats) -> NDArray[np.int64]:
        """Experts, int64 [T, K], from latents of the slots and, where groups limit, of the kept groups."""
        if group_TJ is None:
            return self.strata[0, self.top_k].pick(latent_TK)
        chosen_TJ = self.group_strata.pick(group_TJ)
        out = np.empty(latent_TK.shape, np.int64)
        turn_T = np.floor(np.modf(group_TJ[:, 0] * _LOW_BITS)[0] * len(self.edges))
        parts = ((turn, j, *edge) for turn, edges in enumerate(self.edges) for j, edge in enumerate(edges))
        for turn, j, lo, hi in parts:
            for g in range(self.groups.number if hi > lo else 0):
                here = np.flatnonzero((chosen_TJ[:, j] == g) & (turn_T == turn))
                places = self.strata[g, hi - lo].pick(latent_TK[here, lo:hi])
                out[here, lo:hi] = places + g * self._size
        return out


def _rest(base_E: Floats, taken_PK: NDArray[np.int64], share: float, top_k: int, groups: Groups) -> Floats:
    """Inclusion of the tokens past a prefix that takes `taken_PK`, so that both together have `base_E`."""
    prefix_E = np.bincount(taken_PK.ravel(), minlength=len(base_E)) / len(taken_PK)
    left = np.maximum(base_E - share * prefix_E, 1e-3 * base_E)
    rest_E: Floats = inclusion(left[None], top_k, groups)[0]
    return rest_E


def _fill(
    layout: _Layout, base_E: Floats, top_k: int, groups: Groups, key: tuple[int, int],
    group_TJ: Floats | None, slot_TK: Floats,
) -> NDArray[np.int64]:  # fmt: skip
    """Experts of a layer for all tokens, [T, K]: of the common prefix by `base_E`, of the rest by what is
    left.

    `key`: seed and layer.
    """
    model = _Layer(base_E, top_k, groups, generator(key[0], "routing/order", key[1]))
    if layout.alike_T is None:
        return model.draw(group_TJ, slot_TK)
    n = layout.prefix
    prefix_PK = model.draw(None if group_TJ is None else group_TJ[:n], slot_TK[:n])
    rest_E = _rest(base_E, prefix_PK, layout.prefix_share, top_k, groups)
    model = _Layer(rest_E, top_k, groups, generator(key[0], "routing/order", key[1]))
    out = prefix_PK[np.minimum(layout.alike_T, n - 1)]
    rest = np.flatnonzero(layout.tilt_T < len(layout.share_B))
    out[rest] = model.draw(None if group_TJ is None else group_TJ[rest], slot_TK[rest])
    return out


def generate(
    spec: SyntheticSpec,
    weight_LE: Floats,
    top_k: int,
    seed: int,
    groups: Groups = NO_GROUPS,
    source: str = "synthetic",
) -> RoutingSource:
    """A pool of `spec.pool_tokens` whole tokens whose popularity is `weight_LE` (any scale, [L, E]).

    The popularity knobs of `spec` are not looked at here: `popularity_weights` turns them into weights. Where
    groups limit, K / kept experts are taken from each kept group.
    """
    layers, experts = weight_LE.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"between 1 and {experts} experts a token, got {top_k}")
    if groups.limited and (experts % groups.number or top_k * groups.number > experts * groups.kept):
        raise ValueError(f"{groups} cannot serve {top_k} of {experts} experts")
    layout = _layout(spec, seed)
    base_LE = inclusion(weight_LE, top_k, groups)
    tokens = spec.pool_tokens
    out = np.empty((tokens, layers, top_k), id_dtype(experts))
    # Half of a copying token's slots (more where `repeat` is over a half) are copies. With groups, an expert is
    # repeated when its group and its place in it are: each with the square root.
    keep = max(0.5, spec.repeat)
    slots, kept = _latents(spec, layout, top_k, groups, math.sqrt(keep) if groups.limited else keep, seed)
    copier_T: NDArray[np.bool_] | None = None
    for layer in range(layers):
        coins = _Coins(generator(seed, "routing/synthetic", layer), layout.alike_T)
        tied_T = coins.toss((tokens,), spec.affinity) if layer > 0 and spec.affinity > 0 else None
        if spec.repeat > 0:
            fresh_T = coins.toss((tokens,), spec.repeat / keep)
            copier_T = fresh_T if copier_T is None or tied_T is None else np.where(tied_T, copier_T, fresh_T)
        group_TJ = None if kept is None else kept.layer(coins, tied_T, copier_T)
        slot_TK = slots.layer(coins, tied_T, copier_T)
        out[:, layer] = _fill(layout, base_LE[layer], top_k, groups, (seed, layer), group_TJ, slot_TK)
    return RoutingSource(
        out, layout.starts, experts, top_k, False, source, domain_Q=layout.domain_Q, window_Q=layout.window_Q
    )  # fmt: skip
