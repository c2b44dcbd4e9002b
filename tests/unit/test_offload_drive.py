"""The driver: in which order it asks the mechanisms, and what it tells a device, which here only writes it down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.arrays import BoolArray, IntArray
from moesim.offload import (
    CacheSemantics,
    Compressed,
    MissCosts,
    OffloadContext,
    OffloadPlan,
    StepRoutes,
    Wanted,
)
from moesim.offload.cache import ExpertCache
from moesim.offload.drive import Driver, LayerWork
from moesim.offload.eviction.lru import Policy as Lru
from moesim.tiers import LinkRates
from moesim.tiers.device import SimDevice
from moesim.tiers.group import DeviceGroup, rates_of_one
from moesim.tiers.links import Links

EXPERTS = 4


class Pen:
    """A device that writes down what it is told. arrive: keys that come before the next poll. started: cannot be
    cancelled."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.arrive: list[int] = []
        self.started: set[int] = set()
        self.works: list[LayerWork] = []

    def begin(self, step: StepRoutes) -> None:
        self.log.append(("begin", step.number))

    def own(self, layer: int, tokens: int) -> None:
        self.log.append(("own", layer))

    def fetch(self, key: int, size_bytes: int, urgent: bool) -> None:
        self.log.append(("fetch" if urgent else "prefetch", key, size_bytes))

    def hurry(self, key: int) -> None:
        self.log.append(("hurry", key))

    def cancel(self, key: int) -> bool:
        self.log.append(("cancel", key))
        return key not in self.started

    def arrived(self) -> list[int]:
        out, self.arrive = self.arrive, []
        return out

    def evict(self, key: int, write_back: bool) -> None:
        self.log.append(("evict", key))

    def page(self, layer: int, size_bytes: int) -> None:
        self.log.append(("page", layer, size_bytes))

    def experts(self, layer: int, work: LayerWork) -> None:
        self.works.append(work)
        self.log.append(("experts", layer))

    def end(self) -> None:
        self.log.append(("end",))


class Asks:
    """Wants what it was given: (layer asked at) -> (layer, expert) pairs, in the first step."""

    def __init__(self, by_layer: dict[int, list[tuple[int, int]]]) -> None:
        self.by_layer = by_layer
        self.step = -1

    def begin(self, step: StepRoutes) -> None:
        self.step += 1

    def wanted(self, layer: int) -> list[Wanted]:
        pairs = self.by_layer.get(layer, []) if self.step == 0 else []
        return [Wanted(at, expert, 1.0) for at, expert in pairs]

    def told(self, layer: int, found: object) -> None:
        pass


class OnCpu:
    """Absent experts that the plan says are the CPU's."""

    def on_cpu(self, layer: int, experts: IntArray, rows: IntArray, plan: OffloadPlan, costs: MissCosts) -> BoolArray:
        return plan.cpu_LE[layer, experts]

    def plan(self, context: OffloadContext) -> OffloadPlan:
        raise NotImplementedError


def context(layers: int = 2, slots: int = 2, size_LE: np.ndarray | None = None, **semantics: str) -> OffloadContext:
    sizes = np.full((layers, EXPERTS), 100) if size_LE is None else size_LE
    costs = MissCosts(10.0, float, float, 1.0, 1.0)
    how = CacheSemantics(**semantics)  # type: ignore[arg-type]
    return OffloadContext(layers, EXPERTS, 2, sizes, slots * 100 * layers, 2, np.ones(sizes.shape), how, costs, 0)


def driver(
    told: OffloadContext, asks: dict[int, list[tuple[int, int]]] | None = None, slots: int = 2, **changes: object
) -> tuple[Driver, Pen]:
    """slots: of each layer's cache. changes: of the plan; compressed goes to the driver."""
    none = np.zeros(told.size_LE.shape, bool)
    more = {"compressed": changes.pop("compressed")} if "compressed" in changes else {}
    plan = OffloadPlan(np.full(told.num_layers, slots * 100), none, none, none)
    plan = replace(plan, **changes)  # type: ignore[arg-type]
    cache = ExpertCache(told.size_K, told.group_K, plan.capacity_G, Lru().start(told), told.semantics.miss == "bypass")
    pen = Pen()
    made = Driver.start(told, OnCpu(), cache, Asks(asks or {}), pen, plan, keep_events=True, **more)
    return made, pen


def step(number: int, *layers: list[int], weights: list[list[float]] | None = None, prompt: bool = False) -> StepRoutes:
    """One token's experts of each layer."""
    ids = np.array([layers], np.int64)
    gates = None if weights is None else np.array([weights])
    return StepRoutes(number, ids, np.zeros(1, np.int64), gates, prompt)


