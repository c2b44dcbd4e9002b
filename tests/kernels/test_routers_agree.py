"""The torch routers against the simulator's: the same experts on the same float32 scores, gates to 1e-5.

Cases: random scores of several spreads, scores with many ties, one token, no token; state over several steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.routing import NONE, RoutingContext
from moesim.routing import auxiliary_loss as sim_auxiliary_loss
from moesim.routing import bip as sim_bip
from moesim.routing import centroid as sim_centroid
from moesim.routing import expert_choice as sim_expert_choice
from moesim.routing import grouped_topk as sim_grouped_topk
from moesim.routing import hash as sim_hash
from moesim.routing import loss_free as sim_loss_free
from moesim.routing import null_experts as sim_null_experts
from moesim.routing import random as sim_random
from moesim.routing import sinkhorn as sim_sinkhorn
from moesim.routing import top_p as sim_top_p
from moesim.routing import topk as sim_topk

torch = pytest.importorskip("torch")
from moesim_kernels import routers  # noqa: E402  needs torch

EXPERTS, STEPS = 16, 6
SHAPES = ("narrow", "wide", "ties", "equal", "one token", "no token", "skewed")


def scores(shape: str, step: int = 0, experts: int = EXPERTS):
    rng = np.random.default_rng([SHAPES.index(shape), step, experts])
    tokens = {"one token": 1, "no token": 0}.get(shape, 300)
    normal_TE = rng.normal(size=(tokens, experts))
    out_TE = {
        "narrow": 0.1 * normal_TE,
        "wide": 6 * normal_TE,
        "ties": np.round(normal_TE),
        "equal": np.zeros((tokens, experts)),
        "skewed": normal_TE + np.linspace(3, -3, experts),
    }.get(shape, normal_TE)
    return out_TE.astype(np.float32)


def agree(routed, choice) -> None:
    np.testing.assert_array_equal(choice.expert_TK.numpy(), routed.expert_TK)
    np.testing.assert_allclose(choice.gate_TK.detach().numpy(), routed.gate_TK, rtol=0, atol=1e-5)


def context(**changes) -> RoutingContext:
    return dataclasses.replace(RoutingContext(top_k=4, training=True), **changes)


def tensor(array):
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalise", [True, False])
def test_top_k(shape, normalise):
    score_TE = scores(shape)
    routed = sim_topk.Policy(norm_topk_prob=normalise).route(score_TE, context())
    agree(routed, routers.softmax_topk(tensor(score_TE), 4, normalise=normalise))
    routed = sim_topk.Policy(gates="topk_softmax", scaling_factor=2.5, norm_topk_prob=False).route(score_TE, context())
    agree(routed, routers.topk_softmax(tensor(score_TE), 4, scale=2.5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_grouped(shape, scoring):
    score_TE = scores(shape)
    bias_E = np.random.default_rng(3).normal(size=EXPERTS).astype(np.float32) / 8
    for bias in (None, bias_E):
        routed = sim_grouped_topk.Policy(scaling_factor=2.5).route(
            score_TE, context(num_groups=4, top_groups=2, scoring=scoring, bias_E=bias)
        )
        bias_tensor = None if bias is None else tensor(bias)
        choice = routers.grouped_sigmoid(
            tensor(score_TE), 4, groups=4, top_groups=2, bias_E=bias_tensor, scoring=scoring, scale=2.5
        )
        agree(routed, choice)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("centre", [False, True])
def test_loss_free_over_steps(shape, scoring, centre):
    policy = sim_loss_free.Policy(rate=0.03, centre=centre)
    state, bias_E = {}, torch.zeros(EXPERTS, dtype=torch.float64)
    for step in range(STEPS):
        score_TE = scores(shape, step)
        routed = policy.route(score_TE, context(scoring=scoring, step=step, state=state))
        choice = routers.loss_free(tensor(score_TE), 4, bias_E, scoring=scoring)
        agree(routed, choice)
        state = routed.state
        bias_E = routers.loss_free_step(bias_E, choice.expert_TK, rate=0.03, centre=centre)
        # a mean of float64 may be added up in another order
        np.testing.assert_allclose(bias_E.numpy(), state["bias_E"], rtol=0, atol=1e-15 if centre else 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("iterations", "warm"), [(1, True), (4, True), (14, False)])
def test_bip_over_steps(shape, iterations, warm):
    policy = sim_bip.Policy(iterations=iterations, warm=warm)
    state, q_E = {}, None
    for step in range(STEPS):
        score_TE = scores(shape, step)
        routed = policy.route(score_TE, context(step=step, state=state))
        choice, q_E = routers.bip(tensor(score_TE), 4, q_E if warm else None, iterations=iterations)
        agree(routed, choice)
        state = routed.state
        np.testing.assert_array_equal(q_E.numpy(), state["q_E"])  # to the last bit: ties at the margin hang on it


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("temperature", "iterations"), [(1.0, 8), (0.25, 3)])
def test_sinkhorn(shape, temperature, iterations):
    policy = sim_sinkhorn.Policy(temperature=temperature, iterations=iterations)
    score_TE = scores(shape)
    choice = routers.sinkhorn(tensor(score_TE), 4, temperature=temperature, iterations=iterations)
    routed = policy.route(score_TE, context())
    np.testing.assert_allclose(choice.gate_TK.numpy(), routed.gate_TK, rtol=0, atol=1e-5)
    # a plan's entries are equal but for rounding where columns even out all that told them apart (one token): which of
    # them come first is then nobody's choice, and only there
    ordered_TE = np.sort(sim_sinkhorn.plan(score_TE, temperature, iterations), axis=1)
    clear_T = (np.diff(ordered_TE[:, -5:], axis=1) > 1e-6 * ordered_TE[:, -4:]).all(1)
    exact_T = clear_T | (np.ptp(score_TE, axis=1) == 0)
    np.testing.assert_array_equal(choice.expert_TK.numpy()[exact_T], routed.expert_TK[exact_T])
    assert len(score_TE) < 2 or exact_T.mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [4, 0.01, 3.3])
def test_expert_choice(shape, per_token):
    score_TE = scores(shape)
    routed = sim_expert_choice.Policy(experts_per_token=per_token).route(score_TE, context())
    agree(routed, routers.expert_choice(tensor(score_TE), per_token))
    if len(score_TE) > 1:
        sequence_T = np.repeat(np.arange(4), [100, 1, 150, 49])
        policy = sim_expert_choice.Policy(experts_per_token=per_token, scope="sequence")
        routed = policy.route(score_TE, context(sequence_T=sequence_T))
        agree(routed, routers.expert_choice(tensor(score_TE), per_token, sequence_T=tensor(sequence_T)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("p", "most"), [(0.4, None), (0.25, None), (0.9, 5), (1.0, None)])
def test_top_p(shape, p, most):
    score_TE = scores(shape)
    for normalise in (False, True):
        routed = sim_top_p.Policy(p=p, most=most, norm_topk_prob=normalise).route(score_TE, context())
        agree(routed, routers.top_p(tensor(score_TE), p, most=most, normalise=normalise))


@pytest.mark.parametrize("shape", SHAPES)
def test_null_experts(shape):
    score_TN = scores(shape, experts=24)
    routed = sim_null_experts.Policy(null_experts=8, given=True).route(score_TN, context())
    agree(routed, routers.null_experts(tensor(score_TN), 4, 16))


@pytest.mark.parametrize("method", ["cosine", "kmeans"])
@pytest.mark.parametrize("tokens", [300, 1, 0])
def test_centroids_over_steps(method, tokens):
    policy, state = sim_centroid.Policy(method=method, memory=0.9), {}
    centroid_ED = None
    for step in range(STEPS):
        rng = np.random.default_rng([tokens, step])
        feature_TD = rng.normal(size=(tokens, 12)).astype(np.float32)
        given = context(step=step, feature_TD=feature_TD, state=state)
        routed = policy.route(np.zeros((tokens, EXPERTS), np.float32), given)
        if centroid_ED is None:
            first = policy.route(np.zeros((tokens, EXPERTS), np.float32), dataclasses.replace(given, training=False))
            centroid_ED = tensor(first.state["centroid_ED"])
        choice = routers.centroid(tensor(feature_TD), centroid_ED, 4)
        agree(routed, choice)
        if method == "kmeans" and tokens:
            centroid_ED = routers.centroid_step(centroid_ED, tensor(feature_TD), choice.expert_TK, memory=0.9)
        state = routed.state
        np.testing.assert_allclose(centroid_ED.numpy(), state["centroid_ED"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_hash_and_random(shape):
    score_TE = scores(shape)
    token_T = np.random.default_rng(5).integers(0, 1000, len(score_TE))
    routed = sim_hash.Policy(vocab_size=512).route(score_TE, context(token_T=token_T, layer=2))
    every = np.arange(512)
    table_VK = (
        sim_hash.Policy(vocab_size=512).route(np.zeros((512, EXPERTS)), context(token_T=every, layer=2)).expert_TK
    )
    agree(routed, routers.table(tensor(token_T), tensor(table_VK)))
    given = context(layer=2, step=7)
    draw_TE = given.generator("routing/random").random(score_TE.shape, np.float32)
    agree(sim_random.Policy().route(score_TE, given), routers.drawn(tensor(draw_TE), 4))


@pytest.mark.parametrize("shape", ["narrow", "wide", "ties", "skewed", "one token"])
def test_the_surrogate_follows_the_real_losss_gradient(shape):
    """The simulator's shift moves against E times the gradient that autograd finds for it."""
    score_TE, policy = scores(shape), sim_auxiliary_loss.Policy(alpha=0.02, rate=0.7)
    state = {"bias_E": np.random.default_rng(9).normal(size=EXPERTS)}
    routed = policy.route(score_TE, context(state=state))
    shift_E = torch.tensor(state["bias_E"], dtype=torch.float32, requires_grad=True)
    shifted_TE = tensor(score_TE) + shift_E
    agree(routed, routers.softmax_topk(shifted_TE, 4))
    loss = 0.02 * routers.auxiliary_loss(shifted_TE, tensor(routed.expert_TK.astype(np.int64)))
    loss.backward()
    moved_E = routed.state["bias_E"] - state["bias_E"]
    np.testing.assert_allclose(moved_E, -0.7 * EXPERTS * shift_E.grad.numpy(), rtol=1e-3, atol=1e-6)


