"""The balancing routers, expert choice, nearness and shared pools: each against its rule, one token at a time."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.policy import load_policy
from moesim.routing import NONE, RoutingContext

KINDS = ["auxiliary_loss", "bip", "centroid", "expert_choice", "loss_free", "shared_pool", "sinkhorn"]


def scores(tokens, experts, seed=0, dtype=np.float32, skew=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (tokens, experts)) + skew * rng.normal(0, 1, experts)).astype(dtype)


def softmax(score):
    out = np.exp(score - score.max(1, keepdims=True))
    return out / out.sum(1, keepdims=True)


def best(row, k):
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def violation(expert_TW, experts):
    """MaxVio: the largest load over the mean, less 1 (arXiv:2408.15664, eq. 4)."""
    load = np.bincount(expert_TW[expert_TW != NONE], minlength=experts)
    return load.max() / load.mean() - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0, 8, 2), (1, 8, 2), (33, 8, 8), (70, 64, 6), (17, 12, 1)])
def test_ids_are_distinct_and_states_feed_the_next_step(kind, training, dtype, shape):
    tokens, experts, top_k = shape
    policy, state = load_policy("routing", kind), {}
    for step in range(3):
        score = scores(tokens, experts, step, dtype)
        context = RoutingContext(top_k, seed=3, step=step, training=training, state=state)
        before = {name: array.copy() for name, array in state.items()}
        routed = policy.route(score, context)
        for name, array in before.items():
            np.testing.assert_array_equal(state[name], array, err_msg="a state that was handed in is not changed")
        assert routed.expert_TK.dtype == np.int32
        assert routed.gate_TK.dtype == dtype
        assert routed.expert_TK.shape == routed.gate_TK.shape
        assert routed.expert_TK.shape[1] <= policy.width(top_k, experts)
        for ids, gates in zip(routed.expert_TK, routed.gate_TK, strict=True):
            taken = [e for e in ids if e != NONE]
            assert len(set(taken)) == len(taken)
            assert list(ids[: len(taken)]) == taken, "NONE stands last"
            assert (gates[len(taken) :] == 0).all()
            assert kind == "expert_choice" or len(taken) == top_k
        if kind != "expert_choice" and tokens:
            np.testing.assert_allclose(routed.gate_TK.sum(1), 1, rtol=1e-5)
        state = routed.state
        assert bool(state) == policy.stateful


@pytest.mark.parametrize("kind", KINDS)
def test_experts_ruled_out_are_not_taken(kind):
    score = scores(30, 8)
    score[:, [1, 4, 6]] = -np.inf
    policy = load_policy("routing", kind)
    routed = policy.route(score, RoutingContext(4, training=True))
    assert not np.isin(routed.expert_TK, [1, 4, 6]).any()
    assert np.isfinite(routed.gate_TK).all()
    assert all(np.isfinite(array).all() for array in routed.state.values())
    if not policy.ragged:
        with pytest.raises(ValueError, match="-inf"):
            policy.route(score, RoutingContext(6))
    with pytest.raises(ValueError, match="expert"):
        policy.route(score, RoutingContext(9))


# ---------------------------------------------------------------------------------------------------- loss_free


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("centre", [False, True])
def test_loss_free_is_algorithm_1(scoring, centre):
    policy = load_policy("routing", {"kind": "loss_free", "rate": 0.02, "centre": centre})
    state, bias = {}, np.zeros(8)
    for step in range(20):
        score = scores(50, 8, step, np.float64, skew=2.0)
        gate = 1 / (1 + np.exp(-score)) if scoring == "sigmoid" else softmax(score)
        chosen = [best(row + bias, 3) for row in gate]
        routed = policy.route(score, RoutingContext(3, scoring=scoring, training=True, state=state))
        np.testing.assert_array_equal(routed.expert_TK, chosen)
        raw = np.take_along_axis(gate, np.array(chosen), 1)
        np.testing.assert_allclose(routed.gate_TK, raw / raw.sum(1, keepdims=True))
        load = np.bincount(np.ravel(chosen), minlength=8)
        bias = bias + 0.02 * np.sign(50 * 3 / 8 - load)
        bias -= bias.mean() if centre else 0
        state = routed.state
        np.testing.assert_allclose(state["bias_E"], bias, atol=1e-12)
        assert state["bias_E"].dtype == np.float64


def test_loss_free_starts_from_the_models_bias_and_learns_only_in_training():
    score, start = scores(40, 8), np.linspace(-1, 1, 8)
    policy = load_policy("routing", "loss_free")
    routed = policy.route(score, RoutingContext(2, bias_E=start))
    np.testing.assert_array_equal(routed.state["bias_E"], start)
    unlike = policy.route(score, RoutingContext(2, bias_E=start, state={"bias_E": np.zeros(8)}))
    assert (unlike.expert_TK != routed.expert_TK).any()


def violations(value, steps=100):
    policy, state, seen = load_policy("routing", value), {}, []
    skew = np.random.default_rng(1).normal(0, 1, 16)
    for step in range(steps):
        score = (np.random.default_rng(step).normal(0, 1, (512, 16)) + skew).astype(np.float32)
        routed = policy.route(score, RoutingContext(2, training=True, step=step, state=state))
        state = routed.state
        seen.append(violation(routed.expert_TK, 16))
    return np.array(seen)


def test_some_balance_from_the_first_step_and_some_over_steps():
    plain = violations("topk")
    assert plain.min() > 1
    assert violations({"kind": "bip", "warm": False}).max() < 0.4
    assert violations("sinkhorn").max() < 0.4
    # prices carried from batch to batch creep up until no token's price is left: still better than no balancing
    assert (violations("bip") < 0.6 * plain).all()
    for slow in ({"kind": "loss_free", "rate": 3e-3}, {"kind": "auxiliary_loss", "rate": 5.0}):
        seen = violations(slow)
        assert seen[0] == plain[0]
        assert seen[-20:].mean() < 0.4


# ---------------------------------------------------------------------------------------------------------- bip


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(40, 8, 2), (5, 8, 1), (3, 8, 3), (16, 4, 4), (1, 4, 2)])
def test_bip_takes_its_dual_steps(tokens, experts, top_k):
    policy = load_policy("routing", {"kind": "bip", "iterations": 3, "norm_topk_prob": False})
    state, price = {}, [0.0] * experts
    for step in range(3):
        score = scores(tokens, experts, step, np.float64, skew=1.0)
        share, room = softmax(score), max(1, tokens * top_k // experts)
        for _ in range(3):
            due = []
            for row in share:
                left = sorted((row[e] - price[e] for e in range(experts)), reverse=True)
                due.append(max(0.0, left[top_k]) if top_k < experts else 0.0)
            price = []
            for e in range(experts):
                left = sorted((share[t, e] - due[t] for t in range(tokens)), reverse=True)
                price.append(max(0.0, left[room]) if room < tokens else 0.0)
        routed = policy.route(score, RoutingContext(top_k, state=state))
        np.testing.assert_array_equal(routed.expert_TK, [best(row - price, top_k) for row in share])
        np.testing.assert_allclose(routed.state["q_E"], price)
        np.testing.assert_allclose(routed.gate_TK, np.take_along_axis(share, routed.expert_TK.astype(int), 1))
        state = routed.state
    cold = load_policy("routing", {"kind": "bip", "iterations": 3, "warm": False})
    alone = cold.route(score, RoutingContext(top_k))
    np.testing.assert_array_equal(cold.route(score, RoutingContext(top_k, state=state)).expert_TK, alone.expert_TK)


# ----------------------------------------------------------------------------------------------------- sinkhorn


def test_sinkhorn_scales_columns_then_rows():
    score = scores(30, 6, dtype=np.float64, skew=1.0)
    kernel = np.exp(score / 0.5)
    for _ in range(8):
        kernel = kernel / kernel.sum(0) * 30 / 6
        kernel = kernel / kernel.sum(1, keepdims=True)
    policy = load_policy("routing", {"kind": "sinkhorn", "temperature": 0.5, "norm_topk_prob": False})
    routed = policy.route(score, RoutingContext(2))
    np.testing.assert_array_equal(routed.expert_TK, [best(row, 2) for row in kernel])
    np.testing.assert_allclose(routed.gate_TK, np.take_along_axis(kernel, routed.expert_TK.astype(int), 1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-2])
def test_sinkhorn_in_float32_survives_low_temperatures(temperature):
    score = scores(50, 8, skew=1.0)
    score[:, 3] -= 40
    policy = load_policy("routing", {"kind": "sinkhorn", "temperature": temperature, "iterations": 30})
    wide = policy.route(score.astype(np.float64), RoutingContext(1))
    routed = policy.route(score, RoutingContext(1))
    assert np.isfinite(routed.gate_TK).all()
    assert (routed.expert_TK == wide.expert_TK).mean() > 0.9


def test_sinkhorn_in_a_share_of_steps_and_off_in_inference():
    score = scores(64, 8, skew=1.5)
    policy = load_policy("routing", {"kind": "sinkhorn", "share": 0.25, "inference": False})
    plain = load_policy("routing", "topk").route(score, RoutingContext(2)).expert_TK
    np.testing.assert_array_equal(policy.route(score, RoutingContext(2)).expert_TK, plain)
    unlike = np.array(
        [
            [
                (policy.route(score, RoutingContext(2, training=True, step=s, layer=a)).expert_TK != plain).any()
                for s in range(400)
            ]
            for a in (0, 1)
        ]
    )
    assert 70 <= unlike[0].sum() <= 130  # binomial(400, 0.25): 100 +- 3.5 standard deviations
    np.testing.assert_array_equal(unlike[0], unlike[1], err_msg="a step is drawn for all layers alike")


# ------------------------------------------------------------------------------------------------ expert choice


def brute_expert_choice(share, scopes, per_token):
    tokens, experts = share.shape
    taken = [[] for _ in range(tokens)]
    for scope in scopes:
        room = min(len(scope), max(1, int(len(scope) * per_token // experts)))
        for e in range(experts):
            for t in sorted(scope, key=lambda t: (-share[t, e], t))[:room]:
                taken[t].append(e)
    return [sorted(row, key=lambda e: (-share[t, e], e)) for t, row in enumerate(taken)]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("levels", [None, 3])
def test_expert_choice_against_brute_force(scope, levels):
    for case in range(200):
        rng = np.random.default_rng(case)
        tokens, experts = int(rng.integers(1, 14)), int(rng.integers(2, 7))
        top_k = int(rng.integers(1, experts + 1))
        score = rng.normal(0, 1, (tokens, experts))
        if levels:
            score = np.tile(rng.integers(0, levels, experts), (tokens, 1)).astype(float)  # rows alike: columns tie
        sequence = np.sort(rng.integers(0, 3, tokens))
        scopes = [[t for t in range(tokens) if sequence[t] == q] for q in range(3)]
        scopes = [s for s in scopes if s] if scope == "sequence" else [list(range(tokens))]
        policy = load_policy("routing", {"kind": "expert_choice", "scope": scope})
        routed = policy.route(score, RoutingContext(top_k, sequence_T=sequence))
        wanted = brute_expert_choice(softmax(score), scopes, top_k)
        assert [[e for e in row if e != NONE] for row in routed.expert_TK.tolist()] == wanted
        assert routed.expert_TK.shape[1] == max(1, *(len(row) for row in wanted))


def test_expert_choice_by_hand_differs_by_what_is_compared():
    """Two experts take one of two tokens each: token 0 has both higher logits, token 1 the higher share of expert 1."""
    score = np.array([[3.0, 1.0], [0.0, 0.5]])
    routed = load_policy("routing", {"kind": "expert_choice"}).route(score, RoutingContext(1))
    assert routed.expert_TK.tolist() == [[0], [1]]
    np.testing.assert_allclose(routed.gate_TK, [[1 / (1 + np.exp(-2))], [1 / (1 + np.exp(-0.5))]])
    by_logits = {"kind": "expert_choice", "choose_by": "logits"}
    routed = load_policy("routing", by_logits).route(score, RoutingContext(1))
    assert routed.expert_TK.tolist() == [[0, 1], [NONE, NONE]]
    np.testing.assert_allclose(routed.gate_TK, [[1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], [0, 0]])
    # three experts, and expert 2 takes the other token: softmax over the one that took it is 1
    score = np.array([[3.0, 1.0, 0.0], [0.0, 0.5, 2.0]])
    routed = load_policy("routing", by_logits | {"gates": "chosen"}).route(score, RoutingContext(1))
    assert routed.expert_TK.tolist() == [[0, 1], [2, NONE]]
    np.testing.assert_allclose(routed.gate_TK, [[1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], [1, 0]])


def test_expert_choice_of_ec_dlm_against_brute_force():
    for case in range(100):
        rng = np.random.default_rng(case)
        tokens, experts = int(rng.integers(1, 14)), int(rng.integers(2, 7))
        top_k = int(rng.integers(1, experts + 1))
        score = (
            rng.integers(-2, 3, (tokens, experts)).astype(float) if case % 2 else rng.normal(0, 1, (tokens, experts))
        )
        sequence = np.sort(rng.integers(0, 3, tokens))
        scopes = [[t for t in range(tokens) if sequence[t] == q] for q in range(3)]
        policy = load_policy(
            "routing", {"kind": "expert_choice", "scope": "sequence", "choose_by": "logits", "gates": "chosen"}
        )
        routed = policy.route(score, RoutingContext(top_k, sequence_T=sequence))
        wanted = brute_expert_choice(score, [s for s in scopes if s], top_k)
        for ids, gates, row, own in zip(routed.expert_TK.tolist(), routed.gate_TK, score, wanted, strict=True):
            assert [e for e in ids if e != NONE] == own
            total = sum(np.exp(row[e]) for e in own)
            np.testing.assert_allclose(gates, [np.exp(row[e]) / total if e != NONE else 0 for e in ids], rtol=1e-12)


def test_expert_choice_is_balanced_exactly():
    routed = load_policy("routing", "expert_choice").route(scores(512, 16, skew=2.0), RoutingContext(2))
    assert violation(routed.expert_TK, 16) == 0


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        # all is masked at progress 0; linear_reverse is 1 - r of the masked share r
        ("linear_reverse", 0.0, 8), ("linear_reverse", 1.0, 32), ("linear_reverse", 0.5, 20), ("linear", 0.25, 26),
        ("cosine", 0.0, 32), ("cosine", 1.0, 8), ("gaussian", 0.5, 32), ("gaussian", 0.0, 8),
        ("cosine_reverse", 0.0, 8), ("cosine_reverse", 1.0, 32), ("cosine_reverse", 0.75, round(20 + 12 * 0.7071)),
        ("gaussian_reverse", 0.5, 8), ("gaussian_reverse", 1.0, 32),
        ("gaussian", 0.72, 8 + round(24 * (0.6065 - 0.0755) / (1 - 0.0755))),
    ],
)  # fmt: skip
def test_capacity_follows_the_denoising_step(schedule, progress, expected):
    policy = load_policy("routing", {"kind": "expert_choice", "schedule": schedule, "k_min": 8.0, "k_max": 32.0})
    routed = policy.route(scores(128, 64), RoutingContext(8, progress=progress))
    assert (np.bincount(routed.expert_TK[routed.expert_TK != NONE], minlength=64) == 128 * expected // 64).all()


def test_expert_choice_schedules_are_whole():
    for wrong in ({"k_min": 1.0}, {"schedule": "linear"}, {"schedule": "linear", "k_min": 2.0, "k_max": 1.0}):
        with pytest.raises(BadInput, match="k_min"):
            load_policy("routing", {"kind": "expert_choice", **wrong})


# ----------------------------------------------------------------------------------------------- auxiliary loss


def test_the_auxiliary_loss_steps_against_its_own_gradient():
    score, experts, top_k = scores(60, 6, dtype=np.float64, skew=1.0), 6, 2
    policy = load_policy("routing", {"kind": "auxiliary_loss", "alpha": 0.1, "rate": 0.5})
    start = np.linspace(-0.3, 0.3, experts)
    routed = policy.route(score, RoutingContext(top_k, training=True, state={"bias_E": start}))
    share = np.bincount(routed.expert_TK.ravel(), minlength=experts) / (60 * top_k)

    def loss(bias):
        return 0.1 * experts * (share * softmax(score + bias).mean(0)).sum()

    slope = [(loss(start + h) - loss(start - h)) / 2e-5 for h in 1e-5 * np.eye(experts)]
    np.testing.assert_allclose(routed.state["bias_E"], start - 0.5 * experts * np.array(slope), atol=1e-8)
    drawn = load_policy("routing", {"kind": "auxiliary_loss", "alpha": 0.0, "rate": 0.5, "pull": 0.1})
    drawn_back = drawn.route(score, RoutingContext(top_k, training=True, state={"bias_E": start})).state
    np.testing.assert_allclose(drawn_back["bias_E"], 0.95 * start)


# ----------------------------------------------------------------------------------------------------- nearness


@pytest.mark.parametrize("method", ["cosine", "kmeans"])
def test_centroids_are_compared_by_angle_and_follow_their_tokens(method):
    rng = np.random.default_rng(2)
    feature, start = rng.normal(0, 1, (40, 5)), rng.normal(0, 1, (6, 5))
    policy = load_policy("routing", {"kind": "centroid", "method": method, "memory": 0.9, "temperature": 0.5})
    context = RoutingContext(2, feature_TD=feature, state={"centroid_ED": start}, training=True)
    routed = policy.route(np.zeros((40, 6)), context)
    near = np.array([[f @ c / np.linalg.norm(f) / np.linalg.norm(c) for c in start] for f in feature])
    np.testing.assert_array_equal(routed.expert_TK, [best(row, 2) for row in near])
    raw = np.take_along_axis(softmax(near / 0.5), routed.expert_TK.astype(int), 1)
    np.testing.assert_allclose(routed.gate_TK, raw / raw.sum(1, keepdims=True))
    moved = start.copy()
    for e in range(6):
        mine = [f / np.linalg.norm(f) for f, ids in zip(feature, routed.expert_TK, strict=True) if e in ids]
        if mine and method == "kmeans":
            moved[e] = 0.9 * start[e] + 0.1 * np.mean(mine, 0)
    np.testing.assert_allclose(routed.state["centroid_ED"], moved)


def test_where_scores_stand_in_a_column_stands_for_its_expert():
    score = scores(200, 16)
    exact = load_policy("routing", {"kind": "centroid", "noise": 0.0}).route(score, RoutingContext(3))
    np.testing.assert_array_equal(exact.expert_TK, [best(row, 3) for row in score])
    rough = load_policy("routing", "centroid").route(score, RoutingContext(3))
    assert (rough.expert_TK[:, 0] == exact.expert_TK[:, 0]).mean() > 0.8
    assert (rough.expert_TK != exact.expert_TK).any()


# ------------------------------------------------------------------------------------------------- shared pools


# N = 3 of r N = 12: floor((1 + 3 x) 3) candidates, x = (progress - 0.21) / 0.42 (arXiv:2510.17483, eq. 6)
@pytest.mark.parametrize(
    ("progress", "candidates"), [(0.05, 3), (0.21, 3), (0.25, 3), (0.26, 4), (0.42, 7), (0.6, 11), (0.63, 12), (1, 12)]
)
def test_foreign_experts_come_in_by_and_by(progress, candidates):
    score = scores(400, 12, dtype=np.float64)
    policy = load_policy("routing", "shared_pool")
    seen, own = set(), {3, 4, 5}  # layer 5 of a pool of 4 layers owns the second slice
    for step in range(40):
        at = RoutingContext(2, layer=5, progress=progress, step=step, training=True)
        routed = policy.route(score, at)
        taken = {int(e) for e in routed.expert_TK.ravel()}
        assert len(taken) == candidates
        assert own <= taken
        share = softmax(score)
        share[:, [e for e in range(12) if e not in taken]] = 0
        np.testing.assert_array_equal(routed.expert_TK, [best(row, 2) for row in share])
        raw = np.take_along_axis(share, routed.expert_TK.astype(int), 1)
        np.testing.assert_allclose(routed.gate_TK, raw / raw.sum(1, keepdims=True))
        part = policy.route(score[:7], at)
        np.testing.assert_array_equal(part.expert_TK, routed.expert_TK[:7], err_msg="one mask for all tokens of a step")
        seen.add(frozenset(taken))
    assert (len(seen) > 1) == (3 < candidates < 12), "who is masked is drawn anew in each step"
    if candidates == 7:
        often = np.sum([[e in taken for e in range(12)] for taken in seen], axis=0)
        assert often[list(own)].tolist() == [len(seen)] * 3
        assert (often[[0, 1, 2, 6, 7, 8, 9, 10, 11]] > 0).all()


def test_a_pool_with_gates_by_length():
    score = scores(50, 12, dtype=np.float64)
    policy = load_policy("routing", {"kind": "shared_pool", "gates": "norm_relu", "scale": 2.0, "layers": 3})
    routed = policy.route(score, RoutingContext(8))
    np.testing.assert_array_equal(routed.expert_TK, [best(row, 8) for row in score])
    unit = 2 * np.maximum(score / np.linalg.norm(score, axis=1, keepdims=True), 0)
    np.testing.assert_allclose(routed.gate_TK, np.take_along_axis(unit, routed.expert_TK.astype(int), 1))
    with pytest.raises(ValueError, match="divisor"):
        load_policy("routing", {"kind": "shared_pool", "layers": 5}).route(score, RoutingContext(2))
    with pytest.raises(BadInput, match="local_until"):
        load_policy("routing", {"kind": "shared_pool", "local_until": 0.7})