def test_misses_are_asked_for_before_prefetches_and_both_before_computing():
    made, pen = driver(context(), {-1: [(0, 3)], 0: [(1, 2)]})
    made.step(step(0, [0], [1]))
    assert pen.log == [
        ("begin", 0), ("prefetch", 3, 100),
        ("own", 0), ("fetch", 0, 100), ("cancel", 3), ("prefetch", 6, 100), ("experts", 0),
        ("own", 1), ("fetch", 5, 100), ("cancel", 6), ("experts", 1),
        ("end",),
    ]  # fmt: skip
    assert (made.counters.loads, made.counters.prefetched, made.counters.cancelled) == (2, 2, 2)
    made.cache._check()
    assert made.cache.resident() == [0, 5]


def test_a_prefetch_that_comes_too_late_is_waited_for():
    made, pen = driver(context(), {0: [(1, 2)]})
    made.step(step(0, [0], [2]))
    assert ("hurry", 6) in pen.log
    assert [w.key for w in pen.works[1].coming] == [6]
    assert (made.counters.late, made.counters.prefetched_used, made.counters.cancelled) == (1, 1, 0)
    assert 6 in made.cache.resident()  # it has computed, so it is there


def test_a_prefetch_that_arrives_is_a_hit():
    made, pen = driver(context(), {0: [(1, 2)]})
    for layer, work in made.layers(step(0, [0], [2])):
        if work is not None:
            pen.experts(layer, work)
            pen.arrive = [6]
    assert made.counters.hits == 1
    assert [w.key for w in pen.works[1].here] == [6]


def test_what_has_started_is_not_given_up_and_counts_when_it_comes():
    made, pen = driver(context(), {-1: [(0, 3)]})
    pen.started = {3}
    made.step(step(0, [0], [1]))
    assert made.counters.cancelled == 0
    pen.arrive = [3]
    made.step(step(1, [3], [1]))
    assert [(e.step, e.key, e.kind) for e in made.events or []][2:] == [(1, 3, "hit"), (1, 5, "hit")]


def test_a_stale_prefetch_gives_up_its_room_before_others_are_evicted():
    """One slot a layer: 3 of layer 0 is on its way and not asked for; the prefetch of 0's next one takes its room."""
    made, pen = driver(context(1), {-1: [(0, 3)], 0: [(0, 2)]}, slots=2)
    made.step(step(0, [0]))
    assert pen.log[-4:] == [("cancel", 3), ("prefetch", 2, 100), ("experts", 0), ("end",)]
    assert made.counters.evictions == 0


def test_prefetched_for_the_next_step_stays_until_then():
    made, pen = driver(context(), {1: [(0, 2)]})
    made.step(step(0, [0], [1]))
    assert ("cancel", 2) not in pen.log
    made.step(step(1, [0], [1]))
    assert ("cancel", 2) in pen.log  # layer 0 has been looked up, and nobody wanted it


def test_logical_completion_decides_without_the_device():
    made, pen = driver(context(completion="logical"), {0: [(1, 2), (1, 3)]})
    made.step(step(0, [0], [2]))
    assert [w.key for w in pen.works[1].here] == [6]
    assert not any(line[0] in ("hurry", "cancel") for line in pen.log)
    assert made.counters.hits == 1


def test_logical_completion_evicts_what_is_still_on_its_way():
    """One slot: the second prefetch takes the room of the first, which is void."""
    made, pen = driver(context(completion="logical"), {0: [(1, 2), (1, 3)]}, slots=1)
    made.step(step(0, [0], [3]))
    assert pen.log[3:6] == [("prefetch", 6, 100), ("evict", 6), ("prefetch", 7, 100)]
    made.cache._check()


def test_streamed_experts_say_their_bytes():
    made, pen = driver(context(1, miss="bypass"), slots=0)
    made.step(step(0, [0, 1]))
    assert pen.works[0].streams == [(0, 1, 100), (1, 1, 100)]
    assert not any(line[0] == "fetch" for line in pen.log)


def test_a_streamed_copy_of_few_bits_is_not_remembered():
    """Expert 1 has the smaller gate: a copy of 4 bits, streamed. Then it is kept, in all its bits: no better copy."""
    told = context(1, miss="bypass")
    few = Compressed(np.full((1, EXPERTS), 8.0), np.arange(EXPERTS)[None], ((0.5, 8.0), (0.0, 4.0)))
    made, pen = driver(told, {}, slots=0, compressed=few)
    made.step(step(0, [0, 1], weights=[[0.9, 0.1]]))
    assert pen.works[0].streams == [(0, 1, 100), (1, 1, 50)]
    made.cache._capacity[0] = 200
    made.prefetch = Asks({-1: [(0, 1)]})
    made._logical = True
    made.step(step(1, [1], weights=[[1.0]]))
    assert made.counters.upgrades == 0
    assert [w.key for w in pen.works[1].here] == [1]


