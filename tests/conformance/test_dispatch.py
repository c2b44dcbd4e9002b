"""Every dispatch policy keeps the family's promises. A file added to moesim/dispatch/ is found here by itself."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.dispatch import draw_below, hash_TLK, split, split_local
from moesim.placement import Placement, PlacementContext
from moesim.policy import load_policy, policy_kinds

KINDS = policy_kinds("dispatch")
LAYERS, EXPERTS, RANKS, NODES, TOP_K, TOKENS = 3, 16, 8, 2, 4, 400


@pytest.fixture(scope="module")
def placement():
    """EPLB on skewed loads: from one replica an expert to many, some of them on one rank."""
    weight = np.random.default_rng(0).lognormal(0, 1.5, (LAYERS, EXPERTS))
    value = {"kind": "eplb", "num_redundant_experts": 16}
    placed = load_policy("placement", value).place(weight, PlacementContext(RANKS, NODES))
    assert placed.max_replicas > 3
    return placed


@pytest.fixture(scope="module")
def tokens():
    """(expert_TLK, source_rank_T): whole tokens with distinct experts."""
    rng = np.random.default_rng(1)
    scores = rng.random((TOKENS, LAYERS, EXPERTS))
    return np.argsort(scores, axis=2)[:, :, :TOP_K].astype(np.uint8), rng.integers(0, RANKS, TOKENS)


def expert_of(slot_TLK, placement):
    return placement.slot_to_expert_LS[np.arange(placement.num_layers)[None, :, None], slot_TLK]


@pytest.mark.parametrize("kind", KINDS)
def test_the_slot_holds_the_expert(kind, placement, tokens):
    slot = load_policy("dispatch", kind).assign(*tokens, placement, seed=7)
    assert slot.dtype == np.int32
    assert slot.shape == tokens[0].shape
    assert (expert_of(slot, placement) == tokens[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_keeps_its_replica_in_any_batch_and_order(kind, placement, tokens):
    policy = load_policy("dispatch", kind)
    expert, rank = tokens
    whole = policy.assign(expert, rank, placement, 7)
    order = np.random.default_rng(2).permutation(TOKENS)
    assert (policy.assign(expert[order], rank[order], placement, 7, order) == whole[order]).all()
    assert (policy.assign(expert[100:], rank[100:], placement, 7, np.arange(100, TOKENS)) == whole[100:]).all()
    assert policy.assign(expert[:0], rank[:0], placement, 7).shape == (0, LAYERS, TOP_K)


@pytest.mark.parametrize("kind", KINDS)
def test_without_replicas_there_is_no_choice(kind, tokens):
    alone = load_policy("placement", "contiguous").place(np.ones((LAYERS, EXPERTS)), PlacementContext(RANKS))
    assert (load_policy("dispatch", kind).assign(*tokens, alone, 7) == tokens[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_split_keeps_every_token_with_its_expert(kind, placement):
    count = np.random.default_rng(3).integers(0, 1000, (5, LAYERS, EXPERTS))
    slots = load_policy("dispatch", kind).split(count, placement)
    assert slots.shape == (5, LAYERS, placement.num_slots)
    assert (slots >= 0).all()
    assert (per_expert(slots, placement) == count).all()


def per_expert(slot_count, placement):
    """Sum over the slots of each expert: [..., L, S] -> [..., L, E]."""
    one_hot = placement.slot_to_expert_LS[:, :, None] == np.arange(placement.num_experts)
    return np.einsum("...ls,lse->...le", slot_count, one_hot.astype(np.int64))


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
    drawn = np.stack([np.bincount(slot[:, layer].ravel(), minlength=32) for layer in range(LAYERS)])
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
    assert (per_expert(ours, placement) == count).all()
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
