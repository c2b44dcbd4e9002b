"""Every eviction policy keeps the family's promises. A file in moesim/offload/eviction/ is found here by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.offload import CacheSemantics, RouteSample
from moesim.offload.cache import ExpertCache
from moesim.offload.replay import calls_of, chunks, context_of, future_of, replay, side_by_side
from moesim.policy import load_policy, policy_kinds

KINDS = policy_kinds("eviction")
LAYERS, EXPERTS, TOP_K = 3, 7, 2


def routes(seed, tokens=40):
    """Skewed ids [T, L, K], some of which are no expert, and sequences [T]; nobody may write to them."""
    rng = np.random.default_rng(seed)
    share = rng.random((LAYERS, EXPERTS)) ** 2
    ids = np.argsort(-(np.log(share) + rng.gumbel(size=(tokens, LAYERS, EXPERTS))), axis=2)[:, :, :TOP_K]
    ids[rng.random(ids.shape) < 0.05] = EXPERTS
    sequences = np.sort(rng.integers(0, 4, tokens))
    ids.flags.writeable = sequences.flags.writeable = False
    return ids, sequences


FIT = RouteSample(*routes(99))


class Watched:
    """An eviction state whose decisions are checked where they are made."""

    def __init__(self, inner, group_K):
        self.inner, self.group_K, self.there = inner, group_K, set()
        self.victims = 0

    def begin(self, step):
        self.inner.begin(step)

    def used(self, key, now):
        self.inner.used(key, now)

    def loaded(self, key, now, prefetched):
        assert key not in self.there
        self.there.add(key)
        self.inner.loaded(key, now, prefetched)

    def evicted(self, key):
        self.there.remove(key)
        self.inner.evicted(key)

    def victim(self, group, incoming, now, evictable):
        asked = []
        victim = self.inner.victim(group, incoming, now, lambda key: asked.append(key) or evictable(key))
        possible = {key for key in self.there if self.group_K[key] == group and evictable(key)}
        assert set(asked) <= self.there | {incoming} | set(range(len(self.group_K)))
        assert (victim is None) == (not possible)
        assert victim is None or (type(victim) is int and victim in possible)
        self.victims += victim is not None
        return victim

    def keeps(self, incoming, victim, now):
        kept = self.inner.keeps(incoming, victim, now)
        assert type(kept) is bool
        assert kept == self.inner.keeps(incoming, victim, now)  # a question, not a decision
        return kept

    def order(self, keys, now):
        ordered = list(self.inner.order(keys, now))
        assert sorted(ordered) == sorted(keys)
        return ordered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("miss", ["evict", "bypass"])
def test_victims_may_leave_whatever_the_sizes_and_groups(kind, pooled, miss):
    ids, sequences = routes(1)
    steps = side_by_side(ids, sequences, 3)
    rng = np.random.default_rng(5)
    size_LE = rng.integers(1, 5, (LAYERS, EXPERTS))
    context = context_of(
        steps,
        EXPERTS,
        36,
        size_LE=size_LE,
        fit=FIT,
        semantics=CacheSemantics(pooled=pooled, miss=miss),
        future=future_of(steps, EXPERTS),
    )
    watched = Watched(load_policy("eviction", kind).start(context), context.group_K)
    capacity_G = np.array([24]) if pooled else np.array([8, 3, 13])
    cache = ExpertCache(context.size_K, context.group_K, capacity_G, watched, miss == "bypass")
    fixed = [0, EXPERTS]
    cache.fix(fixed)
    for step in steps:
        watched.begin(step)
        for call in calls_of(step, EXPERTS):
            cache.look_up(call.keys)
            cache._check()
            cache.release()
            cache.prefetch(int(rng.integers(LAYERS * EXPERTS)), arrived=bool(rng.integers(2)))
            for key in range(LAYERS * EXPERTS):
                if cache.state(key) == 1 and rng.integers(2):
                    cache.arrived(key)
                elif cache.state(key) == 1 and rng.integers(2):
                    cache.cancelled(key)
            cache._check()
            assert watched.there == {k for k in range(LAYERS * EXPERTS) if cache.state(k)} - set(fixed)
    assert watched.victims > 20


def play(kind, steps, semantics=None, **more):
    policy = load_policy("eviction", kind)
    return replay(steps, policy, EXPERTS, 9, semantics=semantics, fit=FIT, keep_events=True, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_twice_and_a_fresh_state_each_time(kind):
    ids, sequences = routes(2)
    steps = chunks(ids, sequences, 2)
    policy = load_policy("eviction", kind)
    runs = [
        replay(steps, policy, EXPERTS, 9, fit=FIT, keep_events=True, semantics=CacheSemantics(miss=miss)).events
        for miss in ("evict", "bypass", "evict", "bypass")
    ]
    assert runs[0] == runs[2]
    assert runs[1] == runs[3]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaves_where_everything_fits(kind):
    ids, sequences = routes(3)
    for pooled in (False, True):
        found = replay(
            chunks(ids, sequences, 4),
            load_policy("eviction", kind),
            EXPERTS,
            LAYERS * EXPERTS,
            semantics=CacheSemantics(pooled=pooled),
            fit=FIT,
        ).counters
        touched = {(layer, e) for token in ids.tolist() for layer, row in enumerate(token) for e in row if e < EXPERTS}
        assert found.evictions == found.streams == 0
        assert found.loads == found.cold == len(touched)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("miss", ["evict", "bypass"])
def test_who_does_not_know_the_future_does_not_look_at_it(kind, miss):
    knows = load_policy("eviction", kind).knows_future
    assert type(knows) is bool
    ids, sequences = routes(4)
    differs = 0
    for cut, tokens in ((8, 1), (15, 1), (27, 3)):
        other = np.array(ids)
        other[cut:] = routes(77)[0][cut:]
        semantics = CacheSemantics(miss=miss, pooled=tokens == 1)
        now = chunks(ids[:cut], sequences[:cut], tokens)
        mine, theirs = (
            play(kind, now, semantics, future=future_of(chunks(all_ids, sequences, tokens), EXPERTS))
            for all_ids in (ids, other)
        )
        differs += (mine.events, mine.cache.resident()) != (theirs.events, theirs.cache.resident())
    assert bool(differs) == knows


@pytest.mark.parametrize("miss", ["evict", "bypass"])
def test_the_later_layers_of_a_step_are_seen_by_those_alone_who_say_so(miss):
    ids, sequences = routes(8, 60)
    other = np.array(ids)
    other[:, -1] = (ids[:, -1] + 3) % EXPERTS  # the last layer only
    semantics = CacheSemantics(miss=miss, pooled=True)
    see = set()
    for kind in KINDS:
        # one step after the other from the same past: where the last layers differ, what comes before must not
        for n in range(4, 20, 3):
            cut = 3 * n
            runs = [
                play(kind, chunks(np.concatenate([ids[:cut], now[cut : cut + 3]]), sequences[: cut + 3], 3), semantics)
                for now in (ids, other)
            ]
            mine, theirs = ([e for e in run.events if (e.step, e.layer) < (n, LAYERS - 1)] for run in runs)
            if mine != theirs:
                see.add(kind)
    assert see <= {"predictive"} | {kind for kind in KINDS if load_policy("eviction", kind).knows_future}


@pytest.mark.parametrize("kind", [k for k in KINDS if load_policy("eviction", k).knows_future])
def test_who_knows_the_future_must_be_told_it(kind):
    steps = chunks(routes(5)[0])
    context = context_of(steps, EXPERTS, 9)
    with pytest.raises(BadInput, match=r"look-ups to come|queued requests"):
        load_policy("eviction", kind).start(context)
    load_policy("eviction", kind).start(replace(context, upcoming=future_of(steps, EXPERTS)))


SCRIPT = """
import hashlib
from tests.conformance.test_eviction import KINDS, play, routes
from moesim.offload import CacheSemantics
from moesim.offload.replay import side_by_side
steps = side_by_side(*routes(6), 3)
text = repr([(k, play(k, steps, CacheSemantics(miss=m)).events) for k in KINDS for m in ("evict", "bypass")])
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_decisions_do_not_depend_on_hash_seeds():
    root = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "4242")
    }
    assert len(digests) == 1


def test_the_seed_matters_to_those_who_draw_and_to_nobody_else():
    steps = chunks(*routes(7))
    draws = {kind for kind in KINDS if play(kind, steps, seed=1).events != play(kind, steps, seed=2).events}
    assert draws == {"random", "predictive"} & set(KINDS)
