"""A pool of whole tokens: which K experts each token takes in each MoE layer, in sequences. And counting
them.

Everything that can route a simulated token (a recorded trace, a synthetic model, an ideal balance) becomes a
`RoutingSource`. Legend: T tokens, L MoE layers, E experts, K experts a token, Q sequences, S steps, N rows
asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, Problem

__all__ = ["Ids", "RoutingSource", "count_ids", "count_steps", "id_dtype", "ideal_counts"]

Ids = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]
Rows = NDArray[np.int64]

_CHUNK_IDS = 1 << 17
"""Ids counted at once: their int64 keys (1 MiB) stay in a core's second-level cache."""
_ALONE_IDS = 4096
"""Steps with more ids than this, on average, are counted one by one: their narrow keys beat the calls saved."""
_CHUNK_CELLS = 1 << 20
"""Cells of (step, layer, expert) counted at once."""


def id_dtype(num_experts: int) -> np.dtype[Any]:
    """The narrowest dtype for expert ids: uint8 up to 256 experts, uint16 up to 65,536."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16 if num_experts <= 65_536 else np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class RoutingSource:
    """A pool of T whole tokens in Q sequences.

    `expert_TLK`: expert ids, K distinct ones a token and layer; an array or a read-only memory map. Where `ragged`, a
    token may take fewer: the places left hold `num_experts`, which is no expert.
    `weight_TLK`: gate weights, float16, or None. `sequence_start`: int64 [Q + 1]; sequence q is rows
    start[q]:start[q+1]. `recorded`: a trace of a real model (else a model's draw). `ideal`: every step's load
    counts as equal over experts. `domain_Q`, `window_Q`: request domain and drift window of each sequence,
    None where there is only one. `score_TLE`: the recorded router's logits, float16, by which (with a balancing bias
    where it has one) the experts were chosen; `token_T`: vocabulary ids; `phase_T`: 0 prefill, 1 decode; each None
    where nobody recorded it.
    """

    expert_TLK: Ids
    sequence_start: NDArray[np.int64]
    num_experts: int
    top_k: int
    recorded: bool
    source: str
    weight_TLK: NDArray[np.float16] | None = None
    layer_index: tuple[int, ...] | None = None
    domain_Q: NDArray[np.int16] | None = None
    window_Q: NDArray[np.int16] | None = None
    ideal: bool = False
    ragged: bool = False
    warnings: tuple[str, ...] = field(default=())
    score_TLE: NDArray[np.float16] | None = None
    token_T: NDArray[np.int64] | None = None
    phase_T: NDArray[np.uint8] | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.expert_TLK.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.expert_TLK.shape[1])

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_start) - 1

    @property
    def sequence_tokens_Q(self) -> NDArray[np.int64]:
        """Rows of each sequence."""
        return np.diff(self.sequence_start)

    def count_LE(self) -> NDArray[np.int64]:
        """How often each expert of each layer was taken over the whole pool."""
        return self.counted(self.expert_TLK)

    def counted(self, expert_TLK: Ids) -> NDArray[np.int64]:
        """Tokens per layer and expert of ids that read as this pool's do, int64 [L, E]."""
        return count_ids(expert_TLK, self.num_experts + self.ragged)[:, : self.num_experts]

    def with_ids(
        self, expert_TLK: Ids, source: str, *, ideal: bool = False, ragged: bool = False, num_experts: int = 0
    ) -> RoutingSource:
        """The same tokens and sequences with other experts, which no longer count as recorded.

        Gates and scores go with the old experts; token ids and phases stay.
        """
        return replace(
            self,
            expert_TLK=expert_TLK,
            num_experts=num_experts or self.num_experts,
            top_k=expert_TLK.shape[2],
            weight_TLK=None,
            score_TLE=None,
            recorded=False,
            source=source,
            ideal=ideal,
            ragged=ragged,
        )

    def part(self, share: tuple[float, float], where: str) -> RoutingSource:
        """The sequences between two shares of the pool, in order; arrays and memory maps are views.

        Shares are rounded to whole sequences each by itself, so parts that meet at a share leave none out and have none
        twice. Raises BadInput, naming the place `where`, for a part without a sequence.
        """
        total = self.num_sequences
        first, last = (round(end * total) for end in share)
        if first == last:
            message = (
                f"a part of the pool needs a sequence: {list(share)} of {total:,} sequences is {first} to {last}. "
                "Use shares further apart, or a trace of more sequences"
            )
            raise BadInput(Problem(where, message))
        if last - first == total:
            return self
        start = self.sequence_start[first : last + 1]
        rows, sequences = slice(int(start[0]), int(start[-1])), slice(first, last)
        cut = self._cut(rows, sequences, start - start[0])
        return replace(cut, source=f"{self.source}, sequences {first:,} to {last - 1:,} of {total:,}")

    def take_sequences(self, sequence_N: NDArray[np.int64]) -> RoutingSource:
        """A pool of the given sequences, in the given order (rows are copied)."""
        start, length = self.sequence_start[sequence_N], self.sequence_tokens_Q[sequence_N]
        ends = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        rows = np.arange(ends[-1]) + np.repeat(start - ends[:-1], length)
        return self._cut(rows, sequence_N, ends)

    def _cut(
        self, rows: slice | NDArray[np.int64], sequences: slice | NDArray[np.int64], sequence_start: NDArray[np.int64]
    ) -> RoutingSource:
        """The pool of these rows and sequences: views where they are slices, else copies."""
        return replace(
            self,
            expert_TLK=self.expert_TLK[rows],
            weight_TLK=None if self.weight_TLK is None else self.weight_TLK[rows],
            score_TLE=None if self.score_TLE is None else self.score_TLE[rows],
            token_T=None if self.token_T is None else self.token_T[rows],
            phase_T=None if self.phase_T is None else self.phase_T[rows],
            sequence_start=sequence_start,
            domain_Q=None if self.domain_Q is None else self.domain_Q[sequences],
            window_Q=None if self.window_Q is None else self.window_Q[sequences],
        )


