"""The driver and the replay without a device find the same, event by event, where nothing is prefetched."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.offload import CacheSemantics, RouteSample
from moesim.offload.cache import ExpertCache
from moesim.offload.cached import Policy as Cached
from moesim.offload.drive import Driver
from moesim.offload.replay import chunks, context_of, future_of, replay
from moesim.policy import load_policy, policy_kinds


class Idle:
    """A device that does nothing and notes what it was told to move."""

    def __init__(self):
        self.fetched, self.evicted = [], []

    def fetch(self, key, size_bytes, urgent):
        assert urgent
        self.fetched.append(key)

    def evict(self, key, write_back):
        self.evicted.append(key)

    def arrived(self):
        return []

    def begin(self, step):
        pass

    def own(self, layer, tokens):
        pass

    def experts(self, layer, work):
        pass

    def end(self):
        pass


@pytest.mark.parametrize("kind", policy_kinds("eviction"))
@pytest.mark.parametrize("warm", [False, True])
def test_driver_and_replay_find_the_same(kind, warm):
    rng = np.random.default_rng(8)
    layers, experts = 3, 6
    ids = np.argsort(rng.gumbel(size=(24, layers, experts)) + np.arange(experts), axis=2)[:, :, :2]
    steps = chunks(ids, np.sort(rng.integers(0, 3, 24)), 2)
    fit = RouteSample(ids[::-1].copy(), np.zeros(24, int))
    for pooled in (False, True):
        for miss in ("evict", "bypass"):
            semantics = CacheSemantics(pooled=pooled, miss=miss)
            future = future_of(steps, experts)
            context = context_of(steps, experts, 9, semantics=semantics, fit=fit, seed=3, future=future)
            plan = Cached(warm=warm).plan(context)
            policy, device = load_policy("eviction", kind), Idle()
            bypass = miss == "bypass"
            cache = ExpertCache(context.size_K, context.group_K, plan.capacity_G, policy.start(context), bypass)
            none = load_policy("prefetch", "none").start(context)
            driver = Driver.start(context, Cached(warm=warm), cache, none, device, plan, keep_events=True)
            for step in steps:
                driver.step(step)
            first = np.flatnonzero(plan.initial_LE.reshape(-1))
            first = first[np.argsort(context.popularity_LE.reshape(-1)[first], kind="stable")].tolist()
            found = replay(
                steps, policy, experts, 9, semantics=semantics, fit=fit, initial=first, seed=3, keep_events=True
            )
            assert driver.events == found.events
            assert driver.counters == found.counters
            assert len(device.fetched) == found.counters.loads
            assert len(device.evicted) == found.counters.evictions
