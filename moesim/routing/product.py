"""Product keys: experts stand in a grid, an expert's score is the sum of its row's and its column's.

Source: Lample et al. 2019 (arXiv:1907.05242), section 3.1: the K best sums lie among the K best rows x the K best
columns, so K + K candidates replace all n * n. PEER (arXiv:2407.04153): softmax over the K chosen sums;
OmniMoE (arXiv:2602.05711), section 2.2: log softmax of rows plus log softmax of columns, which ranks the same.
One head; scores of all experts, where they are given instead of rows and columns, are reduced to the best of each row
and of each column (reconstruction).
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.routing import Floats, Routed, Router, RoutingContext, softmax
from moesim.routing.gating import descending, weigh
from moesim.routing.select import check_top_k, top_ids

__all__ = ["Policy"]


class Policy(Router):
    """columns: what the scores' columns are: `experts` [T, E], or `factors` [T, 2n] (n rows, then n columns, of n * n
    experts). gates: `softmax` over the chosen sums, or `joint`: the product of the row's and the column's softmax."""

    equivariant: ClassVar[bool] = False

    columns: Literal["experts", "factors"] = "experts"
    gates: Literal["softmax", "joint"] = "softmax"
    top_k: int | None = Field(default=None, ge=1)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K best sums of the grid, of equals the lowest id; expert i * columns + j stands in row i, column j. An E
        that is no square makes the grid with the most even sides."""
        row_TR, column_TC = self._factors(score_TE)
        rows, columns = row_TR.shape[1], column_TC.shape[1]
        k = self.top_k or context.top_k
        check_top_k(k, rows * columns)
        if self.columns == "experts" and score_TE.min(initial=0) == -np.inf:
            sum_TE = (row_TR[:, :, None] + column_TC[:, None, :]).reshape(score_TE.shape)
            expert_TK = top_ids(np.where(np.isneginf(score_TE), -np.inf, sum_TE), k)
        else:
            expert_TK = _best_sums(row_TR, column_TC, k)
        place_TK = expert_TK.astype(np.int64)
        if self.gates == "joint":
            gate_TK = np.take_along_axis(softmax(row_TR), place_TK // columns, 1)
            gate_TK = gate_TK * np.take_along_axis(softmax(column_TC), place_TK % columns, 1)
        else:
            sum_TK = np.take_along_axis(row_TR, place_TK // columns, 1) + np.take_along_axis(
                column_TC, place_TK % columns, 1
            )
            gate_TK = softmax(sum_TK)
        here_TK = np.broadcast_to(np.arange(k, dtype=np.int32), expert_TK.shape)
        return Routed(expert_TK, weigh(gate_TK.astype(score_TE.dtype), here_TK, context.norm_topk_prob))

    def _factors(self, score_TE: Floats) -> tuple[Floats, Floats]:
        """Scores of rows and columns of the grid, float64: their sums of float32 scores are exact."""
        width = score_TE.shape[1]
        if self.columns == "factors":
            if width % 2:
                raise ValueError(f"scores of rows and columns come in halves: {width} columns of scores, an odd number")
            wide_TE = score_TE.astype(np.float64)
            return wide_TE[:, : width // 2], wide_TE[:, width // 2 :]
        rows = grid_rows(width)
        grid = score_TE.reshape(len(score_TE), rows, width // rows)
        across = functools.reduce(np.maximum, (grid[:, :, c] for c in range(grid.shape[2])))  # max(2), narrow as it is
        down = functools.reduce(np.maximum, (grid[:, r] for r in range(rows)))
        return across.astype(np.float64), down.astype(np.float64)

    def score_columns(self, num_experts: int) -> int:
        """Rows and columns of the grid where those are what is scored."""
        return 2 * math.isqrt(num_experts) if self.columns == "factors" else num_experts

    def width(self, top_k: int, num_experts: int) -> int:
        """K."""
        return min(self.top_k or top_k, num_experts)


def grid_rows(num_experts: int) -> int:
    """Rows of the grid of E experts: the largest divisor up to the square root."""
    return next(r for r in range(math.isqrt(num_experts), 0, -1) if num_experts % r == 0)


def _best_sums(row_TR: Floats, column_TC: Floats, k: int) -> NDArray[np.int32]:
    """Ids of the k best sums, of equals the lowest, without forming the others (arXiv:1907.05242, section 3.1).

    A sum among the k best has its row among the k best rows and its column among the k best columns, ties by id
    included: k rows before its own would give k better sums in its column.
    """
    if k >= max(row_TR.shape[1], column_TC.shape[1]):  # all rows and columns are candidates
        return top_ids((row_TR[:, :, None] + column_TC[:, None]).reshape(len(row_TR), -1), k)
    row_TK, column_TK = _candidates(row_TR, k), _candidates(column_TC, k)
    value_TKK = np.take_along_axis(row_TR, row_TK, 1)[:, :, None] + np.take_along_axis(column_TC, column_TK, 1)[:, None]
    flat = (len(row_TR), row_TK.shape[1] * column_TK.shape[1])
    # sorted rows and columns: candidates stand in the order of their ids
    id_TJ = (row_TK[:, :, None] * column_TC.shape[1] + column_TK[:, None]).reshape(flat)
    best_TK = top_ids(value_TKK.reshape(flat), k)
    return np.take_along_axis(id_TJ, best_TK.astype(np.int64), 1).astype(np.int32)


def _candidates(score_TN: Floats, k: int) -> NDArray[np.int64]:
    """Ids of the k best of a row, rising; those at -inf come last and are candidates only where others lack."""
    if np.isneginf(score_TN).any():
        return np.sort(descending(score_TN)[:, :k], axis=1)
    return np.sort(top_ids(score_TN, min(k, score_TN.shape[1])), axis=1).astype(np.int64)
