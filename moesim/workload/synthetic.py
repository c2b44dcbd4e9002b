"""A synthetic routing model: a pool of whole tokens from a few named, independent knobs.

Each token, layer and slot k holds a *latent* v in [0, 1); its expert is the one whose interval contains k + v
when the layer's experts, in a random order of their own, are laid end to end with lengths equal to their
inclusion probabilities (which add up to K). So every expert is taken with exactly its probability, K experts
of a token are distinct, and copying a latent, from the token before (`repeat`) or from the layer before
(`affinity`), changes no expert's popularity: two knobs, two statistics. An expert across the border of two
slots is kept from being taken twice by conditioning the second slot on the first. This is stratified
systematic sampling (Madow 1949) with independent strata. Domains, topics and drift tilt the probabilities of
groups of tokens; iterative proportional fitting (Deming and Stephan 1940) restores the popularity over the
pool. Legend: T tokens, L layers, E experts, K experts a token, B tilts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moesim.rng import generator
from moesim.spec import Spec
from moesim.workload.pool import RoutingSource, id_dtype

__all__ = ["Groups", "SyntheticSpec", "generate", "inclusion", "popularity_weights", "uniform_weights"]

Floats = NDArray[np.float64]

MOST = 0.999
"""No expert is taken by more than this share of the tokens."""
_FIT_ROUNDS = 12


class SyntheticSpec(Spec):
    """The knobs. Each moves its own statistic (moesim/workload/routing_stats.py) and, to first order, no
    other.

    popularity_zipf: experts' shares fall as rank**-s, ranks shuffled per layer. popularity_lognormal_sigma:
    shares are lognormal. Neither: equal shares. affinity: chance that a slot follows the slot of the layer
    before by a fixed map. repeat: chance that a slot keeps the expert of the token before. domains,
    domain_spread: number of request domains, and sigma of each one's log-tilt of every expert's share.
    topic_tokens, topic_spread: length of the stretches of a sequence, and sigma of a tilt of their own.
    drift, drift_windows: sigma of a random walk of the log-shares from window to window of the pool (requests
    pass through the windows in order). pool_tokens, sequence_tokens: size.
    """

    popularity_zipf: float | None = Field(default=None, ge=0, le=5)
    popularity_lognormal_sigma: float | None = Field(default=None, ge=0, le=5)
    affinity: float = Field(default=0.0, ge=0, le=1)
    repeat: float = Field(default=0.0, ge=0, le=1)
    domains: int = Field(default=1, ge=1, le=4096)
    domain_spread: float = Field(default=0.5, ge=0, le=5)
    topic_tokens: int = Field(default=32, ge=1, le=1 << 20)
    topic_spread: float = Field(default=0.0, ge=0, le=5)
    drift: float = Field(default=0.0, ge=0, le=5)
    drift_windows: int = Field(default=8, ge=1, le=4096)
    pool_tokens: int = Field(default=8192, ge=1, le=1 << 24)
    sequence_tokens: int = Field(default=256, ge=1, le=1 << 20)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.popularity_zipf is not None and self.popularity_lognormal_sigma is not None:
            raise ValueError(
                "popularity_zipf and popularity_lognormal_sigma both set the popularity; give one of them"
            )
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


def inclusion(weight_BE: Floats, top_k: int, groups: Groups = Groups()) -> Floats:
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
    """Which tilt each token has: `tilt_T` numbers the B combinations of domain, topic stretch and window."""

    starts: NDArray[np.int64]
    tilt_T: NDArray[np.int64]
    domain_B: NDArray[np.int64]
    window_B: NDArray[np.int64]
    topic_B: NDArray[np.int64]
    share_B: Floats
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
    lengths = np.diff(starts)
    sequence_T = np.repeat(np.arange(sequences), lengths)
    topic_T = np.zeros(tokens, np.int64)
    if spec.topic_spread > 0:
        position = np.arange(tokens) - starts[sequence_T]
        first = generator(seed, "routing/topic").integers(0, spec.topic_tokens, sequences)
        stretch = (position + first[sequence_T]) // spec.topic_tokens
        topic_T = sequence_T * (int(stretch.max()) + 1) + stretch
    key = (topic_T * windows + window_Q[sequence_T]) * spec.domains + domain_Q[sequence_T]
    unique, tilt_T, counts = np.unique(key, return_inverse=True, return_counts=True)
    topics = np.unique(unique // spec.domains // windows, return_inverse=True)[1]
    return _Layout(
        starts, tilt_T.astype(np.int64), unique % spec.domains, unique // spec.domains % windows,
        topics.astype(np.int64), counts / tokens,
        domain_Q.astype(np.int16) if domain_Q.any() else None,
        window_Q.astype(np.int16) if windows > 1 else None,
    )  # fmt: skip


def _tilted(
    spec: SyntheticSpec, layout: _Layout, base_E: Floats, top_k: int, groups: Groups, seed: int, layer: int
) -> Floats:
    """Inclusion probabilities of every tilt, [B, E], whose mean over the pool is `base_E` (inclusion of the
    layer)."""
    if len(layout.share_B) == 1:
        return base_E[None]
    log_BE = np.zeros((len(layout.share_B), len(base_E)))
    for sigma, index_B, name in (
        (spec.domain_spread, layout.domain_B, "domain"),
        (spec.topic_spread, layout.topic_B, "topic"),
        (spec.drift, layout.window_B, "drift"),
    ):
        rows = int(index_B.max()) + 1
        if sigma == 0 or rows == 1:
            continue
        step = sigma * generator(seed, f"routing/tilt/{name}", layer).standard_normal((rows, len(base_E)))
        if name == "drift":
            step = np.cumsum(step, axis=0)
            step -= step.mean(0)
        log_BE += step[index_B]
    tilted = base_E * np.exp(log_BE)
    for _ in range(_FIT_ROUNDS):
        tilted = inclusion(tilted, top_k, groups)
        mean = layout.share_B @ tilted
        if np.abs(mean - base_E).max() < 1e-4 * top_k / len(base_E):
            break
        tilted *= base_E / mean
    return inclusion(tilted, top_k, groups)


# --------------------------------------------------------------------------------------------------- sampling


class _Strata:
    """Items laid end to end over `slots` unit slots for each of B rows of inclusion probabilities, and
    picking."""

    def __init__(self, prob_BE: Floats, slots: int) -> None:
        rows, items = prob_BE.shape
        end = np.cumsum(prob_BE, axis=1)
        end *= slots / end[:, -1:]
        end[:, -1] = slots
        self.slots, self.items = slots, items
        self._flat = (end + np.arange(rows)[:, None] * slots).ravel()
        # The item across border k: length a_Bk before it, b_Bk after it.
        border = np.arange(1, slots)
        at = (end[:, None, :] <= border[:, None]).sum(2)
        before = np.where(at > 0, np.take_along_axis(end, np.maximum(at - 1, 0), 1), 0.0)
        self._a = border - before
        self._b = np.minimum(np.take_along_axis(end, at, 1), border + 1) - border

    def pick(self, row_N: NDArray[np.int64], latent_NK: Floats) -> NDArray[np.int64]:
        """Item of each slot, int64 [N, K], all distinct in a row, for latents in [0, 1)."""
        place = latent_NK.copy()
        for k in range(1, self.slots):
            a, b = self._a[:, k - 1], self._b[:, k - 1]
            if not np.any((a > 0) & (b > 0)):
                continue
            edge = np.clip(b / np.maximum(1 - a, 1e-12), 0, 1)
            stretch = (1 - b) / np.maximum(1 - edge, 1e-12)
            taken = place[:, k - 1] >= 1 - a[row_N]
            v, b_N, edge_N = place[:, k], b[row_N], edge[row_N]
            free = np.where(
                v < edge_N, v * (b / np.maximum(edge, 1e-12))[row_N], b_N + (v - edge_N) * stretch[row_N]
            )
            place[:, k] = np.where(taken, b_N + v * (1 - b_N), free)
        np.minimum(place, 1 - 1e-9, out=place)
        place += np.arange(self.slots)
        place += (row_N * self.slots)[:, None]
        found = np.searchsorted(self._flat, place.ravel(), side="right").reshape(place.shape)
        found -= (row_N * self.items)[:, None]
        return found


def _chain(
    latent_TK: Floats,
    before_TK: Floats | None,
    starts: NDArray[np.int64],
    affinity: float,
    repeat: float,
    rng: np.random.Generator,
) -> Floats:
    """Latents of a layer: tied to the layer before, else kept from the token before, else fresh."""
    tokens, slots = latent_TK.shape
    copied = np.zeros((tokens, slots), bool)
    if repeat > 0:
        copied = rng.random((tokens, slots), np.float32) < repeat
        copied[starts] = False
    if before_TK is not None and affinity > 0:
        tied = rng.random((tokens, slots), np.float32) < affinity
        latent_TK = np.where(tied, before_TK, latent_TK)
        copied &= ~tied
    if not copied.any():
        return latent_TK
    origin = np.where(copied, 0, np.arange(tokens)[:, None])
    np.maximum.accumulate(origin, axis=0, out=origin)
    return np.take_along_axis(latent_TK, origin, 0)


def _orders(
    experts: int, groups: Groups, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random order of the groups, and of the places within each group, [groups, size]."""
    places = np.tile(np.arange(experts // groups.number), (groups.number, 1))
    return rng.permutation(groups.number), rng.permuted(places, axis=1)


def _draw_layer(
    prob_BE: Floats, tilt_T: NDArray[np.int64], group_TJ: Floats | None, latent_TK: Floats,
    groups: Groups, rng: np.random.Generator,
) -> NDArray[np.int64]:  # fmt: skip
    """Experts of a layer, int64 [T, K], from latents of the slots and, where groups limit, of the kept
    groups."""
    experts = prob_BE.shape[1]
    if group_TJ is None:
        order = rng.permutation(experts)
        return order[_Strata(prob_BE[:, order], latent_TK.shape[1]).pick(tilt_T, latent_TK)]
    number, kept, top_k = groups.number, groups.kept, latent_TK.shape[1]
    turn, order = _orders(experts, groups, rng)
    split = prob_BE.reshape(-1, number, experts // number)
    reach = split.sum(2)[:, turn]
    chosen_TJ = turn[_Strata(reach, kept).pick(tilt_T, group_TJ)]
    inside = np.take_along_axis(split, np.broadcast_to(order, split.shape), 2).reshape(-1, order.shape[1])
    out = np.empty(latent_TK.shape, np.int64)
    edges = [top_k * j // kept for j in range(kept + 1)]
    strata = {n: _Strata(inside, n) for n in set(np.diff(edges).tolist()) if n > 0}
    for j in range(kept):
        lo, hi = edges[j], edges[j + 1]
        if hi > lo:
            row = tilt_T * number + chosen_TJ[:, j]
            group = chosen_TJ[:, j][:, None]
            place = order[group, strata[hi - lo].pick(row, latent_TK[:, lo:hi])]
            out[:, lo:hi] = place + group * order.shape[1]
    return out


def generate(
    spec: SyntheticSpec,
    weight_LE: Floats,
    top_k: int,
    seed: int,
    groups: Groups = Groups(),
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
    # With groups, an expert is repeated when its group and its place in it are: each with the square root.
    root = math.sqrt if groups.limited else float
    affinity, repeat = root(spec.affinity), root(spec.repeat)
    slot_TK: Floats | None = None
    group_TJ: Floats | None = None
    for layer in range(layers):
        rng = generator(seed, "routing/synthetic", layer)
        if groups.limited:
            group_TJ = _chain(
                rng.random((tokens, groups.kept)), group_TJ, layout.starts[:-1], affinity, repeat, rng
            )
        slot_TK = _chain(rng.random((tokens, top_k)), slot_TK, layout.starts[:-1], affinity, repeat, rng)
        prob_BE = _tilted(spec, layout, base_LE[layer], top_k, groups, seed, layer)
        out[:, layer] = _draw_layer(
            prob_BE, layout.tilt_T, group_TJ, slot_TK, groups, generator(seed, "routing/order", layer)
        )
    return RoutingSource(
        out, layout.starts, experts, top_k, False, source, domain_Q=layout.domain_Q, window_Q=layout.window_Q
    )  # fmt: skip
