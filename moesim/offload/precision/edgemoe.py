"""EdgeMoE's bit widths: each expert in 8, 4 or 2 bits, by how much the model's accuracy minds.

Yi et al., "EdgeMoE" (arXiv 2308.14352): experts are sorted by the accuracy that is lost when they alone
are rounded, and the least sensitive are lowered, one after the other, while the whole model's loss stays small. A
reconstruction: the exact search is not public, and a simulator has no accuracy to measure, so the search here ends at a
size. Ours: an expert's loss at b bits is its sensitivity times 4^-b (the mean square error of uniform rounding falls to
a quarter with each bit); what is lowered next is the step that loses least for each byte it saves.
What is lost: the paper reports at most 2 % of accuracy (quoted, not computed).
"""

from __future__ import annotations

import heapq
from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import FloatArray, IntArray
from moesim.errors import BadInput
from moesim.offload import Compressed, OffloadContext
from moesim.offload.precision.base import Grid, Precision, own_map, the_grid

__all__ = ["Policy", "lower"]

QUALITY = "at most 2 % accuracy lost (arXiv 2308.14352, abstract)"


class Policy(Precision):
    """widths: bits that an expert may have. average: bits a weight over all experts, by their size: the budget.
    sensitivity: loss of each expert, [L, E]; None: its popularity (ours: what is used more is rounded less)."""

    widths: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = (8.0, 4.0, 2.0)
    average: Annotated[float, Field(gt=0, le=32)] = 4.0
    sensitivity: Grid | None = None

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`. Widths above the model's own are left out. Raises BadInput
        where the budget is below the least width."""
        widths = sorted({min(w, bits) for w in self.widths}, reverse=True)
        if widths[-1] > self.average or min(self.widths) <= 0:
            raise BadInput(
                f"policies.precision.average must be at least the least width, {widths[-1]:g} bits, which must be above"
                f" 0; got {self.average:g}. Add a smaller width, or raise the average."
            )
        sensitive_LE = the_grid(self.sensitivity, "sensitivity", context)
        if sensitive_LE is None:
            sensitive_LE = context.popularity_LE
        width_LE = lower(sensitive_LE, context.size_LE, np.array(widths), self.average)
        return Compressed(width_LE, own_map(context), quality=QUALITY)


def lower(sensitive_LE: FloatArray, size_LE: IntArray, widths: FloatArray, average: float) -> FloatArray:
    """Width of each expert [L, E] once enough of them have been lowered, cheapest step first (of equals the lower key).

    widths: falling. size_LE: weights of an expert, in any unit. Budget: sum(size * width) <= average * sum(size).
    """
    error = 4.0 ** -np.asarray(widths)
    sensitive, size = sensitive_LE.reshape(-1), size_LE.reshape(-1)
    at = np.zeros(len(size), np.int64)

    def step(key: int) -> tuple[float, int]:
        i = int(at[key])
        loss = float(sensitive[key] * (error[i + 1] - error[i]))
        return loss / float(size[key] * (widths[i] - widths[i + 1])), key

    over = float(size.sum()) * (float(widths[0]) - average)
    queue = [step(key) for key in range(len(size))] if len(widths) > 1 else []
    heapq.heapify(queue)
    while over > 1e-9 * float(size.sum()):
        _, key = heapq.heappop(queue)
        over -= float(size[key] * (widths[at[key]] - widths[at[key] + 1]))
        at[key] += 1
        if at[key] + 1 < len(widths):
            heapq.heappush(queue, step(key))
    return np.asarray(np.asarray(widths, np.float64)[at].reshape(size_LE.shape))
