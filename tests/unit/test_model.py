"""Parameters, bytes and products of every shipped model, and of models drawn at random."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moesim.errors import BadInput
from moesim.model import (
    Attention,
    Dtype,
    Gemm,
    ModelSpec,
    MoEModel,
    dtype_bytes,
    tensor_bytes,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "workloads" / "models").glob("*.yaml"))
FACTS = ROOT.parent / "shared" / "data" / "models.yaml"
# Names of shared/data/models.yaml whose shipped file is called otherwise.
ALIASES = {"minimax-m2.5": "minimax-m2"}


def read(name: str) -> tuple[ModelSpec, MoEModel]:
    data = yaml.safe_load((ROOT / "workloads" / "models" / f"{name}.yaml").read_text())
    spec = ModelSpec.model_validate(data)
    return spec, MoEModel.from_spec(spec)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    if not FACTS.exists():
        pytest.skip(f"{FACTS} is not here: the published totals cannot be compared")
    models: dict[str, Any] = yaml.safe_load(FACTS.read_text())["models"]
    return models


def test_enough_models_are_shipped() -> None:
    assert len(FILES) >= 24
    moe = [f.stem for f in FILES if read(f.stem)[1].is_moe]
    assert len(moe) >= 20
    assert len(FILES) - len(moe) >= 2


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
class TestShippedModel:
    def test_file_is_named_after_its_model(self, file: Path) -> None:
        assert read(file.stem)[0].name == file.stem == file.stem.lower()

    def test_total_equals_the_public_implementation(self, file: Path) -> None:
        spec, model = read(file.stem)
        if spec.state_dict_params is None:
            pytest.skip("no public implementation was counted for this model")
        assert model.total_params() == spec.state_dict_params

    def test_total_agrees_with_the_published_one(self, file: Path) -> None:
        spec, model = read(file.stem)
        assert spec.published_total_params_b is not None
        assert spec.published_source
        counted = model.total_params() + (model.mtp_params() if spec.published_counts_mtp else 0)
        if not spec.published_counts_embeddings:
            counted -= model.embedding_params() + model.lm_head_params()
        allowed = max(0.005 * spec.published_total_params_b, spec.published_rounding_b)
        assert counted / 1e9 == pytest.approx(spec.published_total_params_b, abs=allowed)

    def test_active_agrees_with_the_published_one(self, file: Path) -> None:
        spec, model = read(file.stem)
        if spec.published_active_params_b is None:
            pytest.skip("no active count is published")
        # Publishers count two, one or no embedding table, and round to as few as one digit.
        tables = (model.embedding_params() + model.lm_head_params() + model.extra_params) / 1e9
        published, active = spec.published_active_params_b, model.active_params() / 1e9
        slack = max(0.05 * published, 0.1)
        assert active - tables - slack <= published <= active + slack

    def test_dense_parts_and_experts_make_the_total(self, file: Path) -> None:
        model = read(file.stem)[1]
        dense = sum(part.params for part in model.dense_parts_rank(1))
        routed = model.num_moe_layers * model.num_experts * model.expert_params()
        assert dense + routed == model.total_params()

    def test_products_cover_every_matrix(self, file: Path) -> None:
        """Elements of all products but MLA's absorbed second copies = linear parameters of one TP rank."""
        model = read(file.stem)[1]
        covered = sum(g.n * g.k * g.layers for g in model.gemms(1) if g.phase != "decode")
        a = model.attention
        per_layer = model.attention_params() - 2 * model.final_norm_params()
        per_layer -= small_attention(a, model.hidden_size)
        shared = model.shared_params()
        router = model.num_experts * model.hidden_size
        linear = model.num_layers * per_layer + len(model.dense_layers) * model.dense_ffn_params()
        linear += model.num_moe_layers * (shared + router) + model.vocab_size * model.hidden_size
        assert covered == linear

    def test_every_tp_that_divides_the_heads_covers_the_model(self, file: Path) -> None:
        model = read(file.stem)[1]
        whole = {part.name: part.params for part in model.dense_parts_rank(1)}
        for tp in (2, 4, 8):
            if model.attention.num_heads % tp:
                continue
            shard = {part.name: part.params for part in model.dense_parts_rank(tp)}
            assert all(shard[name] * tp >= whole[name] for name in whole)
            assert model.weight_bytes_dense_rank(tp) < model.weight_bytes_dense_rank(1)

    def test_sources_are_said(self, file: Path) -> None:
        spec, model = read(file.stem)
        assert len(spec.source) > 20
        assert model.source == spec.source


