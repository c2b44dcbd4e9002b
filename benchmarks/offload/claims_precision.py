"""Memory of compressed, pruned, merged and adapted experts: what papers state beside what our bytes give."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import FITTED, IDENTITY, MISSED, REPRODUCED, ROOT, SHAPE, Row, Section, table, within

from moesim.engine_spec import EngineSpec
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.memory import rank_memory
from moesim.model import MoEModel
from moesim.offload import CacheSemantics, MissCosts, OffloadContext
from moesim.offload.adapters import ExpertAdapters
from moesim.offload.compression import total_bytes
from moesim.policy import load_policy
from moesim.scenario.load import load_model, load_profile

GB = 1e9
BF16 = 16.0


@cache
def model_of(name: str) -> MoEModel:
    return load_model(ROOT / "workloads" / "models" / f"{name}.yaml")


def context_of(model: MoEModel, layers: int | None = None) -> OffloadContext:
    """All experts of a model, nothing known of their use. layers: instead of the model's own number."""
    shape = (layers or model.num_moe_layers, model.num_experts)
    size_LE = np.full(shape, model.expert_bytes(), np.int64)
    costs = MissCosts(1.0, lambda rows: 1.0, lambda rows: 1.0, 0.0, 1.0)
    return OffloadContext(
        *shape,
        model.top_k,
        size_LE,
        int(size_LE.sum()),
        1,
        np.ones(shape),
        CacheSemantics(),
        costs,
        0,
        expert_shape=(model.hidden_size, model.moe_intermediate_size),
    )


def experts_bytes(model: MoEModel, bits: float, **parameters: Any) -> int:
    """Of a model's routed experts under a precision policy."""
    ctx = context_of(model)
    return total_bytes(ctx, load_policy("precision", parameters).compress(ctx, bits), bits)


# ---- pruning, bit widths, merging


def in_format(model: MoEModel, dtype: str) -> MoEModel:
    return model.with_dtypes(weight_dtype=dtype, expert_dtype=dtype)  # type: ignore[arg-type]


PANGU = (718e9, 58, 256, 7680, 2048)
"""Parameters, MoE layers, experts, hidden and intermediate size: the report of Pangu Ultra MoE (arXiv
2505.04519, from memory)"""


def premoe() -> list[Row]:
    rows = []
    r1 = model_of("deepseek-r1")
    paper = "PreMoe, arXiv 2505.17639, abstract"
    for kept, claim in ((128, "8/128: 50 % of the experts"), (32, "8/32: 87.5 % of the experts")):
        gone = 1 - experts_bytes(r1, 8.0, kind="premoe", kept=kept) / experts_bytes(r1, 8.0, kind="none")
        sizes = []
        for dtype, bits in (("bf16", 16.0), ("fp8_block", 8.0), ("int4", 4.125)):
            m = in_format(r1, dtype)
            total = experts_bytes(m, bits, kind="premoe", kept=kept) + m.weight_bytes_dense_rank(1)
            sizes.append(f"{total / GB:.0f} GB in {dtype}")
        rows.append(
            Row(
                paper,
                f"DeepSeek-R1, {kept} of 256 experts a layer",
                "nothing",
                claim + " less",
                f"{gone:.1%} less; whole model {', '.join(sizes)}; a change to an unlike task loads"
                f" {experts_bytes(r1, 8.0, kind='premoe', kept=kept) / GB:.0f} GB in fp8 again",
                IDENTITY if within(gone, 1 - kept / 256, 1e-3) else MISSED,
                "the share follows from the definition; the paper's gigabytes for it were not read",
                "within 0.1 %",
            )
        )
    params, layers, experts, hidden, inner = PANGU
    routed = layers * experts * 3 * hidden * inner
    ours = 2 * (params - routed * (1 - 64 / experts)) / GB
    rows.append(
        Row(
            paper,
            "Pangu Ultra MoE 718B, 64 of 256 experts a layer, bf16 (its format is assumed)",
            "nothing",
            "390 GB at 4/64",
            f"{ours:.1f} GB",
            IDENTITY if within(ours, 390, 0.02) else MISSED,
            "arithmetic on the dimensions of the model's report, which were not looked up again; the 4 of"
            " 4/64 (experts a token) changes no byte",
            "within 2 %",
        )
    )
    return rows


