"""Choosing and normalising: the vectorised pieces that routers share. Legend: T tokens, E experts, K chosen."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["NONE", "sigmoid", "softmax", "top_ids"]

Floats = NDArray[Any]

NONE: Final = -1
"""In an assignment: no expert in this place."""


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
