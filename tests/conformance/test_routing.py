"""Every routing policy keeps its promises. A file added to moesim/routing/ is found here by itself.

What is promised stands in `moesim.routing.Router`'s class variables; a policy is held to them with its parameters as
they are by default, and each row of `presets.yaml` with its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import moesim.routing
from moesim.policy import load_policy, policy_kinds
from moesim.routing import NONE, RoutingContext
from moesim.routing.capacity import CapacitySpec
from moesim.scenario.yamlio import load_yaml
from moesim.workload.synthetic import Groups

KINDS = policy_kinds("routing")
PRESET_FILE = Path(moesim.routing.__file__).parent / "presets.yaml"
PRESETS = yaml.safe_load(PRESET_FILE.read_text())
SHAPES = [(0, 8, 2), (1, 8, 2), (33, 8, 8), (200, 64, 6), (50, 256, 8), (17, 12, 1), (5, 4, 4)]


def _built(name):
    row = PRESETS.get(name, {"kind": name})
    return load_policy("routing", {"kind": row["kind"], **row.get("parameters", {})})


CASES = [*KINDS, *PRESETS]
POLICY = {name: _built(name) for name in CASES}


def sizes(name):
    """Columns of the scores, experts and K that suit a case: those of the preset's model where it states them."""
    row = PRESETS.get(name, {})
    model, parameters = row.get("model", {}), row.get("parameters", {})
    experts = model.get("num_experts", 64)
    by_column = parameters.get("given") or parameters.get("columns") == "factors"
    return model["router_columns"] if by_column else experts, experts, model.get("top_k", 6)


def context(tokens, experts, top_k, **more):
    """Everything a policy may ask for: sequences of 7 tokens, two classes, vocabulary ids."""
    rng = np.random.default_rng(11)
    groups = {"num_groups": 4, "top_groups": 3} if experts % 4 == 0 and top_k <= experts * 3 // 4 else {}
    facts = {
        "token_T": rng.integers(0, 50_000, tokens),
        "sequence_T": np.arange(tokens) // 7,
        "position_T": np.arange(tokens) % 7,
        "class_T": rng.integers(0, 2, tokens),
    }
    return RoutingContext(top_k, **{"seed": 5, "num_layers": 3, **groups, **facts, **more})


def scores(tokens, columns, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0, 2, (tokens, columns)).astype(dtype)


def held(policy, routed, tokens, experts, ctx, dtype=np.float32):
    """Checks one answer against the policy's promises and returns it."""
    ids, gates = routed.expert_TK, routed.gate_TK
    width = policy.width(ctx.top_k, experts)
    assert ids.shape == gates.shape
    assert len(ids) == tokens
    assert ids.shape[1] <= width <= experts
    assert ids.dtype == np.int32
    assert gates.dtype == dtype
    taken = ids != NONE
    assert ((ids >= 0) & (ids < experts))[taken].all()
    assert (taken[:, 1:] <= taken[:, :-1]).all(), "NONE stands in the last places"
    order = np.sort(np.where(taken, ids, experts + np.arange(ids.shape[1])), axis=1)
    assert (order[:, 1:] > order[:, :-1]).all(), "no expert twice in a token"
    if not policy.ragged:
        assert ids.shape[1] == ctx.top_k
        assert taken.all()
    assert np.isfinite(gates).all()
    assert (gates >= 0).all()
    assert (gates[~taken] == 0).all()
    asked = getattr(policy, "norm_topk_prob", None)
    normalises = policy.normalised or (ctx.norm_topk_prob if asked is None else asked)
    if normalises and not policy.free_gates:
        total = getattr(policy, "scaling_factor", 1.0)
        np.testing.assert_allclose(gates.sum(1)[taken.any(1)], total, rtol=1e-5)
    if not policy.stateful:
        assert not routed.state
    for array in (*routed.state.values(), *routed.carry.values()):
        assert np.isfinite(array).all()
    return routed


def same(one, other):
    """Equal choices, whatever the number of empty places behind them."""
    width = max(one.expert_TK.shape[1], other.expert_TK.shape[1])
    ids, gates = (
        [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in pair]
        for pair, fill in (((one.expert_TK, other.expert_TK), NONE), ((one.gate_TK, other.gate_TK), 0))
    )
    np.testing.assert_array_equal(*ids)
    np.testing.assert_allclose(*gates, rtol=1e-5, atol=1e-12)