def mc_moe() -> list[Row]:
    mixtral = model_of("mixtral-8x7b")
    paper = "MC-MoE, arXiv 2410.06270"
    whole = 2 * mixtral.total_params()
    bare = experts_bytes(mixtral, BF16, kind="mc_moe", average=2.5, group=None)
    packed = experts_bytes(mixtral, BF16, kind="mc_moe", average=2.5)
    tables = mixtral.embedding_params() + mixtral.lm_head_params()
    rest = mixtral.total_params() - mixtral.experts_params() * mixtral.num_moe_layers
    width = 8 * (bare + rest * 4 / 8) / mixtral.total_params()
    # attention in 4 bits with the same scales; embeddings, head as they are
    total = packed + (rest - tables) * (4 + 32 / 128) / 8 + 2 * tables
    less = 1 - total / whole
    setup = "Mixtral-8x7B, experts at 2.5 bits on average by the program, everything else at 4 bits"
    active = 2 * mixtral.num_moe_layers * mixtral.expert_params()
    tenth = 0.25 * active * 10 / mixtral.num_moe_layers / mixtral.active_params()
    needed = math.ceil(0.15 * mixtral.active_params() / (0.25 * active / mixtral.num_moe_layers))
    return [
        Row(
            paper + ", abstract",
            setup + ", scales not counted",
            "nothing",
            "2.54 bits a weight",
            f"{width:.3f} bits",
            IDENTITY if within(width, 2.54, 0.01) else MISSED,
            "",
            "within 1 %",
        ),
        Row(
            paper + ", README",
            setup + "; 32 bits of scale and zero point for 128 weights; embeddings and head in 16",
            "nothing",
            "about 16 GB static at 2.5 bits",
            f"{total / GB:.2f} GB",
            IDENTITY if within(total / GB, 16, 0.05) else MISSED,
            "",
            "within 5 %",
        ),
        Row(
            paper + ", abstract",
            "the same",
            "nothing",
            "76.6 % smaller at 2.54 bits",
            f"{less:.1%} smaller",
            IDENTITY if within(less, 0.766, 0.02) else MISSED,
            f"16 bits to 2.54 are {1 - 2.54 / 16:.1%} less without scales: no arithmetic on weights gives 76.6 %, which"
            f" is {(1 - 0.766) * whole / GB:.0f} GB, nearer to the README's 19 GB while running",
            "within 2 %",
        ),
        Row(
            paper + ", abstract; betas and 10 layers of the repository's demo",
            "Mixtral-8x7B, the second expert dropped where w2 < beta w1, beta the median of w2 / w1 in its layer",
            "nothing",
            "15 % fewer active parameters",
            f"{tenth:.1%} in the demo's 10 layers; 15 % take {needed} of 32",
            IDENTITY if within(tenth, 0.15, 0.1) else MISSED,
            "half of the tokens lose one of two experts in a pruned layer, whatever the trace, so 10 layers of 32"
            " cannot give 15 %; that beta is the median is assumed, too",
            "within 10 % in 10 layers",
        ),
    ]


