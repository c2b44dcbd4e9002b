"""Expert choice: each expert takes its C best tokens; a token gets none, one or many experts.

Source: Zhou et al. 2022 (arXiv:2202.09368), section 3.2: s = softmax over experts, C = T k / E, gates are s. EC-DLM
(arXiv:2604.01622, its code) differs: each expert takes the highest raw logits of a sequence, and a token's gates are
the softmax over the experts that took it. There k follows the denoising steps of a diffusion language model: k =
round(kmin + (kmax - kmin) * f(r)), r the share of the text that is still masked, here 1 - `context.progress`; f is r, 1
- r, (1 - cos(pi r)) / 2, (1 + cos(pi r)) / 2, or a Gaussian about 1/2 of width 0.22, rescaled to 0 at both ends and 1
in the middle, or 1 less that. The code has an r and a k for each sequence; ours is one for the batch (reconstruction).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moesim.routing import NONE, Floats, Routed, Router, RoutingContext, softmax
from moesim.routing.select import check_top_k, chosen, close_as, gates_of, kth_highest, ranked

__all__ = ["Policy"]

_GAUSSIAN_WIDTH = 0.22
Schedule = Literal["linear_reverse", "linear", "cosine", "cosine_reverse", "gaussian", "gaussian_reverse"]


class Policy(Router):
    """experts_per_token: k, the mean number of experts of a token; none: the model's top_k. scope: whose tokens
    compete, the `batch`'s or each `sequence`'s. schedule: how k goes from k_min to k_max with `context.progress`.
    choose_by: experts compare tokens by their softmax over experts, or by raw logits. gates: that softmax, or one over
    the `chosen` alone: a token's experts.
    """

    couples: ClassVar[bool] = True
    free_gates: ClassVar[bool] = True
    ragged: ClassVar[bool] = True

    experts_per_token: float | None = Field(default=None, gt=0)
    scope: Literal["batch", "sequence"] = "batch"
    choose_by: Literal["softmax", "logits"] = "softmax"
    gates: Literal["softmax", "chosen"] = "softmax"
    schedule: Schedule | None = None
    k_min: float | None = Field(default=None, gt=0)
    k_max: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        low, high = self.k_min, self.k_max
        if self.schedule is None and (low is not None or high is not None):
            raise ValueError("k_min and k_max are ends of a schedule, but there is none. Name one, or leave them out.")
        if self.schedule is not None and (low is None or high is None or low > high or self.experts_per_token):
            raise ValueError(
                "a schedule goes from k_min to k_max and leaves experts_per_token out, got"
                f" k_min {low}, k_max {high}, experts_per_token {self.experts_per_token}"
            )
        return self

    @property
    def denoises(self) -> bool:  # type: ignore[override]
        """The schedule follows denoising."""
        return self.schedule is not None

    def width(self, top_k: int, num_experts: int) -> int:
        """A token can be taken by every expert."""
        return num_experts

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Each expert's C highest tokens of a scope (of equals the first); W: the most a token got, at least 1."""
        tokens, experts = score_TE.shape
        check_top_k(context.top_k, experts)
        share_TE = softmax(score_TE)
        per_token = self._per_token(context)
        worth_TE = score_TE if self.choose_by == "logits" else close_as(score_TE, share_TE.copy())
        choice_ET = np.ascontiguousarray(worth_TE.T)
        taken_ET = np.zeros((experts, tokens), bool)
        for start_N, length in _scopes(context.sequence_T if self.scope == "sequence" else None, tokens):
            room = min(length, max(1, math.floor(length * per_token / experts)))
            if length == tokens:
                taken_ET = _best(choice_ET, room)
                break
            at_NS = start_N[:, None] + np.arange(length)
            taken_ET[:, at_NS] = _best(choice_ET[:, at_NS].reshape(-1, length), room).reshape(experts, -1, length)
        taken_TE = np.ascontiguousarray(taken_ET.T)
        expert_TW = ranked(worth_TE, taken_TE, max(1, int(taken_TE.sum(1).max(initial=0))))
        if self.gates == "softmax":
            return Routed(expert_TW, gates_of(share_TE, expert_TW, False))
        logit_TW = chosen(score_TE, expert_TW)
        logit_TW[expert_TW == NONE] = -np.inf
        return Routed(expert_TW, softmax(logit_TW))

    def _per_token(self, context: RoutingContext) -> float:
        if self.schedule is None or self.k_min is None or self.k_max is None:
            return context.top_k if self.experts_per_token is None else self.experts_per_token
        r = 1 - context.progress
        share = {
            "linear_reverse": 1 - r,
            "linear": r,
            "cosine": (1 - math.cos(math.pi * r)) / 2,
            "cosine_reverse": (1 + math.cos(math.pi * r)) / 2,
            "gaussian": _bell(r),
            "gaussian_reverse": 1 - _bell(r),
        }[self.schedule]
        return round(self.k_min + (self.k_max - self.k_min) * share)


def _bell(r: float) -> float:
    """0 at both ends, 1 in the middle."""
    at, end = (math.exp(-((x - 0.5) ** 2) / (2 * _GAUSSIAN_WIDTH**2)) for x in (r, 0.0))
    return (at - end) / (1 - end)


def _scopes(sequence_T: NDArray[np.int64] | None, tokens: int) -> list[tuple[NDArray[np.int64], int]]:
    """First tokens of the scopes of each length: the whole batch, or runs of one sequence."""
    if not tokens:
        return []
    if sequence_T is None:
        return [(np.zeros(1, np.int64), tokens)]
    start_N = np.flatnonzero(np.r_[True, sequence_T[1:] != sequence_T[:-1]])
    length_N = np.diff(np.r_[start_N, tokens])
    return [(start_N[length_N == length], int(length)) for length in np.unique(length_N)]


def _best(choice_NS: Floats, room: int) -> NDArray[np.bool_]:
    """Mask of the `room` highest of each row, the first of equals; -inf is never taken."""
    edge_N1 = kth_highest(choice_NS, room)[:, None]
    best_NS: NDArray[np.bool_] = (choice_NS >= edge_N1) & (choice_NS > -np.inf)
    for row in np.flatnonzero(best_NS.sum(1) > room):  # equals at the edge: the last of them stay out
        level = np.flatnonzero(choice_NS[row] == edge_N1[row])
        best_NS[row, level[room - np.count_nonzero(choice_NS[row] > edge_N1[row]) :]] = False
    return best_NS
