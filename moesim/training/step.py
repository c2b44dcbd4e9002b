"""The time line of a training step: micro-batches forward and backward, sums of gradients, the optimizer.

Ranks of a replica meet at every exchange of a MoE layer: a layer takes as long as its slowest part, and a step is a
sum of such maxima. Replicas meet when gradients are summed: the step waits for the replica whose sum is largest (with
ZeRO stage 3 at every layer, whose weights all of them gather). The parts that a `Ledger` keeps are those of the rank
that the others wait for, so they add up to the step exactly.

Legend: M micro-batches, R replicas, N layers, L MoE layers, P parts, B buckets (N + 2, see `moesim.training.reduce`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moesim.arrays import FloatArray, IntArray, U8Array
from moesim.cost.backward import Block, ExpertPasses, Op, Passes
from moesim.cost.chunks import ChunkPrices
from moesim.hardware import GRADES
from moesim.model import MoEModel
from moesim.training.hidden import LayerOptions, exposed_ns
from moesim.training.reduce import Buckets, serial_end, stalls_one_ahead, stalls_serial
from moesim.training.routing import StepRouting
from moesim.training_spec import TrainingSpec

__all__ = ["PHASES", "Ledger", "StepClock", "StepTime"]

PHASES = (
    "forward", "backward", "recompute", "exchange", "gradient_reduction", "parameter_gather", "optimizer", "host",
)  # fmt: skip


@dataclass(slots=True)
class Ledger:
    """Where time went: ns by operation, by phase, by operator, and by grade [4]."""

    ns: dict[str, int] = field(default_factory=dict)
    phase_ns: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    operator_ns: dict[str, int] = field(default_factory=dict)
    grade_ns: FloatArray = field(default_factory=lambda: np.zeros(len(GRADES)))

    def add(self, name: str, phase: str, operator: str, ns: int, grade: int) -> None:
        """One price."""
        if ns:
            self.ns[name] = self.ns.get(name, 0) + ns
            self.phase_ns[phase] += ns
            self.operator_ns[operator] = self.operator_ns.get(operator, 0) + ns
            self.grade_ns[grade] += ns

    def add_all(self, name: str, phase: str, operator: str, ns: IntArray, grade: U8Array) -> None:
        """Prices and their grades, of one shape."""
        by_grade = np.zeros(len(GRADES), np.int64)
        np.add.at(by_grade, grade.ravel(), ns.ravel())
        for level, spent in enumerate(by_grade.tolist()):
            self.add(name, phase, operator, spent, level)

    @property
    def total(self) -> int:
        return sum(self.ns.values())


class _Priced(NamedTuple):
    """A price of MoE layers: ns and grades [M, R, L], and how it is booked."""

    name: str
    phase: str
    operator: str
    ns: IntArray
    grade: U8Array


class StepTime(NamedTuple):
    """ns of one step and what of it was waited for. compute: of the slowest replica; *_exposed: not hidden behind it;
    reduction: all sums of gradients, hidden or not. expert_mean: of the experts' time, that of the mean part."""

    total: int
    compute: int
    gather_exposed: int
    reduction_exposed: int
    optimizer: int
    reduction: int
    expert_slowest: int
    expert_mean: float


