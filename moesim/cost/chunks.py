"""A MoE layer whose tokens are cut into chunks, so that the exchange of one runs beside the experts of another.

`pipeline` (Tutel, PipeMoE) cuts what a layout exchanges anyway. `fsmoe` (arXiv:2501.10714) is for experts that are
split over ranks of one node: instead of a gather of all tokens by all ranks, every (token, expert) pair goes to the
rank with its own index in its expert's part by all-to-all, is gathered by that part's ranks inside their node, computed
and summed there, and returned; collectives inside a node and between nodes overlap, too.

All chunks of a layer cost alike: the mean over the ways in which tokens may fall into them. While an exchange runs its
kernels hold multiprocessors that the experts then lack. A degree that is not given is chosen of 1 to 16: in serving for
each batch, by the time of all its layers (what a tuner would find that knows the sizes), in training for each layer and
direction, as FSMoE does.

Legend: R degrees, L MoE layers, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray, U8Array
from moesim.cost.exchange import Exchange, Ports
from moesim.cost.operators import Operators
from moesim.layout import Layout
from moesim.overlap.fsmoe import fsmoe_ns
from moesim.overlap.pipeline import pipeline_ns

__all__ = ["ChunkPrices", "Chunks", "Legs"]

_TRIED = 16


class Legs(NamedTuple):
    """ns of one chunk's collectives [..., L]: between ranks (there, back), and where experts are split over ranks of a
    node the gather and the sum inside it; the worst grade."""

    there: IntArray
    back: IntArray
    gather: IntArray
    sum: IntArray
    grade: U8Array


class ChunkPrices(NamedTuple):
    """Of a degree, [..., L]: ns of experts, of dispatch and combine as far as they are not hidden, of all exchanges,
    chunks, grade of the exchange; travel: ns of the exchanges between ranks, those of an expert's own ranks apart."""

    dispatch: IntArray
    experts: IntArray
    combine: IntArray
    exchange: IntArray
    degree: IntArray
    grade: U8Array
    travel: IntArray

    @property
    def total(self) -> IntArray:
        return self.dispatch + self.experts + self.combine


@dataclass(frozen=True, slots=True)
class Chunks:
    """degrees: those that are tried; none where layers are not cut. sharded: exchanges are FSMoE's."""

    degrees: tuple[int, ...]
    sharded: bool
    layout: Layout
    exchange: Exchange
    ops: Operators
    top_k: int

    @classmethod
    def of(cls, layout: Layout, exchange: Exchange, ops: Operators, top_k: int) -> Chunks:
        """What the scenario's `communication` asks for."""
        asked = exchange.communication
        cut = asked.overlap in ("pipeline", "fsmoe") and layout.meets
        tried = range(1, _TRIED + 1) if asked.degree is None else (asked.degree,)
        return cls(tuple(tried) if cut else (), cut and asked.overlap == "fsmoe", layout, exchange, ops, top_k)

    def options(
        self, chunk_RL: IntArray, rows_LP: FloatArray, busiest: AnyArray | float, ports: Ports | None
    ) -> list[ChunkPrices]:
        """Every degree tried. chunk_RL: see `Computed`; rows_LP: of the whole batch; busiest, ports: as of
        `Exchange.price`."""
        return [
            self.layer(degree, experts, self.legs(degree, rows_LP, busiest, ports))
            for degree, experts in zip(self.degrees, chunk_RL, strict=True)
        ]

    @staticmethod
    def best(options: list[ChunkPrices], by_layer: bool) -> ChunkPrices:
        """The degree that is fastest, for each layer, or for all layers of a batch together."""
        if len(options) == 1:
            return options[0]
        total_RL = np.stack([f.total for f in options])
        if not by_layer:
            total_RL = np.broadcast_to(total_RL.sum(axis=-1, keepdims=True), total_RL.shape)
        at = total_RL.argmin(axis=0)[None]
        return ChunkPrices._make(np.take_along_axis(np.stack(x), at, 0)[0] for x in zip(*options, strict=True))

    def layer(self, degree: int, experts: IntArray, legs: Legs) -> ChunkPrices:
        """Layers in `degree` chunks, experts: ns of the slowest part's kernels in one [..., L]."""
        if self.sharded:
            total = fsmoe_ns(degree, legs.there, legs.gather, legs.sum, experts, back=legs.back)
        else:
            total = pipeline_ns(degree, legs.there, experts, legs.back)
        there, back = degree * (legs.there + legs.gather), degree * (legs.back + legs.sum)
        exposed = total - degree * experts
        # what is not hidden is split as the exchange itself is, and adds up
        dispatch = exposed * there // np.maximum(there + back, 1)
        return ChunkPrices(
            dispatch, degree * experts, exposed - dispatch, there + back, np.full_like(experts, degree), legs.grade,
            degree * (legs.there + legs.back),
        )  # fmt: skip

    def legs(self, degree: int, rows_LP: FloatArray, busiest: AnyArray | float, ports: Ports | None) -> Legs:
        """Collectives of one of `degree` chunks."""
        shape = rows_LP.shape[:-1]
        if not self.sharded:
            priced = self.exchange.price(shape, busiest, ports, 1.0 / degree)
            none = np.zeros(shape, np.int64)
            return Legs(priced.dispatch_ns, priced.combine_ns, none, none, priced.grade)
        lay, exchange = self.layout, self.exchange
        row_L = rows_LP.max(axis=-1) / lay.expert_tp  # of one rank of the busiest part
        sent = np.asarray(busiest, np.float64)[..., None] * (self.top_k / lay.tp)
        pairs = np.maximum(row_L, sent)
        # of the parts one is a rank's own, whose tokens stay; the others of its node are near
        own = lay.gpus_per_node // lay.expert_tp
        near, far = pairs * ((min(own, lay.ep) - 1) / lay.ep), pairs * (max(lay.ep - own, 0) / lay.ep)
        all_L = rows_LP.sum(axis=-1)
        travel = exchange.price(shape, busiest, Ports(near, far, all_L, all_L), 1.0 / degree)
        gather = self.ops.all_gather(row_L * (exchange.dispatch_bytes / degree), lay.expert_tp, False)
        total = self.ops.reduce_scatter(row_L * (exchange.combine_bytes / degree), lay.expert_tp, False)
        grade = np.maximum(np.maximum(gather.grade, total.grade), travel.grade)
        return Legs(travel.dispatch_ns, travel.combine_ns, _whole(gather.ns), _whole(total.ns), grade)


def _whole(ns: FloatArray) -> IntArray:
    return np.rint(ns).astype(np.int64)
