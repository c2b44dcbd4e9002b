"""The bounds that a result shows beside its hit rate, against a search of everything that a cache could keep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesim.cost.offload_figures import hit_bounds
from moesim.cost.offload_setup import RankPlan
from moesim.cost.offloaded import KINDS
from moesim.offload import CacheSemantics, Compressed, MissCosts, OffloadContext, OffloadPlan

LAYERS, EXPERTS, SIZE = 2, 4, 10


def rank(slots: int, pooled: bool, start: set[int], fixed: set[int]) -> RankPlan:
    """What `hit_bounds` looks at of a rank. slots: of a layer, or of the pool."""
    shape = (LAYERS, EXPERTS)
    costs = MissCosts(1.0, lambda rows: 1.0, lambda rows: 1.0, 0.0, 1.0)
    context = OffloadContext(
        LAYERS, EXPERTS, 2, np.full(shape, SIZE), 1000, 1, np.ones(shape), CacheSemantics(pooled=pooled), costs, 0
    )
    there, good = (np.isin(np.arange(LAYERS * EXPERTS), sorted(keys)).reshape(shape) for keys in (start, fixed))
    capacity = np.full(1 if pooled else LAYERS, slots * SIZE + 3)
    stored = Compressed(np.full(shape, 16.0), np.tile(np.arange(EXPERTS), (LAYERS, 1)))
    return RankPlan(context, stored, OffloadPlan(capacity, good, there, np.zeros(shape, bool)))


def most(calls: list[set[int]], slots: int, start: frozenset[int]) -> int:
    """Most hits of one cache: after each call it keeps any `slots` of what it had and what was asked for."""
    best = {start: 0}
    for call in calls:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            pool = held | call
            for kept in itertools.combinations(sorted(pool), min(slots, len(pool))):
                state = frozenset(kept)
                after[state] = max(after.get(state, 0), hits + len(held & call))
        best = after
    return max(best.values())


@pytest.mark.parametrize("pooled", [False, True])
def test_no_choice_of_what_to_keep_finds_more(pooled: bool) -> None:
    rng = np.random.default_rng(12)
    strict = 0
    for _ in range(25):
        slots = int(rng.integers(1, 4))
        groups = [range(LAYERS * EXPERTS)] if pooled else [range(4), range(4, 8)]
        fixed = set(rng.choice(8, int(rng.integers(0, 2)), replace=False).tolist())
        start = {int(key) for group in groups for key in rng.choice(group, int(rng.integers(0, slots + 1)), False)}
        rows, calls = [], []
        for step, layer in itertools.product(range(6), range(LAYERS)):
            asked = (rng.choice(EXPERTS, int(rng.integers(1, 4)), replace=False) + layer * EXPERTS).tolist()
            kinds = [int(rng.integers(0, len(KINDS))) for _ in asked]
            rows += [(step, layer, key, kind) for key, kind in zip(asked, kinds, strict=True)]
            calls.append({key for key, kind in zip(asked, kinds, strict=True) if kind != KINDS.index("cpu")})
        hits, missed, number = hit_bounds(rank(slots, pooled, start, fixed), np.array(rows))
        wanted = sum(len(call & fixed) for call in calls)
        for group in groups:
            mine = [call & set(group) - fixed for call in calls]
            wanted += most([call for call in mine if call], slots, frozenset((start & set(group)) - fixed))
        assert number == sum(map(len, calls))
        assert hits[1] == wanted
        assert hits[0] <= hits[1]
        assert missed == (number - wanted) * SIZE
        strict += int(hits[0] < hits[1])
    assert strict