class StepClock:
    """Prices steps from their routing. `experts` is None for a dense model; `gathers`: ranks of split experts gather
    all tokens and sum their own back, where else tokens travel by all-to-all."""

    def __init__(
        self,
        model: MoEModel,
        training: TrainingSpec,
        passes: Passes,
        experts: ExpertPasses | None,
        buckets: Buckets,
        optimizer: list[Op],
        micro_batches: int,
        replicas: int,
        gathers: bool = False,
    ) -> None:
        self._there, self._back = ("all_gather", "reduce_scatter") if gathers else ("all_to_all", "all_to_all")
        self._model, self._training, self._passes = model, training, passes
        self._experts, self._buckets, self._optimizer = experts, buckets, optimizer
        self._micro_batches, self._replicas = micro_batches, replicas
        pairs = [passes.layer(layer) for layer in range(model.num_layers)]
        self._forward_N = np.array([a.forward_ns + f.forward_ns for a, f in pairs], np.int64)
        self._backward_N = np.array([a.backward_ns + f.backward_ns for a, f in pairs], np.int64)
        blocks = passes.blocks
        self._first, self._ends = blocks["first"], (blocks["last"], blocks["head"])
        self._head_forward = sum(b.forward_ns for b in self._ends)
        self._head_backward = sum(b.backward_ns for b in self._ends)
        self._layer_blocks = [b for pair in pairs for b in pair]

    # -- one step -----------------------------------------------------------------------------------------------
    def step(self, routing: StepRouting | None, ledger: Ledger | None) -> StepTime:
        """Price one step; `ledger` None: the step is not measured."""
        passes = self._moe(routing) if routing is not None else (_Pass(()), _Pass(()))
        forward_MRN, backward_MRN = (
            self._per_layer(own_N, p) for own_N, p in zip((self._forward_N, self._backward_N), passes, strict=True)
        )
        lockstep = self._training.zero_stage == 3
        if lockstep:
            forward_MRN, backward_MRN = (x.max(axis=1, keepdims=True) for x in (forward_MRN, backward_MRN))
        unit_MRU = self._units(forward_MRN, backward_MRN)
        stall_MRU = self._stalls(unit_MRU)
        busy_MRU = unit_MRU + stall_MRU
        end_RT = np.cumsum(busy_MRU.transpose(1, 0, 2).reshape(unit_MRU.shape[1], -1), axis=1)
        slowest = int(end_RT[:, -1].argmax())
        exposed = self._exposed(end_RT) if passes[1].options is None else self._shared(passes, unit_MRU, slowest)
        gather = int(stall_MRU[:, slowest].sum()) + self._gather_after()
        tail = sum(op.ns for op in self._optimizer)
        compute = int(unit_MRU[:, slowest].sum())
        expert_slowest, expert_mean = 0, 0.0
        for one in passes:
            if one.prices:
                at_ML = one.slowest_replica() if lockstep else np.full(one.prices[0].ns[:, 0].shape, slowest)
                one.book(at_ML, ledger)
                expert_slowest += int(one.experts_ns(at_ML))
                expert_mean += float(np.take_along_axis(one.mean_MRL, at_ML[:, None], 1).sum())
        if ledger is not None:
            b = self._buckets
            ledger.add("parameter_gather", "parameter_gather", b.gather_op, gather, b.gather_grade)
            ledger.add("gradient_reduction", "gradient_reduction", b.reduce_op, exposed, b.reduce_grade)
            for op in self._optimizer:
                ledger.add(op.name, "optimizer", op.operator, op.ns, op.grade)
        total = compute + gather + exposed + tail
        reduction = int(self._buckets.reduce_B.sum()) * self._reductions
        return StepTime(total, compute, gather, exposed, tail, reduction, expert_slowest, expert_mean)

    @property
    def _reductions(self) -> int:
        """How often gradients are summed in a step: ZeRO from stage 2 on keeps a share only, so after every
        micro-batch (arXiv:1910.02054, section 5.2)."""
        return self._micro_batches if self._training.zero_stage >= 2 else 1

    def book_constants(self, ledger: Ledger, steps: int) -> None:
        """What every micro-batch of `steps` steps costs alike."""
        times = steps * self._micro_batches
        for block in (self._first, *self._ends, *self._layer_blocks):
            _book_block(ledger, block, times)

    def _moe(self, routing: StepRouting) -> tuple[_Pass, _Pass]:
        """Prices of the MoE layers, forward and backward."""
        experts = self._experts
        assert experts is not None
        computed = experts.prices.compute(routing.slot_MRLS)
        tokens = np.full(routing.slot_MRLS.shape[:2], self._passes.tokens)
        priced = experts.prices.price(computed, tokens, routing.ports, by_layer=True)
        gradients = experts.gradients(routing.slot_MRLS)
        part = (gradients.backward_LP + gradients.again_LP).argmax(axis=-1)[..., None]
        backward, again = (np.take_along_axis(x, part, -1)[..., 0] for x in (gradients.backward_LP, gradients.again_LP))
        travel = priced.exchange_grade
        there, back_again, options = priced.dispatch, priced.combine, None
        longer: FloatArray | float = 1.0
        if gradients.chunk_RL is not None:
            chunks = experts.prices.chunks
            options = chunks.options(gradients.chunk_RL, computed.rows_LP, tokens, routing.ports)
            best = chunks.best(options, by_layer=True)
            there, back_again = best.dispatch, best.combine
            longer, backward = best.experts / np.maximum(backward, 1), best.experts
            if not chunks.sharded or not self._training.overlap_grad_reduce:
                options = None
        ahead = (
            _Priced("dispatch", "exchange", self._there, priced.dispatch, travel),
            _Priced("experts", "forward", "moe", priced.experts, priced.grade),
            _Priced("combine", "exchange", self._back, priced.combine, travel),
        )
        # gradients take the way back: as many bytes through the same ports, received where they were sent; that of a
        # sum is a gather, and that of a gather a sum
        back = [
            _Priced("combine_backward", "exchange", self._there, there, travel),
            _Priced("experts_backward", "backward", "moe_wgrad", backward, gradients.grade),
            _Priced("dispatch_backward", "exchange", self._back, back_again, travel),
        ]
        if self._training.recompute == "full":
            back += [p._replace(name="recompute", phase="recompute") for p in ahead]
        elif self._training.recompute == "selective":
            back.append(_Priced("recompute", "recompute", "elementwise", again, gradients.grade))
        means = priced.expert_LP.mean(axis=-1), gradients.backward_LP.mean(axis=-1) * longer
        return _Pass(ahead, means[0], travel=priced.travel), _Pass(tuple(back), means[1], options)

    def _per_layer(self, own_N: IntArray, one: _Pass) -> IntArray:
        """ns of every layer [M, R, N]: the rank's own part and, in MoE layers, the prices."""
        out = np.broadcast_to(own_N, (self._micro_batches, self._replicas, len(own_N))).copy()
        if one.prices:
            out[:, :, list(self._model.moe_layers)] += one.total()
        return out

    def _units(self, forward_MRN: IntArray, backward_MRN: IntArray) -> IntArray:
        """ns of what a replica runs one after the other in each micro-batch [M, R, U], U = 2 N + 4: embedding, layers,
        head; head, layers from the last to the first, embedding."""

        def end(ns: int) -> IntArray:
            return np.full((*forward_MRN.shape[:2], 1), ns, np.int64)

        ahead = end(self._first.forward_ns), forward_MRN, end(self._head_forward)
        back = end(self._head_backward), backward_MRN[..., ::-1], end(self._first.backward_ns)
        return np.concatenate([*ahead, *back], axis=2)

    # -- weights and gradients ----------------------------------------------------------------------------------
    def _stalls(self, unit_MRU: IntArray) -> IntArray:
        """ns that each unit waits for its weights [M, R, U]."""
        out = np.zeros_like(unit_MRU)
        stage, gather_B = self._training.zero_stage, self._buckets.gather_B
        overlap = self._training.overlap_param_gather
        if stage in (1, 2) and overlap:
            # weights of the step before arrive while the first forward pass runs
            out[0, :, 0] = stalls_serial(gather_B, unit_MRU[0, :, : len(gather_B)])
        elif stage == 3:
            gathers = np.concatenate([gather_B, gather_B[::-1]])
            out[:, 0] = gathers
            if overlap:
                out[:, 0] = [stalls_one_ahead(gathers.tolist(), unit_U) for unit_U in unit_MRU[:, 0].tolist()]
        return out

    def _gather_after(self) -> int:
        """ZeRO 1 and 2 without overlap: all weights are gathered after the optimizer, nothing runs beside it."""
        if self._training.zero_stage in (1, 2) and not self._training.overlap_param_gather:
            return int(self._buckets.gather_B.sum())
        return 0

    def _exposed(self, end_RT: IntArray) -> int:
        """ns between the end of the slowest replica's last backward pass and that of the last sum of gradients.
        end_RT: when each unit of each micro-batch ends."""
        reduce_B = self._buckets.reduce_B
        if not self._training.overlap_grad_reduce:
            return int(reduce_B.sum()) * self._reductions
        end_MU = end_RT.max(axis=0).reshape(self._micro_batches, -1)
        ready_MB = end_MU[-self._reductions :, -len(reduce_B) :]
        cost_MB = np.broadcast_to(reduce_B[::-1], ready_MB.shape)
        return max(0, serial_end(ready_MB.ravel(), cost_MB.ravel()) - int(end_RT[:, -1].max()))

    def _shared(self, passes: tuple[_Pass, _Pass], unit_MRU: IntArray, replica: int) -> int:
        """`_exposed` where sums of gradients share the stream of the experts' exchange."""
        ahead, back = passes
        assert back.options is not None
        assert ahead.travel is not None
        moe = {layer: at for at, layer in enumerate(self._model.moe_layers)}
        more_MRL = back.total() - np.min([o.total for o in back.options], axis=0)
        again = self._training.recompute == "full"
        found: list[list[int | LayerOptions | None]] = []
        number = self._model.num_layers
        for m in range(self._micro_batches - self._reductions, self._micro_batches):
            one: list[int | LayerOptions | None] = []
            if found:  # what is left of the one before is summed beside this one's forward pass
                free, busy = int(unit_MRU[m, replica, : number + 2].sum()), int(ahead.travel[m, replica].sum())
                one.append(LayerOptions(np.array([float(free)]), np.array([float(min(busy, free))])))
            one += [self._head_backward, None]
            for layer in reversed(range(number)):
                if layer in moe:
                    at = m, replica, moe[layer]
                    travel = int(ahead.travel[at]) if again else 0
                    one.append(LayerOptions.of(back.options, at, int(more_MRL[at]), travel))
                one += [int(self._backward_N[layer]), None]
            found.append([*one, self._first.backward_ns, None])
        return exposed_ns(found, self._buckets.reduce_B[::-1], self._buckets.start_ns)


