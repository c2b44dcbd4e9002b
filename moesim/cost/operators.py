"""Times of operators on one device, vectorised: physics times a measured residual where the profile has one.

Every method takes arrays (or scalars) that broadcast together, and returns `Priced(ns, grade)` of that shape: float64
nanoseconds and a uint8 grade (index into `moesim.hardware.GRADES`). At a measured grid point the grade is measured,
between them interpolated, beyond them or for a shape without a curve extrapolated, on a datasheet profile assumed.
Zero work costs zero. Nothing runs below the roofline of the datasheet's rates.

Curve keys: gemm (n, k, dtype); moe and its gradients (hidden, intermediate, slots, top_k, dtype, matrices);
attention (kind, query heads, KV heads, head dim, value dim, window, kv dtype), MLA (kind, heads, kv_dim, kv dtype);
router (hidden, experts, top_k, dtype, score, groups, top groups); block (hidden, heads, KV heads, head dim, experts,
top_k, dtype, router dtype, score, groups, top groups, bias 0 or 1, norm of heads 0 or 1); copy (direction, memory,
streams, busy 0 or 1); storage (mode, block bytes, depth).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.arrays import FloatArray, U8Array
from moesim.cost.curves import Key, Residual, residual_of
from moesim.cost.links import Links, as_sizes
from moesim.cost.physics import BACKWARD, Rates, causal_pairs
from moesim.cost.swaps import SwapKind, Swaps, Way
from moesim.dtypes import dtype_bytes
from moesim.hardware import EXTRAPOLATED, INTERPOLATED, DeviceProfile, RowWork

__all__ = [
    "AttentionShape",
    "BlockShape",
    "MoEShape",
    "Operators",
    "Priced",
    "RouterShape",
    "decode_work",
    "prefill_work",
]

_MLA_WIDTH = 17.0 / 9.0  # scores over latent and rope, values over the latent, which is 8/9 of both
_KV = {"fp8": "fp8", "int8": "fp8", "fp8_block": "fp8", "fp32": "fp32"}  # a cache format's measured stand-in; else bf16
_HALF = {"fp16": "bf16"}


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
class RouterShape:
    """Gate of one MoE layer: hidden size, experts, experts a token, weight dtype, how scores are made, and groups of
    experts of which a token may use `top_groups` (1, 1: no groups).
    """

    hidden: int
    experts: int
    top_k: int
    dtype: str
    score: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1

    @property
    def key(self) -> Key:
        """The curve key of both passes."""
        dtype = _HALF.get(self.dtype, self.dtype)
        return (self.hidden, self.experts, self.top_k, dtype, self.score, self.groups, self.top_groups)


@dataclass(frozen=True, slots=True)
class BlockShape:
    """A rank's own part of one MoE layer with grouped-query attention (`moesim.cost.own`): sizes on this rank, dtype of
    weights and activations, dtype of the router, how it chooses, as in `RouterShape`, and whether the projection has
    a bias and query and key heads are normed.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    dtype: str
    router_dtype: str
    score: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    bias: int = 0
    head_norm: int = 0

    @property
    def key(self) -> Key:
        """The curve key."""
        heads = (self.heads, self.kv_heads, self.head_dim)
        dtypes = (_HALF.get(self.dtype, self.dtype), _HALF.get(self.router_dtype, self.router_dtype))
        choice = (self.score, self.groups, self.top_groups)
        return (self.hidden, *heads, self.experts, self.top_k, *dtypes, *choice, self.bias, self.head_norm)

    def work(self, tokens: FloatArray) -> tuple[float, FloatArray]:
        """Bytes of weights read once, and FLOP of the three products."""
        wide = self.heads * self.head_dim
        projections = self.hidden * (2.0 * wide + 2.0 * self.kv_heads * self.head_dim)
        router = float(self.hidden * self.experts)
        moved = projections * dtype_bytes(self.dtype) + router * dtype_bytes(self.router_dtype)
        return moved, tokens * (2.0 * (projections + router))


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

    @property
    def key(self) -> Key:
        """The curve key of both phases."""
        kv = _KV.get(self.kv_dtype, "bf16")
        if self.kind == "mla":
            return ("mla", self.num_heads, self.kv_dim, kv)
        return ("gqa", self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim, self.window, kv)

    @property
    def variant(self) -> str:
        """Whose physics it is."""
        return f"{self.kind}_{_KV.get(self.kv_dtype, 'bf16')}"