def test_the_auxiliary_loss_is_one_under_balance_and_more_otherwise():
    even = torch.zeros(8, 4)
    assert float(routers.auxiliary_loss(even, torch.arange(8)[:, None] % 4)) == pytest.approx(1.0)
    tilted = torch.zeros(8, 4)
    tilted[:, 0] = 2.0
    assert float(routers.auxiliary_loss(tilted, torch.zeros(8, 1, dtype=torch.long))) == pytest.approx(
        4 * float(torch.softmax(tilted, 1)[0, 0])
    )


@pytest.mark.parametrize(
    "route",
    [
        lambda s: routers.softmax_topk(s, 4),
        lambda s: routers.topk_softmax(s, 4),
        lambda s: routers.grouped_sigmoid(s, 4, groups=4, top_groups=2),
        lambda s: routers.loss_free(s, 4, torch.zeros(EXPERTS, dtype=torch.float64)),
        lambda s: routers.bip(s, 4)[0],
        lambda s: routers.expert_choice(s, 4),
        lambda s: routers.top_p(s, 0.4),
        lambda s: routers.null_experts(s, 4, 12),
    ],
)  # fmt: skip
def test_gates_have_the_gradient_of_their_choice_held_still(route):
    """Autograd against differences in float64, where a step leaves the choice as it is."""
    score_TE = torch.from_numpy(scores("narrow")[:40].astype(np.float64)).requires_grad_()
    choice = route(score_TE)
    weight_TK = torch.from_numpy(np.random.default_rng(2).normal(size=choice.gate_TK.shape))
    (choice.gate_TK * weight_TK).sum().backward()
    assert (choice.gate_TK[choice.expert_TK == NONE] == 0).all()
    checked = 0
    for token, expert in [(0, 0), (3, 5), (17, 11), (39, 15), (20, 2), (8, 9)]:
        both = []
        for step in (1e-6, -1e-6):
            moved_TE = score_TE.detach().clone()
            moved_TE[token, expert] += step
            both.append(route(moved_TE))
        if all(torch.equal(b.expert_TK, choice.expert_TK) for b in both):
            slope = float(((both[0].gate_TK - both[1].gate_TK) * weight_TK)[token].sum()) / 2e-6
            assert float(score_TE.grad[token, expert]) == pytest.approx(slope, rel=1e-2, abs=1e-4)
            checked += 1
    assert checked >= 4


