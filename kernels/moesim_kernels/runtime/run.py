"""A replay on a real or a simulated device: one set of settings, one set of mechanisms, one record."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim.offload import CacheSemantics, MissCosts, OffloadContext, OffloadPlan
from moesim.offload.cache import ExpertCache
from moesim.offload.drive import Device, Driver, Event
from moesim.offload.future import Future
from moesim.policy import load_policy
from moesim_kernels.runtime.backings import make_backing
from moesim_kernels.runtime.device import RealDevice, StepTimes
from moesim_kernels.runtime.model import Decoder
from moesim_kernels.runtime.replay import Replay
from moesim_kernels.runtime.sizes import ModelSizes
from moesim_kernels.runtime.source import MemorySource
from moesim_kernels.runtime.weights import WeightFile

__all__ = ["Made", "RealRun", "Settings", "build", "costs_of", "play", "run_real"]

_SWITCH_S = 2e-4
"""How soon a thread that asks for the interpreter gets it: the link's should not wait while a policy thinks."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run. capacity_bytes: of the caches of all layers. The policies are names, or mappings with `kind`."""

    capacity_bytes: int
    eviction: Any = "lru"
    prefetch: Any = "none"
    offload: Any = "cached"
    pooled: bool = False
    miss: str = "evict"
    cold: str = "miss"
    completion: str = "raced"
    staging: int = 2
    chunk_bytes: int = 0
    seed: int = 0

    @property
    def semantics(self) -> CacheSemantics:
        """Of the cache."""
        values = {"pooled": self.pooled, "miss": self.miss, "cold": self.cold, "completion": self.completion}
        return CacheSemantics.model_validate(values)


@dataclass(frozen=True, slots=True)
class Made:
    """Fresh mechanisms for one run."""

    context: OffloadContext
    plan: OffloadPlan
    policy: Any
    cache: ExpertCache
    prefetch: Any


def costs_of(sizes: ModelSizes, kind: str) -> MissCosts:
    """What policies that weigh costs are told: round figures by kind of link, the same in every run, so that decisions
    are. ns of one expert over the link, of rows there and on the host, of a layer."""
    link, device, host = {"disk": (1.5, 8.0, 8.0), "memory": (6.0, 8.0, 8.0), "cuda": (50.0, 3000.0, 30.0)}[kind]
    size = sizes.slot_bytes

    def at(rate: float) -> Any:
        return lambda rows: size / rate * max(1.0, rows / 8.0)

    return MissCosts(size / link, at(device), at(host), 40_000.0 if kind == "cuda" else 0.0, 500_000.0)


def _future(sizes: ModelSizes, replay: Replay) -> Future:
    """The look-ups to come: one call a step and layer, of the experts that it routes to."""
    calls = []
    for step in replay.steps:
        for layer in range(sizes.layers):
            ids = np.unique(step.expert_TLK[:, layer])
            calls.append(layer * sizes.experts + ids[ids < sizes.experts].astype(np.int64))
    return Future(calls, sizes.num_keys)


def build(settings: Settings, sizes: ModelSizes, replay: Replay, costs: MissCosts, fit: Any = None) -> Made:
    """The mechanisms of a run, fresh. fit: tokens to learn from, none of which is replayed. Raises BadInput."""
    none = np.ones((sizes.layers, sizes.experts))
    context = OffloadContext(
        num_layers=sizes.layers,
        num_experts=sizes.experts,
        top_k=sizes.top_k,
        size_LE=np.full((sizes.layers, sizes.experts), sizes.slot_bytes, np.int64),
        capacity_bytes=settings.capacity_bytes,
        staging=settings.staging,
        popularity_LE=none if fit is None else fit.count_LE(sizes.experts),
        semantics=settings.semantics,
        costs=costs,
        seed=settings.seed,
        fit=fit,
        upcoming=_future(sizes, replay),
    )
    policy = load_policy("offload", settings.offload)
    eviction = load_policy("eviction", settings.eviction)
    prefetch = load_policy("prefetch", settings.prefetch)
    plan: OffloadPlan = policy.plan(context)
    cache = ExpertCache(
        context.size_K, context.group_K, plan.capacity_G, eviction.start(context), context.semantics.miss == "bypass"
    )
    if not plan.paged and context.semantics.miss == "evict" and not plan.cpu_LE.any():
        _room_for_a_token(context, plan, replay)
    return Made(context, plan, policy, cache, prefetch.start(context))