def mote() -> Row:
    hidden, inner, layers, experts = 2048, 11008, 36, 4  # Qwen2.5-3B's config.json
    ffn = 3 * hidden * inner
    size = {}
    for packing in ("ideal", "two_bits"):
        for every in (1, 2):
            ctx = replace(
                context_of(model_of("mixtral-8x7b"), layers // every),
                num_experts=experts,
                top_k=1,
                size_LE=np.full((layers // every, experts), 2 * ffn, np.int64),
                popularity_LE=np.ones((layers // every, experts)),
            )
            routed = total_bytes(
                ctx, load_policy("precision", {"kind": "mote", "packing": packing}).compress(ctx, BF16), BF16
            )
            size[packing, every] = (routed + layers // every * 2 * ffn) / GB
    near = min(size.values(), key=lambda gb: abs(gb - 3.4))
    return Row(
        "MoTE, arXiv 2506.14435, abstract",
        "Qwen2.5-3B: its feed-forward blocks in bf16 as shared experts and 4 ternary ones beside each, in all or every"
        " other layer; log2(3) or 2 bits a weight",
        "which of four arrangements",
        "3.4 GB of experts (with post-training quantisation)",
        "; ".join(f"{gb:.2f} GB ({packing}, every {every})" for (packing, every), gb in size.items()),
        FITTED if within(near, 3.4, 0.02) else MISSED,
        "the text that was read states neither model nor layers for this figure, nor what post-training quantisation"
        " does to the shared expert",
        "one of the four within 2 %",
    )


def mole() -> Row:
    model = model_of("deepseek-v2-lite")
    ours, formula = [], []
    for latent in (0.25, 0.5):
        part = experts_bytes(model, BF16, kind="mole", latent=latent) / experts_bytes(model, BF16, kind="none")
        m, n = latent * model.hidden_size, model.moe_intermediate_size
        formula.append(m / model.hidden_size + m / (model.num_experts * n))
        ours.append(part)
    return Row(
        "MoLE (MoLAE), arXiv 2503.23100",
        "DeepSeek-V2-Lite's shape, W_e = A_e B, B shared by a layer; m a quarter and half of d",
        "nothing",
        "m/d + m/(N n) of the parameters: " + ", ".join(f"{x:.4f}" for x in formula),
        ", ".join(f"{x:.4f}" for x in ours) + " of the bytes",
        IDENTITY if all(within(o, f, 1e-3) for o, f in zip(ours, formula, strict=True)) else MISSED,
        "the ratio is derived from the factorisation; no absolute size was read",
        "within 0.1 %",
    )


def mc_smoe() -> list[Row]:
    big = model_of("switch-base-128")
    model = replace(big, num_experts=32)
    ctx = context_of(model)
    rest = model.total_params() - model.num_moe_layers * model.experts_params()
    sizes = {}
    for name, value in (("merged", {}), ("factored", {"rank": 32, "columns": 0.1})):
        policy = load_policy("precision", {"kind": "mc_smoe", "groups": 8} | value)
        sizes[name] = total_bytes(ctx, policy.compress(ctx, BF16), BF16) / 2 + rest
    less = {name: 1 - size / model.total_params() for name, size in sizes.items()}
    share = 32 * (768 + 3072) / (768 * 3072) + 0.1
    expert = model.num_moe_layers * model.expert_params()
    # a product for every parameter that a token visits; the tied table counts once, as the output layer
    flops = expert * (1 - 1 / model.num_moe_layers) * (1 - share) / model.active_params()
    paper, setup = (
        "MC-SMoE, arXiv 2310.01334, abstract",
        "Switch-base-32: 8 groups a layer on average, the first layer whole",
    )
    return [
        Row(
            paper,
            setup + ", rank 32 and a tenth of the columns",
            "rank and columns (theirs were not read)",
            "up to 80 % less memory",
            f"{less['merged']:.1%} by merging ({sizes['merged'] / 1e6:.0f} M of {model.total_params() / 1e6:.0f} M"
            f" parameters), {less['factored']:.1%} after factoring ({sizes['factored'] / 1e6:.0f} M)",
            FITTED if within(less["factored"], 0.80, 0.05) else MISSED,
            "merging alone gives most of it, and depends on the groups a layer alone",
            "after factoring, within 5 %",
        ),
        Row(
            paper,
            "the same",
            "nothing more",
            "20 % fewer FLOPs",
            f"{flops:.1%} of the products of a token",
            SHAPE if within(flops, 0.20, 0.25) else MISSED,
            "merging saves none: every choice is computed; factored experts do. Attention over the context is left out",
            "within a quarter: shape",
        ),
    ]


def sizes() -> Section:
    """Bytes of compressed experts."""
    rows = [*premoe(), *mc_moe(), mote(), mole(), *mc_smoe()]
    return Section("sizes", "Bytes of pruned, rounded, merged and factored experts", rows)


# ---- ExpertWeave

WEAVE = "ExpertWeave, arXiv 2508.17624"
AVERAGES = (7.04, 6.12, 9.50, 7.12, 7.73, 5.15, 7.35, 6.58, 4.69, 3.85)
"""Experts a layer of its ten adapters, table 1; the most that any has in a layer is 13"""
MOST, SINGLE, TWO, THREE, MERGED = 13, 810_000, 572_000, 477_000, 6_000


@cache
def adapters() -> ExpertAdapters:
    """The ten adapters; table 1 gives averages, so their experts are spread evenly over layers."""
    model = model_of("deepseek-v2-lite")
    layers = model.num_moe_layers
    total = [round(a * layers) for a in AVERAGES]
    tuned_NL = np.array([[(t * (i + 1)) // layers - (t * i) // layers for i in range(layers)] for t in total])
    return ExpertAdapters(model, tuned_NL, MOST)


def kv_left(free_bytes: float, tuned: float) -> float:
    """KV tokens once so many adapter experts have taken their bytes of `free_bytes`."""
    model = model_of("deepseek-v2-lite")
    return (free_bytes - tuned * model.expert_bytes()) / sum(model.kv_bytes_per_token(1))


def simulated_kv() -> int:
    """KV tokens of the merged model alone by `moesim.memory` on a device of 64 GiB."""
    model = model_of("deepseek-v2-lite")
    profile = replace(load_profile(ROOT / "hw_profiles" / "h100_sxm_datasheet.yaml"), memory_bytes=64 << 30)
    cluster = Cluster.from_spec({"device": "h100_sxm_datasheet"}, profile)
    memory = rank_memory(model, cluster, Layout.of(model, cluster, 1, 1, 1), EngineSpec(), model.num_experts)
    return memory.kv_cache // sum(model.kv_bytes_per_token(1))


def weave_table(ten: ExpertAdapters) -> list[str]:
    """Expert weights of the base and its ten adapters, as Markdown."""
    padded, mapped, held = ten.padded_bytes(), ten.mapped_bytes(), ten.held_bytes()
    return [
        "Expert weights of the base and its ten adapters:",
        "",
        *table(
            ("tensor", "GB", "over what exists"),
            [
                ("a merged model each", f"{ten.merged_bytes() / GB:.1f}", f"{ten.merged_bytes() / held:.3f}"),
                ("padded to E_max", f"{padded / GB:.1f}", f"{padded / held:.3f}"),
                (
                    "rows padded to pages",
                    f"{ten.mapped_bytes(False) / GB:.1f}",
                    f"{ten.mapped_bytes(False) / held:.3f}",
                ),
                ("pages shared by neighbours", f"{mapped / GB:.1f}", f"{mapped / held:.3f}"),
                ("what exists", f"{held / GB:.1f}", "1"),
            ],
        ),
    ]


def expert_weave() -> Section:
    """Memory of adapters that share a base model."""
    ten = adapters()
    model = ten.model
    token = sum(model.kv_bytes_per_token(1))
    total_N = ten.tuned_NL.sum(axis=1)
    free = SINGLE * token
    pairs = {(i, j): kv_left(free, total_N[i] + total_N[j]) for i, j in itertools.combinations(range(len(total_N)), 2)}
    best = min(pairs, key=lambda pair: abs(pairs[pair] - TWO))
    third = min(
        (i for i in range(len(total_N)) if i not in best),
        key=lambda i: abs(kv_left(free, total_N[[*best, i]].sum()) - THREE),
    )
    three = kv_left(free, total_N[[*best, third]].sum())
    filled = total_N[list(best)].sum() + MOST * model.num_moe_layers
    weights = model.num_moe_layers * model.num_experts * model.expert_bytes() + model.weight_bytes_dense_rank(1)
    merged = (free - weights) / token
    simulated = simulated_kv()
    mapped, held = ten.mapped_bytes(), ten.held_bytes()
    rows = [
        Row(
            WEAVE,
            "its ten adapters, table 1's averages, E_max 13, 64 experts, 26 layers",
            "nothing",
            "F_mem = 1.51",
            f"{ten.fragmentation():.3f}; mapped pages of 2 MiB {mapped / held:.4f}, rows padded to pages"
            f" {ten.mapped_bytes(False) / held:.4f}",
            IDENTITY if within(ten.fragmentation(), 1.51, 0.01) else MISSED,
            "table 1's averages give 1.50; the last digit is their rounding",
            "within 1 %",
        ),
        Row(
            WEAVE,
            "64 GB NPU, 16B model merged with one adapter, moesim.memory at 0.9 of 64 GiB",
            "nothing",
            "810K KV tokens",
            f"{simulated / 1e3:.0f}K",
            REPRODUCED if within(simulated, SINGLE, 0.1) else MISSED,
            f"{(simulated - SINGLE) * token / GB:.1f} GB less than our budget leaves: what an NPU's runtime"
            " and graphs keep is not public, and the share of memory that vLLM may use is not stated",
            "within 10 %",
        ),
        Row(
            WEAVE,
            "the same device: the 810K tokens' bytes less those of two adapters' experts, shared base",
            "which two of table 1's adapters (not stated), of 45 pairs",
            "572K KV tokens",
            f"{pairs[best] / 1e3:.0f}K with adapters {best[0] + 1} and {best[1] + 1}; all pairs"
            f" {min(pairs.values()) / 1e3:.0f}K to {max(pairs.values()) / 1e3:.0f}K",
            FITTED if within(pairs[best], TWO, 0.01) else MISSED,
            "17.3 MB an expert and 31,104 bytes a token follow from the model's shape",
            "some pair within 1 %",
        ),
        Row(
            WEAVE,
            "the same with a third adapter",
            "which third adapter",
            "477K KV tokens",
            f"{three / 1e3:.1f}K with adapter {third + 1}, whose {AVERAGES[third]} experts a layer take"
            f" {total_N[third] * model.expert_bytes() / GB:.2f} GB",
            FITTED if within(three, THREE, 0.01) else MISSED,
            f"padded to {MOST} rows a layer it would leave {kv_left(free, filled) / 1e3:.0f}K: the claim shows that"
            " rows without experts have no memory",
            "some adapter within 1 %",
        ),
        Row(
            WEAVE + ", abstract",
            "the same device: two merged models",
            "nothing",
            "6K KV tokens (94 times fewer than 572K)",
            f"{merged / 1e3:.0f}K: two models are {2 * weights / 2**30:.1f} GiB (the paper: 58.6 GB),"
            f" {-merged * token / GB:.1f} GB more than fit",
            SHAPE if merged < 0.02 * TWO else MISSED,
            f"nearly nothing is left either way; 6K need {(MERGED - merged) * token / GB:.1f} GB that the"
            " single model's 810K did not get, so the two were not measured under one budget, and the"
            " factor of 94 divides by what is next to nothing",
            "two merged models leave less than 2 % of 572K: shape",
        ),
    ]
    return Section("expert-weave", "Adapters that share a base", rows, weave_table(ten))
