"""Prefetch policies one by one: hand-worked cases, oracles, and what a stated accuracy means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.offload import CacheSemantics, MissCosts, OffloadContext, RouteSample, StepRoutes
from moesim.offload.prefetch.markov import transitions
from moesim.offload.prefetch.naming import draw_named, votes
from moesim.offload.prefetch.trace_matching import cluster, matrices, unit
from moesim.policy import load_policy


def context(layers, experts, top_k, fit=None, transfer_ns=1000.0, layer_ns=1000.0, seed=0):
    size = np.full((layers, experts), 1000, np.int64)
    popularity = np.ones((layers, experts)) if fit is None else fit.count_LE(experts)
    costs = MissCosts(transfer_ns, lambda rows: 0.0, lambda rows: 0.0, 0.0, layer_ns)
    return OffloadContext(
        layers, experts, top_k, size, 10_000, 0, popularity, CacheSemantics(), costs, seed, fit
    )  # fmt: skip


def sample(rows, sequence=None):
    ids = np.array(rows, np.int64)
    return RouteSample(ids, np.zeros(len(ids), np.int64) if sequence is None else np.array(sequence, np.int64))


def step_of(rows, sequence=None, number=0):
    ids = np.array(rows, np.int64)
    return StepRoutes(number, ids, np.zeros(len(ids), np.int64) if sequence is None else np.array(sequence, np.int64))


def names(wanted):
    return [(w.layer, w.expert) for w in wanted]


# ---- those that learn


def test_markov_by_hand():
    """Expert 0 leads to 2 twice and to 3 once; expert 1 always to 3."""
    fit = sample([[[0], [2]], [[0], [2]], [[0], [3]], [[1], [3]]])
    chance = transitions(fit, 0, 1, 4, smoothing=1e-12)
    np.testing.assert_allclose(chance[0], [0, 0, 2 / 3, 1 / 3], atol=1e-9)
    np.testing.assert_allclose(chance[1], [0, 0, 0, 1], atol=1e-9)
    state = load_policy("prefetch", {"kind": "markov", "names": 2}).start(context(2, 4, 1, fit))
    state.begin(step_of([[[0], [1]]]))
    assert state.wanted(-1) == []
    assert names(state.wanted(0)) == [(1, 2), (1, 3)]
    state.begin(step_of([[[1], [0]]]))
    assert names(state.wanted(0))[0] == (1, 3)


def test_smoothing_pulls_a_rare_expert_towards_what_is_popular():
    fit = sample([[[0], [2]]] * 9 + [[[1], [3]]])
    assert transitions(fit, 0, 1, 4, 0.01)[1].argmax() == 3
    strong = transitions(fit, 0, 1, 4, 10.0)[1]
    assert strong.argmax() == 2
    np.testing.assert_allclose(strong.sum(), 1.0)
    np.testing.assert_allclose(transitions(fit, 0, 1, 4, 5.0)[0, 2], (9 + 5 * 0.9) / (9 + 5))


@pytest.mark.parametrize("distance", [1, 2])
def test_markov_counts_as_a_loop_over_tokens_does(distance):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40, 3, 6)), axis=2)[:, :, :2]
    ids[::7, :, 1] = 6  # nobody
    expected = np.zeros((6, 6))
    for row in ids:
        for i in row[0]:
            for j in row[distance]:
                if i < 6 and j < 6:
                    expected[i, j] += 1
    seen = np.array([(ids[:, 0] == e).sum() for e in range(6)])
    found = transitions(sample(ids), 0, distance, 6, 1e-12)
    np.testing.assert_allclose(found, expected / np.maximum(seen, 1e-12)[:, None], atol=1e-6)


def test_a_batch_votes_by_tokens():
    fit = sample([[[0], [2]], [[1], [3]]])
    state = load_policy("prefetch", "markov").start(context(2, 4, 1, fit))
    state.begin(step_of([[[1], [0]], [[1], [0]], [[0], [0]]]))
    wanted = state.wanted(0)
    assert names(wanted) == [(1, 3), (1, 2)]
    assert [w.score for w in wanted] == pytest.approx([2 / 3 - 1, 1 / 3 - 1])


def test_frequency_counts_what_was_known_or_what_was_served():
    fit = sample([[[0], [1]], [[0], [1]], [[3], [2]]])
    ctx = context(2, 4, 1, fit)
    first, second = step_of([[[2], [2]]] * 5), step_of([[[2], [3]]])
    found = {}
    for count in ("fit", "served", "both"):
        state = load_policy("prefetch", {"kind": "frequency", "count": count, "ahead": 2}).start(ctx)
        found[count] = []
        for step in (first, second):
            state.begin(step)
            found[count].append(names(state.wanted(-1)))
    assert found["fit"] == [[(0, 0), (1, 1)]] * 2
    assert found["served"] == [[], [(0, 2), (1, 2)]]
    assert found["both"] == [[(0, 0), (1, 1)], [(0, 2), (1, 2)]]


def test_previous_token_is_that_of_the_same_sequence_in_an_earlier_step():
    state = load_policy("prefetch", {"kind": "previous_token", "ahead": 2}).start(context(2, 9, 1))
    state.begin(step_of([[[0], [1]], [[2], [3]], [[4], [5]]], [7, 7, 8]))
    assert state.wanted(-1) == []
    state.begin(step_of([[[8], [8]], [[8], [8]]], [8, 7], 1))
    assert names(state.wanted(-1)) == [(0, 2), (0, 4), (1, 3), (1, 5)]
    assert state.wanted(0) == []  # named already
    state.begin(step_of([[[0], [0]]], [7], 2))
    assert names(state.wanted(-1)) == [(0, 8), (1, 8)]


def test_previous_token_forgets_whom_it_served_longest_ago():
    state = load_policy("prefetch", {"kind": "previous_token", "memory": 1}).start(context(1, 9, 1))
    state.begin(step_of([[[3]]], [1], 0))
    state.begin(step_of([[[4]]], [2], 1))
    state.begin(step_of([[[0]], [[0]]], [1, 2], 2))
    assert names(state.wanted(-1)) == [(0, 4)]


# ---- trace matching


def test_trace_matching_by_hand():
    """Two recorded sequences; the new one starts like the second."""
    fit = sample([[[0], [1], [1]], [[0], [1], [2]], [[3], [0], [3]], [[3], [2], [3]]], [5, 5, 6, 6])
    state = load_policy("prefetch", "trace_matching").start(context(3, 4, 1, fit))
    state.begin(step_of([[[3], [1], [0]]], [9]))
    assert state.wanted(-1) == []
    wanted = state.wanted(0)
    # L = 3: layer 1 is weighted 1 - 1/4, layer 2 1 - 2/4
    assert wanted == [(1, 0, 0.375), (1, 2, 0.375), (2, 3, 0.5)] or names(wanted) == [(2, 3), (1, 0), (1, 2)]
    assert [w.score for w in wanted] == pytest.approx([0.5, 0.375, 0.375])
    # now layer 1 speaks for the first (cosines 0 + 1 against 1 + 0 are equal: the first stored one)
    assert names(state.wanted(1)) == [(2, 1), (2, 2)]


def plain_match(store, current, layer, rows):
    """The rule of the source, written down once more without any of the shortcuts."""
    best, found = -np.inf, 0
    for p, stored in enumerate(store):
        cosines = []
        for row in range(len(current)):
            if (rows == "later" and row <= layer) or not current[row].any():
                cosines.append(0.0)
                continue
            length = np.linalg.norm(stored[row]) * np.linalg.norm(current[row])
            cosines.append(float(stored[row] @ current[row] / length) if length else 0.0)
        if np.mean(cosines) > best + 1e-12:
            best, found = np.mean(cosines), p
    return found


@pytest.mark.parametrize("rows", ["seen", "later"])
def test_trace_matching_is_the_source_s_rule(rows):
    rng = np.random.default_rng(4)
    layers, experts, top_k = 4, 8, 2
    tilt = rng.lognormal(0, 1.5, (5, layers, experts))
    ids = np.stack(
        [np.argsort(-(rng.random((layers, experts)) ** (1 / tilt[q // 6])), axis=1)[:, :top_k] for q in range(30)]
    )
    fit = sample(ids, np.arange(30) // 6)
    store = matrices(fit, experts)
    policy = {"kind": "trace_matching", "rows": rows, "learn": False}
    state = load_policy("prefetch", policy).start(context(layers, experts, top_k, fit))
    current = np.zeros((layers, experts))
    for number in range(5):
        row = np.argsort(-(rng.random((layers, experts)) ** (1 / tilt[2])), axis=1)[:, :top_k]
        state.begin(step_of([row], [99], number))
        for layer in range(layers):
            current[layer] += np.bincount(row[layer], minlength=experts)
            matched = store[plain_match(store, current, layer, rows)]
            share = matched / matched.sum(axis=1, keepdims=True)
            expected = {
                (x, e): min(share[x, e] * top_k, 1.0) * (1 - (x - layer) / (layers + 1))
                for x in range(layer + 1, layers)
                for e in range(experts)
                if share[x, e] > 0
            }
            got = {w[:2]: w.score for w in state.wanted(layer)}
            assert got == pytest.approx(expected)


def test_finished_sequences_are_learnt_and_only_they_are_replaced():
    fit = sample([[[0], [1]], [[2], [3]]], [1, 2])
    state = load_policy("prefetch", {"kind": "trace_matching", "capacity": 3}).start(context(2, 5, 1, fit))

    def serve(sequence, first, second, number):
        state.begin(step_of([[[first], [second]]], [sequence], number))
        out = names(state.wanted(0))
        state.wanted(1)
        return out

    assert serve(10, 4, 4, 0) == [(1, 1)]  # nothing alike: the first one stored
    assert serve(11, 4, 0, 1) == [(1, 4)]  # 10 was gone, so it was stored
    assert serve(12, 4, 0, 2) == [(1, 0)]  # 11 took its place
    assert serve(13, 0, 0, 3) == [(1, 1)]
    assert serve(14, 2, 0, 4) == [(1, 3)]


def test_clusters_keep_one_of_each_kind():
    rng = np.random.default_rng(1)
    kind = np.array([0, 0, 1, 2, 2, 2, 1, 0, 1])
    count = np.zeros((9, 2, 12))
    for q, k in enumerate(kind):
        count[q, :, 4 * k : 4 * k + 4] = rng.integers(5, 9, (2, 4))
    for seed in range(5):
        kept = cluster(count, 3, seed)
        assert sorted(kind[kept]) == [0, 1, 2]
        for q in kept:  # the member nearest to the centre of its cluster
            own = kind == kind[q]
            centre = unit(unit(count[own]).mean(axis=0))
            likeness = (unit(count) * centre).sum(axis=(1, 2))
            assert likeness[q] == pytest.approx(likeness[own].max())
    assert cluster(count, 9, 0).tolist() == list(range(9))


# ---- stated accuracy

UNIFORM = np.full(20, 1 / 20)


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.85, 1.0])
def test_accuracy_is_the_share_of_true_experts_named(accuracy):
    rng = np.random.default_rng(2)
    true = np.argsort(rng.random((4000, 1, 20)), axis=2)[:, :, :4]
    named = draw_named(step_of(true), 0, accuracy, 4, UNIFORM, 0, "test")
    assert named.shape == (4000, 4)
    assert (np.diff(np.sort(named, axis=1), axis=1) > 0).all()  # four different ones
    hit = (named[:, :, None] == true[:, 0][:, None, :]).any(axis=2)
    bound = 4.5 * np.sqrt(accuracy * (1 - accuracy) / 16000)
    assert hit.mean() == pytest.approx(accuracy, abs=bound + 1e-12)


def test_a_higher_accuracy_names_what_a_lower_one_names_and_over_fetch_adds_wrong_names_alone():
    true = np.argsort(np.random.default_rng(3).random((300, 1, 20)), axis=2)[:, :, :4]
    step = step_of(true)

    def hits(accuracy, number):
        named = draw_named(step, 0, accuracy, number, UNIFORM, 0, "test")
        return [set(n) & set(t) for n, t in zip(named.tolist(), true[:, 0].tolist(), strict=True)]

    for low, high in zip(hits(0.4, 4), hits(0.7, 4), strict=True):
        assert low <= high
    assert hits(0.7, 4) == hits(0.7, 9)


def test_wrong_names_follow_popularity_or_nothing():
    true = np.zeros((20_000, 1, 1), np.int64)
    chance = np.array([0.0, 4, 2, 1, 1]) + 1e-9
    named = draw_named(step_of(true), 0, 0.0, 1, chance / chance.sum(), 0, "test")
    share = np.bincount(named[:, 0], minlength=5) / 20_000
    assert share == pytest.approx([0, 0.5, 0.25, 0.125, 0.125], abs=0.015)


def test_draws_belong_to_seed_step_layer_and_token():
    true = np.argsort(np.random.default_rng(3).random((50, 2, 20)), axis=2)[:, :, :4]
    whole = draw_named(step_of(true), 1, 0.5, 4, UNIFORM, 0, "test")
    part = draw_named(step_of(true[:20]), 1, 0.5, 4, UNIFORM, 0, "test")
    assert (whole[:20] == part).all()
    for other in (draw_named(step_of(true, number=1), 1, 0.5, 4, UNIFORM, 0, "test"),
                  draw_named(step_of(true), 1, 0.5, 4, UNIFORM, 1, "test")):  # fmt: skip
        assert (other != whole).any()


def test_a_token_without_experts_gets_no_names():
    named = draw_named(step_of([[[20, 20]], [[3, 20]]]), 0, 1.0, 2, UNIFORM, 0, "test")
    assert named[0].tolist() == [20, 20]
    assert 3 in named[1]
    assert votes(named, 20)[0][1] == 0.5


def test_the_stale_gate_names_less_the_further_it_looks():
    rng = np.random.default_rng(6)
    ids = np.argsort(rng.random((800, 4, 32)), axis=2)[:, :, :4]
    state = load_policy("prefetch", {"kind": "next_layer", "recall": [0.9, 0.6, 0.3], "ahead": 3}).start(
        context(4, 32, 4)
    )
    hit = {1: 0, 2: 0, 3: 0}
    for number, row in enumerate(ids):
        state.begin(step_of(row[None], number=number))
        assert state.wanted(-1) == []
        for w in state.wanted(0):
            hit[w.layer] += w.expert in row[w.layer]
    for distance, recall in ((1, 0.9), (2, 0.6), (3, 0.3)):
        assert hit[distance] / 3200 == pytest.approx(recall, abs=4.5 * np.sqrt(recall * (1 - recall) / 3200))


def reach_of(policy, layers=6):
    state = load_policy("prefetch", {"kind": "predictor", "accuracy": 1.0, **policy}).start(context(layers, 8, 1))
    state.begin(step_of([[[x] for x in range(layers)]]))
    return {layer: [w.layer for w in state.wanted(layer)] for layer in range(-1, layers)}


def test_how_far_a_predictor_sees():
    """ExpertFlow sees all layers before the step, ProMoE one stride ahead, Pre-gated MoE the next layer."""
    assert reach_of({"ahead": None, "before_step": True}) == {-1: list(range(6)), **{x: [] for x in range(6)}}
    assert reach_of({"ahead": 2, "stride": True}) == {-1: [], 0: [2], 1: [3], 2: [4], 3: [5], 4: [], 5: []}
    assert reach_of({"ahead": 1}) == {-1: [], 0: [1], 1: [2], 2: [3], 3: [4], 4: [5], 5: []}
    assert reach_of({"ahead": 2}) == {-1: [], 0: [1, 2], 1: [3], 2: [4], 3: [5], 4: [], 5: []}
    assert reach_of({"ahead": 2, "before_step": True})[-1] == [0, 1]


def test_a_right_predictor_names_exactly_what_comes():
    ids = np.argsort(np.random.default_rng(8).random((3, 4, 10)), axis=2)[:, :, :2]
    state = load_policy("prefetch", {"kind": "predictor", "accuracy": 1.0}).start(context(4, 10, 2))
    state.begin(step_of(ids))
    for layer in range(3):
        assert {w.expert for w in state.wanted(layer)} == set(ids[:, layer + 1].ravel().tolist())


# ---- horizon


def horizon(layers=20, transfer=1000.0, layer=1000.0, **more):
    ctx = context(layers, 8, 2, transfer_ns=transfer, layer_ns=layer)
    value = {"kind": "horizon", "inner": "predictor", "parameters": {"accuracy": 1.0, "names": 1}, **more}
    return load_policy("prefetch", value).start(ctx)


@pytest.mark.parametrize(
    ("transfer", "layer", "experts", "reach"),
    [(720.0, 250.0, 2.0, 6), (1000.0, 1000.0, 3.0, 3), (10.0, 1000.0, 2.0, 1), (1000.0, 1000.0, 2.5, 3)],
)
def test_the_horizon_is_the_time_of_a_layers_transfers_in_layers(transfer, layer, experts, reach):
    """S = N_e E / (BW T): with 0.72 ms an expert, two of them and 0.25 ms a layer, 5.76 layers."""
    state = horizon(transfer=transfer, layer=layer, experts=experts)
    assert state.reach == reach
    state.begin(step_of(np.zeros((1, 20, 1), int)))
    state.told(0, [])
    assert [w.layer for w in state.wanted(0)] == list(range(1, 1 + reach))


def served(state, kind, steps, unused=False):
    """The reach before each step when every asked expert is found as `kind`; unused: nobody asks for the named ones."""
    out = []
    for number in range(steps):
        state.begin(step_of(np.ones((1, 20, 1), int), number=number))
        out.append(state.reach)
        for layer in range(20):
            state.told(layer, [] if unused else [(layer * 8 + 1, kind)])
            state.wanted(layer)
    return out


def test_the_horizon_grows_on_stalls_shrinks_on_what_nobody_used_and_rests_on_hits():
    kept = {"experts": 4.0, "window": 2}
    assert served(horizon(**kept), "late", 6) == [4, 4, 5, 5, 6, 6]
    assert served(horizon(**kept), "hit", 6, unused=True) == [4, 4, 3, 3, 2, 2]
    assert served(horizon(**kept), "hit", 6) == [4] * 6
    assert served(horizon(**kept, most=5), "late", 7)[-1] == 5
    assert served(horizon(experts=4.0, window=0), "late", 6) == [4] * 6


def test_a_correction_at_a_bound_does_not_pile_up():
    state = horizon(experts=4.0, window=1, most=5)
    assert served(state, "late", 8)[-1] == 5
    assert served(state, "hit", 3, unused=True)[1:] == [4, 3] or served(state, "hit", 1)[0] <= 4


def test_the_horizon_takes_its_demand_from_look_ups():
    """Unstated N_e starts at a token's own number and becomes what look-ups ask for."""
    state = horizon(window=1)
    assert served(state, "hit", 3) == [2, 1, 1]


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("horizon", {"parameters": {"ahead": 3}}, "leave `ahead` out"),
        ("horizon", {"parameters": {"recal": [0.5]}}, "recal"),
        ("horizon", {"inner": "predictor", "parameters": {"accuracy": 2.0}}, "accuracy"),
        ("horizon", {"least": 4, "most": 2}, "at least"),
        ("next_layer", {"ahead": 9}, "every distance"),
        ("next_layer", {"recall": [0.5, 0.6]}, "must not rise"),
        ("frequency", {}, "equally popular"),
    ],
)
def test_bad_parameters_are_answered_with_what_to_do(kind, value, words):
    with pytest.raises(BadInput, match=words):
        load_policy("prefetch", {"kind": kind, **value}).start(context(3, 4, 1))


def test_the_horizon_never_looks_further_than_the_inner_policy_says_anything():
    ctx = replace(context(20, 8, 2), costs=MissCosts(9000.0, lambda r: 0.0, lambda r: 0.0, 0.0, 100.0))
    state = load_policy("prefetch", {"kind": "horizon", "inner": "next_layer"}).start(ctx)
    assert state.reach == 4
