"""One training micro-batch on one rank: its forward pass, what its backward pass costs, and what is computed again.

The forward pass is priced as the prompt of a serving step is (`moesim.cost.dense`), except that every token goes
through the head. A product C[m, n] = A[m, k] B[k, n] has two products of the same FLOP in the backward pass: the
gradient of A is [m, n] x [n, k], that of B [k, m] x [m, n]. No product with these operand layouts has been measured,
so they are graded assumed, as are the backward operators of which a profile has no curve. Gradients of activations
have the activations' format.

Recomputation follows Korthikanti et al. (arXiv:2205.05198): `full` runs a layer's forward pass again, exchanges
included; `selective` there computes the attention core again, which FlashAttention's backward pass does anyway
(arXiv:2307.08691, section 3.1), so here it stands for norms and activation functions.

Legend: L MoE layers, P expert-parallel parts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray, U8Array
from moesim.cost.dense import DenseTables, attention_shape
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import AttentionShape, Operators, Priced, RouterShape
from moesim.dtypes import dtype_bytes
from moesim.engine_spec import EngineSpec
from moesim.hardware import ASSUMED
from moesim.layout import Layout
from moesim.model import Gemm, MoEModel
from moesim.training_spec import Recompute, TrainingSpec

__all__ = ["Block", "ExpertPasses", "Gradients", "Op", "Passes"]


class Op(NamedTuple):
    """One operation: its name, the operator that priced it, ns, and its grade."""

    name: str
    operator: str
    ns: int
    grade: int


@dataclass(frozen=True, slots=True)
class Block:
    """Operations of a part of a pass, forward, backward, and those that the backward pass runs again before."""

    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    again: tuple[Op, ...] = ()

    @property
    def forward_ns(self) -> int:
        return sum(op.ns for op in self.forward)

    @property
    def backward_ns(self) -> int:
        """What is computed again included."""
        return sum(op.ns for op in (*self.backward, *self.again))


_SELECTIVE = ("norm", "activation")
_GRADIENTS: tuple[Literal["dgrad"], Literal["wgrad"]] = ("dgrad", "wgrad")


class Passes:
    """`blocks` by name: `full`, `window` (attention of a layer), `dense`, `moe` (the rank's own part of a layer's
    feed-forward), `first`, `last`, `head`. tokens: of one rank's micro-batch."""

    def __init__(self, model: MoEModel, layout: Layout, ops: Operators, training: TrainingSpec) -> None:
        self._model = model
        self._layout = layout
        self._ops = ops
        self._training = training
        self.tokens = training.micro_batch_sequences * training.sequence_tokens
        engine = EngineSpec(host_overhead_us=training.host_overhead_us, cuda_graph=training.cuda_graph)
        dense = DenseTables(model, layout, engine, ops, layout.meets, np.array([self.tokens], np.int64))
        self._forward = {
            name: tuple(Op(p.name, p.operator, int(p.ns_N[0]), int(p.grade_N[0])) for p in parts)
            for name, parts in dense.blocks.items()
        }
        self.blocks: dict[str, Block] = {"first": self._first(), "last": self._last(), "head": self._head()}
        for name in sorted({"full" if kind == "full" else "window" for kind in model.attention_kind_of_layer}):
            self.blocks[name] = self._attention(attention_shape(model, layout.tp, name == "window"))
        if model.dense_layers:
            self.blocks["dense"] = self._dense()
        if model.is_moe:
            self.blocks["moe"] = self._moe()

    def layer(self, layer: int) -> tuple[Block, Block]:
        """Attention block and feed-forward block of a layer; of a MoE layer the rank's own part."""
        kind = "full" if self._model.attention_kind_of_layer[layer] == "full" else "window"
        return self.blocks[kind], self.blocks["moe" if layer in self._model.moe_layers else "dense"]

    # -- blocks -------------------------------------------------------------------------------------------------
    def _block(self, forward: tuple[Op, ...], backward: tuple[Op, ...]) -> Block:
        again: tuple[Op, ...] = ()
        if self._training.recompute == "selective":
            again = tuple(op for op in forward if op.name in _SELECTIVE)
        elif self._training.recompute == "full":
            again = forward
        return Block(forward, backward, again)

    def _attention(self, shape: AttentionShape) -> Block:
        m, a, tp = self._model, self._model.attention, self._layout.tp
        sequences, length = self._training.micro_batch_sequences, self._training.sequence_tokens
        kernel = _op("attention", "attention_prefill", self._ops.attention_prefill(length, length, shape, sequences))
        ahead = self._forward["attention"]
        at = next(i for i, op in enumerate(ahead) if op.name == "rope_kv_write") + 1
        heads = -(-a.num_heads // tp)
        rotated = heads * a.head_dim + m.kv_heads_per_rank(tp) * (a.head_dim + a.v_head_dim)
        gradient = self._ops.attention_backward(length, shape, sequences)
        backward = (
            *self._all_reduces(ahead),
            _op("attention_backward", "attention_backward", gradient),
            _op("rope_backward", "elementwise", self._rows(2 * rotated)),
            self._products("attention_projections_backward", self._gemms("attention")),
            _op("norm_backward", "elementwise", self._rows(4 * m.hidden_size)),
        )
        return self._block((*ahead[:at], kernel, *ahead[at:]), backward)

    def _dense(self) -> Block:
        wide = self._model.dense_intermediate_size // self._layout.tp
        ahead = self._forward["dense"]
        backward = (
            *self._all_reduces(ahead),
            # the activation's gradient reads both of its inputs and the gradient, and writes two
            _op("activation_backward", "elementwise", self._rows(5 * wide)),
            self._products("dense_ffn_backward", self._gemms("dense")),
            _op("norm_backward", "elementwise", self._rows(4 * self._model.hidden_size)),
        )
        return self._block(ahead, backward)

    def _moe(self) -> Block:
        m = self._model
        shape = RouterShape(
            m.hidden_size, m.num_scores, m.top_k, m.router_dtype, m.scoring, m.num_expert_groups, m.top_groups
        )
        ahead = self._forward["moe"]
        backward = [
            *self._all_reduces(ahead),
            _op("router_backward", "router_backward", self._ops.router(self.tokens, shape, backward=True)),
            _op("top_k_backward", "elementwise", self._rows(2 * m.num_scores + 4 * m.top_k)),
            _op("norm_backward", "elementwise", self._rows(4 * m.hidden_size)),
        ]
        if m.shared_intermediate_size:
            wide = m.shared_intermediate_size // self._layout.tp
            shared = self._gemms("moe", "shared")
            backward.append(_op("activation_backward", "elementwise", self._rows(5 * wide)))
            backward.append(self._products("shared_expert_backward", shared))
        if m.expert_hidden_size:
            backward.append(self._products("latent_projections_backward", self._gemms("moe", "latent")))
        return self._block(ahead, tuple(backward))

    def _first(self) -> Block:
        # the gradient of each token is read and added to its row of the table
        return Block(
            self._forward["first"], (_op("embedding_backward", "elementwise", self._rows(3 * self._model.hidden_size)),)
        )

    def _last(self) -> Block:
        backward = _op("norm_backward", "elementwise", self._rows(4 * self._model.hidden_size))
        return Block(self._forward["last"], (backward,))

    def _head(self) -> Block:
        m, tp, tokens = self._model, self._layout.tp, self.tokens
        heads = self._gemms("head")
        logits = tokens * (-(-m.vocab_size // tp) * 4.0 * 2)  # float32, read and written
        forward = [
            _op("lm_head", "gemm", *(self._ops.gemm(tokens, g.n, g.k, g.dtype) for g in heads)),
            _op("loss", "elementwise", self._ops.elementwise(logits)),
        ]
        backward = [_op("loss_backward", "elementwise", self._ops.elementwise(logits))]
        if tp > 1:
            # each token's maximum and sum of exponentials; then the gradient of the hidden states
            forward.append(self._all_reduce("loss_all_reduce", tokens * 8.0))
            width = m.hidden_size * dtype_bytes(m.activation_dtype)
            backward.append(self._all_reduce("lm_head_all_reduce", tokens * width))
        backward.append(self._products("lm_head_backward", heads))
        return Block(tuple(forward), tuple(backward))

    # -- operations ---------------------------------------------------------------------------------------------
    def _gemms(self, where: str, name: str = "") -> list[Gemm]:
        """The products of the forward pass whose names begin so."""
        gemms = self._model.gemms(self._layout.tp)
        return [g for g in gemms if g.where == where and g.phase != "prefill" and g.name.startswith(name)]

    def _products(self, name: str, gemms: list[Gemm]) -> Op:
        """Both gradients of each product."""
        priced = []
        for g in gemms:
            priced.append(self._ops.gemm(self.tokens, g.k * g.batch, g.n, g.dtype))
            priced.append(self._ops.gemm(g.k, g.n * g.batch, self.tokens, g.dtype))
        return _op(name, "gemm", *priced)._replace(grade=int(ASSUMED))

    def _rows(self, width: float) -> Priced:
        return self._ops.elementwise(self.tokens * width * dtype_bytes(self._model.activation_dtype))

    def _all_reduce(self, name: str, size: float) -> Op:
        return _op(name, "all_reduce", self._ops.all_reduce(size, self._layout.tp, self._layout.tp_spans_nodes))

    @staticmethod
    def _all_reduces(forward: tuple[Op, ...]) -> list[Op]:
        """A block that ends in an all-reduce begins with one in the backward pass: of its input's gradient
        (Megatron-LM, arXiv:1909.08053, section 3: the conjugate operators f and g)."""
        return [op._replace(name=f"{op.name}_backward") for op in forward if op.operator == "all_reduce"]


def _op(name: str, operator: str, *priced: Priced) -> Op:
    """Each price rounded before it is added, as in `moesim.cost.dense`."""
    return Op(name, operator, sum(round(float(p.ns)) for p in priced), max(int(p.grade) for p in priced))


class Gradients(NamedTuple):
    """The experts' backward kernels: ns by part [..., L, P] of both gradients, of what is computed again before, and
    the worst grade [..., L]. chunk_RL: both gradients on the slowest part in one of r chunks, for each degree tried
    [R, ..., L]; None where layers are not cut."""

    backward_LP: IntArray
    again_LP: IntArray
    grade: U8Array
    chunk_RL: IntArray | None = None


class ExpertPasses:
    """The routed experts' kernels of a micro-batch, forward and backward."""

    def __init__(self, prices: ExpertPrices, ops: Operators, recompute: Recompute, act_bytes: float) -> None:
        self.prices = prices
        self._ops = ops
        self._recompute = recompute
        self._activation = 3 * prices.shape.intermediate * act_bytes  # two inputs read, one output written

    def gradients(self, slot_count: AnyArray) -> Gradients:
        """slot_count [..., L, S]: rows that each slot's kernel runs. `full` recomputation is left to the caller, who
        has the forward pass's price."""
        rows_LP, active_LP, work_LP, _ = self.prices.sizes(slot_count)
        shape = self.prices.shape
        inputs = self._ops.moe_gradient("dgrad", rows_LP, active_LP, work_LP, shape)
        weights = self._ops.moe_gradient("wgrad", rows_LP, active_LP, work_LP, shape)
        grade = np.maximum(inputs.grade, weights.grade).max(axis=-1)
        again_LP = np.zeros(rows_LP.shape, np.int64)
        if self._recompute == "selective":
            again_LP = _whole(self._ops.elementwise(rows_LP * self._activation).ns)
        chunk_RL = self._chunks(slot_count) if self.prices.chunks.degrees else None
        return Gradients(_whole(inputs.ns) + _whole(weights.ns), again_LP, grade, chunk_RL)

    def _chunks(self, slot_count: AnyArray) -> IntArray:
        """See `Gradients.chunk_RL`; while an exchange runs, its multiprocessors are missing."""
        out = []
        for degree in self.prices.chunks.degrees:
            rows_LP, active_LP, work_LP, _ = self.prices.sizes(slot_count, degree)
            sizes = rows_LP, active_LP, work_LP, self.prices.shape
            scale = self.prices.exchange.compute_scale if degree > 1 else 1.0
            inputs, weights = (self._ops.moe_gradient(of, *sizes).ns / scale for of in _GRADIENTS)
            out.append((_whole(inputs) + _whole(weights)).max(axis=-1))
        return np.stack(out)


def _whole(ns: FloatArray) -> IntArray:
    return np.rint(ns).astype(np.int64)
