"""Everything of a step that depends on one number of tokens only, priced once for every number.

For n = 0 .. max tokens of a rank: projections, norms, feed-forward, router, shared expert, tensor-parallel
all-reduces, embedding, host overhead; for n = 0 .. max sequences: lm_head and sampling. Each operation of each layer
is rounded to a nanosecond before it is added, and the tables keep the parts so that a result can be explained. Where
the profile knows what a MoE layer's own part takes as a whole (operator `block`), the parts are scaled to add up to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.arrays import FloatArray, IntArray, U8Array
from moesim.cost.links import as_sizes
from moesim.cost.operators import AttentionShape, Operators, Priced
from moesim.cost.own import OwnPart, OwnSizes, attention_parts, block_shape, moe_parts
from moesim.engine_spec import EngineSpec
from moesim.layout import Layout
from moesim.model import MoEModel, dtype_bytes
from moesim.program import Stage, fold, stages

__all__ = ["DenseTables", "Part", "StageTable", "attention_shape"]


@dataclass(frozen=True, slots=True)
class Part:
    """One operation of a step, summed over the layers it stands in: `ns_N` for every number of tokens."""

    name: str
    operator: str
    ns_N: IntArray
    grade_N: U8Array


@dataclass(frozen=True, slots=True)
class StageTable:
    """`times` equal stages; `ns_N`: what a rank with n tokens runs in one, attention kernels apart."""

    times: int
    stage: Stage
    ns_N: IntArray


def attention_shape(model: MoEModel, tp: int, window: bool) -> AttentionShape:
    """Heads and sizes of one rank's attention kernel; `window`: that of the layers with a window."""
    a = model.attention
    size = max(model.window_of_layer) if window else 0
    return AttentionShape(
        kind=a.kind,
        num_heads=-(-a.num_heads // tp),
        num_kv_heads=model.kv_heads_per_rank(tp),
        head_dim=a.head_dim,
        v_head_dim=a.v_head_dim,
        kv_dim=a.kv_lora_rank + a.qk_rope_head_dim,
        dtype=model.activation_dtype,
        kv_dtype=model.kv_dtype,
        window=size,
    )


_OWN = ("norm", "attention_projections", "rope_kv_write", "router", "top_k")  # parts of attention and MoE blocks


def _scaled(part: Part, factor_N: FloatArray, grade_N: U8Array) -> Part:
    """A part of a block that was measured as a whole."""
    return Part(part.name, "block", np.rint(part.ns_N * factor_N).astype(np.int64), grade_N)


class DenseTables:
    """Tables of one replica's ranks. `total_N`: all stages together, for groups of one rank (nobody to wait for).
    `blocks`: the parts of one layer's attention, dense and MoE block, and of a pass's beginning and end. tokens_N: the
    only numbers of tokens that are wanted. shared: ranks run the shared expert for their own tokens; else it is
    dispatched like a routed one, and priced there."""

    def __init__(
        self,
        model: MoEModel,
        layout: Layout,
        engine: EngineSpec,
        ops: Operators,
        meet: bool,
        tokens_N: IntArray | None = None,
        shared: bool = True,
    ) -> None:
        self._model = model
        self._layout = layout
        self._ops = ops
        self.engine = engine
        self._shared = shared
        most = max(engine.max_num_batched_tokens, engine.max_num_seqs) + max(engine.graph_batch_sizes, default=0)
        self._n = np.arange(most + 1, dtype=np.int64) if tokens_N is None else tokens_N
        self._sizes = OwnSizes.of_model(model, layout.tp)
        self.program = stages(model, meet)
        blocks: dict[str, list[Part]] = {
            "attention": self._attention(),
            "dense": self._dense_block() if len(model.moe_layers) < model.num_layers else [],
            "moe": self._moe_block() if model.is_moe else [],
            "again": self._moe_again() if model.moe_iterations > 1 else [],
            "first": self._first(),
            "last": self._last(),
        }
        self._scale_to_block(blocks)
        self.blocks = blocks
        sums = {name: sum((p.ns_N for p in parts), np.zeros_like(self._n)) for name, parts in blocks.items()}
        self.stages = [
            StageTable(
                times,
                stage,
                stage.attention * sums["attention"]
                + stage.dense * sums["dense"]
                + stage.moe * sums["moe"]
                + stage.again * sums["again"]
                + stage.first * sums["first"]
                + stage.last * sums["last"],
            )
            for times, stage in fold(self.program)
        ]
        self.total_N: IntArray = sum((s.times * s.ns_N for s in self.stages), np.zeros_like(self._n))
        counts = {
            "attention": model.num_layers,
            "dense": model.num_layers - len(model.moe_layers),
            "moe": len(model.moe_layers),
            "again": model.num_moe_passes - len(model.moe_layers),
            "first": 1,
            "last": 1,
        }
        self.parts = [
            Part(p.name, p.operator, p.ns_N * counts[name], p.grade_N) for name, parts in blocks.items() for p in parts
        ]
        self.full_layers = sum(s.times * s.stage.full for s in self.stages)
        self.window_layers = sum(s.times * s.stage.window for s in self.stages)
        self.head_parts = self._head()
        self.head_N: IntArray = sum((p.ns_N for p in self.head_parts), np.zeros_like(self.head_parts[0].ns_N))
        self.pad = self._padding()

    @property
    def exchanges(self) -> bool:
        """Tokens travel to their experts by all-to-all (under FSMoE's schedule to split experts, too)."""
        fsmoe = self._layout.meets and self._layout.communication.overlap == "fsmoe"
        return self._layout.exchanges or fsmoe

    def _padding(self) -> list[int]:
        """For each batch within the largest graph, the graph it runs in; [] when graphs are off."""
        sizes = self.engine.graph_batch_sizes
        if not self.engine.cuda_graph or not sizes:
            return []
        wanted = np.searchsorted(np.array(sizes), np.arange(sizes[-1] + 1))
        return [int(x) for x in np.array(sizes)[wanted]]

    # -- blocks -------------------------------------------------------------------------------------------------
    def _part(self, name: str, operator: str, *priced: Priced) -> Part:
        ns = sum((np.rint(p.ns).astype(np.int64) for p in priced), np.zeros_like(priced[0].ns, dtype=np.int64))
        grade = np.maximum.reduce([p.grade for p in priced])
        return Part(name, operator, ns, grade)

    def _gemms(self, where: str, *names: str) -> list[Priced]:
        """Products of one layer that run `where`, only those of `names` if given."""
        return [
            self._ops.gemm(self._n, g.n * g.batch, g.k, g.dtype)
            for g in self._model.gemms(self._layout.tp)
            if g.where == where and g.phase != "prefill" and (not names or g.name in names)
        ]

    def _own(self, parts: list[OwnPart]) -> list[Part]:
        return [self._part(p.name, p.operator, *p.priced) for p in parts]

    def _scale_to_block(self, blocks: dict[str, list[Part]]) -> None:
        """Scale a MoE layer's own parts, in place, to what the profile says the block takes as a whole; attention
        blocks of dense layers are taken to be slowed alike. Without a curve nothing changes. Norms elsewhere get
        names of their own, for they are no part of a block."""
        shape = block_shape(self._model, self._layout.tp)
        own = [p for name in ("attention", "moe") for p in blocks[name] if p.name in _OWN]
        parts_N: IntArray = sum((p.ns_N for p in own), np.zeros_like(self._n))
        block = None if shape is None else self._ops.block(self._n, parts_N, shape)
        if block is None:
            return
        factor_N = block.ns / np.maximum(parts_N, 1)
        for name in ("attention", "moe"):
            blocks[name] = [_scaled(p, factor_N, block.grade) if p.name in _OWN else p for p in blocks[name]]
        for name, norm in (("dense", "dense_norm"), ("last", "final_norm")):
            blocks[name] = [replace(p, name=norm) if p.name == "norm" else p for p in blocks[name]]

    def _shared_names(self) -> list[str]:
        return [g.name for g in self._model.gemms(self._layout.tp) if g.where == "moe" and g.name.startswith("shared")]

    def _rows(self, width: float) -> Priced:
        """An elementwise pass over [n, width] activations; `width` counts elements read and written."""
        return self._ops.elementwise(self._n * (width * dtype_bytes(self._model.activation_dtype)))

    def _all_reduce(self, name: str) -> list[Part]:
        if self._layout.tp == 1:
            return []
        size = self._n * (self._model.hidden_size * dtype_bytes(self._model.activation_dtype))
        priced = self._ops.all_reduce(size, self._layout.tp, self._layout.tp_spans_nodes)
        return [self._part(name, "all_reduce", priced)]

    def _attention(self) -> list[Part]:
        return [
            *self._own(attention_parts(self._ops, as_sizes(self._n), self._sizes)),
            *self._all_reduce("attention_all_reduce"),
        ]

    def _dense_block(self) -> list[Part]:
        m = self._model
        wide = m.dense_intermediate_size // self._layout.tp
        return [
            self._part("norm", "elementwise", self._rows(4 * m.hidden_size)),
            self._part("dense_ffn", "gemm", *self._gemms("dense")),
            self._part("activation", "elementwise", self._rows(3 * wide)),
            *self._all_reduce("ffn_all_reduce"),
        ]

    def _moe_block(self) -> list[Part]:
        m = self._model
        out = [*self._own(moe_parts(self._ops, as_sizes(self._n), self._sizes)), *self._latent()]
        if m.shared_intermediate_size and self._shared:
            wide = m.shared_intermediate_size // self._layout.tp
            out.append(self._part("shared_expert", "gemm", *self._gemms("moe", *self._shared_names())))
            out.append(self._part("activation", "elementwise", self._rows(3 * wide)))
        if not self._layout.meets:
            out.extend(self._all_reduce("ffn_all_reduce"))
        return out

    def _moe_again(self) -> list[Part]:
        """A further pass through a layer's experts: its own router, and the shared expert again (Chain-of-Experts runs
        it in every iteration)."""
        return self._moe_block()

    def _latent(self) -> list[Part]:
        """Projections into and out of the width that experts work at, where it is not the hidden size."""
        if not self._model.expert_hidden_size:
            return []
        return [self._part("latent_projections", "gemm", *self._gemms("moe", "latent_in", "latent_out"))]

    def _first(self) -> list[Part]:
        host = np.full(len(self._n), self.engine.host_overhead_us * 1e3)
        return [
            self._part("host", "host", Priced(host, np.full(len(self._n), 3, np.uint8))),
            self._part("embedding", "elementwise", self._rows(2 * self._model.hidden_size)),
        ]

    def _last(self) -> list[Part]:
        return [self._part("norm", "elementwise", self._rows(4 * self._model.hidden_size))]

    def _head(self) -> list[Part]:
        m, tp = self._model, self._layout.tp
        n = np.arange(self.engine.max_num_seqs + 1, dtype=np.int64)
        priced = [self._ops.gemm(n, g.n, g.k, g.dtype) for g in m.gemms(tp) if g.where == "head"]
        logits = self._ops.elementwise(n * (m.vocab_size * 4.0 * 2))
        parts = [self._part("lm_head", "gemm", *priced), self._part("sampling", "elementwise", logits)]
        if tp > 1:
            gathered = self._ops.all_gather(n * (m.vocab_size // tp * 4.0), tp, self._layout.tp_spans_nodes)
            parts.append(self._part("logits_all_gather", "all_gather", gathered))
        return parts
