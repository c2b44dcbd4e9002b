"""Placements by affinity: hand-worked cases, what they refuse, and what they promise on tokens that follow a map."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.placement import EMPTY, Placement, PlacementContext, PlacementCosts, TokenSample
from moesim.placement.affinity import Policy as Affinity
from moesim.placement.crossings import (
    contiguous_ranks,
    crossing_cost,
    descend,
    distance,
    load_shares,
    placement_of,
    rank_of,
    spread,
    transitions,
    transport,
)
from moesim.placement.exflow import Policy as ExFlow
from moesim.placement.moetuner import Policy as MoETuner
from moesim.placement.moetuner import cluster_flows, clusters, dearest, link_prices, to_ranks
from moesim.placement.semantic import Policy as Semantic
from moesim.placement.semantic import local_share, units_of
from moesim.placement.viterbi import MAX_STATES, state_count
from moesim.placement.viterbi import Policy as Viterbi


def told(ids_TLK, experts, ranks, nodes=1, sequence_T=None, token_T=None):
    """Loads and context of a sample of tokens."""
    ids = np.asarray(ids_TLK, np.int64)
    sequence = np.zeros(len(ids), np.int64) if sequence_T is None else np.asarray(sequence_T)
    sample = TokenSample(ids.astype(np.uint8), sequence, experts, token_T)
    weight = np.stack([np.bincount(ids[:, n].ravel(), minlength=experts) for n in range(ids.shape[1])]).astype(float)
    return weight, PlacementContext(ranks, nodes, sample=sample)


def following(experts, layers, tokens, share, seed, zipf=0.0):
    """Top-1 tokens that go on by a permutation with this chance, else anywhere, by popularity: ids [T, L, 1]."""
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, layers, 1), np.int64)
    popular = np.arange(1.0, experts + 1) ** -zipf
    drawn = rng.choice(experts, (tokens, layers), p=popular / popular.sum())
    ids[:, 0, 0] = drawn[:, 0]
    for layer in range(1, layers):
        went = rng.permutation(experts)[ids[:, layer - 1, 0]]
        ids[:, layer, 0] = np.where(rng.random(tokens) < share, went, drawn[:, layer])
    return ids


def test_transitions_and_their_cost_by_hand():
    # three tokens, top-1, two layers: 0 -> 1, 0 -> 1, 2 -> 3; ranks 0 | 1 | 2 | 3 hold one expert each, two a node
    weight, ctx = told([[[0], [1]], [[0], [1]], [[2], [3]]], 4, 4, 2)
    share = transitions(weight, ctx)
    assert share[0, 0, 1] == pytest.approx(2 / 3)
    assert share[0, 2, 3] == pytest.approx(1 / 3)
    rank = contiguous_ranks(2, 4, 4)
    assert crossing_cost(share, rank, distance(ctx)) == pytest.approx(1.0)  # each stays on its node and leaves its rank
    rank[1] = [0, 2, 1, 3]  # expert 1 of layer 1 to the other node
    assert crossing_cost(share, rank, distance(ctx)) == pytest.approx(2 / 3 * 2 + 1 / 3)
    rank[1] = [1, 0, 3, 2]
    assert crossing_cost(share, rank, distance(ctx)) == 0.0


def test_without_tokens_layers_are_independent():
    share = transitions(np.array([[3.0, 1.0], [1.0, 1.0]]), PlacementContext(2))
    np.testing.assert_allclose(share[0], [[0.375, 0.375], [0.125, 0.125]])


def test_spread_is_the_variance_over_the_squared_mean():
    assert spread(np.array([[0.5, 0.25, 0.25, 0.0]]), np.array([[0, 0, 1, 1]]), 2) == pytest.approx(0.25)


@pytest.mark.parametrize("policy", [Affinity(), ExFlow(), Viterbi(), Affinity(balance_weight=0.0)])
def test_tokens_that_follow_a_map_never_cross(policy):
    weight, ctx = told(following(8, 6, 400, 1.0, 1), 8, 4)
    assert crossing_cost(transitions(weight, ctx), rank_of(policy.place(weight, ctx)), distance(ctx)) == 0.0


def test_exflow_puts_nodes_first():
    """Four ranks on two nodes: the first stage comes near the least crossings of nodes that there are."""
    weight, ctx = told(following(8, 4, 3000, 0.6, 2), 8, 4, 2)
    node = rank_of(ExFlow().place(weight, ctx)) // 2
    share = transitions(weight, ctx)
    apart = 1.0 - np.eye(2)
    two = told(following(8, 4, 3000, 0.6, 2), 8, 2)
    least = crossing_cost(share, rank_of(Viterbi().place(*two)), apart)
    assert least - 1e-12 <= crossing_cost(share, node, apart) <= least + 0.01


def test_affinity_comes_near_viterbi_and_trades_crossings_for_balance():
    """Mixtral's shape: 8 experts, 4 ranks, 32 layers, 60 % follow; 2,520 states a layer."""
    weight, ctx = told(following(8, 32, 4000, 0.6, 3, 0.6), 8, 4)
    share, cost = transitions(weight, ctx), distance(ctx)
    exact = crossing_cost(share, rank_of(Viterbi().place(weight, ctx)), cost)
    found = Affinity(balance_weight=0.0).place(weight, ctx)
    assert exact <= crossing_cost(share, rank_of(found), cost) <= exact + 0.01
    even = [Affinity(balance_weight=w).place(weight, ctx) for w in (0.0, 1.0, 100.0)]
    variance = [spread(weight / weight.sum(axis=1, keepdims=True), rank_of(p), 4) for p in even]
    assert variance[0] > variance[1] > variance[2]


