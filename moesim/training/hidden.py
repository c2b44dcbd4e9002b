"""Sums of gradients that share the stream between ranks with the experts' exchange (FSMoE, arXiv:2501.10714).

Where `communication.overlap` is fsmoe, sums are no free second stream: beside a MoE layer they take the time that its
all-to-alls leave, beside anything else all of it. Which part of the sums runs where, and in how many chunks each MoE
layer of the backward pass is cut when sums run beside it, is decided at once (`moesim.overlap.gradients.partition`).
Chunks are taken from those that are fastest without sums and those that leave more of the stream.

The pass is that of the replica that the others wait for. A bucket's sum may be cut anywhere, as FSMoE cuts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.cost.chunks import ChunkPrices
from moesim.overlap.gradients import Slot, partition

__all__ = ["LayerOptions", "exposed_ns"]


class LayerOptions(NamedTuple):
    """A MoE layer's backward pass under each degree [R]: ns in all, and of it ns of the stream between ranks."""

    base_R: FloatArray
    floor_R: FloatArray

    @classmethod
    def of(cls, options: Sequence[ChunkPrices], at: tuple[int, int, int], more: int, travel: int) -> LayerOptions:
        """at: micro-batch, replica and layer. more, travel: ns of what runs besides (recomputation), and of it those of
        the stream between ranks."""
        base_R = np.array([int(o.total[at]) for o in options], np.float64) + more
        floor_R = np.array([int(o.travel[at]) for o in options], np.float64) + travel
        keep: list[int] = []
        least = math.inf
        for i in np.lexsort((floor_R, base_R)).tolist():  # slower ones only where they leave more of the stream
            if floor_R[i] < least:
                keep.append(i)
                least = float(floor_R[i])
        return cls(base_R[keep], floor_R[keep])


def exposed_ns(passes: Sequence[Sequence[int | LayerOptions | None]], ready_B: IntArray, start_ns: int) -> int:
    """By how much sums of gradients make a step longer, ns.

    passes: what runs in each micro-batch whose gradients are summed, in order: ns of work that leaves the stream free,
    the options of a MoE layer, or None where the next bucket's gradients are ready. ready_B: ns of each bucket's sum,
    in that order; start_ns: of one with next to nothing in it.
    """
    slots: list[Slot] = []
    zero = np.zeros(1)
    waiting = 0.0
    for one in passes:
        bucket = 0
        for item in one:
            if item is None:
                waiting += max(0.0, float(ready_B[bucket]) - start_ns) if ready_B[bucket] else 0.0
                bucket += 1
                continue
            base_R, floor_R = (np.array([float(item)]), zero) if isinstance(item, int) else item
            slots.append(Slot(base_R, floor_R, waiting))
            waiting = 0.0
    slots.append(Slot(zero, zero, waiting))
    alone = sum(float(slot.base_R.min()) for slot in slots)
    return max(0, math.ceil(partition(slots, float(start_ns)).total - alone))
