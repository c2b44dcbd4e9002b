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


class Run(NamedTuple):
    """Consecutive steps of one batch: cumulative time after each, and the key to explain them."""

    cumulative_ns: IntArray
    key: Key
    detail: object = None

    def cut(self, steps: int) -> Run:
        """The first `steps` steps (a copy: the rest is given back)."""
        return Run(self.cumulative_ns[:steps].copy(), self.key, self.detail)


@dataclass(slots=True)
class Batch:
    """Decoding requests of a group by rank: how many, the sum of their contexts (each with the token being
    computed), the same cut to the attention window, and how many still grow inside it."""

    decoding_D: IntArray
    context_D: IntArray
    growing_D: IntArray
    window_D: IntArray
    total_decoding: int
    tick: int
    tokens: Callable[[], tuple[IntArray, IntArray, IntArray]]

    @classmethod
    def idle(cls, ranks: int, tokens: Callable[[], tuple[IntArray, IntArray, IntArray]]) -> Batch:
        """Nobody decodes."""
        zeros = [np.zeros(ranks, np.int64) for _ in range(4)]
        return cls(zeros[0], zeros[1], zeros[2], zeros[3], 0, 0, tokens)

    def set(self, d: int, decoding: int, context: int, growing: int, window: int) -> None:
        """Rank `d` has changed."""
        self.total_decoding += decoding - int(self.decoding_D[d])
        self.decoding_D[d] = decoding
        self.context_D[d] = context
        self.growing_D[d] = growing
        self.window_D[d] = window

    def running(self, paused: list[int]) -> int:
        """Decode tokens of a step in which the ranks `paused` do not decode."""
        return self.total_decoding - sum(int(self.decoding_D[d]) for d in paused)

    def advance(self, steps: int, paused: list[int]) -> None:
        """`steps` decode steps have passed, on all ranks but `paused`."""
        context, window = self.context_D[paused], self.window_D[paused]
        self.context_D += self.decoding_D * steps
        self.window_D += self.growing_D * steps
        if paused:
            self.context_D[paused] = context
            self.window_D[paused] = window


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
