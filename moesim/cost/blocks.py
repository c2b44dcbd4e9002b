"""Blocks of 32 tokens of a pool, summed once: what batches at count fidelity are drawn from (`moesim.cost.bank`).

Legend: B blocks or batches, T tokens, L MoE layers, K choices, S slots, G ranks, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.cost.drawn import DrawnBatches, busiest_ports
from moesim.cost.exchange import Ports
from moesim.cost.touch import count_slots, touch
from moesim.layout import Layout
from moesim.placement import Placement
from moesim.rng import generator
from moesim.workload.pool import RoutingSource

__all__ = ["BLOCK", "Blocks", "Sample", "persistence"]

BLOCK = 32
"""tokens"""


class Sample(NamedTuple):
    """Tokens of the pool: rows, slots [T, L, K], source ranks [T], and an order in which neighbours are strangers."""

    rows_T: IntArray
    slot_TLK: AnyArray
    source_T: IntArray
    shuffle: IntArray


class Blocks:
    """Sums over blocks of tokens: slots [B, L, S], copies in [B, L, G] and [B, L, N]."""

    def __init__(self, slot_TLK: AnyArray, source_T: IntArray, placement: Placement, layout: Layout) -> None:
        self._slot_TLK = slot_TLK
        self._source_T = source_T
        self._slots = placement.num_slots
        self._layers = slot_TLK.shape[1]
        self._layout = layout
        self._node_G = np.arange(layout.ranks) // layout.gpus_per_node
        self._spr = placement.slots_per_rank
        self.number = len(source_T) // BLOCK
        starts = np.arange(self.number, dtype=np.int64) * BLOCK
        self._count = self._counts(slot_TLK, np.repeat(np.arange(self.number), BLOCK), self.number)
        self.mean_LS: FloatArray = self._count.mean(axis=0, dtype=np.float64)
        if layout.exchanges:
            copies = touch(slot_TLK, source_T, starts, self._spr, self._node_G, layout.copies)
            self._in, self._node_in = copies.in_BLG.astype(np.float32), copies.node_in_BLN.astype(np.float32)

    def _counts(self, slot_TLK: AnyArray, group_T: IntArray, groups: int) -> FloatArray:
        return count_slots(slot_TLK, group_T, groups, self._slots).astype(np.float32)

    def draw(self, tokens: int, entries: int, seed: int, phase: str) -> tuple[FloatArray, Ports | None]:
        """`entries` batches: tokens per slot [entries, L, S] and the busiest ports."""
        drawn = self.draw_all(tokens, entries, seed, phase)
        if drawn.in_BLG is None or drawn.node_in_BLN is None:
            return drawn.count_BLS, None
        return drawn.count_BLS, busiest_ports(drawn.in_BLG, drawn.node_in_BLN, self._layout)

    def draw_all(self, tokens: int, entries: int, seed: int, phase: str) -> DrawnBatches:
        """`entries` batches."""
        if tokens < BLOCK:
            return self._draw_few(tokens, entries, seed, phase)
        number = tokens // BLOCK
        weight = np.zeros((entries, self.number), np.float32)
        for entry in range(entries):
            chosen = generator(seed, "bank/draw", int(phase == "decode"), entry).integers(self.number, size=number)
            weight[entry] = np.bincount(chosen, minlength=self.number)
        count = (weight @ self._count.reshape(self.number, -1)).reshape(entries, self._layers, self._slots)
        if not self._layout.exchanges:
            return DrawnBatches(count)
        ranks_in = (weight @ self._in.reshape(self.number, -1)).reshape(entries, self._layers, -1)
        nodes_in = (weight @ self._node_in.reshape(self.number, -1)).reshape(entries, self._layers, -1)
        return DrawnBatches(count, ranks_in, nodes_in)

    def _draw_few(self, tokens: int, entries: int, seed: int, phase: str) -> DrawnBatches:
        blocks = np.array(
            [generator(seed, "bank/draw", int(phase == "decode"), e).integers(self.number) for e in range(entries)]
        )
        rows = (blocks[:, None] * BLOCK + np.arange(tokens)).ravel()
        count = self._counts(self._slot_TLK[rows], np.repeat(np.arange(entries), tokens), entries)
        if not self._layout.exchanges:
            return DrawnBatches(count)
        starts = np.arange(entries, dtype=np.int64) * tokens
        source_T, how = self._source_T[rows], self._layout.copies
        copies = touch(self._slot_TLK[rows], source_T, starts, self._spr, self._node_G, how)
        return DrawnBatches(count, copies.in_BLG.astype(np.float32), copies.node_in_BLN.astype(np.float32))


def persistence(slot_TLK: AnyArray, rows_T: IntArray, source: RoutingSource, placement: Placement, seed: int) -> float:
    """Lag-1 correlation of a decode batch's balance: 256 batches of 64 tokens against the tokens that follow them.

    Balance is what a step waits for, averaged over (at most 16) layers: tokens of the busiest part or, where there is
    one part only, slots in use. Single loads are less persistent, because layers share what changes slowly.
    """
    follows = (np.diff(rows_T) == 1) & ~np.isin(rows_T[1:], source.sequence_start)
    first = np.flatnonzero(follows)
    if source.ideal or not len(first):
        return 0.0
    rng = generator(seed, "bank/persistence")
    layers = rng.permutation(slot_TLK.shape[1])[:16]
    picked = first[rng.integers(len(first), size=(256, 64))]
    slots, parts = placement.num_slots, placement.num_ranks
    balance: list[FloatArray] = []
    for shift in (0, 1):
        chosen = slot_TLK[(picked + shift).ravel()[:, None], layers]
        count = count_slots(chosen, np.repeat(np.arange(256), 64), 256, slots).reshape(256, len(layers), parts, -1)
        load = count.sum(axis=-1).max(axis=-1) if parts > 1 else (count > 0).sum(axis=(-2, -1))
        balance.append(load.mean(axis=-1))
    a, b = (x - x.mean() for x in balance)
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float(np.clip((a * b).sum() / norm, 0.0, 0.99)) if norm else 0.0