def rows_of(ctx, rows):
    """The context of some of the tokens."""
    facts = ("token_T", "sequence_T", "position_T", "class_T")
    return replace(ctx, **{name: getattr(ctx, name)[rows] for name in facts})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_ids_and_gates(kind, shape, scoring, dtype):
    tokens, experts, top_k = shape
    policy, score = load_policy("routing", kind), scores(tokens, experts, dtype=dtype)
    before = score.copy()
    score.setflags(write=False)
    ctx = context(tokens, experts, top_k, scoring=scoring)
    routed = held(policy, policy.route(score, ctx), tokens, experts, ctx, dtype)
    np.testing.assert_array_equal(score, before)
    again = load_policy("routing", kind).route(score, context(tokens, experts, top_k, scoring=scoring))
    np.testing.assert_array_equal(routed.expert_TK, again.expert_TK)
    np.testing.assert_array_equal(routed.gate_TK, again.gate_TK)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_each_case_in_training_and_inference(name, normalise, training):
    policy, (columns, experts, top_k) = POLICY[name], sizes(name)
    for tokens, progress in ((0, 0.5), (1, 0.0), (40, 0.3), (40, 1.0)):
        ctx = context(tokens, columns, top_k, norm_topk_prob=normalise, training=training, progress=progress, layer=1)
        held(policy, policy.route(scores(tokens, columns), ctx), tokens, experts, ctx)


@pytest.mark.parametrize("name", CASES)
def test_ties_and_huge_scores(name):
    policy, (columns, experts, top_k) = POLICY[name], sizes(name)
    lowest = (
        -30 if getattr(policy, "scoring", None) == "sigmoid" else -1e30
    )  # where all gates are 0 no sum makes them 1
    for value in (0, 1e30, lowest):
        ctx = context(9, columns, top_k)
        routed = held(policy, policy.route(np.full((9, columns), value, np.float32), ctx), 9, experts, ctx)
        if name in ("topk", "grouped_topk"):
            assert (routed.expert_TK == np.arange(top_k)).all(), "of equal scores the lowest ids"
    mixed = np.where(np.arange(columns) % 3, np.float32(-1e30), np.float32(1e30)) * np.ones((9, 1), np.float32)
    held(policy, policy.route(mixed, context(9, columns, top_k)), 9, experts, context(9, columns, top_k))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "balanced"])  # balanced serves no scores