def test_prefetches_go_where_experts_were_merged():
    merged = Compressed(np.full((2, EXPERTS), 8.0), np.array([[0, 0, 2, 4], [0, 1, 2, 3]]))
    made, pen = driver(context(), {-1: [(0, 1), (0, 3)]}, compressed=merged)
    made.step(step(0, [1, 3], [0, EXPERTS]))
    assert [line for line in pen.log if line[0] == "prefetch"] == [("prefetch", 0, 100)]
    assert [w.key for w in pen.works[0].coming] == [0]  # 3 is gone


def test_pages_go_round():
    """Two layers ahead of three: the first step asks for both, then every layer for the one two further on."""
    none = np.zeros((3, EXPERTS), bool)
    fixed = none.copy()
    fixed[1, 0] = True
    told = replace(context(3), layer_bytes_L=np.array([7, 8, 9]))
    made, pen = driver(told, paged=True, look_ahead=2, fixed_LE=fixed)
    for number in range(2):
        made.step(step(number, [0], [1], [2]))
    assert [line for line in pen.log if line[0] in ("page", "own")] == [
        ("page", 0, 407), ("page", 1, 308),
        ("own", 0), ("page", 2, 409), ("own", 1), ("page", 0, 407), ("own", 2), ("page", 1, 308),
        ("own", 0), ("page", 2, 409), ("own", 1), ("page", 0, 407), ("own", 2), ("page", 1, 308),
    ]  # fmt: skip


def test_deferred_experts_are_those_of_least_weight_and_none_in_the_last_layer():
    every = np.ones((2, EXPERTS), bool)
    made, pen = driver(context(), slots=0, cpu_LE=every, deferred=1)
    made.step(step(0, [2, 1], [0, 3], weights=[[0.3, 0.7], [0.6, 0.4]]))
    assert ([w.key for w in pen.works[0].cpu], [w.key for w in pen.works[0].deferred]) == ([1], [2])
    assert ([w.key for w in pen.works[1].cpu], pen.works[1].deferred) == ([4, 7], [])
    assert (made.counters.on_cpu, made.counters.look_ups) == (4, 4)


def test_a_token_protects_its_best_choices_wherever_they_are():
    """One of two choices may be deferred. Expert 0, the better one, is on the device and 3 on the CPU: 3 is deferred.
    With the weights the other way round 3 is protected, and nothing is: deferred are choices, not the CPU's last."""
    on_cpu = np.ones((2, EXPERTS), bool)
    on_cpu[:, 0] = False
    for weights, now, later in (([0.7, 0.3], [], [3]), ([0.3, 0.7], [3], [])):
        made, pen = driver(context(), slots=1, cpu_LE=on_cpu, deferred=1)
        made.step(step(0, [0, 3], [0, 3], weights=[weights, weights]))
        assert [w.key for w in pen.works[0].cpu] == now
        assert [w.key for w in pen.works[0].deferred] == later


def test_an_expert_that_any_token_protects_is_not_deferred():
    """Two tokens take 0 and 1, each the other one first: both are computed now, all their rows at once."""
    made, pen = driver(context(), slots=0, cpu_LE=np.ones((2, EXPERTS), bool), deferred=1)
    ids = np.array([[[0, 1], [0, 1]], [[1, 0], [1, 0]]])
    weights = np.array([[[0.6, 0.4], [0.6, 0.4]], [[0.6, 0.4], [0.6, 0.4]]])
    made.step(StepRoutes(0, ids, np.arange(2), weights))
    assert [(w.key, w.rows) for w in pen.works[0].cpu] == [(0, 2), (1, 2)]
    assert pen.works[0].deferred == []


def test_a_long_prompt_exchanges_the_fixed_experts():
    """0 and 1 are fixed; the prompt asks for 2 three times, 3 twice, 1 once: 2 and 3 come, the least used leaves."""
    fixed = np.array([[True, True, False, False]])
    told = context(1)
    made, pen = driver(told, slots=0, fixed_LE=fixed, cpu_LE=np.ones((1, EXPERTS), bool), update_tokens=3)
    ids = np.array([[[2, 3]], [[2, 3]], [[2, 1]]])
    made.step(StepRoutes(0, ids, np.zeros(3, np.int64), prompt=False))
    assert made.cache.resident() == [0, 1]
    made.step(StepRoutes(1, ids, np.zeros(3, np.int64), prompt=True))
    assert made.cache.resident() == [2, 3]
    after = pen.log[pen.log.index(("end",), pen.log.index(("begin", 1))) + 1 :]
    assert after == [("evict", 0), ("evict", 1), ("prefetch", 2, 100), ("prefetch", 3, 100)]


