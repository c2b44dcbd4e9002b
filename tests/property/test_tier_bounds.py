"""What no policy and no link can beat, on a thousand random traces: measured time against bounds made here by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest

from moesim.offload import CacheSemantics, MissCosts, OffloadContext, StepRoutes, Wanted
from moesim.offload.cache import ExpertCache
from moesim.offload.cached import Policy as Cached
from moesim.offload.drive import Driver
from moesim.offload.eviction.lru import Policy as Lru
from moesim.tiers import LinkRates
from moesim.tiers.device import DeviceOptions, SimDevice
from moesim.tiers.links import REASONS, TO_DEVICE, Links
from moesim.tiers.records import PARTS
from moesim.tiers.store import Home, TierStore

SIZE = 1000


@dataclass
class Times:
    """launch: ns of a product besides its rows."""

    launch: int

    def begin(self, tokens: int) -> None:
        pass

    def own_ns(self, layer: int) -> int:
        return 150 + 10 * layer

    def gpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        return self.launch + sum(30 + 4 * row for row in rows)

    def cpu_ns(self, layer: int, rows: Sequence[int]) -> int:
        return 200 * len(rows)

    def sync_ns(self, layer: int) -> int:
        return 40

    def join_ns(self, layer: int) -> int:
        return 5

    def end_ns(self) -> int:
        return 50


class Guess:
    """Asks for random experts of random layers ahead."""

    def __init__(self, layers: int, experts: int, most: int, seed: int) -> None:
        self.layers, self.experts, self.most = layers, experts, most
        self.draw = np.random.default_rng(seed)

    def begin(self, step: StepRoutes) -> None:
        pass

    def wanted(self, layer: int) -> list[Wanted]:
        some = self.draw.integers(0, self.most + 1)
        return [
            Wanted(int(self.draw.integers(self.layers)), int(self.draw.integers(self.experts)), 1.0)
            for _ in range(some)
        ]

    def told(self, layer: int, found: object) -> None:
        pass


class Case(NamedTuple):
    """A trace and a system. routes [S, T, L, K]; slots: of each layer."""

    routes: np.ndarray
    experts: int
    slots: int
    semantics: CacheSemantics
    options: DeviceOptions
    rates: LinkRates
    launch: int
    most: int = 0

    @property
    def layers(self) -> int:
        return self.routes.shape[2]


def case(seed: int) -> Case:
    draw = np.random.default_rng(seed)
    experts, layers, top_k = int(draw.integers(3, 7)), int(draw.integers(1, 4)), int(draw.integers(1, 3))
    steps, tokens = int(draw.integers(2, 6)), int(draw.integers(1, 4))
    routes = draw.random((steps, tokens, layers, experts)).argsort(axis=-1)[..., :top_k]
    semantics = CacheSemantics(
        miss=["evict", "bypass"][int(draw.integers(2))], completion=["raced", "logical"][int(draw.integers(2))]
    )
    options = DeviceOptions(
        staging=int(draw.integers(1, 4)),
        compute=["arrival", "after", "once"][int(draw.integers(3))],
    )
    rates = LinkRates(
        to_device=float(draw.choice([2.0, 5.0, 13.0])),
        host=100.0,
        nvme=3.0,
        to_device_latency_ns=int(draw.choice([0, 25])),
        chunk_bytes=int(draw.choice([0, 300])),
    )
    return Case(routes, experts, int(draw.integers(1, experts + 1)), semantics, options, rates, 40)


def run(one: Case, home: Home | None = None) -> tuple[Driver, SimDevice]:
    sizes = np.full((one.layers, one.experts), SIZE)
    costs = MissCosts(500.0, lambda rows: 30.0, lambda rows: 200.0, 40.0, 200.0)
    popularity = np.arange(sizes.size, dtype=np.float64).reshape(sizes.shape)
    capacity = one.slots * SIZE * one.layers
    context = OffloadContext(
        one.layers, one.experts, 2, sizes, capacity, one.options.staging, popularity, one.semantics, costs, 0
    )
    policy = Cached()
    plan = policy.plan(context)
    bypass = one.semantics.miss == "bypass"
    cache = ExpertCache(context.size_K, context.group_K, plan.capacity_G, Lru().start(context), bypass)
    links = Links(one.rates)
    store = TierStore(links, [context.size_K], home, one.options.staging, [plan.device_bytes(sizes)])
    store.place(0, np.flatnonzero(plan.initial_LE.reshape(-1)).tolist())
    store.start()
    device = SimDevice(Times(one.launch), links, context.size_K, options=one.options, store=store)
    prefetch = Guess(one.layers, one.experts, one.most, 1)
    driver = Driver.start(context, policy, cache, prefetch, device, plan)
    for number, routes_TLK in enumerate(one.routes):
        driver.step(StepRoutes(number, routes_TLK, np.zeros(len(routes_TLK), np.int64)))
        store._check()
        links._check()
        cache._check()
    return driver, device


def compute_ns(one: Case) -> int:
    """Everything but waiting: each layer's experts in one product."""
    times, total = Times(one.launch), 0
    for routes_TLK in one.routes:
        total += times.end_ns()
        for layer in range(one.layers):
            rows = np.bincount(routes_TLK[:, layer].ravel())
            total += times.own_ns(layer) + times.gpu_ns(layer, rows[rows > 0].tolist()) + times.join_ns(layer)
    return total


