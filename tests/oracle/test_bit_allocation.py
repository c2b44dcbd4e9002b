"""Bit widths against the optimum: brute force, an integer program of scipy, and MC-MoE's own rules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp

from moesim.errors import BadInput
from moesim.offload.precision.allocation import allocate
from moesim.offload.precision.edgemoe import lower

WIDTHS, ALWAYS = (1, 2, 3), (3, 2)


def cost_of(cost_EB, width_E):
    return sum(float(cost_EB[e, WIDTHS.index(w)]) for e, w in enumerate(width_E))


def brute(cost_EB, budget):
    """The least cost over all 3^E widths, or None."""
    best = None
    for widths in itertools.product(WIDTHS, repeat=len(cost_EB)):
        if sum(widths) <= budget and 3 in widths and 2 in widths:
            cost = cost_of(cost_EB, widths)
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_allocation_is_the_optimum_of_all_widths(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        experts = int(rng.integers(2, 7))
        # not always falling in the bits: the program does not ask for it
        cost = rng.lognormal(0, 1.5, (experts, 3)) * float(rng.choice([1.0, 4.0])) ** -np.arange(3)
        for budget in range(experts, 3 * experts + 2):
            expected = brute(cost, budget)
            if expected is None:
                with pytest.raises(BadInput, match="at least one expert of each"):
                    allocate(cost, WIDTHS, budget, ALWAYS)
                continue
            found = allocate(cost, WIDTHS, budget, ALWAYS)
            assert found.sum() <= budget
            assert {2, 3} <= set(found.tolist())
            assert cost_of(cost, found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("experts", [8, 60])
@pytest.mark.parametrize("average", [1.5, 2.0, 2.5])
def test_allocation_against_an_integer_program(experts, average):
    rng = np.random.default_rng(experts)
    cost = rng.lognormal(0, 1, (experts, 1)) * 4.0 ** -np.array(WIDTHS) * rng.lognormal(0, 0.2, (experts, 3))
    budget = int(average * experts)
    one = np.kron(np.eye(experts), np.ones(3))
    rows = np.vstack([np.tile(WIDTHS, experts), np.tile([0, 0, 1], experts), np.tile([0, 1, 0], experts)])
    constraints = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(rows, [0, 1, 1], [budget, np.inf, np.inf]),
    ]
    answer = milp(cost.ravel(), constraints=constraints, integrality=np.ones(3 * experts), bounds=(0, 1))
    assert answer.success
    found = allocate(cost, WIDTHS, budget, ALWAYS)
    assert cost_of(cost, found) == pytest.approx(answer.fun, rel=1e-6)


def test_allocation_by_hand():
    # Significance 8, 4, 2, 1 times 1/4, 1/16, 1/64: a second bit saves 12/64 of it, a third 3/64. With 8 bits all could
    # have 2, but one must have 3: the heaviest, and the lightest pays with its second.
    cost = np.array([[8.0], [4], [2], [1]]) * 4.0 ** -np.array(WIDTHS)
    assert allocate(cost, WIDTHS, 8, ALWAYS).tolist() == [3, 2, 2, 1]
    assert allocate(cost, WIDTHS, 12, ALWAYS).tolist() == [3, 3, 3, 2]  # one must stay at 2
    assert allocate(cost, WIDTHS, 7, ALWAYS).tolist() == [3, 2, 1, 1]
    with pytest.raises(BadInput):
        allocate(cost, WIDTHS, 6, ALWAYS)


def test_greedy_lowering_by_hand():
    # Widths 8, 4, 2 of three experts of equal size; 14 bits over 3 experts ends at sum <= 14: all go to 4 first
    # (a step from 8 to 4 loses 4^-4 - 4^-8 and saves 4 bits; one from 4 to 2 loses 4^-2 - 4^-4 and saves 2: 30 times
    # more a bit), then the least sensitive goes to 2 only where the budget asks for it.
    sensitive = np.array([[1.0, 2.0, 3.0]])
    size = np.full((1, 3), 10)
    widths = np.array([8.0, 4.0, 2.0])
    assert lower(sensitive, size, widths, 8.0).tolist() == [[8, 8, 8]]
    assert lower(sensitive, size, widths, 6.0).tolist() == [[4, 4, 8]]
    assert lower(sensitive, size, widths, 4.0).tolist() == [[4, 4, 4]]
    assert lower(sensitive, size, widths, 3.0).tolist() == [[2, 2, 4]]
    assert lower(sensitive, size, widths, 2.0).tolist() == [[2, 2, 2]]
    # an expert that is 40 times more sensitive keeps 8 while others are at 2
    assert lower(np.array([[1.0, 1.0, 40.0]]), size, widths, 4.0).tolist() == [[2, 2, 8]]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_lowering_keeps_the_budget_and_is_near_the_optimum(seed, record_property):
    """Within one step of the linear relaxation: greedy steps in the order of their price are optimal for the budget
    that they end at, because each expert's price a bit rises from step to step."""
    rng = np.random.default_rng(seed)
    widths = np.array([8.0, 4.0, 2.0])
    gaps = []
    for _ in range(10):
        sensitive = rng.lognormal(0, 1.5, (2, 3))
        size = np.full((2, 3), 5)
        average = float(rng.uniform(2.2, 7.5))
        found = lower(sensitive, size, widths, average)
        assert found.mean() <= average + 1e-9
        loss = float((sensitive * 4.0**-found).sum())
        total = found.sum()
        best = min(
            float((sensitive.ravel() * 4.0 ** -np.array(choice)).sum())
            for choice in itertools.product(widths, repeat=6)
            if sum(choice) <= total + 1e-9
        )
        assert loss == pytest.approx(best, rel=1e-12)
        gaps.append(average - found.mean())
    assert max(gaps) < 4 / 6 + 1e-9  # a step saves at most 4 bits of one of six experts
    record_property("unused_bits", float(np.mean(gaps)))
