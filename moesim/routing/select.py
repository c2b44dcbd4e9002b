"""Choosing and normalising: the vectorised pieces that routers share. Legend: T tokens, E experts, K chosen."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NONE", "check_top_k", "gates_of", "kth_highest", "load_of", "normalised", "ranked", "sigmoid", "softmax",
    "top_ids",
]  # fmt: skip

Floats = NDArray[Any]

NONE: Final = -1
"""In an assignment: no expert in this place."""


def check_top_k(k: int, experts: int) -> None:
    """Raises ValueError unless a token can take `k` of `experts`."""
    if not 1 <= k <= experts:
        raise ValueError(f"between 1 and {experts} experts a token can be chosen, got {k}")


def top_ids(score_TE: Floats, k: int) -> NDArray[np.int32]:
    """Ids of the `k` highest scores of each row, highest first, int32 [T, k]; of equal scores the lowest id.

    k passes of argmax: for k << E as fast as a partition, and its ties do not depend on the machine.
    """
    tokens, experts = score_TE.shape
    check_top_k(k, experts)
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


def normalised(gate_TW: Floats) -> Floats:
    """Each row divided by its sum; a row of zeros stays one."""
    out: Floats = gate_TW / np.maximum(gate_TW.sum(1, keepdims=True), gate_TW.dtype.type(1e-20))
    return out


def gates_of(gate_TE: Floats, expert_TW: NDArray[np.int32], normalise: bool, scale: float = 1.0) -> Floats:
    """The chosen columns of `gate_TE` [T, W], 0 at NONE, divided by their sum where asked, times `scale`."""
    gate_TW = np.take_along_axis(gate_TE, np.maximum(expert_TW, 0).astype(np.int64), 1)
    gate_TW[expert_TW == NONE] = 0
    out: Floats = normalised(gate_TW) if normalise else gate_TW
    return out if scale == 1 else out * out.dtype.type(scale)


def kth_highest(score_NM: Floats, k: int) -> Floats:
    """The `k`-th highest of each row, [N], 1 <= k <= M, equal scores counted one by one."""
    wide = score_NM.shape[1]
    out: Floats = np.partition(score_NM, wide - k, axis=1)[:, wide - k]
    return out


def ranked(score_TE: Floats, taken_TE: NDArray[np.bool_], width: int) -> NDArray[np.int32]:
    """The experts of each token's mask, highest score first (the lowest id of equals), NONE behind; int32 [T, width].

    `width`: at least the most experts any token has.
    """
    key_TE = np.where(taken_TE, score_TE, -np.inf)
    order_TE = np.argsort(-key_TE, axis=1, kind="stable")[:, :width]
    return np.where(np.take_along_axis(taken_TE, order_TE, 1), order_TE, NONE).astype(np.int32)


def load_of(expert_TW: NDArray[np.int32], experts: int) -> NDArray[np.int64]:
    """Tokens of each expert, int64 [E]; NONE counts for nobody."""
    return np.bincount(expert_TW.ravel() + 1, minlength=experts + 1)[1:]
