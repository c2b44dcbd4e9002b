"""Which row of the pool a simulated token takes: a pure function of (seed, request, position).

A request takes a sequence of the pool (seeded permutations over all sequences, a fresh one each time round);
prompt position p takes row p of it, generated tokens go on from there, and past the end rows of the same
sequence are drawn again (DESIGN.md, "A simulated token's routing from a trace"). Nothing is consumed in
order, so any call order gives the same rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.rng import generator
from moesim.workload.pool import RoutingSource

__all__ = ["Replay", "Shares"]

RESAMPLE_TOKENS = 16
"""Past a sequence's end, rows are drawn again in runs of this many, so that neighbours stay neighbours:
drawing each row by itself would lose the repetition from token to token that caches and distinct-expert
counts live on."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


class Shares(NamedTuple):
    """Tokens by where their routing comes from."""

    replayed: int
    """rows of the pool taken for the first time"""
    reused: int
    """rows taken again, by another request on the same sequence"""
    resampled: int
    """positions past the end of their sequence, drawn again from it"""


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA'14), in place, wrapping mod 2**64."""
    scratch = state >> np.uint64(30)
    state ^= scratch
    state *= _MIX1
    np.right_shift(state, np.uint64(27), out=scratch)
    state ^= scratch
    state *= _MIX2
    np.right_shift(state, np.uint64(31), out=scratch)
    state ^= scratch
    return state


class Replay:
    """Rows of `source` for every token of every request.

    `prompt_tokens`, `output_tokens`: int64 [R]. A source with drift windows keeps time: the requests, in
    order, pass through the windows in order, and a request takes a sequence of its own window.
    """

    def __init__(self, source: RoutingSource, prompt_tokens: ArrayLike, output_tokens: ArrayLike, seed: int) -> None:
        self.source = source
        prompt_R, output_R = np.asarray(prompt_tokens, np.int64), np.asarray(output_tokens, np.int64)
        self.sequence_R = _assign_sequences(source, len(prompt_R), seed)
        self._start_R = source.sequence_start[self.sequence_R]
        self._length_R = source.sequence_tokens_Q[self.sequence_R]
        self._prompt_R = prompt_R
        self._computed_R = prompt_R + np.maximum(output_R - 1, 0)
        self._salt = np.uint64(generator(seed, "routing/replay/salt").integers(0, 1 << 63, dtype=np.int64))

    def rows(self, request_N: ArrayLike, position_N: ArrayLike) -> NDArray[np.int64]:
        """int64: the pool's row for position `position_N` (0: first prompt token) of request `request_N`.

        The arguments broadcast against each other, and the result has their shape. Positions may lie past prompt +
        output (speculated tokens).
        """
        request = np.asarray(request_N)
        position = np.asarray(position_N, np.int64)
        if request.shape != position.shape:
            request, position = np.broadcast_arrays(request, position)
        if position.ndim != 1:
            return self.rows(request.ravel(), position.ravel()).reshape(position.shape)
        length = self._length_R[request]
        row: NDArray[np.int64] = self._start_R[request]
        past = np.flatnonzero(position >= length)
        if past.size == 0:
            row += position
            return row
        position = position.copy() if past.size < position.size else position
        at = position[past]
        resampled = self._resample(request[past], at, length[past])
        if past.size == position.size:
            row += resampled
            return row
        position[past] = resampled
        row += position
        return row

    def tenth(self, request_N: ArrayLike, position_N: ArrayLike) -> NDArray[np.int64]:
        """Which tenth of its request's tokens (0 .. 9) each position lies in."""
        request, position = np.asarray(request_N), np.asarray(position_N, np.int64)
        tenth: NDArray[np.int64] = np.minimum(position * 10 // np.maximum(self._computed_R[request], 1), 9)
        return tenth

    @property
    def prompt_R(self) -> NDArray[np.int64]:
        """Prompt tokens of each request."""
        return self._prompt_R

    @property
    def computed_R(self) -> NDArray[np.int64]:
        """Positions of each request that are computed: prompt and output, less the last token."""
        return self._computed_R

    def _resample(
        self, request_N: NDArray[np.int64], position_N: NDArray[np.int64], length_N: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Places within the sequence: runs of RESAMPLE_TOKENS rows from a start drawn by (request, run),
        wrapping."""
        ahead = position_N - length_N
        run = ahead // RESAMPLE_TOKENS
        state = request_N.astype(np.uint64)
        state *= _GOLDEN
        state += self._salt
        state = _splitmix64(state)
        state += run.astype(np.uint64) * _GOLDEN
        state = _splitmix64(state)
        state >>= np.uint64(32)
        state *= length_N.astype(np.uint64)
        state >>= np.uint64(32)
        place = state.astype(np.int64)
        place += ahead - run * RESAMPLE_TOKENS
        over = place >= length_N
        if over.any():
            place[over] %= length_N[over]
        return place

    def shares(self, request: ArrayLike | None = None, tokens: ArrayLike | None = None) -> Shares:
        """Tokens replayed, reused and resampled, from lengths alone.

        `request`: ids of the requests counted (default all); `tokens`: how many of each one's positions were
        computed (default prompt + output - 1: the last output token is never fed back).
        """
        ids = np.arange(len(self.sequence_R)) if request is None else np.asarray(request, np.int64)
        used = self._computed_R[ids] if tokens is None else np.asarray(tokens, np.int64)
        within = np.minimum(used, self._length_R[ids])
        furthest = np.zeros(self.source.num_sequences, np.int64)
        np.maximum.at(furthest, self.sequence_R[ids], within)
        replayed, total = int(furthest.sum()), int(within.sum())
        return Shares(replayed, total - replayed, int(used.sum()) - total)


def _assign_sequences(source: RoutingSource, requests: int, seed: int) -> NDArray[np.int64]:
    """Each request's sequence, int64 [R]: permutations one after another, within the request's drift
    window."""
    window_Q = source.window_Q
    if window_Q is None:
        return _permutations(np.arange(source.num_sequences), requests, seed, 0)
    windows = np.unique(window_Q)
    out = np.empty(requests, np.int64)
    edges = [requests * w // len(windows) for w in range(len(windows) + 1)]
    for w, value in enumerate(windows):
        lo, hi = edges[w], edges[w + 1]
        out[lo:hi] = _permutations(np.flatnonzero(window_Q == value), hi - lo, seed, w)
    return out


def _permutations(sequences: NDArray[np.int64], count: int, seed: int, key: int) -> NDArray[np.int64]:
    turns = -(-count // len(sequences))
    order = [generator(seed, "routing/replay", key, t).permutation(sequences) for t in range(turns)]
    return np.concatenate(order)[:count] if order else np.empty(0, np.int64)
