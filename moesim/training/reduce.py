"""Gradients that are summed and weights that are gathered: buckets of one layer each, their prices, and how much of
them hides behind computation.

Gradients of dense parameters are summed over the data-parallel ranks of all replicas, those of experts over their
counterparts in the other replicas. A bucket is ready when the last rank has its layer's gradients, and buckets follow
each other on one serial stream in that order (PyTorch DDP, arXiv:2006.15704, section 3.2.3). Sums and gathers run on
streams of their own and do not slow the experts' exchange: what is hidden is a best case.

Legend: B buckets, N layers, U units of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.cost.backward import Op
from moesim.cost.operators import Operators, Priced
from moesim.dtypes import dtype_bytes
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.training.memory import expert_params_rank, layer_params
from moesim.training_spec import TrainingSpec

__all__ = [
    "Buckets",
    "LinkBytes",
    "gather_bytes",
    "optimizer_ops",
    "serial_end",
    "sharded_bytes",
    "stalls_one_ahead",
    "stalls_serial",
]


class LinkBytes(NamedTuple):
    """Bytes that all ranks of all replicas send."""

    nvlink: float
    nic: float


@dataclass(frozen=True, slots=True)
class _Group:
    """Ranks that hold the same parameters: how many, and over how many nodes they spread evenly."""

    ranks: int
    nodes: int

    def price(self, ops: Operators, op: str, size: float) -> Priced:
        """A collective over `size` bytes of each rank's buffer."""
        spans = self.nodes > 1
        nodes = self.nodes if spans else 0
        if op == "all_reduce":
            return ops.all_reduce(size, self.ranks, spans, nodes)
        part = size / self.ranks
        gather = ops.all_gather if op == "all_gather" else ops.reduce_scatter
        return gather(part, self.ranks, spans, nodes)

    def sent(self, op: str, size: float) -> LinkBytes:
        """By one rank: a ring inside the node, shards over the NICs (see `moesim.cost.links`)."""
        near = self.ranks // self.nodes
        times = 2.0 if op == "all_reduce" else 1.0
        return LinkBytes(times * size * (near - 1) / near, times * size / near * (self.nodes - 1) / self.nodes)


def gather_bytes(layout: Layout, size: float) -> LinkBytes:
    """Sent by all ranks of one replica whose experts are split over ranks when each gathers all tokens of a layer, or
    sums its own back; size: bytes of one data-parallel rank's tokens. 0 where tokens travel or stay."""
    if not layout.meets or layout.exchanges:
        return LinkBytes(0.0, 0.0)
    sent = _Group(layout.ranks, layout.nodes).sent("all_gather", size * layout.dp)
    return LinkBytes(*(layout.ranks * b for b in sent))


