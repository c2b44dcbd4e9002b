"""Shapes of operators that a profile can price: what they are called, what a size costs, and the least it could cost.

A shape is a curve's key (`moesim.cost.operators` gives their order), and for attention a number of sequences. Sizes run
along one axis: rows (GEMM), (token, expert) pairs spread evenly (MoE), prompt length or context (attention), bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.arrays import FloatArray
from moesim.cost.operators import (
    AttentionShape,
    BlockShape,
    MoEShape,
    Operators,
    Priced,
    RouterShape,
    decode_work,
    prefill_work,
)
from moesim.cost.own import block_ns
from moesim.cost.physics import BACKWARD
from moesim.dtypes import dtype_bytes
from moesim.hardware import EXTRAPOLATED, Curve, DeviceProfile
from moesim_kernels.profiles.terminal_plot import size_text

__all__ = [
    "AXES",
    "AXIS_WORDS",
    "Key",
    "Shape",
    "floor_ns",
    "floor_parts",
    "knots",
    "main_shapes",
    "measured_shapes",
    "price",
    "span",
]

Key = tuple[int | str, ...]

AXES = {
    "gemm": "rows",
    "moe": "pairs",
    "moe_dgrad": "pairs",
    "moe_wgrad": "pairs",
    "router": "rows",
    "router_backward": "rows",
    "block": "rows",
    "attention_prefill": "prompt",
    "attention_decode": "context",
    "attention_backward": "prompt",
    "elementwise": "bytes",
    "copy": "bytes",
    "storage": "bytes",
    "all_reduce": "bytes",
    "all_gather": "bytes",
    "reduce_scatter": "bytes",
    "all_to_all": "bytes",
}
"""Operators that can be priced by one size -> what the size counts, in a word."""

AXIS_WORDS = {
    "rows": "rows",
    "pairs": "(token, expert) pairs",
    "prompt": "prompt length in tokens",
    "context": "context of each sequence in tokens",
    "bytes": "bytes",
}
"""The same at length, for titles."""

_RANGES = {"rows": (1.0, 8192.0), "pairs": (8.0, 131072.0), "prompt": (16.0, 32768.0), "context": (128.0, 131072.0)}
_BYTES = (float(1 << 10), float(1 << 28))
_DECODE_BATCH = 32

_HEADS: tuple[Key, ...] = (
    ("gqa", 32, 8, 128, 128, 0, "bf16"),
    ("mla", 128, 576, "bf16"),
    ("gqa", 32, 8, 128, 128, 0, "fp8"),
    ("mla", 128, 576, "fp8"),
)
_MAIN: dict[str, tuple[Key, ...]] = {
    # Mixtral 8x7B, Qwen3-30B-A3B, DeepSeek-V3 on one of 8 ranks and gpt-oss-120b
    "moe": (
        (4096, 14336, 8, 2, "bf16", 3),
        (2048, 768, 128, 8, "bf16", 3),
        (7168, 2048, 32, 8, "fp8_block", 3),
        (7168, 2048, 256, 8, "fp8_block", 3),
        (2880, 2880, 128, 4, "mxfp4", 3),
    ),
    "gemm": ((4096, 4096, "bf16"), (8192, 8192, "bf16"), (4096, 4096, "fp8_block"), (4096, 4096, "fp8")),
    "attention_prefill": _HEADS,
    "attention_decode": _HEADS,
    "elementwise": ((0,),),
    "all_reduce": ((8,), (4,), (2,)),
    "all_gather": ((8,), (4,), (2,)),
    "reduce_scatter": ((8,), (4,), (2,)),
    "all_to_all": ((8,), (4,), (2,)),
}
"""Shapes shown first; a profile without curves of an operator is shown at the first two of them. Operators that are
not here are shown where they were measured.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """One line of a table. `batch`: sequences of attention. `name`: what a model calls it, if one asked for it."""

    op: str
    key: Key
    batch: int = 1
    name: str = ""

    @property
    def axis(self) -> str:
        """What its sizes count."""
        return AXES[self.op]

    @property
    def label(self) -> str:
        """The shape in words, without its operator."""
        text = _label(self.op, self.key)
        if self.op == "attention_decode":
            text += f", batch {self.batch}"
        elif self.op == "attention_prefill" and self.batch > 1:
            text += f", {self.batch} prompts"
        return f"{self.name}: {text}" if self.name else text


