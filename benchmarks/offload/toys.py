"""Papers' tables that state times and traffic, run again through the driver: moe-lrc's toy models, Mixtral-offloading,
Fiddler, MoE-Lightning's rule, KTransformers on one socket and two."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import DATA
from serial import Constants, Ran, context_of, run, top_k_by_weight

from moesim.arrays import FloatArray, IntArray
from moesim.offload import CacheSemantics, StepRoutes
from moesim.rng import generator
from moesim.tiers import LinkRates
from moesim.tiers.device import DeviceOptions

SEED = 23


def steps_of(expert_TLK: IntArray) -> list[StepRoutes]:
    """One token a step, all of one sequence."""
    mine = np.zeros(1, np.int64)
    return [StepRoutes(number, ids[None], mine) for number, ids in enumerate(expert_TLK)]


# ---- moe-lrc: ten small models (github.com/ljcleo/moe-lrc, src/D0_tp_calc.py, D3_tp_plot.ipynb)

TOY_LAYERS, TOY_TOKENS, TOY_SKIPPED = 8, 60, 12
TOY_EXPERTS = {"32expert": (32, 4), "top16": (64, 16), "top2": (64, 2), "share1": (63, 7), "share2": (62, 6)}
"""experts, chosen; all others 64 and 8"""
TOY_DOUBLE = ("32expert",)
"""half as many experts, as many parameters: each is twice as large"""
TOY_FITTED_AT = ("baseline", 2)


@dataclass(frozen=True)
class Toy:
    """A row of the table. hit: of a pooled LRU cache of `rho` times top-k slots a layer, as they counted it."""

    model: str
    rho: int
    hit: float
    tokens_s: float
    all_on_gpu: float


@cache
def toys() -> tuple[Toy, ...]:
    """All rows."""
    with (DATA / "published" / "moe_lrc_toy_throughput.csv").open(encoding="utf-8") as file:
        return tuple(
            Toy(
                row["model"],
                int(row["rho"]),
                float(row["lru_hit"]),
                float(row["decode_tok_s_old_doc"]),
                float(row["decode_tok_s_inf"]),
            )
            for row in csv.DictReader(file)
        )


def routes_with_hits(experts: int, top_k: int, layers: int, slots: int, hit: float, tokens: int) -> IntArray:
    """Routes [T, L, K] of which a pooled LRU cache with so many slots finds a share `hit`, as nearly as whole look-ups
    allow: a choice is one of the token before (which is there for sure), or the layer's least recently used expert,
    which is not, as long as all layers use as many. Errors are carried from call to call."""
    order = [list(range(experts)) for _ in range(layers)]  # least recently used first
    out = np.empty((tokens, layers, top_k), np.int64)
    owed = 0.0
    for token in range(tokens):
        for layer in range(layers):
            recent = order[layer]
            owed += hit * top_k
            number = min(max(round(owed), 0), top_k) if token else 0
            owed -= number if token else hit * top_k
            again = out[token - 1, layer][:number].tolist() if token else []
            fresh = [e for e in recent if e not in again][: top_k - number]
            out[token, layer] = again + fresh
            for expert in out[token, layer].tolist():
                recent.remove(expert)
                recent.append(expert)
    assert slots >= layers * top_k
    return out


def run_toy(toy: Toy, miss_ms: float) -> tuple[float, float]:
    """Tokens/s and hit rate, both after the cache has filled. miss_ms: to fetch a 64-expert model's expert."""
    experts, top_k = TOY_EXPERTS.get(toy.model, (64, 8))
    slots = toy.rho * top_k * TOY_LAYERS
    size = 1_000_000 * (2 if toy.model in TOY_DOUBLE else 1)
    times = Constants(own=1e9 / toy.all_on_gpu / TOY_LAYERS)
    rates = LinkRates(to_device=1_000_000 / (miss_ms * 1e6), host=1e9, nvme=1.0)
    context = context_of(
        np.ones((TOY_LAYERS, experts)),
        top_k,
        size,
        slots * size,
        times.miss_costs(miss_ms * 1e6),
        semantics=CacheSemantics(pooled=True),
    )
    routes = routes_with_hits(experts, top_k, TOY_LAYERS, slots, toy.hit, TOY_TOKENS)
    ran = run(context, {"kind": "cached", "warm": False}, steps_of(routes), times, rates)
    kept = ran.step_ns[TOY_SKIPPED:]
    # misses of those steps, from their own times: nothing else differs between steps
    misses = (kept.mean() - 1e9 / toy.all_on_gpu) / (miss_ms * 1e6 * size / 1e6)
    return 1e9 / float(kept.mean()), 1 - float(misses) / (top_k * TOY_LAYERS)