def test_viterbi_says_how_many_states_are_too_many():
    assert state_count(8, 4) == 2520
    assert state_count(5, 3) == 3 * 30
    weight = np.ones((2, 64))
    with pytest.raises(BadInput, match=rf"64 experts on 8 ranks have [\d,]+ of them \(at most {MAX_STATES:,}\)"):
        Viterbi().place(weight, PlacementContext(8))


@pytest.mark.parametrize("policy", [Affinity, ExFlow, Viterbi, MoETuner, Semantic])
def test_ranks_that_do_not_divide(policy):
    weight, ctx = told(following(5, 3, 50, 0.5, 4), 5, 3)
    placement = policy().place(weight, ctx)
    held = (placement.slot_to_expert_LS != EMPTY).reshape(3, 3, 2).sum(axis=2)
    assert (np.sort(held, axis=1) == [1, 2, 2]).all()
    with pytest.raises(BadInput, match=r"experts=5, ranks=3. Use 1, 5 ranks, or set uneven: true"):
        policy(uneven=False).place(weight, ctx)


@pytest.mark.parametrize("policy", [Affinity(), ExFlow(), Viterbi(), MoETuner(), Semantic()])
def test_tokens_of_other_layers_are_refused(policy):
    _, ctx = told(following(8, 3, 50, 0.5, 5), 8, 4)
    with pytest.raises(BadInput, match="the tokens have 3 layers of 8 experts, the loads 2 of 8"):
        policy.place(np.ones((2, 8)), ctx)


def test_transport_leaves_one_place_empty_a_rank_at_most():
    cost = np.array([[0.0, 5, 5], [0, 5, 5], [0, 5, 5], [0, 5, 5]])
    assert np.bincount(transport(cost), minlength=3).tolist() == [2, 1, 1]


def test_descend_exchanges_what_gains():
    # loads .4 .3 | .2 .1: exchanging .4 with .2, or .3 with .1, evens them out exactly
    rank = descend(np.array([0, 0, 1, 1]), np.zeros((4, 2)), np.array([0.4, 0.3, 0.2, 0.1]), 1.0)
    assert np.bincount(rank, weights=[0.4, 0.3, 0.2, 0.1]) == pytest.approx([0.5, 0.5])
    far = np.array([[0.0, 1], [1, 0], [0, 1], [1, 0]])
    assert descend(np.array([0, 0, 1, 1]), far, np.full(4, 0.25), 0.0).tolist() == [0, 1, 0, 1]


def test_placement_of_and_rank_of_are_inverse():
    rank = np.array([[2, 0, 1, 0, 2, 1], [0, 1, 2, 2, 1, 0]])
    placement = placement_of(rank, PlacementContext(3))
    assert (rank_of(placement) == rank).all()
    assert placement.slot_to_expert_LS.tolist() == [[1, 3, 2, 5, 0, 4], [0, 5, 1, 4, 2, 3]]


