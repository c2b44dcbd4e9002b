"""What the classes behind a `config.json` know and the config does not say: rows of a table, one a family.

The silent facts (biases, norms, how experts are scored) were read from the model classes of transformers
5.17.0, `models/<type>/modeling_<type>.py` and `configuration_<type>.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesim.architecture import LayerKind
from moesim.dtypes import Dtype

__all__ = ["DENSE_TYPES", "FAMILIES", "FLOATS", "KIND_OF", "NAMES", "REFUSED_KEYS", "REFUSED_TYPES", "Family"]


@dataclass(frozen=True)
class Family:
    """What a model class knows and its config does not say (or the default where it does)."""

    qkv_bias: bool = False
    o_bias: bool | None = None  # None: as qkv_bias
    qk_norm: Literal["", "head", "all"] = ""
    qk_norm_key: str = ""  # the flag that turns it on or off
    sigmoid: bool = False
    norm_topk: bool = False
    router_bias: bool = False
    router_fp32: bool = False
    expert_bias: bool = False
    shared_gate: bool = False
    sinks: bool = False
    norm_bias: bool = False
    lm_head_bias: bool = False
    tie: bool = False


_DEEPSEEK_V3 = Family(sigmoid=True, norm_topk=True, router_bias=True)
_QWEN3 = Family(qk_norm="head")
_LLAMA4 = Family(sigmoid=True)
_PHI = Family(qkv_bias=True, norm_bias=True, lm_head_bias=True)
_GRANITE = Family(norm_topk=True)
_DENSE = Family()
_GEMMA = Family(tie=True)
_QWEN2 = Family(qkv_bias=True, o_bias=False)
_HUNYUAN = Family(qk_norm="head", qk_norm_key="use_qk_norm", norm_topk=True, router_fp32=True)

FAMILIES: dict[str, Family] = {
    "mixtral": Family(norm_topk=True),
    "deepseek": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "glm_moe_dsa": _DEEPSEEK_V3,
    "qwen2_moe": Family(qkv_bias=True, o_bias=False, shared_gate=True),
    "qwen3_moe": _QWEN3,
    "qwen3_vl_moe_text": _QWEN3,
    "olmoe": Family(qk_norm="all"),
    "gpt_oss": Family(qkv_bias=True, sinks=True, router_bias=True, expert_bias=True, norm_topk=True),
    "glm4_moe": Family(
        qk_norm="head", qk_norm_key="use_qk_norm!", o_bias=False, sigmoid=True, norm_topk=True,
        router_bias=True, router_fp32=True,
    ),
    "dots1": Family(qk_norm="head", sigmoid=True, norm_topk=True, router_bias=True),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "phimoe": _PHI,
    "grinmoe": _PHI,
    "minimax_m2": Family(
        qk_norm="all", qk_norm_key="use_qk_norm", sigmoid=True, norm_topk=True, router_bias=True,
        router_fp32=True,
    ),
    "dbrx": Family(norm_topk=True),
    "hunyuan": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "ernie4_5_moe": Family(norm_topk=True, router_bias=True, router_fp32=True, tie=True),
    "switch_transformers": Family(tie=True, router_fp32=True),
    "llama": _DENSE,
    "mistral": _DENSE,
    "granite": _DENSE,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}  # fmt: skip

# Known types without experts; every other known type must say how many it has.
DENSE_TYPES = frozenset(
    ("llama", "mistral", "granite", "qwen2", "qwen3", "qwen3_vl_text", "gemma", "gemma2", "gemma3_text")
)

NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "num_heads": ("num_attention_heads", "n_heads", "n_head", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "attn_config.kv_n_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv", "kv_channels"),
    "num_experts": (
        "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts",
        "ffn_config.moe_num_experts",
    ),
    "top_k": (
        "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token", "experts_per_token",
        "num_selected_experts", "top_k_experts", "ffn_config.moe_top_k",
    ),
    "intermediate": ("intermediate_size", "ffn_hidden_size", "ffn_config.ffn_hidden_size", "d_ff"),
    "moe_intermediate_size": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared_count": (
        "n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts",
    ),
    "shared_size": ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"),
    "max_position_embeddings": (
        "max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "seq_length",
    ),
}  # fmt: skip

# A key whose presence (and truth) means layers this simulator has no model of.
REFUSED_KEYS: dict[str, str] = {
    "linear_num_key_heads": "linear-attention layers",
    "linear_attn_config": "linear-attention layers",
    "linear_conv_kernel_dim": "linear-attention layers",
    "mamba_d_state": "state-space layers",
    "mamba_d_ssm": "state-space layers",
    "mamba_num_heads": "state-space layers",
    "ssm_state_size": "state-space layers",
    "hybrid_override_pattern": "state-space layers",
    "compress_ratios": "compressed attention",
    "routed_expert_hidden_size": "experts narrower than the hidden state",
    "moe_latent_size": "experts narrower than the hidden state",
    "zero_expert_num": "experts that compute nothing",
    "use_cla": "keys and values shared between layers",
    "num_kv_shared_layers": "keys and values shared between layers",
    "global_head_dim": "heads that differ from layer to layer",
    "swa_num_key_value_heads": "heads that differ from layer to layer",
    "num_global_key_value_heads": "heads that differ from layer to layer",
    "attention_other_setting": "heads that differ from layer to layer",
    "attn_output_gate": "a gate on the attention output",
    "cross_attention_layers": "cross-attention layers",
}
REFUSED_TYPES: dict[str, str] = {
    "jetmoe": "experts inside attention",
    "kimi_linear": "linear-attention layers",
    "openmoe": "parts its config does not name",
    "minimax": "linear-attention layers",
    "qwen3_next": "linear-attention layers",
    "longcat_flash": "two attentions a layer",
}
KIND_OF: dict[str, LayerKind] = {
    "full_attention": "full",
    "attention": "full",
    "deepseek_sparse_attention": "full",  # DSA: a warning says so
    "sliding_attention": "window",
    "chunked_attention": "chunked",
}
FLOATS: dict[str, Dtype] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "bf16",  # no engine serves 32 bits unless told to
    "float": "bf16",
}