@cache
def toy_miss_ms() -> float:
    """The one fitted number: what a miss costs, from one cell of the baseline model."""
    toy = next(t for t in toys() if (t.model, t.rho) == TOY_FITTED_AT)
    misses = TOY_LAYERS * 8 * (1 - toy.hit)
    return (1e3 / toy.tokens_s - 1e3 / toy.all_on_gpu) / misses


@cache
def toy_table() -> dict[tuple[str, int], tuple[float, float, float]]:
    """By model and rho: tokens/s measured, ours, and our hit rate less theirs."""
    out = {}
    for toy in toys():
        ours, hit = run_toy(toy, toy_miss_ms())
        out[toy.model, toy.rho] = (toy.tokens_s, ours, hit - toy.hit)
    return out


# ---- Mixtral-offloading, table 2 of arXiv:2312.17238

MIXTRAL_LAYERS, MIXTRAL_EXPERTS, MIXTRAL_TOP_K = 32, 8, 2
MIXTRAL_PARAMETERS = 3 * 4096 * 14336
EXPERT_2BIT = round(MIXTRAL_PARAMETERS * 2.6 / 8)
"""2-bit HQQ takes 2.6 bits a parameter (section 4.2)"""
EXPERT_3BIT = EXPERT_2BIT + round((21.37e9 - 17.54e9) / (MIXTRAL_LAYERS * MIXTRAL_EXPERTS))
"""from the two model sizes of table 1, 4-bit attention"""
VARIANTS = ("full", "no pre-load", "no cache", "naive")
SPEED_2BIT = {
    "A100": (3.061, 2.918, 2.265, 1.392),
    "3080 Mobile": (2.655, 2.227, 1.758, 1.059),
    "3060": (2.278, 2.051, 1.547, 0.919),
    "T4": (2.092, 1.567, 1.168, 0.661),
}
SPEED_3BIT = {
    "A100": (2.845, 2.683, 2.055, 1.246),
    "3080 Mobile": (2.475, 2.024, 1.595, 0.914),
    "3060": (2.038, 1.857, 1.346, 1.791),
}
KEPT = {"A100": 4, "3080 Mobile": 4, "3060": 2, "T4": 4}
"""experts of a layer on the GPU (section 4.3)"""
MIXTRAL_HITS = {2: 0.364, 4: 0.614}
"""LRU, Mixtral-8x7B, rho 1 and 2 (moe-lrc's figure); the paper's own figure 2 is a plot"""
REPEAT = 0.235
"""share of a token's experts that are the last token's: set so that LRU finds MIXTRAL_HITS"""
RECALL = 0.8
"""of the next layer's gate, one layer ahead: figure 2 right shows somewhat more than 0.8 for two guesses"""
MIXTRAL_TOKENS = 30


@cache
def mixtral_routes() -> IntArray:
    """[T, 32, 2]: each choice is one of the last token's with probability REPEAT, else any other."""
    draw = generator(SEED, "mixtral offloading routes")
    out = np.empty((MIXTRAL_TOKENS, MIXTRAL_LAYERS, MIXTRAL_TOP_K), np.int64)
    for token in range(MIXTRAL_TOKENS):
        for layer in range(MIXTRAL_LAYERS):
            keep = out[token - 1, layer][draw.random(MIXTRAL_TOP_K) < REPEAT].tolist() if token else []
            rest = [e for e in draw.permutation(MIXTRAL_EXPERTS).tolist() if e not in keep]
            out[token, layer] = keep + rest[: MIXTRAL_TOP_K - len(keep)]
    return out


