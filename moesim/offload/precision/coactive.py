"""Which experts are alike, as far as routes tell: whose tokens take the same others."""

from __future__ import annotations

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.offload import OffloadContext

__all__ = ["likeness", "nearest"]


def likeness(context: OffloadContext, layer: int) -> FloatArray | None:
    """Cosine likeness of a layer's experts [E, E] by their profiles: how often an expert's tokens take each expert of
    the same layer (itself apart), of the one before and of the next. None where there is no sample.

    MC-SMoE compares the router's logits over tokens (arXiv 2310.01334); where a sample has none, profiles
    stand for them (ours)."""
    if context.fit is None or not len(context.fit.expert_TLK):
        return None
    ids_TLK, none = context.fit.expert_TLK, context.num_experts
    hot_TE = _hot(ids_TLK[:, layer], none)
    beside = [other for other in (layer - 1, layer + 1) if 0 <= other < context.num_layers]
    parts = [hot_TE.T @ _hot(ids_TLK[:, other], none) for other in beside]
    profile = np.concatenate([hot_TE.T @ hot_TE * (1.0 - np.eye(none)), *parts], axis=1)
    length = np.linalg.norm(profile, axis=1, keepdims=True)
    unit = profile / np.where(length > 0, length, 1.0)
    return np.asarray(unit @ unit.T)


def nearest(like_EE: FloatArray | None, kept: IntArray, order: IntArray) -> IntArray:
    """Who of `kept` serves each expert [E]: the most like it, of equals the earlier in `kept`; kept ones themselves.
    Without likeness the others are dealt out in turn, in the order `order`."""
    experts = len(order)
    out = np.arange(experts, dtype=np.int64)
    others = order[~np.isin(order, kept)]
    if like_EE is None:
        out[others] = kept[np.arange(len(others)) % len(kept)]
    else:
        out[others] = kept[np.argmax(like_EE[np.ix_(others, kept)], axis=1)] if len(others) else others
    return out


def _hot(ids_TK: AnyArray, none: int) -> FloatArray:
    out = np.zeros((len(ids_TK), none + 1))
    np.put_along_axis(out, np.minimum(ids_TK, none).astype(np.int64), 1.0, axis=1)
    return out[:, :-1]
