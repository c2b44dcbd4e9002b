"""Placements by affinity, and the solver's, against all assignments of small cases: at most 6 experts on 3 ranks.

Exact methods must reach the least value of their own objective; how far heuristics stay above is recorded and bounded.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from moesim.placement import PlacementContext, TokenSample
from moesim.placement.affinity import Policy as Affinity
from moesim.placement.crossings import load_shares, rank_of, transitions
from moesim.placement.exflow import Policy as ExFlow
from moesim.placement.moetuner import Policy as MoETuner
from moesim.placement.moetuner import cluster_flows, clusters, dearest, deviation, link_prices, to_ranks
from moesim.placement.viterbi import Policy as Viterbi

SHAPES = [(6, 3), (6, 2), (5, 3), (4, 3), (4, 2), (3, 3)]
LAYERS = 3
SOME = [pytest.param(range(0, 500, 13), id="39"), pytest.param(range(500), id="500", marks=pytest.mark.slow)]


@functools.cache
def assignments(experts, ranks):
    """Every assignment with at most one expert more on a rank than on another: [S, E]."""
    low, high = experts // ranks, -(-experts // ranks)
    every = np.array(list(itertools.product(range(ranks), repeat=experts)))
    size = (every[:, :, None] == np.arange(ranks)).sum(axis=1)
    return every[((size >= low) & (size <= high)).all(axis=1)]


def instance(number):
    """Tokens of 3 layers that partly follow a map from expert to expert; ranks on one node, or the last on its own."""
    rng = np.random.default_rng([7, number])
    experts, ranks = SHAPES[number % len(SHAPES)]
    nodes = (0,) * ranks if number % 4 else (*(0,) * (ranks - 1), 1)
    choices = 1 + number % 2
    popular = rng.dirichlet(np.full(experts, rng.uniform(0.5, 4)))
    tokens = int(rng.integers(5, 80))
    ids = np.empty((tokens, LAYERS, choices), np.int64)
    for layer in range(LAYERS):
        drawn = np.argsort(rng.random((tokens, experts)) / (popular + 1e-9), axis=1)[:, :choices]
        follow = rng.permutation(experts)[ids[:, layer - 1]] if layer else drawn
        ids[:, layer] = np.where(rng.random((tokens, 1)) < 0.5, follow, drawn)
    count = np.stack([np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(LAYERS)])
    sample = TokenSample(ids.astype(np.uint8), np.zeros(tokens, np.int64), experts)
    context = PlacementContext(ranks, 1 + max(nodes), rank_to_node=nodes, sample=sample, seed=number)
    return count.astype(float), context


def crossing(ids_TLK, rank_LE, node_G):
    """Mean cost of a transition, token by token: 1 to another rank of the node, 2 to another node."""
    total = pairs = 0
    node = np.array(node_G)
    for layer in range(LAYERS - 1):
        here, there = rank_LE[layer][ids_TLK[:, layer]], rank_LE[layer + 1][ids_TLK[:, layer + 1]]
        apart = here[:, :, None] != there[:, None, :]
        far = node[here][:, :, None] != node[there][:, None, :]
        total += int(apart.sum() + far.sum())
        pairs += apart.size
    return total / pairs


def least_crossing(ids_TLK, experts, ranks, node_G, own_LS):
    """The least of all sequences of assignments, every one of them looked at."""
    state_SE, node = assignments(experts, ranks), np.array(node_G)
    cost = (np.arange(ranks)[:, None] != np.arange(ranks)).astype(float) + (node[:, None] != node)
    pairs = (LAYERS - 1) * ids_TLK.shape[0] * ids_TLK.shape[2] ** 2
    step = []
    for layer in range(LAYERS - 1):
        count = np.zeros((experts, experts))
        for a, b in itertools.product(range(ids_TLK.shape[2]), repeat=2):
            np.add.at(count, (ids_TLK[:, layer, a], ids_TLK[:, layer + 1, b]), 1)
        apart = np.einsum("sij,ik->skj", cost[state_SE[:, :, None], np.arange(ranks)].transpose(0, 1, 2), count)
        step.append(sum(apart[:, e][:, state_SE[:, e]] for e in range(experts)) / pairs)
    every = (own_LS[0][:, None] + step[0])[:, :, None] + own_LS[1][None, :, None] + step[1][None] + own_LS[2]
    return float(every.min())


def nothing(experts, ranks):
    return np.zeros((LAYERS, len(assignments(experts, ranks))))


def record(record_property, gaps):
    for name, values in gaps.items():
        record_property(f"{name}_mean_gap", float(np.mean(values)))
        record_property(f"{name}_worst_gap", float(np.max(values)))


@pytest.mark.parametrize("numbers", SOME)
def test_viterbi_is_exact_and_the_heuristics_come_near(numbers, record_property):
    """Gaps in units of all transitions, as a crossing share may be 0."""
    gaps = {"affinity": [], "exflow": []}
    for number in numbers:
        weight, ctx = instance(number)
        ids, experts = ctx.sample.expert_TLK.astype(int), weight.shape[1]
        least = least_crossing(ids, experts, ctx.num_ranks, ctx.rank_to_node, nothing(experts, ctx.num_ranks))
        exact = Viterbi(uneven=True).place(weight, ctx)
        assert Viterbi(uneven=True).objective(exact, weight, ctx) == pytest.approx(least, abs=1e-12)
        assert crossing(ids, rank_of(exact), ctx.rank_to_node) == pytest.approx(least, abs=1e-12)
        for name, policy in (("affinity", Affinity(balance_weight=0.0, uneven=True)), ("exflow", ExFlow(uneven=True))):
            value = policy.objective(policy.place(weight, ctx), weight, ctx)
            assert value >= least - 1e-12
            gaps[name].append(value - least)
    record(record_property, gaps)
    assert np.mean(gaps["affinity"]) < 0.004
    assert np.mean(gaps["exflow"]) < 0.004
    assert max(max(values) for values in gaps.values()) < 0.1


@pytest.mark.parametrize("numbers", SOME)
def test_viterbi_and_affinity_weigh_balance_alike(numbers, record_property):
    """The sum of crossings and load variance: exact for Viterbi, near for affinity."""
    gaps = {"affinity": []}
    for number in numbers:
        weight, ctx = instance(number)
        experts, ranks = weight.shape[1], ctx.num_ranks
        state_SE, share = assignments(experts, ranks), load_shares(weight)
        load = np.stack([(share[:, None, :] * (state_SE == rank)).sum(axis=2) for rank in range(ranks)])
        own = ((load * ranks - 1) ** 2).mean(axis=0) / LAYERS
        least = least_crossing(ctx.sample.expert_TLK.astype(int), experts, ranks, ctx.rank_to_node, own)
        exact = Viterbi(balance_weight=1.0, uneven=True)
        assert exact.objective(exact.place(weight, ctx), weight, ctx) == pytest.approx(least, abs=1e-12)
        gaps["affinity"].append(
            Affinity(uneven=True).objective(Affinity(uneven=True).place(weight, ctx), weight, ctx) - least
        )
    record(record_property, gaps)
    assert min(gaps["affinity"]) >= -1e-12
    assert np.mean(gaps["affinity"]) < 0.006


def stage_two(flow, price, ranks):
    every = np.array(list(itertools.permutations(range(ranks))))
    step = [
        np.array([[(f * price[p][:, q]).max() for q in every] for p in every])
        for f in flow
    ]  # fmt: skip
    return float((step[0][:, :, None] + step[1][None]).min())


@pytest.mark.parametrize("numbers", SOME)
def test_moetuner_against_all_clusters_and_all_ranks(numbers, record_property):
    """Stage 2 is exact on so few ranks, ties for fewer crossings aside; gaps of stage 1 in units of mean load."""
    gaps = {"stage_1": [], "stage_2": []}
    for number in numbers:
        weight, ctx = instance(number)
        share, ranks = load_shares(weight), ctx.num_ranks
        state_SE = assignments(weight.shape[1], ranks)
        cluster_LE = clusters(share, ranks)
        for layer in range(LAYERS):
            least = deviation(np.broadcast_to(share[layer], state_SE.shape), state_SE, ranks).min()
            gaps["stage_1"].append(deviation(share[layer : layer + 1], cluster_LE[layer : layer + 1], ranks)[0] - least)
        flow, price = cluster_flows(transitions(weight, ctx), cluster_LE, ranks), link_prices(ctx, 5.0)
        found = dearest(flow, to_ranks(flow, price, LAYERS, 4), price)
        least = stage_two(flow, price, ranks)
        gaps["stage_2"].append(found - least)
        assert found == pytest.approx(least, rel=1e-4, abs=1e-12)
    record(record_property, gaps)
    assert min(min(values) for values in gaps.values()) >= -1e-12
    assert np.mean(gaps["stage_1"]) < 0.01


def test_moetuner_places_what_its_stages_found():
    weight, ctx = instance(5)
    placement = MoETuner(far_cost=5.0, uneven=True).place(weight, ctx)
    assert MoETuner().objective(placement, weight, ctx) == pytest.approx(
        deviation(load_shares(weight), clusters(load_shares(weight), ctx.num_ranks), ctx.num_ranks)
    )


# ---- the solver


@pytest.mark.parametrize("numbers", SOME)
def test_exflow_ip_is_exact(numbers):
    pytest.importorskip("ortools")
    from moesim_tuner.placement.exflow_ip import Policy

    policy = Policy(stages="together", uneven=True)
    for number in numbers:
        weight, ctx = instance(number)
        experts = weight.shape[1]
        ids = ctx.sample.expert_TLK.astype(int)
        least = least_crossing(ids, experts, ctx.num_ranks, ctx.rank_to_node, nothing(experts, ctx.num_ranks))
        solution = policy.solve(weight, ctx)
        assert solution.status == "optimal"
        assert solution.objective == solution.bound == pytest.approx(least, abs=1e-9)
        assert policy.objective(solution.placement, weight, ctx) == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize("numbers", SOME)
def test_moetuner_ilp_is_exact_in_each_stage(numbers):
    pytest.importorskip("ortools")
    from moesim_tuner.placement.moetuner_ilp import Policy

    policy = Policy(far_cost=5.0, uneven=True)
    for number in numbers:
        weight, ctx = instance(number)
        share, ranks = load_shares(weight), ctx.num_ranks
        solution = policy.solve(weight, ctx)
        assert solution.status == "optimal"
        state_SE, rank_LE = assignments(weight.shape[1], ranks), rank_of(solution.placement)
        for layer, part in enumerate(solution.parts[:-1]):
            least = deviation(np.broadcast_to(share[layer], state_SE.shape), state_SE, ranks).min()
            assert part.objective == pytest.approx(least, abs=1e-9)
            assert deviation(share[layer : layer + 1], rank_LE[layer : layer + 1], ranks)[0] == pytest.approx(least)
        flow, price = cluster_flows(transitions(weight, ctx), rank_LE, ranks), link_prices(ctx, 5.0)
        stay = np.broadcast_to(np.arange(ranks), (LAYERS, ranks))
        assert solution.objective == pytest.approx(dearest(flow, stay, price), abs=1e-12)
        assert solution.objective == solution.bound == pytest.approx(stage_two(flow, price, ranks), abs=1e-9)


BALANCE = [(6, 0, 3), (4, 2, 3), (5, 1, 2), (3, 3, 3), (4, 1, 2), (2, 4, 2), (3, 2, 3)]


@functools.cache
def packings(experts, slots, ranks):
    """Copies of experts on ranks, all ways in which each has one and no rank more than its room: [N, E, G]."""
    room = -(-slots // ranks)
    row = [r for r in itertools.product(range(room + 1), repeat=ranks) if 1 <= sum(r) <= slots - experts + 1]
    found = [()]
    for _ in range(experts):
        longer = ((*some, r) for some in found for r in row)
        found = [s for s in longer if sum(map(sum, s)) <= slots and all(sum(c) <= room for c in zip(*s, strict=True))]
    return np.array([s for s in found if sum(map(sum, s)) == slots], float)


@pytest.mark.parametrize("numbers", SOME)
def test_balance_cpsat_is_exact(numbers, record_property):
    """Against all replica counts and packings; the greedy start's gap is recorded."""
    pytest.importorskip("ortools")
    from moesim_tuner.placement.balance_cpsat import Policy, _greedy

    gaps = {"greedy": []}
    for number in numbers:
        rng = np.random.default_rng([8, number])
        experts, redundant, ranks = BALANCE[number % len(BALANCE)]
        weight = rng.lognormal(0, rng.uniform(0.2, 1.5), (1, experts))
        every = packings(experts, experts + redundant, ranks)
        load = ((every / every.sum(axis=2, keepdims=True)) * weight[0][:, None]).sum(axis=1)
        least = float((load.max(axis=1) / load.mean(axis=1)).min())
        policy = Policy(num_redundant_experts=redundant, uneven=True, tolerance=0.0)
        solution = policy.solve(weight, PlacementContext(ranks))
        assert solution.status == "optimal"
        assert solution.objective == pytest.approx(least, rel=1e-7)
        assert policy.objective(solution.placement, weight, PlacementContext(ranks)) == pytest.approx([least], rel=1e-7)
        share = load_shares(weight)[0]
        gaps["greedy"].append(_greedy(share, experts + redundant, ranks)[0].largest(share, ranks) * ranks / least - 1)
    record(record_property, gaps)
    assert min(gaps["greedy"]) >= -1e-7


@pytest.mark.parametrize(
    "numbers", [pytest.param(range(12), id="12"), pytest.param(range(200), id="200", marks=pytest.mark.slow)]
)
def test_stage_2_on_six_ranks_against_all_orders(numbers, record_property):
    """Above 5 ranks stage 2 is a search: two layers on six ranks of two nodes. Of the first layer's orders only which
    clusters share a node matters: 10 ways."""
    gaps = {"stage_2": []}
    price = link_prices(PlacementContext(6, 2), 5.0)
    every = np.array(list(itertools.permutations(range(6))))
    halves = [{0, *rest} for rest in itertools.combinations(range(1, 6), 2)]
    first = [np.argsort(np.argsort([c not in half for c in range(6)], kind="stable")) for half in halves]
    for number in numbers:
        flow = np.random.default_rng([9, number]).random((1, 6, 6)) ** 3
        least = min(float((flow[0] * price[p][:, every].transpose(1, 0, 2)).max(axis=(1, 2)).min()) for p in first)
        gaps["stage_2"].append(dearest(flow, to_ranks(flow, price, 2, 4), price) / least - 1)
    record(record_property, gaps)
    assert min(gaps["stage_2"]) >= -1e-12
    assert np.mean(gaps["stage_2"]) < 0.05
