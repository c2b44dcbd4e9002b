"""The expert cache keeps its promises whatever is asked of it, and bounds are bounds on random traces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moesim.offload import CacheSemantics, RouteSample, StepRoutes
from moesim.offload.cache import ABSENT, LOADING, RESIDENT, ExpertCache
from moesim.offload.future import Future
from moesim.offload.replay import chunks, context_of, future_of, most_hits, replay
from moesim.policy import load_policy, policy_kinds

KINDS = policy_kinds("eviction")
ENGINE_KINDS = [kind for kind in KINDS if not load_policy("eviction", kind).knows_future]


class CacheMachine(RuleBasedStateMachine):
    """Beside the cache runs a book of who is where; every answer must agree with it."""

    @initialize(
        kind=st.sampled_from(KINDS),
        pooled=st.booleans(),
        bypass=st.booleans(),
        layers=st.integers(1, 3),
        experts=st.integers(1, 5),
        room=st.lists(st.integers(0, 9), min_size=3, max_size=3),
        seed=st.integers(0, 2**16),
        one_size=st.booleans(),
    )
    def start(self, kind, pooled, bypass, layers, experts, room, seed, one_size):
        rng = np.random.default_rng(seed)
        self.rng, self.layers, self.experts = rng, layers, experts
        self.size = np.ones(layers * experts, int) if one_size else rng.integers(0, 4, layers * experts)
        self.group = np.zeros(layers * experts, int) if pooled else np.arange(layers * experts) // experts
        self.capacity = np.array(room[: 1 if pooled else layers])
        routes = rng.integers(0, experts, (4, layers, 1))
        context = context_of(
            chunks(routes),
            experts,
            int(self.capacity.sum()),
            semantics=CacheSemantics(pooled=pooled),
            fit=RouteSample(routes, np.zeros(4, int)),
            seed=seed,
            future=Future([rng.integers(0, layers * experts, 2).tolist() for _ in range(40)], layers * experts),
        )
        self.bypass = bypass
        policy = load_policy("eviction", kind)
        self.cache = ExpertCache(self.size, self.group, self.capacity, policy.start(context), bypass)
        self.state = dict.fromkeys(range(layers * experts), "absent")
        self.pinned: set[int] = set()
        self.seen: set[int] = set()
        self.steps = 0

    # -- the book -----------------------------------------------------------------------------------------------
    def taken(self, group):
        return sum(
            int(self.size[key])
            for key, state in self.state.items()
            if state in ("loading", "resident") and self.group[key] == group
        )

    def may_leave(self, group):
        return [
            key
            for key, state in self.state.items()
            if state == "resident" and key not in self.pinned and self.group[key] == group
        ]

    def room(self, key):
        group = self.group[key]
        return int(self.capacity[group]) - self.taken(group)

    def leave(self, evicted, incoming):
        for victim in evicted:
            assert victim in self.may_leave(self.group[incoming])
            self.state[victim] = "absent"

    def could_fit(self, key):
        """Whether all who may leave make room enough."""
        return self.room(key) + sum(int(self.size[k]) for k in self.may_leave(self.group[key])) >= self.size[key]

    def in_state(self, *states):
        return [key for key, state in self.state.items() if state in states]

    # -- what may happen ----------------------------------------------------------------------------------------
    @rule(data=st.data())
    def look_up(self, data):
        self.ask(data.draw(st.lists(st.sampled_from(sorted(self.state)), unique=True, max_size=5)))

    @precondition(lambda self: self.in_state("loading"))
    @rule(data=st.data())
    def look_up_what_is_on_its_way(self, data):
        self.ask([data.draw(st.sampled_from(self.in_state("loading")))])

    def ask(self, keys):
        before = dict(self.state)
        found = self.cache.look_up(keys)
        assert [one.key for one in found] == keys
        self.pinned |= {key for key in keys if before[key] != "absent"}
        misses = [one for one in found if before[one.key] == "absent"]
        for one in found:
            kinds = {"resident": {"hit"}, "fixed": {"hit"}, "loading": {"late"}, "absent": {"load", "stream"}}
            assert one.kind in kinds[before[one.key]]
            if one.kind != "load":
                assert not one.evicted
                assert not one.cold
        if self.bypass:  # the order among misses is the policy's: the book can only add up
            for one in misses:
                self.leave(one.evicted, one.key)
            for one in misses:
                if one.kind == "load":
                    self.state[one.key] = "resident"
                    self.pinned.add(one.key)
        else:
            for one in misses:
                fits = self.could_fit(one.key)
                assert (one.kind == "load") == fits
                assert one.cold == (fits and not one.evicted and one.key not in self.seen)
                assert not one.evicted or self.room(one.key) < self.size[one.key]
                self.leave(one.evicted, one.key)
                if fits:
                    self.state[one.key] = "resident"
                    self.pinned.add(one.key)
        self.seen |= set(keys)

    @rule()
    def release(self):
        self.cache.release()
        self.pinned.clear()

    @rule(data=st.data(), arrived=st.booleans())
    def prefetch(self, data, arrived):
        key = data.draw(st.sampled_from(sorted(self.state)))
        absent, fits = self.state[key] == "absent", self.could_fit(key)
        left = self.cache.prefetch(key, arrived)
        assert (left is not None) == (absent and fits)
        if left is not None:
            self.leave(left, key)
            self.state[key] = "resident" if arrived else "loading"
            self.seen.add(key)

    @precondition(lambda self: self.in_state("loading"))
    @rule(data=st.data())
    def arrive(self, data):
        key = data.draw(st.sampled_from(self.in_state("loading")))
        self.cache.arrived(key)
        self.state[key] = "resident"

    @precondition(lambda self: self.in_state("loading"))
    @rule(data=st.data())
    def cancel(self, data):
        key = data.draw(st.sampled_from(self.in_state("loading")))
        if key in self.pinned:
            with pytest.raises(ValueError, match="waited for"):
                self.cache.cancelled(key)
        else:
            self.cache.cancelled(key)
            self.state[key] = "absent"

    @rule(data=st.data())
    def not_on_its_way(self, data):
        key = data.draw(st.sampled_from(sorted(self.state)))
        if self.state[key] != "loading":
            for ended in (self.cache.arrived, self.cache.cancelled):
                with pytest.raises(ValueError, match="not on its way"):
                    ended(key)

    @rule(data=st.data())
    def fix(self, data):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.state)), unique=True, max_size=2))
        if all(self.state[key] == "absent" for key in keys):
            self.cache.fix(keys)
            self.state |= dict.fromkeys(keys, "fixed")
            self.seen |= set(keys)
        else:
            with pytest.raises(ValueError, match="in the cache already"):
                self.cache.fix(keys)

    @rule(data=st.data())
    def unfix(self, data):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.state)), unique=True, max_size=2))
        if all(self.state[key] == "fixed" and key not in self.pinned for key in keys):
            self.cache.unfix(keys)
            self.state |= dict.fromkeys(keys, "absent")
        else:
            with pytest.raises(ValueError, match="not fixed, or in use"):
                self.cache.unfix(keys)

    @rule(data=st.data())
    def place(self, data):
        key = data.draw(st.sampled_from(sorted(self.state)))
        if self.state[key] == "absent" and self.room(key) < self.size[key]:
            with pytest.raises(ValueError, match="does not fit"):
                self.cache.place([key])
        else:
            self.cache.place([key])
            if self.state[key] == "absent":
                self.state[key] = "resident"
                self.seen.add(key)

    @rule()
    def step_begins(self):
        ids = self.rng.integers(0, self.experts + 1, (2, self.layers, 2))  # the last id is no expert
        self.cache.eviction.begin(StepRoutes(self.steps, ids, self.rng.integers(0, 3, 2)))
        self.steps += 1

    # -- what must hold -----------------------------------------------------------------------------------------
    @invariant()
    def agrees(self):
        self.cache._check()
        names = {"absent": ABSENT, "loading": LOADING, "resident": RESIDENT, "fixed": RESIDENT}
        assert {key: self.cache.state(key) for key in self.state} == {k: names[s] for k, s in self.state.items()}
        assert self.cache.resident() == sorted(self.in_state("resident", "fixed"))
        assert [key for key in self.state if self.cache.fixed(key)] == sorted(self.in_state("fixed"))
        assert self.cache.pinned == self.pinned
        taken = [self.taken(group) for group in range(len(self.capacity))]
        assert self.cache.used_G().tolist() == taken
        assert (np.array(taken) <= self.capacity).all()


class LruMachine(RuleBasedStateMachine):
    """The same calls in a smaller and a larger LRU cache: whatever is asked for, the larger one has all that the
    smaller one has, and never hits less."""

    @initialize(pooled=st.booleans(), least=st.integers(2, 4), more=st.integers(1, 4))
    def start(self, pooled, least, more):
        experts, layers = 6, 2
        steps = chunks(np.zeros((1, layers, 1), int))
        self.caches, self.hits = [], [0, 0]
        for slots in (least, least + more):
            context = context_of(steps, experts, slots * layers, semantics=CacheSemantics(pooled=pooled))
            capacity = np.array([slots] if pooled else [slots] * layers)
            eviction = load_policy("eviction", "lru").start(context)
            self.caches.append(ExpertCache(context.size_K, context.group_K, capacity, eviction))
        self.most = least

    @rule(data=st.data())
    def look_up(self, data):
        keys = data.draw(st.lists(st.integers(0, 11), unique=True, max_size=self.most))
        found = [[one.kind for one in cache.look_up(keys)] for cache in self.caches]
        for number, kinds in enumerate(found):
            self.hits[number] += kinds.count("hit")
            assert "stream" not in kinds
            self.caches[number]._check()
            self.caches[number].release()
        assert all(large == "hit" for small, large in zip(*found, strict=True) if small == "hit")

    @invariant()
    def the_larger_has_all(self):
        if hasattr(self, "caches"):
            small, large = self.caches
            small._check()
            large._check()
            assert set(small.resident()) <= set(large.resident())
            assert self.hits[0] <= self.hits[1]


LruMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestLruMachine = LruMachine.TestCase

CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def trace(rng):
    """A small random trace [T, L, K] of skewed routes, and its numbers of layers and experts."""
    layers, experts, top_k = int(rng.integers(1, 3)), int(rng.integers(3, 9)), int(rng.integers(1, 4))
    share = rng.random((layers, experts)) ** 3 + 1e-3
    share /= share.sum(axis=1, keepdims=True)
    count = int(rng.integers(4, 10))
    # as a choice without replacement does: the largest of log(share) plus Gumbel noise
    ids = np.argsort(-(np.log(share) + rng.gumbel(size=(count, layers, experts))), axis=2)[:, :, :top_k]
    return ids, layers, experts


def test_bounds_are_bounds_on_a_thousand_random_traces():
    rng = np.random.default_rng(1966)
    policies = {kind: load_policy("eviction", kind) for kind in KINDS}
    for number in range(1000):
        ids, layers, experts = trace(rng)
        pooled, capacity = bool(number % 2), int(rng.integers(0, experts)) * layers
        steps = chunks(ids)
        future = future_of(steps, experts, "each")
        bound = most_hits(steps, experts, capacity, granularity="each", pooled=pooled, future=future)
        evicting = {"belady", "lru", "lfu", KINDS[number % len(KINDS)]}
        bypassing = {"belady", KINDS[number // 3 % len(KINDS)]}
        hits = {}
        for kind, miss in [(kind, "evict") for kind in evicting] + [(kind, "bypass") for kind in bypassing]:
            semantics = CacheSemantics(pooled=pooled, miss=miss)
            found = replay(
                steps, policies[kind], experts, capacity, granularity="each", semantics=semantics, future=future
            ).counters
            assert found.evictions <= found.loads
            assert found.look_ups == ids.size
            hits[kind, miss] = found.hits
        assert hits["belady", "evict"] <= hits["belady", "bypass"] == bound
        for (kind, miss), found in hits.items():
            assert found <= hits["belady", miss], (kind, miss)


@pytest.mark.parametrize("granularity", ["layer", "token", "batch"])
def test_no_policy_beats_the_bound_where_calls_ask_for_several(granularity):
    rng = np.random.default_rng(2)
    for number in range(60):
        ids, layers, experts = trace(rng)
        pooled, capacity = bool(number % 2), int(rng.integers(0, experts + 1)) * layers
        steps = chunks(ids, tokens=3 if granularity == "batch" else 1)
        bound = most_hits(steps, experts, capacity, granularity=granularity, pooled=pooled)
        for kind in ("belady", KINDS[number % len(KINDS)]):
            for miss in ("evict", "bypass"):
                semantics = CacheSemantics(pooled=pooled, miss=miss)
                policy = load_policy("eviction", kind)
                found = replay(steps, policy, experts, capacity, granularity=granularity, semantics=semantics)
                assert found.counters.hits <= bound


@pytest.mark.parametrize("granularity", ["each", "layer", "token", "batch"])
def test_a_larger_lru_finds_all_that_a_smaller_one_finds(granularity):
    rng = np.random.default_rng(4)
    policy = load_policy("eviction", "lru")
    for number in range(40):
        ids, layers, experts = trace(rng)
        pooled = bool(number % 2)
        steps = chunks(ids, tokens=2 if granularity == "batch" else 1)
        # the largest call must fit, or what is streamed depends on the size
        least = {"each": 1, "layer": ids.shape[2], "token": ids[0].size, "batch": 2 * ids.shape[2]}[granularity]
        if granularity == "token" and not pooled:
            least = ids.shape[2]
        smaller: set[int] = set()
        for slots in range(least, experts * layers + 1, 2):
            capacity = slots if pooled else slots * layers
            found = replay(
                steps,
                policy,
                experts,
                capacity,
                granularity=granularity,
                semantics=CacheSemantics(pooled=pooled),
                keep_events=True,
            )
            hit = {n for n, event in enumerate(found.events) if event.kind == "hit"}
            assert smaller <= hit
            assert found.counters.streams == 0
            smaller = hit


def test_belady_does_not_overlook_the_next_call_when_an_expert_is_prefetched():
    # between calls 0 and 1 the next look-up is number 1: expert 1 is needed there, expert 0 never again
    steps = chunks(np.array([0, 1])[:, None, None])
    context = context_of(steps, 3, 2, future=future_of(steps, 3))
    eviction = load_policy("eviction", "belady").start(context)
    cache = ExpertCache(context.size_K, context.group_K, np.array([2]), eviction)
    cache.place([1])
    cache.look_up([0])
    cache.release()
    assert cache.prefetch(2, arrived=True) == (0,)


@pytest.mark.parametrize("kind", ["belady", "look_ahead"])
def test_a_use_that_did_not_happen_is_not_waited_for(kind):
    # expert 1 was to be asked for by call 1 and never again, but that call asks for nothing
    future = Future([[0], [1], [2], [0]], 3)
    context = context_of(chunks(np.zeros((1, 1, 1), int)), 3, 2, future=future)
    eviction = load_policy("eviction", kind).start(context)
    cache = ExpertCache(context.size_K, context.group_K, np.array([2]), eviction)
    cache.place([0, 1])
    for keys in ([0], [], [2]):
        found = cache.look_up(keys)
        cache.release()
    assert found[0].evicted == (1,)


def test_what_was_waited_for_cannot_leave_when_it_arrives():
    context = context_of(chunks(np.zeros((1, 1, 1), int)), 3, 1)
    cache = ExpertCache(context.size_K, context.group_K, np.array([1]), load_policy("eviction", "lru").start(context))
    assert cache.prefetch(0, arrived=False) == ()
    assert cache.look_up([0])[0].kind == "late"
    cache.arrived(0)
    cache._check()
    assert cache.prefetch(1, arrived=True) is None  # it computes
    cache.release()
    assert cache.prefetch(1, arrived=True) == (0,)


def test_a_key_asked_for_twice_in_a_call_is_refused():
    steps = chunks(np.zeros((1, 1, 1), int))
    context = context_of(steps, 3, 2)
    cache = ExpertCache(context.size_K, context.group_K, np.array([2]), load_policy("eviction", "lru").start(context))
    with pytest.raises(ValueError, match="expert 1 twice"):
        cache.look_up([1, 1])


@pytest.mark.parametrize(
    ("size", "group", "capacity"),
    [([1, -1], [0, 0], [2]), ([1, 1], [0, 1], [2]), ([1, 1], [0, -1], [2]), ([1], [0, 0], [2]), ([1, 1], [0, 0], [-1])],
)
def test_impossible_caches_are_refused(size, group, capacity):
    with pytest.raises(ValueError, match=r"must not be negative|needs a size and a group"):
        ExpertCache(np.array(size), np.array(group), np.array(capacity), None)
