"""Routing that looks at the cache: its three rules by hand, and its place in the driver."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.offload import CacheSemantics, Compressed, MissCosts, OffloadContext, OffloadPlan, StepRoutes
from moesim.offload.cache import ExpertCache
from moesim.offload.drive import Driver
from moesim.offload.none import Policy as Everything
from moesim.offload.precision.base import own_map
from moesim.policy import load_policy, policy_kinds


def context(layers=1, experts=5, k=2, slots=2):
    size = np.full((layers, experts), 10, np.int64)
    costs = MissCosts(1.0, lambda rows: 1.0, lambda rows: 1.0, 0.0, 1.0)
    return OffloadContext(
        layers, experts, k, size, slots * 10 * layers, 1, np.ones((layers, experts)), CacheSemantics(), costs, 0
    )


def routes(score_TLE, weights=True, number=0):
    score = np.asarray(score_TLE, float)
    ids = np.argsort(-score, axis=2, kind="stable")[:, :, :2]
    top = np.take_along_axis(score, ids, 2)
    gate = np.exp(top) / np.exp(top).sum(axis=2, keepdims=True)
    return StepRoutes(number, ids, np.zeros(len(score), np.int64), gate if weights else None, False, score)


SCORE = [[[4.0, 3.0, 2.5, 1.0, 0.0]]]
"""One token: ranks are ids; the range is 4"""


def chosen(resident, **parameters):
    policy = load_policy("rerouting", {"kind": "cache_conditional"} | parameters)
    state = policy.start(context())
    step = routes(SCORE)
    state.begin(step)
    there = np.isin(np.arange(5), resident)
    return state.routes(step, 0, there)


def test_the_kinds_are_found():
    assert {"none", "kept", "cache_conditional"} <= set(policy_kinds("rerouting"))


@pytest.mark.parametrize(
    ("resident", "bias", "keep", "taken"),
    [
        ([2], 0.0, 0, [0, 1]),  # no preference
        ([2], 0.1, 0, [0, 1]),  # 2.5 + 0.4 < 3.0
        ([2], 0.2, 0, [0, 2]),  # 2.5 + 0.8 > 3.0
        ([3, 4], 0.2, 0, [0, 1]),  # 1.0 + 0.8
        ([3, 4], 0.6, 0, [0, 3]),  # 1.0 + 2.4 = 3.4 > 3.0, not 4.0; 0.0 + 2.4 neither
        ([3, 4], 1.0, 0, [0, 3]),  # 5.0 and 4.0; expert 0 has 4.0, too, and of equals is the router's better one
        ([3, 4], 1.0, 1, [0, 3]),  # the best one is kept
        ([3, 4], 1.0, 2, [0, 1]),
    ],
)
def test_the_prior_by_hand(resident, bias, keep, taken):
    ids, _ = chosen(resident, rule="prior", bias=bias, keep=keep)
    assert ids.tolist() == [taken]


@pytest.mark.parametrize(
    ("resident", "max_rank", "keep", "taken"),
    [
        ([2], 2, 0, [0, 1]),
        ([2], 3, 0, [0, 2]),
        ([2, 3], 3, 0, [0, 2]),
        ([2, 3], 4, 0, [2, 3]),
        ([2, 3], 4, 1, [0, 2]),
        ([3, 4], None, 0, [0, 3]),  # 2 K = 4: expert 4 lies below
        ([], 5, 0, [0, 1]),
        ([1], 5, 0, [0, 1]),
    ],
)
def test_max_rank_by_hand(resident, max_rank, keep, taken):
    ids, _ = chosen(resident, rule="max_rank", max_rank=max_rank, keep=keep)
    assert ids.tolist() == [taken]


def test_the_mass_by_hand():
    # probabilities .5768 .2122 .1287 .0287 .0106 ... of scores 4, 3, 2.5, 1, 0: sums .610, .834, .970, .991, 1
    share = np.exp(SCORE[0][0]) / np.exp(SCORE[0][0]).sum()
    total = np.cumsum(share)
    for mass, width in ((0.0, 2), (total[1] - 1e-6, 2), (total[1] + 1e-6, 3), (total[2] + 1e-6, 4), (1.0, 5)):
        ids, _ = chosen([2, 3, 4], rule="cumsum", mass=float(mass), keep=1)
        assert ids.tolist() == [[0, 2]] if width > 2 else [[0, 1]]
        ids, _ = chosen([4], rule="cumsum", mass=float(mass), keep=1)
        assert ids.tolist() == ([[0, 4]] if width == 5 else [[0, 1]])


def test_gates_are_the_routers_own():
    """Softmax over the two taken, of the scores as they were: no bias in them."""
    ids, gate = chosen([2], rule="prior", bias=0.2, keep=0)
    assert ids.tolist() == [[0, 2]]
    np.testing.assert_allclose(gate, [[1 / (1 + np.exp(-1.5)), 1 / (1 + np.exp(1.5))]])
    state = load_policy("rerouting", "cache_conditional").start(context())
    assert state.routes(routes(SCORE, weights=False), 0, np.zeros(5, bool))[1] is None


def test_the_range_is_an_average_of_a_layers_tokens():
    state = load_policy("rerouting", {"kind": "cache_conditional", "bias": 0.25, "keep": 0}).start(context())
    wide = routes([[[16.0, 3.0, 2.0, 1.0, 0.0]]])
    near = routes([[[4.0, 3.0, 2.1, 1.0, 0.0]]])  # needs a range above 3.6
    there = np.isin(np.arange(5), [2])
    assert state.routes(near, 0, there)[0].tolist() == [[0, 2]]  # 0.25 * 4 = 1.0 > 0.9
    narrow = routes([[[1.0, 0.9, 0.8, 0.7, 0.6]]] * 9)
    state.routes(narrow, 0, there)
    assert state.routes(near, 0, there)[0].tolist() == [[0, 1]]  # the mean range has shrunk
    state.routes(wide, 0, there)
    state.routes(wide, 0, there)
    state.routes(wide, 0, there)
    assert state.routes(near, 0, there)[0].tolist() == [[0, 2]]


def test_the_kept_take_over_from_the_gone():
    gone = np.array([[True, False, False, True, False]])
    for kind in ("kept", "cache_conditional"):
        state = load_policy("rerouting", kind).start(context(), gone)
        step = routes(SCORE)
        state.begin(step)
        assert state.routes(step, 0, np.zeros(5, bool))[0].tolist() == [[1, 2]]
    with pytest.raises(BadInput, match="only 1 left"):
        load_policy("rerouting", "kept").start(context(), np.array([[True, True, True, True, False]]))


def test_scores_are_needed():
    state = load_policy("rerouting", "cache_conditional").start(context())
    step = StepRoutes(0, np.zeros((1, 1, 2), int), np.zeros(1, int))
    with pytest.raises(BadInput, match="rerouting: none"):
        state.begin(step)


@pytest.mark.parametrize("value", [{"bias": 1.5}, {"rule": "nearest"}, {"mass": -0.1}, {"max_rank": 0}])
def test_parameters_are_checked(value):
    with pytest.raises(BadInput):
        load_policy("rerouting", {"kind": "cache_conditional"} | value)


@pytest.mark.parametrize("kind", [k for k in policy_kinds("rerouting") if k != "none"])
@pytest.mark.parametrize("seed", range(5))
def test_routes_are_k_distinct_experts_that_exist(kind, seed):
    rng = np.random.default_rng(seed)
    experts, tokens = int(rng.integers(4, 20)), 50
    gone = np.zeros((1, experts), bool)
    gone[0, rng.permutation(experts)[: experts - 3]] = True
    score = rng.normal(0, 2, (tokens, 1, experts))
    for gone_LE in (None, gone):
        policy, step = load_policy("rerouting", kind), routes(score)
        there = rng.random(experts) < 0.5
        states = [policy.start(context(experts=experts), gone_LE) for _ in range(2)]
        ids, gate = states[0].routes(step, 0, there)
        again, _ = states[1].routes(step, 0, there)
        assert (ids == again).all()
        assert ids.min() >= 0
        assert ids.max() < experts
        assert (ids[:, 0] != ids[:, 1]).all()
        np.testing.assert_allclose(gate.sum(axis=1), 1)
        assert gone_LE is None or not gone[0, ids].any()
        if kind == "cache_conditional":  # nothing is preferred where nothing, or everything, is there
            for everywhere in (np.zeros(experts, bool), np.ones(experts, bool)):
                fresh = policy.start(context(experts=experts)).routes(step, 0, everywhere)[0]
                assert (fresh == step.expert_TLK[:, 0]).all()


# ---- in the driver


class Ask:
    """A device that notes what it is told."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def note(*arguments, **named):
            self.calls.append((name, *arguments, *named.values()))
            return [] if name == "arrived" else None

        return note


