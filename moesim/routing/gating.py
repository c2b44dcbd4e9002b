"""Pieces that routers of varying width share: choices with empty places, gates with zeros at them.

Legend: T tokens, E experts, K chosen, W places of a token. In ids `NONE` stands where a token takes no expert.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing import Floats, Routed, RoutingContext
from moesim.routing.select import NONE, chosen, ranked, sigmoid, softmax, top_ids

__all__ = ["compact", "descending", "known", "open_ids", "plain", "probabilities", "weigh"]


def probabilities(score_TE: Floats, context: RoutingContext) -> Floats:
    """Gates of all experts before the choice, [T, E]: softmax or sigmoid as the model scores; 0 for -inf."""
    return sigmoid(score_TE) if context.scoring == "sigmoid" else softmax(score_TE)


def open_ids(score_TE: Floats, k: int) -> NDArray[np.int32]:
    """As `top_ids`, but where a row has fewer than `k` scores above -inf its last places hold NONE; [T, min(k, E)]."""
    _refuse_nan(score_TE)
    return ranked(score_TE, score_TE > -np.inf, min(k, score_TE.shape[1]))


def descending(score_TE: Floats) -> NDArray[np.int64]:
    """All ids by falling score, of equal scores the lowest first, [T, E]."""
    _refuse_nan(score_TE)
    return ranked(score_TE, np.ones(score_TE.shape, bool), score_TE.shape[1]).astype(np.int64)


def _refuse_nan(score_TE: Floats) -> None:
    if np.isnan(score_TE.max(initial=0)):
        raise ValueError("scores must not be NaN")


def weigh(gate_TE: Floats, expert_TW: NDArray[np.int32], normalise: bool) -> Floats:
    """Gates of the chosen, [T, W]: 0 at NONE, divided by their sum if asked (equal ones where the sum is 0)."""
    taken_TW = expert_TW != NONE
    gate_TW = np.where(taken_TW, chosen(gate_TE, expert_TW), 0).astype(gate_TE.dtype)
    if not normalise:
        return gate_TW
    sum_T1 = gate_TW.sum(1, keepdims=True)
    gate_TW = np.where((sum_T1 > 0) | ~taken_TW, gate_TW, 1).astype(gate_TE.dtype)
    # twice: gates near the smallest number of the dtype lose their digits in the first sum
    gate_TW /= np.maximum(gate_TW.max(1, keepdims=True, initial=0), np.finfo(gate_TW.dtype).tiny)
    gate_TW /= np.maximum(gate_TW.sum(1, keepdims=True), np.finfo(gate_TW.dtype).tiny)
    return gate_TW


def compact(expert_TW: NDArray[np.int32], keep_TW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The kept ids of each token moved to its first places in their order, NONE in the rest."""
    order_TW = np.argsort(~keep_TW, axis=1, kind="stable")
    moved: NDArray[np.int32] = np.take_along_axis(np.where(keep_TW, expert_TW, NONE), order_TW, 1).astype(np.int32)
    return moved


def plain(score_TE: Floats, context: RoutingContext, top_k: int | None = None, normalise: bool | None = None) -> Routed:
    """Top-k over the scores (over gates with context.bias_E added where there is one), the lowest id of equals.

    Raises ValueError when a token has fewer than K scores above -inf.
    """
    gate_TE = probabilities(score_TE, context)
    choice_TE = score_TE
    if context.bias_E is not None:
        choice_TE = np.where(np.isneginf(score_TE), -np.inf, gate_TE + context.bias_E)
    expert_TK = top_ids(choice_TE, context.top_k if top_k is None else top_k)
    return Routed(expert_TK, weigh(gate_TE, expert_TK, context.norm_topk_prob if normalise is None else normalise))


def known(fact_T: NDArray[Any] | None, tokens: int, who: str, what: str) -> NDArray[Any]:
    """The context's array over tokens; ValueError where nobody knows it or it is of another length."""
    if fact_T is None:
        raise ValueError(f"{who} needs {what} of every token and the context has none: give a workload that knows it")
    if len(fact_T) != tokens:
        raise ValueError(f"{who} needs {what} of every token: {tokens} tokens, {len(fact_T)} values")
    return fact_T
