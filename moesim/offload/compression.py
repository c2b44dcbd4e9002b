"""What a `Compressed` means for sizes, popularity and samples: one function that all who build contexts use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.errors import BadInput, Infeasible
from moesim.offload import Compressed, OffloadContext, RouteSample

__all__ = ["apply", "check", "gone_LE", "stored_LE", "stored_bytes_LE", "total_bytes"]


def check(context: OffloadContext, compressed: Compressed) -> None:
    """Raise BadInput where a policy's answer is none: shapes, positive bits, a map onto experts that serve themselves
    (map[map] = map), shares from high to low."""
    shape = (context.num_layers, context.num_experts)
    wrong = []
    if compressed.bits_LE.shape != shape or compressed.map_LE.shape != shape:
        wrong.append(
            f"bits and map must be {list(shape)}, not {compressed.bits_LE.shape} and {compressed.map_LE.shape}"
        )
    else:
        if not (np.isfinite(compressed.bits_LE).all() and (compressed.bits_LE > 0).all()):
            wrong.append("bits a weight must be positive")
        if compressed.map_LE.min(initial=0) < 0 or compressed.map_LE.max(initial=0) > context.num_experts:
            wrong.append(
                f"experts are mapped to experts 0 to {context.num_experts - 1}, or {context.num_experts}: none"
            )
        elif (_through(compressed.map_LE, compressed.map_LE) != compressed.map_LE).any():
            wrong.append("an expert that serves others must serve itself")
        elif (~stored_LE(compressed)).all(axis=1).any():
            wrong.append("every layer keeps at least one expert")
    shares = [share for share, _ in compressed.miss_bits]
    if shares != sorted(shares, reverse=True) or any(bits <= 0 for _, bits in compressed.miss_bits):
        wrong.append("miss_bits go from the highest share to the lowest, with positive bits")
    if compressed.extra_bytes < 0:
        wrong.append("extra_bytes must not be negative")
    if wrong:
        raise BadInput(f"the precision policy's answer cannot be used: {'; '.join(wrong)}.")


def stored_LE(compressed: Compressed) -> BoolArray:
    """Experts that have weights of their own: neither merged into others nor gone."""
    own_E = np.arange(compressed.map_LE.shape[1])
    return np.asarray(compressed.map_LE == own_E, bool)


def gone_LE(compressed: Compressed) -> BoolArray:
    """Experts whose tokens have nobody."""
    return np.asarray(compressed.map_LE == compressed.map_LE.shape[1], bool)


def stored_bytes_LE(context: OffloadContext, compressed: Compressed, bits: float) -> IntArray:
    """Bytes of each expert's own weights, whole bytes, rounded up: 0 for merged and gone ones, so that a group that was
    merged counts once. bits: a weight of the model's own format, in which context.size_LE is."""
    size_LE = np.ceil(context.size_LE * (compressed.bits_LE / bits) - 1e-6).astype(np.int64)
    return np.where(stored_LE(compressed), size_LE, 0)


def total_bytes(context: OffloadContext, compressed: Compressed, bits: float) -> int:
    """Of all experts' weights, and of what is kept besides."""
    return int(stored_bytes_LE(context, compressed, bits).sum()) + compressed.extra_bytes


def apply(context: OffloadContext, compressed: Compressed, bits: float) -> OffloadContext:
    """The context of what is really stored.

    size_LE: `stored_bytes_LE`; merged and gone experts get 1, because a cache needs a size for every key and no look-up
    ever asks for them. popularity_LE: that of merged experts is added to who serves them, gone ones have 0, so that
    plans by popularity take those with weights first. fit: ids of who serves, where K are left. capacity_bytes: less
    what is kept besides on the device. `upcoming` is of look-ups, which `Driver` makes of mapped ids: it stays.

    Raises BadInput for a map that is none, Infeasible where what is kept besides takes all of the capacity.
    """
    check(context, compressed)
    none = context.num_experts
    popularity = np.zeros((context.num_layers, none + 1))
    rows = np.arange(context.num_layers)[:, None]
    np.add.at(popularity, (rows, compressed.map_LE), context.popularity_LE)
    capacity = context.capacity_bytes - compressed.extra_bytes
    if capacity < 0:
        raise Infeasible(
            [
                f"What the precision policy keeps on the device ({compressed.extra_bytes:,} bytes) must fit into the"
                f" memory for experts ({context.capacity_bytes:,} bytes): {-capacity:,} bytes are missing."
            ],
            -capacity / max(context.capacity_bytes, 1),
        )
    fit = context.fit
    if fit is not None:
        fit = RouteSample(_sample(fit.expert_TLK, compressed.map_LE), fit.sequence_T, fit.weight_TLK)
    return replace(
        context,
        size_LE=np.maximum(stored_bytes_LE(context, compressed, bits), 1),
        popularity_LE=_floats(popularity[:, :-1]),
        capacity_bytes=capacity,
        fit=fit,
    )


def _floats(x: FloatArray) -> FloatArray:
    return np.ascontiguousarray(x)


def _through(map_LE: IntArray, ids_LE: IntArray) -> IntArray:
    """Who serves each of a layer's ids; none stays none."""
    none = map_LE.shape[1]
    table = np.concatenate([map_LE, np.full((len(map_LE), 1), none)], axis=1)
    return np.asarray(np.take_along_axis(table, ids_LE, axis=1))


def _sample(expert_TLK: IntArray, map_LE: IntArray) -> IntArray:
    none = map_LE.shape[1]
    out = np.empty(expert_TLK.shape, np.int64)
    for layer in range(expert_TLK.shape[1]):
        table = np.append(map_LE[layer], none)
        out[:, layer] = table[np.minimum(expert_TLK[:, layer], none)]
    return out