@functools.lru_cache(maxsize=16)
def _layer_key(num_layers: int, num_experts: int, top_k: int) -> NDArray[Any]:
    """l * E for each column of a token's [L * K] ids, in the narrowest dtype that holds L * E."""
    cells = num_layers * num_experts
    dtype = np.uint16 if cells <= 1 << 16 else np.int64
    key = np.repeat(np.arange(num_layers, dtype=np.int64) * num_experts, top_k).astype(dtype)
    key.setflags(write=False)
    return key


def count_ids(expert_TLK: Ids, num_experts: int) -> NDArray[np.int64]:
    """Tokens per layer and expert, int64 [L, E]: exact. Ids must lie in [0, num_experts), as loaders ensure.

    One np.bincount over `layer * E + id`, in chunks whose keys stay in cache (benchmarks/routing/count_ids.py
    has the alternatives measured).
    """
    tokens, layers, top_k = expert_TLK.shape
    flat = expert_TLK.reshape(tokens, layers * top_k)
    key = _layer_key(layers, num_experts, top_k)
    cells = layers * num_experts
    if key.size * tokens <= 2 * _CHUNK_IDS:
        return np.bincount((flat + key).ravel(), minlength=cells).reshape(layers, num_experts)
    step = max(1, _CHUNK_IDS // max(1, key.size))
    count = np.zeros(cells, np.int64)
    for at in range(0, tokens, step):
        count += np.bincount((flat[at : at + step] + key).ravel(), minlength=cells)
    return count.reshape(layers, num_experts)


def count_steps(source: RoutingSource, rows_N: Rows, step_offsets: Rows) -> NDArray[np.int32]:
    """Tokens per step, layer and expert, int32 [S, L, E], for many steps at once.

    `rows_N`: rows of the pool that the steps' tokens take, step after step; `step_offsets` [S + 1]: step s
    holds rows_N[step_offsets[s]:step_offsets[s + 1]]. Exact: equal to counting each step by itself.
    """
    steps = len(step_offsets) - 1
    layers, experts = source.num_layers, source.num_experts + source.ragged
    count = np.zeros((steps, layers, experts), np.int32)
    flat_TC = source.expert_TLK.reshape(source.num_tokens, layers * source.top_k)
    narrow = _layer_key(layers, experts, source.top_k)
    cells = layers * experts
    if len(rows_N) * narrow.size > _ALONE_IDS * steps:
        for step in range(steps):
            rows = rows_N[step_offsets[step] : step_offsets[step + 1]]
            count[step] = count_ids(source.expert_TLK[rows], experts)
        return count[..., : source.num_experts]
    key = narrow.astype(np.int64)
    widest = max(1, _CHUNK_CELLS // cells)
    first = 0
    while first < steps:
        budget = step_offsets[first] + max(1, 4 * _CHUNK_IDS // key.size)
        last = int(np.searchsorted(step_offsets, budget, side="right")) - 1
        last = min(max(last, first + 1), first + widest, steps)
        lo, hi = int(step_offsets[first]), int(step_offsets[last])
        lengths = np.diff(step_offsets[first : last + 1])
        step_N = np.repeat(np.arange(last - first) * cells, lengths)
        keys = flat_TC[rows_N[lo:hi]] + key
        keys += step_N[:, None]
        block = np.bincount(keys.ravel(), minlength=(last - first) * cells)
        count[first:last] = block.reshape(last - first, layers, experts)
        first = last
    return count[..., : source.num_experts]


def ideal_counts(tokens_S: NDArray[np.int64], num_layers: int, num_experts: int, top_k: int) -> NDArray[np.int32]:
    """Tokens per step, layer and expert under ideal balance, int32 [S, L, E]: T*K/E each, remainders spread.

    Where T*K does not divide by E, the T*K mod E experts with one more are consecutive ids (mod E) that start
    further on from layer to layer, so that no rank is always the one with more.
    """
    total = np.asarray(tokens_S, np.int64) * top_k
    even, more = total // num_experts, total % num_experts
    turn_LE = (np.arange(num_experts) - 97 * np.arange(num_layers)[:, None]) % num_experts
    return (even[:, None, None] + (turn_LE < more[:, None, None])).astype(np.int32)
