"""What prefetch policies share: naming experts of layers ahead, in the order in which they are due, up to a limit.

Legend: T tokens of a step, L layers, E experts, K experts a token, N experts named for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.errors import BadInput
from moesim.offload import OffloadContext, RouteSample, StepRoutes, Wanted
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Ahead", "Limited", "Named", "best", "draw_named", "fit_of", "others", "votes"]

Named = list[tuple[int, float]]
"""Experts of one layer with what they are worth, at most 1 and over 0; best first, equal ones by id."""


class Limited(Spec):
    """Parameters of every policy that can name more than a link carries.

    limit, limit_bytes: experts, and their bytes, that one call may name at most (an engine's queue of prefetches is as
    long); None: no limit. What is on the device already costs nothing and counts all the same, because a policy is not
    told what the cache holds.
    """

    oracle: ClassVar[bool] = False
    """names what it could not know by looking at routes to come, through its stated accuracy alone"""

    limit: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    limit_bytes: Annotated[int, Field(ge=1, le=1 << 50)] | None = None

    def cut(self, wanted: list[Wanted], size_LE: IntArray) -> list[Wanted]:
        """The first ones, as far as the limits go."""
        wanted = wanted if self.limit is None else wanted[: self.limit]
        if self.limit_bytes is None or not wanted:
            return wanted
        sizes = np.cumsum([int(size_LE[w.layer, w.expert]) for w in wanted])
        return wanted[: int(np.searchsorted(sizes, self.limit_bytes, side="right"))]


class Ahead:
    """`moesim.offload.Prefetch` for policies that name experts of the layers up to `ahead` further on.

    `named(layer, target)` says whom, known when the router of `layer` has run (-1: none has). Nearer layers come first,
    because they are due first: a score is what the expert is worth minus how many layers ahead it is. Where nearness
    adds no knowledge (`repeats` is False) a layer is named once a step, when it first comes within reach. `ahead` may
    be changed from call to call up to `furthest`, beyond which nothing is stated.
    """

    repeats: ClassVar[bool] = True

    def __init__(self, context: OffloadContext, ahead: int, limits: Limited) -> None:
        """ahead: layers, at least 1."""
        self.context = context
        self.ahead = ahead
        self.furthest = context.num_layers
        self._limits = limits
        self._next = 0
        self.step: StepRoutes = StepRoutes(
            -1, np.zeros((0, context.num_layers, context.top_k), np.int64), np.zeros(0, np.int64)
        )

    def begin(self, step: StepRoutes) -> None:
        """See Prefetch."""
        self.step = step
        self._next = 0

    def named(self, layer: int, target: int) -> Named:
        """Experts of `target` that are likely, as known after the router of `layer`."""
        raise NotImplementedError

    def wanted(self, layer: int) -> list[Wanted]:
        """See Prefetch."""
        first = layer + 1 if self.repeats else max(layer + 1, self._next)
        last = min(layer + self.ahead, self.context.num_layers - 1)
        self._next = max(self._next, last + 1)
        out = [
            Wanted(target, expert, worth - (target - layer))
            for target in range(first, last + 1)
            for expert, worth in self.named(layer, target)
        ]
        return self._limits.cut(out, self.context.size_LE)

    def told(self, layer: int, found: Sequence[tuple[int, str]]) -> None:
        """See Prefetch."""


# ---- from numbers to names


def best(worth_E: FloatArray, number: int | None = None) -> Named:
    """The `number` experts worth most (None: all that are worth anything), over the largest possible worth of 1."""
    order = np.argsort(-worth_E, kind="stable")[: len(worth_E) if number is None else number]
    return [(int(e), float(worth_E[e])) for e in order if worth_E[e] > 0]


def votes(ids_TN: AnyArray, num_experts: int) -> Named:
    """Experts by the share of tokens that name them; ids not below num_experts are no expert."""
    if not len(ids_TN):
        return []
    ids = np.asarray(ids_TN).ravel()
    count_E = np.bincount(ids[ids < num_experts], minlength=num_experts)
    return best(np.minimum(count_E / len(ids_TN), 1.0))


def fit_of(context: OffloadContext, kind: str) -> RouteSample:
    """What there is to learn from. Raises BadInput where there is nothing, or it is of another model."""
    fit = context.fit
    if fit is None or not len(fit.expert_TLK):
        raise BadInput(
            f"prefetch policy {kind!r} learns from recorded routes, and none were given to learn from. Give a routing"
            " trace with tokens left to fit on, or take a policy that learns nothing (next_layer, previous_token)."
        )
    if fit.expert_TLK.shape[1] != context.num_layers:
        raise BadInput(
            f"prefetch policy {kind!r} must learn from routes of the same model: it has {context.num_layers} MoE"
            f" layers, the recorded routes have {fit.expert_TLK.shape[1]}. Give a trace of this model."
        )
    return fit


# ---- a predictor with a stated accuracy


def others(context: OffloadContext, layer: int, by: str) -> FloatArray:
    """Chances [E] by which wrong experts are drawn: `popularity` of the layer, or `uniform`ly."""
    chance_E = np.ones(context.num_experts)
    if by == "popularity":
        # an expert never seen may still be named: it gets the worth of half an activation
        chance_E = context.popularity_LE[layer].astype(np.float64) + 0.5
    share_E: FloatArray = chance_E / chance_E.sum()
    return share_E


def draw_named(
    step: StepRoutes, layer: int, accuracy: float, number: int, chance_E: FloatArray, seed: int, component: str
) -> IntArray:
    """Whom a predictor of that accuracy names for each token, int64 [T, N], none twice.

    Each of a token's experts is named with probability `accuracy`; the rest of its `number` names are wrong ones,
    drawn without repetition by `chance_E`. Draws belong to (seed, step, layer, token): whoever asks for a higher
    accuracy gets all true ones that a lower one names. num_experts stands where a token has fewer names (no expert at
    all asked for it, or no wrong one is left).
    """
    experts = len(chance_E)
    true_TK = np.minimum(np.asarray(step.expert_TLK[:, layer], np.int64), experts)
    tokens, choices = true_TK.shape
    # a row a token, so that its draws do not depend on how many tokens there are
    drawn_TX = generator(seed, component, step.number, layer).random((tokens, choices + experts))
    hit_TK = (drawn_TX[:, :choices] < accuracy) & (true_TK < experts)
    true_TE = np.zeros((tokens, experts + 1), bool)
    row_T1 = np.arange(tokens)[:, None]
    true_TE[row_T1, true_TK] = True
    asked_T = true_TK.min(axis=1, initial=experts) < experts
    # the largest of u ** (1 / chance) are a draw without repetition (Efraimidis and Spirakis 2006); log of it here
    key_TE = np.log(np.maximum(drawn_TX[:, choices:], 1e-300)) / chance_E
    key_TE[true_TE[:, :experts]] = -np.inf
    hit_TE = np.zeros((tokens, experts + 1), bool)
    hit_TE[row_T1, np.where(hit_TK, true_TK, experts)] = True
    key_TE[hit_TE[:, :experts]] = np.inf
    number = min(number, experts)
    order_TN = np.argsort(-key_TE, axis=1, kind="stable")[:, :number]
    named_TN = np.where(key_TE[row_T1, order_TN] > -np.inf, order_TN, experts)
    return np.where(asked_T[:, None], named_TN, experts)
