"""Weights of one rank: every tensor a pure function of (seed, layer, expert), on a torch device.

Values are those of one block of normal numbers, read from a place that (seed, kind, layer, expert) names and round its
end, scaled so that a product keeps its rows' size. So replicas of an expert are equal on whatever ranks, and a model of
60 GB is there in the time of copying it. Each layer's experts lie on memory of their own. Where memory is short, a few
MoE layers are held and used in turn, which `remark` says.

Suffixes: H hidden, I intermediate, S expert slots of this rank, V vocabulary, M whatever a matrix makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from moesim.arrays import AnyArray
from moesim.errors import BadInput, Infeasible, Problem
from moesim.model import MoEModel, dtype_bytes
from moesim.rng import generator
from moesim_kernels.ops.block import Gates, Heads, Own

__all__ = ["LayerWeights", "RankWeights", "Values", "gates_of", "heads_of", "refuse_unexecuted"]

_BLOCK = 1 << 22  # numbers drawn; larger tensors repeat them
_KINDS = ("embedding", "head", "qkv", "qkv_bias", "out", "router", "router_bias", "w13", "w2", "shared13", "shared2",
          "shared_gate", "dense13", "dense2")  # fmt: skip
_KIND: Mapping[str, int] = {name: i for i, name in enumerate(_KINDS)}


def refuse_unexecuted(model: MoEModel) -> None:
    """Raise one BadInput with everything about the model that is simulated and not executed."""
    m, a = model, model.attention
    dtypes = {"weight_dtype": m.weight_dtype, "expert_dtype": m.expert_dtype, "kv_dtype": m.kv_dtype}
    told = [
        (a.kind != "gqa", "attention.kind", f"attention {a.kind} is not executed; grouped-query attention is"),
        (a.head_dim % 2 == 1, "attention.head_dim", f"rotary positions need an even head_dim, not {a.head_dim}"),
        (a.sinks, "attention.sinks", "attention sinks are not executed"),
        (a.o_bias, "attention.o_bias", "a bias of the output projection is not executed"),
        (a.qk_norm and a.qk_norm_size == "all", "attention.qk_norm_size", "norms over all heads are not executed"),
        ("chunked" in m.attention_kind_of_layer, "attention.layer_pattern", "chunked attention is not executed"),
        (not m.gated_experts, "gated_mlp", "experts of two matrices are not executed; gated ones are"),
        (m.expert_bias, "moe.expert_bias", "biases of experts are not executed"),
        (m.router_bias and m.scoring == "softmax", "moe.router_bias", "a bias of softmax logits is not executed"),
        (m.norm_bias or m.lm_head_bias, "norm_bias, lm_head_bias", "biases of norms and head are not executed"),
        (m.moe_iterations > 1, "moe_iterations", "several passes through a layer's experts are not executed"),
        (m.pool_layers > 1, "pool_layers", "experts that layers share are not executed"),
        (bool(m.expert_widths or m.expert_hidden_size), "moe", "experts of other widths are not executed"),
        (bool(m.router_columns) or m.expert_execution != "expert_centric", "moe", "product keys are not executed"),
        (m.activation_dtype not in ("fp32", "bf16"), "activation_dtype", f"{m.activation_dtype}: fp32 or bf16 is"),
        (m.router_dtype not in ("fp32", "bf16"), "router_dtype", f"{m.router_dtype}: fp32 or bf16 is executed"),
    ]
    told += [
        (dtype != m.activation_dtype, name, f"{dtype} beside activations in {m.activation_dtype} is not executed")
        for name, dtype in dtypes.items()
    ]
    found = [Problem(f"model.{name}", f"{m.name}: {text}") for wrong, name, text in told if wrong]
    if found:
        raise BadInput(found)


def heads_of(model: MoEModel) -> Heads:
    """Heads of the model's attention."""
    a = model.attention
    return Heads(a.num_heads, a.num_kv_heads, a.head_dim)


