"""Time of MoE layers from the tokens that each expert slot and each port really gets.

Shared by both fidelities: `ExpertPrices` takes tokens per slot and, where tokens travel, tokens received per
rank and node, with any leading axes, and returns dispatch, expert and combine nanoseconds per layer. What travels and
how is `moesim.cost.exchange`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray, U8Array
from moesim.cost.chunks import Chunks
from moesim.cost.exchange import Exchange, Ports
from moesim.cost.operators import MoEShape, Operators, Priced
from moesim.cost.weights import Moves, moves_of, transfer_ns
from moesim.dispatch.plan import Plan
from moesim.hardware import ASSUMED, MEASURED
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.placement import EMPTY, Placement
from moesim.routing.batch import BINS

__all__ = ["MEANS", "STATS", "Computed", "Drawn", "ExpertPrices", "LayerPrices", "MoESums", "Ports", "padded_slots"]


STATS = 13 + 2 * BINS


class Drawn(NamedTuple):
    """What routers chose for B batches or steps: tokens times passes, (token, expert) pairs wanted and refused [B], and
    the latter two by tenth of the request's tokens [10, B]."""

    tokens: FloatArray
    wanted: FloatArray
    dropped: FloatArray
    wanted_bins: FloatArray
    dropped_bins: FloatArray

    @classmethod
    def plain(cls, tokens: FloatArray, kept: FloatArray) -> Drawn:
        """Nothing refused, positions not looked at."""
        bins = np.zeros((BINS, len(kept)))
        return cls(tokens, kept, np.zeros(len(kept)), bins, bins)


class LayerPrices(NamedTuple):
    """ns by layer [..., L]; rows by part [..., L, P]; grades of the expert kernel and the exchange [..., L].

    dispatch, combine: what is not hidden behind experts. exchange [..., L]: hidden or not; travel: of it what goes
    between the ranks of a replica. degree [..., L]: chunks. transfer, sent [..., L]: ns of the former in which weights
    are sent, and how many experts that are.
    """

    dispatch: IntArray
    experts: IntArray
    combine: IntArray
    expert_LP: IntArray
    rows_LP: FloatArray
    grade: U8Array
    exchange_grade: U8Array
    exchange: IntArray
    degree: IntArray
    travel: IntArray
    transfer: IntArray
    sent: FloatArray

    def sums(self, ports: Ports | None, drawn: Drawn) -> MoESums:
        """Add the layers up; `ports` are those that were priced, `drawn` what was routed."""
        dispatch, experts, combine = (x.sum(axis=-1) for x in (self.dispatch, self.experts, self.combine))
        most, mean = self.rows_LP.max(axis=-1), self.rows_LP.mean(axis=-1)
        nowhere = np.zeros(len(most))
        stats = [
            most.sum(axis=-1),
            mean.sum(axis=-1),
            _mean_ratio(most, mean),
            nowhere if ports is None else ports.nvlink_total.sum(axis=-1),
            nowhere if ports is None else ports.nic_total.sum(axis=-1),
            self.expert_LP.mean(axis=-1).sum(axis=-1),
            *drawn[:3],
            *drawn.wanted_bins,
            *drawn.dropped_bins,
            self.exchange.sum(axis=-1),
            self.degree.mean(axis=-1),
            self.sent.sum(axis=-1),
            self.transfer.sum(axis=-1),
        ]
        grade, exchange_grade = self.grade.max(axis=-1), self.exchange_grade.max(axis=-1)
        total = dispatch + experts + combine
        return MoESums(total, dispatch, experts, combine, np.stack(stats), grade, exchange_grade)

    def first(self) -> LayerPrices:
        """The first step only, copied."""
        return LayerPrices._make(x[:1].copy() for x in self)


class Computed(NamedTuple):
    """Expert kernels: ns and rows by part [..., L, P], the worst grade of a layer's parts [..., L]. chunk_RL: ns of the
    slowest part's kernels in one of r chunks, for each degree tried [R, ..., L]; None where layers are not cut."""

    expert_LP: IntArray
    rows_LP: FloatArray
    grade: U8Array
    chunk_RL: IntArray | None = None


