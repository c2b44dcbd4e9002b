"""Hugging Face configs: every family against the shipped model, quantisation, and everything that can be wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.model import ModelSpec, MoEModel, from_hf_config, read_hf_config
from moesim.strict_json import MAX_JSON_BYTES, parse_json

MODELS = Path(__file__).parents[2] / "workloads" / "models"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# Sizes as the files of workloads/models/ give them (sources there), under the keys of each family's config.json.
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "vocab_size": 129280,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "intermediate_size": 18432, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid",
    "norm_topk_prob": True, "num_nextn_predict_layers": 1, "max_position_embeddings": 163840,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False, "quantization_config": FP8,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "vocab_size": 151936,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "max_position_embeddings": 40960, "use_sliding_window": False,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "vocab_size": 201088,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
    "num_experts_per_tok": 4, "experts_per_token": 4, "intermediate_size": 2880, "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}  # fmt: skip
LLAMA4: dict[str, Any] = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text", "num_hidden_layers": 48, "hidden_size": 5120, "vocab_size": 202048,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 128,
        "num_experts_per_tok": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 8192, "max_position_embeddings": 1048576,
        "torch_dtype": "bfloat16",
    },
    "vision_config": {"hidden_size": 1408},
}  # fmt: skip
DBRX: dict[str, Any] = {
    "model_type": "dbrx", "n_layers": 40, "d_model": 6144, "n_heads": 48, "vocab_size": 100352,
    "max_seq_len": 32768, "attn_config": {"kv_n_heads": 8, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
SWITCH: dict[str, Any] = {
    "model_type": "switch_transformers", "num_layers": 12, "num_decoder_layers": 12, "d_model": 768, "d_kv": 64,
    "d_ff": 3072, "num_heads": 12, "num_experts": 128, "num_selected_experts": 1, "encoder_sparse_step": 2,
    "decoder_sparse_step": 2, "relative_attention_num_buckets": 32, "vocab_size": 32128, "is_gated_act": False,
    "is_encoder_decoder": True, "torch_dtype": "float32",
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "attention_bias": False,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": MIXTRAL,
    "deepseek-v3": DEEPSEEK_V3,
    "kimi-k2": DEEPSEEK_V3 | {
        "model_type": "kimi_k2", "num_attention_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "vocab_size": 163840, "max_position_embeddings": 131072,
        "num_nextn_predict_layers": 0,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "num_hidden_layers": 27, "hidden_size": 2048, "vocab_size": 102400,
        "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "intermediate_size": 10944, "n_group": 1, "topk_group": 1, "scoring_func": "softmax",
        "norm_topk_prob": False, "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
    },
    "qwen3-30b-a3b": QWEN3_MOE,
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe", "num_hidden_layers": 24, "hidden_size": 2048, "vocab_size": 151936,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "intermediate_size": 5632,
        "decoder_sparse_step": 1, "norm_topk_prob": False, "max_position_embeddings": 8192,
        "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21, "torch_dtype": "bfloat16",
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "num_hidden_layers": 16, "hidden_size": 2048, "vocab_size": 50304,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "intermediate_size": 1024, "norm_topk_prob": False, "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    },
    "gpt-oss-20b": GPT_OSS,
    "glm-4.5": {
        "model_type": "glm4_moe", "num_hidden_layers": 92, "hidden_size": 5120, "vocab_size": 151552,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 160,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
        "first_k_dense_replace": 3, "intermediate_size": 12288, "attention_bias": True, "use_qk_norm": True,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    },
    "llama-4-maverick": LLAMA4,
    "phi-3.5-moe": {
        "model_type": "phimoe", "num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32064,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2,
        "intermediate_size": 6400, "attention_bias": True, "lm_head_bias": True,
        "max_position_embeddings": 131072, "sliding_window": 131072, "torch_dtype": "bfloat16",
    },
    "minimax-m2": {
        "model_type": "minimax_m2", "num_hidden_layers": 62, "hidden_size": 3072, "vocab_size": 200064,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256,
        "num_experts_per_tok": 8, "intermediate_size": 1536, "shared_intermediate_size": 0, "use_qk_norm": True,
        "scoring_func": "sigmoid", "use_routing_bias": True, "num_mtp_modules": 3,
        "max_position_embeddings": 196608, "quantization_config": FP8 | {"modules_to_not_convert": ["gate"]},
        "attn_type_list": [1] * 62,
    },
    "dbrx": DBRX,
    "hunyuan-a13b": {
        "model_type": "hunyuan_v1_moe", "num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 128167,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_experts": 64,
        "moe_topk": [8] * 32, "num_shared_expert": [1] * 32, "moe_intermediate_size": [3072] * 32,
        "intermediate_size": 3072, "use_qk_norm": True, "use_cla": False, "max_position_embeddings": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
    "granite-powermoe-3b": {
        "model_type": "granitemoe", "num_hidden_layers": 32, "hidden_size": 1536, "vocab_size": 49152,
        "num_attention_heads": 24, "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8,
        "intermediate_size": 512, "max_position_embeddings": 4096, "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    "switch-base-128": SWITCH,
    "llama-3.1-8b": LLAMA,
    "qwen3-8b": {
        "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "vocab_size": 151936,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 36,
    },
}  # fmt: skip


def shipped(name: str) -> MoEModel:
    return ModelSpec.model_validate(yaml.safe_load((MODELS / f"{name}.yaml").read_text())).build()


def without_words(model: MoEModel, extra: int) -> MoEModel:
    return dataclasses.replace(model, name="m", source="s", warnings=(), extra_params=extra)


def read(config: dict[str, Any], **changes: Any) -> MoEModel:
    return from_hf_config(config | changes, "config.json", "m")


def refused(config: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read(config, **changes)
    assert all(p.where == "config.json" for p in caught.value.problems)
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_config_gives_the_shipped_model(name: str) -> None:
    model = from_hf_config(copy.deepcopy(FAMILIES[name]), "config.json", name)
    # Vision towers stand in the shipped files only; everything else must be the same.
    assert without_words(model, 0) == without_words(shipped(name), 0)
    if name != "llama-4-maverick":
        assert model.extra_params == shipped(name).extra_params


def test_what_was_left_aside_is_said() -> None:
    assert any("vision_config" in w for w in from_hf_config(LLAMA4, "c", "m").warnings)
    assert any("cross-attention" in w for w in from_hf_config(SWITCH, "c", "m").warnings)
    assert any("float32" in w for w in from_hf_config(SWITCH, "c", "m").warnings)
    assert from_hf_config(MIXTRAL, "c", "m").warnings == ()
    sparse = read(DEEPSEEK_V3, model_type="deepseek_v32", index_topk=2048)
    assert any("sparse attention" in w for w in sparse.warnings)


def test_an_unknown_type_is_read_by_its_keys_and_says_so() -> None:
    model = read(QWEN3_MOE, model_type="nextbest_moe")
    assert any("'nextbest_moe' is not known" in w for w in model.warnings)
    assert model.num_experts == 128
    assert model.attention.qk_norm is False
    assert read(LLAMA, model_type=None).total_params() == shipped("llama-3.1-8b").total_params()


def test_both_names_of_the_experts_must_agree() -> None:
    assert read(MIXTRAL, num_experts=8).num_experts == 8
    assert "num_experts = 16 disagrees with num_local_experts = 8" in refused(MIXTRAL, num_experts=16)


# ---- layers ------------------------------------------------------------------------------------------------


def test_moe_layers_however_they_are_said() -> None:
    base = QWEN3_MOE | {"num_hidden_layers": 6}
    assert read(base, decoder_sparse_step=2).moe_layers == (1, 3, 5)
    assert read(base, decoder_sparse_step=2, mlp_only_layers=[3]).moe_layers == (1, 5)
    assert read(base, mlp_layer_types=["dense"] * 2 + ["sparse"] * 4).moe_layers == (2, 3, 4, 5)
    assert read(base, moe_layer_freq=[0, 1, 1, 0, 1, 1]).moe_layers == (1, 2, 4, 5)
    assert read(base, first_k_dense_replace=1, moe_layer_freq=2).moe_layers == (2, 4)
    assert read(base, moe_layer_start_index=1, moe_layer_end_index=3).moe_layers == (1, 2, 3)
    assert read(base, moe_layers=[5, 0]).moe_layers == (0, 5)


def test_moe_layers_out_of_range_or_none() -> None:
    base = QWEN3_MOE | {"num_hidden_layers": 6}
    assert "moe_layers: layers are numbered from 0 to 5" in refused(base, moe_layers=[6])
    assert "no layer has them" in refused(base, first_k_dense_replace=6)
    assert "one value a layer" in refused(base, moe_layer_freq=[1, 1])


def test_attention_kinds_however_they_are_said() -> None:
    base = LLAMA | {"num_hidden_layers": 4}
    assert read(base).window_of_layer == (0, 0, 0, 0)
    mistral = read(base, model_type="mistral", sliding_window=4096)
    assert mistral.window_of_layer == (4096,) * 4
    qwen = read(base, model_type="qwen2", sliding_window=4096, use_sliding_window=True, max_window_layers=3)
    assert qwen.attention_kind_of_layer == ("full", "full", "full", "window")
    gemma = read(base, sliding_window=512, sliding_window_pattern=2)
    assert gemma.window_of_layer == (512, 0, 512, 0)
    every = {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]}
    llama4 = from_hf_config(LLAMA4["text_config"] | every, "c", "m")
    assert llama4.window_of_layer == (8192, 0, 8192, 8192)
    oss = {k: v for k, v in GPT_OSS.items() if k != "layer_types"}
    assert from_hf_config(oss, "c", "m").window_of_layer == (128, 0) * 12


def test_a_window_longer_than_the_context_is_full_attention() -> None:
    assert set(read(LLAMA, model_type="mistral", sliding_window=131072).window_of_layer) == {0}


def test_windows_must_be_given_and_known() -> None:
    assert "sliding_window: missing" in refused(GPT_OSS, sliding_window=None)
    kinds = ["full_attention"] * 31 + ["conv"]
    assert "'conv' layers are not modelled" in refused(LLAMA, layer_types=kinds)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "jetmoe"}, "model_type"),
        ({"model_type": "qwen3_next"}, "model_type"),
        ({"linear_num_key_heads": 16}, "linear_num_key_heads"),
        ({"linear_attn_config": {"full_attn_layers": [4]}}, "linear_attn_config"),
        ({"attn_type_list": [0, 1]}, "attn_type_list"),
        ({"attn_type_list": 7}, "attn_type_list"),
        ({"mamba_d_state": 16}, "mamba_d_state"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
        ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"zero_expert_num": 256}, "zero_expert_num"),
        ({"use_cla": True}, "use_cla"),
        ({"global_head_dim": 512}, "global_head_dim"),
        ({"routed_expert_hidden_size": 3584}, "routed_expert_hidden_size"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_architectures_without_a_model_are_refused(change: dict[str, Any], key: str) -> None:
    assert f"{key}: not modelled" in refused(MIXTRAL, **change)


def test_harmless_mentions_of_them_are_not() -> None:
    quiet = {"use_cla": False, "num_kv_shared_layers": 0, "compress_ratios": [], "is_encoder_decoder": False}
    assert read(MIXTRAL, **quiet) == read(MIXTRAL)


# ---- quantisation ------------------------------------------------------------------------------------------


def dtypes(config: dict[str, Any], **quant: Any) -> tuple[str, str, str]:
    model = read(config, quantization_config=quant)
    return model.weight_dtype, model.expert_dtype, model.kv_dtype


def test_quantisation_of_weights_and_experts() -> None:
    assert dtypes(QWEN3_MOE, **FP8) == ("fp8_block", "fp8_block", "bf16")
    assert dtypes(QWEN3_MOE, quant_method="fp8") == ("fp8", "fp8", "bf16")
    assert dtypes(GPT_OSS, quant_method="mxfp4") == ("bf16", "mxfp4", "bf16")
    assert dtypes(QWEN3_MOE, quant_method="gptq", bits=4, group_size=128) == ("int4", "int4", "bf16")
    assert dtypes(QWEN3_MOE, quant_method="gptq", bits=8) == ("int8", "int8", "bf16")
    assert dtypes(QWEN3_MOE, quant_method="awq", bits=4) == ("int4", "int4", "bf16")
    assert dtypes(QWEN3_MOE, quant_method="bitsandbytes", load_in_4bit=True)[0] == "int4"
    assert dtypes(QWEN3_MOE) == ("bf16", "bf16", "bf16")


def test_quantisation_of_the_cache() -> None:
    modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}
    assert dtypes(QWEN3_MOE, **modelopt) == ("nvfp4", "nvfp4", "fp8")
    scheme = {"num_bits": 8, "type": "float"}
    assert dtypes(QWEN3_MOE, **FP8, kv_cache_scheme=scheme)[2] == "fp8"


def compressed(bits: int, kind: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def test_compressed_tensors() -> None:
    assert dtypes(QWEN3_MOE, **compressed(8, "float"))[1] == "fp8"
    assert dtypes(QWEN3_MOE, **compressed(8, "float", strategy="block"))[1] == "fp8_block"
    assert dtypes(QWEN3_MOE, **compressed(8, "int"))[1] == "int8"
    assert dtypes(QWEN3_MOE, **compressed(4, "int", group_size=32))[1] == "int4"
    assert dtypes(QWEN3_MOE, **compressed(4, "float", group_size=16))[1] == "nvfp4"
    assert dtypes(QWEN3_MOE, **compressed(4, "float", group_size=32))[1] == "mxfp4"


def test_modules_left_alone_keep_their_dtype() -> None:
    kimi = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    assert dtypes(DEEPSEEK_V3, **compressed(4, "int"), ignore=kimi) == ("bf16", "int4", "bf16")
    # Norms, gates and an indexer inside attention are not attention's matrices.
    small = ["lm_head", "model.layers.60.self_attn.q_a_layernorm", "model.layers.60.self_attn.indexers_proj",
             "model.layers.60.mlp.gate"]  # fmt: skip
    assert dtypes(DEEPSEEK_V3, **FP8, modules_to_not_convert=small)[0] == "fp8_block"
    nested = [f"language_model.model.layers.{i}.self_attn*" for i in range(61)]
    model = read(DEEPSEEK_V3, quantization_config=FP8 | {"modules_to_not_convert": nested})
    assert (model.weight_dtype, model.expert_dtype) == ("bf16", "fp8_block")
    assert any("quantised differently" in w for w in model.warnings)
    experts = [f"model.layers.{i}.mlp.experts" for i in range(61)]
    assert dtypes(DEEPSEEK_V3, **FP8, modules_to_not_convert=experts) == ("fp8_block", "bf16", "bf16")
    # Layer 6 does not stand for layer 60.
    assert dtypes(DEEPSEEK_V3, **FP8, modules_to_not_convert=["model.layers.6"])[0] == "fp8_block"


@pytest.mark.parametrize(
    ("quant", "key"),
    [
        ({"quant_method": "magic"}, "quant_method"),
        ({"quant_method": 5}, "quant_method"),
        ({}, None),
        ({"bits": 4}, "quant_method"),
        ({"quant_method": "gptq", "bits": 3}, "bits"),
        ({"quant_method": "gptq", "bits": True}, "bits"),
        ({"quant_method": "gptq"}, "w_bit"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo"),
        ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, "quant_algo"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": 3}}, "config_groups.a"),
        (compressed(2, "int"), "config_groups.group_0.weights"),
        ({"quant_method": "fp8", "kv_cache_quant_algo": "FP3"}, "kv_cache_quant_algo"),
        ({"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 5}}, "kv_cache_scheme"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"quant_method": "fp8", "modules_to_not_convert": [3]}, "modules_to_not_convert"),
    ],
)
def test_quantisation_of_unknown_size_is_refused(quant: dict[str, Any], key: str | None) -> None:
    if key is None:
        assert dtypes(QWEN3_MOE, **quant) == ("bf16", "bf16", "bf16")
    else:
        assert f"quantization_config.{key}: " in refused(QWEN3_MOE, quantization_config=quant)


def test_a_quantisation_that_is_no_object_is_refused() -> None:
    assert "quantization_config: an object is needed" in refused(QWEN3_MOE, quantization_config="fp8")


# ---- wrong values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: a number from 1 to 4096 is needed, got 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: a number from 1 to 4096"),
        ({"hidden_size": -4096}, "hidden_size: a number from 1"),
        ({"hidden_size": float("nan")}, "hidden_size: a whole number is needed, got nan"),
        ({"hidden_size": float("inf")}, "hidden_size: a whole number is needed, got inf"),
        ({"hidden_size": 4096.5}, "hidden_size: a whole number"),
        ({"hidden_size": True}, "hidden_size: a whole number is needed, got True"),
        ({"hidden_size": "4096"}, "hidden_size: a whole number is needed, got '4096'"),
        ({"hidden_size": [4096]}, None),
        ({"hidden_size": [4096, 2048]}, "hidden_size: one whole number"),
        ({"hidden_size": {}}, "hidden_size: a whole number"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: top_k must be from 1 to the number of experts: top_k=9"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok: missing"),
        ({"num_local_experts": None}, "n_routed_experts: missing"),
        ({"num_local_experts": None, "model_type": "new"}, "the number of experts is missing"),
        ({"num_local_experts": None, "num_experts_per_tok": None, "model_type": "new", "f": {"moe_k": 2}}, "moe_k: 2"),
        ({"num_local_experts": -8}, "num_local_experts: a number from 0"),
        ({"num_attention_heads": 33}, "heads must divide the hidden size"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: KV heads must divide"),
        ({"intermediate_size": None}, "moe_intermediate_size: missing"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: true or false"),
        ({"torch_dtype": "int3"}, "torch_dtype: one of"),
        ({"torch_dtype": 16}, "torch_dtype: a text"),
        ({"scoring_func": "sqrtsoftplus"}, "scoring_func: softmax or sigmoid"),
        ({"model_type": ["mixtral"]}, "model_type: a text"),
        ({"n_group": 3}, "n_group: expert groups must divide"),
        ({"n_group": 4, "topk_group": 5}, "topk_group: the chosen groups"),
        ({"layer_types": [1] * 32}, "layer_types: a list of str"),
        ({"layer_types": ["full_attention"]}, "1 values for 32 layers"),
        ({"v_head_dim": 64}, "v_head_dim: GQA with values of another size"),
        ({"text_config": 3}, "text_config: an object"),
        ({"vocab_size": 1 << 40}, "vocab_size: a number from 1"),
    ],
)
def test_wrong_values_name_the_key(change: dict[str, Any], says: str | None) -> None:
    if says is None:
        assert read(MIXTRAL, **change) == read(MIXTRAL)
    else:
        assert says in refused(MIXTRAL, **change)


def test_all_wrong_keys_come_at_once() -> None:
    text = refused(MIXTRAL, hidden_size=-1, vocab_size="many", num_experts_per_tok=None)
    assert len(text.splitlines()) == 3


def test_mla_needs_all_its_parts() -> None:
    for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert f"{key}: missing" in refused(DEEPSEEK_V3, **{key: None})


@pytest.mark.parametrize("config", [None, [], "x", 3, float("nan")])
def test_a_config_is_an_object(config: Any) -> None:
    with pytest.raises(BadInput, match="JSON object"):
        from_hf_config(config, "config.json", "m")


def outcome(config: dict[str, Any]) -> MoEModel | BadInput:
    try:
        return from_hf_config(config, "config.json", "m")
    except BadInput as error:
        return error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_any_value_anywhere_gives_a_model_or_a_clear_refusal(name: str, data: st.DataObject) -> None:
    config = copy.deepcopy(FAMILIES[name])
    holder = config
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(holder)))
        if isinstance(holder[key], dict) and holder[key] and data.draw(st.booleans()):
            holder = holder[key]
            key = data.draw(st.sampled_from(sorted(holder)))
        if data.draw(st.booleans()):
            holder[key] = data.draw(JSON)
        else:
            del holder[key]
            holder["something_else"] = 1
    got = outcome(config)
    if isinstance(got, BadInput):
        assert got.problems
        assert all(p.where == "config.json" and p.message for p in got.problems)
    else:
        assert got.total_params() > 0
        assert len(got.kv_bytes_per_token(1)) == got.num_layers


# ---- files -------------------------------------------------------------------------------------------------


def write(folder: Path, text: str | bytes, name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_file_or_its_folder_is_read_and_named(tmp_path: Path) -> None:
    file = write(tmp_path / "mixtral", json.dumps(MIXTRAL))
    model = read_hf_config(file)
    assert model.name == "mixtral"
    assert str(file) in model.source
    assert read_hf_config(file.parent) == model
    assert read_hf_config(str(file), "other").name == "other"
    assert read_hf_config(write(tmp_path, json.dumps(MIXTRAL), "mine.json")).name == "mine"


def test_a_quantisation_beside_the_config_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "q", json.dumps(QWEN3_MOE))
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    write(tmp_path / "q", json.dumps(beside), "hf_quant_config.json")
    model = read_hf_config(file)
    assert (model.weight_dtype, model.kv_dtype) == ("fp8", "fp8")
    write(tmp_path / "q", "{}", "hf_quant_config.json")
    with pytest.raises(BadInput, match="`quantization`"):
        read_hf_config(file)


def test_a_wrong_key_is_found_on_its_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        json.dumps(DBRX | {"ffn_config": {"moe_num_experts": 16, "ffn_hidden_size": 4, "moe_top_k": 0}}, indent=1),
    )
    line = 1 + next(i for i, t in enumerate(file.read_text().splitlines()) if "moe_top_k" in t)
    with pytest.raises(BadInput) as caught:
        read_hf_config(file)
    places = {str(p).split(": ")[1]: p.where for p in caught.value.problems}
    assert places["ffn_config.moe_top_k"] == f"{file}:{line}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ('{"a": 1,}', "not JSON"),
        ('{"a": 1', "not JSON"),
        ('{"hidden_size": NaN}', "NaN is not JSON"),
        ('{"hidden_size": -Infinity}', "-Infinity is not JSON"),
        ('{"hidden_size": 1e999}', "finite"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' stands twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' stands twice"),
        ("[" * 100_000, "nest 64 levels"),
        ('{"a":' * 100_000, "nest 64 levels"),
        ("[1]", "JSON object"),
        (b'{"a": "\xff"}', "UTF-8"),
    ],
)
def test_files_that_are_not_strict_json(tmp_path: Path, text: str | bytes, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(BadInput, match=says) as caught:
        read_hf_config(file)
    assert caught.value.problems[0].where.startswith(str(file))


def test_syntax_errors_have_line_and_column(tmp_path: Path) -> None:
    file = write(tmp_path, '{\n "a": 1,\n "b" 2}')
    with pytest.raises(BadInput) as caught:
        read_hf_config(file)
    assert caught.value.problems[0].where == f"{file}:3:6"


def test_large_missing_and_odd_files(tmp_path: Path) -> None:
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(BadInput, match="at most 16777216 bytes"):
        read_hf_config(big)
    with pytest.raises(BadInput, match="No such file"):
        read_hf_config(tmp_path / "none.json")
    with pytest.raises(BadInput, match="No such file"):
        read_hf_config(tmp_path)
    with pytest.raises(BadInput, match="regular file"):
        read_hf_config("/dev/zero")
    with pytest.raises(BadInput, match="cannot be read"):
        read_hf_config("a\0b")


def test_brackets_in_strings_are_no_depth_and_open_strings_end() -> None:
    assert parse_json(json.dumps({"a": "[" * 500}), "w") == {"a": "[" * 500}
    assert parse_json(r'{"a\"[": "\\"}', "w") == {'a"[': "\\"}
    with pytest.raises(BadInput, match="not JSON"):
        parse_json('"' + '\\"' * 500_000, "w")  # quadratic if every escaped quote started a new search


@settings(max_examples=200, deadline=None)
@given(JSON.filter(lambda v: "nan" not in repr(v) and "inf" not in repr(v)))
def test_plain_json_comes_back_as_it_was(value: Any) -> None:
    assert parse_json(json.dumps(value), "w") == value
