"""Bounds of placement.proven by hand, and against all maps of small layers; what it starts from."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_tuner.placement import starts
from moesim_tuner.placement.configuration import Patterns
from moesim_tuner.placement.exhaust import exhaust
from moesim_tuner.placement.pairs import fits, pair_counts, paired
from moesim_tuner.placement.proven import Policy

from moesim.errors import BadInput
from moesim.placement import EMPTY, PlacementContext
from moesim.placement.bound import balance_bound


def least(share_E: Any, slots: int, ranks: int) -> float:
    """The smallest largest rank load of all replica counts and packings, rank after rank, by trying all."""
    experts = len(share_E)
    low, more = divmod(slots, ranks)

    def fill(copies: tuple[int, ...], left: int, larger: int) -> float:
        if left == 1:
            return sum(each[e] for e in copies)
        best = np.inf
        for size in {low + 1} if larger == left else {low} if not larger else {low, low + 1}:
            for rest in set(itertools.combinations(copies[1:], size - 1)):
                others = list(copies[1:])
                for expert in rest:
                    others.remove(expert)
                here = each[copies[0]] + sum(each[e] for e in rest)
                best = min(best, max(here, fill(tuple(others), left - 1, larger - (size > low))))
        return best

    found = np.inf
    for given_ in itertools.combinations_with_replacement(range(experts), slots - experts):
        count = np.bincount(given_, minlength=experts) + 1
        each = (share_E / count).tolist()
        found = min(found, fill(tuple(np.repeat(np.arange(experts), count).tolist()), ranks, more))
    return float(found)


@st.composite
def layers(draw: Any) -> tuple[Any, int, int]:
    """Loads with mean rank load 1, slots, ranks."""
    experts, ranks = draw(st.integers(2, 5)), draw(st.integers(2, 3))
    slots = max(ranks, experts + draw(st.integers(0, 2)))
    load = st.one_of(st.integers(0, 6).map(float), st.floats(0.01, 100.0))
    weight = np.array(draw(st.lists(load, min_size=experts, max_size=experts)))
    weight[0] += weight.sum() == 0
    return weight * (ranks / weight.sum()), slots, ranks


@settings(max_examples=24, deadline=None, derandomize=True)
@given(layers())
def test_no_bound_is_above_the_optimum(layer: tuple[Any, int, int]) -> None:
    share_E, slots, ranks = layer
    best = least(share_E, slots, ranks)
    assert balance_bound(share_E[None], slots, ranks)[0] <= best * (1 + 1e-9)
    for value in (best, best * 1.3):
        patterns = Patterns(share_E, slots, ranks, value)
        assert patterns.useful
        assert patterns.bound(1.0, 1e-3, 10) <= best * (1 + 1e-9)
        for share_CR in patterns.fractions:
            count_E = patterns.counts(share_CR)
            assert count_E.min() >= 1
            assert count_E.sum() == slots


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers())
def test_trying_all_finds_the_optimum(layer: tuple[Any, int, int]) -> None:
    share_E, slots, ranks = layer
    best = least(share_E, slots, ranks)
    found = exhaust(share_E, slots, ranks, 2.0 * ranks)
    assert found is not None
    assert found.table_S is not None
    balance = PlacementContext(ranks).placement(found.table_S[None], len(share_E)).balance(share_E[None])
    assert balance[0] == pytest.approx(best, rel=1e-9)
    nothing_better = exhaust(share_E, slots, ranks, best)
    assert nothing_better is not None
    assert nothing_better.table_S is None


def test_a_heavy_expert_and_its_neighbours_by_hand() -> None:
    """2.4 and six of 0.1 in eight slots of three ranks (3, 3 and 2): the spare slot goes to the heavy one, and its
    copies, of 1.2, have two neighbours and one: 1.4. With seven of 0.6 / 7 in nine slots each copy has two."""
    assert least(np.array([2.4, *[0.1] * 6]), 8, 3) == pytest.approx(1.4)
    share_E = np.array([2.4, *[0.6 / 7] * 7])
    assert least(share_E, 9, 3) == pytest.approx(1.2 + 1.2 / 7)
    assert Patterns(share_E, 9, 3, 1.5).bound(1.0, 1e-3, 20) == pytest.approx(1.2 + 1.2 / 7, rel=1e-2)


def test_copies_that_stand_alone_by_hand() -> None:
    """Two ranks of two: 1.2, and three of 0.8 / 3. The heavy one has one copy (four slots), so its rank has at least
    1.2 + 0.8 / 3 = 1.4667; counting finds that, and so do patterns."""
    share_E = np.array([1.2, *[0.8 / 3] * 3])
    assert least(share_E, 4, 2) == pytest.approx(1.2 + 0.8 / 3)
    assert balance_bound(share_E[None], 4, 2)[0] == pytest.approx(1.2 + 0.8 / 3)
    assert Patterns(share_E, 4, 2, 1.6).bound(1.0, 1e-4, 20) == pytest.approx(1.2 + 0.8 / 3, rel=2e-2)


def test_patterns_see_what_counting_does_not() -> None:
    """Four ranks of two: 0.8 four times over cannot be: 0.7, 0.7, 0.7, 0.6 and 0.5, 0.4, 0.3, 0.1 must pair to at most
    0.7 + 0.3 and so on. By hand: 0.7 + 0.1, 0.7 + 0.3, 0.7 + 0.4, 0.6 + 0.5: 1.1, where the mean is 1."""
    share_E = np.array([0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.3, 0.1])
    assert least(share_E, 8, 4) == pytest.approx(1.1)
    assert Patterns(share_E, 8, 4, 1.2).bound(1.0, 1e-4, 20) == pytest.approx(1.1, rel=1e-2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers())
def test_pairs_are_packed_as_well_as_can_be(layer: tuple[Any, int, int]) -> None:
    """For given replica counts; and the search over counts never ends above its start."""
    share_E, slots, ranks = layer
    if not fits(slots, ranks):
        return
    count_E = starts.counts(share_E[None], slots, ranks, np.ones(1), 1.0)[0]

    def value(counts: Any) -> float:
        table_S = paired(share_E, counts, ranks)
        placement = PlacementContext(ranks).placement(table_S[None], len(share_E))
        assert placement.replica_count_LE[0].tolist() == counts.tolist()
        return float(placement.balance(share_E[None])[0])

    each = np.repeat(share_E / count_E, count_E)  # as so many experts of one copy each
    assert value(count_E) == pytest.approx(least(each, slots, ranks), rel=1e-9)
    assert value(pair_counts(share_E, count_E, ranks)) <= value(count_E) * (1 + 1e-12)


@pytest.mark.parametrize("part", starts.PARTS)
def test_starts_use_every_slot(part: float) -> None:
    share_LE = np.random.default_rng(5).lognormal(0, 2, (6, 20))
    share_LE *= 8 / share_LE.sum(axis=1, keepdims=True)
    count_LE = starts.counts(share_LE, 30, 8, np.ones(6), part)
    assert (count_LE.sum(axis=1) == 30).all()
    assert count_LE.min() >= 1
    table_LS = starts.pack_counts(share_LE, count_LE, 8)
    held_LG = (table_LS != EMPTY).reshape(6, 8, -1).sum(axis=2)
    assert (held_LG.max(axis=1) - held_LG.min(axis=1) == 1).all()
    assert (PlacementContext(8).placement(table_LS, 20).replica_count_LE == count_LE).all()


def test_spare_slots_go_to_the_lightest_by_hand() -> None:
    """5, 1, 1, 1 on two ranks of three (mean 4): the 5 must have two copies; of two spare slots EPLB gives it both
    (5 / 3), the other start gives one to the lightest."""
    share_LE = np.array([[5.0, 1.0, 1.0, 1.0]]) / 4
    assert starts.counts(share_LE, 6, 2, np.ones(1), 1.0).tolist() == [[3, 1, 1, 1]]
    assert starts.counts(share_LE, 6, 2, np.full(1, 1.3), 0.0).tolist() == [[2, 2, 1, 1]]


def test_what_is_left_open_says_so() -> None:
    """Without CP-SAT and with a tolerance that nothing meets: feasible, or too large to be asked, and a gap."""
    weight = np.random.default_rng(8).lognormal(0, 1.0, (2, 64))
    solution = Policy(num_redundant_experts=8, tolerance=0.0, deterministic_time=0.0).solve(
        weight, PlacementContext(12)
    )
    assert {part.status for part in solution.parts} <= {"too_large", "optimal"}
    assert all(part.bound <= part.objective for part in solution.parts)
    loose = Policy(num_redundant_experts=8, tolerance=0.5, deterministic_time=0.0).solve(weight, PlacementContext(12))
    assert all(part.gap <= 0.5 for part in loose.parts)


def test_ranks_that_must_divide() -> None:
    with pytest.raises(BadInput, match="Use num_redundant_experts = 0, 4 or 8"):
        Policy(num_redundant_experts=3, uneven=False).place(np.ones((1, 8)), PlacementContext(4))