class Silent:
    def begin(self, step): ...
    def wanted(self, layer):
        return []

    def told(self, layer, found): ...


def driver(ctx, kind, compressed=None, precision=None, slots=2):
    capacity = np.full(ctx.num_layers, slots * 10)
    nothing = np.zeros((ctx.num_layers, ctx.num_experts), bool)
    plan = OffloadPlan(capacity, nothing, nothing, nothing)
    cache = ExpertCache(ctx.size_K, ctx.group_K, capacity, load_policy("eviction", "lru").start(ctx))
    reroute = load_policy("rerouting", kind).start(ctx)
    return Driver.start(
        ctx, Everything(), cache, Silent(), Ask(), plan, compressed=compressed, precision=precision, keep_events=True,
        reroute=reroute,
    )  # fmt: skip


def test_the_driver_routes_by_what_is_there():
    ctx = context()
    first, second = routes(SCORE), routes([[[4.0, 2.5, 3.0, 1.0, 0.0]]], number=1)
    plain = driver(ctx, "none")
    plain.step(first)
    plain.step(second)
    assert (plain.counters.hits, plain.counters.loads, plain.counters.rerouted) == (1, 3, 0)
    ours = driver(ctx, {"kind": "cache_conditional", "bias": 0.2})
    ours.step(first)
    ours.step(second)
    assert (ours.counters.hits, ours.counters.loads, ours.counters.rerouted) == (2, 2, 1)
    # the caller's routes stay what they were
    assert second.expert_TLK.tolist() == [[[0, 2]]]


