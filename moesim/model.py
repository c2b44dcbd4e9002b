"""Models as a user names them: a file of `workloads/models/` (`ModelSpec`) or a Hugging Face `config.json`.

A model file holds facts with their source. Its `published_*` and `state_dict_params` are for the tests that
hold the arithmetic against what the publishers say; a simulation reads neither. What a model is lies in
`moesim.architecture`; this module hands all of it on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moesim.architecture import Attention, Gemm, LayerKind, MoEModel, Part
from moesim.dtypes import Dtype, dtype_bytes, tensor_bytes
from moesim.errors import BadInput
from moesim.hf_config import from_hf_config, read_hf_config
from moesim.model_rules import MAX_DIMENSION, MAX_EXPERTS, MAX_LAYERS, MAX_PARAMS
from moesim.spec import Spec

__all__ = [
    "Attention", "AttentionSpec", "Dtype", "ExpertsSpec", "Gemm", "LayerKind", "MoEModel", "ModelSpec",
    "Part", "dtype_bytes", "from_hf_config", "read_hf_config", "tensor_bytes",
]  # fmt: skip

_Size = Annotated[int, Field(ge=1, le=MAX_DIMENSION)]
_SizeOrZero = Annotated[int, Field(ge=0, le=MAX_DIMENSION)]
_Layers = Annotated[tuple[Annotated[int, Field(ge=0, lt=MAX_LAYERS)], ...], Field(strict=False)]
_Pattern = Annotated[tuple[LayerKind, ...], Field(strict=False, min_length=1, max_length=MAX_LAYERS)]
_Lines = Annotated[tuple[str, ...], Field(strict=False, max_length=32)]


class AttentionSpec(Spec):
    """`attention:` of a model file. For MLA head_dim follows from its two parts and is not written.

    layer_pattern repeats over the layers: [window, full] alternates; window is in tokens.
    """

    kind: Literal["gqa", "mla"]
    num_heads: _Size
    num_kv_heads: _Size | None = None
    head_dim: _Size | None = None
    v_head_dim: _Size | None = None
    q_lora_rank: _Size | None = None
    kv_lora_rank: _Size | None = None
    qk_nope_head_dim: _Size | None = None
    qk_rope_head_dim: _Size | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    qk_norm_size: Literal["head", "all"] = "head"
    sinks: bool = False
    layer_pattern: _Pattern = ("full",)
    window: _SizeOrZero = 0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        needed = latent if self.kind == "mla" else ("num_kv_heads", "head_dim")
        foreign = ("head_dim", "num_kv_heads") if self.kind == "mla" else (*latent, "q_lora_rank")
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"kind {self.kind} needs {', '.join(missing)}")
        extra = [name for name in foreign if getattr(self, name) is not None]
        if extra:
            raise ValueError(f"kind {self.kind} has no {', '.join(extra)}; leave it out")
        return self

    def build(self) -> Attention:
        """The attention of every layer."""
        if self.kind == "mla":
            nope, rope, value = self.qk_nope_head_dim or 0, self.qk_rope_head_dim or 0, self.v_head_dim or 0
            head_dim, kv_heads = nope + rope, self.num_heads
        else:
            nope, rope = 0, 0
            head_dim = value = self.head_dim or 0
            kv_heads = self.num_kv_heads or 0
        return Attention(
            kind=self.kind,
            num_heads=self.num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=value,
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank or 0,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            qk_norm_size=self.qk_norm_size,
            o_bias=self.o_bias,
            sinks=self.sinks,
        )


class ExpertsSpec(Spec):
    """`moe:` of a model file; a dense model has none.

    A layer i is MoE when i >= first_dense_layers and (i + 1) is a multiple of layer_step, or when `layers`
    names it. shared_intermediate_size is the sum over the shared experts.
    """

    num_experts: Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
    top_k: Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
    intermediate_size: _Size
    shared_intermediate_size: _SizeOrZero = 0
    shared_gate: bool = False
    first_dense_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)] = 0
    layer_step: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 1
    layers: _Layers | None = None
    num_expert_groups: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = 1
    top_groups: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = 1
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    router_dtype: Dtype = "bf16"
    router_bias: bool = False
    expert_bias: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.layers is not None and (self.first_dense_layers or self.layer_step != 1):
            raise ValueError("name the MoE layers by `layers` or by first_dense_layers and layer_step, not both")
        return self

    def moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the MoE layers among `num_layers`."""
        if self.layers is not None:
            return self.layers
        return tuple(i for i in range(self.first_dense_layers, num_layers) if (i + 1) % self.layer_step == 0)


