"""Every kind of offload keeps the family's promises, on its own and under the driver.

A file added to moesim/offload/ that defines a Policy is found here by itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.errors import BadInput, Infeasible
from moesim.offload import CacheSemantics, MissCosts, OffloadContext, StepRoutes
from moesim.offload.cache import ExpertCache
from moesim.offload.drive import Driver
from moesim.offload.eviction.lru import Policy as Lru
from moesim.offload.prefetch.none import Policy as NoPrefetch
from moesim.policy import load_policy, policy_kinds

KINDS = policy_kinds("offload")
SHAPES = [(1, 1, 1), (3, 8, 2), (5, 6, 6), (4, 33, 4)]
SIZES = ["equal", "by_expert", "by_layer"]
ROOM = [0.0, 0.13, 0.5, 0.97, 1.0, 3.0]
COSTS = MissCosts(transfer_ns=1000.0, gpu_ns=lambda n: 20.0, cpu_ns=lambda n: 300.0 * n, sync_ns=50.0, layer_ns=200.0)
NEEDS_LAYERS = ("mixtral_offloading", "expert_split")
"""have slots in each layer, so they refuse a pool"""


def context(shape, sizes="equal", room=0.5, pooled=False, seed=5):
    """Arrays that nobody may write to."""
    layers, experts, top_k = shape
    rng = np.random.default_rng(seed)
    size = {
        "equal": np.full((layers, experts), 1000),
        "by_expert": rng.integers(500, 3001, (layers, experts)),
        "by_layer": np.repeat(rng.integers(500, 3001, (layers, 1)), experts, axis=1),
    }[sizes].astype(np.int64)
    popularity = rng.integers(0, 30, (layers, experts)).astype(float)  # with ties and zeros
    for array in (size, popularity):
        array.setflags(write=False)
    semantics = CacheSemantics(pooled=pooled)
    return OffloadContext(
        layers, experts, top_k, size, int(size.sum() * room), 2, popularity, semantics, COSTS, seed,
        layer_bytes_L=np.full(layers, 100),
    )  # fmt: skip


def planned(kind, ctx):
    """The plan, or None where the kind says in words that there is none."""
    try:
        return load_policy("offload", kind).plan(ctx)
    except Infeasible as infeasible:
        reasons = infeasible.reasons
    assert reasons
    for reason in reasons:
        assert f"{ctx.capacity_bytes:,}" in reason
        assert reason.endswith(".")
    need = int(ctx.size_LE.sum()) + 2 * int((ctx.size_LE.sum(axis=1) + 100).max())
    assert ctx.capacity_bytes < need, "everything would have fitted"
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_is_within_the_capacity_to_the_byte(kind, shape, sizes):
    for room in ROOM:
        ctx = context(shape, sizes, room)
        plan = planned(kind, ctx)
        if plan is None:
            continue
        assert plan.capacity_G.dtype == np.int64
        assert plan.capacity_G.shape == (ctx.num_layers,)
        assert plan.capacity_G.min() >= 0
        assert plan.device_bytes(ctx.size_LE) <= ctx.capacity_bytes
        for mask in (plan.fixed_LE, plan.initial_LE, plan.cpu_LE):
            assert mask.dtype == bool
            assert mask.shape == ctx.size_LE.shape
        assert not (plan.fixed_LE & plan.initial_LE).any()
        assert not (plan.fixed_LE & plan.cpu_LE).any()
        assert not (plan.initial_LE & plan.cpu_LE).any()
        assert (np.where(plan.initial_LE, ctx.size_LE, 0).sum(axis=1) <= plan.capacity_G).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_context_gives_the_same_plan(kind):
    one, two = (planned(kind, context((4, 33, 4), "by_expert", 1.5)) for _ in range(2))
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_is_planned_as_one_group_or_refused_in_words(kind):
    ctx = context((3, 8, 2), "by_expert", 1.6, pooled=True)
    if kind in NEEDS_LAYERS:
        with pytest.raises(BadInput, match=r"tiers\.pooled"):
            load_policy("offload", kind).plan(ctx)
        return
    plan = load_policy("offload", kind).plan(ctx)
    assert plan.capacity_G.shape == (1,)
    assert plan.device_bytes(ctx.size_LE) <= ctx.capacity_bytes
    assert int(ctx.size_LE[plan.initial_LE].sum()) <= plan.capacity_G[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_is_chosen_expert_by_expert(kind):
    policy, ctx = load_policy("offload", kind), context((3, 8, 2), room=1.5)
    plan = planned(kind, ctx)
    rng = np.random.default_rng(0)
    for number in (0, 1, 3, 8):
        experts = np.sort(rng.choice(8, number, replace=False))
        rows = rng.integers(1, 9, number)
        experts.setflags(write=False)
        rows.setflags(write=False)
        chosen = policy.on_cpu(1, experts, rows, plan, COSTS)
        assert chosen.shape == (number,)
        assert chosen.dtype == bool
        np.testing.assert_array_equal(chosen, policy.on_cpu(1, experts, rows, plan, COSTS))
        assert chosen[plan.cpu_LE[1, experts]].all()


class Recorder:
    """A device that notes what it is told. Every transfer is over when it is asked for."""

    def __init__(self):
        self.work, self.fetched, self.pages, self.written_back, self.asked = [], [], [], 0, []

    def begin(self, step): ...
    def own(self, layer, tokens): ...
    def end(self): ...
    def hurry(self, key): ...

    def fetch(self, key, size_bytes, urgent):
        self.fetched.append(key)
        self.asked.append(key)

    def cancel(self, key):
        return False

    def arrived(self):
        out, self.asked = self.asked, []
        return out

    def evict(self, key, write_back):
        self.written_back += write_back

    def page(self, layer, size_bytes):
        self.pages.append((layer, size_bytes))

    def experts(self, layer, work):
        self.work.append(work)


def driven(kind, ctx, steps=6, tokens=5, **parameters):
    """A few steps of random routes; the device's notes, the cache checked after each."""
    policy = load_policy("offload", {"kind": kind, **parameters})
    plan = policy.plan(ctx)
    cache = ExpertCache(ctx.size_K, ctx.group_K, plan.capacity_G, Lru().start(ctx))
    device = Recorder()
    driver = Driver.start(ctx, policy, cache, NoPrefetch().start(ctx), device, plan)
    rng = np.random.default_rng(1)
    for number in range(steps):
        scores = rng.random((tokens, ctx.num_layers, ctx.num_experts))
        routes = np.argsort(-scores, axis=2)[:, :, : ctx.top_k]
        driver.step(StepRoutes(number, routes, np.zeros(tokens, np.int64), prompt=number == 2))
        cache._check()
    return device, driver, plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_under_the_driver_every_row_is_computed_once(kind, sizes):
    ctx = context((3, 8, 2), sizes, 1.5)
    device, driver, plan = driven(kind, ctx)
    assert len(device.work) == 6 * 3
    for work in device.work:
        parts = [*work.here, *work.coming, *work.streams, *work.cpu, *work.deferred]
        assert sum(part.rows for part in parts) == 5 * 2
        layers = {part.key // ctx.num_experts for part in parts}
        assert len(layers) == 1
    assert bool(device.pages) == plan.paged
    assert len(driver.cache.resident()) >= plan.fixed_LE.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_only_experts_of_a_plan_without_cpu_are_fetched(kind):
    """With half the room where a kind can do with it: what a plan leaves to the CPU never travels."""
    ctx = context((3, 8, 2), room=0.5)
    if planned(kind, ctx) is None:
        return
    device, _, plan = driven(kind, ctx)
    assert not plan.cpu_LE.reshape(-1)[device.fetched].any()


def test_a_dynamic_update_takes_the_most_used_then_the_lowest_numbers():
    """SGLang's `select_top_experts_from_batch`: of experts equally used the lower number, whoever is there already."""
    ctx = context((2, 8, 2), room=0.375)  # 6 of 16
    policy = load_policy("offload", {"kind": "ktransformers", "strategy": "dynamic", "update_tokens": 3})
    plan = policy.plan(ctx)
    cache = ExpertCache(ctx.size_K, ctx.group_K, plan.capacity_G, Lru().start(ctx))
    driver = Driver.start(ctx, policy, cache, NoPrefetch().start(ctx), Recorder(), plan)
    routes = np.array([[[6, 7], [4, 5]], [[6, 2], [4, 3]], [[6, 7], [4, 5]]])
    before = [key for key in range(16) if cache.fixed(key)]
    for tokens, prompt in ((3, False), (2, True)):  # no prompt, and too short a one
        driver.step(StepRoutes(0, routes[:tokens], np.zeros(tokens, np.int64), prompt=prompt))
        assert [key for key in range(16) if cache.fixed(key)] == before
    driver.step(StepRoutes(0, routes, np.zeros(3, np.int64), prompt=True))
    each = plan.fixed_LE.sum(axis=1).tolist()
    wanted = [[6, 7, 2, 0, 1, 3][: each[0]], [4, 5, 3, 0, 1, 2][: each[1]]]
    assert [sorted(e for e in range(8) if cache.fixed(8 * layer + e)) for layer in range(2)] == [
        sorted(experts) for experts in wanted
    ]
    assert driver.cache.used_G().tolist() == [0, 0]
