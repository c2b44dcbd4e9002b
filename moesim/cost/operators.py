"""Times of operators on one device, vectorised: physics times a measured residual where the profile has one.

Every method takes arrays (or scalars) that broadcast together, and returns `Priced(ns, grade)` of that
shape: float64 nanoseconds and a uint8 grade (index into `moesim.hardware.GRADES`). The rule of the grade: at
a measured grid point measured, between them interpolated, beyond them or for a shape without a curve
extrapolated, on a datasheet profile assumed. Zero work costs zero.

Legend: T tokens, K experts a token. Bytes are what moves through HBM or one port; ranks share nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.physics import Engine, Floats, causal_pairs, floor_ns, work_ns
from moesim.errors import BadInput
from moesim.hardware import DeviceProfile

__all__ = ["AttentionShape", "MoEShape", "Operators", "Priced"]

MEASURED, INTERPOLATED, EXTRAPOLATED, ASSUMED = np.arange(4, dtype=np.uint8)
_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4.0 / (128 * 128),
    "int8": 1.0,
    "int4": 0.5 + 2.0 / 128,
    "mxfp4": 17.0 / 32,
    "nvfp4": 9.0 / 16,
}


_MLA_WIDTH = 17.0 / 9.0  # scores over latent and rope, values over the latent, which is 8/9 of both


class Priced(NamedTuple):
    """Times in ns and how firm each is; both of the broadcast shape of the inputs."""

    ns: NDArray[np.float64]
    grade: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class MoEShape:
    """Routed experts of one rank: hidden size, intermediate size per rank (after expert TP), expert slots on
    the rank, experts a token, weight dtype, gated (SwiGLU: three matrices) or not (two).
    """

    hidden: int
    intermediate: int
    local_experts: int
    top_k: int
    dtype: str
    gated: bool = True


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads per rank and sizes. kv_dim (MLA) = kv_lora_rank + rope dim; window 0 = full attention."""

    kind: Literal["gqa", "mla"]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_dim: int
    dtype: str
    kv_dtype: str
    window: int = 0


