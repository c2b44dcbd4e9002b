"""Tokens of two batches are dealt out anew, those with like routes together (ExpertFlow's token scheduling, arXiv
2410.17954).

A token's predicted route is a vector in {0,1}^(L*E). Routes are compared by Hamming distance and parted by balanced
2-means, so that both batches together activate as few experts as possible. The paper publishes neither the starts nor
the number of rounds nor how the halves are kept equal, so these are a reconstruction: several seeded starts, the tokens
with the largest gain to one centre go there until it is full, and the parting with the fewest predicted experts counts.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.offload import StepRoutes
from moesim.offload.prefetch.naming import draw_named
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Policy", "active", "route_vectors"]


class Policy(Spec):
    """accuracy: share of a token's true experts that its predicted route holds (wrong ones are drawn uniformly); 1.0
    shows what scheduling alone is worth. starts: seeded starts of 2-means, besides the order of arrival. rounds: of
    2-means at most. swaps: pairs of tokens that may change batches afterwards where that activates fewer experts (ours,
    not the paper's). seed: of starts and wrong predictions. A parting that activates no fewer (predicted) experts than
    the order of arrival is not used.
    """

    pool: ClassVar[int] = 2

    accuracy: Annotated[float, Field(ge=0, le=1)] = 1.0
    starts: Annotated[int, Field(ge=1, le=1000)] = 4
    rounds: Annotated[int, Field(ge=1, le=1000)] = 10
    swaps: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    seed: int = 0

    def split(self, step: StepRoutes, num_experts: int, limit: int) -> list[IntArray]:
        """See `moesim.offload.RebatchingPolicy.split`. Of routes it looks at what the accuracy lets through."""
        tokens = len(step.expert_TLK)
        out: list[IntArray] = []
        route_TX = route_vectors(step, num_experts, self.accuracy, self.seed)
        for start in range(0, tokens, 2 * limit):
            rows = np.arange(start, min(start + 2 * limit, tokens), dtype=np.int64)
            out += [rows[part] for part in self._pair(route_TX[rows], limit, step.number, start)]
        return out

    def _pair(self, route_TX: BoolArray, limit: int, number: int, start: int) -> list[IntArray]:
        """Two batches of equal size, or those of the order of arrival."""
        tokens = len(route_TX)
        arrived = [np.arange(lo, min(lo + limit, tokens), dtype=np.int64) for lo in range(0, tokens, limit)]
        if len(arrived) < 2:
            return arrived
        half = -(-tokens // 2)
        rng = generator(self.seed, "rebatching/expertflow", number, start)
        fewest, found = sum(active(route_TX[part]) for part in arrived), arrived
        for first in range(self.starts + 1):
            # the first start is the order of arrival, cut in halves
            left_T = np.arange(tokens) < half if first == 0 else _far_apart(route_TX, half, rng)
            left_T = _two_means(route_TX, left_T, half, self.rounds)
            left_T = _swap(route_TX, left_T, self.swaps)
            experts = active(route_TX[left_T]) + active(route_TX[~left_T])
            if experts < fewest:
                fewest, found = experts, [np.flatnonzero(left_T), np.flatnonzero(~left_T)]
        return found


def route_vectors(step: StepRoutes, num_experts: int, accuracy: float, seed: int) -> BoolArray:
    """Predicted routes, bool [T, L * E]."""
    tokens, layers, choices = step.expert_TLK.shape
    out = np.zeros((tokens, layers, num_experts + 1), bool)
    uniform_E = np.full(num_experts, 1 / num_experts)
    for layer in range(layers):
        ids = np.minimum(np.asarray(step.expert_TLK[:, layer], np.int64), num_experts)
        if accuracy < 1:
            ids = draw_named(step, layer, accuracy, choices, uniform_E, seed, "rebatching/expertflow")
        np.put_along_axis(out[:, layer], ids, True, axis=1)
    return out[:, :, :num_experts].reshape(tokens, layers * num_experts)


def active(route_TX: BoolArray) -> int:
    """Experts that the tokens activate, over all layers."""
    return int(route_TX.any(axis=0).sum())


def _far_apart(route_TX: BoolArray, half: int, rng: np.random.Generator) -> BoolArray:
    """Halves around a token drawn at random and the one furthest from it."""
    one = int(rng.integers(len(route_TX)))
    far_T = (route_TX ^ route_TX[one]).sum(axis=1)
    other = int(np.argmax(far_T))
    return _nearer(far_T - (route_TX ^ route_TX[other]).sum(axis=1), half)


def _nearer(lead_T: FloatArray | IntArray, half: int) -> BoolArray:
    """The `half` tokens whose distance to the left centre, less that to the right one, is least."""
    left_T = np.zeros(len(lead_T), bool)
    left_T[np.argsort(lead_T, kind="stable")[:half]] = True
    return left_T


def _two_means(route_TX: BoolArray, left_T: BoolArray, half: int, rounds: int) -> BoolArray:
    """Balanced 2-means over Hamming distances: the distance of a route to a centre of shares c is |x - c|, summed."""
    x_TX = route_TX.astype(np.float64)
    for _ in range(rounds):
        left_X, right_X = x_TX[left_T].mean(axis=0), x_TX[~left_T].mean(axis=0)
        # |x - c| = c + x (1 - 2c) for x in {0, 1}: c alone is the same for all tokens
        lead_T = x_TX @ (2 * (right_X - left_X))
        new_T = _nearer(lead_T, half)
        if (new_T == left_T).all():
            break
        left_T = new_T
    return left_T


def _swap(route_TX: BoolArray, left_T: BoolArray, most: int) -> BoolArray:
    """Exchange the pair of tokens that frees most experts, again and again."""
    left_T = left_T.copy()
    for _ in range(most):
        a, b = np.flatnonzero(left_T), np.flatnonzero(~left_T)
        x, y = route_TX[a].astype(np.float64), route_TX[b].astype(np.float64)
        change = _change(x, y) + _change(y, x).T
        at = int(np.argmin(change))
        if change.flat[at] >= 0:
            break
        i, j = divmod(at, len(b))
        left_T[a[i]], left_T[b[j]] = False, True
    return left_T


def _change(own_AX: FloatArray, other_BX: FloatArray) -> FloatArray:
    """By how many experts a batch grows [A, B] when its token a leaves and b comes: what a alone used is freed unless b
    uses it, and what nobody used comes with b."""
    count_X = own_AX.sum(axis=0)
    alone_AX, new_BX = own_AX * (count_X == 1), other_BX * (count_X == 0)
    change: FloatArray = alone_AX @ other_BX.T - alone_AX.sum(axis=1)[:, None] + new_BX.sum(axis=1)[None, :]
    return change
