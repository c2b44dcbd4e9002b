"""Eviction against oracles: a cache written from the definitions, and a search of all decisions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from moesim.offload import CacheSemantics, RouteSample
from moesim.offload.replay import calls_of, chunks, most_hits, replay
from moesim.policy import load_policy, policy_kinds
from tests.oracle.cache_by_hand import Play, cut

# what a kind is called by hand, its kind, its parameters
VARIANTS = [
    ("lru", "lru", {}),
    ("fifo", "fifo", {}),
    ("random", "random", {}),
    ("lfu", "lfu", {}),
    ("lfu", "lfu", {"counts": "resident"}),
    ("lfru", "lfru", {}),
    ("lfru", "lfru", {"counts": "all"}),
    ("partitioned", "lfru", {"form": "partitioned", "privileged": 0.4}),
    ("static", "static", {}),
    ("sliding", "sliding", {"window": 3, "unit": "tokens"}),
    ("sliding", "sliding", {"window": 4, "unit": "look_ups"}),
    ("scores", "activation_aware", {}),
    ("scores", "activation_aware", {"layers": "none"}),
    ("visits", "activation_aware", {"form": "visits"}),
    ("belady", "belady", {}),
    ("look_ahead", "look_ahead", {"window": 3}),
    ("predictive", "predictive", {"accuracy": 0.6}),
]
CUTS = [("each", 1), ("layer", 1), ("token", 1), ("batch", 3)]


def routes(rng, layers, experts, top_k, tokens):
    """ids [T, L, K], skewed so that some experts come back, and sequences [T]."""
    share = rng.random((layers, experts)) ** 3 + 1e-3
    share /= share.sum(axis=1, keepdims=True)
    ids = [[rng.choice(experts, top_k, replace=False, p=p) for p in share] for _ in range(tokens)]
    return np.array(ids), np.sort(rng.integers(0, 3, tokens))


def test_every_kind_is_held_against_the_definitions():
    assert {kind for _, kind, _ in VARIANTS} >= set(policy_kinds("eviction"))


@pytest.mark.parametrize(("name", "kind", "parameters"), VARIANTS)
def test_events_equal_those_of_a_cache_written_from_the_definitions(name, kind, parameters):
    rng = np.random.default_rng(len(name) + 7 * len(parameters))
    policy = load_policy("eviction", {"kind": kind, **parameters})
    for trial in range(32):
        granularity, tokens = CUTS[trial % 4]
        pooled, bypass = bool(trial // 4 % 2), bool(trial // 8 % 2)
        layers, experts, top_k = int(rng.integers(1, 4)), int(rng.integers(4, 8)), int(rng.integers(1, 4))
        ids, sequences = routes(rng, layers, experts, top_k, int(rng.integers(6, 13)))
        fit = RouteSample(*routes(rng, layers, experts, top_k, 9))
        slots = int(rng.integers(0, experts if not pooled else layers * experts))
        capacity = slots * (1 if pooled else layers) + (0 if pooled else int(rng.integers(layers)))
        first = rng.permutation(experts)[: min(slots, 2)].tolist()
        found = replay(
            chunks(ids, sequences, tokens),
            policy,
            experts,
            capacity,
            granularity=granularity,
            semantics=CacheSemantics(pooled=pooled, miss="bypass" if bypass else "evict"),
            fit=fit,
            initial=first,
            seed=trial,
            keep_events=True,
        )
        found.cache._check()
        by_hand = Play(
            ids.tolist(),
            sequences.tolist(),
            experts,
            granularity,
            tokens,
            slots,
            pooled,
            bypass,
            name,
            parameters,
            trial,
            [float((fit.expert_TLK[:, k // experts] == k % experts).sum()) for k in range(layers * experts)],
            tuple(first),
        )
        events, evictions = by_hand.run()
        assert [(e.key, e.kind) for e in found.events] == events
        counters = found.counters
        assert counters.evictions == evictions
        assert counters.hits == sum(kind == "hit" for _, kind in events)
        assert counters.calls == len(by_hand.calls)
        assert counters.hit_rows + counters.miss_rows == ids.size
        if bypass is False and granularity == "each" and slots:
            assert counters.streams == 0


def test_calls_equal_the_definition():
    rng = np.random.default_rng(3)
    for granularity, tokens in CUTS:
        ids, sequences = routes(rng, 3, 6, 2, 7)
        steps = chunks(ids, sequences, tokens)
        calls = [(step.number, call.keys) for step in steps for call in calls_of(step, 6, granularity)]
        assert calls == cut(ids, 6, granularity, tokens)


def most_by_search(calls, slots, group, bypass):
    """The most hits over all choices of victims (and, with bypass, of who enters and in which order)."""

    def afters(state, call):
        out = set()

        def go(now, waiting, pinned):
            if not waiting:
                out.add(now)
                return
            for i in range(len(waiting)) if bypass else (0,):
                key, rest = waiting[i], waiting[:i] + waiting[i + 1 :]
                mates = [k for k in now if group(k) == group(key)]
                if len(mates) < slots:
                    go(now | {key}, rest, pinned | {key})
                    continue
                free = [k for k in mates if k not in pinned]
                if bypass or not free:
                    go(now, rest, pinned)
                for victim in free:
                    go((now - {victim}) | {key}, rest, pinned | {key})

        go(state, tuple(k for k in call if k not in state), frozenset(call) & state)
        return out

    @lru_cache(None)
    def best(n, state):
        if n == len(calls):
            return 0
        return sum(k in state for k in calls[n]) + max(best(n + 1, after) for after in afters(state, calls[n]))

    return best(0, frozenset())


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize(("granularity", "tokens"), CUTS)
def test_belady_equals_a_search_of_all_decisions(granularity, tokens, bypass):
    rng = np.random.default_rng(11)
    policy = load_policy("eviction", "belady")
    for trial in range(40):
        layers, experts = int(rng.integers(1, 3)), int(rng.integers(3, 6))
        ids, sequences = routes(rng, layers, experts, int(rng.integers(1, 4)), int(rng.integers(3, 9)))
        pooled, slots = bool(trial % 2), int(rng.integers(1, 5))
        steps = chunks(ids, sequences, tokens)
        calls = tuple(tuple(call.keys) for step in steps for call in calls_of(step, experts, granularity))
        capacity = slots if pooled else slots * layers
        semantics = CacheSemantics(pooled=pooled, miss="bypass" if bypass else "evict")
        hits = replay(steps, policy, experts, capacity, granularity=granularity, semantics=semantics).counters.hits
        most = most_by_search(calls, slots, lambda k: 0 if pooled else k // experts, bypass)  # noqa: B023 (used at once)
        bound = most_hits(steps, experts, capacity, granularity=granularity, pooled=pooled)
        assert hits <= most <= bound
        if not bypass or granularity == "each":
            assert hits == most  # calls that ask for more than fits included
        if bypass and granularity == "each":
            assert hits == bound


def test_a_hand_worked_case():
    # a b c a b d a, two slots. MIN: a, b enter; c evicts b (next 4, a 3); hit a; b evicts c; d evicts b; hit a.
    ids = np.array([0, 1, 2, 0, 1, 3, 0])[:, None, None]
    kinds = {}
    for miss in ("evict", "bypass"):
        found = replay(
            chunks(ids), load_policy("eviction", "belady"), 4, 2, semantics=CacheSemantics(miss=miss), keep_events=True
        )
        kinds[miss] = [event.kind for event in found.events]
    assert kinds["evict"] == ["load", "load", "load", "hit", "load", "load", "hit"]
    assert kinds["bypass"] == ["load", "load", "stream", "hit", "hit", "stream", "hit"]
    assert most_hits(chunks(ids), 4, 2) == 3


def test_cold_touches_are_hits_only_where_the_semantics_say_so():
    ids = np.array([0, 1, 2, 0])[:, None, None]
    lru = load_policy("eviction", "lru")
    rates = [replay(chunks(ids), lru, 4, 2, semantics=CacheSemantics(cold=cold)).hit_rate for cold in ("miss", "hit")]
    assert rates == [0.0, 0.5]  # 0 and 1 come into free room; 2 is a first touch, too, but evicts
