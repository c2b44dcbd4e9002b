"""Every balancing policy keeps the family's promises. A file added to moesim/balancing/ is found here by itself."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.balancing import hash_64
from moesim.policy import load_policy, policy_kinds

KINDS = policy_kinds("balancing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [1, 2, 7, 64])
def test_a_target_that_exists_and_the_same_one_twice(kind, targets):
    rng = np.random.default_rng(targets)
    policy, again = load_policy("balancing", kind), load_policy("balancing", kind)
    for count in range(50):
        load = rng.integers(0, 9, targets)
        before = load.copy()
        session = int(rng.integers(-1, 5))
        target = policy.pick(load, count * 3, session, count)
        assert type(target) is int
        assert 0 <= target < targets
        assert target == again.pick(load, count * 3, session, count)
        assert (load == before).all()


def test_round_robin_takes_each_in_turn():
    policy = load_policy("balancing", "round_robin")
    assert [policy.pick(np.array([9, 0, 5]), 40 + i, -1, i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_least_loaded_takes_the_least_and_of_equals_the_first():
    policy = load_policy("balancing", "least_loaded")
    assert policy.pick(np.array([4, 1, 3, 1]), 0, -1, 5) == 1
    assert policy.pick(np.array([0, 0, 0]), 9, 2, 1) == 0


def test_a_session_keeps_its_target_and_sessions_spread():
    policy = load_policy("balancing", "session")
    rng = np.random.default_rng(0)
    picks = [{policy.pick(rng.integers(0, 9, 8), r, s, r) for r in range(5)} for s in range(4000)]
    assert all(len(pick) == 1 for pick in picks)
    count = np.bincount([pick.pop() for pick in picks], minlength=8)
    assert ((count - 500) ** 2 / 500).sum() < 24.3  # chi-squared, 7 degrees: 0.1 %


def test_requests_without_a_session_go_round():
    policy = load_policy("balancing", "session")
    assert [policy.pick(np.array([5, 0, 0]), 7, -1, i) for i in range(5)] == [0, 1, 2, 0, 1]


def test_the_hash_is_splitmix64():
    # The first outputs of SplitMix64 seeded with 0 (its state grows by the golden ratio before each).
    assert hash_64(0) == 0xE220A8397B1DCDAF
    assert hash_64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