def small_attention(a: Attention, hidden: int) -> int:
    """Biases, q/k norms, latent norms and sinks of one layer, written out once more."""
    small = hidden if a.o_bias else 0
    small += a.num_heads if a.sinks else 0
    if a.kind == "mla":
        return small + a.kv_lora_rank + (a.q_lora_rank or 0)
    if a.qkv_bias:
        small += (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    if a.qk_norm:
        small += 2 * a.head_dim if a.qk_norm_size == "head" else (a.num_heads + a.num_kv_heads) * a.head_dim
    return small


def test_published_totals_of_the_fact_sheet(facts: dict[str, Any]) -> None:
    compared = 0
    for name, entry in facts.items():
        published = entry.get("derived", {}).get("published_total_params_b")
        file = ROOT / "workloads" / "models" / f"{ALIASES.get(name, name)}.yaml"
        if published is None or not file.exists():
            continue
        assert read(file.stem)[1].total_params() / 1e9 == pytest.approx(published, rel=0.005), name
        compared += 1
    assert compared >= 8


def test_shapes_of_the_fact_sheet(facts: dict[str, Any]) -> None:
    """Every dimension both name agrees; Switch is left out, whose file lays two stacks end to end."""
    compared = 0
    for name, entry in facts.items():
        file = ROOT / "workloads" / "models" / f"{ALIASES.get(name, name)}.yaml"
        if not file.exists() or name == "switch-base-128":
            continue
        model, moe, attention = read(file.stem)[1], entry["moe"], entry["attention"]
        for key in ("num_layers", "hidden_size", "vocab_size", "tie_word_embeddings"):
            assert getattr(model, key) == entry[key], (name, key)
        assert model.num_experts == moe["num_experts"], name
        assert model.top_k == moe["top_k"], name
        assert model.moe_intermediate_size == moe["moe_intermediate_size"], name
        assert model.shared_intermediate_size == moe.get("shared_expert_intermediate_size", 0), name
        assert model.num_moe_layers == entry["derived"]["num_moe_layers"], name
        assert model.attention.kv_elements == attention["kv_cache_elems_per_token_per_layer"], name
        compared += 1
    assert compared >= 20


def test_moe_layers_of_interleaved_and_first_dense_models() -> None:
    assert read("llama-4-maverick")[1].moe_layers == tuple(range(1, 48, 2))
    assert read("llama-4-scout")[1].moe_layers == tuple(range(48))
    assert read("deepseek-v3")[1].moe_layers == tuple(range(3, 61))
    assert read("deepseek-v3")[1].dense_layers == (0, 1, 2)
    assert read("switch-base-128")[1].moe_layers == tuple(range(1, 24, 2))
    assert read("llama-3.1-8b")[1].moe_layers == ()


def test_windows_alternate_and_chunks_skip_every_fourth_layer() -> None:
    oss = read("gpt-oss-120b")[1]
    assert oss.attention_kind_of_layer[:3] == ("window", "full", "window")
    assert oss.window_of_layer[:3] == (128, 0, 128)
    assert oss.attention_kind_of_layer.count("window") == 18
    scout = read("llama-4-scout")[1]
    assert scout.attention_kind_of_layer[:5] == ("chunked", "chunked", "chunked", "full", "chunked")
    assert scout.window_of_layer.count(8192) == 36
    assert scout.window_of_layer.count(0) == 12


def test_products_of_deepseek_v3_by_hand() -> None:
    model = read("deepseek-v3")[1]
    products = {g.name: g for g in model.gemms(8)}
    assert products["qkv_a"] == Gemm("qkv_a", 1536 + 576, 7168, "fp8_block", "attention", 61)
    assert products["q_b"] == Gemm("q_b", 16 * 192, 1536, "fp8_block", "attention", 61)
    assert products["kv_b"] == Gemm("kv_b", 16 * 256, 512, "fp8_block", "attention", 61, 1, "prefill")
    assert products["k_up"] == Gemm("k_up", 512, 128, "bf16", "attention", 61, 16, "decode")
    assert products["v_up"] == Gemm("v_up", 128, 512, "bf16", "attention", 61, 16, "decode")
    assert products["o"] == Gemm("o", 7168, 16 * 128, "fp8_block", "attention", 61)
    assert products["router"] == Gemm("router", 256, 7168, "bf16", "moe", 58)
    assert products["shared_gate_up"] == Gemm("shared_gate_up", 512, 7168, "fp8_block", "moe", 58)
    assert products["shared_down"] == Gemm("shared_down", 7168, 256, "fp8_block", "moe", 58)
    assert products["dense_gate_up"] == Gemm("dense_gate_up", 2 * 2304, 7168, "fp8_block", "dense", 3)
    assert products["lm_head"] == Gemm("lm_head", 16160, 7168, "bf16", "head", 1)
    assert len(products) == len(model.gemms(8))


def test_products_of_qwen3_235b_replicate_kv_heads() -> None:
    model = read("qwen3-235b-a22b")[1]
    at = {tp: {g.name: g for g in model.gemms(tp)} for tp in (1, 4, 8)}
    assert at[1]["qkv"].n == (64 + 2 * 4) * 128
    assert at[4]["qkv"].n == (16 + 2 * 1) * 128
    assert at[8]["qkv"].n == (8 + 2 * 1) * 128
    assert at[8]["o"] == Gemm("o", 4096, 8 * 128, "bf16", "attention", 94)
    assert "dense_gate_up" not in at[1]
    assert "shared_down" not in at[1]


def test_products_of_dense_and_ungated_models() -> None:
    llama = {g.name: g for g in read("llama-3.1-8b")[1].gemms(1)}
    assert set(llama) == {"qkv", "o", "dense_gate_up", "dense_down", "lm_head"}
    assert llama["dense_gate_up"].n == 2 * 14336
    switch = {g.name: g for g in read("switch-base-128")[1].gemms(1)}
    assert switch["dense_up"].n == 3072
    assert switch["router"].dtype == "fp32"
    qwen = {g.name: g for g in read("qwen1.5-moe-a2.7b")[1].gemms(1)}
    assert qwen["shared_gate"] == Gemm("shared_gate", 1, 2048, "bf16", "moe", 24)


def test_kv_bytes_by_hand() -> None:
    v3 = read("deepseek-v3")[1]
    assert v3.kv_bytes_per_token(1) == (576 * 2,) * 61
    assert v3.kv_bytes_per_token(8) == (576 * 2,) * 61  # the latent is whole on every rank
    qwen = read("qwen3-235b-a22b")[1]
    assert qwen.kv_bytes_per_token(1) == (2 * 4 * 128 * 2,) * 94
    assert qwen.kv_bytes_per_token(4) == qwen.kv_bytes_per_token(8) == (2 * 1 * 128 * 2,) * 94
    assert qwen.with_dtypes(kv_dtype="fp8").kv_bytes_per_token(4)[0] == 256


def test_expert_bytes_by_hand() -> None:
    mixtral = read("mixtral-8x7b")[1]
    assert mixtral.expert_bytes() == 3 * 4096 * 14336 * 2
    v3 = read("deepseek-v3")[1]
    matrix = 7168 * 2048
    assert v3.expert_bytes() == 3 * (matrix + 4 * matrix // (128 * 128))
    oss = read("gpt-oss-120b")[1]  # 4-bit matrices, 16-bit biases
    assert oss.expert_bytes() == 3 * 2880 * 2880 * 17 // 32 + 2 * (2 * 2880 + 2880)


def test_deepseek_v3_in_bf16_is_twice_fp8() -> None:
    v3 = read("deepseek-v3")[1]
    wide = v3.with_dtypes(weight_dtype="bf16", expert_dtype="bf16")
    whole = [m.weight_bytes_dense_rank(1) + 58 * 256 * m.expert_bytes() for m in (v3, wide)]
    assert whole[1] == 2 * v3.total_params()
    assert whole[0] == pytest.approx(671.03e9 + 2 * 129280 * 7168, rel=0.001)  # embedding and head in bf16


def test_absorbed_copy_exists_for_mla_alone() -> None:
    assert read("deepseek-v3")[1].mla_absorbed_bytes_rank(8) == 61 * 512 * 16 * 256 * 2
    assert read("mixtral-8x7b")[1].mla_absorbed_bytes_rank(1) == 0


def test_mtp_module_of_deepseek_v3_is_beside_the_total() -> None:
    v3 = read("deepseek-v3")[1]
    # The report gives 14B for the module with its shared embedding and head (README of DeepSeek-V3): 11.6B + 1.85B.
    assert v3.mtp_params() / 1e9 == pytest.approx(11.6, abs=0.05)
    with_tables = v3.mtp_params() + v3.embedding_params() + v3.lm_head_params()
    assert with_tables / 1e9 == pytest.approx(14, abs=0.6)
    assert v3.total_params() + v3.mtp_params() > 682e9
    assert read("mixtral-8x7b")[1].mtp_params() == 0


@pytest.mark.parametrize(("name", "tp"), [("llama-4-scout", 3), ("qwen2-57b-a14b", 8), ("mixtral-8x7b", 0)])
def test_tp_that_does_not_divide_the_heads_is_refused(name: str, tp: int) -> None:
    with pytest.raises(BadInput, match=r"tp must divide the attention heads.*num_heads=\d+.*Use tp = 1"):
        read(name)[1].gemms(tp)


def test_tp_that_splits_kv_heads_unevenly_is_refused() -> None:
    with pytest.raises(BadInput, match=r"KV heads.*tp=7, num_kv_heads=4"):
        read("qwen2-57b-a14b")[1].kv_bytes_per_token(7)


# ---- dtypes ------------------------------------------------------------------------------------------------


def test_dtype_bytes_by_hand() -> None:
    assert dtype_bytes("fp8_block") == 1 + 4 / (128 * 128)
    assert dtype_bytes("mxfp4") == 17 / 32
    assert dtype_bytes("nvfp4") == 9 / 16
    assert [dtype_bytes(d) for d in ("fp32", "bf16", "fp16", "fp8", "int8")] == [4, 2, 2, 1, 1]
    assert all(dtype_bytes(d) > 0 for d in get_args(Dtype))
    with pytest.raises(BadInput, match="'fp7'"):
        dtype_bytes("fp7")


@given(st.integers(0, 1 << 45), st.sampled_from(get_args(Dtype)))
def test_tensor_bytes_round_up_by_less_than_one(elements: int, dtype: str) -> None:
    exact = elements * Fraction(dtype_bytes(dtype))
    assert 0 <= tensor_bytes(elements, dtype) - exact < 1


# ---- specs -------------------------------------------------------------------------------------------------


def spec_data(name: str = "deepseek-v3") -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((ROOT / "workloads" / "models" / f"{name}.yaml").read_text())
    return data


def test_with_dtypes_of_spec_and_model_agree() -> None:
    spec, model = read("qwen3-30b-a3b")
    changed = spec.with_dtypes(expert_dtype="nvfp4", kv_dtype="fp8")
    assert changed.build() == model.with_dtypes(expert_dtype="nvfp4", kv_dtype="fp8")
    assert spec.expert_dtype == "bf16"
    assert spec.with_dtypes() == spec.with_dtypes(weight_dtype="bf16")
    alone = spec.with_dtypes(weight_dtype="fp8").build()
    assert (alone.weight_dtype, alone.expert_dtype, alone.base_dtype) == ("fp8", "bf16", "bf16")


def test_expert_dtype_follows_the_weights_unless_given() -> None:
    data = spec_data() | {"expert_dtype": None, "weight_dtype": "fp8"}
    assert ModelSpec.model_validate(data).build().expert_dtype == "fp8"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 0}, "greater than or equal to 1"),
        ({"hidden_size": -5}, "greater than or equal to 1"),
        ({"hidden_size": True}, "valid integer"),
        ({"hidden_size": "7168"}, "valid integer"),
        ({"hidden_size": 7168.0}, "valid integer"),
        ({"hidden_size": float("nan")}, "valid integer"),
        ({"hidden_size": 10**30}, "less than or equal"),
        ({"num_layers": 10**9}, "less than or equal"),
        ({"hiden_size": 4}, "Extra inputs are not permitted"),
        ({"weight_dtype": "fp5"}, "Input should be"),
        ({"kv_dtype": "mxfp4"}, "kv_dtype must be one of"),
        ({"activation_dtype": "fp8"}, "activation_dtype must be one of"),
        ({"extra_params": 5}, "extra_params_reason"),
        ({"dense_intermediate_size": 0}, "3 of|dense layers needs"),
        ({"moe": None}, "dense|dense_intermediate_size"),
    ],
)
def test_broken_model_files_are_refused(change: dict[str, Any], says: str) -> None:
    if change == {"moe": None}:
        change = {"moe": None, "dense_intermediate_size": 0}
    with pytest.raises(ValidationError, match=says):
        ModelSpec.model_validate(spec_data() | change)