class Operators:
    """Prices operations on `profile`. `cuda_graph` false prices kernels as the host launches them one by one."""

    def __init__(self, profile: DeviceProfile, cuda_graph: bool = True) -> None:
        self.profile = profile
        self.cuda_graph = cuda_graph
        self.swaps = Swaps(profile, not cuda_graph)
        self._links = Links(profile, not cuda_graph)
        self._known: dict[tuple[str, Key], tuple[Rates, Residual]] = {}

    @property
    def moe_block_rows(self) -> int:
        """Rows a grouped GEMM pads each expert's share to, where the profile has no row-work table."""
        return self.profile.moe_block_rows

    def moe_work(self, count: ArrayLike, dtype: str) -> FloatArray:
        """Rows of work that experts with `count` rows cost a grouped GEMM of weights in `dtype`, elementwise; summed
        over slots it is `padded_rows` in `moe`. From the profile's row-work table, else rounded up to a block.
        """
        table = self.row_work(dtype)
        if table is not None:
            return table.at(count)
        block = float(self.profile.moe_block_rows)
        return np.asarray(np.ceil(as_sizes(count) * (1.0 / block)) * block)

    def row_work(self, dtype: str) -> RowWork | None:
        """The profile's row-work table of a weight dtype; None: rows are rounded up to `moe_block_rows`."""
        return self.profile.moe_row_work.get(_HALF.get(dtype, dtype))

    def error(self, op: str) -> float:
        """Held-out relative error of an operator, 1 sigma of log."""
        return self.profile.error(op)

    def gemm(self, m: ArrayLike, n: int, k: int, dtype: str) -> Priced:
        """C[m, n] = A[m, k] B[k, n], weights B in `dtype`, activations in 16 bits. m: rows, any shape."""
        rows = as_sizes(m)
        rates, residual = self._find("gemm", (n, k, _HALF.get(dtype, dtype)), dtype, dtype)
        size = dtype_bytes(dtype)
        ns = rates.gemm_ns(rows, n, k, size)
        floor = rates.floor_ns(n * k * size + rows * (2.0 * (n + k)), rows * (2.0 * n * k))
        ratio, grade = residual.at((rows,))
        return _priced(ns, ratio, floor, grade, rows > 0)

    def moe(
        self, rows: ArrayLike, active: ArrayLike, padded_rows: ArrayLike, nonlocal_rows: ArrayLike, shape: MoEShape
    ) -> Priced:
        """Grouped GEMMs of one rank's routed experts, with permute, activation and weighted combine.

        rows: (token, expert) pairs routed to this rank. active: experts with at least one row. padded_rows: sum
        over experts of `moe_work` of their rows. nonlocal_rows: pairs routed elsewhere that the
        kernel still touches (0 with an all-to-all).
        """
        return self._grouped("moe", _together(rows, active, padded_rows, nonlocal_rows), shape)

    def moe_gradient(
        self, of: Literal["dgrad", "wgrad"], rows: ArrayLike, active: ArrayLike, padded_rows: ArrayLike, shape: MoEShape
    ) -> Priced:
        """Backward pass of the grouped GEMMs: gradients of their inputs (dgrad) or of their weights (wgrad), each as
        many products as the forward pass. Sizes as in `moe`.
        """
        return self._grouped(f"moe_{of}", _together(rows, active, padded_rows, 0.0), shape)

    def router(self, tokens: ArrayLike, shape: RouterShape, backward: bool = False) -> Priced:
        """Scores of `tokens` tokens, top-k and gates; or the gradients of both router inputs."""
        t = as_sizes(tokens)
        op = "router_backward" if backward else "router"
        dtype = _HALF.get(shape.dtype, shape.dtype)
        rates, residual = self._find(op, shape.key, dtype, shape.dtype)
        size, wide = dtype_bytes(shape.dtype), float(shape.hidden * shape.experts)
        products = 2.0 if backward else 1.0
        ns = rates.gemm_ns(t * products, shape.experts, shape.hidden, size)
        floor = rates.floor_ns(np.where(t > 0, wide * size, 0.0), t * (2.0 * wide * products))
        ratio, grade = residual.at((t,))
        return _priced(ns, ratio, floor, grade, t > 0)

    def block(self, tokens: ArrayLike, parts_ns: ArrayLike, shape: BlockShape) -> Priced | None:
        """A rank's own part of one MoE layer: `parts_ns`, what its operators add up to (`moesim.cost.own.block_ns`),
        times the measured residual. None where the profile has no curve of this block or of one near it.
        """
        t, ns = _together(tokens, parts_ns)
        rates, residual = self._find("block", shape.key, shape.dtype, shape.dtype)
        if residual.curve is None:
            return None
        moved, flop = shape.work(t)
        ratio, grade = residual.at((t,))
        return _priced(ns, ratio, rates.floor_ns(moved, flop), grade, t > 0)

    def attention_prefill(
        self, q_tokens: ArrayLike, kv_tokens: ArrayLike, shape: AttentionShape, sequences: ArrayLike = 1
    ) -> Priced:
        """A chunk of each of `sequences` equal sequences in one kernel: q new tokens of each attend causally to
        kv_tokens in all (q included). Measured chunks have no prefix; one with a prefix is looked up at the
        length whose causal square has the same area, q (2 kv - q), and graded extrapolated.
        """
        return self._causal("attention_prefill", _together(q_tokens, kv_tokens, sequences), shape)

    def attention_backward(self, tokens: ArrayLike, shape: AttentionShape, sequences: ArrayLike = 1) -> Priced:
        """Gradients of causal attention over each of `sequences` whole sequences of `tokens` tokens."""
        return self._causal("attention_backward", _together(tokens, tokens, sequences), shape)

    def _causal(self, op: str, sizes: list[FloatArray], shape: AttentionShape) -> Priced:
        """Attention of chunks, forward or backward. sizes: new tokens, keys in all, sequences."""
        q, kv, count = sizes
        rates, residual = self._find(op, shape.key, shape.variant, shape.dtype)
        moved, pairs, per_pair = prefill_work(shape, q, kv)
        floor = rates.floor_ns(moved * count, pairs * per_pair * count)
        if op == "attention_backward":
            per_pair, moved = per_pair * BACKWARD[0], moved * BACKWARD[1]
        work = (moved, (pairs + q * rates.get("diagonal")) * per_pair)
        keys = np.minimum(kv, shape.window + 128.0) if shape.window > 0 else kv  # that a tile of 128 queries sees
        ns = rates.prefill_ns(count, keys, shape.head_dim + shape.v_head_dim, work)
        ratio, grade = residual.at((count, np.sqrt(q * np.maximum(2.0 * kv - q, 0.0))))
        grade = np.where(kv > q, np.maximum(grade, EXTRAPOLATED), grade)
        return _priced(ns, ratio, floor, grade, (q > 0) & (count > 0))

    def attention_decode(self, batch: ArrayLike, kv_tokens: ArrayLike, shape: AttentionShape) -> Priced:
        """One new token for each of `batch` sequences. kv_tokens: sum of their context lengths, each already cut
        to the window where there is one. MLA runs with absorbed weights over the latent (kv_dim wide).
        """
        b, kv = _together(batch, kv_tokens)
        rates, residual = self._find("attention_decode", shape.key, shape.variant, shape.dtype)
        if shape.window > 0:
            kv = np.minimum(kv, b * shape.window)
        moved, flop = decode_work(shape, b, kv)
        units = shape.num_heads if shape.kind == "mla" else shape.num_kv_heads
        ns = rates.decode_ns(b, kv, units, (moved, flop))
        ratio, grade = residual.at((b, kv / np.maximum(b, 1.0)))
        return _priced(ns, ratio, rates.floor_ns(moved, flop), grade, b > 0)

    def elementwise(self, bytes_moved: ArrayLike) -> Priced:
        """Norms, rope, embedding, residual, permute, sampling: one launch and the bytes read and written."""
        moved = as_sizes(bytes_moved)
        rates, residual = self._find("elementwise", (0,), "", "bf16")
        ratio, grade = residual.at((moved,))
        return _priced(rates.launch_ns + moved / rates.bytes_per_ns, ratio, np.zeros(()), grade, moved > 0)

    def all_reduce(self, bytes_per_rank: ArrayLike, ranks: int, spans_nodes: bool, nodes: int = 0) -> Priced:
        """Sum of a buffer of `bytes_per_rank` held by each of `ranks` ranks, result on all. nodes: that the ranks
        spread over evenly (0: consecutive ranks), here and below."""
        return self._collective("all_reduce", bytes_per_rank, ranks, spans_nodes, nodes)

    def all_gather(self, bytes_per_rank: ArrayLike, ranks: int, spans_nodes: bool, nodes: int = 0) -> Priced:
        """Each rank gives `bytes_per_rank` and ends with ranks * bytes_per_rank."""
        return self._collective("all_gather", bytes_per_rank, ranks, spans_nodes, nodes)

    def reduce_scatter(self, bytes_per_rank: ArrayLike, ranks: int, spans_nodes: bool, nodes: int = 0) -> Priced:
        """Each rank holds ranks * bytes_per_rank and ends with the sum of its own part, `bytes_per_rank`."""
        return self._collective("reduce_scatter", bytes_per_rank, ranks, spans_nodes, nodes)

    def all_to_all(
        self,
        nvlink_bytes: ArrayLike,
        nic_bytes: ArrayLike,
        ranks: int,
        nodes: int,
        top_k: int = 8,
        kind: SwapKind | Literal["auto"] = "auto",
        way: Way = "dispatch",
        sms: int = 0,
        total_bytes: ArrayLike | None = None,
    ) -> Priced:
        """One phase of an expert all-to-all, from its busiest ports. kind: see `moesim.cost.swaps`; `auto`: the faster
        of DeepEP's two kernels.

        nvlink_bytes, nic_bytes: the most bytes that any rank sends or receives at that level, copies counted as the
        kind does (`auto`: once for each other rank, and once for each other node on the NIC). top_k: experts a token,
        which says how many copies the low-latency kernels of `auto` send instead. sms: multiprocessors that run the
        kernel, 0: as many as it takes by itself. total_bytes: over NVLink, of all ranks; None: all ports are as busy.
        """
        near, far = _together(nvlink_bytes, nic_bytes)
        total = None if total_bytes is None else np.broadcast_to(as_sizes(total_bytes), near.shape)
        if kind == "auto":
            ns, grade = self.swaps.all_to_all(near, far, ranks, nodes, top_k, way, sms)
        else:
            ns, grade = self.swaps.swap(kind, near, far, ranks, nodes, way, sms, total)
        return Priced(np.where((near + far > 0) & (ranks > 1), ns, 0.0), grade)

    def copy(
        self,
        bytes_moved: ArrayLike,
        direction: Literal["h2d", "d2h", "host"],
        memory: Literal["pinned", "pageable"] = "pinned",
        streams: int = 1,
        busy: bool = False,
    ) -> Priced:
        """Host to device, back, or within host memory. busy: while kernels run."""
        node = self.profile.node
        rate = node.host_bytes_per_s if direction == "host" else node.pcie_bytes_per_s
        return self._stream("copy", bytes_moved, rate * 1e-9, (direction, memory, streams, int(busy)))

    def storage(
        self, bytes_read: ArrayLike, mode: Literal["direct", "buffered"], block_bytes: int, depth: int
    ) -> Priced:
        """Reads from NVMe in blocks, `depth` of them under way at once."""
        rate = self.profile.node.nvme_bytes_per_s * 1e-9
        return self._stream("storage", bytes_read, rate, (mode, block_bytes, depth))

    def _stream(self, op: str, bytes_moved: ArrayLike, rate: float, key: Key) -> Priced:
        """A launch, then bytes at a share (`eff`) of the link's rate."""
        moved = as_sizes(bytes_moved)
        rates, residual = self._find(op, key, "", "bf16")
        ratio, grade = residual.at((moved,))
        ns = rates.launch_ns + moved / (rate * rates.more["eff"])
        return _priced(ns, ratio, np.zeros(()), grade, moved > 0)

    def _grouped(self, op: str, sizes: list[FloatArray], shape: MoEShape) -> Priced:
        """Grouped GEMMs, forward or one of the two backward passes. sizes: as of `moe`."""
        r, a, p, other = sizes
        matrices = 3 if shape.gated else 2
        dtype = _HALF.get(shape.dtype, shape.dtype)
        key: Key = (shape.hidden, shape.intermediate, shape.local_experts, shape.top_k, dtype, matrices)
        rates, residual = self._find(op, key, shape.dtype, shape.dtype, scaled=2)
        size = dtype_bytes(shape.dtype)
        ns = rates.moe_ns(r, a, p, other, (shape.hidden, shape.intermediate, matrices, size))
        weights = float(matrices * shape.hidden * shape.intermediate)
        floor = rates.floor_ns(a * (weights * size), r * (2.0 * weights))
        ratio, grade = residual.at((r,))
        if residual.exact:
            even = np.minimum(r, float(shape.local_experts))
            padded = self.moe_work(r / np.maximum(even, 1.0), dtype) * even
            grade = np.where((a == even) & (p == padded) & (other == 0), grade, np.maximum(grade, INTERPOLATED))
        return _priced(ns, ratio, floor, grade, r + other > 0)

    def _collective(self, op: str, bytes_per_rank: ArrayLike, ranks: int, spans_nodes: bool, nodes: int) -> Priced:
        size = as_sizes(bytes_per_rank)
        ns, grade = self._links.collective(op, size, ranks, spans_nodes, nodes)
        return Priced(np.where((size > 0) & (ranks > 1), ns, 0.0), grade)

    def _find(self, op: str, key: Key, variant: str, dtype: str, scaled: int = -1) -> tuple[Rates, Residual]:
        found = self._known.get((op, key))
        if found is None:
            if not self.cuda_graph and f"{op}/{variant}@eager" in self.profile.fits:
                variant = f"{variant}@eager"
            residual = residual_of(self.profile, op, key, variant, not self.cuda_graph, scaled)
            found = (Rates.of(self.profile, op, residual.variant, dtype), residual)
            self._known[op, key] = found
        return found