def test_sinkhorns_gates_have_the_gradient_of_the_plan_with_its_columns_held_still():
    score_TE = torch.from_numpy(scores("skewed")).requires_grad_()
    choice = routers.sinkhorn(score_TE, 4)
    weight_TK = torch.from_numpy(np.random.default_rng(2).normal(size=choice.gate_TK.shape).astype(np.float32))
    (choice.gate_TK * weight_TK).sum().backward()
    scale_TE = sim_sinkhorn.plan(score_TE.detach().numpy(), 1.0, 8) / np.exp(score_TE.detach().numpy())
    again_TE = torch.from_numpy(scores("skewed")).requires_grad_()
    plan_TE = torch.softmax(again_TE + torch.from_numpy(np.log(scale_TE)), 1).gather(1, choice.expert_TK)
    (plan_TE / plan_TE.sum(1, keepdim=True) * weight_TK).sum().backward()
    torch.testing.assert_close(score_TE.grad, again_TE.grad, rtol=1e-3, atol=1e-6)


def test_max_violation_and_counts_leave_out_empty_places():
    expert_TK = torch.tensor([[0, 1], [0, NONE], [0, NONE]])
    assert routers.counts(expert_TK, 4).tolist() == [3, 1, 0, 0]
    assert routers.max_violation(routers.counts(expert_TK, 4)) == pytest.approx(2.0)
    assert routers.max_violation(torch.zeros(4)) == 0.0


@pytest.mark.parametrize("k", [0, 17])
def test_a_number_of_experts_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match="between 1 and 16"):
        routers.softmax_topk(torch.zeros(2, 16), k)