def least_misses(one: Case) -> int:
    """Look-ups that no cache of so many slots a layer can hit, free to bypass and told the future. A hit needs a slot
    from one use of an expert to its next; as many such intervals as possible, at most `slots` at a time: take them by
    their end, and of too many give up the one that ends last (interval scheduling; exact for equal intervals)."""
    misses = 0
    for layer in range(one.layers):
        last = dict.fromkeys(range(one.experts - one.slots, one.experts), -1)  # the most popular ones are there
        kept: list[tuple[int, int]] = []
        intervals, asked = [], 0
        for now, routes_TLK in enumerate(one.routes):
            for expert in np.unique(routes_TLK[:, layer]).tolist():
                asked += 1
                if expert in last:
                    intervals.append((last[expert], now))
                last[expert] = now
        for begin, end in sorted(intervals):
            kept.append((begin, end))
            overlapping = [(b, e) for b, e in kept if b <= begin < e]
            if len(overlapping) > one.slots:
                kept.remove(max(overlapping, key=lambda interval: interval[1]))
        misses += asked - len(kept)
    return misses


def link_ns(one: Case, transfers: int) -> float:
    """The link carries them one after the other."""
    return transfers * (SIZE / one.rates.to_device + one.rates.to_device_latency_ns)


@pytest.mark.parametrize("block", range(10))
def test_time_is_not_less_than_its_bounds(block: int):
    """100 traces each; demand, and prefetches of whatever."""
    for seed in range(100 * block, 100 * block + 100):
        one = case(seed)
        least, compute = least_misses(one), compute_ns(one)
        for most in (0, 3):
            driver, device = run(one._replace(most=most))
            records, counters = device.records, driver.counters
            total = int(records.step_ns_S().sum())
            assert total >= compute, seed
            moved = device.links.moved_XR()[TO_DEVICE] // SIZE
            assert total >= link_ns(one, least), seed
            assert counters.loads + counters.streams + counters.prefetched - counters.cancelled >= least
            part_SP = records.part_ns_SP()
            assert (part_SP.sum(axis=1) == records.step_ns_S()).all()
            assert (part_SP >= 0).all(), seed
            assert part_SP[:, PARTS.index("stall")].sum() == total - compute
            # every byte: what look-ups asked for has moved when the step ended; prefetches have, or were given up
            device.links.drain()
            moved = device.links.moved_XR()[TO_DEVICE]
            by = dict(zip(REASONS, moved.tolist(), strict=True))
            gone = device.links.cancelled_XR()[TO_DEVICE]
            assert by["demand"] == counters.loads * SIZE
            assert by["stream"] == counters.streams * SIZE
            assert by["prefetch"] + gone[REASONS.index("prefetch")] == counters.prefetched * SIZE
            if one.semantics.completion == "raced":
                assert gone.sum() == counters.cancelled * SIZE  # none is lost but those
            if most == 0:
                assert by["prefetch"] == 0
                assert counters.late == 0


def test_nothing_stalls_where_everything_fits():
    for seed in range(200):
        one = case(seed)
        _, device = run(one._replace(slots=one.experts, most=2))
        assert device.records.part_ns_S("stall").sum() == 0
        assert device.links.asked_XR().sum() == 0


def test_a_faster_link_never_takes_longer_on_demand():
    """Whenever missed experts compute; what is asked for does not depend on time."""
    for seed in range(60):
        one = case(seed)
        took = []
        for rate in (2.0, 3.7, 9.0, 50.0):
            _, device = run(one._replace(rates=replace(one.rates, to_device=rate)))
            took.append(int(device.records.step_ns_S().sum()))
        assert took == sorted(took, reverse=True), seed


def test_nvme_behind_host_memory_is_never_faster():
    """Whatever of host memory's cache is hit, a load takes at least the copy; with room for all, each expert is read
    from NVMe once."""
    for seed in range(150):
        one = case(seed)
        one = one._replace(rates=replace(one.rates, chunk_bytes=0))
        _, direct = run(one)
        driver, through = run(one, Home("nvme", dram_bytes=[0, 2 * SIZE, 1 << 40][seed % 3]))
        assert through.records.step_ns_S().sum() >= direct.records.step_ns_S().sum()
        read, copied = through.links.moved_XR()[[2, 0]].sum(axis=1)
        assert read <= copied == (driver.counters.loads + driver.counters.streams) * SIZE
        if seed % 3 == 0:
            assert read == copied
        if seed % 3 == 2:
            touched = np.unique(one.routes.transpose(2, 0, 1, 3).reshape(one.layers, -1) +
                                one.experts * np.arange(one.layers)[:, None])  # fmt: skip
            assert read <= len(touched) * SIZE
