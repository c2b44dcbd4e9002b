"""What kinds of offload share: how layers divide the device's capacity, who is placed first, and what the CPU takes.

Pure functions over sizes and popularity; no kind of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.errors import BadInput, Infeasible
from moesim.offload import OffloadContext

__all__ = [
    "Share",
    "SlotsPerLayer",
    "by_popularity",
    "empty_capacity",
    "fill",
    "largest_L",
    "layer_capacity",
    "popular",
    "shortest_layer",
    "too_much",
]

Share = Literal["equal", "entropy"]
Slots = Annotated[int, Field(ge=0, le=1 << 20)]
SlotsPerLayer = Slots | Annotated[tuple[Slots, ...], Field(strict=False, min_length=1, max_length=65536)] | None


def empty_capacity(context: OffloadContext) -> IntArray:
    """No cache at all: zeros, one for each group."""
    return np.zeros(1 if context.semantics.pooled else context.num_layers, np.int64)


def largest_L(context: OffloadContext) -> IntArray:
    """Bytes of a slot that any expert of the layer fits into."""
    largest: IntArray = context.size_LE.max(axis=1)
    return largest


def by_popularity(context: OffloadContext) -> IntArray:
    """Keys of all layers, the most popular first, the lower key first among equals."""
    return np.argsort(-context.popularity_LE.reshape(-1), kind="stable")


def fill(context: OffloadContext, order: IntArray, capacity_G: IntArray, group_K: IntArray) -> BoolArray:
    """Who is placed, bool [L, E]: each key of `order` whose group has room for it when its turn comes."""
    out = np.zeros(context.num_keys, bool)
    left: list[int] = capacity_G.tolist()
    group, size = group_K.tolist(), context.size_K.tolist()
    for key in order.tolist():
        if left[group[key]] >= size[key]:
            left[group[key]] -= size[key]
            out[key] = True
    return out.reshape(context.size_LE.shape)


def popular(context: OffloadContext, capacity_G: IntArray) -> BoolArray:
    """The most popular experts that fit into each group of the context, bool [L, E]."""
    return fill(context, by_popularity(context), capacity_G, context.group_K)


def too_much(what: str, needed: int, context: OffloadContext, mend: str) -> Infeasible:
    """An Infeasible that says by how much the device is too small, and what would help."""
    return Infeasible(
        [
            f"What {what} keeps on the device must fit into the memory for experts: it takes {needed:,} bytes, "
            f"{context.capacity_bytes:,} are free. {mend}"
        ],
        needed / max(context.capacity_bytes, 1) - 1,
    )


def layer_capacity(
    context: OffloadContext, kind: str, share: Share, slots_per_layer: int | Sequence[int] | None
) -> IntArray:
    """Bytes of the device that each layer gets, int64 [L]; they sum up to capacity_bytes at most.

    equal: equal parts. entropy: in proportion to exp(entropy) of the layer's popularity, the number of equally used
    experts that would be as uncertain (perplexity): a layer whose tokens go to few experts needs few. No layer gets
    more than all of its experts; what is left goes to the others by the same rule. slots_per_layer: so many of the
    layer's largest expert. Raises BadInput for a wrong number of slots, Infeasible where they do not fit.
    """
    if slots_per_layer is not None:
        return _given(context, kind, slots_per_layer)
    all_L = context.size_LE.sum(axis=1)
    weight_L = np.ones(context.num_layers) if share == "equal" else _perplexity_L(context.popularity_LE)
    out = np.zeros(context.num_layers, np.int64)
    open_L = np.ones(context.num_layers, bool)
    left = context.capacity_bytes
    while open_L.any():
        part_L = np.where(open_L, np.floor(left * (weight_L / weight_L[open_L].sum())), 0).astype(np.int64)
        full_L = open_L & (part_L >= all_L)
        if not full_L.any():
            return np.where(open_L, part_L, out)
        out[full_L] = all_L[full_L]
        left -= int(all_L[full_L].sum())
        open_L &= ~full_L
    return out


def _given(context: OffloadContext, kind: str, slots_per_layer: int | Sequence[int]) -> IntArray:
    single = isinstance(slots_per_layer, int)
    slots = [slots_per_layer] * context.num_layers if single else list(slots_per_layer)  # type: ignore[arg-type]
    if len(slots) != context.num_layers:
        raise BadInput(
            f"policies.offload {kind}: slots_per_layer is one number, or one for each of the {context.num_layers} MoE "
            f"layers; {len(slots)} are given. Give {context.num_layers}, or one."
        )
    capacity_L: IntArray = np.minimum(np.array(slots, np.int64) * largest_L(context), context.size_LE.sum(axis=1))
    if int(capacity_L.sum()) > context.capacity_bytes:
        raise too_much(f"slots_per_layer of {kind}", int(capacity_L.sum()), context, "Give layers fewer slots.")
    return capacity_L


def _perplexity_L(popularity_LE: FloatArray) -> FloatArray:
    share = np.maximum(popularity_LE, 0)
    total = share.sum(axis=1, keepdims=True)
    share = np.divide(share, total, out=np.full(share.shape, 1 / share.shape[1]), where=total > 0)
    log = np.log(np.where(share > 0, share, 1.0))
    out: FloatArray = np.exp(-(share * log).sum(axis=1))
    return out


def shortest_layer(cpu_ns: FloatArray, transfer_ns: float, sync_ns: float) -> BoolArray:
    """Which of a layer's missed experts [M] the CPU computes so that the layer ends first: bool [M].

    Two machines work side by side: the link, `transfer_ns` an expert (it computes on the GPU while the next one
    travels), and the CPU, the sum of its experts' cpu_ns, and sync_ns once if there is any. Transfers are all alike, so
    whatever their number, those that take the CPU longest travel: with the experts sorted, every number is tried, which
    is exact (an exchange of one that stays for one that travels never helps). Among equals the fewest transfers.
    """
    order = np.argsort(cpu_ns, kind="stable")
    on_cpu = np.concatenate(([0.0], np.cumsum(cpu_ns[order]) + sync_ns))  # by how many the CPU takes
    link = transfer_ns * np.arange(len(order), -1, -1)
    ends = np.maximum(on_cpu, link)
    most = len(order) - int(np.argmin(ends[::-1]))  # the last of the least
    out = np.zeros(len(order), bool)
    out[order[:most]] = True
    return out
