"""Every dispatch policy keeps the family's promises. A file added to moesim/dispatch/ is found here by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from moesim.dispatch import draw_below, hash_TLK, split, split_local
from moesim.dispatch.plan import Batches, Coupled, serve_batches
from moesim.placement import EMPTY, Placement, PlacementContext
from moesim.policy import load_policy, policy_kinds

KINDS = policy_kinds("dispatch")
COUPLED = [kind for kind in KINDS if isinstance(load_policy("dispatch", kind), Coupled)]
ALONE = [kind for kind in KINDS if kind not in COUPLED]
SPILLS = {"kind": "llep", "threshold": 1.0, "min_tokens": 8}
WATERFILL = [
    {"kind": "waterfill", "routed": routed, "mode": mode, "min_batch": 0}
    for routed in ("static", "random", "lp")
    for mode in ("dynamic", "static")
]
ALL = [*KINDS, SPILLS, {**SPILLS, "variant": "code"}, *WATERFILL]
ALL_COUPLED = [*COUPLED, *ALL[len(KINDS) :]]
LAYERS, EXPERTS, RANKS, NODES, TOP_K, TOKENS = 3, 16, 8, 2, 4, 400


def name(value):
    return value if isinstance(value, str) else "-".join(str(v) for v in value.values())


@pytest.fixture(scope="module")
def skewed():
    """EPLB on skewed loads: from one replica an expert to many, some of them on one rank."""
    weight = np.random.default_rng(0).lognormal(0, 1.5, (LAYERS, EXPERTS))
    value = {"kind": "eplb", "num_redundant_experts": 16}
    placed = load_policy("placement", value).place(weight, PlacementContext(RANKS, NODES))
    assert placed.max_replicas > 3
    return placed


@pytest.fixture(scope="module")
def with_gaps():
    """Some slots hold nothing, other ones in every layer."""
    slots = np.full((LAYERS, 24), EMPTY)
    rng = np.random.default_rng(5)
    for layer in range(LAYERS):
        at = rng.permutation(24)
        slots[layer, at[:EXPERTS]] = np.arange(EXPERTS)
        slots[layer, at[EXPERTS : EXPERTS + 4]] = rng.integers(0, EXPERTS, 4)
    return Placement(slots, EXPERTS, RANKS, (0, 0, 0, 0, 1, 1, 1, 1))


@pytest.fixture(params=["skewed", "with_gaps"])
def placement(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tokens():
    """(expert_TLK, source_rank_T): whole tokens with distinct experts, some experts wanted much more."""
    rng = np.random.default_rng(1)
    scores = rng.random((TOKENS, LAYERS, EXPERTS)) ** rng.lognormal(0, 1, EXPERTS)
    return np.argsort(-scores, axis=2)[:, :, :TOP_K].astype(np.uint8), rng.integers(0, RANKS, TOKENS)


def expert_of(slot_TLK, placement):
    return placement.slot_to_expert_LS[np.arange(placement.num_layers)[None, :, None], slot_TLK]


def one_batch(policy, expert, rank, placement, seed=7, token=None):
    return serve_batches(policy, expert, rank, np.zeros(1, int), placement, seed, token)


def held(served, placement, batch=0):
    """The expert in each slot that tokens were sent to [L, slots]; the shared expert is EXPERTS."""
    return placement.slot_to_expert_LS if served.plan is None else served.plan.expert_BLW[batch]


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_the_slot_holds_the_expert(kind, placement, tokens):
    policy = load_policy("dispatch", kind)
    served = one_batch(policy, *tokens, placement)
    slot = served.slot_TLK
    assert slot.dtype == np.int32
    expert = held(served, placement)[np.arange(LAYERS)[None, :, None], slot]
    assert (expert[:, :, :TOP_K] == tokens[0]).all()
    assert served.slots == RANKS * served.slots_per_rank == held(served, placement).shape[1]
    shared = getattr(policy, "shared", False)
    assert slot.shape == (TOKENS, LAYERS, TOP_K + shared)
    assert (expert[:, :, TOP_K:] == EXPERTS).all()
    assert (policy.assign(*tokens, placement, 7) == slot).all()
    if served.plan is not None:  # a rank's own slots stand before its guests and are the placement's
        assert (served.plan.own(served.plan.expert_BLW) == placement.slot_to_expert_LS).all()


@pytest.mark.parametrize("kind", ALONE)
def test_a_token_keeps_its_replica_in_any_batch_and_order(kind, placement, tokens):
    policy = load_policy("dispatch", kind)
    expert, rank = tokens
    whole = policy.assign(expert, rank, placement, 7)
    order = np.random.default_rng(2).permutation(TOKENS)
    assert (policy.assign(expert[order], rank[order], placement, 7, order) == whole[order]).all()
    assert (policy.assign(expert[100:], rank[100:], placement, 7, np.arange(100, TOKENS)) == whole[100:]).all()
    assert policy.assign(expert[:0], rank[:0], placement, 7).shape == (0, LAYERS, TOP_K)


@pytest.mark.parametrize("kind", ALL_COUPLED, ids=name)
def test_a_token_of_a_coupled_batch_keeps_its_replica_in_any_order(kind, placement, tokens):
    policy = load_policy("dispatch", kind)
    expert, rank = tokens
    whole = one_batch(policy, expert, rank, placement).slot_TLK
    order = np.random.default_rng(2).permutation(TOKENS)
    assert (one_batch(policy, expert[order], rank[order], placement, 7, order).slot_TLK == whole[order]).all()
    assert (one_batch(policy, expert, rank, placement).slot_TLK == whole).all()
    empty = one_batch(policy, expert[:0], rank[:0], placement)
    assert empty.slot_TLK.shape == (0, LAYERS, TOP_K + policy.shared)
    assert empty.plan.count_BLW.sum() == 0


@pytest.mark.parametrize("kind", ALL_COUPLED, ids=name)
def test_batches_together_are_served_as_each_alone(kind, placement, tokens):
    policy = load_policy("dispatch", kind)
    expert, rank = tokens
    number = np.arange(TOKENS)
    starts = np.array([0, 150, 151])
    together = serve_batches(policy, expert, rank, starts, placement, 7, number)
    for batch, (lo, hi) in enumerate(itertools.pairwise([*starts.tolist(), TOKENS])):
        part = slice(lo, hi)
        alone = one_batch(policy, expert[part], rank[part], placement, 7, number[part])
        # other batches may need more guests a rank, so slots are compared by rank and expert
        there = together.slot_TLK[part]
        assert (there // together.slots_per_rank == alone.slot_TLK // alone.slots_per_rank).all()
        layer = np.arange(LAYERS)[None, :, None]
        assert (held(together, placement, batch)[layer, there] == held(alone, placement)[layer, alone.slot_TLK]).all()


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_ids_that_are_no_expert_get_no_slot(kind, placement, tokens):
    policy = load_policy("dispatch", kind)
    expert = tokens[0].copy()
    expert[np.random.default_rng(8).random(expert.shape) < 0.3] = EXPERTS
    served = one_batch(policy, expert, tokens[1], placement)
    slot = served.slot_TLK[:, :, :TOP_K]
    assert ((slot == served.slots) == (expert == EXPERTS)).all()
    table = np.concatenate([held(served, placement), np.full((LAYERS, 1), EXPERTS)], axis=1)
    assert (table[np.arange(LAYERS)[None, :, None], slot] == expert).all()


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_without_replicas_there_is_no_choice(kind):
    alone = load_policy("placement", "contiguous").place(np.ones((LAYERS, EXPERTS)), PlacementContext(RANKS))
    expert = np.stack([(np.arange(TOKENS)[:, None] + np.arange(TOP_K)) % EXPERTS] * LAYERS, axis=1)
    served = one_batch(load_policy("dispatch", kind), expert, np.arange(TOKENS) % RANKS, alone)
    each = served.slots_per_rank
    slot = served.slot_TLK[:, :, :TOP_K]
    assert (slot // each * 2 + slot % each == expert).all()


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_split_keeps_every_token_with_its_expert(kind, placement):
    count = np.random.default_rng(3).integers(0, 1000, (5, LAYERS, EXPERTS))
    policy = load_policy("dispatch", kind)
    slots = policy.split(count, placement)
    assert (slots >= 0).all()
    if isinstance(policy, Coupled):
        tokens = np.full((5, RANKS), 100.0)
        plan = policy.plan(Batches(count, tokens), placement, 0)
        assert (per_expert(plan.count_BLW, plan.expert_BLW) == count).all()
        assert plan.count_BLW[plan.expert_BLW == EMPTY].sum() == 0
        if policy.shared:
            assert np.where(plan.expert_BLW == EXPERTS, plan.count_BLW, 0).sum(axis=2) == pytest.approx(RANKS * 100)
    else:
        assert slots.shape == (5, LAYERS, placement.num_slots)
        assert (per_expert(slots, placement.slot_to_expert_LS) == count).all()


def per_expert(slot_count, expert):
    """Sum over the slots of each expert: [..., L, S] -> [..., L, E]."""
    one_hot = expert[..., None] == np.arange(EXPERTS)
    return (slot_count[..., None] * one_hot).sum(axis=-2)


@pytest.mark.parametrize("kind", ALL_COUPLED, ids=name)
def test_tokens_carry_out_the_plan(kind, placement, tokens):
    """To the pair: what each slot serves is what the plan says, and the plan is that of the counts."""
    policy = load_policy("dispatch", kind)
    starts = np.array([0, 250])
    served = serve_batches(policy, *tokens, starts, placement, 7)
    batch = np.searchsorted(starts, np.arange(TOKENS), side="right") - 1
    count = np.zeros((2, LAYERS, served.slots), int)
    np.add.at(count, (batch[:, None, None], np.arange(LAYERS)[:, None], served.slot_TLK), 1)
    assert (count == served.plan.count_BLW).all()


def optimum(count_E, placement, layer):
    """The linear program as LPLB states it: least largest rank load when replicas share what is theirs."""
    expert_S, ranks = placement.slot_to_expert_LS[layer], placement.num_ranks
    slots = len(expert_S)
    rank = np.zeros((ranks, slots + 1))
    rank[np.arange(slots) // placement.slots_per_rank, np.arange(slots)] = 1
    rank[:, -1] = -1
    kept = np.hstack([expert_S == np.arange(len(count_E))[:, None], np.zeros((len(count_E), 1))])
    bounds = [(0, None if e != EMPTY else 0) for e in expert_S] + [(0, None)]
    cost = np.append(np.zeros(slots), 1)
    return linprog(cost, A_ub=rank, b_ub=np.zeros(ranks), A_eq=kept, b_eq=count_E, bounds=bounds).fun


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("waterfill", "llep")])
def test_no_policy_beats_the_linear_program_and_lp_reaches_it(kind, placement, tokens):
    served = one_batch(load_policy("dispatch", kind), *tokens, placement)
    for layer in range(LAYERS):
        best = optimum(np.bincount(tokens[0][:, layer].ravel(), minlength=EXPERTS), placement, layer)
        most = np.bincount(served.slot_TLK[:, layer].ravel() // placement.slots_per_rank).max()
        assert most >= best - 1e-6
        if kind == "lp":
            assert most == np.ceil(best - 1e-6)


def test_first_takes_the_lowest_slot(placement, tokens):
    slot = load_policy("dispatch", "first").assign(*tokens, placement, 7)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            lowest = placement.slot_to_expert_LS[layer].tolist().index(expert)
            assert set(slot[:, layer][tokens[0][:, layer] == expert].tolist()) <= {lowest}


def test_random_is_uniform_over_replicas_and_depends_on_the_seed():
    placement = Placement(np.array([[0, 1, 0, 0, 0, 0]]), 2, 3)
    expert = np.zeros((50_000, 1, 1), np.uint8)
    policy = load_policy("dispatch", "random")
    slot = policy.assign(expert, np.zeros(50_000, int), placement, 3).ravel()
    count = np.bincount(slot, minlength=6)
    assert count[1] == 0
    replicas = count[[0, 2, 3, 4, 5]]
    assert ((replicas - 10_000) ** 2 / 10_000).sum() < 18.5  # chi-squared, 4 degrees: 0.1 %
    other = policy.assign(expert, np.zeros(50_000, int), placement, 4).ravel()
    assert 0.15 < (slot == other).mean() < 0.25
    assert abs(np.corrcoef(slot[:-1], slot[1:])[0, 1]) < 0.02


def test_local_first_prefers_its_rank_then_its_node(placement, tokens):
    expert, rank = tokens
    slot = load_policy("dispatch", "local_first").assign(expert, rank, placement, 7)
    node = placement.node_of_rank_G
    met = set()
    for t in range(TOKENS):
        for layer in range(LAYERS):
            for k in range(TOP_K):
                ranks = placement.slot_to_rank_S[placement.slot_to_expert_LS[layer] == expert[t, layer, k]]
                served = placement.slot_to_rank_S[slot[t, layer, k]]
                if rank[t] in ranks:
                    assert served == rank[t]
                    met.add("rank")
                elif node[rank[t]] in node[ranks]:
                    assert node[served] == node[rank[t]]
                    met.add("node")
                else:
                    met.add("far")
    assert met == {"rank", "node", "far"}


def test_local_first_spreads_evenly_over_equally_near_replicas():
    placement = Placement(np.array([[0, 0, 1, 1, 0, 0, 0, 1]]), 2, 4, (0, 0, 1, 1))
    expert = np.zeros((30_000, 1, 1), np.uint8)
    policy = load_policy("dispatch", "local_first")
    near = [np.bincount(policy.assign(expert, np.full(30_000, r), placement, 1).ravel(), minlength=8) for r in range(4)]
    assert near[0][[0, 1]] == pytest.approx([15_000, 15_000], rel=0.03)  # both on rank 0
    assert near[1][[0, 1]] == pytest.approx([15_000, 15_000], rel=0.03)  # none on rank 1: those of its node
    assert near[2][[4, 5]] == pytest.approx([15_000, 15_000], rel=0.03)
    assert near[3][6] == 30_000


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_do_not_match_are_refused(kind, placement, tokens):
    with pytest.raises(ValueError, match=r"expert ids must be \[T, 3, K\]"):
        load_policy("dispatch", kind).assign(tokens[0][:, :2], tokens[1], placement, 7)


def test_split_by_hand():
    placement = Placement(np.array([[0, 1, 0, 0]]), 2, 2)
    assert split([[7, 5]], placement).tolist() == [[3, 5, 2, 2]]
    assert split([[8, 0]], placement).tolist() == [[3, 0, 3, 2]]
    assert split([[7, 5]], placement, "first").tolist() == [[7, 5, 0, 0]]


def test_uniform_split_is_what_random_dispatch_expects(placement, tokens):
    expert = np.concatenate([tokens[0]] * 20)
    slot = load_policy("dispatch", "random").assign(expert, np.zeros(len(expert), int), placement, 9)
    drawn = np.stack([np.bincount(slot[:, layer].ravel(), minlength=placement.num_slots) for layer in range(LAYERS)])
    count = np.stack([np.bincount(expert[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)])
    assert drawn == pytest.approx(split(count, placement), abs=5 * np.sqrt(drawn.max()))


def test_local_split_counts_what_local_first_assigns(placement, tokens):
    expert, rank = np.concatenate([tokens[0]] * 10), np.concatenate([tokens[1]] * 10)
    slot = load_policy("dispatch", "local_first").assign(expert, rank, placement, 9)
    count = np.zeros((RANKS, LAYERS, EXPERTS), int)
    drawn = np.zeros((RANKS, LAYERS, placement.num_slots), int)
    for layer in range(LAYERS):
        np.add.at(count, (rank[:, None], layer, expert[:, layer]), 1)
        np.add.at(drawn, (rank[:, None], layer, slot[:, layer]), 1)
    ours = split_local(count, placement)
    assert (per_expert(ours, placement.slot_to_expert_LS) == count).all()
    assert ((ours > 0) | (drawn == 0)).all()
    assert ours == pytest.approx(drawn, abs=6 * np.sqrt(drawn.max()))


def test_draws_are_uniform_whatever_bit_is_looked_at():
    bits = hash_TLK(1, np.arange(2000), 5, 4)
    assert np.unique(bits).size == bits.size
    for bound in (2, 3, 7, 64):
        count = np.bincount(draw_below(bits, np.array(bound)).ravel(), minlength=bound)
        assert count.size == bound
        assert ((count - 40_000 / bound) ** 2 / (40_000 / bound)).sum() < bound + 5 * np.sqrt(2 * bound)
    assert hash_TLK(-1, [0], 1, 1) != hash_TLK(1, [0], 1, 1)
