"""A base MoE and adapters that replace some of its experts, side by side in one tensor of virtual memory.

Shi et al., "ExpertWeave" (arXiv 2508.17624): adapters made by expert-specialised fine-tuning (ESFT) hold e_i^l experts
of their own in layer l. The expert weights of a layer are one tensor of M + N * E_max rows (M experts of the base, N
adapters of at most E_max): contiguous addresses, so that one grouped kernel reaches all, but only rows that exist have
memory behind them, in pages of 2 MiB, and a page that two neighbours touch is mapped once. A table sends a token of
adapter i from expert j to its own copy: slot j where i has none, else M + i * E_max + its number.

Legend: N adapters, L MoE layers, E experts of the base (M in the paper).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim.dtypes import tensor_bytes
from moesim.errors import BadInput
from moesim.model import MoEModel

__all__ = ["PAGE_BYTES", "ExpertAdapters", "redirect", "slot_table"]

PAGE_BYTES = 2 << 20
"""Of the device's virtual memory (arXiv 2508.17624)"""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertAdapters:
    """Adapters of one model. tuned_NL: experts that each replaces in each MoE layer, int64 [N, L]; room: rows set aside
    for each in the virtual tensor, E_max of the paper; None: the most that any has. Raises BadInput for counts that the
    model cannot have."""

    model: MoEModel
    tuned_NL: IntArray
    room: int | None = None
    page_bytes: int = PAGE_BYTES

    def __post_init__(self) -> None:
        model, tuned = self.model, self.tuned_NL
        if tuned.ndim != 2 or tuned.shape[1] != model.num_moe_layers or self.page_bytes < 1:
            raise BadInput(
                f"adapters need a number of experts for each of the {model.num_moe_layers} MoE layers; got an array of"
                f" {tuned.shape}."
            )
        most = int(tuned.max(initial=0))
        if tuned.min(initial=0) < 0 or most > model.num_experts or (self.room is not None and self.room < most):
            raise BadInput(
                f"an adapter replaces 0 to {model.num_experts} experts of a layer, and no more than it has room for"
                f" ({self.room}); got {int(tuned.min(initial=0))} to {most}."
            )

    @property
    def most(self) -> int:
        """E_max: rows of each adapter in the virtual tensor."""
        return int(self.tuned_NL.max(initial=0)) if self.room is None else self.room

    def sparsity_N(self) -> FloatArray:
        """S_i = sum_l (E_i - e_i^l) / (L E_i), E_i the most that adapter i has in any layer: what padding it alone
        would waste (arXiv 2508.17624)."""
        most_N = np.maximum(self.tuned_NL.max(axis=1), 1)
        return np.asarray(1 - self.tuned_NL.mean(axis=1) / most_N)

    def fragmentation(self) -> float:
        """F_mem = L (M + N E_max) / sum_l (M + sum_i e_i^l): a padded tensor's memory over what it holds."""
        adapters, layers = map(int, self.tuned_NL.shape)
        held = layers * self.model.num_experts + int(self.tuned_NL.sum())
        return layers * (self.model.num_experts + adapters * self.most) / held

    def held_bytes(self) -> int:
        """Weights of all experts, the base's and the adapters', without padding."""
        layers = int(self.tuned_NL.shape[1])
        return (layers * self.model.num_experts + int(self.tuned_NL.sum())) * self.model.expert_bytes()

    def padded_bytes(self) -> int:
        """Of a tensor whose rows all have memory."""
        adapters, layers = map(int, self.tuned_NL.shape)
        return layers * (self.model.num_experts + adapters * self.most) * self.model.expert_bytes()

    def merged_bytes(self) -> int:
        """Expert weights of a whole model for each adapter."""
        adapters, layers = map(int, self.tuned_NL.shape)
        return adapters * layers * self.model.num_experts * self.model.expert_bytes()

    def mapped_bytes(self, share_pages: bool = True) -> int:
        """Pages behind the rows that exist. share_pages: rows follow each other byte by byte, and a page that two of
        them touch is mapped once (sub-page sharing), else every row is padded to whole pages."""
        pages = 0
        for row in self._row_bytes():
            size = row if share_pages else -(-row // self.page_bytes) * self.page_bytes
            for layer in range(self.tuned_NL.shape[1]):
                pages += self._pages(size, self.tuned_NL[:, layer])
        return pages * self.page_bytes

    def table_bytes(self) -> int:
        """Of the tables that send tokens to their adapter's experts, one 4-byte slot for each adapter and expert, the
        base itself included."""
        adapters, layers = map(int, self.tuned_NL.shape)
        return 4 * layers * (adapters + 1) * self.model.num_experts

    def _row_bytes(self) -> tuple[int, ...]:
        """Bytes of an expert in each of a layer's tensors: gate and up fused (or up alone), and down."""
        one = self.model.expert_hidden * self.model.moe_intermediate_size
        wide = (2 if self.model.gated_experts else 1) * one
        return tensor_bytes(wide, self.model.expert_dtype), tensor_bytes(one, self.model.expert_dtype)

    def _pages(self, row: int, tuned_N: IntArray) -> int:
        base = self.model.num_experts
        first = [0, *((base + i * self.most) * row for i in range(len(tuned_N)))]
        rows = [base, *tuned_N.tolist()]
        pages, last = 0, -1  # number of the last page that is mapped
        for start, count in zip(first, rows, strict=True):
            if not count:
                continue
            low, high = start // self.page_bytes, (start + count * row - 1) // self.page_bytes
            pages += high - max(low, last + 1) + 1
            last = high
        return pages


def slot_table(tuned_NLE: BoolArray, room: int | None = None) -> IntArray:
    """Slot in the virtual tensor of each expert as a token of each adapter sees it, int64 [N + 1, L, E]; the last is
    the base's: Pi^l[i, j] of arXiv 2508.17624. tuned_NLE: which experts an adapter replaces."""
    adapters, _, experts = tuned_NLE.shape
    most = int(tuned_NLE.sum(axis=2).max(initial=0)) if room is None else room
    own = np.arange(experts, dtype=np.int64)
    first_N = experts + most * np.arange(adapters, dtype=np.int64)
    turn_NLE = np.cumsum(tuned_NLE, axis=2) - 1
    table = np.where(tuned_NLE, first_N[:, None, None] + turn_NLE, own)
    return np.concatenate([table, np.tile(own, (1, tuned_NLE.shape[1], 1))])


def redirect(expert_TLK: AnyArray, adapter_T: IntArray, table_NLE: IntArray) -> IntArray:
    """Slots that tokens take, [T, L, K]: TopK'(x) = {Pi[A(x), j]}. adapter_T: each token's adapter; N: the base."""
    layer = np.arange(expert_TLK.shape[1])[None, :, None]
    return np.asarray(table_NLE[adapter_T[:, None, None], layer, expert_TLK])