@pytest.mark.parametrize(
    ("block", "change", "says"),
    [
        ("moe", {"top_k": 257}, "top_k must be from 1 to the number of experts: top_k=257, num_experts=256"),
        ("moe", {"num_expert_groups": 7}, "expert groups must divide"),
        ("moe", {"top_groups": 9}, "chosen groups"),
        ("moe", {"num_experts": 16, "num_expert_groups": 8, "top_groups": 1}, "hold top_k experts"),
        ("moe", {"layers": [5, 5], "first_dense_layers": 0}, "distinct"),
        ("moe", {"layers": [61], "first_dense_layers": 0}, "below 61"),
        ("moe", {"layers": [9, 4], "first_dense_layers": 0}, "ascend"),
        ("moe", {"layers": [4]}, "not both"),
        ("attention", {"num_kv_heads": 4}, "has no num_kv_heads"),
        ("attention", {"kv_lora_rank": None}, "needs kv_lora_rank"),
        ("attention", {"kind": "gqa"}, "needs num_kv_heads, head_dim"),
        ("attention", {"layer_pattern": ["window"]}, "window of at least 1 token"),
        ("attention", {"layer_pattern": []}, "at least 1 item"),
        ("attention", {"layer_pattern": ["linear"]}, "Input should be"),
    ],
)
def test_disagreeing_blocks_are_refused(block: str, change: dict[str, Any], says: str) -> None:
    data = spec_data()
    data[block] = data[block] | change
    with pytest.raises(ValidationError, match=says):
        ModelSpec.model_validate(data)


