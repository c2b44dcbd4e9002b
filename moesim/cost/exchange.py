"""What tokens pay to reach their experts and to come back: the exchange of one MoE layer.

Byte rules, by `communication.all_to_all` (`shared` experts excluded):

- `deepep_normal`, `deepep_v2`: a token goes once to each rank that holds one of its experts, whatever their number
  there; across nodes once to each node over the NICs and on over NVLink. Dispatch carries the activation (fp8 with a
  float32 scale for 128 elements where the experts are fp8), combine bf16;
- `deepep_low_latency`: once for each (token, expert) pair, straight to the rank; dispatch has a header of 16 bytes too.
  Its buffers hold `max_dispatch_tokens` a rank, larger batches go in turns;
- `auto`: the faster of normal and low latency in each direction, from the former's copies;
- `pairwise`, `hierarchical`: once for each pair, in the activations' format both ways (Megatron-Core's all-to-all
  dispatcher, Tutel);
- `allgather_reducescatter`, and experts that are split over ranks: every rank gathers all tokens, padded to the busiest
  rank's, and sums its share back.

`coherent` (ExFlow, arXiv:2401.08383): no combine, but new tokens are gathered once a step. What is gathered is not
spelt out there; here it is their keys and values of all layers, without which other ranks could not attend to them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray, U8Array
from moesim.communication_spec import CommunicationSpec
from moesim.cost.operators import Operators, Priced
from moesim.cost.swaps import SwapKind, Way
from moesim.layout import Layout
from moesim.model import MoEModel, dtype_bytes

__all__ = ["Exchange", "ExchangePrices", "Ports"]

_KINDS: dict[str, SwapKind] = {
    "auto": "normal",
    "deepep_normal": "normal",
    "deepep_v2": "v2",
    "deepep_low_latency": "ll",
    "pairwise": "pairwise",
    "hierarchical": "hierarchical",
    "allgather_reducescatter": "pairwise",
}
_LOW_LATENCY_HEADER = 16
"""bytes: one int4 before each message (DeepEP, csrc/legacy/config.hpp, LowLatencyLayout)"""


class Ports(NamedTuple):
    """Tokens (copies of a token) through the busiest port of each level, [..., L], and in all, [...]."""

    nvlink: FloatArray
    nic: FloatArray
    nvlink_total: FloatArray
    nic_total: FloatArray


class ExchangePrices(NamedTuple):
    """Whole ns of dispatch and combine, and the worse grade of the two: one shape, that of the layers asked for."""

    dispatch_ns: IntArray
    combine_ns: IntArray
    grade: U8Array


class Exchange:
    """Prices exchanges of the ranks of one replica.

    `dispatch_bytes`, `combine_bytes`: of one copy of a token on its way there and back.
    """

    def __init__(self, model: MoEModel, layout: Layout, ops: Operators, communication: CommunicationSpec) -> None:
        self._layout = layout
        self._ops = ops
        self._top_k = model.top_k
        self.communication = communication
        self._kind = _KINDS[communication.all_to_all]
        act = dtype_bytes(model.activation_dtype)
        light = model.expert_dtype in ("fp8", "fp8_block") and self._kind not in ("pairwise", "hierarchical")
        self.gather_bytes = model.expert_hidden * act
        self.dispatch_bytes = model.expert_hidden * (1 + 4 / 128 if light else act)
        if self._kind == "ll":
            self.dispatch_bytes += _LOW_LATENCY_HEADER
        self.combine_bytes = 0.0 if communication.coherent else self.gather_bytes
        self._context_bytes = sum(model.kv_bytes_per_token(layout.tp))
        self._spans = layout.nodes > 1

    @property
    def sms(self) -> int:
        """Multiprocessors that the exchange's kernels run on; 0 for low latency, whose hook lets none wait."""
        own = self.communication.sms
        return self._ops.swaps.sms(self._kind) if own is None else own

    @property
    def compute_scale(self) -> float:
        """Share of the device's multiprocessors left to what computes while an exchange runs, above 0 to 1."""
        total = self._ops.profile.num_sms
        return max(total - self.sms, 1) / total

    def price(
        self, shape: tuple[int, ...], busiest: AnyArray | float, ports: Ports | None, share: float = 1.0
    ) -> ExchangePrices:
        """Prices of layers, `shape` [..., L]. busiest [...]: tokens of the data-parallel rank that has most. ports
        [..., L]: for groups whose tokens travel. share: of the tokens that are exchanged at once (a chunk of r has 1/r
        of them)."""
        if not self._layout.meets:
            return ExchangePrices(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.uint8))
        own = np.broadcast_to(np.asarray(busiest, np.float64)[..., None] * share / self._layout.tp, shape)
        if ports is None:
            there = self._ops.all_gather(own * self.gather_bytes, self._layout.ranks, self._spans)
            back = self._ops.reduce_scatter(own * self.gather_bytes, self._layout.ranks, self._spans)
        else:
            there = self._swap(own, ports, share * self.dispatch_bytes, "dispatch")
            back = self._swap(own, ports, share * self.combine_bytes, "combine")
        there_ns, back_ns = (np.broadcast_to(np.rint(p.ns).astype(np.int64), shape) for p in (there, back))
        grade = np.broadcast_to(np.maximum(there.grade, back.grade), shape)
        if self.communication.coherent:
            there_ns, back_ns, grade = self._coherent(own, there_ns, grade)
        return ExchangePrices(there_ns, back_ns, grade)

    def _swap(self, own: FloatArray, ports: Ports, size: float, way: Way) -> Priced:
        """One direction of an all-to-all. own: tokens of the rank that has most."""
        lay, sms = self._layout, self.communication.sms or 0
        kind: SwapKind | str = "auto" if self.communication.all_to_all == "auto" else self._kind
        turns: FloatArray | float = 1.0
        if self._kind == "ll":
            turns = np.maximum(1.0, np.ceil(own / self.communication.max_dispatch_tokens - 1e-9))
        near, far = ports.nvlink * size / turns, ports.nic * size / turns
        total = ports.nvlink_total * size / turns
        if self._kind == "pairwise" and not self._spans and self._ops.swaps.counts(self._kind):
            near = np.maximum(near, size)  # where no row leaves its rank the ranks still tell each other so
        priced = self._ops.all_to_all(near, far, lay.ranks, lay.nodes, self._top_k, kind, way, sms, total)  # type: ignore[arg-type]
        return priced._replace(ns=priced.ns * turns)

    def _coherent(self, own: FloatArray, there_ns: IntArray, grade: U8Array) -> tuple[IntArray, IntArray, U8Array]:
        """No combine; with the first layer's dispatch all ranks gather what the step's tokens add to the context."""
        gathered = self._ops.all_gather(own[..., 0] * self._context_bytes, self._layout.ranks, self._spans)
        there_ns = there_ns.copy()
        there_ns[..., 0] += np.rint(gathered.ns).astype(np.int64)
        grade = grade.copy()
        grade[..., 0] = np.maximum(grade[..., 0], gathered.grade)
        return there_ns, np.zeros_like(there_ns), grade