class ModelSpec(Spec):
    """A file of `workloads/models/`. Unknown keys are errors; sizes are elements, `published_*_b` are 1e9
    parameters.

    published_counts_*: what the published total includes, so that a test compares like with like.
    published_rounding_b: half of the published figure's last digit, where that is more than 0.5 %.
    state_dict_params: elements of the public implementation's state dict: the transformers 5.17.0 class
    (Kimi-K2: that of DeepSeek-V3) built from these sizes on torch's meta device, parameters and persistent
    buffers added up. It tests the arithmetic, not the sizes. Llama 4's is its text model so counted plus
    `extra_params`.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    source: Annotated[str, Field(min_length=1, max_length=2000)]
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    hidden_size: _Size
    vocab_size: _Size
    tie_word_embeddings: bool
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 40)]
    attention: AttentionSpec
    moe: ExpertsSpec | None = None
    dense_intermediate_size: _SizeOrZero = 0
    gated_mlp: bool = True
    norm_bias: bool = False
    lm_head_bias: bool = False
    weight_dtype: Dtype = "bf16"
    expert_dtype: Dtype | None = None
    kv_dtype: Dtype = "bf16"
    activation_dtype: Dtype = "bf16"
    num_mtp_layers: Annotated[int, Field(ge=0, le=64)] = 0
    extra_params: Annotated[int, Field(ge=0, le=MAX_PARAMS)] = 0
    extra_params_reason: str = ""
    warnings: _Lines = ()
    published_total_params_b: Annotated[float, Field(gt=0)] | None = None
    published_active_params_b: Annotated[float, Field(gt=0)] | None = None
    published_rounding_b: Annotated[float, Field(ge=0)] = 0.0
    published_source: str = ""
    published_counts_embeddings: bool = True
    published_counts_mtp: bool = False
    state_dict_params: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.extra_params and not self.extra_params_reason:
            raise ValueError("extra_params needs extra_params_reason: say what they are")
        try:
            self.build()
        except BadInput as error:
            raise ValueError("; ".join(p.message for p in error.problems)) from None
        return self

    def build(self) -> MoEModel:
        """The model; raises BadInput where the numbers disagree."""
        kinds, windows = self._layer_kinds()
        experts = self.moe
        return MoEModel(
            name=self.name,
            source=self.source,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tie_word_embeddings,
            attention=self.attention.build(),
            attention_kind_of_layer=kinds,
            window_of_layer=windows,
            moe_layers=experts.moe_layers(self.num_layers) if experts else (),
            num_experts=experts.num_experts if experts else 0,
            top_k=experts.top_k if experts else 0,
            moe_intermediate_size=experts.intermediate_size if experts else 0,
            shared_intermediate_size=experts.shared_intermediate_size if experts else 0,
            shared_gate=experts.shared_gate if experts else False,
            dense_intermediate_size=self.dense_intermediate_size,
            gated_mlp=self.gated_mlp,
            num_expert_groups=experts.num_expert_groups if experts else 1,
            top_groups=experts.top_groups if experts else 1,
            scoring=experts.scoring if experts else "softmax",
            norm_topk_prob=experts.norm_topk_prob if experts else False,
            weight_dtype=self.weight_dtype,
            expert_dtype=self.expert_dtype or self.weight_dtype,
            kv_dtype=self.kv_dtype,
            activation_dtype=self.activation_dtype,
            max_position_embeddings=self.max_position_embeddings,
            num_mtp_layers=self.num_mtp_layers,
            extra_params=self.extra_params,
            router_dtype=experts.router_dtype if experts else "bf16",
            router_bias=experts.router_bias if experts else False,
            expert_bias=experts.expert_bias if experts else False,
            norm_bias=self.norm_bias,
            lm_head_bias=self.lm_head_bias,
            warnings=self.warnings,
        )

    def _layer_kinds(self) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
        pattern = self.attention.layer_pattern
        kinds = tuple(pattern[i % len(pattern)] for i in range(self.num_layers))
        return kinds, tuple(0 if kind == "full" else self.attention.window for kind in kinds)

    def with_dtypes(
        self,
        *,
        weight_dtype: Dtype | None = None,
        expert_dtype: Dtype | None = None,
        kv_dtype: Dtype | None = None,
        activation_dtype: Dtype | None = None,
    ) -> ModelSpec:
        """The same file with other dtypes; None keeps what is written.

        A weight_dtype alone leaves the experts as they were. Raises pydantic's ValidationError for a dtype of
        no use.
        """
        given: dict[str, Any] = {
            "weight_dtype": weight_dtype,
            "expert_dtype": expert_dtype or self.expert_dtype or self.weight_dtype,
            "kv_dtype": kv_dtype,
            "activation_dtype": activation_dtype,
        }
        return ModelSpec.model_validate(self.model_dump() | {k: v for k, v in given.items() if v is not None})