def _label(op: str, key: Key) -> str:
    if op == "gemm":
        return f"{key[0]} x {key[1]} {key[2]}"
    if op.startswith("moe"):
        plain = "" if key[5] == 3 else ", not gated"
        return f"{key[2]} experts {key[0]} x {key[1]}, top {key[3]}, {key[4]}{plain}"
    if op.startswith("attention"):
        if key[0] == "mla":
            return f"MLA {key[1]} head{'s' if key[1] != 1 else ''}, latent {key[2]}, {key[3]} cache"
        dim = key[3] if key[3] == key[4] else f"{key[3]}/{key[4]}"
        window = f", window {key[5]}" if key[5] else ""
        return f"GQA {key[1]}/{key[2]} heads of {dim}{window}, {key[6]} cache"
    if op.startswith("router"):
        groups = f", {key[6]} of {key[5]} groups" if key[5] != 1 else ""
        return f"{key[1]} experts of hidden {key[0]}, top {key[2]}, {key[4]}{groups}, {key[3]}"
    if op == "block":
        heads = f"GQA {key[1]}/{key[2]} heads of {key[3]}"
        return f"hidden {key[0]}, {heads}, {key[4]} experts, top {key[5]}, {key[8]}, {key[6]}"
    if op == "copy":
        return f"{key[0]}, {key[1]}, {key[2]} stream{'s' if key[2] != 1 else ''}{', kernels running' if key[3] else ''}"
    if op == "storage":
        return f"{key[0]}, blocks of {size_text(float(key[1]), True)}, depth {key[2]}"
    return "one pass" if op == "elementwise" else f"{key[-1]} ranks"


# ---- times