class Operators:
    """Prices operations on `profile`. `cuda_graph` false prices kernels as launched one by one from
    the host.
    """

    def __init__(self, profile: DeviceProfile, cuda_graph: bool = True) -> None:
        self.profile = profile
        self.cuda_graph = cuda_graph
        self._bare = EXTRAPOLATED if profile.kind == "measured" else ASSUMED

    @property
    def moe_block_rows(self) -> int:
        """Rows a grouped GEMM pads each expert's share to: use it for `padded_rows` in `moe`."""
        return self.profile.moe_block_rows

    def error(self, op: str) -> float:
        """Held-out relative error of an operator, 1 sigma of log."""
        return self.profile.error(op)

    def gemm(self, m: ArrayLike, n: int, k: int, dtype: str) -> Priced:
        """C[m, n] = A[m, k] B[k, n], weights B in `dtype`, activations in 16 bits. m: rows, any shape."""
        rows = _floats(m)
        engine = Engine.of(self.profile, "gemm", dtype, dtype)
        moved = n * k * _size(dtype) + rows * (2.0 * (n + k))
        return self._price("gemm", engine, rows > 0, moved, rows * (2.0 * n * k))

    def moe(
        self,
        rows: ArrayLike,
        active: ArrayLike,
        padded_rows: ArrayLike,
        nonlocal_rows: ArrayLike,
        shape: MoEShape,
    ) -> Priced:
        """Grouped GEMMs of one rank's routed experts, with permute, activation and weighted combine.

        rows: (token, expert) pairs routed to this rank. active: experts with at least one row. padded_rows:
        sum over experts of rows rounded up to `moe_block_rows`. nonlocal_rows: pairs routed elsewhere that
        the kernel still touches (0 with an all-to-all).
        """
        r, a, p, other = np.broadcast_arrays(
            _floats(rows), _floats(active), _floats(padded_rows), _floats(nonlocal_rows)
        )
        engine = Engine.of(self.profile, "moe", shape.dtype, shape.dtype)
        matrices = 3 if shape.gated else 2
        weights = float(matrices * shape.hidden * shape.intermediate)
        moved = a * (weights * _size(shape.dtype)) + r * (4.0 * shape.hidden) + other * (2.0 * shape.hidden)
        return self._price("moe", engine, r + other > 0, moved, p * (2.0 * weights), r * (2.0 * weights))

    def attention_prefill(self, q_tokens: ArrayLike, kv_tokens: ArrayLike, shape: AttentionShape) -> Priced:
        """One sequence's chunk: q new tokens attending causally to kv_tokens in all (q included)."""
        q, kv = np.broadcast_arrays(_floats(q_tokens), _floats(kv_tokens))
        engine = Engine.of(self.profile, "attention_prefill", shape.kind, shape.dtype)
        heads, wide = shape.num_heads, shape.head_dim + shape.v_head_dim
        pairs = causal_pairs(q, kv, shape.window)
        moved = q * (2.0 * heads * wide) + kv * (shape.num_kv_heads * wide * _size(shape.kv_dtype))
        return self._price("attention_prefill", engine, q > 0, moved, pairs * (2.0 * heads * wide))

    def attention_decode(self, batch: ArrayLike, kv_tokens: ArrayLike, shape: AttentionShape) -> Priced:
        """One new token for each of `batch` sequences. kv_tokens: sum of their context lengths, each already
        cut to the window where there is one. MLA runs with absorbed weights over the latent (kv_dim wide).
        """
        b, kv = np.broadcast_arrays(_floats(batch), _floats(kv_tokens))
        engine = Engine.of(self.profile, "attention_decode", shape.kind, shape.dtype)
        if shape.window > 0:
            kv = np.minimum(kv, b * shape.window)
        if shape.kind == "mla":
            token_bytes = shape.kv_dim * _size(shape.kv_dtype)
            wide = shape.kv_dim * _MLA_WIDTH
        else:
            wide = shape.head_dim + shape.v_head_dim
            token_bytes = shape.num_kv_heads * wide * _size(shape.kv_dtype)
        moved = kv * token_bytes + b * (2.0 * shape.num_heads * wide)
        return self._price("attention_decode", engine, b > 0, moved, kv * (2.0 * shape.num_heads * wide))

    def elementwise(self, bytes_moved: ArrayLike) -> Priced:
        """Norms, rope, embedding, residual, permute, sampling: one launch and the bytes read and written."""
        moved = _floats(bytes_moved)
        engine = Engine.of(self.profile, "elementwise", "", "bf16")
        return self._price("elementwise", engine, moved > 0, moved, np.zeros_like(moved))

    def all_reduce(self, bytes_per_rank: ArrayLike, ranks: int, spans_nodes: bool) -> Priced:
        """Sum of a buffer of `bytes_per_rank` held by each of `ranks` ranks, result on all."""
        return self._ring("all_reduce", bytes_per_rank, ranks, spans_nodes, 2.0 * (ranks - 1) / max(ranks, 1))

    def all_gather(self, bytes_per_rank: ArrayLike, ranks: int, spans_nodes: bool) -> Priced:
        """Each rank gives `bytes_per_rank` and ends with ranks * bytes_per_rank."""
        return self._ring("all_gather", bytes_per_rank, ranks, spans_nodes, float(ranks - 1))

    def reduce_scatter(self, bytes_per_rank: ArrayLike, ranks: int, spans_nodes: bool) -> Priced:
        """Each rank holds ranks * bytes_per_rank and ends with the sum of its own part, `bytes_per_rank`."""
        return self._ring("reduce_scatter", bytes_per_rank, ranks, spans_nodes, float(ranks - 1))

    def all_to_all(self, nvlink_bytes: ArrayLike, nic_bytes: ArrayLike, ranks: int, nodes: int) -> Priced:
        """One phase (dispatch or combine) of an expert all-to-all, from its busiest ports.

        nvlink_bytes, nic_bytes: the most bytes that any rank sends or receives at that level, counted after
        the back end's own deduplication (a token once per destination rank; once per destination node on the
        NIC).
        """
        near, far = np.broadcast_arrays(_floats(nvlink_bytes), _floats(nic_bytes))
        node = self.profile.node
        launch = self.profile.fit("all_to_all", "", "launch_ns", self.profile.graph_launch_ns * 2)
        nvlink_eff = self.profile.fit("all_to_all", "", "nvlink_eff", 0.75)
        nic_eff = self.profile.fit("all_to_all", "", "nic_eff", 0.85)
        near_ns = near / (node.nvlink_bytes_per_s * nvlink_eff * 1e-9)
        far_ns = far / (node.nic_bytes_per_s * nic_eff * 1e-9)
        latency = launch + (node.nic_latency_ns if nodes > 1 else node.nvlink_latency_ns)
        ns = np.where((near + far > 0) & (ranks > 1), latency + np.maximum(near_ns, far_ns), 0.0)
        return Priced(ns, np.full(ns.shape, self._bare, dtype=np.uint8))

    def _ring(
        self, op: str, bytes_per_rank: ArrayLike, ranks: int, spans_nodes: bool, traffic: float
    ) -> Priced:
        """Ring or tree: each rank sends `traffic` times its bytes; across nodes the slower of NVLink
        and NIC.
        """
        size = _floats(bytes_per_rank)
        node = self.profile.node
        launch = self.profile.fit(op, "", "launch_ns", self.profile.graph_launch_ns * 2)
        hops = max(ranks - 1, 0)
        latency = launch + node.nvlink_latency_ns * np.log2(max(ranks, 2))
        rate = node.nvlink_bytes_per_s * self.profile.fit(op, "", "nvlink_eff", 0.75)
        ns = latency + size * traffic / (rate * 1e-9)
        if spans_nodes:
            nodes = max(2, -(-ranks // node.gpus_per_node))
            per_node = max(1.0, ranks / nodes)
            nic = node.nic_bytes_per_s * self.profile.fit(op, "", "nic_eff", 0.85)
            share = traffic * (nodes - 1) / nodes * ranks / max(hops, 1) / per_node
            far = latency + size * share / (nic * 1e-9)
            ns = np.maximum(ns, far) + node.nic_latency_ns * np.log2(max(nodes, 2))
        ns = np.where((size > 0) & (ranks > 1), ns, 0.0)
        return Priced(ns, np.full(ns.shape, self._bare, dtype=np.uint8))

    def _price(
        self,
        op: str,
        engine: Engine,
        any_work: NDArray[np.bool_],
        moved: Floats,
        flop: Floats,
        least_flop: Floats | None = None,
    ) -> Priced:
        ns = np.maximum(
            work_ns(engine, moved, flop), floor_ns(engine, moved, flop if least_flop is None else least_flop)
        )
        return Priced(np.where(any_work, ns, 0.0), np.full(ns.shape, self._bare, dtype=np.uint8))


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _size(dtype: str) -> float:
    try:
        return _BYTES[dtype]
    except KeyError:
        raise BadInput(f"unknown dtype {dtype!r}; known: {', '.join(_BYTES)}.") from None
