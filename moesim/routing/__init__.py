"""Routing: which experts each token takes, and with what gate weights.

A policy is a pure function from scores [T, E] (the router's logits) to an assignment; it knows no clock and
no file. Draws are keyed by (seed, step, layer), so a policy gives the same answer in any order of calls.
`RoutingContext` and `Routed` grow by fields with defaults (capacity, state), so a policy written today stays
right. Legend: T tokens, L layers, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.rng import generator
from moesim.workload.pool import Ids
from moesim.workload.synthetic import Groups

__all__ = ["Routed", "RoutingContext", "RoutingPolicy", "sigmoid", "softmax", "top_ids"]

Floats = NDArray[Any]
"""float32 or float64"""


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """What a router knows besides the scores. Fields of the model, then the key of its draws."""

    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    bias_E: Floats | None = None
    """added to the scores for choosing, not for the gates (DeepSeek-V3's balancing bias)"""
    seed: int = 0
    step: int = 0
    layer: int = 0

    def generator(self, component: str) -> np.random.Generator:
        """Draws of `component` for this seed, step and layer."""
        return generator(self.seed, component, self.step, self.layer)


@dataclass(frozen=True, slots=True)
class Routed:
    """`expert_TK`: int32 ids, most wanted first where the policy ranks; `gate_TK`: float weights of their
    outputs."""

    expert_TK: NDArray[np.int32]
    gate_TK: Floats


class RoutingPolicy(Protocol):
    """One mechanism, one file. Its fields are its YAML parameters."""

    replaces_ids: ClassVar[bool]
    """takes the place of a trace's recorded ids (else they stand for what the policy would do)"""
    ideal: ClassVar[bool]
    """loads count as equal in every step"""
    normalised: ClassVar[bool]
    """gates add up to `scaling_factor` (1 where it has none) whatever the context says"""

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Experts and gates of T tokens; K = context.top_k distinct experts each. T may be 0.

        Scores are finite or -inf (an expert that must not be taken). Raises ValueError when a token has too
        few.
        """
        ...

    def groups(self, num_groups: int, top_groups: int) -> Groups:
        """The groups it limits a token to, given the model's."""
        ...

    def draw(self, weight_LE: NDArray[np.float64], tokens: int, top_k: int, groups: Groups, seed: int) -> Ids:
        """Experts [T, L, K] of independent tokens for a synthetic pool, popularity `weight_LE` where it is
        heeded."""
        ...


def top_ids(score_TE: Floats, k: int) -> NDArray[np.int32]:
    """Ids of the `k` highest scores of each row, highest first, int32 [T, k]; of equal scores the lowest id.

    k passes of argmax: for k << E as fast as a partition, and its ties do not depend on the machine.
    """
    tokens, experts = score_TE.shape
    if not 1 <= k <= experts:
        raise ValueError(f"between 1 and {experts} experts a token can be chosen, got {k}")
    if np.isnan(score_TE).any():
        raise ValueError("scores must not be NaN")
    left = score_TE.copy()
    out = np.empty((tokens, k), np.int32)
    row = np.arange(tokens)
    for i in range(k):
        best = left.argmax(1)
        if np.isneginf(left[row, best]).any():
            raise ValueError(f"a token has fewer than {k} experts with a score above -inf")
        out[:, i] = best
        left[row, best] = -np.inf
    return out


def softmax(score_TE: Floats) -> Floats:
    """Softmax over each row, stable."""
    if score_TE.shape[0] == 0:
        return score_TE.copy()
    out: Floats = np.exp(score_TE - score_TE.max(1, keepdims=True))
    out /= out.sum(1, keepdims=True)
    return out


def sigmoid(score_TE: Floats) -> Floats:
    """Logistic function of each score, without overflow."""
    tail = np.exp(-np.abs(score_TE))
    out: Floats = np.where(score_TE >= 0, 1 / (1 + tail), tail / (1 + tail)).astype(score_TE.dtype)
    return out