class _Pass:
    """The MoE layers' prices in one direction, and the mean part's expert ns [M, R, L]."""

    def __init__(
        self,
        prices: tuple[_Priced, ...],
        mean_MRL: FloatArray | None = None,
        options: list[ChunkPrices] | None = None,
        travel: IntArray | None = None,
    ) -> None:
        """options: of the experts and their exchange under each degree, where sums of gradients share its stream.
        travel: ns of exchanges between ranks [M, R, L]."""
        self.prices, self.options, self.travel = prices, options, travel
        self.mean_MRL = np.zeros((1, 1, 1)) if mean_MRL is None else mean_MRL

    def total(self) -> IntArray:
        """ns [M, R, L]."""
        return np.asarray(np.sum([p.ns for p in self.prices], axis=0))

    def slowest_replica(self) -> IntArray:
        """The replica that takes longest in each micro-batch and layer [M, L]."""
        return np.asarray(self.total().argmax(axis=1))

    def book(self, at_ML: IntArray, ledger: Ledger | None) -> None:
        """Put the prices of these replicas into the ledger."""
        for price in self.prices if ledger is not None else ():
            ns = np.take_along_axis(price.ns, at_ML[:, None], 1)
            grade = np.take_along_axis(price.grade, at_ML[:, None], 1)
            assert ledger is not None
            ledger.add_all(price.name, price.phase, price.operator, ns, grade)

    def experts_ns(self, at_ML: IntArray) -> int:
        """Of the experts' kernels on these replicas' slowest parts."""
        found = [p for p in self.prices if p.name.startswith("experts")]
        return sum(int(np.take_along_axis(p.ns, at_ML[:, None], 1).sum()) for p in found)


def _book_block(ledger: Ledger, block: Block, times: int) -> None:
    for op in block.forward:
        ledger.add(op.name, "host" if op.name == "host" else "forward", op.operator, op.ns * times, op.grade)
    for op in block.backward:
        ledger.add(op.name, "backward", op.operator, op.ns * times, op.grade)
    for op in block.again:
        ledger.add("recompute", "recompute", op.operator, op.ns * times, op.grade)
