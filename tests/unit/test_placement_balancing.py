"""Placements that balance loads, by hand: the bound, the search, uneven slots, random, Lina, shadows, memory."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.placement import EMPTY, PlacementContext, PlacementCosts, TokenSample
from moesim.placement.bound import balance_bound
from moesim.placement.eplb import Policy as Eplb
from moesim.placement.eplb_swap import Policy as EplbSwap
from moesim.placement.lina import Policy as Lina
from moesim.placement.lina import path_popularity
from moesim.placement.memory_aware import Policy as MemoryAware
from moesim.placement.memory_aware import token_ns
from moesim.placement.random import Policy as Random
from moesim.placement.search import improve, pack_uneven
from moesim.placement.shadow import Policy as Shadow
from tests.build import scenario


def zipf(layers: int, experts: int, seed: int = 1, exponent: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    share = np.arange(1, experts + 1) ** -exponent
    return np.array([rng.multinomial(1_000_000, rng.permutation(share / share.sum())) for _ in range(layers)], float)


# ---- the bound


@pytest.mark.parametrize(
    ("loads", "slots", "ranks", "least"),
    [
        ([1, 1, 1, 1], 4, 2, 1.0),
        ([6, 1, 1], 3, 3, 18 / 8),  # the heaviest is alone
        ([6, 1, 1, 1, 1, 2], 6, 3, 7 / 4),  # and with the lightest beside it
        ([3, 3, 3, 1], 4, 2, 6 / 5),  # two of the three heaviest share a rank
        ([9, 8, 3, 2, 2, 0], 6, 3, 10 / 8),  # 9 takes 0, so 8 gets a 2 at best: neighbours run out
        ([12, 1, 1, 1, 1], 6, 2, 1.0),  # two replicas of 6 even out
        ([12, 1, 1], 6, 3, 9 / 7),  # 12 needs three replicas for less, then one other expert has two: not seen
    ],
)
def test_the_bound_by_hand(loads: list[float], slots: int, ranks: int, least: float) -> None:
    bound = balance_bound(np.array([loads], float), slots, ranks)
    assert bound[0] <= least * (1 + 1e-9)
    if len(loads) == slots:
        assert bound[0] == pytest.approx(least, rel=1e-6)


def test_the_bound_of_nodes() -> None:
    """Groups of 4, 4, 4 and 0 on two nodes: 8 and 4, whatever happens inside."""
    weight = np.array([[2.0, 2, 2, 2, 2, 2, 0, 0]])
    assert balance_bound(weight, 8, 4)[0] == pytest.approx(4 / 3)  # two of the six on one of four ranks of mean 3
    assert balance_bound(weight, 16, 4)[0] == pytest.approx(1.0)
    assert balance_bound(weight, 16, 4, groups=4, nodes=2)[0] == pytest.approx(8 / 6)


def test_the_bound_of_nothing() -> None:
    assert balance_bound(np.zeros((2, 4)), 4, 2).tolist() == [1, 1]
    assert balance_bound(np.ones((0, 4)), 4, 2).tolist() == []
    assert balance_bound(np.full((1, 4), 1e308), 8, 4)[0] == pytest.approx(1.0)
    with pytest.raises(BadInput):
        balance_bound(np.array([[np.nan]]), 1, 1)


# ---- the search


def test_swaps_by_hand() -> None:
    """8 + 7 | 2 + 1: swapping 7 and 1, or 8 and 2, leaves 9 on both."""
    found = improve(np.array([[8.0, 7, 2, 1]]), np.array([[0, 1, 2, 3]]), 2, 0)
    assert sorted(map(sorted, found.reshape(2, 2).tolist())) == [[0, 3], [1, 2]]


def test_kicks_move_replicas() -> None:
    """Loads 6, 6, 0, 0 on four ranks of two, where the light experts have the spare slots: no swap gets below 6."""
    weight, start = np.array([[6.0, 6, 0, 0]]), np.array([[0, 2, 1, 3, 2, 3, 2, 3]])
    load = lambda table: np.bincount(  # noqa: E731 - of a rank
        np.arange(8) // 2, (weight[0] / np.maximum(np.bincount(table[0], minlength=4), 1))[table[0]]
    )
    assert load(improve(weight, start, 4, 0)).max() == 6
    assert load(improve(weight, start, 4, 100)).max() == 3


def test_uneven_slots_are_dealt_one_more_or_one_less() -> None:
    """288 slots on 64 ranks: 32 ranks have 5 experts, 32 have 4, before the search and after it."""
    weight = zipf(3, 256)
    start = pack_uneven(weight, 60)
    assert sorted((start[0].reshape(60, 5) != EMPTY).sum(axis=1)) == [4] * 44 + [5] * 16
    placement = EplbSwap(num_redundant_experts=32, uneven=True).place(weight, PlacementContext(64))
    held_LG = placement.held_LS.reshape(3, 64, 5).sum(axis=2)
    assert ((held_LG == 4).sum(axis=1) == 32).all()
    assert ((held_LG == 5).sum(axis=1) == 32).all()
    assert placement.slots_per_rank == 5
    assert (placement.balance(weight) >= balance_bound(weight, 288, 64)).all()
    assert placement.balance(weight).mean() < 1.01
    with pytest.raises(BadInput, match="uneven: true"):
        EplbSwap(num_redundant_experts=32).place(weight, PlacementContext(64))


def test_uneven_changes_nothing_where_slots_divide() -> None:
    weight = zipf(2, 16)
    even, uneven = (
        EplbSwap(num_redundant_experts=8, uneven=u).place(weight, PlacementContext(8)) for u in (False, True)
    )
    assert (even.slot_to_expert_LS == uneven.slot_to_expert_LS).all()


@pytest.mark.parametrize("mode", ["global", "hierarchical"])
@pytest.mark.parametrize("effort", [0, 10])
def test_never_worse_than_eplb_in_the_same_mode(mode: str, effort: int) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        weight = rng.lognormal(0, 0.3 + 0.3 * seed, (5, 32))
        ctx = PlacementContext(8, 4, 8)
        ours = EplbSwap(num_redundant_experts=16, mode=mode, effort=effort).place(weight, ctx)
        theirs = Eplb(num_redundant_experts=16, mode=mode).place(weight, ctx)
        assert (ours.balance(weight) <= theirs.balance(weight) * (1 + 1e-9)).all()
        nodes = (4, 8) if mode == "hierarchical" else (1, 1)
        assert (ours.balance(weight) >= balance_bound(weight, 48, 8, nodes[1], nodes[0]) * (1 - 1e-9)).all()
        if mode == "hierarchical":
            groups = ours.slot_to_expert_LS.reshape(5, 4, 12) // 4
            assert all(len(set(node)) == 2 for layer in groups.tolist() for node in layer)


def test_more_effort_is_never_worse() -> None:
    weight = zipf(3, 64)
    balance = [
        EplbSwap(num_redundant_experts=16, effort=effort).place(weight, PlacementContext(16)).balance(weight)
        for effort in (0, 5, 50)
    ]
    assert (balance[1] <= balance[0] * (1 + 1e-12)).all()
    assert (balance[2] <= balance[1] * (1 + 1e-12)).all()


# ---- random


def test_random_parts_replicas_and_follows_its_seeds() -> None:
    weight = np.ones((6, 12))
    placement = Random(num_redundant_experts=12).place(weight, PlacementContext(8))
    assert (np.sort(placement.replica_count_LE) == 2).all()
    for layer in placement.slot_to_expert_LS.reshape(6, 8, 3).tolist():
        assert all(len(set(rank)) == 3 for rank in layer)
    many = Random(num_redundant_experts=4).place(weight, PlacementContext(4))
    assert (many.replica_count_LE.max(axis=1) == 2).all()
    again = Random(num_redundant_experts=12).place(weight, PlacementContext(8))
    other = Random(num_redundant_experts=12, seed=1).place(weight, PlacementContext(8))
    seeded = Random(num_redundant_experts=12).place(weight, PlacementContext(8, seed=1))
    assert (again.slot_to_expert_LS == placement.slot_to_expert_LS).all()
    assert (other.slot_to_expert_LS != placement.slot_to_expert_LS).any()
    assert (seeded.slot_to_expert_LS != placement.slot_to_expert_LS).any()
    assert (placement.slot_to_expert_LS[0] != placement.slot_to_expert_LS[1]).any()


# ---- Lina


def test_lina_by_hand() -> None:
    """Four ranks: loads 8, 4, 2, 1, 1 of 16 are 2, 1, 0.5, 0.25 and 0.25 devices. Eight slots, of which counts take
    2 + 1 + 1 + 1 + 1; the two left over go to the heaviest replicas: expert 0 has three and expert 1 two (a third of 8,
    half of 4). 2.67 | 2.67 + ... first-fit up to 4 a rank."""
    placement = Lina(num_redundant_experts=3).place(np.array([[8.0, 4, 2, 1, 1]]), PlacementContext(4))
    assert placement.replica_count_LE.tolist() == [[3, 2, 1, 1, 1]]
    # 2.67, 2.67, 2.67, 2, 2, 2, 1, 1 first-fit by load 4 and two slots: 2.67+1 | 2.67+1 | 2.67 (and the last 2) | 2+2
    assert sorted(placement.planned_load([[8.0, 4, 2, 1, 1]])[0]) == pytest.approx([11 / 3, 11 / 3, 4, 14 / 3])


def test_popularity_by_paths() -> None:
    """In the profile (first sequence) path 0 goes on to 2 and path 1 to 3; the batch (second) takes path 1 alone."""
    first = [[0, 2], [0, 2], [1, 3], [1, 3]]
    second = [[1, 3], [1, 2], [1, 3]]
    ids = np.array(first + second)[:, :, None]
    sample = TokenSample(ids, np.array([0] * 4 + [1] * 3), 4)
    popular = path_popularity(sample, 1)
    assert popular[0].tolist() == [0, 0, 0, 0]
    assert popular[1].tolist() == [0, 0, 0, 1]
    # a path nobody has met counts as the profile's mean
    ids[4:, 0] = 2
    assert path_popularity(sample, 1)[1].tolist() == [0, 0, 0.5, 0.5]


# ---- shadows


def test_shadow_by_hand() -> None:
    """Rows 60, 20, 10, 10 on two ranks, one ns a row, a byte a row at 1 byte a ns, 20 ns a shadow.

    None: 80 computed and 80 received, 160. The hottest: 30 + 20 computed, 20 received, 20 for the shadow: 90. Two: 40 +
    20 computed, 20 received, 40: 120, so one it is.
    """
    costs = PlacementCosts(100.0, 1.0, 0.0, 1.0, 1.0, 0.1, 20)
    ctx = PlacementContext(2, costs=costs)
    weight = np.array([[60.0, 20, 10, 10]])
    placement = Shadow().place(weight, ctx)
    assert placement.slot_to_expert_LS.tolist() == [[0, 1, EMPTY, 0, 2, 3]]
    assert Shadow().objective(placement, weight, ctx).tolist() == [90]
    assert Shadow(max_shadows=0).place(weight, ctx).slot_to_expert_LS.tolist() == [[0, 1, 2, 3]]
    # ten times as large an expert takes 200 to send, more than it saves; sent once in a hundred steps it is worth it
    heavy = PlacementContext(2, costs=PlacementCosts(100.0, 1.0, 0.0, 1.0, 1.0, 0.1, 200))
    assert Shadow().place(weight, heavy).num_slots == 4
    assert Shadow(steps=100.0).place(weight, heavy).num_slots == 6
    # links between nodes are ten times as slow, for rows as for shadows: 880 against 50 + 200 + 200
    assert Shadow().objective(placement, weight, PlacementContext(2, 2, costs=costs)).tolist() == [450]


def test_shadow_with_the_papers_prices() -> None:
    """d 2048, alpha 2, 50 Gb/s, 11.5 TFLOP/s: a row is 3 * 4 * 2 * 2048^2 / 11.5e12 s = 8.75 us of work and 5.24 us of
    wire, a shadow 10.7 ms. 16 experts on 16 ranks, half of 16,384 rows to one of them."""
    weight = np.array([[8192.0] + [8192 / 15] * 15])
    ctx = PlacementContext(16)
    policy = Shadow()
    alone = policy.objective(policy.model_copy(update={"max_shadows": 0}).place(weight, ctx), weight, ctx)
    assert alone[0] == pytest.approx(8192 * (12 * 2 * 2048**2 / 11.5e3 + 16 * 2048 / 6.25))
    placement = policy.place(weight, ctx)
    assert placement.replica_count_LE.tolist() == [[16] + [1] * 15]
    shadowed = 8192 / 15 * (12 * 2 * 2048**2 / 11.5e3 + 16 * 2048 / 6.25) + 512 * 12 * 2 * 2048**2 / 11.5e3
    assert policy.objective(placement, weight, ctx)[0] == pytest.approx(shadowed + 8 * 2 * 2048**2 / 6.25)


# ---- memory


def priced(kv_bytes: int, requests: int = 64) -> PlacementCosts:
    return PlacementCosts(
        tokens=2048.0, row_ns=100.0, expert_ns=0.0, token_bytes=0.0, near_bytes_per_ns=1.0, far_bytes_per_ns=1.0,
        expert_bytes=100, own_ns=1e6, kv_bytes=kv_bytes, request_kv_bytes=100.0, requests=requests,
    )  # fmt: skip


def test_memory_aware_weighs_replicas_against_kv() -> None:
    weight = zipf(4, 32)
    # room for a thousand requests beyond the limit of 64: replicas cost nothing
    rich = MemoryAware().place(weight, PlacementContext(8, costs=priced(100_000)))
    assert rich.slots_per_rank > 4
    assert rich.balance(weight).mean() < 1.02
    # a slot a rank takes 4 layers * 100 bytes, the KV of 4 of 8 requests
    poor = MemoryAware().place(weight, PlacementContext(8, costs=priced(800)))
    assert poor.slots_per_rank == 4
    # whatever it chose is the cheapest of all numbers
    for kv_bytes in (800, 3000, 6400, 10_000):
        ctx = PlacementContext(8, costs=priced(kv_bytes))
        policy = MemoryAware(effort=0, least_gain=0.0)
        chosen = policy.objective(policy.place(weight, ctx), weight, ctx)
        for number in range(0, 33, 8):
            other = EplbSwap(num_redundant_experts=number, effort=0).place(weight, ctx)
            assert chosen <= policy.objective(other, weight, ctx) * (1 + 1e-9)


def test_token_time_by_hand() -> None:
    """8 requests' KV, one slot more in 4 layers takes 4: 2048 / 8 rows of a rank halve. (1e6 + 4 * 128 * 100) / 4."""
    assert token_ns(np.ones(4), 5, 32, 8, 1, priced(800)) == pytest.approx((1e6 + 4 * 128 * 100) / 4)
    assert token_ns(np.ones(4), 6, 32, 8, 1, priced(800)) == float("inf")


def test_memory_aware_needs_prices() -> None:
    with pytest.raises(BadInput, match="eplb_swap with num_redundant_experts"):
        MemoryAware().place(np.ones((1, 8)), PlacementContext(4))


# ---- in scenarios


@pytest.mark.parametrize(
    "placement",
    [
        {"kind": "eplb_swap", "num_redundant_experts": 4, "uneven": True},
        {"kind": "random", "num_redundant_experts": 8},
        {"kind": "lina", "num_redundant_experts": 8},
        {"kind": "shadow", "steps": 1000.0},
        "memory_aware",
    ],
)
def test_scenarios_run_with_it(tmp_path: object, placement: object) -> None:
    from moesim.simulate import simulate

    result = simulate(scenario(tmp_path, policies={"placement": placement}))
    assert result.feasible
    assert result.experts is not None
    assert result.memory is not None
    slots = result.experts.placement.slots_per_rank
    plain = simulate(scenario(tmp_path))
    assert plain.experts is not None
    assert plain.memory is not None
    least = plain.experts.placement.slots_per_rank
    assert slots >= least
    assert result.memory.expert_weights * least == plain.memory.expert_weights * slots