def test_merged_experts_are_there_when_who_serves_them_is():
    ctx = context()
    compressed = Compressed(np.full((1, 5), 8.0), np.array([[0, 1, 2, 1, 5]]))
    ours = driver(ctx, {"kind": "cache_conditional", "bias": 0.6, "keep": 0}, compressed)
    ours.step(routes([[[0.0, 4.0, 3.9, -4.0, -4.0]]]))  # 1 and 2 are loaded
    ours.step(routes([[[4.0, -4.0, -4.0, 2.0, 3.0]]], number=1))  # 4 is gone; 3 is served by 1, which is there
    assert [(e.key, e.kind) for e in ours.events[2:]] == [(0, "load"), (1, "hit")]


def test_a_copy_of_too_few_bits_is_replaced_by_a_better_one():
    """HOBBIT: expert 1 is fetched at 2 of 16 bits while it weighs little, and again, whole, when it is the first."""
    ctx = context()
    hobbit = load_policy("precision", "hobbit")
    compressed = hobbit.compress(ctx, 16.0)
    assert (compressed.map_LE == own_map(ctx)).all()
    ours = driver(ctx, "none", compressed, hobbit)
    ours.step(routes([[[4.0, 1.0, 0.0, 0.0, 0.0]]]))  # share of the second: e^-3
    assert [c[1:] for c in ours.device.calls if c[0] == "fetch"] == [(0, 10, True), (1, 1, True)]
    ours.step(routes([[[4.0, 1.0, 0.0, 0.0, 0.0]]], number=1))
    assert (ours.counters.hits, ours.counters.upgrades) == (2, 0)
    ours.step(routes([[[4.0, 3.0, 0.0, 0.0, 0.0]]], number=2))  # e^-1 = 0.37: four bits
    assert [c[1:] for c in ours.device.calls if c[0] == "fetch"][2:] == [(1, 2, True)]
    ours.step(routes([[[3.0, 4.0, 0.0, 0.0, 0.0]]], number=3))
    assert [c[1:] for c in ours.device.calls if c[0] == "fetch"][3:] == [(1, 10, True)]
    assert (ours.counters.hits, ours.counters.upgrades) == (6, 2)
    ours.step(routes([[[3.0, 4.0, 0.0, 0.0, 0.0]]], number=4))
    assert ours.counters.upgrades == 2
    ours.cache._check()
