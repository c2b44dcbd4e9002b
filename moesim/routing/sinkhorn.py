"""Selective Sinkhorn routing: the K largest entries of a token's row of an entropic transport plan.

The plan is the matrix exp(score / temperature) scaled so that each token gives away 1 in all and each expert receives
T / E (Cuturi 2013, arXiv:1306.0895; for routing: Clark et al. 2022, arXiv:2202.01169). Selective Sinkhorn Routing uses
it in a small share of training steps and takes the gates from the plan; at other times the router is softmax top-k. By
others' accounts it sweeps up to 100 times, until a tolerance of 1e-4 to 1e-6 is met, at entropy weight 0.5 or 1: 8
sweeps are ours. Megatron-LM's Sinkhorn takes the ids from the plan and the gates from softmax or sigmoid.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from moesim.rng import generator
from moesim.routing import Floats, Routed, Router, RoutingContext, softmax, top_ids
from moesim.routing.select import check_top_k, close_as, each_chunk, gates_of

__all__ = ["Policy", "plan"]

_THIN = 1e-20
"""A column's sum below this may have lost parts to underflow in float32."""
_FAR = 1e6
"""Factors beyond this, or below its inverse, are folded into the kernel."""


class Policy(Router):
    """iterations: column and row scalings. temperature: of the entropy. share: of the training steps that use the
    plan (drawn by step, the same for all layers). inference: use it outside training too.

    norm_topk_prob: divide the chosen gates by their sum; none: as the model does. scaling_factor: multiplies the
    gates.
    """

    couples: ClassVar[bool] = True

    iterations: int = Field(default=8, ge=1, le=10_000)
    temperature: float = Field(default=1.0, gt=0)
    share: float = Field(default=1.0, ge=0, le=1)
    inference: bool = True
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K largest of each token's row of the plan (where it is not used: of its softmax)."""
        check_top_k(context.top_k, score_TE.shape[1])
        if self._uses_plan(context, len(score_TE)):
            gate_TE = plan(score_TE, self.temperature, self.iterations)
            choice_TE = close_as(score_TE, gate_TE.copy())
        else:
            gate_TE, choice_TE = softmax(score_TE), score_TE
        expert_TK = top_ids(choice_TE, context.top_k)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TK, gates_of(gate_TE, expert_TK, normalise, self.scaling_factor))

    def _uses_plan(self, context: RoutingContext, tokens: int) -> bool:
        # a lone token's plan is even over all experts, whatever its scores
        if not context.training:
            return self.inference and tokens > 1
        return bool(generator(context.seed, "routing/sinkhorn", context.step).random() < self.share)


def plan(score_TE: Floats, temperature: float, iterations: int) -> Floats:
    """exp(score / temperature) after `iterations` scalings of columns (sum T / E) then rows (sum 1).

    Of the scores' dtype; rows sum to 1 up to rounding, columns as far as the iterations have come. Scalings are kept as
    factors v_E of a kernel whose rows' largest entries are 1, and folded into it, in logs, before they leave the range
    in which float32 loses nothing (stabilised scaling: Schmitzer 2019, arXiv:1610.06519, section 3.1).
    """
    tokens, experts = score_TE.shape
    if not tokens:
        return score_TE.copy()
    log_TE: Floats = score_TE / score_TE.dtype.type(temperature)
    share = score_TE.dtype.type(tokens / experts)
    add_E = np.log(share) - _log_sum(log_TE)
    kernel_TE, most_T = _kernel(log_TE, add_E)
    v_E = np.ones_like(add_E)
    for step in range(iterations):
        row_T, column_E = _sums(kernel_TE, v_E)
        if step == iterations - 1:
            break
        next_E = v_E * share / np.where(column_E > 0, column_E, 1)
        if column_E.min() > _THIN and next_E.max() < _FAR and next_E.min() > 1 / _FAR:
            v_E = next_E
            continue
        add_E = add_E + np.log(v_E)
        add_E += np.log(share) - _log_sum(log_TE, add_E, most_T + np.log(row_T))
        kernel_TE, most_T = _kernel(log_TE, add_E)
        v_E = np.ones_like(add_E)

    def work(at: slice) -> None:
        kernel_TE[at] *= v_E
        kernel_TE[at] /= row_T[at, None]

    each_chunk(kernel_TE, work)
    return kernel_TE


def _kernel(log_TE: Floats, add_E: Floats) -> tuple[Floats, Floats]:
    """exp(log + add - most) and `most`, the highest of each row of log + add."""
    out_TE, most_T = np.empty_like(log_TE), np.empty(len(log_TE), log_TE.dtype)

    def work(at: slice) -> None:
        block = np.add(log_TE[at], add_E, out=out_TE[at])
        most_T[at] = block.max(1)
        block -= most_T[at, None]
        np.exp(block, out=block)

    each_chunk(log_TE, work)
    return out_TE, most_T


def _sums(kernel_TE: Floats, v_E: Floats) -> tuple[Floats, Floats]:
    """Sums of the rows of kernel * v, and of its columns once each row is divided by its sum."""
    row_T = np.empty(len(kernel_TE), kernel_TE.dtype)
    part: dict[int, Floats] = {}

    def work(at: slice) -> None:
        np.einsum("te,e->t", kernel_TE[at], v_E, out=row_T[at])
        part[at.start] = np.einsum("t,te->e", 1 / row_T[at], kernel_TE[at])

    each_chunk(kernel_TE, work)
    return row_T, _added(part) * v_E


def _log_sum(log_TE: Floats, add_E: Floats | None = None, less_T: Floats | None = None) -> Floats:
    """log of the sum of exp(log + add - less) down each column; 0 where all are -inf, so that they stay so."""
    whole_TE = log_TE if add_E is None or less_T is None else log_TE + add_E - less_T[:, None]
    most_E = whole_TE.max(0)
    most_E[np.isneginf(most_E)] = 0
    part: dict[int, Floats] = {}

    def work(at: slice) -> None:
        part[at.start] = np.exp(whole_TE[at] - most_E).sum(0)

    each_chunk(whole_TE, work)
    total_E = _added(part)
    out: Floats = most_E + np.log(np.where(total_E > 0, total_E, 1))
    return out


def _added(part: dict[int, Floats]) -> Floats:
    """Sums of chunks, added in the order of their rows, whichever thread was first."""
    out: Floats = np.sum([part[start] for start in sorted(part)], axis=0)
    return out
