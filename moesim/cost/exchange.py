"""What tokens pay to reach their experts and to come back: the exchange of one MoE layer.

Byte rule of the exchange (DeepEP's normal kernels, `shared` experts excluded): a token goes once to each rank that
holds one of its experts, whatever their number there; across nodes once to each node over the NICs and on over
NVLink. Dispatch carries the activation (fp8 with a scale for 128 elements where the experts are fp8), combine bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray, U8Array
from moesim.communication_spec import CommunicationSpec
from moesim.cost.operators import Operators
from moesim.layout import Layout
from moesim.model import MoEModel, dtype_bytes

__all__ = ["Exchange", "ExchangePrices", "Ports"]


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
        act = dtype_bytes(model.activation_dtype)
        light = model.expert_dtype in ("fp8", "fp8_block")
        self.dispatch_bytes = model.expert_hidden * (1 + 4 / 128 if light else act)
        self.combine_bytes = model.expert_hidden * act
        self._spans = layout.nodes > 1

    @property
    def compute_scale(self) -> float:
        """Share of the device's multiprocessors left to what computes while an exchange runs, above 0 to 1."""
        taken = self.communication.sms or 0
        sms = self._ops.profile.num_sms
        return max(1.0 - taken / sms, 1.0 / sms)

    def price(
        self, shape: tuple[int, ...], busiest: AnyArray | float, ports: Ports | None, share: float = 1.0
    ) -> ExchangePrices:
        """Prices of layers, `shape` [..., L]. busiest [...]: tokens of the data-parallel rank that has most, for groups
        whose ranks gather all tokens. ports [..., L]: for groups whose tokens travel. share: of the tokens that are
        exchanged at once (a chunk of r has 1 / r of them)."""
        if not self._layout.meets:
            return ExchangePrices(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.uint8))
        ranks, nodes = self._layout.ranks, self._layout.nodes
        if ports is None:
            # every rank gathers all tokens (padded to the busiest) and sums its share back
            own = np.broadcast_to(np.asarray(busiest, np.float64)[..., None] * share / self._layout.tp, shape)
            there = self._ops.all_gather(own * self.combine_bytes, ranks, self._spans)
            back = self._ops.reduce_scatter(own * self.combine_bytes, ranks, self._spans)
        else:
            there, back = (
                self._ops.all_to_all(ports.nvlink * share * size, ports.nic * share * size, ranks, nodes, self._top_k)
                for size in (self.dispatch_bytes, self.combine_bytes)
            )
        return ExchangePrices(
            np.broadcast_to(np.rint(there.ns).astype(np.int64), shape),
            np.broadcast_to(np.rint(back.ns).astype(np.int64), shape),
            np.broadcast_to(np.maximum(there.grade, back.grade), shape),
        )