def test_kv_heads_must_divide_the_heads() -> None:
    data = spec_data("mixtral-8x7b")
    data["attention"] |= {"num_kv_heads": 5}
    with pytest.raises(ValidationError, match="num_kv_heads=5, num_heads=32"):
        ModelSpec.model_validate(data)


def test_a_model_made_by_hand_is_checked_too() -> None:
    model = read("mixtral-8x7b")[1]
    with pytest.raises(BadInput) as caught:
        dataclasses.replace(model, top_k=9, window_of_layer=(0,), num_experts=8)
    assert {p.where for p in caught.value.problems} == {"mixtral-8x7b.top_k", "mixtral-8x7b.window_of_layer"}


# ---- any model ---------------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> MoEModel:
    heads = 2 ** draw(st.integers(0, 5))
    hidden = 8 * draw(st.integers(1, 64))
    layers = draw(st.integers(1, 12))
    if draw(st.booleans()):
        attention = {
            "kind": "gqa", "num_heads": heads, "num_kv_heads": 2 ** draw(st.integers(0, heads.bit_length() - 1)),
            "head_dim": draw(st.sampled_from([8, 64, 80])), "qk_norm": draw(st.booleans()),
            "qk_norm_size": draw(st.sampled_from(["head", "all"])), "sinks": draw(st.booleans()),
            "layer_pattern": draw(st.sampled_from([["full"], ["window", "full"], ["chunked"]])), "window": 128,
        }  # fmt: skip
    else:
        attention = {
            "kind": "mla", "num_heads": heads, "q_lora_rank": draw(st.sampled_from([None, 24])),
            "kv_lora_rank": draw(st.integers(1, 64)), "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        }  # fmt: skip
    attention |= {"qkv_bias": draw(st.booleans()), "o_bias": draw(st.booleans())}
    moe = None
    if draw(st.booleans()):
        experts = draw(st.integers(1, 40))
        step = draw(st.integers(1, layers))
        moe = {
            "num_experts": experts, "top_k": draw(st.integers(1, experts)),
            "intermediate_size": draw(st.integers(1, 99)),
            "shared_intermediate_size": draw(st.integers(0, 99)), "shared_gate": draw(st.booleans()),
            "layer_step": step, "router_bias": draw(st.booleans()), "expert_bias": draw(st.booleans()),
            "router_dtype": draw(st.sampled_from(["bf16", "fp32"])),
        }  # fmt: skip
    dtypes = st.sampled_from(get_args(Dtype))
    return ModelSpec.model_validate({
        "name": "drawn", "source": "drawn", "num_layers": layers, "hidden_size": hidden,
        "vocab_size": draw(st.integers(1, 3000)), "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": 4096, "attention": attention, "moe": moe,
        "dense_intermediate_size": draw(st.integers(1, 300)), "gated_mlp": draw(st.booleans()),
        "norm_bias": draw(st.booleans()), "lm_head_bias": draw(st.booleans()),
        "num_mtp_layers": draw(st.integers(0, 2)),
        "extra_params": draw(st.sampled_from([0, 77])), "extra_params_reason": "drawn",
        "weight_dtype": draw(dtypes), "expert_dtype": draw(dtypes),
    }).build()  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(models())
def test_the_total_is_the_sum_of_its_parts(model: MoEModel) -> None:
    routed = model.num_moe_layers * model.num_experts * model.expert_params()
    assert sum(part.params for part in model.dense_parts_rank(1)) + routed == model.total_params()
    assert (
        model.active_params() + model.num_moe_layers * ((model.num_experts - model.top_k) * model.expert_params())
        == model.total_params()
    )
    assert 0 < model.active_params() <= model.total_params()


@settings(max_examples=150, deadline=None)
@given(models())
def test_bytes_are_parameters_times_their_dtype(model: MoEModel) -> None:
    parts = model.dense_parts_rank(1)
    exact = sum(part.params * Fraction(dtype_bytes(part.dtype)) for part in parts)
    assert 0 <= model.weight_bytes_dense_rank(1) - exact < len(parts)
    in_16_bits = model.with_dtypes(weight_dtype="bf16", expert_dtype="bf16")
    bytes_ = in_16_bits.weight_bytes_dense_rank(1)
    bytes_ += in_16_bits.num_moe_layers * in_16_bits.num_experts * in_16_bits.expert_bytes()
    router = in_16_bits.num_moe_layers * in_16_bits.router_params()
    extra = 2 * router if in_16_bits.router_dtype == "fp32" else 0
    assert bytes_ == 2 * model.total_params() + extra


@settings(max_examples=150, deadline=None)
@given(models(), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_shards_cover_every_part(model: MoEModel, tp: int) -> None:
    if model.attention.num_heads % tp:
        with pytest.raises(BadInput):
            model.dense_parts_rank(tp)
        return
    whole = {part.name: part.params for part in model.dense_parts_rank(1)}
    shard = {part.name: part.params for part in model.dense_parts_rank(tp)}
    assert set(whole) == set(shard)
    assert all(whole[name] <= shard[name] * tp for name in whole)
    assert all(shard[name] <= whole[name] for name in whole)
    for name in ("final_norm", "router", "shared_gate", "extra"):
        assert shard.get(name) == whole.get(name)
    kv = model.kv_bytes_per_token(tp)
    assert len(kv) == model.num_layers
    assert tp * kv[0] >= model.kv_bytes_per_token(1)[0] >= kv[0] > 0


@settings(max_examples=100, deadline=None)
@given(models())
def test_products_and_linear_parts_agree(model: MoEModel) -> None:
    of = dict.fromkeys(("attention", "moe", "dense", "head"), 0)
    for g in model.gemms(1):
        of[g.where] += g.n * g.k * g.layers if g.phase != "decode" else 0
        assert g.n > 0 < g.k
        assert g.layers > 0 < g.batch
    part = {p.name: p.params for p in model.dense_parts_rank(1)}
    assert of["attention"] == part["attention"]
    assert of["dense"] == part.get("dense_ffn", 0)
    assert of["head"] == model.vocab_size * model.hidden_size
    if model.shared_intermediate_size or not model.is_moe:
        biases = model.num_moe_layers * model.num_experts if model.router_bias else 0
        moe = part.get("shared_experts", 0) + part.get("shared_gate", 0) + part.get("router", 0) - biases
        assert of["moe"] == moe
