"""Which tokens run together: brute force on small cases, hand-worked ones, invariants."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moesim.offload import StepRoutes
from moesim.offload.rebatching.expert_queues import Policy as Queues
from moesim.offload.rebatching.expert_queues import queue_of
from moesim.offload.rebatching.expertflow import Policy as ExpertFlow
from moesim.offload.rebatching.expertflow import _change, _two_means, active, route_vectors


def step_of(ids, number=0):
    ids = np.asarray(ids, np.int64)
    return StepRoutes(number, ids, np.arange(len(ids)))


def drawn(tokens, layers, experts, top_k, seed):
    return np.argsort(np.random.default_rng(seed).random((tokens, layers, experts)), axis=2)[:, :, :top_k]


def experts_of(ids, parts, experts):
    """Active experts of all batches, counted with sets."""
    return sum(len({(x, e) for t in part for x, row in enumerate(ids[t]) for e in row}) for part in parts)


def best_halves(ids, experts):
    """The fewest active experts that any parting into two equal halves has."""
    tokens = len(ids)
    everyone = set(range(tokens))
    return min(
        experts_of(ids, (left, everyone - set(left)), experts)
        for left in combinations(range(tokens), tokens // 2)
        if 0 in left
    )


def arrived(tokens, limit):
    return [range(lo, min(lo + limit, tokens)) for lo in range(0, tokens, limit)]


@pytest.mark.parametrize("policy", [ExpertFlow(), ExpertFlow(swaps=100)], ids=["k-means", "swaps"])
def test_never_below_brute_force_and_never_worse_than_the_order_of_arrival(policy):
    reached = []
    for seed in range(40):
        ids = drawn(8, 2, 6, 1, seed)
        parts = policy.split(step_of(ids), 6, 4)
        ours, best, came = (experts_of(ids, p, 6) for p in (parts, (), arrived(8, 4)))
        best = best_halves(ids, 6)
        assert best <= ours <= came
        reached.append(ours == best)
    assert np.mean(reached) >= (0.9 if policy.swaps else 0.6)


def test_swaps_only_help():
    for seed in range(30):
        ids = drawn(20, 3, 12, 2, seed)
        plain, swapped = (experts_of(ids, ExpertFlow(swaps=n).split(step_of(ids), 12, 10), 12) for n in (0, 200))
        assert swapped <= plain


@pytest.mark.parametrize("seed", range(5))
def test_two_kinds_of_tokens_are_told_apart(seed):
    rng = np.random.default_rng(seed)
    kind = rng.permutation(np.repeat([0, 1], 16))
    ids = drawn(32, 4, 8, 2, seed) + 8 * kind[:, None, None]
    parts = ExpertFlow(seed=seed).split(step_of(ids), 16, 16)
    assert sorted({tuple(kind[p].tolist()) for p in parts}) == [(0,) * 16, (1,) * 16]


def test_a_round_of_two_means_is_the_nearest_assignment_into_equal_halves():
    """Brute force over all halves: none has a smaller sum of Hamming distances |x - c| to the two centres."""
    for seed in range(20):
        x = route_vectors(step_of(drawn(8, 2, 5, 1, seed)), 5, 1.0, 0).astype(float)
        start = np.arange(8) < 4
        centres = x[start].mean(axis=0), x[~start].mean(axis=0)
        far = np.stack([np.abs(x - c).sum(axis=1) for c in centres])
        left = _two_means(x > 0, start, 4, 1)
        best = min(
            far[0, list(h)].sum() + far[1, list(set(range(8)) - set(h))].sum() for h in combinations(range(8), 4)
        )
        assert left.sum() == 4
        assert far[0, left].sum() + far[1, ~left].sum() == pytest.approx(best)


def test_what_a_swap_changes_is_what_counting_again_finds():
    rng = np.random.default_rng(3)
    x = rng.random((9, 14)) < 0.3
    own, other = x[:5], x[5:]
    change = _change(own.astype(float), other.astype(float))
    for a in range(5):
        for b in range(4):
            after = np.vstack([np.delete(own, a, axis=0), other[b : b + 1]])
            assert change[a, b] == active(after) - active(own)


def test_predicted_routes_are_as_right_as_stated_and_as_long_as_true_ones():
    ids = drawn(500, 4, 16, 2, 0)
    true = route_vectors(step_of(ids), 16, 1.0, 0)
    assert (true.sum(axis=1) == 8).all()
    for accuracy in (0.0, 0.6, 0.9):
        predicted = route_vectors(step_of(ids), 16, accuracy, 0)
        assert (predicted.sum(axis=1) == 8).all()
        assert (predicted & true).sum() / true.sum() == pytest.approx(accuracy, abs=0.04)


def test_a_worse_predictor_frees_fewer_experts():
    total = dict.fromkeys((1.0, 0.5, 0.0), 0)
    for seed in range(12):
        kind = np.random.default_rng(seed).permutation(np.repeat([0, 1], 12))
        ids = drawn(24, 4, 8, 1, seed) + 8 * kind[:, None, None]
        for accuracy in total:
            parts = ExpertFlow(accuracy=accuracy).split(step_of(ids), 16, 12)
            total[accuracy] += experts_of(ids, parts, 16)
    assert total[1.0] < total[0.5] < total[0.0]


# ---- queues


def test_the_longest_queue_goes_first_by_hand():
    """Queues 0: tokens 0, 4; 1: 1, 2, 5; 2: 3, 6, 7, 8. Limit 4, all wait together."""
    ids = np.array([0, 1, 1, 2, 0, 1, 2, 2, 2])[:, None, None]
    parts = Queues(pool=3).split(step_of(ids), 3, 4)
    assert [p.tolist() for p in parts] == [[3, 6, 7, 8], [1, 2, 5, 0], [4]]


def test_a_batch_is_filled_from_the_next_longest_queue_and_rests_wait():
    """Queues 0: 0, 1, 2; 1: 3, 4. Limit 4: the second queue gives one, then its rest is the longest."""
    ids = np.array([0, 0, 0, 1, 1])[:, None, None]
    assert [p.tolist() for p in Queues(pool=2).split(step_of(ids), 2, 4)] == [[0, 1, 2, 3], [4]]


def test_a_token_stands_where_it_goes_most_often():
    ids = np.array([[[0, 1], [1, 2]], [[2, 0], [2, 1]], [[3, 3], [3, 3]], [[0, 1], [2, 3]]])
    assert queue_of(step_of(ids), 3).tolist() == [1, 2, 3, 0]


def test_queues_are_the_fewest_unique_experts_where_every_queue_fills_batches():
    """Top-1, the same expert in all layers, as Read-ME routes: each batch one expert."""
    expert = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 8))
    ids = np.repeat(expert[:, None, None], 3, axis=1)
    parts = Queues(pool=8).split(step_of(ids), 4, 4)
    assert experts_of(ids, parts, 4) == 3 * len(parts)
    assert experts_of(ids, arrived(32, 4), 4) > 3 * len(parts)


def test_queues_never_use_more_experts_than_the_order_of_arrival_on_one_expert_a_token():
    for seed in range(30):
        ids = np.random.default_rng(seed).integers(0, 6, 40)[:, None, None]
        parts = Queues(pool=4).split(step_of(ids), 6, 10)
        assert experts_of(ids, parts, 6) <= experts_of(ids, arrived(40, 10), 6)
