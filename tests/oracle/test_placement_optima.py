"""Small placements against all of them: at most 6 experts on 3 ranks, with and without replicas.

The proven bound is never above the optimum, and what greedy and local search leave over is held to what was measured on
other seeds. Methods that promise to be exact: tests/oracle/test_affinity_optima.py.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.placement import PlacementContext
from moesim.placement.bound import balance_bound
from moesim.policy import load_policy

INSTANCES = 250
"""without replicas, and as many with one to three"""


@functools.cache
def packings(slots: int, ranks: int) -> NDArray[np.float64]:
    """Every way to deal slots to ranks of S // G or one more, ranks without names: one-hot [P, S, G]."""
    low, extra = divmod(slots, ranks)
    found: list[list[int]] = []

    def deal(chosen: list[int], sizes: list[int]) -> None:
        if len(chosen) == slots:
            found.append(list(chosen))
            return
        fuller = sum(size > low for size in sizes)
        for rank, size in enumerate(sizes):
            if size < low or (size == low and fuller < extra):
                sizes[rank] += 1
                deal([*chosen, rank], sizes)
                sizes[rank] -= 1
            if size == 0:  # the other empty ranks are the same
                break

    deal([], [0] * ranks)
    return (np.array(found)[:, :, None] == np.arange(ranks)).astype(np.float64)


@functools.cache
def replica_counts(experts: int, slots: int) -> NDArray[np.int64]:
    every = itertools.product(range(1, slots - experts + 2), repeat=experts)
    return np.array([count for count in every if sum(count) == slots])


def optimum(weight_E: NDArray[np.float64], slots: int, ranks: int) -> float:
    """The least max/mean rank load over all replica counts and packings."""
    counts = replica_counts(len(weight_E), slots)
    load_CS = np.stack([np.repeat(weight_E / count, count) for count in counts])
    load_CPG = np.einsum("cs,psg->cpg", load_CS, packings(slots, ranks), optimize=True)
    return float(load_CPG.max(axis=2).min() * ranks / weight_E.sum())


Case = tuple[NDArray[np.float64], int, int, NDArray[np.float64]]
"""loads of instances of one shape [I, E], slots, ranks, least max/mean rank load [I]"""


def instances(seed: int, replicas: bool) -> list[Case]:
    rng = np.random.default_rng(seed)
    by_shape: dict[tuple[int, int, int], list[NDArray[np.float64]]] = {}
    for _ in range(INSTANCES):
        slots, ranks = 0, 1
        while slots < ranks:
            experts, ranks = int(rng.integers(2, 7)), int(rng.integers(2, 4))
            slots = experts + (int(rng.integers(1, 4)) if replicas else 0)
        weight_E = rng.lognormal(0, rng.uniform(0.2, 1.5), experts)
        by_shape.setdefault((experts, slots, ranks), []).append(weight_E)
    return [
        (np.stack(rows), slots, ranks, np.array([optimum(row, slots, ranks) for row in rows]))
        for (_, slots, ranks), rows in by_shape.items()
    ]


@pytest.fixture(scope="module", params=[False, True], ids=["one place each", "replicas"])
def solved(request: pytest.FixtureRequest) -> tuple[bool, list[Case]]:
    return request.param, instances(20, request.param)


def test_the_oracle_by_hand() -> None:
    assert len(packings(6, 3)) == 15
    assert len(packings(5, 2)) == 10
    # 5 | 4 + 1, against 5 + 1 | 4
    assert optimum(np.array([5.0, 4, 1]), 3, 2) == pytest.approx(1.0)
    # 6 -> 3 + 3: each with one of the others
    assert optimum(np.array([6.0, 2, 2]), 4, 2) == pytest.approx(1.0)


def test_the_bound_is_never_above_the_optimum(solved: Any, record_property: Any) -> None:
    """And equal to it in as many cases as seeds 101 to 110 showed at least: 82 to 91 % with one place each, 30 to 40 %
    with replicas."""
    replicas, cases = solved
    bound = np.concatenate([balance_bound(weight, slots, ranks) for weight, slots, ranks, _ in cases])
    best = np.concatenate([case[3] for case in cases])
    assert len(best) == INSTANCES
    assert (bound <= best * (1 + 1e-8)).all()
    equal = float((bound >= best * (1 - 1e-6)).mean())
    record_property("equal", equal)
    assert equal >= (0.30 if replicas else 0.82)


def gaps_of(cases: list[Case], kind: str, parameters: dict[str, Any]) -> NDArray[np.float64]:
    """Max/mean rank load over the least one, of every instance that the policy takes."""
    gaps = []
    for weight, slots, ranks, best in cases:
        if slots % ranks == 0 or "uneven" in parameters:
            value = {"kind": kind, "num_redundant_experts": slots - weight.shape[1], **parameters}
            gaps.append(load_policy("placement", value).place(weight, PlacementContext(ranks)).balance(weight) / best)
    return np.concatenate(gaps)


@pytest.mark.parametrize(
    ("kind", "parameters", "mean", "worst"),
    [
        # of 2,500 instances on seeds 101 to 110: the mean and three standard errors of a mean of 250, the worst; with
        # one place each, with replicas (means 1.0012 and 1.030, 1 and 1.028, 1 and 1.0037, 1.0042 and 1.029)
        ("eplb", {}, (1.0030, 1.0475), (1.1152, 1.4522)),
        ("eplb_swap", {"uneven": True, "effort": 0}, (1.00001, 1.0394), (1.00001, 1.4908)),
        ("eplb_swap", {"uneven": True}, (1.00001, 1.0061), (1.00001, 1.1870)),
        ("lina", {}, (1.0087, 1.0447), (1.1850, 1.4522)),
    ],
)
def test_what_greedy_and_search_leave_over(
    solved: Any,
    kind: str,
    parameters: dict[str, Any],
    mean: tuple[float, float],
    worst: tuple[float, float],
    record_property: Any,
) -> None:
    replicas, cases = solved
    gap = gaps_of(cases, kind, parameters)
    record_property("mean_gap", float(gap.mean()))
    record_property("worst_gap", float(gap.max()))
    assert gap.min() >= 1 - 1e-9
    assert gap.mean() <= mean[replicas], f"mean gap {gap.mean():.4f}, worst {gap.max():.4f}"
    assert gap.max() <= worst[replicas], f"mean gap {gap.mean():.4f}, worst {gap.max():.4f}"
