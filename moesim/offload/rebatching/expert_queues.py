"""A queue of tokens for each expert; the longest one is served first (Read-ME's expert-aware batching, arXiv
2410.19123).

Read-ME routes a token before it is run, to the same expert in every layer. Its batches take tokens from the longest
queue, then from the next longest, until they are full. Where layers route apart (any other model) a token stands in the
queue of the expert that it uses most often over all layers and choices; that is ours.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import IntArray
from moesim.offload import StepRoutes
from moesim.spec import Spec

__all__ = ["Policy", "queue_of"]


class Policy(Spec):
    """pool: batches of tokens that wait together; Read-ME looks at all queued requests, so more is nearer to it, and
    its longest waits are longer. Routes are known exactly: the router has run for all that wait.
    """

    pool: Annotated[int, Field(ge=1, le=1 << 16)] = 4

    def split(self, step: StepRoutes, num_experts: int, limit: int) -> list[IntArray]:
        """See `moesim.offload.RebatchingPolicy.split`. Of equally long queues the one of the lower expert goes first;
        within a queue tokens keep their order."""
        out: list[IntArray] = []
        queue_T = queue_of(step, num_experts)
        for start in range(0, len(queue_T), self.pool * limit):
            rows = np.arange(start, min(start + self.pool * limit, len(queue_T)), dtype=np.int64)
            out += _drain(rows, queue_T[rows], num_experts, limit)
        return out


def queue_of(step: StepRoutes, num_experts: int) -> IntArray:
    """The queue [T] of each token: the expert that it uses most, the lowest of equals; num_experts: it uses none."""
    tokens, layers, choices = step.expert_TLK.shape
    ids = np.minimum(np.asarray(step.expert_TLK, np.int64), num_experts).reshape(tokens, layers * choices)
    count_TE = np.zeros((tokens, num_experts + 1), np.int64)
    np.add.at(count_TE, (np.arange(tokens)[:, None], ids), 1)
    most_T = np.argmax(count_TE[:, :num_experts], axis=1)
    return np.where(count_TE[:, :num_experts].any(axis=1), most_T, num_experts)


def _drain(rows: IntArray, queue_T: IntArray, num_experts: int, limit: int) -> list[IntArray]:
    """Batches until nobody waits."""
    waiting = [rows[queue_T == expert].tolist() for expert in range(num_experts + 1)]
    out: list[IntArray] = []
    while any(waiting):
        batch: list[int] = []
        while len(batch) < limit and any(waiting):
            longest = max(range(num_experts + 1), key=lambda e: len(waiting[e]))
            room = limit - len(batch)
            batch += waiting[longest][:room]
            waiting[longest] = waiting[longest][room:]
        out.append(np.array(batch, np.int64))
    return out