def test_an_exchange_never_takes_more_bytes_than_it_frees():
    """2 is twice as large: it takes the room of both, and 3 finds none."""
    sizes = np.array([[100, 100, 200, 100]])
    made, _ = driver(
        context(1, size_LE=sizes),
        slots=0,
        fixed_LE=np.array([[True, True, False, False]]),
        cpu_LE=np.ones((1, EXPERTS), bool),
        update_tokens=1,
    )
    ids = np.array([[[2, 3]], [[2, 4]]])
    made.step(StepRoutes(0, ids, np.zeros(2, np.int64), prompt=True))
    assert made.cache.resident() == [2]


# ---- several devices


class Times:
    """own 100, an expert 50, join 5."""

    def __init__(self, own: int = 100) -> None:
        self.own = own

    def begin(self, tokens: int) -> None:
        pass

    def own_ns(self, layer: int) -> int:
        return self.own

    def gpu_ns(self, layer: int, rows: list[int]) -> int:
        return 50 * len(rows)

    def cpu_ns(self, layer: int, rows: list[int]) -> int:
        return 0

    def sync_ns(self, layer: int) -> int:
        return 0

    def join_ns(self, layer: int) -> int:
        return 5

    def end_ns(self) -> int:
        return 0


def group(links: Links, owns: list[int], held: list[BoolArray] | None = None) -> DeviceGroup:
    drivers, devices = [], []
    for index, own in enumerate(owns):
        told = context()
        device = SimDevice(Times(own), links, told.size_K, index)
        made, _ = driver(told)
        made.device = device
        made.held_LE = held[index] if held is not None else None
        drivers.append(made)
        devices.append(device)
    return DeviceGroup(drivers, devices)


def test_devices_meet_after_every_layer_and_share_the_memory():
    """Two devices at 1 B/ns each, 1.5 together. Both miss: asked for at 100, 100 B at 0.75 B/ns are there at 234, and
    compute until 284; join 289. Layer 1 likewise 289 later."""
    both = group(Links(LinkRates(1.0, 1.5, 1.0), 2), [100, 100])
    routes = step(0, [0], [1])
    both.step([routes, routes])
    assert both.now_ns == 2 * (100 + 134 + 50 + 5)
    alone = group(Links(rates_of_one(LinkRates(1.0, 1.5, 1.0), 2), 1), [100])
    alone.step([routes])
    assert alone.now_ns == both.now_ns


def test_under_expert_parallelism_each_has_its_own_experts():
    """Device 0 holds experts 0 and 1, device 1 the others. Layer 0 asks for 0 alone: device 0 is there at 100 + 100 +
    50 (it has the memory alone), device 1 waits 150. Layer 1 asks for 1 and 3: both share."""
    low = np.array([[True, True, False, False]] * 2)
    pair = group(Links(LinkRates(1.0, 1.5, 1.0), 2), [100, 100], [low, ~low])
    routes = step(0, [0, 0], [1, 3])
    pair.step([routes, routes])
    records = [one.records for one in pair.devices]
    assert [r.part_ns_S("meet").tolist() for r in records] == [[0], [150]]
    assert [r.part_ns_S("stall").tolist() for r in records] == [[100 + 134], [134]]
    assert records[0].step_ns == records[1].step_ns == [255 + 289]


def test_who_is_earlier_asks_first():
    """Device 1 needs 40 ns less before its experts: its transfer has the memory alone for 40 ns at 1 B/ns, then both
    have 0.5 until its other 60 B are there at 220; device 0's last 40 B follow at 1 B/ns, there at 260."""
    pair = group(Links(LinkRates(1.0, 1.0, 1.0), 2), [100, 60])
    routes = step(0, [0], [4])
    pair.step([routes, routes])
    first, second = (one.records for one in pair.devices)
    assert second.part_ns_S("stall").tolist() == [160]
    assert first.part_ns_S("stall").tolist() == [160]
    assert first.step_ns == [260 + 50 + 5 + 100 + 5]


def test_a_group_refuses_devices_of_other_links():
    one, other = group(Links(LinkRates(1.0, 1.0, 1.0)), [1]), group(Links(LinkRates(1.0, 1.0, 1.0)), [1])
    with pytest.raises(ValueError, match="share their links"):
        DeviceGroup([*one.drivers, *other.drivers], [*one.devices, *other.devices])
    with pytest.raises(ValueError, match="as many drivers"):
        DeviceGroup(one.drivers, [])
