"""What a device's operations take in one pass through layers whose experts come and go (`moesim.tiers.LayerTimes`).

The numbers are those of the step pricer's tables, layer by layer: with every expert present a step takes as long as it
does there, to the nanosecond. Experts on the CPU read their weights from host memory, or are priced by a calibrated
profile of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.cost.attention import AttentionTables
from moesim.cost.dense import DenseTables, Part
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import MoEShape, Operators
from moesim.hardware import ASSUMED, DeviceProfile, Node
from moesim.model import MoEModel
from moesim.program import stages
from moesim.tiers_spec import CpuSpec

__all__ = ["CpuPrices", "OffloadTimes", "Pass"]

_FEW = 16
"""experts of a product that is remembered by its rows"""


class Pass(NamedTuple):
    """One pass of some of a step's tokens through the layers. tokens: after padding. decoding, context,
    context_window: requests of it that decode, sums of their contexts. prefill_full_ns, prefill_window_ns: attention of
    its prompt chunks in one layer. host: the step's work on the host is paid here."""

    tokens: int
    sampled: int
    decoding: int
    context: int
    context_window: int
    prefill_full_ns: int = 0
    prefill_window_ns: int = 0
    host: bool = True


class CpuPrices:
    """ns of experts on the host's CPU, all its cores (of `sharers` replicas each has an equal part)."""

    def __init__(
        self, spec: CpuSpec, node: Node, model: MoEModel, expert_bytes: float, profile: DeviceProfile | None,
        sharers: int = 1,
    ) -> None:  # fmt: skip
        """expert_bytes: of one whole expert as stored."""
        part = (1.0 if spec.cores is None else spec.cores / node.cpu_cores) / sharers
        rate = node.host_bytes_per_s if spec.gb_per_s is None else spec.gb_per_s * 1e9
        self._read_ns = expert_bytes / (rate * part * 1e-9)
        matrices = 3 if model.gated_experts else 2
        flop = 2.0 * matrices * model.expert_hidden * model.moe_intermediate_size
        self._row_ns = flop / (spec.tflops * 1e3 * part)
        self._domains = 1 if spec.numa_split else spec.numa_domains
        self._ops: Operators | None = None
        self.grade = int(ASSUMED)
        self._known: dict[tuple[float, int, float], int] = {}
        self._few: dict[tuple[int, ...], int] = {}
        self._shape = MoEShape(
            model.expert_hidden, model.moe_intermediate_size, model.num_experts, model.top_k, model.expert_dtype,
            model.gated_experts,
        )  # fmt: skip
        if profile is not None:
            cores = node.cpu_cores if spec.cores is None else spec.cores
            self._ops = Operators(profile.scaled(cores / profile.node.cpu_cores / sharers), False)
            self.grade = int(
                self._ops.moe(1.0, 1.0, self._ops.moe_work(1.0, model.expert_dtype), 0.0, self._shape).grade
            )

    def ns(self, rows: Sequence[int]) -> int:
        """Experts with so many rows each. Each takes reading its weights or computing its rows, whichever is longer;
        where each lies in one NUMA domain, domains take them in turn and the last one to end counts."""
        few = tuple(rows) if len(rows) <= _FEW else None
        found = None if few is None else self._few.get(few)
        if found is None:
            found = self._unknown_ns(rows)
            if few is not None:
                self._few[few] = found
        return found

    def _unknown_ns(self, rows: Sequence[int]) -> int:
        if self._ops is not None:
            return self._profiled(rows)
        each = [max(self._read_ns, n * self._row_ns) * self._domains for n in rows]
        return round(max(sum(each[d :: self._domains]) for d in range(self._domains)))

    def _profiled(self, rows: Sequence[int]) -> int:
        assert self._ops is not None
        work = float(self._ops.moe_work(np.array(rows), self._shape.dtype).sum())
        key = (float(sum(rows)), len(rows), work)
        if key not in self._known:
            self._known[key] = round(float(self._ops.moe(*key, 0.0, self._shape).ns))
        return self._known[key]