def mixtral(own_ms: float, gb_per_s: float, size: int, kept: int, variant: str) -> Ran:
    """The system, or a part of it. own_ms: of a token, all but transfers. No cache: each expert passes through a
    buffer. Naive: all experts of a layer are loaded before it runs, nothing beside it (accelerate's hooks)."""
    times = Constants(own=own_ms * 1e6 / MIXTRAL_LAYERS)
    rates = LinkRates(to_device=gb_per_s, host=1e9, nvme=1.0)
    slots = {"naive": 0, "no cache": 0}.get(variant, kept)
    capacity = slots * MIXTRAL_LAYERS * size
    transfer = size / gb_per_s
    context = context_of(
        np.ones((MIXTRAL_LAYERS, MIXTRAL_EXPERTS)), MIXTRAL_TOP_K, size, capacity, times.miss_costs(transfer), 4
    )
    routes = mixtral_routes()
    if variant == "naive":
        every = np.arange(MIXTRAL_EXPERTS)
        routes = np.broadcast_to(every, (8, MIXTRAL_LAYERS, MIXTRAL_EXPERTS))
    ahead = {"kind": "next_layer", "recall": (RECALL,), "ahead": 1} if variant == "full" else "none"
    return run(context, {"kind": "mixtral_offloading"}, steps_of(routes), times, rates, DeviceOptions(staging=4), ahead)


@cache
def mixtral_fitted(gpu: str) -> tuple[float, float]:
    """ms of a token besides transfers, and GB/s of the link, from the two cells without pre-loading. Nothing overlaps
    there, so a token takes own + loads * bytes / rate, and a run counts the loads."""
    loads = []
    for variant in ("no pre-load", "no cache"):
        found = mixtral(0.0, 1.0, 1_000_000, KEPT[gpu], variant).counters
        loads.append((found.loads + found.streams) / MIXTRAL_TOKENS)
    wanted = [1e3 / SPEED_2BIT[gpu][VARIANTS.index(v)] for v in ("no pre-load", "no cache")]
    ms_a_load = (wanted[1] - wanted[0]) / (loads[1] - loads[0])
    return wanted[1] - loads[1] * ms_a_load, EXPERT_2BIT / (ms_a_load * 1e6)


@cache
def mixtral_speed(gpu: str, variant: str, bits: int) -> float:
    """Tokens/s."""
    own, rate = mixtral_fitted(gpu)
    return 1e3 / mixtral(own, rate, EXPERT_2BIT if bits == 2 else EXPERT_3BIT, KEPT[gpu], variant).ms


def mixtral_hit(kept: int) -> float:
    """Of LRU alone, as the traffic has it."""
    found = mixtral(0.0, 1.0, 1_000_000, kept, "no pre-load").counters
    return found.hits / found.look_ups


# ---- Fiddler (arXiv:2402.07033, and its README)

BF16 = MIXTRAL_PARAMETERS * 2
FIDDLER_HITS = {56: 0.252, 125: 0.530}
"""experts on the GPU of 256 -> hit rate by popularity; at random 56 / 256 = 0.219 and 125 / 256 = 0.488"""
FIDDLER_SPREAD = 0.107
"""standard deviation of log popularity, normal over the published order: the first of the two rates"""
FIDDLER_MS = (7.0, 70.0)
"""of the code: a token in an expert on the CPU, a copy of an expert"""
FIDDLER_TOKENS = 40


@cache
def fiddler_popularity() -> FloatArray:
    """[32, 8], from their list of (layer, expert), most popular first: normal quantiles of its places."""
    order = json.loads((DATA / "routing" / "fiddler_mixtral_popularity_order.json").read_text("utf-8"))
    place = np.empty((MIXTRAL_LAYERS, MIXTRAL_EXPERTS))
    for rank, (layer, expert) in enumerate(order):
        place[layer, expert] = rank
    weight: FloatArray = np.exp(FIDDLER_SPREAD * norm.ppf(1 - (place + 0.5) / place.size))
    return weight


