"""Compiled counts and choices against those of NumPy, over uneven nodes, replicas and missing experts."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.touch import count_slots, touch
from moesim.dispatch import hash_keys
from moesim.dispatch.local_first import Policy
from moesim.placement import Placement

pytest.importorskip("numba")

LAYERS, EXPERTS, RANKS, CHOICES, TOKENS, SLOTS = 5, 32, 8, 4, 700, 48
NODES = [(0, 0, 0, 1, 1, 1, 2, 2), (0,) * 8]


@pytest.fixture(params=NODES)
def case(request, monkeypatch):
    from moesim.dispatch import compiled

    rng = np.random.default_rng(3)
    every = np.arange(EXPERTS)
    more = rng.integers(EXPERTS, size=(LAYERS, SLOTS - EXPERTS))
    table = np.stack([rng.permutation(np.concatenate([every, row])) for row in more])
    placement = Placement(table, EXPERTS, RANKS, request.param)
    ids = np.argsort(rng.random((TOKENS, LAYERS, EXPERTS)), axis=-1)[..., :CHOICES]
    monkeypatch.setenv("MOESIM_COMPILED", "0")
    return compiled, placement, ids, rng.integers(RANKS, size=TOKENS), rng


def test_near_replicas(case):
    compiled, placement, ids, source_T, rng = case
    token_T = rng.integers(1 << 40, size=TOKENS)
    expected = Policy().assign(ids, source_T, placement, 7, token_T)
    key_T, place_C = hash_keys(7, token_T, LAYERS * CHOICES)
    found = compiled.nearest_slots(ids.astype(np.uint8), source_T, key_T, place_C, placement)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert placement.max_replicas > 2


def test_slots_and_copies(case):
    compiled, placement, ids, source_T, rng = case
    slot_TLK = Policy().assign(ids, source_T, placement, 7)
    slot_TLK[rng.random(slot_TLK.shape) < 0.1] = SLOTS  # no expert
    starts_B = np.unique(np.append(0, rng.integers(TOKENS, size=20)))
    group_T = np.searchsorted(starts_B, np.arange(TOKENS), side="right") - 1
    groups, node_G = len(starts_B), placement.node_of_rank_G
    expected = count_slots(slot_TLK, group_T, groups, SLOTS)
    np.testing.assert_array_equal(compiled.count_slots(slot_TLK, group_T, groups, SLOTS), expected)
    copies = touch(slot_TLK, source_T, starts_B, SLOTS // RANKS, node_G)
    in_BLG, node_in_BLN = compiled.touch_distinct(slot_TLK, source_T, group_T, groups, SLOTS // RANKS, node_G)
    np.testing.assert_array_equal(in_BLG, copies.in_BLG)
    np.testing.assert_array_equal(node_in_BLN, copies.node_in_BLN)
    assert in_BLG.dtype == copies.in_BLG.dtype