def gates_of(model: MoEModel) -> Gates:
    """How the model's router makes gates of its logits."""
    return Gates(model.top_k, model.scoring, model.num_expert_groups, model.top_groups, model.norm_topk_prob)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. w13_SMH [S, 2I, H] and w2_SHI [S, H, I]: experts of this rank's slots, None in a dense layer; empty
    slots hold zeros. shared, dense: (w13 [2I, H], w2 [H, I]). shared_gate_1H: of the shared expert."""

    own: Own
    w13_SMH: Any = None
    w2_SHI: Any = None
    shared: tuple[Any, Any] | None = None
    shared_gate_1H: Any = None
    dense: tuple[Any, Any] | None = None


@lru_cache(maxsize=2)
def _normals(seed: int) -> AnyArray:
    return generator(seed, "real/weights").standard_normal(_BLOCK, np.float32)


class Values:
    """Numbers by name, the same on every device and in every process."""

    def __init__(self, seed: int, device: Any) -> None:
        self.seed, self.device = seed, device
        self._scaled: dict[tuple[Any, float], Any] = {}

    def block(self, dtype: Any, scale: float = 1.0) -> Any:
        """The block of normal numbers times `scale`, flat, in a torch dtype on the device."""
        import torch

        key = (dtype, scale)
        if key not in self._scaled:
            drawn = torch.from_numpy(_normals(self.seed)) * scale
            self._scaled[key] = drawn.to(dtype).to(self.device)
        return self._scaled[key]

    def offset(self, kind: str, layer: int, expert: int = 0) -> int:
        """Where in the block a tensor begins."""
        return int(generator(self.seed, "real/place", _KIND[kind], layer, expert).integers(_BLOCK))

    def fill(self, out: Any, kind: str, layer: int, expert: int = 0, scale: float = 1.0) -> Any:
        """Write a tensor's values into `out` (contiguous) and return it."""
        block, flat = self.block(out.dtype, scale), out.view(-1)
        at, start = 0, self.offset(kind, layer, expert)
        while at < flat.numel():
            count = min(flat.numel() - at, _BLOCK - start)
            flat[at : at + count].copy_(block[start : start + count])
            at, start = at + count, 0
        return out

    def matrix(self, shape: tuple[int, ...], dtype: Any, kind: str, layer: int) -> Any:
        """A matrix [M, K] with the variance that keeps a row's size."""
        import torch

        return self.fill(torch.empty(shape, dtype=dtype, device=self.device), kind, layer, 0, shape[-1] ** -0.5)

    def vector(self, size: int, dtype: Any, kind: str, layer: int, scale: float) -> Any:
        """A bias."""
        import torch

        return self.fill(torch.empty(size, dtype=dtype, device=self.device), kind, layer, 0, scale)

    def drop(self) -> None:
        """Give the blocks' memory back."""
        self._scaled.clear()


