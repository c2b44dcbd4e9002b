"""A device alone takes short cuts (it plays its links itself, a lone lane shares nothing). On random tiny traces they
change nothing: a group of one device over links without short cuts has the same events, times and records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from moesim.arrays import BoolArray, IntArray
from moesim.offload import CacheSemantics, Compressed, MissCosts, OffloadContext, OffloadPlan, RouteSample, StepRoutes
from moesim.offload.asked import asked, serves_LE
from moesim.offload.cache import ExpertCache
from moesim.offload.cached import Policy as Cached
from moesim.offload.drive import Driver
from moesim.offload.replay import context_of
from moesim.policy import load_policy
from moesim.tiers import LinkRates
from moesim.tiers.device import DeviceOptions, SimDevice
from moesim.tiers.group import DeviceGroup
from moesim.tiers.links import Links
from moesim.tiers.store import Home, TierStore

LAYERS, EXPERTS, TOP_K = 3, 6, 2
PREFETCHES = ("none", "next_layer", "markov", "previous_token", "frequency", "trace_matching")


class Times:
    """Uneven on purpose; experts by layer and rows."""

    def begin(self, tokens: int) -> None:
        self.tokens = tokens

    def own_ns(self, layer: int) -> int:
        return 40 + 13 * layer + self.tokens

    def gpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        return 20 + 7 * len(rows) + 3 * sum(rows) + layer

    def cpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        return 60 * len(rows) + 9 * sum(rows)

    def sync_ns(self, layer: int) -> int:
        return 30

    def join_ns(self, layer: int) -> int:
        return 7

    def end_ns(self) -> int:
        return 11


class Some:
    """The CPU computes one missed expert in `of`; 0: none."""

    def __init__(self, of: int) -> None:
        self.of = of

    def plan(self, context: OffloadContext) -> OffloadPlan:
        return Cached().plan(context)

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        return (experts + layer) % self.of == 0 if self.of else np.zeros(len(experts), bool)


def routes(rng: np.random.Generator) -> list[StepRoutes]:
    """A prompt now and then, else one to three tokens; one choice in twenty is no expert."""
    steps = []
    for number in range(int(rng.integers(3, 9))):
        tokens = int(rng.choice([1, 1, 2, 3, 12]))
        ids = np.argsort(rng.gumbel(size=(tokens, LAYERS, EXPERTS)) - np.arange(EXPERTS) / 2, axis=2)[:, :, :TOP_K]
        ids = np.where(rng.random(ids.shape) < 0.05, EXPERTS, ids)
        weight = rng.random(ids.shape)
        steps.append(StepRoutes(number, ids, np.arange(tokens), weight, tokens > 3))
    return steps


def build(seed: int, alone: bool) -> tuple[Driver, SimDevice, list[StepRoutes]]:
    rng = np.random.default_rng(seed)

    def pick(*values):  # type: ignore[no-untyped-def]
        return values[int(rng.integers(len(values)))]

    steps = routes(rng)
    miss = pick("evict", "bypass")
    semantics = CacheSemantics(pooled=pick(False, True), miss=miss, completion=pick("raced", "raced", "logical"))
    fit = RouteSample(np.argsort(rng.random((24, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K], np.zeros(24, int))
    unit = pick(2400, 600)
    size = np.full((LAYERS, EXPERTS), unit)
    capacity = int(rng.integers(0, 5)) * LAYERS * unit
    context = context_of(steps, EXPERTS, capacity, semantics=semantics, size_LE=size, fit=fit, seed=seed)
    policy = Some(pick(0, 0, 2, 3))
    home = pick(Home(), Home(), Home(copies=False), Home("nvme", dram_bytes=int(rng.integers(1, 19)) * unit))
    plan = replace(policy.plan(context), write_back=pick(False, True), deferred=pick(0, 1))
    options = DeviceOptions(pick(1, 2, 3), pick("arrival", "arrival", "after", "once"), pick(True, True, False))
    rates = LinkRates(24.0, pick(24.0, 1000.0), 11.0, pick(0, 35), pick(0, 20), chunk_bytes=pick(0, 0, 700))
    links = Links(rates)
    links.short_cuts = alone
    store = TierStore(links, [context.size_K], home, options.staging, None, options.on_host, options.duplex)
    device = SimDevice(Times(), links, context.size_K, options=options, store=store)
    eviction, prefetch = load_policy("eviction", pick("lru", "lfu", "fifo")), load_policy("prefetch", pick(*PREFETCHES))
    cache = ExpertCache(
        context.size_K, context.group_K, plan.capacity_G, eviction.start(context), miss == "bypass"
    )  # fmt: skip
    compressed = pick(None, None, Compressed(np.full((LAYERS, EXPERTS), 4.0), np.tile(np.arange(EXPERTS), (LAYERS, 1)),
                                             ((0.7, 4.0), (0.0, 2.0))))  # fmt: skip
    if not home.copies:
        compressed = None  # what is a home cannot lose bits
    driver = Driver.start(
        context, policy, cache, prefetch.start(context), device, plan, compressed=compressed, keep_events=True
    )
    store.place(0, cache.resident())
    store.start()
    return driver, device, steps


@pytest.mark.parametrize("part", range(6))
def test_short_cuts_change_nothing(part: int) -> None:
    moved = set()
    for seed in range(50 * part, 50 * part + 50):
        driver, device, steps = build(seed, True)
        other, slow, _ = build(seed, False)
        group = DeviceGroup([other], [slow])
        for step in steps:
            driver.step(step)
            group.step([step])
            device.links._check()
            device.store._check()
            driver.cache._check()
        assert driver.events == other.events, seed
        assert driver.counters == other.counters, seed
        assert device.now_ns == slow.now_ns, seed
        mine, theirs = device.records, slow.records
        assert (mine.start_ns, mine.step_ns, mine.part_ns) == (theirs.start_ns, theirs.step_ns, theirs.part_ns), seed
        np.testing.assert_array_equal(mine.moved_bytes_SXR(), theirs.moved_bytes_SXR())
        np.testing.assert_array_equal(mine.busy_ns_SX(), theirs.busy_ns_SX())
        moved |= set(np.flatnonzero(mine.moved_bytes_SXR().sum(axis=(0, 1))))
    assert moved >= {0, 1, 2, 4}, "demand, prefetch, stream and write-back have all been there"


def test_what_is_asked_is_a_plain_count() -> None:
    rng = np.random.default_rng(5)
    context = context_of([StepRoutes(0, np.zeros((1, LAYERS, TOP_K), int), np.zeros(1, int))], EXPERTS, 0)
    for _ in range(200):
        ids = rng.integers(0, EXPERTS + 2, (int(rng.integers(1, 6)), LAYERS, TOP_K))
        serves = rng.integers(0, EXPERTS + 1, (LAYERS, EXPERTS))
        held = rng.random((LAYERS, EXPERTS)) < 0.7
        compressed = Compressed(np.ones((LAYERS, EXPERTS)), serves) if rng.random() < 0.7 else None
        mask = held if rng.random() < 0.7 else None
        table = serves_LE(context, compressed, mask)
        taken = ids if table is None else table[np.arange(LAYERS)[:, None], np.minimum(ids, EXPERTS)]
        found = asked(taken, EXPERTS)
        assert asked(taken[:, 1:2], EXPERTS, 1) == found[1:2]
        for layer, (keys, rows) in enumerate(found):
            plain = Counter()
            for expert in ids[:, layer].ravel().tolist():
                if expert < EXPERTS and compressed is not None:
                    expert = int(serves[layer, expert])
                if expert < EXPERTS and (mask is None or mask[layer, expert]):
                    plain[layer * EXPERTS + expert] += 1
            assert list(zip(keys, rows, strict=True)) == sorted(plain.items())