class OffloadTimes:
    """`moesim.tiers.LayerTimes` of one rank. `start` says which pass runs next."""

    def __init__(
        self,
        model: MoEModel,
        dense: DenseTables,
        full: AttentionTables | None,
        window: AttentionTables | None,
        prices: ExpertPrices,
        ops: Operators,
        cpu: CpuPrices,
        sync_ns: int,
        stored_L: FloatArray,
    ) -> None:
        """stored_L: bytes of experts as stored over those of the model's number format, which is how much less of them
        a kernel reads."""
        self._dense, self._full, self._window = dense, full, window
        self._program = stages(model, True)
        self._ops, self._cpu, self._shape = ops, cpu, prices.shape
        self._sync_ns = sync_ns
        self._stored: list[float] = stored_L.tolist()
        blocks = dense.blocks
        self._attention, self._ffn = _sum(blocks["attention"]), _sum(blocks["dense"], len(dense.total_N))
        self._join = _sum([p for p in blocks["moe"] if p.name == "ffn_all_reduce"], len(dense.total_N))
        self._moe = _sum(blocks["moe"]) - self._join
        self._first, self._last = _sum(blocks["first"]), _sum(blocks["last"])
        self._host = _sum([p for p in blocks["first"] if p.operator == "host"], len(dense.total_N))
        self._own: dict[int, list[int]] = {}
        self._known: dict[tuple[float, float, float, int], int] = {}
        self._few: dict[tuple[float, ...], int] = {}
        """products over few experts, by what decides them: asked for again and again while experts arrive"""
        self._now = Pass(0, 0, 0, 0, 0)
        self._others_L: Sequence[int] = ()
        self._full_ns = self._window_ns = 0
        self.grade = 0
        """the worst of experts' products so far"""

    def start(self, now: Pass, others_L: Sequence[int] = ()) -> None:
        """The pass that runs next. others_L: pairs of each layer whose experts are on other ranks; (): none are."""
        self._now, self._others_L = now, others_L
        self._full_ns, self._window_ns = now.prefill_full_ns, now.prefill_window_ns
        if self._full is not None:
            self._full_ns += int(self._full.rows[now.decoding][now.context >> self._full.shift])
        if self._window is not None:
            self._window_ns += int(self._window.rows[now.decoding][now.context_window >> self._window.shift])
        if now.tokens not in self._own:
            self._own[now.tokens] = [self._table_ns(index, now.tokens) for index in range(len(self._program))]

    def _table_ns(self, index: int, tokens: int) -> int:
        """A stage without attention kernels."""
        stage = self._program[index]
        ns = stage.attention * self._attention[tokens] + stage.dense * self._ffn[tokens] + stage.moe * self._moe[tokens]
        return int(ns + stage.first * self._first[tokens] + stage.last * self._last[tokens])

    def _stage_ns(self, index: int) -> int:
        stage = self._program[index]
        return self._own[self._now.tokens][index] + stage.full * self._full_ns + stage.window * self._window_ns

    # -- moesim.tiers.LayerTimes --------------------------------------------------------------------------------
    def begin(self, tokens: int) -> None:
        """See LayerTimes; `start` has said all."""

    def own_ns(self, layer: int) -> int:
        """See LayerTimes."""
        spared = 0 if layer or self._now.host else int(self._host[self._now.tokens])
        return self._stage_ns(layer) - spared

    def gpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        """See LayerTimes. A grouped product over a part of a layer's experts, as `ExpertPrices` prices all of them."""
        stored, others = self._stored[layer], self._others_L[layer] if self._others_L else 0
        if len(rows) > _FEW:
            return self._product_ns(rows, stored, others)
        few = (stored, others, *sorted(rows)) if len(rows) > 1 else (stored, others, rows[0])
        found = self._few.get(few)
        if found is None:
            found = self._few[few] = self._product_ns(rows, stored, others)
        return found

    def _product_ns(self, rows: Sequence[int], stored: float, others: int) -> int:
        work = float(self._ops.moe_work(np.array(rows), self._shape.dtype).sum())
        key = (float(sum(rows)), len(rows) * stored, work, others)
        found = self._known.get(key)
        if found is None:
            priced = self._ops.moe(*key, self._shape)
            found = self._known[key] = round(float(priced.ns))
            self.grade = max(self.grade, int(priced.grade))
        return found

    def cpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        """See LayerTimes."""
        return self._cpu.ns(rows)

    def sync_ns(self, layer: int) -> int:
        """See LayerTimes."""
        return self._sync_ns

    def join_ns(self, layer: int) -> int:
        """See LayerTimes."""
        return int(self._join[self._now.tokens])

    def end_ns(self) -> int:
        """See LayerTimes."""
        return self._stage_ns(len(self._program) - 1) + int(self._dense.head_N[self._now.sampled])


def _sum(parts: Sequence[Part], size: int = 0) -> IntArray:
    """ns of all parts together for every number of tokens."""
    return sum((part.ns_N for part in parts[1:]), parts[0].ns_N) if parts else np.zeros(size, np.int64)