def _room_for_a_token(context: OffloadContext, plan: OffloadPlan, replay: Replay) -> None:
    """A cache that evicts for every miss should hold the experts of one look-up; else it streams what does not fit."""
    size = int(context.size_LE.flat[0])
    if any(capacity < size for capacity in plan.capacity_G.tolist()) and not plan.fixed_LE.any():
        raise BadInput(
            f"a cache of {context.capacity_bytes:,} bytes holds no expert in some layer: one takes {size:,} bytes, and "
            f"there are {len(plan.capacity_G)} caches. Give at least {size * len(plan.capacity_G):,}, or pool them"
        )


def play(made: Made, replay: Replay, device: Device, keep_events: bool = True, after: Any = None) -> Driver:
    """Run all steps. after: called with the number of each that has ended."""
    driver = Driver.start(
        made.context, made.policy, made.cache, made.prefetch, device, made.plan, keep_events=keep_events
    )
    for step in replay.steps:
        driver.step(step)
        if after is not None:
            after(step.number)
    return driver


@dataclass(slots=True)
class RealRun:
    """What a real run left."""

    driver: Driver
    steps: list[StepTimes]
    events: list[Event]
    digest: int
    remark: str
    transfers: list[tuple[int, int, int, int, bool]] = field(default_factory=list)
    """(bytes, asked, start, end in ns, urgent) of each"""
    products: list[tuple[int, int]] = field(default_factory=list)
    """(rows, ns) of each expert's product"""
    host_products: list[tuple[int, int]] = field(default_factory=list)
    logits: list[Any] | None = None
    seconds: float = 0.0


@contextmanager
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_real(
    file: WeightFile,
    settings: Settings,
    replay: Replay,
    kind: str = "disk",
    fit: Any = None,
    check: str = "first",
    keep_logits: bool = False,
    home: MemorySource | None = None,
) -> RealRun:
    """One replay with real transfers. check: how often experts' checksums are compared: in reads, and at the end of
    those that are there (`never`: at neither). home: of `make_home`. Buffers and cache are checked afterwards, whatever
    happened. Raises BadInput, Infeasible, NoRoom, ReadFailed, LinkDied."""
    made = build(settings, file.sizes, replay, costs_of(file.sizes, kind), fit)
    backing = make_backing(kind, file, check, home)
    try:
        decoder = Decoder(file, backing.torch_device)
        device = RealDevice(decoder, backing, made.context, made.plan, settings.chunk_bytes, keep_logits)
    except BaseException:
        backing.close()
        raise
    start = time.perf_counter()
    try:
        with _quick_switches():
            driver = play(made, replay, device, after=lambda number: _forget(decoder, replay, number))
        device.settle()
        device._check(made.cache)
        if check != "never":
            device.verify()
    finally:
        made.cache._check()
        device.close()
    log = [(t.size_bytes, t.asked_ns, t.start_ns, t.end_ns, t.urgent) for t in device.link.log]
    assert driver.events is not None
    return RealRun(
        driver=driver,
        steps=device.steps,
        events=driver.events,
        digest=device.digest,
        remark=backing.remark,
        transfers=log,
        products=device.products,
        host_products=device.host_products,
        logits=device.logits,
        seconds=time.perf_counter() - start,
    )


def _forget(decoder: Decoder, replay: Replay, number: int) -> None:
    for sequence in replay.ended[number].sequences:
        decoder.forget(sequence)