def price(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    """Times and grades at `size` (float64, any shape) by the public methods of `Operators`.

    Raises BadInput where the device cannot multiply the shape's dtype.
    """
    return _PRICES[shape.op](ops, shape, size)


def floor_ns(profile: DeviceProfile, shape: Shape, size: FloatArray) -> FloatArray:
    """The least time by the datasheet, whichever of `floor_parts` is more (Williams et al., CACM 2009)."""
    memory, compute = floor_parts(profile, shape, size)
    return np.maximum(memory, compute)


def floor_parts(profile: DeviceProfile, shape: Shape, size: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ns that the bytes take from memory and the FLOP at the peak; for collectives, copies and reads the bytes of one
    port over the link's rate, and 0.
    """
    key, node = shape.key, profile.node
    if shape.op in _TRAFFIC:
        wire = _TRAFFIC[shape.op](float(key[-1])) / (node.nvlink_bytes_per_s * 1e-9)
        return size * wire, size * 0.0
    if shape.op in ("copy", "storage"):
        host = node.host_bytes_per_s if key[0] == "host" else node.pcie_bytes_per_s
        return size / ((node.nvme_bytes_per_s if shape.op == "storage" else host) * 1e-9), size * 0.0
    moved, flop, dtype = _work(shape, size)
    return moved / (profile.hbm_bytes_per_s * 1e-9), flop / (profile.flop_rate(dtype) * 1e-9)


def _work(shape: Shape, size: FloatArray) -> tuple[FloatArray, FloatArray, str]:
    """Bytes, FLOP and the dtype that multiplies, as `Operators` counts them for its own floor."""
    key = shape.key
    if shape.op == "gemm":
        (n, k), dtype = _ints(key[:2]), str(key[2])
        return n * k * dtype_bytes(dtype) + size * (2.0 * (n + k)), size * (2.0 * n * k), dtype
    if shape.op.startswith("moe"):
        (hidden, inter, slots, _), dtype = _ints(key[:4]), str(key[4])
        weights = float(_ints(key[5:])[0] * hidden * inter)
        return np.minimum(size, slots) * (weights * dtype_bytes(dtype)), size * (2.0 * weights), dtype
    if shape.op.startswith("router"):
        wide, dtype = float(np.prod(_ints(key[:2]))), str(key[3])
        both = 2.0 if shape.op == "router_backward" else 1.0
        return size * 0.0 + wide * dtype_bytes(dtype), size * (2.0 * wide * both), dtype
    if shape.op == "block":
        block: Any = key
        weights, products = BlockShape(*block).work(size)
        return size * 0.0 + weights, products, str(key[6])
    if shape.op == "attention_decode":
        heads = _attention(key)
        return *decode_work(heads, np.full(size.shape, float(shape.batch)), _seen(shape, size)), heads.dtype
    if shape.op.startswith("attention"):
        heads = _attention(key)
        moved, pairs, per_pair = prefill_work(heads, size, size)
        flops, memory = BACKWARD if shape.op == "attention_backward" else (1.0, 1.0)
        return moved * (shape.batch * memory), pairs * (per_pair * shape.batch * flops), heads.dtype
    return size, size * 0.0, "bf16"


def _ints(values: Iterable[int | str]) -> list[int]:
    return [int(v) for v in values]


def _seen(shape: Shape, context: FloatArray) -> FloatArray:
    """Cached tokens that all sequences attend to."""
    window = _attention(shape.key).window
    return (np.minimum(context, window) if window else context) * shape.batch


def _attention(key: Key) -> AttentionShape:
    cache = str(key[-1])
    dtype = "fp32" if cache == "fp32" else "bf16"
    if key[0] == "mla":
        heads, latent = _ints(key[1:3])
        return AttentionShape("mla", heads, heads, 192, 128, latent, dtype, cache)
    heads, kv_heads, dim, value_dim, window = _ints(key[1:6])
    return AttentionShape("gqa", heads, kv_heads, dim, value_dim, 0, dtype, cache, window)


def _gemm(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    n, k = _ints(shape.key[:2])
    return ops.gemm(size, n, k, str(shape.key[2]))


def _moe(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    """Pairs spread evenly over the slots."""
    hidden, inter, slots, top_k = _ints(shape.key[:4])
    experts = MoEShape(hidden, inter, slots, top_k, str(shape.key[4]), shape.key[5] == 3)
    active = np.minimum(size, float(slots))
    work = ops.moe_work(size / active, experts.dtype) * active
    if shape.op == "moe":
        return ops.moe(size, active, work, 0.0, experts)
    return ops.moe_gradient("dgrad" if shape.op == "moe_dgrad" else "wgrad", size, active, work, experts)


def _router(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    key: Any = shape.key
    return ops.router(size, RouterShape(*key), shape.op == "router_backward")


def _block(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    key: Any = shape.key
    block = BlockShape(*key)
    parts = block_ns(ops, size, block)
    found = ops.block(size, parts, block)
    return Priced(parts, np.full(size.shape, EXTRAPOLATED)) if found is None else found


def _copy(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    key: Any = shape.key
    return ops.copy(size, key[0], key[1], key[2], bool(key[3]))


def _storage(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    key: Any = shape.key
    return ops.storage(size, *key)


def _prefill(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    if shape.op == "attention_backward":
        return ops.attention_backward(size, _attention(shape.key), float(shape.batch))
    return ops.attention_prefill(size, size, _attention(shape.key), float(shape.batch))


def _decode(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    return ops.attention_decode(float(shape.batch), _seen(shape, size), _attention(shape.key))


def _ring(ops: Operators, shape: Shape, size: FloatArray) -> Priced:
    ranks = int(shape.key[-1])
    if shape.op == "all_reduce":
        return ops.all_reduce(size, ranks, False)
    if shape.op == "all_gather":
        return ops.all_gather(size, ranks, False)
    return ops.reduce_scatter(size, ranks, False)


_PRICES: dict[str, Callable[[Operators, Shape, FloatArray], Priced]] = {
    "gemm": _gemm,
    "moe": _moe,
    "moe_dgrad": _moe,
    "moe_wgrad": _moe,
    "router": _router,
    "router_backward": _router,
    "block": _block,
    "attention_prefill": _prefill,
    "attention_decode": _decode,
    "attention_backward": _prefill,
    "copy": _copy,
    "storage": _storage,
    "elementwise": lambda ops, shape, size: ops.elementwise(size),
    "all_reduce": _ring,
    "all_gather": _ring,
    "reduce_scatter": _ring,
    "all_to_all": lambda ops, shape, size: ops.all_to_all(size, 0.0, int(shape.key[-1]), 1),
}
_TRAFFIC: dict[str, Callable[[float], float]] = {
    # bytes through a port, one way, for each byte of size; a switch that sums takes a buffer once, a ring nearly twice
    "all_reduce": lambda ranks: 1.0,
    "all_gather": lambda ranks: ranks - 1.0,
    "reduce_scatter": lambda ranks: ranks - 1.0,
    "all_to_all": lambda ranks: 1.0,
}


# ---- which shapes, at which sizes


def measured_shapes(profile: DeviceProfile, op: str) -> list[Shape]:
    """Shapes of `op` that have a curve, main ones first; attention at one batch each. Empty for a datasheet profile."""
    if op not in AXES:
        return []
    found: dict[Shape, Curve] = {}
    for curve in _priced_curves(profile, op):
        key = (curve.key[-1],) if op == "all_to_all" else curve.key
        found.setdefault(Shape(op, key, _batch(op, curve)), curve)
    main = {key: i for i, key in enumerate(_MAIN.get(op, ()))}

    def rank(shape: Shape) -> tuple[int, int, str]:
        return main.get(shape.key, len(main)), -found[shape].log_ratio.size, repr(shape.key)

    return sorted(found, key=rank)


def _priced_curves(profile: DeviceProfile, op: str) -> list[Curve]:
    """Curves of what the operator's own call prices: of exchanges DeepEP's two kernels inside a node."""
    curves = list(profile.curves.get(op, ()))
    return [c for c in curves if c.key[0] in ("normal", "ll")] if op == "all_to_all" else curves


def _batch(op: str, curve: Curve) -> int:
    """One prompt; for decode the measured batch nearest to 32."""
    if op != "attention_decode":
        return 1
    batches = curve.axes[0]
    return int(batches[np.argmin(np.abs(np.log(batches / _DECODE_BATCH)))])


def main_shapes(profile: DeviceProfile, op: str, most: int) -> list[Shape]:
    """At most `most` shapes to look at first: measured ones, else well-known ones."""
    found = measured_shapes(profile, op)
    if not found and op in _MAIN:
        batch = _DECODE_BATCH if op == "attention_decode" else 1
        found = [Shape(op, key, batch) for key in _MAIN[op][:2]]
    return _diverse(found)[:most]


def _diverse(shapes: list[Shape]) -> list[Shape]:
    """The same shapes, those of a dtype, kind or number of ranks not seen yet first."""
    seen: set[str] = set()
    first: list[Shape] = []
    rest: list[Shape] = []
    for shape in shapes:
        kind = "/".join(str(part) for part in shape.key if isinstance(part, str))
        (rest if kind in seen else first).append(shape)
        seen.add(kind)
    return first + rest


def knots(profile: DeviceProfile, op: str) -> dict[Key, FloatArray]:
    """Measured sizes along the axis of every shape of `op` that has a curve."""
    sizes: dict[Key, set[float]] = {}
    for curve in _priced_curves(profile, op):
        key = (curve.key[-1],) if op == "all_to_all" else curve.key
        sizes.setdefault(key, set()).update(curve.axes[-1].tolist())
    return {key: np.array(sorted(found)) for key, found in sizes.items()}


def span(profile: DeviceProfile, shape: Shape) -> tuple[float, float]:
    """Least and largest size worth drawing: what was measured, else a usual range."""
    sizes = knots(profile, shape.op).get(shape.key, np.zeros(0))
    if len(sizes) > 1:
        return float(sizes[0]), float(sizes[-1])
    return _RANGES.get(shape.axis, _BYTES)
