"""What a step costs, given the batch: the seam between the engine and the cost model.

The engine hands over a `Batch` (who decodes where, with how much context) and the prompt chunks of the step;
a pricer answers with integer nanoseconds. Every operation is rounded to a nanosecond before any sum, so a
run priced at once and the same steps priced one by one agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from moesim.arrays import IntArray

__all__ = ["Batch", "Chunk", "Key", "Pricer", "Run"]


class Chunk(NamedTuple):
    """Prompt tokens of one request in a step: `start` tokens are in the KV cache, `tokens` more are
    computed.
    """

    rank: int
    request: int
    start: int
    tokens: int
    last: bool


class Key(NamedTuple):
    """What `explain` needs to split a run into operators: its critical rank's batch, and the tokens
    of all ranks.
    """

    tick: int
    tokens: int  # tokens on the critical rank, after padding
    sampled: int  # sequences that get an output token on it
    decoding: int
    context: int
    context_window: int
    growing: int
    prefill_attention_ns: int
    total_decode: int  # tokens of all ranks
    total_prefill: int
    busiest_tokens: int  # tokens on the rank with the most, before padding
    halves: int = 1  # 2: each rank computes two halves of its tokens; the critical rank's numbers are the first one's


class Run(NamedTuple):
    """Consecutive steps of one batch: cumulative time after each, and the key to explain them. rebalance_ns: of that
    time, what moving experts added, cumulative, too; None: nothing."""

    cumulative_ns: IntArray
    key: Key
    detail: object = None
    rebalance_ns: IntArray | None = None

    def cut(self, steps: int) -> Run:
        """The first `steps` steps (a copy: the rest is given back)."""
        added = None if self.rebalance_ns is None else self.rebalance_ns[:steps].copy()
        cut = getattr(self.detail, "cut", None)
        return Run(self.cumulative_ns[:steps].copy(), self.key, self.detail if cut is None else cut(steps), added)


@dataclass(slots=True)
class Batch:
    """Decoding requests of a group by rank: how many, the sum of their contexts (each with the token being
    computed), how many still grow inside the attention window, and the contexts cut to it.

    A group of one rank keeps its four numbers in `alone`, in that order, and leaves the arrays at zero.
    """

    decoding_D: IntArray
    context_D: IntArray
    growing_D: IntArray
    window_D: IntArray
    alone: list[int]
    ranks: int
    total_decoding: int
    tick: int
    tokens: Callable[[], tuple[IntArray, IntArray, IntArray]]

    @classmethod
    def idle(cls, ranks: int, tokens: Callable[[], tuple[IntArray, IntArray, IntArray]]) -> Batch:
        """Nobody decodes."""
        zeros = [np.zeros(ranks, np.int64) for _ in range(4)]
        return cls(zeros[0], zeros[1], zeros[2], zeros[3], [0, 0, 0, 0], ranks, 0, 0, tokens)

    def set(self, d: int, decoding: int, context: int, growing: int, window: int) -> None:
        """Rank `d` has changed."""
        if self.ranks == 1:
            self.total_decoding = decoding
            self.alone = [decoding, context, growing, window]
            return
        self.total_decoding += decoding - int(self.decoding_D[d])
        self.decoding_D[d] = decoding
        self.context_D[d] = context
        self.growing_D[d] = growing
        self.window_D[d] = window

    def running(self, paused: list[int]) -> int:
        """Decode tokens of a step in which the ranks `paused` do not decode."""
        if not paused:
            return self.total_decoding
        return 0 if self.ranks == 1 else self.total_decoding - int(self.decoding_D[paused].sum())

    def busiest(self) -> int:
        """Decode tokens of the rank that has most."""
        return self.total_decoding if self.ranks == 1 else int(self.decoding_D.max())

    def advance(self, steps: int, paused: list[int]) -> None:
        """`steps` decode steps have passed, on all ranks but `paused`."""
        if self.ranks == 1:
            if not paused:
                alone = self.alone
                alone[1] += alone[0] * steps
                alone[3] += alone[2] * steps
            return
        step_D, grow_D = self.decoding_D * steps, self.growing_D * steps
        if paused:
            step_D[paused] = 0
            grow_D[paused] = 0
        self.context_D += step_D
        self.window_D += grow_D


class Pricer(Protocol):
    """Prices the steps of one group."""

    def prepare(self, decoding: int) -> None:
        """A rank is about to decode `decoding` requests a step."""
        ...

    def decode(self, batch: Batch, steps: int) -> Run:
        """The next `steps` steps, or as many of them as it likes to price at once (at least one)."""
        ...

    def mixed(self, batch: Batch, chunks: list[Chunk], paused: list[int]) -> Run:
        """One step with prompt chunks; the decodes of the ranks `paused` do not run."""
        ...