def fiddler(kind: dict[str, object], experts: int, tokens: int = FIDDLER_TOKENS, prompt: int = 1) -> Ran:
    """One sequence, `prompt` tokens a step, with the code's two constants as the machine's."""
    cpu, copy = FIDDLER_MS
    times = Constants(cpu=cpu * 1e6, cpu_row=cpu * 1e6)
    rates = LinkRates(to_device=BF16 / (copy * 1e6), host=1e9, nvme=1.0)
    popularity = fiddler_popularity()
    context = context_of(popularity, MIXTRAL_TOP_K, BF16, experts * BF16, times.miss_costs(copy * 1e6), staging=1)
    ids = top_k_by_weight(np.log(popularity), MIXTRAL_TOP_K, tokens * prompt, SEED, "fiddler routes")
    steps = [StepRoutes(i, ids[i * prompt : (i + 1) * prompt], np.zeros(prompt, np.int64)) for i in range(tokens)]
    return run(context, kind, steps, times, rates, DeviceOptions(staging=1))


def fiddler_hit(experts: int) -> float:
    """Share of look-ups that find the expert on the GPU, over many tokens."""
    found = fiddler({"kind": "fiddler"}, experts, tokens=150).counters
    return found.hits / found.look_ups


# ---- MoE-Lightning (arXiv:2411.11217, equation 12): a layer takes the longest of link, CPU and GPU


def lightning_layer_ms(r_w: float, layer_ms: float, gb_per_s: float) -> float:
    """ms a layer, of weights that stream through two buffers while a layer of `layer_ms` computes; Mixtral's experts
    in bf16, 24 layers after the first 8."""
    times = Constants(own=layer_ms * 1e6)
    rates = LinkRates(to_device=gb_per_s, host=1e9, nvme=1.0)
    context = context_of(
        np.ones((MIXTRAL_LAYERS, MIXTRAL_EXPERTS)),
        MIXTRAL_TOP_K,
        BF16,
        (MIXTRAL_LAYERS + 2) * MIXTRAL_EXPERTS * BF16,
        times.miss_costs(1.0),
    )
    steps = steps_of(mixtral_routes()[:3])
    ran = run(context, {"kind": "moe_lightning", "r_w": r_w}, steps, times, rates)
    return float(ran.step_ns[-1]) / 1e6 / MIXTRAL_LAYERS


# ---- KTransformers and DeepSeek-V3 (doc/en/DeepseekR1_V3_tutorial.md): Q4_K_M, 2 sockets of 8 x DDR5-4800, a 4090D

V3_LAYERS, V3_EXPERTS = 58, 256
KT_DECODE = {("dual", 8): 12.208, ("dual", 6): 13.69, ("single", 8): 8.73, ("single", 6): 10.303}
"""tokens/s, prompt of 500 tokens; llama.cpp 4.51"""
LLAMA_DECODE = 4.51


def kt_decode(own_ms: float, expert_ms: float, top_k: int) -> float:
    """Tokens/s with all experts on the CPU. own_ms: all else of a token; expert_ms: one expert of every layer."""
    times = Constants(own=own_ms * 1e6 / V3_LAYERS, cpu=expert_ms * 1e6 / V3_LAYERS)
    context = context_of(np.ones((V3_LAYERS, V3_EXPERTS)), top_k, 1000, 0, times.miss_costs(1.0))
    ids = top_k_by_weight(np.zeros((V3_LAYERS, V3_EXPERTS)), top_k, 2, SEED, "v3 routes")
    return 1e3 / run(context, {"kind": "ktransformers"}, steps_of(ids), times).ms


@cache
def kt_fitted() -> tuple[float, float]:
    """own_ms and expert_ms on two sockets, from their two rows: 8 and 6 experts."""
    eight, six = (1e3 / KT_DECODE["dual", k] for k in (8, 6))
    return eight - 8 * (eight - six) / 2, (eight - six) / 2
