"""Small placements against all of them: at most 6 experts on 3 ranks, with and without replicas.

Exact methods reach the optimum of their own objective, the proven bound is never above the optimum, and what greedy and
local search leave over is held to what was measured on other seeds.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.placement import Placement, PlacementContext, TokenSample
from moesim.placement.bound import balance_bound
from moesim.policy import load_policy, policy_class, policy_kinds

INSTANCES = 250
"""without replicas, and as many with one to three"""
EXACT = [kind for kind in policy_kinds("placement") if getattr(policy_class("placement", kind), "exact", False)]


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


def instances(seed: int, replicas: bool) -> list[tuple[NDArray[np.float64], int, int]]:
    """Loads [1, E], slots, ranks."""
    rng = np.random.default_rng(seed)
    out: list[tuple[NDArray[np.float64], int, int]] = []
    while len(out) < INSTANCES:
        experts, ranks = int(rng.integers(2, 7)), int(rng.integers(2, 4))
        slots = experts + (int(rng.integers(1, 4)) if replicas else 0)
        if slots >= ranks:
            out.append((rng.lognormal(0, rng.uniform(0.2, 1.5), (1, experts)), slots, ranks))
    return out


@pytest.fixture(scope="module", params=[False, True], ids=["one place each", "replicas"])
def solved(request: pytest.FixtureRequest) -> tuple[bool, list[tuple[NDArray[np.float64], int, int, float]]]:
    cases = instances(20, request.param)
    return request.param, [(w, slots, ranks, optimum(w[0], slots, ranks)) for w, slots, ranks in cases]


def test_the_oracle_by_hand() -> None:
    assert len(packings(6, 3)) == 15
    assert len(packings(5, 2)) == 20  # without names only empty ranks are the same: 2 : 3 and 3 : 2 differ
    # 5 | 4 + 1, against 5 + 1 | 4
    assert optimum(np.array([5.0, 4, 1]), 3, 2) == pytest.approx(1.0)
    # 6 -> 3 + 3: each with one of the others
    assert optimum(np.array([6.0, 2, 2]), 4, 2) == pytest.approx(1.0)


def test_the_bound_is_never_above_the_optimum(solved: Any, record_property: Any) -> None:
    """And equal to it in the share of cases that other seeds showed: 83 to 88 % with one place each, 37 to 40 % with
    replicas."""
    replicas, cases = solved
    bound = np.array([balance_bound(w, slots, ranks)[0] for w, slots, ranks, _ in cases])
    best = np.array([case[3] for case in cases])
    assert (bound <= best * (1 + 1e-8)).all()
    equal = float((bound >= best * (1 - 1e-6)).mean())
    record_property("equal", equal)
    assert equal >= (0.33 if replicas else 0.80)


@pytest.mark.parametrize(
    ("kind", "parameters", "mean", "worst"),
    [
        # measured on seeds 101 to 103, without and with replicas: mean and worst of max/mean over the optimum
        ("eplb", {}, (1.0021, 1.0365), (1.088, 1.371)),
        ("eplb_swap", {"uneven": True, "effort": 0}, (1.0001, 1.031), (1.0001, 1.371)),
        ("eplb_swap", {"uneven": True}, (1.0001, 1.0072), (1.0001, 1.25)),
        ("lina", {}, (1.0087, 1.033), (1.185, 1.371)),
    ],
)
def test_what_greedy_and_search_leave_over(
    solved: Any, kind: str, parameters: dict[str, Any], mean: tuple[float, float], worst: tuple[float, float]
) -> None:
    replicas, cases = solved
    gaps = []
    for weight, slots, ranks, best in cases:
        if slots % ranks and "uneven" not in parameters:
            continue
        value = {"kind": kind, "num_redundant_experts": slots - weight.shape[1], **parameters}
        placement = load_policy("placement", value).place(weight, PlacementContext(ranks))
        gaps.append(placement.balance(weight)[0] / best)
    assert min(gaps) >= 1 - 1e-9
    # a mean over other instances differs by a few standard errors, a worst case by luck
    assert np.mean(gaps) <= mean[replicas] + 3 * np.std(gaps) / len(gaps) ** 0.5, np.mean(gaps)
    assert max(gaps) <= 1 + 1.25 * (worst[replicas] - 1), max(gaps)


# ---- policies that promise to be exact


def every_map(layers: int, experts: int, ranks: int) -> NDArray[np.int64]:
    """All maps of one place an expert, E / G a rank, slots of a rank in order: [M, L, E]."""
    room = experts // ranks
    one = [
        p
        for p in itertools.permutations(range(experts))
        if all(list(p[g * room : (g + 1) * room]) == sorted(p[g * room : (g + 1) * room]) for g in range(ranks))
    ]
    return np.array(list(itertools.product(one, repeat=layers)))


def traffic(rng: np.random.Generator, layers: int, experts: int) -> tuple[NDArray[np.float64], TokenSample]:
    """Tokens of one choice that tend to go on to the next expert, and their loads [L, E]."""
    ids = np.empty((60, layers, 1), np.int64)
    ids[:, 0, 0] = rng.choice(experts, 60, p=rng.dirichlet(np.ones(experts)))
    for layer in range(1, layers):
        stays = rng.random(60) < 0.6
        ids[:, layer, 0] = np.where(stays, (ids[:, layer - 1, 0] + 1) % experts, rng.integers(0, experts, 60))
    weight = np.stack([np.bincount(ids[:, layer, 0], minlength=experts) for layer in range(layers)]).astype(np.float64)
    return weight, TokenSample(ids, np.repeat(np.arange(6), 10), experts)


@pytest.mark.parametrize("kind", EXACT or ["none"])
def test_exact_methods_are_optimal_under_their_own_objective(kind: str) -> None:
    """Against every map of up to 6 experts on up to 3 ranks; as many instances as make 500 with the shapes."""
    if kind == "none":
        pytest.skip("no placement promises to be exact")
    rng, checked = np.random.default_rng(31), 0
    for layers, experts, ranks, number in [(2, 4, 2, 200), (1, 6, 3, 150), (3, 2, 2, 150)]:
        maps = every_map(layers, experts, ranks)
        for _ in range(number):
            weight, sample = traffic(rng, layers, experts)
            ctx = PlacementContext(ranks, sample=sample)
            policy = load_policy("placement", kind)
            try:
                placement = policy.place(weight, ctx)
            except BadInput:
                break  # of one layer or of one choice there is nothing to optimise for some
            ours = np.sum(value(policy, placement, weight, ctx))
            best = min(np.sum(value(policy, Placement(m, experts, ranks), weight, ctx)) for m in maps)
            assert ours <= best * (1 + 1e-9) + 1e-9
            checked += 1
    assert checked >= 150


def value(policy: Any, placement: Placement, weight: NDArray[np.float64], ctx: PlacementContext) -> Any:
    objective = getattr(policy, "objective", None)
    return placement.balance(weight) if objective is None else objective(placement, weight, ctx)
