"""From one map to the next: slots that stay, sources that are near, and bytes that leave as many as arrive."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.placement import EMPTY, Placement
from moesim.placement.moves import moves, settle


def test_by_hand() -> None:
    # two nodes of two ranks of two slots; experts 0..4, three of them twice
    old = Placement(np.array([[0, 1, 2, 3, 4, 0, 1, 2]]), 5, 4, (0, 0, 1, 1))
    new = Placement(np.array([[1, 0, 3, 4, 1, 1, 0, 2]]), 5, 4, (0, 0, 1, 1))
    settled = settle(old, new)
    # rank 0 keeps both, rank 1 keeps 3 and takes 4 for 2, rank 2 takes 1 twice, rank 3 keeps 2 and takes 0 for 1
    assert settled.slot_to_expert_LS.tolist() == [[0, 1, 4, 3, 1, 1, 0, 2]]
    found = moves(old, settled)
    assert found.counts() == {"unchanged": 4, "same_rank": 0, "free_rider": 1, "same_node": 2, "across": 1}
    assert found.far_in_LG.tolist() == [[0, 1, 0, 0]]  # expert 4 was on rank 2 alone
    assert found.far_out_LG.tolist() == [[0, 0, 1, 0]]
    assert found.near_in_LG.tolist() == [[0, 0, 1, 1]]
    assert found.near_out_LG.tolist() == [[0, 0, 1, 1]]
    assert found.copies_LG.tolist() == [[0, 0, 1, 0]]


def test_a_copy_on_the_same_rank() -> None:
    old = Placement(np.array([[0, 1, 1, 2]]), 3, 2)
    new = Placement(np.array([[0, 0, 1, 2]]), 3, 2)
    assert moves(old, settle(old, new)).counts() == {
        "unchanged": 3, "same_rank": 1, "free_rider": 0, "same_node": 0, "across": 0,
    }  # fmt: skip


def test_sources_take_turns() -> None:
    # expert 0 is on ranks 0 and 1; four other ranks of the node want it
    old = Placement(np.array([[0, 1, 0, 2, 1, 2, 1, 2, 1, 2, 1, 2]]), 3, 6)
    new = Placement(np.array([[0, 1, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2]]), 3, 6)
    assert moves(old, new).near_out_LG.tolist() == [[2, 2, 0, 0, 0, 0]]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Placement, Placement]:
    nodes, per_node, room = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks = nodes * per_node
    slots = ranks * room
    experts = draw(st.integers(1, slots))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    where = tuple(np.repeat(np.arange(nodes), per_node).tolist())

    def one() -> Placement:
        spare = rng.integers(-1, experts, (2, slots - experts))
        both = np.concatenate([np.broadcast_to(np.arange(experts), (2, experts)), spare], axis=1)
        return Placement(rng.permuted(both, axis=1), experts, ranks, where)

    return one(), one()


def sets(placement: Placement, layer: int) -> list[list[int]]:
    return np.sort(placement.slot_to_expert_LS[layer].reshape(placement.num_ranks, -1), axis=1).tolist()


@given(pairs())
def test_settling_keeps_every_ranks_experts_and_most_slots(pair: tuple[Placement, Placement]) -> None:
    old, new = pair
    settled = settle(old, new)
    for layer in range(2):
        assert sets(settled, layer) == sets(new, layer)
        for rank in range(new.num_ranks):
            part = slice(rank * new.slots_per_rank, (rank + 1) * new.slots_per_rank)
            before, after = (p.slot_to_expert_LS[layer, part] for p in (old, settled))
            most = sum(min((before == e).sum(), (after == e).sum()) for e in range(EMPTY, new.num_experts))
            assert (before == after).sum() == most


@given(pairs())
def test_as_much_leaves_as_arrives_and_every_slot_is_counted_once(pair: tuple[Placement, Placement]) -> None:
    old, new = pair
    found = moves(old, new)
    assert (found.near_in_LG.sum(axis=1) == found.same_node_L).all()
    assert (found.near_out_LG.sum(axis=1) == found.same_node_L).all()
    assert (found.far_in_LG.sum(axis=1) == found.across_L).all()
    assert (found.far_out_LG.sum(axis=1) == found.across_L).all()
    assert (found.unchanged_L + found.moved_L == new.held_LS.sum(axis=1)).all()
    assert moves(old, old).counts()["unchanged"] == int(old.held_LS.sum())


@given(pairs())
def test_relabelling_moves_no_more_and_keeps_the_balance(pair: tuple[Placement, Placement]) -> None:
    old, new = pair
    weight = np.random.default_rng(0).random((2, new.num_experts))
    plain, relabelled = settle(old, new), settle(old, new, relabel_ranks=True)
    # experts that stay: nothing has to arrive in a slot that stays empty
    stay = [((old.slot_to_expert_LS == x.slot_to_expert_LS) & x.held_LS).sum(axis=1) for x in (plain, relabelled)]
    assert (stay[1] >= stay[0]).all()
    np.testing.assert_allclose(np.sort(relabelled.planned_load(weight)), np.sort(new.planned_load(weight)))


def test_relabelling_is_the_best_of_all_permutations() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        old, new = (Placement(np.append(rng.permutation(6), rng.integers(0, 6, 2))[None], 6, 4) for _ in range(2))
        blocks = new.slot_to_expert_LS.reshape(4, 2)
        best = max(
            (old.slot_to_expert_LS == settle(old, Placement(blocks[list(p)].reshape(1, -1), 6, 4)).slot_to_expert_LS)
            .sum()
            for p in itertools.permutations(range(4))
        )  # fmt: skip
        ours = settle(old, new, relabel_ranks=True).slot_to_expert_LS
        assert (old.slot_to_expert_LS == ours).sum() == best


def test_maps_of_different_shapes_are_refused() -> None:
    one, other = Placement(np.array([[0, 1]]), 2, 2), Placement(np.array([[0, 1, 0, 1]]), 2, 2)
    with pytest.raises(ValueError, match="same layers, slots"):
        settle(one, other)
