"""When the numbers of a model agree: every rule `MoEModel` holds itself to, as (field, message) pairs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, get_args

from moesim.dtypes import FLOAT_DTYPES, KV_DTYPES, Dtype

if TYPE_CHECKING:
    from moesim.architecture import Attention, MoEModel

__all__ = ["MAX_DIMENSION", "MAX_EXPERTS", "MAX_LAYERS", "MAX_PARAMS", "disagreements"]

MAX_LAYERS = 4096
MAX_EXPERTS = 65_536
MAX_DIMENSION = 1 << 24
MAX_PARAMS = 1 << 60
LAYER_KINDS = ("full", "window", "chunked")


def disagreements(m: MoEModel) -> list[tuple[str, str]]:
    """(field, message) for every number of `m` out of range or at odds with another."""
    bad: list[tuple[str, str]] = []
    sizes = {"hidden_size": m.hidden_size, "vocab_size": m.vocab_size, "max_position_embeddings": None}
    for field, value in sizes.items():
        if value is not None and not 1 <= value <= MAX_DIMENSION:
            bad.append((field, f"{field} must be from 1 to {MAX_DIMENSION}; got {value}"))
    if m.max_position_embeddings < 1:
        bad.append(("max_position_embeddings", f"at least 1 is needed; got {m.max_position_embeddings}"))
    if not 1 <= m.num_layers <= MAX_LAYERS:
        bad.append(("num_layers", f"num_layers must be from 1 to {MAX_LAYERS}; got {m.num_layers}"))
    bad += _attention_disagreements(m.attention)
    bad += _layer_disagreements(m)
    bad += _expert_disagreements(m)
    for field, dtype, allowed in (
        ("weight_dtype", m.weight_dtype, get_args(Dtype)),
        ("expert_dtype", m.expert_dtype, get_args(Dtype)),
        ("router_dtype", m.router_dtype, get_args(Dtype)),
        ("kv_dtype", m.kv_dtype, KV_DTYPES),
        ("activation_dtype", m.activation_dtype, FLOAT_DTYPES),
    ):
        if dtype not in allowed:
            bad.append((field, f"{field} must be one of {', '.join(allowed)}; got {dtype!r}"))
    if not bad and m.total_params() + m.mtp_params() > MAX_PARAMS:
        bad.append(("hidden_size", f"a model of {m.total_params():.3g} parameters is beyond any use"))
    return bad


def _attention_disagreements(a: Attention) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    names = ["num_heads", "num_kv_heads", "head_dim", "v_head_dim"]
    names += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"] if a.kind == "mla" else []
    names += ["q_lora_rank"] if a.q_lora_rank is not None else []
    for field in names:
        value = getattr(a, field)
        if not 1 <= value <= MAX_DIMENSION:
            bad.append((field, f"{field} must be from 1 to {MAX_DIMENSION}; got {value}"))
    if bad:
        return bad
    if a.num_heads % a.num_kv_heads:
        bad.append((
            "num_kv_heads",
            f"KV heads must divide the query heads: num_kv_heads={a.num_kv_heads}, num_heads={a.num_heads}",
        ))  # fmt: skip
    if a.kind == "mla" and a.head_dim != a.qk_nope_head_dim + a.qk_rope_head_dim:
        bad.append((
            "head_dim",
            f"MLA's head_dim must be qk_nope_head_dim + qk_rope_head_dim: {a.head_dim} against "
            f"{a.qk_nope_head_dim} + {a.qk_rope_head_dim}",
        ))  # fmt: skip
    if a.kind == "gqa" and a.v_head_dim != a.head_dim:
        bad.append((
            "v_head_dim",
            f"GQA with values of another size than keys is not modelled: head_dim={a.head_dim}, "
            f"v_head_dim={a.v_head_dim}",
        ))  # fmt: skip
    return bad


def _layer_disagreements(m: MoEModel) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    for field, got in (
        ("attention_kind_of_layer", len(m.attention_kind_of_layer)),
        ("window_of_layer", len(m.window_of_layer)),
    ):
        if got != m.num_layers:
            bad.append((field, f"{field} needs one value a layer: {got} values for {m.num_layers} layers"))
    for i, (kind, window) in enumerate(zip(m.attention_kind_of_layer, m.window_of_layer, strict=False)):
        if kind not in LAYER_KINDS or (window < 1) != (kind == "full"):
            bad.append((
                "window_of_layer",
                f"a windowed or chunked layer needs a window of at least 1 token and a full one has 0: "
                f"layer {i} is {kind!r} with {window}",
            ))  # fmt: skip
            break
    repeated = [layer for layer, times in Counter(m.moe_layers).items() if times > 1]
    if repeated or any(not 0 <= layer < m.num_layers for layer in m.moe_layers):
        bad.append(("moe_layers", f"MoE layers must be distinct and below {m.num_layers}; got {m.moe_layers}"))
    if list(m.moe_layers) != sorted(m.moe_layers):
        bad.append(("moe_layers", "MoE layers must ascend"))
    if len(set(m.moe_layers)) < m.num_layers and m.dense_intermediate_size < 1:
        bad.append((
            "dense_intermediate_size",
            f"a model with dense layers needs their intermediate size: {len(m.moe_layers)} of "
            f"{m.num_layers} layers are MoE, dense_intermediate_size={m.dense_intermediate_size}",
        ))  # fmt: skip
    return bad


def _expert_disagreements(m: MoEModel) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    for field in ("dense_intermediate_size", "shared_intermediate_size", "extra_params", "num_mtp_layers"):
        value = getattr(m, field)
        if not 0 <= value <= (MAX_PARAMS if field == "extra_params" else MAX_DIMENSION):
            bad.append((field, f"{field} must be from 0 to {MAX_DIMENSION}; got {value}"))
    if not m.is_moe:
        absent = ("num_experts", "top_k", "moe_intermediate_size", "shared_intermediate_size")
        bad += [(name, f"a model without MoE layers has no {name}") for name in absent if getattr(m, name)]
        return bad
    if not 1 <= m.num_experts <= MAX_EXPERTS:
        bad.append(("num_experts", f"num_experts must be from 1 to {MAX_EXPERTS}; got {m.num_experts}"))
    if not 1 <= m.top_k <= max(1, m.num_experts):
        bad.append((
            "top_k",
            f"top_k must be from 1 to the number of experts: top_k={m.top_k}, num_experts={m.num_experts}",
        ))  # fmt: skip
    if not 1 <= m.moe_intermediate_size <= MAX_DIMENSION:
        bad.append(("moe_intermediate_size", f"an expert needs an intermediate size; got {m.moe_intermediate_size}"))
    bad += _pass_disagreements(m)
    groups, top = m.num_expert_groups, m.top_groups
    if groups < 1 or m.num_experts % max(1, groups):
        bad.append((
            "num_expert_groups",
            f"expert groups must divide the experts: num_expert_groups={groups}, num_experts={m.num_experts}",
        ))  # fmt: skip
    elif not 1 <= top <= groups or top * (m.num_experts // groups) < min(m.top_k, m.num_experts):
        bad.append((
            "top_groups",
            f"the chosen groups must be from 1 to {groups} and hold top_k experts: top_groups={top} of "
            f"{m.num_experts // groups} experts each, top_k={m.top_k}",
        ))  # fmt: skip
    return bad


def _pass_disagreements(m: MoEModel) -> list[tuple[str, str]]:
    """How often experts are visited, who shares them, and how large they are."""
    bad: list[tuple[str, str]] = []
    if not 1 <= m.moe_iterations <= 64:
        bad.append(("moe_iterations", f"iterations of a MoE layer must be from 1 to 64; got {m.moe_iterations}"))
    if not 1 <= m.pool_layers <= len(m.moe_layers):
        bad.append((
            "pool_layers",
            f"a pool is shared by 1 to all {len(m.moe_layers)} MoE layers; got {m.pool_layers}",
        ))  # fmt: skip
    widths = m.expert_widths
    if widths and (m.num_experts % len(widths) or not all(0 < w <= 1024 for w in widths)):
        bad.append((
            "expert_widths",
            f"expert_widths gives equal blocks of experts their relative size (over 0): {len(widths)} sizes for "
            f"{m.num_experts} experts; got {list(widths)}",
        ))  # fmt: skip
    for field in ("expert_hidden_size", "router_columns"):
        value = getattr(m, field)
        if not 0 <= value <= MAX_DIMENSION:
            bad.append((field, f"{field} must be from 0 to {MAX_DIMENSION}; got {value}"))
    return bad
