"""Bit widths for the experts of a layer, exactly: the least cost within a sum of bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.errors import BadInput

__all__ = ["allocate"]


def allocate(cost_EB: FloatArray, width_B: Sequence[int], budget: int, present: Sequence[int] = ()) -> IntArray:
    """Width of each expert, int64 [E]: min sum_e cost[e, b_e] with sum_e b_e <= budget and each width of `present`
    given to at least one expert (MC-MoE's program: arXiv 2410.06270; `precision_solver.py`).

    One budget row and small integers: a multiple-choice knapsack, solved by dynamic programming over (experts so far,
    bits spent, widths of `present` used), O(E * budget * 2^|present| * B). Of equal costs, the earlier width in
    `width_B` of later experts. Raises BadInput where nothing fits.
    """
    experts, flags = len(cost_EB), 1 << len(present)
    flag_B = [sum(1 << i for i, width in enumerate(present) if width == w) for w in width_B]
    best = np.full((budget + 1, flags), np.inf)
    best[0, 0] = 0.0
    took = np.full((experts, budget + 1, flags), -1, np.int16)
    came = np.zeros((experts, budget + 1, flags), np.int16)
    for e in range(experts):
        new = np.full_like(best, np.inf)
        for b, width in enumerate(width_B):
            if width > budget:
                continue
            for flag in range(flags):
                cost_R = best[: budget + 1 - width, flag] + cost_EB[e, b]
                to = flag | flag_B[b]
                better_R = cost_R < new[width:, to]
                new[width:, to][better_R] = cost_R[better_R]
                took[e, width:, to][better_R] = b
                came[e, width:, to][better_R] = flag
        best = new
    spent = int(np.argmin(best[:, -1]))
    if not np.isfinite(best[spent, -1]):
        raise BadInput(
            f"bits of a layer's {experts} experts must add up to at most {budget} with at least one expert of each of"
            f" {list(present)} bits; the least they can is {min(width_B)} each. Raise the average."
        )
    out, flag = np.zeros(experts, np.int64), flags - 1
    for e in range(experts - 1, -1, -1):
        b = int(took[e, spent, flag])
        out[e] = width_B[b]
        spent, flag = spent - int(width_B[b]), int(came[e, spent, flag])
    return out
