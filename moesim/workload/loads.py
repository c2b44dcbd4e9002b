"""How often each expert was taken, step after step: what engines record, and what placements are fitted to.

Legend: S rows (each some forward passes), L MoE layers, E experts, T tokens, K experts a token, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.errors import BadInput
from moesim.workload.pool import RoutingSource

__all__ = ["MAX_CELLS", "ExpertLoads"]

MAX_CELLS = 1 << 27
"""rows x layers x experts of one recording: 1 GiB of counts"""


@dataclass(frozen=True, eq=False)
class ExpertLoads:
    """What one recording says of its traffic.

    count_SLE: int64 [S, L, E], (token, expert) pairs of logical experts; a row is `steps_per_row` forward passes of the
    whole deployment (0: unknown, such as one total of a recording). source: the file's name. top_k: experts a token, 0
    where unknown. ordered: rows stand in time order (False where the file lost it). layer_index: the layers' numbers in
    the model, None where the file does not say. model_layers: layers of the whole model, dense ones too, 0 where
    unknown. recorded_ranks: ranks that the counts were recorded on, 0 where unknown. tokens: the tokens one by one,
    where the file has them, in the order of the rows; row_tokens_S: how many of them each row has. warnings: what
    whoever uses the figures must know.
    Raises BadInput unless counts are whole, not negative, and every layer has some.
    """

    count_SLE: IntArray
    source: str
    top_k: int = 0
    ordered: bool = True
    steps_per_row: int = 1
    layer_index: tuple[int, ...] | None = None
    model_layers: int = 0
    recorded_ranks: int = 0
    tokens: RoutingSource | None = None
    row_tokens_S: IntArray | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = np.asarray(self.count_SLE)
        if count.ndim != 3 or count.dtype.kind not in "iu" or 0 in count.shape:
            raise BadInput(
                f"loads are whole numbers [rows, layers, experts], none of them 0, got {count.dtype} of shape"
                f" {count.shape}",
                self.source,
            )
        if count.min() < 0:
            row, layer, expert = (int(i) for i in np.argwhere(count < 0)[0])
            raise BadInput(
                f"loads are not negative: row {row}, layer {layer}, expert {expert} has {count[row, layer, expert]}",
                self.source,
            )
        if self.layer_index is not None and len(self.layer_index) != count.shape[1]:
            raise BadInput(f"{len(self.layer_index)} layer numbers for {count.shape[1]} layers", self.source)
        empty = np.flatnonzero(count.sum(axis=(0, 2), dtype=np.float64) == 0)
        if empty.size:
            name = empty[0] if self.layer_index is None else self.layer_index[empty[0]]
            raise BadInput(f"every layer needs some load: layer {name} has none", self.source)
        object.__setattr__(self, "count_SLE", count.astype(np.int64, copy=False))

    @property
    def num_rows(self) -> int:
        """S."""
        return int(self.count_SLE.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.count_SLE.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.count_SLE.shape[2])

    @property
    def total_LE(self) -> FloatArray:
        """Pairs of the whole recording: float64 [L, E], as placements take them."""
        return np.asarray(self.count_SLE.sum(axis=0, dtype=np.float64))

    @property
    def tokens_SL(self) -> FloatArray | None:
        """Tokens of each row in each layer: float64 [S, L]; None where K is unknown."""
        if not self.top_k:
            return None
        return np.asarray(self.count_SLE.sum(axis=2, dtype=np.float64) / self.top_k)

    @property
    def tokens_per_step(self) -> float | None:
        """Mean tokens of a forward pass, all ranks together; None where K or the passes of a row are unknown."""
        tokens_SL = self.tokens_SL
        if tokens_SL is None or not self.steps_per_row:
            return None
        return float(tokens_SL.mean()) / self.steps_per_row

    @property
    def tokens_per_rank(self) -> float | None:
        """Mean tokens of a forward pass on one of the ranks it was recorded on; None where either is unknown."""
        tokens = self.tokens_per_step
        return None if tokens is None or not self.recorded_ranks else tokens / self.recorded_ranks

    def windows(self, number: int) -> IntArray:
        """Pairs of `number` windows of consecutive rows, as even as can be: int64 [W, L, E], W = min(number, S)."""
        if number < 1:
            raise BadInput(f"at least one window is needed, got {number}", self.source)
        edge_W = np.linspace(0, self.num_rows, min(number, self.num_rows) + 1).astype(np.int64)
        return np.add.reduceat(self.count_SLE, edge_W[:-1], axis=0)

    def split(self, first: float) -> tuple[ExpertLoads, ExpertLoads]:
        """The first rows, a share `first` of them (rounded, at least one), and the rest.

        Raises BadInput where there are not two rows, or where one of the parts has a layer without load.
        """
        if not 0 < first < 1:
            raise BadInput(f"a share between 0 and 1 is needed to split a recording, got {first}", self.source)
        if self.num_rows < 2:
            raise BadInput(
                "a recording of one row cannot be split into a part to fit and one to hold out. Record step by step,"
                " or hold out nothing",
                self.source,
            )
        at = min(max(round(first * self.num_rows), 1), self.num_rows - 1)
        for part, name in ((self.count_SLE[:at], "first"), (self.count_SLE[at:], "last")):
            idle = np.flatnonzero(~part.any(axis=(0, 2)))
            if idle.size:
                layer = idle[0] if self.layer_index is None else self.layer_index[idle[0]]
                raise BadInput(
                    f"layer {layer} has no load in the {name} {len(part)} rows; split it elsewhere", self.source
                )
        return self.rows(0, at), self.rows(at, self.num_rows)

    def rows(self, first: int, last: int) -> ExpertLoads:
        """Rows first .. last - 1 and their tokens."""
        tokens, row_tokens_S = self.tokens, self.row_tokens_S
        if tokens is not None and row_tokens_S is not None:
            edge = np.concatenate([[0], np.cumsum(row_tokens_S)])
            tokens, row_tokens_S = _token_range(tokens, int(edge[first]), int(edge[last])), row_tokens_S[first:last]
        return replace(self, count_SLE=self.count_SLE[first:last], tokens=tokens, row_tokens_S=row_tokens_S)


def _token_range(source: RoutingSource, first: int, last: int) -> RoutingSource:
    """Tokens first .. last - 1; sequences are cut where the range is."""
    start = source.sequence_start
    inside = start[(start > first) & (start < last)]
    sequence_start = np.concatenate([[first], inside, [last]]).astype(np.int64) - first
    q0, q1 = int(np.searchsorted(start, first, "right")) - 1, int(np.searchsorted(start, last, "left"))
    return replace(
        source,
        expert_TLK=source.expert_TLK[first:last],
        sequence_start=sequence_start,
        weight_TLK=None if source.weight_TLK is None else source.weight_TLK[first:last],
        score_TLE=None if source.score_TLE is None else source.score_TLE[first:last],
        token_T=None if source.token_T is None else source.token_T[first:last],
        phase_T=None if source.phase_T is None else source.phase_T[first:last],
        domain_Q=None if source.domain_Q is None else source.domain_Q[q0:q1],
        window_Q=None if source.window_Q is None else source.window_Q[q0:q1],
    )