def sharded_bytes(layout: Layout, size: float, top_k: int) -> LinkBytes:
    """Sent by all ranks of one replica in one direction where FSMoE's exchange takes every (token, expert) pair to one
    rank of its expert's, and these gather them (see `moesim.cost.chunks`); size: as of `gather_bytes`."""
    pairs = size * layout.dp * top_k
    near = min(layout.gpus_per_node // layout.expert_tp, layout.ep)
    inside = (near - 1) / layout.ep + (layout.expert_tp - 1)
    return LinkBytes(pairs * inside, pairs * (layout.ep - near) / layout.ep)


class Buckets:
    """Prices by bucket in forward order, B = N + 2: the embedding, each layer, the final norm and head.

    reduce_B: ns of one bucket's gradients; gather_B: of its weights. 0 where one rank alone holds them. start_ns: of a
    sum with next to nothing in it.
    """

    def __init__(self, model: MoEModel, layout: Layout, ops: Operators, training: TrainingSpec, replicas: int) -> None:
        world = layout.ranks * replicas
        nodes = -(-world // layout.gpus_per_node)
        copies = layout.dp * replicas
        self._dense = _Group(copies, min(nodes, copies))
        self._experts = _Group(replicas, min(nodes, replicas))
        self._ops = ops
        dense_B, expert_B = (params_B.astype(np.float64) for params_B in bucket_params(model, layout))
        grad = dtype_bytes(training.grad_dtype)
        sizes = (dtype_bytes(model.base_dtype), dtype_bytes(model.expert_dtype))
        op = "reduce_scatter" if training.zero_stage else "all_reduce"
        self.reduce_B, self.reduce_grade, reduced = self._price(op, dense_B * grad, expert_B * grad)
        self.gather_B, self.gather_grade, gathered = self._price("all_gather", dense_B * sizes[0], expert_B * sizes[1])
        self.reduce_op, self.gather_op = op, "all_gather"
        starts = [g.price(ops, op, float(g.ranks)).ns for g in (self._dense, self._experts) if g.ranks > 1]
        self.start_ns = round(float(max(starts, default=0.0)))
        self.reduce_bytes = LinkBytes(*(world * b for b in reduced))
        self.gather_bytes = LinkBytes(*(world * b for b in gathered))

    def _price(self, op: str, dense_B: FloatArray, expert_B: FloatArray) -> tuple[IntArray, int, LinkBytes]:
        """ns of each bucket of so many bytes, the worst grade, and the bytes that one rank sends for all."""
        out = np.zeros(len(dense_B), np.int64)
        grade, near, far = 0, 0.0, 0.0
        for group, bytes_B in ((self._dense, dense_B), (self._experts, expert_B)):
            for bucket, size in enumerate(bytes_B.tolist()):
                if size and group.ranks > 1:
                    priced = group.price(self._ops, op, float(size))
                    out[bucket] += round(float(priced.ns))
                    grade = max(grade, int(priced.grade))
                    sent = group.sent(op, float(size))
                    near, far = near + sent.nvlink, far + sent.nic
        return out, grade, LinkBytes(near, far)


def bucket_params(model: MoEModel, layout: Layout) -> tuple[IntArray, IntArray]:
    """Dense and expert parameters on one rank of each bucket [B]; what stands in no layer goes with the head."""
    parts = {part.name: part.params for part in model.dense_parts_rank(layout.tp)}
    per_layer = np.array(layer_params(model, layout), np.int64)
    expert_N = np.zeros(model.num_layers, np.int64)
    if model.is_moe:
        expert_N[list(model.moe_layers)] = expert_params_rank(model, layout) // model.num_moe_layers
    embedding = parts.get("embedding", 0)
    dense_N = per_layer - expert_N
    rest = sum(parts.values()) - embedding - int(dense_N.sum())
    return np.concatenate([[embedding], dense_N, [rest]]), np.concatenate([[0], expert_N, [0]])


def optimizer_ops(model: MoEModel, layout: Layout, ops: Operators, training: TrainingSpec, replicas: int) -> list[Op]:
    """The gradients' norm (for clipping) and AdamW: gradient, float32 weights and both moments read, the latter three
    and the weights written (Kingma and Ba, arXiv:1412.6980, algorithm 1; each rank its share from ZeRO stage 1 on)."""
    grad, shared = dtype_bytes(training.grad_dtype), training.zero_stage >= 1
    dense = [(part.params, dtype_bytes(part.dtype)) for part in model.dense_parts_rank(layout.tp)]
    experts = [(expert_params_rank(model, layout), dtype_bytes(model.expert_dtype))] if model.is_moe else []
    moved = read = 0.0
    for tensors, held_by in ((dense, layout.dp * replicas), (experts, replicas)):
        for params, size in tensors:
            own = -(-params // held_by) if shared else params
            read += own * grad
            moved += own * (grad + 2 * (4 + 4 + 4) + (size if size < 4 else 0))
    world = layout.ranks * replicas
    nodes = -(-world // layout.gpus_per_node)
    norm = ops.elementwise(read)
    total = ops.all_reduce(4.0, world, nodes > 1, nodes if nodes > 1 else 0)
    update = ops.elementwise(moved)
    return [
        Op("gradient_norm", "elementwise", round(float(norm.ns)), int(norm.grade)),
        *([Op("gradient_norm", "all_reduce", round(float(total.ns)), int(total.grade))] if world > 1 else []),
        Op("optimizer", "elementwise", round(float(update.ns)), int(update.grade)),
    ]


# ---- what hides


def serial_end(ready_B: IntArray, cost_B: IntArray) -> int:
    """When the last of B collectives ends that follow each other in order, each not before it is ready:
    end_b = max(end_(b-1), ready_b) + cost_b."""
    there = cost_B > 0
    if not there.any():
        return 0
    ready_B, cost_B = ready_B[there], cost_B[there]
    before = np.cumsum(cost_B) - cost_B
    return int((ready_B - before).max() + cost_B.sum())


def stalls_serial(gather_U: IntArray, compute_RU: IntArray) -> IntArray:
    """How long each of R replicas waits for weights [R] that arrive one after the other from the start of its pass:
    unit u starts when unit u - 1 has ended and its weights are there."""
    there_U = np.cumsum(gather_U)
    before_RU = np.cumsum(compute_RU, axis=1) - compute_RU
    return np.asarray(np.maximum((there_U - before_RU).max(axis=1), 0))


def stalls_one_ahead(gather_U: list[int], compute_U: list[int]) -> list[int]:
    """How long each unit waits for its weights when they are fetched while the unit before computes, not earlier."""
    out = []
    end = fetched = start = 0
    for gather, compute in zip(gather_U, compute_U, strict=True):
        fetched = max(fetched, start) + gather
        start = max(end, fetched)
        out.append(start - end)
        end = start + compute
    return out
