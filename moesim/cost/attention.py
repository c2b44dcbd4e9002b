"""Attention kernels of one layer, by table.

Decode depends on two numbers, the batch and the sum of its contexts: a row for each batch size, filled when that size
is first met, over contexts in equal buckets (each priced at its middle; at most 2,048 of them, so a bucket is a small
share of a context that matters). Prefill of a whole prompt depends on its length: one table. A later chunk depends on
chunk and context: priced when met, contexts in buckets of 64 tokens, and remembered.
"""

from __future__ import annotations

import numpy as np

from moesim.arrays import IntArray, U8Array
from moesim.cost.operators import AttentionShape, Operators

__all__ = ["AttentionTables"]

_COLUMNS = 2048
_BUCKET = 64
_ROWS = 8
"""rows filled together: a call costs about as much as the arithmetic of one"""


class AttentionTables:
    """Integer times of one layer's attention kernel on one rank. `decode_BC[batch, context >> shift]`."""

    def __init__(self, ops: Operators, shape: AttentionShape, max_batch: int, max_context: int, max_chunk: int) -> None:
        self._ops = ops
        self.shape = shape
        self.shift = max(0, (max(max_context, 1) // _COLUMNS).bit_length())
        columns = (max_context >> self.shift) + 2
        middle = (np.arange(columns, dtype=np.int64) << self.shift) + ((1 << self.shift) >> 1)
        self._context_C = np.maximum(middle, 1)
        self.decode_BC: IntArray = np.zeros((max_batch + 1, columns), np.int64)
        self.decode_grade_BC: U8Array = np.zeros((max_batch + 1, columns), np.uint8)
        self._filled = [False] * (max_batch + 1)
        self._filled[0] = True
        self.rows: list[IntArray] = list(self.decode_BC)
        q = np.arange(max_chunk + 1, dtype=np.int64)
        priced = ops.attention_prefill(q, q, shape)
        self.prompt_Q: list[int] = np.rint(priced.ns).astype(np.int64).tolist()
        self.prompt_grade_Q: U8Array = priced.grade
        self._chunks: dict[tuple[int, int], tuple[int, int]] = {}

    def fill(self, batch: int) -> None:
        """Price the row of `batch` sequences unless it is there."""
        if self._filled[batch]:
            return
        first = (batch - 1) // _ROWS * _ROWS + 1
        rows = slice(first, min(first + _ROWS, len(self._filled)))
        batch_B = np.arange(rows.start, rows.stop)[:, None]
        priced = self._ops.attention_decode(batch_B, np.maximum(self._context_C, batch_B), self.shape)
        self.decode_BC[rows] = np.rint(priced.ns)
        self.decode_grade_BC[rows] = priced.grade
        for row in range(rows.start, rows.stop):
            self._filled[row] = True

    def prefill(self, start: int, tokens: int) -> int:
        """ns of `tokens` new tokens after `start` cached ones."""
        return self.prompt_Q[tokens] if start == 0 else self._chunk(start, tokens)[0]

    def prefill_grade(self, start: int, tokens: int) -> int:
        """Grade of the same."""
        return int(self.prompt_grade_Q[tokens]) if start == 0 else self._chunk(start, tokens)[1]

    def _chunk(self, start: int, tokens: int) -> tuple[int, int]:
        bucket = -(-start // _BUCKET)
        found = self._chunks.get((bucket, tokens))
        if found is None:
            priced = self._ops.attention_prefill(tokens, bucket * _BUCKET + tokens, self.shape)
            found = (round(float(priced.ns)), int(priced.grade))
            self._chunks[bucket, tokens] = found
        return found
