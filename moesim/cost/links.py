"""Collectives: latency plus the busiest port, calibrated inside a node, carried across nodes by the NIC's rate.

Inside a node a measured residual curve over bytes (per collective and number of ranks) corrects the port model.
Across nodes rings and trees run hierarchically: reduce-scatter in the node, exchange of shards over each GPU's own
NIC, all-gather in the node (NCCL's multi-NIC schemes move the same bytes through the same ports).

Exchanges of tokens are `moesim.cost.swaps`'s.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from moesim.arrays import FloatArray, U8Array
from moesim.cost.curves import Residual, residual_of
from moesim.hardware import ASSUMED, DeviceProfile

__all__ = ["Links"]

_HOPS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


class Links:
    """Prices collectives on a profile's links. Sizes in bytes, one float64 array; answers ns and grade."""

    def __init__(self, profile: DeviceProfile, eager: bool) -> None:
        self.profile = profile
        self.eager = eager
        self._residuals: dict[tuple[str, int], Residual] = {}

    def collective(
        self, op: str, size: FloatArray, ranks: int, spans_nodes: bool, nodes: int = 0
    ) -> tuple[FloatArray, U8Array]:
        """op: all_reduce (size: the buffer), all_gather or reduce_scatter (size: one rank's part). nodes: that the
        ranks spread over evenly; 0: as many as consecutive ranks fill."""
        if not spans_nodes:
            return self._inside(op, size, ranks)
        node = self.profile.node
        nodes = nodes or max(2, -(-ranks // node.gpus_per_node))
        per_node = -(-ranks // nodes)
        rate = node.nic_bytes_per_s * self._fit(op, "nic_eff", 0.85) * 1e-9
        steps = math.log2(nodes) * node.nic_latency_ns
        if op == "all_reduce":
            shard = size / per_node
            near, _ = self._inside("all_reduce", size, per_node)
            far = 2.0 * steps + shard * (2.0 * (nodes - 1) / nodes) / rate
        else:
            near, _ = self._inside(op, size * nodes, per_node)
            far = steps + size * (nodes - 1) / rate
        return near + far, np.full(size.shape, ASSUMED, dtype=np.uint8)

    def _inside(self, op: str, size: FloatArray, ranks: int) -> tuple[FloatArray, U8Array]:
        """A collective within one node; nothing for a single rank."""
        if ranks <= 1:
            return np.zeros(size.shape), np.zeros(size.shape, dtype=np.uint8)
        ns = self.port_ns(op, size, ranks)
        ratio, grade = self._residual(op, ranks).at((size,))
        return ns * np.exp(ratio), grade

    def port_ns(self, op: str, size: FloatArray, ranks: int) -> FloatArray:
        """Latency growing with log2(ranks), plus the bytes one port carries over its effective rate."""
        node = self.profile.node
        traffic = 2.0 * (ranks - 1) / ranks if op == "all_reduce" else float(ranks - 1)
        launch = self._fit(op, "launch_ns", self.profile.graph_launch_ns)
        rate = node.nvlink_bytes_per_s * self._fit(op, "nvlink_eff", 0.75) * 1e-9
        return launch + node.nvlink_latency_ns * (_HOPS[op] * math.log2(ranks)) + size * (traffic / rate)

    def _fit(self, op: str, name: str, otherwise: float) -> float:
        return self.profile.fits.get(op, {}).get(name, otherwise)

    def _residual(self, op: str, ranks: int) -> Residual:
        found = self._residuals.get((op, ranks))
        if found is None:
            found = residual_of(self.profile, op, (ranks,), "", self.eager)
            self._residuals[op, ranks] = found
        return found


def as_sizes(values: ArrayLike) -> FloatArray:
    """Any numbers as one float64 array."""
    return np.asarray(values, dtype=np.float64)