def test_experts_ruled_out_are_not_taken(kind):
    policy = load_policy("routing", kind)
    score = scores(35, 24)
    closed = [1, 4, 6, 9, 23]
    score[:, closed] = -np.inf
    score[3, 10:15] = -np.inf
    ctx = context(35, 24, 4)
    ids = held(policy, policy.route(score, ctx), 35, 24, ctx).expert_TK
    assert not np.isin(ids, closed).any()
    assert not np.isin(ids[3], [*closed, *range(10, 15)]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_experts(kind):
    policy = load_policy("routing", kind)
    score = scores(35, 24)
    score[:, 3:] = -np.inf
    ctx = context(35, 24, 4)
    if not policy.ragged:
        with pytest.raises(ValueError, match="expert"):
            policy.route(scores(3, 8), replace(context(3, 8, 2), top_k=9))
        if kind != "balanced":
            with pytest.raises(ValueError, match="-inf"):
                policy.route(score, ctx)
        return
    try:
        held(policy, policy.route(score, ctx), 35, 24, ctx)
    except ValueError as error:
        assert "-inf" in str(error)  # noqa: PT017  # it may also refuse


@pytest.mark.parametrize("name", CASES)
def test_a_token_alone_takes_the_same_experts(name):
    policy, (columns, _, top_k) = POLICY[name], sizes(name)
    if policy.couples:
        pytest.skip("promises nothing")
    score, ctx = scores(40, columns, dtype=np.float64), context(40, columns, top_k, training=True, progress=0.5)
    routed = policy.route(score, ctx)
    subsets = [np.arange(15), np.arange(1)]
    other = policy.route(score, replace(ctx, seed=6))
    if other.expert_TK.shape == routed.expert_TK.shape and (other.expert_TK == routed.expert_TK).all():
        subsets.append(np.array([3, 4, 11, 30]))  # who draws keys his draws by the row
    for rows in subsets:
        part = policy.route(score[rows], rows_of(ctx, rows))
        same(part, replace(routed, expert_TK=routed.expert_TK[rows], gate_TK=routed.gate_TK[rows]))


def steps(policy, columns, top_k, number, relabel=slice(None), tokens=70):
    """Training steps that hand the state on; returns the last answer and the state that went into it."""
    state = {}
    for step in range(number):
        ctx = context(tokens, columns, top_k, training=True, progress=step / 10, step=step, state=state)
        before = {key: value.copy() for key, value in state.items()}
        for value in state.values():
            value.setflags(write=False)
        routed = policy.route(scores(tokens, columns, seed=step, dtype=np.float64)[:, relabel], ctx)
        for key, value in before.items():
            np.testing.assert_array_equal(state[key], value)
        entered, state = state, dict(routed.state)
    return routed, entered


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_handed_on_and_never_written_to(name):
    policy, (columns, experts, top_k) = POLICY[name], sizes(name)
    routed, entered = steps(policy, columns, top_k, 3)
    assert bool(routed.state) == policy.stateful
    assert {k: v.shape for k, v in routed.state.items()} == {k: v.shape for k, v in entered.items()}
    np.testing.assert_array_equal(routed.expert_TK, steps(policy, columns, top_k, 3)[0].expert_TK)
    ctx = context(0, columns, top_k, training=True, state=routed.state)
    held(policy, policy.route(scores(0, columns), ctx), 0, experts, ctx)


@pytest.mark.parametrize("name", CASES)
def test_relabelling_experts_relabels_the_choice(name):
    policy, (columns, experts, top_k) = POLICY[name], sizes(name)
    if not policy.equivariant or columns != experts:
        pytest.skip("promises nothing")
    rng = np.random.default_rng(7)
    part = experts // 4  # whole groups, and within them: what a model with groups allows
    swap = np.concatenate([rng.permutation(part) + part * g for g in (2, 0, 3, 1)])
    tokens = 70 if not policy.couples else 20 * experts
    plain, moved = (steps(policy, columns, top_k, 3, relabel, tokens)[0] for relabel in (slice(None), swap))
    moved = replace(moved, expert_TK=np.where(moved.expert_TK == NONE, NONE, swap[moved.expert_TK]))
    if policy.couples and plain.expert_TK.shape == moved.expert_TK.shape:
        # a constraint of an expert that binds makes one token indifferent: there rounding decides
        equal = np.flatnonzero((plain.expert_TK == moved.expert_TK).all(1))
        assert tokens - len(equal) <= experts
        plain, moved = (replace(r, expert_TK=r.expert_TK[equal], gate_TK=r.gate_TK[equal]) for r in (plain, moved))
    same(plain, moved)


@pytest.mark.parametrize("name", CASES)
def test_what_is_carried_up_through_the_layers(name):
    policy, (columns, experts, top_k) = POLICY[name], sizes(name)
    carry = {}
    for layer in range(3):
        ctx = context(30, columns, top_k, layer=layer, carry=carry)
        for value in carry.values():
            value.setflags(write=False)
        routed = held(policy, policy.route(scores(30, columns, seed=layer), ctx), 30, experts, ctx)
        carry = dict(routed.carry)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_a_fact_that_nobody_knows_is_asked_for(name, training):
    """What a workload may not know is declared and asked for, or makes no difference. Without sequences and positions,
    which a simulation always knows, a policy asks for them or takes the batch as one sequence."""
    policy, (columns, _, top_k) = POLICY[name], sizes(name)
    score, ctx = scores(40, columns), context(40, columns, top_k, training=training, progress=0.5)
    whole = policy.route(score, ctx)
    assert set(policy.asks_for) <= {"token_T", "class_T"}
    for fact in ("token_T", "class_T"):
        if fact in policy.asks_for:
            with pytest.raises(ValueError, match="the context has none"):
                policy.route(score, replace(ctx, **{fact: None}))
        else:
            same(policy.route(score, replace(ctx, **{fact: None})), whole)
    one = replace(ctx, sequence_T=np.zeros(40, np.int64), position_T=np.arange(40))
    try:
        alone = policy.route(score, replace(ctx, sequence_T=None, position_T=None))
    except ValueError as error:
        assert "the context has none" in str(error)  # noqa: PT017  # the other answer is checked below
    else:
        same(alone, policy.route(score, one))


def test_the_scenario_reader_reads_the_presets_alike():
    assert load_yaml(PRESET_FILE)[0] == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_where_they_come_from(name):
    row = PRESETS[name]
    assert name not in KINDS
    assert set(row) <= {"kind", "parameters", "model", "capacity", "source", "equation", "reconstruction"}
    assert row["kind"] in KINDS
    assert row["source"]
    assert row["equation"]
    assert isinstance(row["reconstruction"], str)
    if "capacity" in row:
        CapacitySpec.model_validate(row["capacity"])
    assert set(row.get("model", {})) <= {
        "upcycle", "split", "shared", "latent_rank", "iterations", "pool_layers", "pool_share", "expert_widths",
        "expert_dtype", "gated_experts", "router_columns", "execution", "num_experts", "top_k", "intermediate_size",
    }  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in KINDS if not load_policy("routing", k).from_scores])
@pytest.mark.parametrize("tokens", [1, 500])
def test_drawn_pools(kind, tokens):
    policy = load_policy("routing", kind)
    weight = np.random.default_rng(1).random((3, 16)) + 0.1
    groups = policy.groups(4, 3)
    ids = policy.draw(weight, tokens, 4, groups, 7)
    assert ids.shape == (tokens, 3, 4)
    assert ids.dtype == np.uint8
    assert ids.max() < 16
    ordered = np.sort(ids, axis=2)
    assert (ordered[:, :, 1:] > ordered[:, :, :-1]).all()
    np.testing.assert_array_equal(ids, policy.draw(weight, tokens, 4, groups, 7))
    if policy.ideal:
        count = np.bincount(ids[:, 0].ravel(), minlength=16)
        assert count.max() - count.min() <= 1


def test_only_grouped_topk_has_groups():
    assert {k: load_policy("routing", k).groups(8, 4) for k in KINDS if k != "grouped_topk"} == {
        k: Groups() for k in KINDS if k != "grouped_topk"
    }
    assert load_policy("routing", "grouped_topk").groups(8, 4) == Groups(8, 4)