MEANS = (2, STATS - 3)
"""rows of `MoESums.stats` that are means over layers, where the others are sums"""


class MoESums(NamedTuple):
    """All MoE layers of a step together, for B batches or steps: ns by part (they add up to `total`) [B], `stats`
    [STATS, B], and the worst grade of any layer [B].

    `stats`: sum over layers of the largest part's rows, of the mean part's rows, mean over layers of max/mean rows,
    copies over NVLink and over NICs in all layers, sum over layers of the parts' mean expert ns; tokens times passes,
    pairs wanted and pairs dropped, and these by tenth of the request; ns of the exchanges of all layers, hidden or not,
    and mean over layers of the chunks that they are cut into; experts whose weights dispatch sends, and the ns that
    takes.
    """

    total: IntArray
    dispatch: IntArray
    experts: IntArray
    combine: IntArray
    stats: FloatArray
    grade: U8Array
    exchange_grade: U8Array


class ExpertPrices:
    """Prices the MoE layers of one replica laid out by `layout`, `slots_per_part` expert slots a part and layer."""

    def __init__(
        self,
        model: MoEModel,
        layout: Layout,
        ops: Operators,
        slots_per_part: int,
        slot_to_expert_LS: AnyArray | None = None,
    ) -> None:
        self.made_of = (model, layout, ops.profile, ops.cuda_graph, slots_per_part)
        """what prices rest on, beside the map of slots where experts differ in size"""
        self.exchange = Exchange(model, layout, ops, layout.communication)
        self.chunks = Chunks.of(layout, self.exchange, ops, model.top_k)
        self._layout = layout
        self._ops = ops
        self._block = ops.moe_block_rows
        self._row_work = ops.row_work(model.expert_dtype)
        self.shape = MoEShape(
            hidden=model.expert_hidden,
            intermediate=-(-model.moe_intermediate_size // layout.expert_tp),
            local_experts=slots_per_part,
            top_k=model.top_k,
            dtype=model.expert_dtype,
            gated=model.gated_experts,
        )
        self.dispatch_bytes = self.exchange.dispatch_bytes
        self.combine_bytes = self.exchange.combine_bytes
        self._token_centric = model.expert_execution == "token_centric"
        self._size_LPS: FloatArray | None = None
        if model.expert_size_E and slot_to_expert_LS is not None:
            size_LS = np.where(slot_to_expert_LS == EMPTY, 0.0, np.asarray(model.expert_size_E)[slot_to_expert_LS])
            self._size_LPS = size_LS.reshape(len(size_LS), layout.ep, -1)
        shared = model.shared_intermediate_size / model.moe_intermediate_size
        self._size_E: FloatArray | None = None
        """relative size of each expert, of the shared one, and of none"""
        if model.expert_size_E or shared not in (0.0, 1.0):
            self._size_E = np.array([*(model.expert_size_E or np.ones(model.num_experts)), shared, 0.0])
        self.expert_bytes = int(model.expert_bytes()) // layout.expert_tp
        """weights of an expert of relative size 1 on one rank"""

    def sizes(
        self, slot_count: AnyArray, degree: int = 1, plan: Plan | None = None
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray | float]:
        """Rows, active experts, rows of work and rows of other parts that every part's kernel sees, [..., L, P].
        slot_count [..., L, S]: (token, choice) pairs per slot. plan: where its guests have slots, too.

        Experts of another size count as so much of one of size 1, in work and in weights read. Token by token, every
        pair reads its expert's weights. degree: of one of so many equal chunks of the tokens, in the mean over how
        tokens fall into them: a slot with n rows is in use in a chunk with chance 1 - (1 - 1/r)^n.
        """
        parts: AnyArray = slot_count.reshape(*slot_count.shape[:-1], self._layout.ep, -1)
        used: AnyArray = parts > 0
        if degree > 1:
            used = -np.expm1(parts * np.log1p(-1.0 / degree))
            parts = parts / degree
        rows_LP = _over_slots(parts)
        active = parts if self._token_centric else used
        each = parts if degree == 1 else np.divide(parts, used, out=np.zeros(parts.shape), where=parts > 0)
        work = np.ceil(each * (1.0 / self._block)) if self._row_work is None else self._row_work.at(each)
        if degree > 1:
            work = work * used
        size = self._size_LPS
        if plan is not None and plan.guests and self._size_E is not None:
            size = self._size_E[plan.expert_BLW].reshape(parts.shape)
        if size is not None:
            active, work = active * size, work * size
        active_LP = _over_slots(active)
        work_LP = _over_slots(work) * (self._block if self._row_work is None else 1)
        elsewhere_LP: FloatArray | float = 0.0
        if not self._layout.exchanges and not self.chunks.sharded:
            elsewhere_LP = rows_LP.sum(axis=-1, keepdims=True) - rows_LP
        return rows_LP, active_LP, work_LP, elsewhere_LP

    def compute(self, slot_count: AnyArray, plan: Plan | None = None) -> Computed:
        """The expert kernels of every part. slot_count, plan: as of `sizes`."""
        rows_LP, active_LP, work_LP, elsewhere_LP = self.sizes(slot_count, 1, plan)
        priced = self._ops.moe(rows_LP, active_LP, work_LP, elsewhere_LP, self.shape)
        expert_LP, grade = np.rint(priced.ns).astype(np.int64), _worst(priced)
        if not self.chunks.degrees:
            return Computed(expert_LP, rows_LP, grade)
        chunk_RL = np.empty((len(self.chunks.degrees), *grade.shape), np.int64)
        for at, degree in enumerate(self.chunks.degrees):
            cut = self._ops.moe(*self.sizes(slot_count, degree, plan), self.shape)
            slowed = cut.ns.max(axis=-1) / (self.exchange.compute_scale if degree > 1 else 1.0)
            chunk_RL[at] = np.rint(slowed)
            grade = np.maximum(grade, _worst(cut))
        return Computed(expert_LP, rows_LP, grade, chunk_RL)

    def moves(self, plan: Plan | None) -> Moves | None:
        """The weights that a plan sends; None where there are none."""
        return None if plan is None else moves_of(plan, self._size_E)

    def padded(
        self, slot_count: AnyArray, ports: Ports | None, pad: FloatArray | None, busiest: AnyArray | float,
        plan: Plan | None = None,
    ) -> tuple[Computed, Ports | None]:  # fmt: skip
        """`compute`, and the ports, of batches whose kernels compute and exchange `pad` rows a slot [B, L, S] whatever
        is in them (GShard's and Megatron's padding to the capacity); None, and below 0 in layers without a capacity: as
        many as there are. busiest [B]: the share of the tokens, and so of the room, of the rank that has most."""
        computed = self.compute(slot_count, plan)
        if pad is None:
            return computed, ports
        open_BL = pad[..., 0] < 0
        work = self.compute(np.where(pad < 0, slot_count, pad))
        computed = work._replace(rows_LP=computed.rows_LP)
        if ports is None:
            return computed, None
        lay = self._layout
        row_LP = work.rows_LP  # each part gets equal shares of its rows from all ranks
        node = min(lay.gpus_per_node, lay.ranks)
        # over NVLink come those of the own node, those whose number in the node is another's, or all
        near = {"pairs": (node - 1) / lay.ranks, "two_level": (node - 1) / node}
        away = row_LP * near.get(lay.copies, (lay.ranks - 1) / lay.ranks)
        far = row_LP * max(0.0, 1 - lay.gpus_per_node / lay.ranks)
        sent = np.broadcast_to(np.asarray(busiest, np.float64)[..., None], open_BL.shape)
        moved = Ports(
            np.maximum(away.max(axis=-1), away.sum(axis=-1) * sent),
            np.maximum(far.max(axis=-1), far.sum(axis=-1) * sent),
            away.sum(axis=-1),
            far.sum(axis=-1),
        )
        return computed, Ports(*(np.where(open_BL, own, p) for own, p in zip(ports, moved, strict=True)))

    def price(
        self, computed: Computed, busiest: AnyArray, ports: Ports | None, by_layer: bool = False,
        moves: Moves | None = None,
    ) -> LayerPrices:  # fmt: skip
        """Prices of layers: the kernels in `computed` between dispatch and combine.

        busiest [...]: tokens of the data-parallel rank that has most (for the gather of groups whose experts are
        split over ranks). ports: for exchanges. by_layer: chunks are chosen for each layer, else for a batch. moves:
        weights sent before the experts run, hidden behind nothing.
        """
        shape = computed.expert_LP.shape[:-1]
        nothing = np.zeros(shape, np.int64), np.zeros(shape)
        if computed.chunk_RL is not None:
            options = self.chunks.options(computed.chunk_RL, computed.rows_LP, busiest, ports)
            cut = self.chunks.best(options, by_layer)
            longer = cut.experts / np.maximum(computed.expert_LP.max(axis=-1), 1)
            expert_LP = np.rint(computed.expert_LP * longer[..., None]).astype(np.int64)
            priced = LayerPrices(
                cut.dispatch, cut.experts, cut.combine, expert_LP, computed.rows_LP, computed.grade, cut.grade,
                cut.exchange, cut.degree, cut.travel, *nothing,
            )  # fmt: skip
        else:
            dispatch, combine, grade = self.exchange.price(shape, busiest, ports)
            slowest, once = computed.expert_LP.max(axis=-1), np.ones(shape, np.int64)
            priced = LayerPrices(
                dispatch, slowest, combine, computed.expert_LP, computed.rows_LP, computed.grade, grade,
                dispatch + combine, once, dispatch + combine, *nothing,
            )  # fmt: skip
        return priced if moves is None else self._with_moves(priced, moves)

    def _with_moves(self, priced: LayerPrices, moves: Moves) -> LayerPrices:
        """Dispatch takes longer by the time of the weights."""
        transfer = np.rint(transfer_ns(self._ops.profile, moves, self.expert_bytes)).astype(np.int64)
        return priced._replace(
            dispatch=priced.dispatch + transfer,
            exchange=priced.exchange + transfer,
            travel=priced.travel + transfer,
            exchange_grade=np.where(transfer > 0, np.uint8(ASSUMED), priced.exchange_grade),
            transfer=transfer,
            sent=moves.total,
        )


def _mean_ratio(most: FloatArray, mean: FloatArray) -> FloatArray:
    """Largest over mean part, mean over the layers that have rows; 1 where none has."""
    used = mean > 0
    ratio = np.where(used, most / np.where(used, mean, 1.0), 0.0).sum(axis=-1)
    number = used.sum(axis=-1)
    return np.where(number > 0, ratio / np.maximum(number, 1), 1.0)


def padded_slots(room_BL: AnyArray, placement: Placement) -> FloatArray:
    """Rows of each slot [B, L, S] where an expert's kernels compute its room, shared evenly by its replicas; below 0 in
    layers without a capacity."""
    replicas_LS = np.take_along_axis(placement.replica_count_LE, placement.expert_LS, axis=1)
    room_BLS = np.asarray(room_BL, np.float64)[..., None] / replicas_LS
    return room_BLS if placement.held_LS.all() else np.where(placement.held_LS, room_BLS, np.minimum(room_BLS, 0.0))


def _worst(priced: Priced) -> U8Array:
    """The worst grade of a layer's parts; one without a row costs nothing, whatever was measured."""
    return np.asarray(np.where(priced.ns > 0, priced.grade, MEASURED).max(axis=-1))


def _over_slots(values: AnyArray) -> FloatArray:
    """Sum over the last axis, which is short: adding slices beats a reduction over it."""
    if values.shape[-1] > 16:
        return np.asarray(values.sum(axis=-1, dtype=np.float64))
    total = values[..., 0].astype(np.float64)
    for slot in range(1, values.shape[-1]):
        total += values[..., slot]
    return total
