"""Policies of dispatch against their definitions: linear programs, the paper's algorithms in plain Python, brute force,
cases worked by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from moesim.cost.weights import Guests, moves_of, transfer_ns
from moesim.dispatch import split
from moesim.dispatch.llep import Policy as Llep
from moesim.dispatch.min_max import min_max_split
from moesim.dispatch.plan import Batches, Plan, plan_of, serve, serve_batches, stack
from moesim.dispatch.static import rank_slots
from moesim.dispatch.waterfill import Policy as Waterfill
from moesim.dispatch.waterfill import whole
from moesim.placement import EMPTY, Placement
from moesim.policy import load_policy
from moesim.scenario.load import load_profile

ROOT = Path(__file__).parents[2]


def random_placement(rng, layers, experts, ranks, nodes=1, spare=2, gaps=True):
    """Every expert once, and replicas of any or nothing in the slots that are left."""
    slots = ranks * (-(-experts // ranks) + spare)
    table = np.full((layers, slots), EMPTY)
    for layer in range(layers):
        at = rng.permutation(slots)
        table[layer, at[:experts]] = np.arange(experts)
        table[layer, at[experts:]] = rng.integers(-1 if gaps else 0, experts, slots - experts)
    return Placement(table, experts, ranks, tuple(r * nodes // ranks for r in range(ranks)))


# ---- LP


def least(count_E, placement, layer):
    """The linear program's optimum."""
    expert_S, ranks = placement.slot_to_expert_LS[layer], placement.num_ranks
    slots = np.arange(len(expert_S))
    rank = np.zeros((ranks, len(slots) + 1))
    rank[slots // placement.slots_per_rank, slots] = 1
    rank[:, -1] = -1
    kept = np.hstack([expert_S == np.arange(len(count_E))[:, None], np.zeros((len(count_E), 1))])
    bounds = [(0, None if e != EMPTY else 0) for e in expert_S] + [(0, None)]
    cost = np.append(np.zeros(len(slots)), 1)
    return linprog(cost, A_ub=rank, b_ub=np.zeros(ranks), A_eq=kept, b_eq=count_E, bounds=bounds).fun


def test_whole_tokens_reach_the_linear_programs_optimum_rounded_up():
    rng = np.random.default_rng(0)
    for _ in range(40):
        experts, ranks = int(rng.integers(2, 12)), int(rng.integers(1, 7))
        placement = random_placement(rng, 2, experts, ranks, spare=int(rng.integers(0, 3)))
        count = rng.integers(0, 60, (2, 2, experts)) * (rng.random((2, 2, experts)) < 0.7)
        slot = min_max_split(count, placement)
        assert (slot >= 0).all()
        one_hot = placement.slot_to_expert_LS[:, :, None] == np.arange(experts)
        assert (np.einsum("bls,lse->ble", slot, one_hot.astype(int)) == count).all()
        for b, layer in itertools.product(range(2), range(2)):
            most = placement.rank_load(slot[b, layer]).max()
            assert most == math.ceil(least(count[b, layer], placement, layer) - 1e-7)


def test_tokens_pass_through_a_chain_of_ranks():
    """Expert 0 on ranks 0 and 1, expert 1 on 1 and 2, expert 2 on 2 and 3: what ranks give way to each other."""
    placement = Placement(np.array([[0, EMPTY, 0, 1, 1, 2, 2, EMPTY]]), 3, 4)

    def most(*count):
        return placement.rank_load(min_max_split(np.array([[count]]), placement)).max()

    assert min_max_split(np.array([[[40, 0, 0]]]), placement).tolist() == [[[20, 0, 20, 0, 0, 0, 0, 0]]]
    assert most(20, 20, 20) == 15  # all ranks alike
    assert most(40, 10, 6) == 20  # 40 on two ranks
    assert most(30, 18, 12) == 16  # 30 + 18 on three
    assert most(30, 19, 12) == 17  # 49 on three, rounded up
    assert most(0, 0, 0) == 0


# ---- LLEP


def algorithm_2(load, ranks, alpha, least_tokens, code):
    """Algorithms 2 and 3 of arXiv:2601.17111, one expert after the other: {(expert, rank): tokens}."""
    each = len(load) // ranks
    limit = max(math.floor(alpha * (sum(load) // ranks)), 1) if code else math.ceil(alpha * sum(load) / ranks)
    pending = [sum(load[r * each : (r + 1) * each]) for r in range(ranks)]
    assigned = [0] * ranks
    out: dict[tuple[int, int], int] = {}

    def give(expert, rank, tokens):
        assigned[rank] += tokens
        out[expert, rank] = out.get((expert, rank), 0) + tokens

    for expert in sorted(range(len(load)), key=lambda e: -load[e]):
        native, rest = expert // each, load[expert]
        pending[native] -= rest
        take = min(rest, max(limit - assigned[native] - pending[native], 0))
        if take:
            give(expert, native, take)
        rest -= take
        first = None
        while rest:
            others = sorted((r for r in range(ranks) if r != native), key=lambda r: assigned[r] + pending[r])
            first = first or others
            for rank in others:
                chunk = min(rest, limit - assigned[rank] - pending[rank])
                if chunk > 0 and (chunk >= least_tokens or chunk == rest):
                    give(expert, rank, chunk)
                    rest -= chunk
                    break
            else:
                give(expert, first[0] if code and not take else others[0], rest)
                rest = 0
    return out


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_llep_is_the_papers_algorithm(variant):
    rng = np.random.default_rng(3)
    spilled = 0
    for _ in range(30):
        ranks, each = int(rng.integers(2, 6)), int(rng.integers(1, 4))
        alpha, least_tokens = float(rng.choice([1.0, 1.1, 1.5])), int(rng.choice([0, 1, 20, 200]))
        load = np.round(rng.lognormal(3, 1.5, (2, 3, ranks * each))).astype(int)
        placement = Placement(np.tile(np.arange(ranks * each), (3, 1)), ranks * each, ranks)
        policy = Llep(variant=variant, alpha=alpha, min_tokens=least_tokens, threshold=0)
        plan = policy.plan(Batches(load, np.zeros((2, ranks))), placement, 0)
        for b, layer in itertools.product(range(2), range(3)):
            found = {}
            for slot in np.flatnonzero(plan.count_BLW[b, layer]).tolist():
                rank, expert = slot // plan.slots_per_rank, int(plan.expert_BLW[b, layer, slot])
                found[expert, rank] = int(plan.count_BLW[b, layer, slot])
                guest = rank != expert // each
                spilled += guest
                if guest:
                    assert plan.home_BLW[b, layer, slot] == expert // each
            assert found == algorithm_2(load[b, layer].tolist(), ranks, alpha, least_tokens, variant == "code")
    assert spilled > 100


def test_llep_by_hand():
    """Four ranks of one expert, 400 tokens, limit 100: expert 0's 310 fill what the others leave, in their order."""
    placement = Placement(np.arange(4)[None], 4, 4, (0, 0, 1, 1))
    policy = Llep(threshold=1.3, min_tokens=0)
    plan = policy.plan(Batches(np.array([[[310, 50, 30, 10]]]), np.zeros((1, 4))), placement, 0)
    assert plan.expert_BLW[0, 0].tolist() == [0, EMPTY, 1, 0, 2, 0, 3, 0]
    assert plan.count_BLW[0, 0].tolist() == [100, 0, 50, 50, 30, 70, 10, 90]
    assert plan.home_BLW[0, 0].tolist() == [-1, -1, -1, 0, -1, 0, -1, 0]
    moves = moves_of(plan)
    assert [x.item() for x in moves] == [1, 2, 3, 1]  # rank 0 sends one inside its node, two across
    guests = Guests(placement)
    guests.serve(plan, 0.5)
    guests.sent(moves)
    assert guests.load_LP.tolist() == [[0, 25, 35, 45]]
    assert guests.most == 1
    # chunks of 60: rank 3 and rank 2 are large enough, and the 50 left end on rank 1
    plan = Llep(min_tokens=60).plan(Batches(np.array([[[310, 50, 30, 10]]]), np.zeros((1, 4))), placement, 0)
    assert plan.count_BLW[0, 0].tolist() == [100, 0, 50, 50, 30, 70, 10, 90]
    # balanced enough: plain expert parallelism; the paper looks at experts, the code at ranks
    even = Batches(np.array([[[120, 100, 100, 80]]]), np.zeros((1, 4)))
    assert Llep().plan(even, placement, 0).guests == 0
    two = Placement(np.arange(4)[None], 4, 2)
    uneven = Batches(np.array([[[180, 20, 100, 100]]]), np.zeros((1, 2)))
    assert Llep(min_tokens=0, variant="code").plan(uneven, two, 0).guests == 0
    assert (
        Llep(min_tokens=0, threshold=1.0, alpha=1.0).plan(uneven, two, 0).guests == 0
    )  # ranks are even: nothing spills


def test_llep_sends_no_weights_where_the_expert_is():
    placement = Placement(np.array([[0, 1, 2, 0, 3, 4]]), 5, 3)
    count = np.array([[[400, 200, 100, 20, 0]]])
    plan = Llep(min_tokens=0, threshold=1).plan(Batches(count, np.zeros((1, 3))), placement, 0)
    guests = (plan.home_BLW >= 0) & (plan.count_BLW > 0)
    for slot in np.flatnonzero(guests[0, 0]):
        rank = slot // plan.slots_per_rank
        assert plan.expert_BLW[0, 0, slot] not in placement.slot_to_expert_LS[0, 2 * rank : 2 * rank + 2]
    assert (plan.count_BLE() == count).all()
    assert plan.rows_BLG().max() == 240


def test_weights_take_the_busiest_ports_time():
    profile = load_profile(ROOT / "hw_profiles" / "h200_sxm.yaml")
    placement = Placement(np.arange(4)[None], 4, 4, (0, 0, 1, 1))
    plan = Llep(min_tokens=0).plan(Batches(np.array([[[310, 50, 30, 10]]]), np.zeros((1, 4))), placement, 0)
    ns = transfer_ns(profile, moves_of(plan), 1e6)
    # two experts through one NIC of 50 GB/s, its latency, and a launch
    fit = profile.fits.get("all_gather", {})
    launch = fit.get("launch_ns", profile.graph_launch_ns)
    assert ns.item() == pytest.approx(2 * 1e6 / (50 * fit.get("nic_eff", 0.85)) + profile.node.nic_latency_ns + launch)
    sizes = np.array([0.5, 1, 1, 1, 1, 0])
    assert moves_of(plan, sizes).total.item() == 1.5


# ---- tokens follow plans


def test_tokens_that_stand_for_others_keep_a_plans_shares():
    placement = Placement(np.array([[0, 0, 0, 0]]), 1, 4)
    plan = plan_of(placement, np.array([[[500, 300, 200, 0]]]))
    slot = serve(np.zeros((20, 1, 1), int), np.zeros(20, int), plan, 1)
    assert np.bincount(slot.ravel(), minlength=4).tolist() == [10, 6, 4, 0]


def test_an_expert_that_no_plan_expected_is_served_where_it_is():
    placement = Placement(np.array([[0, 1, 1, 0]]), 2, 2)
    plan = plan_of(placement, np.array([[[2, 0, 0, 2]]]))
    slot = serve(np.array([[[0, 1]], [[0, 1]]]), np.zeros(2, int), plan, 1)
    assert slot[:, 0, 1].tolist() == [1, 1]
    assert sorted(slot[:, 0, 0].tolist()) == [0, 3]


def test_plans_side_by_side_have_as_many_guests_as_the_one_with_most():
    placement = Placement(np.arange(4)[None], 4, 4)
    counts = [np.array([[[100, 100, 100, 100]]]), np.array([[[310, 50, 30, 10]]])]
    plans = [Llep(min_tokens=0).plan(Batches(c, np.zeros((1, 4))), placement, 0) for c in counts]
    both = stack(plans)
    assert both.guests == 1
    assert (both.count_BLE() == np.concatenate(counts)).all()
    assert (both.rows_BLG() == np.concatenate([p.rows_BLG() for p in plans])).all()
    assert isinstance(both, Plan)


# ---- static, node-limited


def test_static_sends_to_its_own_replica_and_deals_the_others_out_fairly():
    rng = np.random.default_rng(1)
    placement = random_placement(rng, 3, 8, 12, spare=1, gaps=False)
    slot_GLE = rank_slots(placement, 5)
    for layer, expert in itertools.product(range(3), range(8)):
        slots = np.flatnonzero(placement.slot_to_expert_LS[layer] == expert)
        ranks = slots // placement.slots_per_rank
        others = []
        for rank in range(12):
            chosen = slot_GLE[rank, layer, expert]
            assert chosen in slots
            if rank in ranks:
                assert chosen == slots[ranks == rank][0]
            else:
                others.append(chosen)
        number = [others.count(s) for s in slots]
        assert max(number) - min(number) <= 1
    assert (rank_slots(placement, 5) == slot_GLE).all()
    assert (rank_slots(placement, 6) != slot_GLE).any()


def test_static_prefers_its_node_where_told():
    """By hand: two nodes of three ranks with two slots. Expert 0 lies on ranks 0, 1 and 3, 1 on rank 4 twice, 2 on
    ranks 0 and 2 of one node, the others in one place."""
    row = [0, 2, 0, 3, 2, 4, 0, 5, 1, 1, 6, 7]
    placement = Placement(np.array([row]), 8, 6, (0, 0, 0, 1, 1, 1))
    near = rank_slots(placement, 5, prefer_node=True)[:, 0]
    assert near[:, 0].tolist() == [0, 2, 0, 6, 6, 6]  # rank 2 takes the first of its node, though the second is as near
    # all of expert 1's replicas are on node 1: that narrows nothing there, and node 0 has none, so five ranks draw
    assert sorted(near[[0, 1, 2, 3, 5], 1].tolist()) in ([8, 8, 8, 9, 9], [8, 8, 9, 9, 9])
    assert near[4, 1] == 8
    assert (near[[0, 2], 2] == [1, 4]).all()
    assert sorted(near[[1, 3, 4, 5], 2].tolist()) == [1, 1, 4, 4]
    assert (near[:, 3:] == [3, 5, 7, 10, 11]).all()
    fair = rank_slots(placement, 5)[:, 0]
    assert fair[[0, 1, 3], 0].tolist() == [0, 2, 6]
    assert sorted(fair[[2, 4, 5], 0].tolist()) == [0, 2, 6]
    one = Placement(np.array([row]), 8, 6)  # one node: nothing is narrowed
    assert (rank_slots(one, 5, prefer_node=True) == rank_slots(one, 5)).all()


def test_node_limited_reaches_as_few_nodes_as_brute_force():
    rng = np.random.default_rng(2)
    placement = random_placement(rng, 1, 12, 8, nodes=4, spare=2)
    tokens = 300
    expert = np.argsort(rng.random((tokens, 1, 12)), axis=2)[:, :, :4]
    rank = rng.integers(0, 8, tokens)
    node_S = placement.node_of_rank_G[placement.slot_to_rank_S]
    reached = {}
    for kind in ("node_limited", "local_first", "random"):
        slot = load_policy("dispatch", kind).assign(expert, rank, placement, 3)
        home = placement.node_of_rank_G[rank]
        reached[kind] = np.array([len({*node_S[slot[t, 0]].tolist(), home[t]}) - 1 for t in range(tokens)])
    best = np.empty(tokens, int)
    for t in range(tokens):
        nodes = [set(node_S[placement.slot_to_expert_LS[0] == e].tolist()) for e in expert[t, 0]]
        home = placement.node_of_rank_G[rank[t]]
        best[t] = min(len({*chosen, home}) - 1 for chosen in itertools.product(*nodes))
    assert (reached["node_limited"] >= best).all()
    assert (reached["node_limited"] == best).mean() > 0.97  # greedy set cover
    assert (reached["node_limited"] <= reached["local_first"]).mean() > 0.97
    assert reached["node_limited"].mean() < reached["local_first"].mean() < reached["random"].mean()


# ---- waterfill


@pytest.fixture(scope="module")
def flood():
    """Whole tokens of 8 ranks on 2 nodes, rank 0 with the heaviest experts."""
    rng = np.random.default_rng(4)
    placement = Placement(np.tile(np.arange(32), (2, 1)), 32, 8, (0, 0, 0, 0, 1, 1, 1, 1))
    score = rng.random((4096, 2, 32)) ** np.where(np.arange(32) < 4, 0.6, 1.0)
    return placement, np.argsort(-score, axis=2)[:, :, :4], rng.integers(0, 8, 4096)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_waterfill_levels_the_ranks(flood, mode):
    placement, expert, rank = flood
    served = serve_batches(Waterfill(mode=mode), expert, rank, np.zeros(1, int), placement, 3)
    routed, loads = served.plan.rows_BLG(shared=False)[0], served.plan.rows_BLG()[0]
    kept = routed + np.bincount(rank, minlength=8)
    assert (loads.sum(axis=1) == 4096 * 5).all()
    assert (loads.max(axis=1) < kept.max(axis=1) - 0.5 * (kept.max(axis=1) - kept.mean(axis=1))).all()
    chosen = served.slot_TLK[:, :, -1] // served.slots_per_rank
    assert (served.slot_TLK[:, :, -1] % served.slots_per_rank == 4).all()  # behind a rank's own four
    assert (chosen == rank[:, None])[rank > 0].mean() > 1.05 / 8  # ranks that lack something prefer themselves


def test_waterfill_keeps_to_ranks_that_the_token_reaches_where_one_is_over_the_level(flood):
    """SGLang: all ranks are candidates only while none exceeds the level."""
    placement, _, rank = flood
    rng = np.random.default_rng(6)
    score = rng.random((4096, 2, 32))
    score[:, :, :4] += 0.8  # rank 0 far above the level
    expert = np.argsort(-score, axis=2)[:, :, :4]
    served = serve_batches(Waterfill(), expert, rank, np.zeros(1, int), placement, 3)
    chosen = served.slot_TLK[:, :, -1] // served.slots_per_rank
    reached = (expert // 4 == chosen[:, :, None]).any(axis=2) | (chosen == rank[:, None])
    assert reached.all()
    # nobody's shared expert goes to the full rank but of tokens that have nowhere else to go
    elsewhere = (expert // 4 != 0).any(axis=2) | (rank[:, None] != 0)
    assert (chosen[elsewhere] != 0).all()


def test_waterfill_leaves_small_batches_alone(flood):
    placement, expert, rank = flood
    few = slice(0, 200)  # some 25 a rank
    served = serve_batches(Waterfill(), expert[few], rank[few], np.zeros(1, int), placement, 3)
    assert (served.slot_TLK[:, :, -1] // served.slots_per_rank == rank[few][:, None]).all()


@pytest.mark.parametrize(("mode", "rest"), [("dynamic", 0.01), ("static", 0.04)])
@pytest.mark.parametrize("heavy", [0.0, 0.8])
def test_waterfills_expected_loads_are_those_of_tokens(flood, mode, rest, heavy):
    """rest: relative to the mean load; a rank that looks at its own tokens alone sees chance where the plan sees means.
    Exact loads of routed experts, reach counted."""
    placement, _, rank = flood
    rng = np.random.default_rng(7)
    score = rng.random((4096, 2, 32))
    score[:, :, :4] += heavy
    expert = np.argsort(-score, axis=2)[:, :, :4]
    policy = Waterfill(mode=mode)
    served = serve_batches(policy, expert, rank, np.zeros(1, int), placement, 3)
    count = np.stack([np.bincount(expert[:, layer].ravel(), minlength=32) for layer in range(2)])[None]
    reach = np.stack([(expert[:, :, :, None] // 4 == np.arange(8)).any(axis=2).sum(axis=0)]).astype(float)
    tokens = np.bincount(rank, minlength=8)[None].astype(float)
    plan = policy.plan(Batches(count, tokens, reach), placement, 3)
    ours, exact = plan.rows_BLG(), served.plan.rows_BLG()
    assert ours.sum() == exact.sum()
    assert np.abs(ours - exact).max() < rest * exact.mean() + 4 * np.sqrt(512)


def test_waterfill_counts_what_static_ranks_send(flood):
    rng = np.random.default_rng(8)
    placement = random_placement(rng, 2, 16, 8, nodes=2, spare=2)
    count = rng.integers(0, 4000, (3, 2, 16)) // 8 * 8
    plan = Waterfill(min_batch=0).plan(Batches(count, np.full((3, 8), 100.0)), placement, 5)
    slot_GLE = rank_slots(placement, 5)
    wanted = np.zeros((3, 2, placement.num_slots), int)
    for rank, layer, expert in itertools.product(range(8), range(2), range(16)):
        wanted[:, layer, slot_GLE[rank, layer, expert]] += count[:, layer, expert] // 8
    assert (plan.own(plan.count_BLW) == wanted).all()
    even = Waterfill(min_batch=0, routed="random").plan(Batches(count, np.full((3, 8), 100.0)), placement, 5)
    assert (even.own(even.count_BLW) == split(count, placement)).all()


def test_shares_become_whole_numbers_of_the_same_sum():
    share = np.random.default_rng(9).random((3, 2, 50)) * 5
    share[0, 0] *= 40 / share[0, 0].sum()
    found = whole(share)
    assert found[0, 0].sum() == 40
    assert (np.abs(found - share) <= 1).all()