class RankWeights:
    """All weights that a rank holds. layers: one entry a layer of the model; with `held` MoE layers fewer than there
    are, later ones are the earlier ones again. remark: what a reader of times should know, or empty."""

    def __init__(self, model: MoEModel, slot_to_expert_LS: AnyArray, seed: int, device: Any, room_bytes: int) -> None:
        """slot_to_expert_LS: of this rank's slots, int [MoE layers, S], -1 where empty. room_bytes: for weights.

        Raises BadInput for a model that is not executed, Infeasible where not even one MoE layer fits.
        """
        import torch

        refuse_unexecuted(model)
        self.model, self.seed = model, seed
        self.slot_to_expert_LS = np.asarray(slot_to_expert_LS, np.int64)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[model.activation_dtype]
        self._router_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[model.router_dtype]
        self._torch, self._device, self._values = torch, device, Values(seed, device)
        self.held = self._fitting(room_bytes)
        self.remark = ""
        if self.held < model.num_moe_layers:
            self.remark = (
                f"memory for {self.held} of {model.num_moe_layers} MoE layers: they are used in turn, each with other "
                "layers' slots and rows"
            )
        vocabulary = (model.vocab_size, model.hidden_size)
        self.embedding_VH = self._values.fill(self._empty(*vocabulary), "embedding", 0)
        tied = model.tie_word_embeddings
        self.head_VH = self.embedding_VH if tied else self._values.matrix(vocabulary, self.dtype, "head", 0)
        self.norm_H = self._ones(model.hidden_size)
        held: list[LayerWeights] = []
        self.layers: list[LayerWeights] = []
        sparse = {layer: i for i, layer in enumerate(model.moe_layers)}
        for layer in range(model.num_layers):
            if layer not in sparse:
                self.layers.append(self._layer(layer, None))
                continue
            if len(held) < self.held:
                held.append(self._layer(layer, sparse[layer]))
            self.layers.append(held[sparse[layer] % self.held])
        self._values.drop()

    @staticmethod
    def needed_bytes(model: MoEModel, slots: int) -> tuple[int, int]:
        """Bytes of everything but the MoE layers (the blocks of values included), and of one MoE layer with `slots`."""
        item = int(dtype_bytes(model.activation_dtype))
        h, own = model.hidden_size, model.attention_params()
        shared = model.shared_params() + model.router_params()
        tables = model.embedding_params() + model.lm_head_params()
        dense = len(model.dense_layers) * (own + model.dense_ffn_params())
        return item * (tables + dense + h + 6 * _BLOCK), item * (own + shared) + slots * int(model.expert_bytes())

    def _fitting(self, room_bytes: int) -> int:
        """MoE layers that fit."""
        layers, slots = self.slot_to_expert_LS.shape
        fixed, each = self.needed_bytes(self.model, slots)
        held = min(layers, (room_bytes - fixed) // each)
        if held < 1:
            need = (fixed + each) / 2**30
            reason = (
                f"{self.model.name} with one MoE layer of {slots} experts takes {need:.2f} GiB of weights, and "
                f"{max(room_bytes, 0) / 2**30:.2f} GiB are free for them; use more ranks or a smaller model"
            )
            raise Infeasible([reason], (fixed + each - room_bytes) / max(room_bytes, 1))
        return int(held)

    def _empty(self, *shape: int) -> Any:
        return self._torch.empty(shape, dtype=self.dtype, device=self._device)

    def _ones(self, *shape: int) -> Any:
        return self._torch.ones(shape, dtype=self.dtype, device=self._device)

    def _layer(self, layer: int, sparse: int | None) -> LayerWeights:
        m = self.model
        if sparse is None:
            wide = m.dense_intermediate_size
            return LayerWeights(self._own(layer, False), dense=self._pair("dense", layer, wide))
        w13, w2 = self._experts(layer, sparse)
        shared = self._pair("shared", layer, m.shared_intermediate_size) if m.shared_intermediate_size else None
        gate = self._values.matrix((1, m.hidden_size), self.dtype, "shared_gate", layer) if m.shared_gate else None
        return LayerWeights(self._own(layer, True), w13, w2, shared, gate)

    def _own(self, layer: int, routed: bool) -> Own:
        m, a, heads = self.model, self.model.attention, heads_of(self.model)
        wide, hidden, values = heads.fused * heads.dim, m.hidden_size, self._values
        router = bias_E = None
        if routed:
            router = values.matrix((m.num_experts, hidden), self._router_dtype, "router", layer)
            if m.router_bias:
                bias_E = values.vector(m.num_experts, self._torch.float32, "router_bias", layer, 0.1)
        return Own(
            before_H=self._ones(hidden),
            qkv_MH=values.matrix((wide, hidden), self.dtype, "qkv", layer),
            out_HM=values.matrix((hidden, heads.query * heads.dim), self.dtype, "out", layer),
            after_H=self._ones(hidden),
            router_EH=router,
            bias_M=values.vector(wide, self.dtype, "qkv_bias", layer, 0.1) if a.qkv_bias else None,
            head_norm_XD=self._ones(heads.query + heads.kv, heads.dim) if a.qk_norm else None,
            bias_E=bias_E,
        )

    def _pair(self, kind: str, layer: int, inner: int) -> tuple[Any, Any]:
        """The two matrices of a feed-forward that every token passes."""
        h, values = self.model.hidden_size, self._values
        first = values.matrix((2 * inner, h), self.dtype, f"{kind}13", layer)
        return first, values.matrix((h, inner), self.dtype, f"{kind}2", layer)

    def _experts(self, layer: int, sparse: int) -> tuple[Any, Any]:
        """The experts of this rank's slots, slot by slot."""
        h, inner = self.model.hidden_size, self.model.moe_intermediate_size
        expert_S = self.slot_to_expert_LS[sparse].tolist()
        w13, w2 = self._empty(len(expert_S), 2 * inner, h), self._empty(len(expert_S), h, inner)
        for slot, expert in enumerate(expert_S):
            if expert < 0:
                w13[slot].zero_()
                w2[slot].zero_()
                continue
            self._values.fill(w13[slot], "w13", layer, expert, h**-0.5)
            self._values.fill(w2[slot], "w2", layer, expert, inner**-0.5)
        return w13, w2

    def first_slots(self, slots: int) -> RankWeights:
        """The same weights with the experts of the first slots alone, on the same memory."""
        if slots == self.slot_to_expert_LS.shape[1]:
            return self
        out = copy(self)
        out.slot_to_expert_LS = self.slot_to_expert_LS[:, :slots]
        cut = {id(w): w for w in self.layers}
        for key, w in cut.items():
            if w.w13_SMH is not None:
                cut[key] = replace(w, w13_SMH=w.w13_SMH[:slots], w2_SHI=w.w2_SHI[:slots])
        out.layers = [cut[id(w)] for w in self.layers]
        return out

    @property
    def bytes(self) -> int:
        """Held, each tensor once."""
        found = {}
        for layer in self.layers:
            pairs = [x for pair in (layer.shared, layer.dense) if pair is not None for x in pair]
            for x in (*layer.own, layer.w13_SMH, layer.w2_SHI, layer.shared_gate_1H, *pairs):
                if x is not None:
                    found[x.data_ptr()] = x.numel() * x.element_size()
        for x in (self.embedding_VH, self.head_VH):
            found[x.data_ptr()] = x.numel() * x.element_size()
        return sum(found.values())
