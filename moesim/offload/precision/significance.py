"""How much an expert's rounding matters: how often it is taken and how much it weighs (MC-MoE, arXiv 2410.06270)."""

from __future__ import annotations

import numpy as np

from moesim.arrays import FloatArray
from moesim.offload import OffloadContext

__all__ = ["mean_weight", "shares", "significance"]


def significance(frequency_LE: FloatArray, weight_LE: FloatArray, alpha: float, beta: float) -> FloatArray:
    """f^alpha * w^beta with both divided by their layer's sum, [L, E] (arXiv 2410.06270)."""
    out: FloatArray = shares(frequency_LE) ** alpha * shares(weight_LE) ** beta
    return out


def shares(x_LE: FloatArray) -> FloatArray:
    """Each layer divided by its sum; equal parts where that is 0."""
    total_L = x_LE.sum(axis=1, keepdims=True)
    equal = np.full(x_LE.shape, 1.0 / x_LE.shape[1])
    return np.asarray(np.divide(x_LE, total_L, out=equal, where=total_L > 0))


def mean_weight(context: OffloadContext) -> FloatArray:
    """Mean gate weight of each expert where it was taken, [L, E]; 1 where no sample says."""
    out = np.ones((context.num_layers, context.num_experts))
    fit = context.fit
    if fit is None or fit.weight_TLK is None:
        return out
    for layer in range(context.num_layers):
        ids, weight = fit.expert_TLK[:, layer].ravel(), np.asarray(fit.weight_TLK[:, layer], np.float64).ravel()
        real = ids < context.num_experts
        count_E = np.bincount(ids[real], minlength=context.num_experts)
        sum_E = np.bincount(ids[real], weights=weight[real], minlength=context.num_experts)
        out[layer] = sum_E / np.maximum(count_E, 1)
    return out
