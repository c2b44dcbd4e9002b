"""Set-ups of the claims about prefetch and token scheduling: routes, a device of flat layers, caches."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routing"))

from claim_page import DATA

from moesim.offload import CacheSemantics, Counters, MissCosts, OffloadContext, RouteSample, StepRoutes
from moesim.offload.cache import ExpertCache
from moesim.offload.cached import Policy as Cached
from moesim.offload.drive import Driver
from moesim.offload.replay import future_of, side_by_side
from moesim.policy import load_policy
from moesim.tiers import LinkRates
from moesim.tiers.device import SimDevice
from moesim.tiers.links import Links
from moesim.workload.synthetic import SyntheticSpec, generate, uniform_weights

TASKS = ("summary", "intent")
EXPERTS, LAYERS, TOP_K = 64, 26, 6
EXPERT_BYTES = 3 * 2048 * 1408 * 2
"""DeepSeek-V2-Lite in bf16: 17.3 MB"""


# ---- routes


@cache
def esft(task: str) -> tuple[RouteSample, RouteSample] | None:
    """Recorded tokens of DeepSeek-V2-Lite on a task, cut in halves between two sequences; None where they are not on
    this machine."""
    path = DATA / "routing" / f"esft_dsv2lite_{task}.npz"
    if not path.exists():
        return None
    with np.load(path) as file:
        ids, sequence = file["expert_ids"].astype(np.int64), file["sequence_id"].astype(np.int64)
    starts = np.flatnonzero(np.r_[True, np.diff(sequence) != 0])
    cut = int(starts[np.argmin(np.abs(starts - len(ids) // 2))])
    return RouteSample(ids[:cut], sequence[:cut]), RouteSample(ids[cut:], sequence[cut:])


TEMPLATE = 100
"""tokens at the start of a half, most of them the chat template that all sequences of both tasks share"""


def tokens_of(sample: RouteSample, number: int, first: int = 0) -> list[StepRoutes]:
    """So many of its tokens from row `first` on, one a step."""
    rows = range(first, min(first + number, len(sample.expert_TLK)))
    return [StepRoutes(n, sample.expert_TLK[r : r + 1], sample.sequence_T[r : r + 1]) for n, r in enumerate(rows)]


SWITCH_LAYERS, SWITCH_BYTES = 12, 2 * 768 * 3072 * 2
"""Switch-base: six MoE layers in the encoder and six in the decoder; an expert in fp16 has 9.4 MB"""
TASTE = 0.125
"""How far sequences differ in the experts they like (SyntheticSpec.topic_spread): fitted to one number, LRU's hit rate
at batch size 4; equal popularity over all, because Switch is trained to balance, and nothing else"""


@cache
def switch(experts: int, spread: float = TASTE, tokens: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic routes of Switch-base, top-1: ids [T, L, 1] and sequence of each token, 32 tokens each."""
    spec = SyntheticSpec(topic_spread=spread, topic_tokens=1 << 20, pool_tokens=tokens, sequence_tokens=32)
    made = generate(spec, uniform_weights(SWITCH_LAYERS, experts), 1, 0)
    return made.expert_TLK.astype(np.int64), np.repeat(np.arange(tokens // 32), 32)


def switch_steps(experts: int, batch: int, number: int | None = None) -> list[StepRoutes]:
    """Decoding steps of so many sequences, each one token."""
    return side_by_side(*switch(experts), batch)[:number]


POOLED = CacheSemantics(pooled=True)
LOGICAL = CacheSemantics(pooled=True, completion="logical")

# ---- a device whose layers all take the same, and whose experts compute within that time


@dataclass
class Flat:
    """`moesim.tiers.LayerTimes`."""

    layer_ns: int

    def begin(self, tokens: int) -> None: ...

    def own_ns(self, layer: int) -> int:
        return self.layer_ns

    def gpu_ns(self, layer: int, rows: object) -> int:
        return 0

    def cpu_ns(self, layer: int, rows: object) -> int:
        return 0

    def sync_ns(self, layer: int) -> int:
        return 0

    def join_ns(self, layer: int) -> int:
        return 0

    def end_ns(self) -> int:
        return 0


@dataclass(frozen=True)
class Setup:
    """slots: of each layer, or pooled L times as many. rate: GB/s of the link. layer_ns: a layer without stalls."""

    slots: int
    size_bytes: int
    experts: int
    rate: float = 24.0
    layer_ns: int = 250_000
    chunk_bytes: int = 0
    semantics: CacheSemantics = POOLED
    warm: bool = False


def serve(
    setup: Setup, steps: list[StepRoutes], prefetch: Any, eviction: Any = "lru", fit: RouteSample | None = None
) -> tuple[float, Counters]:
    """ms a step on average, and what look-ups found."""
    _, layers, top_k = steps[0].expert_TLK.shape
    experts, size = setup.experts, setup.size_bytes
    size_LE = np.full((layers, experts), size, np.int64)
    costs = MissCosts(size / setup.rate, lambda rows: 0.0, lambda rows: 0.0, 0.0, float(setup.layer_ns))
    popularity = np.ones((layers, experts)) if fit is None else fit.count_LE(experts)
    evict = load_policy("eviction", eviction)
    context = OffloadContext(
        layers, experts, top_k, size_LE, setup.slots * size * layers, 2, popularity, setup.semantics, costs, 0, fit,
        future_of(steps, experts) if evict.knows_future else None,
    )  # fmt: skip
    offload = Cached(warm=setup.warm)
    plan = offload.plan(context)
    bypass = setup.semantics.miss == "bypass"
    held = ExpertCache(context.size_K, context.group_K, plan.capacity_G, evict.start(context), bypass)
    rates = LinkRates(setup.rate, 1e9, 0.0, chunk_bytes=setup.chunk_bytes)
    device = SimDevice(Flat(setup.layer_ns), Links(rates), context.size_K)
    state = load_policy("prefetch", prefetch).start(context)
    driver = Driver.start(context, offload, held, state, device, plan)
    for step in steps:
        driver.step(step)
    return float(device.records.step_ns_S().mean()) / 1e6, driver.counters


def recall(policy: Any, fit: RouteSample, steps: list[StepRoutes], numbers: tuple[int, ...] = (6, 12)) -> list[float]:
    """Share of the experts that tokens take among the first 6, 12 that the policy names for their layer one layer
    ahead. Layers and tokens of which it can name nobody (the first ones) are left out."""
    size_LE = np.full((LAYERS, EXPERTS), EXPERT_BYTES, np.int64)
    costs = MissCosts(1.0, lambda rows: 0.0, lambda rows: 0.0, 0.0, 1.0)
    context = OffloadContext(
        LAYERS, EXPERTS, TOP_K, size_LE, 0, 0, fit.count_LE(EXPERTS), CacheSemantics(), costs, 0, fit
    )  # fmt: skip
    state = load_policy("prefetch", policy).start(context)
    hit, asked = np.zeros(len(numbers)), 0
    for step in steps:
        state.begin(step)
        for layer in range(-1, LAYERS - 1):
            named = [w.expert for w in state.wanted(layer) if w.layer == layer + 1]
            if named:
                true = set(step.expert_TLK[0, layer + 1].tolist())
                asked += len(true)
                hit += [len(true.intersection(named[:number])) for number in numbers]
    return (hit / max(asked, 1)).tolist()