def _together(*values: ArrayLike) -> list[FloatArray]:
    """Float arrays of one shape."""
    arrays = [as_sizes(v) for v in values]
    shape = max((a.shape for a in arrays), key=len)
    if all(a.shape == shape for a in arrays):
        return arrays
    return list(np.broadcast_arrays(*arrays))


def prefill_work(shape: AttentionShape, q: FloatArray, kv: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """Bytes of one sequence's chunk, its (query, key) pairs, and FLOP a pair."""
    wide = 1.0 * (shape.head_dim + shape.v_head_dim)
    kv_heads = shape.num_heads if shape.kind == "mla" else shape.num_kv_heads
    kv_bytes = 2.0 if shape.kind == "mla" else dtype_bytes(shape.kv_dtype)
    seen = np.minimum(kv, q + shape.window) if shape.window > 0 else kv
    moved = q * (2.0 * shape.num_heads * wide) + seen * (kv_heads * wide * kv_bytes)
    return moved, causal_pairs(q, kv, shape.window), 2.0 * shape.num_heads * wide


def decode_work(shape: AttentionShape, batch: FloatArray, kv: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Bytes and FLOP of one decode step over `kv` context tokens in all."""
    if shape.kind == "mla":
        token_bytes = shape.kv_dim * dtype_bytes(shape.kv_dtype)
        wide = shape.kv_dim * _MLA_WIDTH
    else:
        wide = 1.0 * (shape.head_dim + shape.v_head_dim)
        token_bytes = shape.num_kv_heads * wide * dtype_bytes(shape.kv_dtype)
    return kv * token_bytes + batch * (2.0 * shape.num_heads * wide), kv * (2.0 * shape.num_heads * wide)


def _priced(
    ns: FloatArray, ratio: FloatArray | float, floor: FloatArray, grade: U8Array, work: NDArray[np.bool_]
) -> Priced:
    """Physics times residual, not below the floor, nothing for no work."""
    out = np.maximum(ns * np.exp(ratio), floor)
    return Priced(np.where(work, out, 0.0), np.asarray(grade, dtype=np.uint8))
