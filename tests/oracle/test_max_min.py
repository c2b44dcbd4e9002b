"""Max-min fair rates against a linear-programming oracle on 1,000 random topologies, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import block_diag, coo_matrix, csr_matrix, hstack, vstack

from moesim.topology import max_min_rates

TOPOLOGIES = 1000
BATCH = 125


def random_topology(number):
    """(capacity_C, uses_FC): up to 7 ports and 9 flows, some ports used twice by a flow, ties and empty
    ports."""
    rng = np.random.default_rng([20, number])
    ports, flows = int(rng.integers(1, 8)), int(rng.integers(1, 10))
    capacity = rng.uniform(0.05, 1.0, ports) if number % 3 else rng.integers(1, 5, ports) / 4.0
    if number % 10 == 0:
        capacity[rng.integers(ports)] = 0.0
    uses = (rng.random((flows, ports)) < rng.uniform(0.15, 0.7)).astype(int)
    uses[np.arange(flows), rng.integers(0, ports, flows)] = 1
    if number % 7 == 0:
        uses[rng.integers(flows)] *= 2
    return capacity, uses


def lexicographic(cases):
    """Max-min rates of independent cases by linear programmes only; no filling, no bottleneck argument.

    Round by round: maximise the smallest rate t of each case's open flows (one LP for all: the cases share
    nothing); fix at t the open flows whose constraint rate >= t has a positive dual: they are t in every
    optimum. The duals of a case sum to one, so each round fixes at least one flow of each case.
    """
    flows = [uses.shape[0] for _, uses in cases]
    owner = np.repeat(np.arange(len(cases)), flows)
    total = owner.size
    capacity = np.concatenate([c for c, _ in cases])
    shared = block_diag([csr_matrix(uses.T) for _, uses in cases], format="csr")
    rate = np.full(total, np.nan)
    while np.isnan(rate).any():
        open_ = np.flatnonzero(np.isnan(rate))
        columns = np.unique(owner[open_])
        smallest = coo_matrix(
            (np.ones(open_.size), (np.arange(open_.size), np.searchsorted(columns, owner[open_]))),
            shape=(open_.size, columns.size),
        )
        floor = coo_matrix((-np.ones(open_.size), (np.arange(open_.size), open_)), shape=(open_.size, total))
        matrix = vstack([hstack([shared, csr_matrix((shared.shape[0], columns.size))]), hstack([floor, smallest])])
        bounds = [(0, None) if np.isnan(r) else (r, r) for r in rate] + [(0, None)] * columns.size
        tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
        solved = linprog(
            np.r_[np.zeros(total), -np.ones(columns.size)],
            A_ub=matrix.tocsr(),
            b_ub=np.r_[capacity, np.zeros(open_.size)],
            bounds=bounds,
            method="highs-ds",
            options=tight,
        )
        assert solved.status == 0, solved.message
        dual = -solved.ineqlin.marginals[capacity.size :]
        fixed = dual > 1e-7
        level = solved.x[total:][np.searchsorted(columns, owner[open_])]
        assert fixed.any()
        rate[open_[fixed]] = level[fixed]
    return np.split(rate, np.cumsum(flows)[:-1])


@pytest.mark.parametrize("batch", range(TOPOLOGIES // BATCH))
def test_equal_to_the_linear_programme(batch):
    cases = [random_topology(number) for number in range(batch * BATCH, (batch + 1) * BATCH)]
    for (capacity, uses), exact in zip(cases, lexicographic(cases), strict=True):
        assert max_min_rates(capacity, uses) == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_three_flows_by_hand():
    # Port 0 (1.0) carries A and B, port 1 (2.0) B and C: A = B = 0.5, C takes what is left of port 1.
    assert max_min_rates([1.0, 2.0], [[0], [0, 1], [1]]).tolist() == [0.5, 0.5, 1.5]


def test_a_port_used_twice_counts_twice():
    assert max_min_rates([3.0], [[0, 0], [0]]).tolist() == [1.0, 1.0]


def test_flows_without_ports_and_ports_without_capacity():
    rates = max_min_rates([0.0, 4.0, np.inf], [[], [0, 1], [1], [2]])
    assert rates.tolist() == [np.inf, 0.0, 4.0, np.inf]
    assert max_min_rates([1.0], []).shape == (0,)
    assert max_min_rates(np.zeros(0), [[], []]).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("capacity", [[-1.0], [np.nan], [[1.0]]])
def test_wrong_capacities_are_refused(capacity):
    with pytest.raises(ValueError, match="capacities"):
        max_min_rates(capacity, [[0]])


@pytest.mark.parametrize("port", [-1, 1])
def test_a_port_that_does_not_exist_is_refused(port):
    with pytest.raises(ValueError, match="ports must lie"):
        max_min_rates([1.0], [[port]])


@pytest.mark.parametrize("seed", range(5))
def test_large_topologies_have_a_bottleneck_for_each_flow(seed):
    """Max-min fair if and only if each flow has a full port where no flow is faster (Bertsekas and Gallager,
    6.5.2)."""
    rng = np.random.default_rng(seed)
    capacity = rng.lognormal(0, 2, 200) * 1e9
    routes = [rng.permutation(200)[: rng.integers(1, 5)] for _ in range(600)]
    rate = max_min_rates(capacity, routes)
    load = np.zeros(200)
    fastest = np.zeros(200)
    for ports, r in zip(routes, rate, strict=True):
        load[ports] += r
        fastest[ports] = np.maximum(fastest[ports], r)
    assert (load <= capacity * (1 + 1e-9)).all()
    full = load >= capacity * (1 - 1e-9)
    for ports, r in zip(routes, rate, strict=True):
        assert (full[ports] & (r >= fastest[ports] * (1 - 1e-9))).any()
