"""Collectives: latency plus the busiest port, calibrated inside a node, carried across nodes by the NIC's rate.

Inside a node a measured residual curve over bytes (per collective and number of ranks) corrects the port model.
Across nodes rings and trees run hierarchically: reduce-scatter in the node, exchange of shards over each GPU's own
NIC, all-gather in the node (NCCL's multi-NIC schemes move the same bytes through the same ports).

The expert all-to-all follows DeepEP (deepseek-ai/DeepEP, MIT; published figures in its README): the *normal* kernels
send a token once to each rank (once to each node over the NIC), the *low-latency* kernels once for every chosen
expert but start sooner. The faster of the two is taken. Port bytes come in deduplicated; `copies` undoes that.
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
        self._residuals: dict[tuple[str, str, int], Residual] = {}
        self._copies: dict[tuple[int, int], float] = {}

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

    def all_to_all(
        self, near: FloatArray, far: FloatArray, ranks: int, nodes: int, top_k: int
    ) -> tuple[FloatArray, U8Array]:
        """near, far: bytes through the busiest NVLink port and NIC port, a token once a rank, once a node."""
        normal, grade_normal = self._exchange("normal", near, far, ranks, nodes)
        quick, grade_quick = self._exchange(
            "ll", near * self._undo(ranks, top_k), far * self._undo(nodes, top_k), ranks, nodes
        )
        take = quick < normal
        return np.where(take, quick, normal), np.where(take, grade_quick, grade_normal)

    def _exchange(
        self, kind: str, near: FloatArray, far: FloatArray, ranks: int, nodes: int
    ) -> tuple[FloatArray, U8Array]:
        node = self.profile.node
        fit = self.profile.fits.get(f"all_to_all/{kind}", {})
        launch = fit.get("launch_ns", (4.0 if kind == "ll" else 10.0) * self.profile.graph_launch_ns)
        near_rate = node.nvlink_bytes_per_s * fit.get("nvlink_eff", 0.5 if kind == "ll" else 0.65) * 1e-9
        ns = launch + node.nvlink_latency_ns + near / near_rate
        residual = self._residual("all_to_all", kind, min(ranks, node.gpus_per_node))
        ratio, grade = residual.at((near,))
        ns = ns * np.exp(ratio)
        if nodes > 1:
            far_rate = node.nic_bytes_per_s * fit.get("nic_eff", 0.88) * 1e-9
            start = fit.get("nic_launch_ns", launch) + node.nic_latency_ns
            ns = np.maximum(ns, start + far / far_rate)
            grade = np.full(near.shape, ASSUMED, dtype=np.uint8)
        return ns, grade

    def _undo(self, places: int, top_k: int) -> float:
        """Copies sent for each deduplicated one: k (P-1)/P over the mean distinct remote places of k uniform picks."""
        found = self._copies.get((places, top_k))
        if found is None:
            found = 1.0
            if places > 1 and top_k > 1:
                distinct = (places - 1) * (1.0 - (1.0 - 1.0 / places) ** top_k)
                found = max(1.0, top_k * (places - 1) / places / distinct)
            self._copies[places, top_k] = found
        return found

    def _inside(self, op: str, size: FloatArray, ranks: int) -> tuple[FloatArray, U8Array]:
        """A collective within one node; nothing for a single rank."""
        if ranks <= 1:
            return np.zeros(size.shape), np.zeros(size.shape, dtype=np.uint8)
        ns = self.port_ns(op, size, ranks)
        ratio, grade = self._residual(op, "", ranks).at((size,))
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

    def _residual(self, op: str, kind: str, ranks: int) -> Residual:
        key = (op, kind, ranks)
        found = self._residuals.get(key)
        if found is None:
            found = residual_of(self.profile, op, (kind, ranks) if kind else (ranks,), "", self.eager)
            self._residuals[key] = found
        return found


def as_sizes(values: ArrayLike) -> FloatArray:
    """Any numbers as one float64 array."""
    return np.asarray(values, dtype=np.float64)
