"""What a model is to a deployment: layers, experts, parameters, bytes, and the matrix products of one layer.

Legend: L MoE layers, E experts, K experts a token, tp attention-TP ranks. Parameters are counted as elements
of the checkpoint's state dict (weights, biases, norms, the router's correction bias); multi-token-prediction
modules are kept apart (`mtp_params`), so DeepSeek-V3 counts 671.03e9 and not 684.5e9. A test holds the
totals of the shipped files equal to the element count of the public implementation, where one was counted.

Four dtypes describe a checkpoint. `weight_dtype` holds the linear layers of attention, shared experts and
dense FFNs; `expert_dtype` the routed experts; `kv_dtype` the KV cache; `activation_dtype` the hidden states
that travel between operators and ranks. What quantised checkpoints leave alone (embeddings, head, norms,
biases, shared-expert gates) is held in `base_dtype`, the router in `router_dtype`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from moesim.dtypes import FLOAT_DTYPES, Dtype, tensor_bytes
from moesim.errors import BadInput, Problem
from moesim.model_rules import disagreements

if TYPE_CHECKING:
    from moesim.model import ModelSpec

__all__ = ["Attention", "Gemm", "LayerKind", "MoEModel", "Part"]

LayerKind = Literal["full", "window", "chunked"]


class Gemm(NamedTuple):
    """One dense product of a layer on one TP rank: [rows, k] x [k, n], `batch` of them side by side.

    where: in which layers it runs: "attention" every layer, "moe" the MoE layers, "dense" the others, "head"
    once a step on the sampled rows. layers: how many layers that is. phase: "both", or only for "prefill" or
    "decode" rows.
    """

    name: str
    n: int
    k: int
    dtype: Dtype
    where: Literal["attention", "moe", "dense", "head"]
    layers: int
    batch: int = 1
    phase: Literal["both", "prefill", "decode"] = "both"


class Part(NamedTuple):
    """A kind of tensor on one rank: `params` elements of `dtype`, over all layers."""

    name: str
    params: int
    dtype: Dtype


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of every layer: grouped-query (MHA and MQA are its ends) or multi-head latent (MLA).

    For "gqa" head_dim = v_head_dim and the ranks are None/0. For "mla" (DeepSeek-V2 report, section 2.1) the
    cache holds kv_lora_rank + qk_rope_head_dim elements a token, and head_dim = qk_nope_head_dim +
    qk_rope_head_dim. qk_norm_size "all" norms all heads together (OLMoE, MiniMax-M2), "head" each head
    (Qwen3). sinks: one learned logit a head (gpt-oss).
    """

    kind: Literal["gqa", "mla"]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    qkv_bias: bool
    qk_norm: bool
    qk_norm_size: Literal["head", "all"] = "head"
    o_bias: bool = False
    sinks: bool = False

    @property
    def kv_elements(self) -> int:
        """Elements one token leaves in the cache of one layer, before any TP."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class MoEModel:
    """A decoder, MoE or dense, as numbers. Frozen; raises BadInput naming the field where numbers disagree."""

    name: str
    source: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool
    attention: Attention
    attention_kind_of_layer: tuple[LayerKind, ...]
    window_of_layer: tuple[int, ...]
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    shared_gate: bool
    dense_intermediate_size: int
    gated_mlp: bool
    num_expert_groups: int
    top_groups: int
    scoring: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool
    weight_dtype: Dtype
    expert_dtype: Dtype
    kv_dtype: Dtype
    activation_dtype: Dtype
    max_position_embeddings: int
    num_mtp_layers: int
    extra_params: int
    router_dtype: Dtype = "bf16"
    router_bias: bool = False
    expert_bias: bool = False
    norm_bias: bool = False
    lm_head_bias: bool = False
    warnings: tuple[str, ...] = ()
    moe_iterations: int = 1
    """times a token goes through the experts of one MoE layer (Chain-of-Experts), each with a router of its own"""
    pool_layers: int = 1
    """consecutive MoE layers that share one pool of `num_experts` experts (ReXMoE, UniPool)"""
    expert_widths: tuple[float, ...] = ()
    """sizes of experts relative to `moe_intermediate_size`: equal blocks of consecutive experts, one size each"""
    expert_hidden_size: int = 0
    """width that experts work at, behind projections that all experts of a layer share (MoLE); 0: hidden_size"""
    router_columns: int = 0
    """scores a token's router computes (2 sqrt(E) for product keys); 0: one an expert"""
    ungated_experts: bool = False
    """routed experts are two matrices where the model's other feed-forwards are gated (PEER's one-row experts)"""
    expert_execution: Literal["expert_centric", "token_centric"] = "expert_centric"
    """weights are read once for each expert in use, or once for each (token, expert) pair (PEER)"""

    def __post_init__(self) -> None:
        found = [Problem(f"{self.name}.{field}", message) for field, message in disagreements(self)]
        if found:
            raise BadInput(found)

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> MoEModel:
        """Build from a model file's spec ."""
        return spec.build()

    def with_dtypes(
        self,
        *,
        weight_dtype: Dtype | None = None,
        expert_dtype: Dtype | None = None,
        kv_dtype: Dtype | None = None,
        activation_dtype: Dtype | None = None,
    ) -> MoEModel:
        """The same model stored in other dtypes; None keeps what is. Raises BadInput for a dtype of no use
        there.
        """
        return replace(
            self,
            weight_dtype=weight_dtype or self.weight_dtype,
            expert_dtype=expert_dtype or self.expert_dtype,
            kv_dtype=kv_dtype or self.kv_dtype,
            activation_dtype=activation_dtype or self.activation_dtype,
        )

    # ---- shape --------------------------------------------------------------------------------------

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    @property
    def num_moe_layers(self) -> int:
        """L of the shape legend."""
        return len(self.moe_layers)

    @property
    def moe_passes(self) -> tuple[int, ...]:
        """The layer of every pass through experts, in order: each MoE layer `moe_iterations` times."""
        return tuple(layer for layer in self.moe_layers for _ in range(self.moe_iterations))

    @property
    def num_moe_passes(self) -> int:
        """Dispatches of one forward pass."""
        return len(self.moe_layers) * self.moe_iterations

    @property
    def num_expert_sets(self) -> int:
        """Different sets of `num_experts` experts: one a MoE layer unless layers share a pool."""
        return -(-len(self.moe_layers) // self.pool_layers)

    @property
    def expert_sets_held(self) -> float:
        """How many sets of `num_experts` experts exist: of a pool that the last layers are too few to fill, a part."""
        return len(self.moe_layers) / self.pool_layers

    @property
    def gated_experts(self) -> bool:
        """A routed expert has three matrices (gate, up, down), else two."""
        return self.gated_mlp and not self.ungated_experts

    @property
    def set_of_pass(self) -> tuple[int, ...]:
        """Which set of experts each pass uses."""
        return tuple(i // (self.moe_iterations * self.pool_layers) for i in range(self.num_moe_passes))

    @property
    def expert_size_E(self) -> tuple[float, ...]:
        """Size of each expert relative to `moe_intermediate_size`; () where all are 1."""
        if not self.expert_widths:
            return ()
        block = self.num_experts // len(self.expert_widths)
        return tuple(width for width in self.expert_widths for _ in range(block))

    @property
    def mean_expert_size(self) -> float:
        return sum(self.expert_widths) / len(self.expert_widths) if self.expert_widths else 1.0

    @property
    def expert_hidden(self) -> int:
        """Width of an expert's input and output."""
        return self.expert_hidden_size or self.hidden_size

    @property
    def num_scores(self) -> int:
        """Columns of a router."""
        return self.router_columns or self.num_experts

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with a dense FFN, ascending."""
        sparse = frozenset(self.moe_layers)
        return tuple(i for i in range(self.num_layers) if i not in sparse)

    @property
    def base_dtype(self) -> Dtype:
        """What is never quantised is held in this dtype."""
        return self.weight_dtype if self.weight_dtype in FLOAT_DTYPES else self.activation_dtype

    def heads_per_rank(self, tp: int) -> int:
        """Query heads on one of `tp` ranks. Raises BadInput when tp does not divide them."""
        heads = self.attention.num_heads
        if tp < 1 or heads % tp:
            good = [str(d) for d in range(1, min(heads, 64) + 1) if heads % d == 0]
            raise BadInput(
                f"tp must divide the attention heads: tp={tp}, num_heads={heads} ({self.name}). "
                f"Use tp = {', '.join(good)}.",
                "parallel.tp",
            )
        return heads // tp

    def kv_heads_per_rank(self, tp: int) -> int:
        """KV heads on one of `tp` ranks: below one they are replicated. 1 for MLA, whose latent has no heads.

        Raises BadInput when neither of tp and the KV heads divides the other.
        """
        self.heads_per_rank(tp)
        if self.attention.kind == "mla":
            return 1
        kv = self.attention.num_kv_heads
        if kv % tp and tp % kv:
            raise BadInput(
                f"tp must divide the KV heads or be a multiple of them: tp={tp}, num_kv_heads={kv} ({self.name})",
                "parallel.tp",
            )
        return max(1, kv // tp)

    # ---- parameters ---------------------------------------------------------------------------------

    def _norm(self) -> int:
        return self.hidden_size * (2 if self.norm_bias else 1)

    def _ffn(self, intermediate: int) -> int:
        return (3 if self.gated_mlp else 2) * self.hidden_size * intermediate

    def attention_params(self) -> int:
        """One layer: projections, biases, q/k norms, sinks, and the layer's two norms."""
        linear, small = self._attention_linear(1), self._attention_small(1)
        return linear + small

    def _attention_linear(self, tp: int) -> int:
        """Matrix elements of one layer's attention on one of `tp` ranks."""
        a, hidden, heads = self.attention, self.hidden_size, self.heads_per_rank(tp)
        out = heads * a.v_head_dim * hidden
        if a.kind == "gqa":
            return hidden * (heads + 2 * self.kv_heads_per_rank(tp)) * a.head_dim + out
        latent = hidden * (a.kv_lora_rank + a.qk_rope_head_dim)
        up = a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
        if a.q_lora_rank is None:
            return hidden * heads * a.head_dim + latent + up + out
        return (hidden + heads * a.head_dim) * a.q_lora_rank + latent + up + out

    def _attention_small(self, tp: int) -> int:
        """Biases, norms and sinks of one layer on one of `tp` ranks."""
        a, heads, kv = self.attention, self.heads_per_rank(tp), self.kv_heads_per_rank(tp)
        small = 2 * self._norm() + (self.hidden_size if a.o_bias else 0) + (heads if a.sinks else 0)
        if a.kind == "mla":
            small += a.kv_lora_rank + (a.q_lora_rank or 0)  # norms of the latents
            if a.qkv_bias:
                query = heads * a.head_dim if a.q_lora_rank is None else a.q_lora_rank
                small += query + a.kv_lora_rank + a.qk_rope_head_dim
            return small
        small += (heads + 2 * kv) * a.head_dim if a.qkv_bias else 0
        if a.qk_norm:
            small += a.head_dim * (heads + kv if a.qk_norm_size == "all" else 2)
        return small

    def expert_params(self) -> int:
        """ONE routed expert of one layer, of relative size 1; 0 for a dense model."""
        if not self.is_moe:
            return 0
        bias = (2 if self.gated_experts else 1) * self.moe_intermediate_size + self.expert_hidden
        return self._expert_matrices() + (bias if self.expert_bias else 0)

    def _expert_matrices(self) -> int:
        return (3 if self.gated_experts else 2) * self.expert_hidden * self.moe_intermediate_size

    def experts_params(self) -> int:
        """All routed experts of one set, smaller ones by their size."""
        return round(self.num_experts * self.mean_expert_size * self.expert_params())

    def latent_params(self) -> int:
        """The projections in and out that a MoE layer's experts share; 0 where they work at the hidden size."""
        return 2 * self.hidden_size * self.expert_hidden_size

    def shared_params(self) -> int:
        """The shared experts of one MoE layer and their gate."""
        return self._ffn(self.shared_intermediate_size) + (self.hidden_size if self.shared_gate else 0)

    def router_params(self) -> int:
        """The router of one MoE layer (of all its iterations) and its bias (selection bias of DeepSeek-V3, logit bias
        of gpt-oss)."""
        if not self.is_moe:
            return 0
        return self.moe_iterations * self.num_scores * (self.hidden_size + (1 if self.router_bias else 0))

    def dense_ffn_params(self) -> int:
        """The FFN of one dense layer."""
        return self._ffn(self.dense_intermediate_size)

    def embedding_params(self) -> int:
        """The input embedding table."""
        return self.vocab_size * self.hidden_size

    def lm_head_params(self) -> int:
        """The output layer; 0 where it is the embedding table once more."""
        bias = self.vocab_size if self.lm_head_bias else 0
        return bias if self.tie_word_embeddings else self.embedding_params() + bias

    def final_norm_params(self) -> int:
        return self._norm()

    def moe_layer_params(self) -> int:
        """The FFN of one MoE layer with experts of its own: all routed experts, shared experts, router."""
        return self.experts_params() + self.shared_params() + self.latent_params() + self.router_params()

    def total_params(self) -> int:
        """Every parameter of the checkpoint, multi-token-prediction modules apart."""
        return (
            self.embedding_params()
            + self.lm_head_params()
            + self.final_norm_params()
            + self.num_layers * self.attention_params()
            + self.num_moe_layers * (self.moe_layer_params() - self.experts_params())
            + round(self.expert_sets_held * self.experts_params())
            + len(self.dense_layers) * self.dense_ffn_params()
            + self.extra_params
        )

    def active_params(self) -> int:
        """`total_params` without the experts a token does not visit; both embedding tables are in.

        Publishers differ in whether they count those tables, hence in the second digit of "A3B".
        """
        experts = min(self.top_k * self.moe_iterations, self.num_experts)
        visited = round(self.num_moe_layers * experts * self.mean_expert_size * self.expert_params())
        return self.total_params() - round(self.expert_sets_held * self.experts_params()) + visited

    def mtp_params(self) -> int:
        """All multi-token-prediction modules: a projection of 2 hidden states, a decoder layer and three
        norms each.

        DeepSeek-V3 report, section 2.2; the embedding and the head are shared with the main model.
        """
        ffn = self.moe_layer_params() if self.is_moe else self.dense_ffn_params()
        module = 2 * self.hidden_size**2 + 3 * self._norm() + self.attention_params() + ffn
        return self.num_mtp_layers * module

    # ---- bytes --------------------------------------------------------------------------------------

    def expert_bytes(self) -> int:
        """Bytes of ONE routed expert of one layer, of relative size 1, whole (no expert tensor parallelism)."""
        matrices = self._expert_matrices() if self.is_moe else 0
        bias = self.expert_params() - matrices
        return tensor_bytes(matrices, self.expert_dtype) + tensor_bytes(bias, self.base_dtype)

    def dense_parts_rank(self, tp: int) -> tuple[Part, ...]:
        """Everything but the routed experts, on one of `tp` attention-TP ranks, over all layers.

        Sharded: attention by heads (KV heads at least one a rank), FFNs by their intermediate size and the
        vocabulary by rows, both rounded up. Whole on every rank: norms, MLA's down-projections, router,
        gates, `extra_params`.
        """
        dense, sparse = len(self.dense_layers), self.num_moe_layers
        vocab = _ceil(self.vocab_size, tp)
        head = vocab * ((0 if self.tie_word_embeddings else self.hidden_size) + (1 if self.lm_head_bias else 0))
        shared = self._ffn(_ceil(self.shared_intermediate_size, tp))
        parts = (
            Part("embedding", vocab * self.hidden_size, self.base_dtype),
            Part("lm_head", head, self.base_dtype),
            Part("final_norm", self._norm(), self.base_dtype),
            Part("attention", self.num_layers * self._attention_linear(tp), self.weight_dtype),
            Part("attention_small", self.num_layers * self._attention_small(tp), self.base_dtype),
            Part("shared_experts", sparse * shared, self.weight_dtype),
            Part("latent", sparse * self.latent_params(), self.weight_dtype),
            Part("shared_gate", sparse * self.hidden_size if self.shared_gate else 0, self.base_dtype),
            Part("router", sparse * self.router_params(), self.router_dtype),
            Part("dense_ffn", dense * self._ffn(_ceil(self.dense_intermediate_size, tp)), self.weight_dtype),
            Part("extra", self.extra_params, self.base_dtype),
        )
        return tuple(part for part in parts if part.params)

    def weight_bytes_dense_rank(self, tp: int) -> int:
        """Bytes of everything but the routed experts on one of `tp` ranks: the sum of `dense_parts_rank`."""
        return sum(tensor_bytes(part.params, part.dtype) for part in self.dense_parts_rank(tp))

    def mla_absorbed_bytes_rank(self, tp: int) -> int:
        """Bytes of the second, unquantised copy of MLA's up-projections that decoding reads; 0 for GQA.

        Engines keep `kv_b` for prefill and, beside it, its two halves in the activation dtype for the
        absorbed decode products. It is no parameter of the checkpoint, so `weight_bytes_dense_rank` leaves it
        out.
        """
        a = self.attention
        if a.kind == "gqa":
            return 0
        one = a.kv_lora_rank * self.heads_per_rank(tp) * (a.qk_nope_head_dim + a.v_head_dim)
        return tensor_bytes(self.num_layers * one, self.activation_dtype)

    def kv_bytes_per_token(self, tp: int) -> tuple[int, ...]:
        """Bytes one token leaves in each layer's cache on one of `tp` ranks (num_layers values).

        GQA: keys and values of the rank's heads. MLA: the latent and the rotary key, whole on every rank.
        """
        a = self.attention
        heads = self.kv_heads_per_rank(tp)
        elements = a.kv_elements if a.kind == "mla" else 2 * heads * a.head_dim
        return (tensor_bytes(elements, self.kv_dtype),) * self.num_layers

    # ---- products -----------------------------------------------------------------------------------

    def gemms(self, tp: int) -> tuple[Gemm, ...]:
        """The dense products of every kind of layer on one of `tp` ranks; routed experts are not among them.

        MLA is priced as engines run it (DeepSeek-V2 report, 2.1.2 and appendix C). Prefill multiplies the
        latent out to keys and values (`kv_b`: rows are the tokens attended to, cached ones included) because
        attention over 192 + 128 elements a head costs less than over 576 + 512 when there are many queries.
        Decode keeps the latent and absorbs the two halves of `kv_b` into query and output (`k_up`, `v_up`:
        one product a head) because reading the cache once for all heads is what bounds it. The absorbed
        halves run in the activation dtype. `qkv_a` is fused and whole on every rank.
        """
        dense, sparse = len(self.dense_layers), self.num_moe_layers
        hidden = self.hidden_size
        out = list(self._attention_gemms(tp))
        if self.is_moe:
            out.append(Gemm("router", self.num_scores, hidden, self.router_dtype, "moe", self.num_moe_passes))
            if self.expert_hidden_size:
                latent, passes = self.expert_hidden_size, self.num_moe_passes
                out.append(Gemm("latent_in", latent, hidden, self.weight_dtype, "moe", passes))
                out.append(Gemm("latent_out", hidden, latent, self.weight_dtype, "moe", passes))
            if self.shared_intermediate_size:
                passes = self.num_moe_passes
                out += self._ffn_gemms("shared", _ceil(self.shared_intermediate_size, tp), "moe", passes)
            if self.shared_gate:
                out.append(Gemm("shared_gate", 1, hidden, self.base_dtype, "moe", sparse))
        if dense:
            out += self._ffn_gemms("dense", _ceil(self.dense_intermediate_size, tp), "dense", dense)
        out.append(Gemm("lm_head", _ceil(self.vocab_size, tp), hidden, self.base_dtype, "head", 1))
        return tuple(out)

    def _ffn_gemms(self, name: str, size: int, where: Literal["moe", "dense"], layers: int) -> tuple[Gemm, Gemm]:
        wide = 2 * size if self.gated_mlp else size
        first = "gate_up" if self.gated_mlp else "up"
        return (
            Gemm(f"{name}_{first}", wide, self.hidden_size, self.weight_dtype, where, layers),
            Gemm(f"{name}_down", self.hidden_size, size, self.weight_dtype, where, layers),
        )

    def _attention_gemms(self, tp: int) -> tuple[Gemm, ...]:
        a, hidden, layers = self.attention, self.hidden_size, self.num_layers
        heads, kv, dtype = self.heads_per_rank(tp), self.kv_heads_per_rank(tp), self.weight_dtype
        out = Gemm("o", hidden, heads * a.v_head_dim, dtype, "attention", layers)
        if a.kind == "gqa":
            return Gemm("qkv", (heads + 2 * kv) * a.head_dim, hidden, dtype, "attention", layers), out
        latent, query = a.kv_lora_rank + a.qk_rope_head_dim, heads * a.head_dim
        if a.q_lora_rank is None:
            down = (
                Gemm("q", query, hidden, dtype, "attention", layers),
                Gemm("kv_a", latent, hidden, dtype, "attention", layers),
            )
        else:
            down = (
                Gemm("qkv_a", a.q_lora_rank + latent, hidden, dtype, "attention", layers),
                Gemm("q_b", query, a.q_lora_rank, dtype, "attention", layers),
            )
        rank, act, up = a.kv_lora_rank, self.activation_dtype, a.qk_nope_head_dim + a.v_head_dim
        return (
            *down,
            Gemm("kv_b", heads * up, rank, dtype, "attention", layers, 1, "prefill"),
            Gemm("k_up", rank, a.qk_nope_head_dim, act, "attention", layers, heads, "decode"),
            Gemm("v_up", a.v_head_dim, rank, act, "attention", layers, heads, "decode"),
            out,
        )


def _ceil(size: int, parts: int) -> int:
    return -(-size // parts)