# ---- MoETuner


def test_moetuner_by_hand():
    # loads 4 3 2 1: only {4, 1} and {3, 2} are even. Tokens go 0 -> 0 and 1 -> 1, so that the clusters stay where they
    # are; the dearest pair is what is left
    flow = np.array([[[0.5, 0.1], [0.05, 0.35]]])
    price = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert to_ranks(flow, price, 2, 0).tolist() == [[0, 1], [0, 1]]
    assert dearest(flow, np.array([[0, 1], [0, 1]]), price) == 0.1
    assert dearest(flow, np.array([[0, 1], [1, 0]]), price) == 0.5
    weight = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    placement = MoETuner().place(weight, PlacementContext(2))
    assert placement.planned_load(weight).tolist() == [[5, 5], [5, 5]]
    assert MoETuner().objective(placement, weight, PlacementContext(2)) == pytest.approx([0, 0])


def test_moetuner_prices_links_as_the_deployment_does():
    costs = PlacementCosts(1.0, 1.0, 1.0, 1.0, 450.0, 50.0, 1)
    price = link_prices(PlacementContext(4, 2, costs=costs), None)
    assert price.tolist() == [[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]]
    assert link_prices(PlacementContext(4, 2), None)[0].tolist() == [0, 1, 2, 2]


def test_moetuner_moves_the_dearest_pair_into_a_node():
    """Two nodes of two ranks: tokens between different ranks that weigh most must not cross nodes."""
    weight, ctx = told(following(8, 4, 4000, 0.7, 6), 8, 4, 2)
    placement = MoETuner(far_cost=9.0).place(weight, ctx)
    stay = np.broadcast_to(np.arange(4), (4, 4))
    price = link_prices(ctx, 9.0)
    found = dearest(cluster_flows(transitions(weight, ctx), rank_of(placement), 4), stay, price)
    by_chance = cluster_flows(transitions(weight, ctx), clusters(load_shares(weight), 4), 4)
    assert found < 0.95 * dearest(by_chance, stay, price)


# ---- semantic


def domains(tokens, seed):
    """Two kinds of sequences of 20 tokens that take the even or the odd experts of 8, mostly."""
    rng = np.random.default_rng(seed)
    sequence = np.arange(tokens) // 20
    odd = (sequence % 2)[:, None, None] ^ (rng.random((tokens, 3, 1)) < 0.1)
    return rng.integers(4, size=(tokens, 3, 1)) * 2 + odd, sequence


def test_semantic_finds_kinds_of_sequences():
    ids, sequence = domains(2000, 7)
    weight, ctx = told(ids, 8, 2, sequence_T=sequence)
    placement = Semantic().place(weight, ctx)
    rank = rank_of(placement)
    assert all(len(set(layer[::2])) == 1 and len(set(layer[1::2])) == 1 for layer in rank.tolist())
    units = units_of(ctx.sample)
    local = local_share(units, rank, 2)
    assert local.max(axis=1).sum() == pytest.approx(0.9, abs=0.02)
    assert Semantic().objective(placement, weight, ctx) < Semantic().objective(
        placement_of(contiguous_ranks(3, 8, 2), ctx), weight, ctx
    )


def test_semantic_takes_vocabulary_ids_where_they_are():
    """Sequences mix tokens of both kinds; ids tell them apart."""
    ids, sequence = domains(2000, 8)
    token = np.asarray(sequence % 2 * 50 + np.arange(2000) % 50)
    mixed = np.random.default_rng(9).integers(0, 10, 2000)
    weight, ctx = told(ids, 8, 2, sequence_T=np.sort(mixed), token_T=token)
    units = units_of(ctx.sample)
    assert len(units.mass_J) == 100
    assert local_share(units, rank_of(Semantic().place(weight, ctx)), 2).max(axis=1).sum() > 0.85


def test_an_empty_sample_is_no_sample():
    empty = TokenSample(np.zeros((0, 2, 1), np.uint8), np.zeros(0, np.int64), 4)
    weight = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    placement = Semantic().place(weight, PlacementContext(2, sample=empty))
    assert isinstance(placement, Placement)
    assert placement.balance(weight) == pytest.approx([1.0, 1.0])
