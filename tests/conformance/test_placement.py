"""Every placement policy keeps the family's promises; EPLB also meets hand-worked, brute-force and published
figures. Optima of small cases: tests/oracle/test_placement_optima.py.

A file added to moesim/placement/ is found here by itself.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from moesim.dispatch import split, split_local
from moesim.errors import BadInput
from moesim.placement import EMPTY, Placement, PlacementContext, PlacementCosts, TokenSample, slot_count
from moesim.placement.eplb import pack, replicate
from moesim.policy import load_policy, policy_class, policy_kinds

KINDS = policy_kinds("placement")
SHAPES = [
    # layers, experts, redundant, ranks, nodes, groups
    (3, 8, 0, 4, 1, 1),
    (3, 8, 0, 1, 1, 1),
    (2, 8, 4, 4, 2, 4),
    (2, 16, 8, 8, 2, 4),
    (1, 6, 3, 9, 3, 3),
    (2, 60, 4, 8, 1, 1),
    (2, 12, 4, 8, 2, 4),
    (1, 4, 12, 16, 2, 1),
    (0, 8, 0, 4, 1, 1),
]


COSTS = PlacementCosts(
    tokens=4096.0,
    row_ns=100.0,
    expert_ns=2000.0,
    token_bytes=2e4,
    near_bytes_per_ns=400.0,
    far_bytes_per_ns=50.0,
    expert_bytes=1 << 20,
    own_ns=1e5,
    kv_bytes=1 << 32,
    request_kv_bytes=float(1 << 22),
    requests=2000,
)
WHOLE = ("contiguous", "round_robin", "random", "eplb", "eplb_swap", "lina", "balance_cpsat")
"""want equally many slots on every rank (eplb_swap and balance_cpsat unless told otherwise)"""
WITHOUT_LABELS = ("eplb", "eplb_swap")
"""what experts are called changes nothing but the names in the map"""


def context(weight, ranks, nodes=1, groups=1, seed=0, sample_seed=9):
    """All that a context can tell: prices, and a sample of tokens with two experts each, drawn by their loads."""
    layers, experts = weight.shape
    rng = np.random.default_rng(sample_seed)
    share = np.where(np.isfinite(weight) & (weight > 0), weight, 0.0)
    share = share / np.maximum(share.max(axis=1, keepdims=True, initial=0), 1e-300)
    choices = min(2, experts)
    key = rng.gumbel(size=(240, layers, experts)) + np.log(share + 1e-9)
    ids = np.argsort(-key, axis=2)[..., :choices].astype(np.int16)
    sample = TokenSample(ids, np.repeat(np.arange(12), 20), experts, rng.integers(0, 50, 240))
    return PlacementContext(ranks, nodes, groups, sample=sample, costs=COSTS, seed=seed)


def has(kind, name):
    return name in policy_class("placement", kind).model_fields


def promises(kind, name):
    return getattr(policy_class("placement", kind), name, False)


def policy(kind, redundant=0, **parameters):
    value = {"kind": kind, **parameters}
    if has(kind, "num_redundant_experts"):
        value["num_redundant_experts"] = redundant
    if has(kind, "deterministic_time"):  # solvers keep every promise with little time, but that of the optimum
        value["deterministic_time"] = 0.02
    return load_policy("placement", value)


def place(kind, weight, redundant, ranks, nodes=1, groups=1, **parameters):
    ctx = context(weight, ranks, nodes, groups) if np.ndim(weight) == 2 else PlacementContext(ranks, nodes, groups)
    return policy(kind, redundant, **parameters).place(weight, ctx)


def slots_of(kind, experts, redundant, ranks):
    """Slots that a policy with these parameters fills, None where the map itself decides."""
    if promises(kind, "chooses_slots"):
        return None
    return experts + (redundant if has(kind, "num_redundant_experts") else 0)


def slow(kind):
    """A solver: held to the same promises on fewer and smaller cases."""
    return has(kind, "deterministic_time")


LARGEST = 16
"""(layer, expert) pairs of a solver's cases, but for those on one rank"""


def takes(kind, case):
    """Whether the case [layers, experts, redundant experts, ranks, ...] is small enough for a solver, and an exact
    method does not refuse its experts and ranks."""
    layers, experts, _, ranks = case[:4]
    if slow(kind):
        return layers * experts <= LARGEST or ranks == 1
    if promises(kind, "exact"):
        try:
            policy(kind).place(np.ones((0, experts)), PlacementContext(ranks))
        except BadInput:
            return False
    return True


def kinds_with(cases, kinds=KINDS):
    """Every kind with every case that it takes."""
    return pytest.mark.parametrize(("kind", "case"), [(k, c) for k in kinds for c in cases if takes(k, c)])


def kinds_with_one(*cases, kinds=KINDS):
    """Every kind with the first case that it takes."""
    pairs = [(kind, next((c for c in cases if takes(kind, c)), None)) for kind in kinds]
    return pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, case in pairs if case is not None])


def placed(kind, weight, redundant, ranks, nodes=1, groups=1, **told):
    """The map, made with all that a context can tell."""
    return policy(kind, redundant).place(weight, context(weight, ranks, nodes, groups, **told))


def test_every_kind_runs_in_every_test():
    """Nothing here is skipped, so that what is parametrised runs: all kinds, or those with traffic and contiguous."""
    counted = 0
    for name, test in globals().items():
        kinds = set()
        for mark in getattr(test, "pytestmark", ()) if name.startswith("test_") else ():
            names = (mark.args[0],) if isinstance(mark.args[0], str) else mark.args[0]
            if "kind" in names:
                kinds |= {case if len(names) == 1 else case[names.index("kind")] for case in mark.args[1]}
        if kinds:
            counted += 1
            assert kinds == set(WITH_TRAFFIC if "never_slower" in name else KINDS), name
    assert counted == 8


@kinds_with(SHAPES)
def test_every_expert_is_placed_and_the_same_way_twice(kind, case):
    layers, experts, redundant, ranks, nodes, groups = case
    slots = slots_of(kind, experts, redundant, ranks)
    weight = np.random.default_rng(1).lognormal(0, 1, (layers, experts))
    before = weight.copy()
    first, second = (placed(kind, weight, redundant, ranks, nodes, groups) for _ in range(2))
    assert first.num_slots == first.slots_per_rank * ranks
    assert (first.replica_count_LE >= 1).all()
    assert (first.replica_count_LE.sum(axis=1) == first.held_LS.sum(axis=1)).all()
    if slots is not None:  # as many as told; where ranks do not divide them, one more or less on a rank
        assert (first.held_LS.sum(axis=1) == slots).all()
        assert first.slots_per_rank == -(-slots // ranks)
        assert (first.held_LS.reshape(layers, ranks, first.slots_per_rank).sum(axis=2) >= slots // ranks).all()
    assert first.rank_to_node == context(weight, ranks, nodes, groups).rank_to_node
    assert (first.slot_to_expert_LS == second.slot_to_expert_LS).all()
    assert (weight == before).all()


@kinds_with_one((3, 24, 8, 8), (2, 8, 4, 4))
def test_memory_is_that_of_the_fullest_rank(kind, case):
    """Bytes of a rank: its slots in every layer. A policy that is told how many slots takes no more; one that chooses
    takes none that no rank of any layer needs."""
    layers, experts, redundant, ranks = case
    slots = slots_of(kind, experts, redundant, ranks)
    weight = np.random.default_rng(21).lognormal(0, 1.5, (layers, experts))
    placement = placed(kind, weight, redundant, ranks)
    held_LG = placement.held_LS.reshape(layers, ranks, -1).sum(axis=2)
    assert held_LG.max() == placement.slots_per_rank
    bytes_ = layers * placement.slots_per_rank * COSTS.expert_bytes
    assert bytes_ >= layers * (experts // ranks) * COSTS.expert_bytes
    if slots is not None:
        assert bytes_ == layers * slots // ranks * COSTS.expert_bytes


@kinds_with_one((4, 16, 8, 8), (1, 8, 4, 4))
def test_relabelling_experts_relabels_the_placement_or_leaves_the_balance(kind, case):
    layers, experts, *slots = case
    weight = np.random.default_rng(2).lognormal(0, 1, (layers, experts))
    rename = np.random.default_rng(3).permutation(experts)
    balance = placed(kind, weight, *slots).balance(weight)
    assert placed(kind, weight, *slots).balance(weight) == pytest.approx(balance)
    if kind in WITHOUT_LABELS:
        assert place(kind, weight[:, rename], *slots).balance(weight[:, rename]) == pytest.approx(balance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_changes_only_what_says_so(kind):
    """`draws`: another seed of the scenario, another map. Random `starts` of a search may change it. Else it stays."""
    weight = np.random.default_rng(22).lognormal(0, 1, (2, 8))
    one, other = (placed(kind, weight, 4, 4, seed=seed).slot_to_expert_LS for seed in (0, 1))
    same = np.array_equal(one, other)
    assert not same if promises(kind, "draws") else same or has(kind, "starts")


def contiguous_reference(kind, weight, redundant, ranks):
    """Contiguous order with as many slots as the policy is told; where it chooses, or they do not divide, with one slot
    an expert, ranks in order taking E // G experts or one more."""
    experts, slots = weight.shape[1], slots_of(kind, weight.shape[1], redundant, ranks)
    if slots is not None and slots % ranks == 0:
        return place("contiguous", weight, slots - experts, ranks)
    room = -(-experts // ranks)
    table = np.full((ranks, room), EMPTY)
    for rank, ids in enumerate(np.array_split(np.arange(experts), ranks)):
        table[rank, : len(ids)] = ids
    return Placement(np.tile(table.ravel(), (len(weight), 1)), experts, ranks)


def cost(kind, placement, weight, ctx, redundant=0):
    """A policy's own objective, [L] or a number; without one, max/mean rank load."""
    objective = getattr(policy(kind, redundant), "objective", None)
    return placement.balance(weight) if objective is None else objective(placement, weight, ctx)


WITH_TRAFFIC = [k for k in KINDS if promises(k, "uses_traffic") is not False or k == "contiguous"]


@kinds_with([(4, 16, 0, 8), (4, 16, 8, 8), (3, 60, 4, 8), (2, 6, 3, 3), (3, 8, 0, 1)], WITH_TRAFFIC)
def test_never_slower_than_contiguous_on_its_own_traffic(kind, case):
    layers, experts, redundant, ranks = case
    for seed in range(4):
        weight = np.random.default_rng(30 + seed).lognormal(0, 0.3 + seed / 2, (layers, experts))
        ctx = context(weight, ranks, sample_seed=seed)
        ours = placed(kind, weight, redundant, ranks, sample_seed=seed)
        plain = contiguous_reference(kind, weight, redundant, ranks)
        reached = np.asarray(cost(kind, ours, weight, ctx, redundant))
        assert (reached <= np.asarray(cost(kind, plain, weight, ctx, redundant)) * (1 + 1e-9)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [np.zeros((2, 8)), np.eye(8)[:2] * 5, np.full((2, 8), 1e300)])
def test_dead_experts_and_layers_without_load(kind, weight):
    placement = placed(kind, weight, 8, 4)
    assert (placement.replica_count_LE >= 1).all()
    assert np.isfinite(placement.balance(weight)).all()
    if kind in WITHOUT_LABELS and (weight[0] == weight[0, 0]).all():
        assert placement.balance(weight) == pytest.approx([1.0, 1.0])
    elif kind == "eplb":  # seven dead experts keep a slot each, the hot one has nine of 16: 3, 2, 2 and 2 on a rank
        assert placement.balance(weight) == pytest.approx([3 / 9 * 4, 3 / 9 * 4])
    elif kind == "eplb_swap":  # eight slots of the hot one, two on each rank
        assert placement.balance(weight) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_what_is_no_load_is_refused(kind, bad):
    weight = np.ones((2, 8))
    weight[1, 3] = bad
    with pytest.raises(BadInput, match="expert 3 of layer 1"):
        place(kind, weight, 0, 4)
    with pytest.raises(BadInput, match=r"\[layers, experts\]"):
        place(kind, np.ones(8), 0, 4)


@kinds_with([(1, 256, 30, 32), (1, 60, 0, 8), (1, 7, 0, 3)])
def test_slots_that_do_not_divide_name_the_nearest_legal_counts(kind, case):
    """Or they are dealt out one more here and there, where a policy says nothing against it."""
    _, experts, redundant, ranks = case
    named = {256: "0, 32 or 64", 60: "4, 12 or 20", 7: "2, 5 or 8"}[experts]
    told = redundant if has(kind, "num_redundant_experts") else 0
    if kind in WHOLE:
        with pytest.raises(BadInput, match=f"Use num_redundant_experts = {named}, or kind: eplb_swap") as error:
            place(kind, np.ones((1, experts)), told, ranks)
        assert f"{experts + told} slots, ranks={ranks}" in str(error.value)
    else:
        placement = placed(kind, np.ones((1, experts)), told, ranks)
        held_G = placement.held_LS.reshape(ranks, -1).sum(axis=1)
        assert promises(kind, "chooses_slots") or held_G.max() - held_G.min() == ((experts + told) % ranks > 0)


ILLEGAL = [(256, 32, 64), (7, 0, 3), (5, 100, 8), (8, 1, 16), (1, 0, 2)]


@pytest.mark.parametrize(("experts", "redundant", "ranks"), ILLEGAL)
def test_the_counts_named_are_legal_and_near(experts, redundant, ranks):
    with pytest.raises(BadInput, match="Use num_redundant_experts") as error:
        slot_count(experts, redundant, ranks)
    listed = str(error.value).rpartition("= ")[2].partition(", or kind")[0]
    named = [int(n) for n in listed.replace(" or", ",").split(", ")]
    legal = sorted((n for n in range(2000) if (experts + n) % ranks == 0), key=lambda n: abs(n - redundant))
    assert legal[0] in named
    assert all((experts + n) % ranks == 0 and n >= 0 for n in named)
    for n in named:
        assert slot_count(experts, n, ranks) == experts + n


def test_contiguous_and_round_robin_by_hand():
    weight = np.ones((1, 6))
    assert place("contiguous", weight, 0, 3).slot_to_expert_LS.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert place("contiguous", weight, 3, 3).slot_to_expert_LS.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert place("round_robin", weight, 0, 3).slot_to_expert_LS.tolist() == [[0, 3, 1, 4, 2, 5]]
    assert place("round_robin", weight, 3, 3).slot_to_expert_LS.tolist() == [[0, 3, 0, 1, 4, 1, 2, 5, 2]]


# ---- EPLB


def test_global_by_hand():
    # Loads 90, 60, 30, 20; two spare slots on three ranks of two. 90 -> 45 + 45; then 60 -> 30 + 30.
    # Replicas heaviest first, each to the lightest rank with room: 45 | 45 | 30 (expert 1); 30 (expert 2) to the last
    # rank, now full with 60; 30 (expert 1 again) to the first, 20 to the second. Loads 75, 65, 60, mean 200 / 3.
    placement = place("eplb", np.array([[90.0, 60, 30, 20]]), 2, 3, mode="global")
    assert placement.replica_count_LE.tolist() == [[2, 2, 1, 1]]
    assert placement.planned_load([[90.0, 60, 30, 20]]).tolist() == [[75, 65, 60]]
    assert placement.slot_to_expert_LS.tolist() == [[0, 1, 0, 3, 1, 2]]
    assert placement.balance([[90.0, 60, 30, 20]]) == pytest.approx([75 * 3 / 200])


def test_hierarchical_by_hand():
    # Groups {0,1} = 10, {2,3} = 8, {4,5} = 3, {6,7} = 1 go two to a node: 10 + 1 and 8 + 3. Each node has two spare
    # slots and two ranks of three slots.
    # First node, experts of 9, 1, 1, 0: 9 -> 4.5 -> 3 a replica; 3 | 3, then 3 and 0 to the first rank, 1 and 1 to the
    # second: 6 and 5.
    # Second node, experts of 4, 4, 2, 1: both 4 -> 2; 2 | 2, 2 | 2, 2 to the first rank and 1 to the second: 6 and 5.
    weight = np.array([[9.0, 1, 4, 4, 2, 1, 1, 0]])
    placement = place("eplb", weight, 4, 4, 2, 4, mode="hierarchical")
    assert placement.planned_load(weight).tolist() == [[6, 5, 6, 5]]
    assert sorted(set(placement.slot_to_expert_LS[0, :6])) == [0, 1, 6, 7]
    assert sorted(set(placement.slot_to_expert_LS[0, 6:])) == [2, 3, 4, 5]


def test_the_published_example():
    """The EPLB README's example (12 experts, 16 slots, 8 GPUs, 2 nodes, 4 groups): its balance is 1.225 /
    1.132."""
    weight = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        float,
    )
    assert place("eplb", weight, 4, 8, 2, 4).balance(weight).mean() == pytest.approx(1.225, abs=5e-4)
    assert place("eplb", weight, 4, 8, 2, 4, mode="global").balance(weight).mean() == pytest.approx(1.132, abs=1e-3)


def test_a_group_stays_on_one_node():
    weight = np.random.default_rng(4).lognormal(0, 1.5, (5, 32))
    placement = place("eplb", weight, 16, 8, 4, 8, mode="hierarchical")
    per_node = placement.slot_to_expert_LS.reshape(5, 4, 12) // 4
    for layer in range(5):
        groups = [set(node) for node in per_node[layer].tolist()]
        assert [len(g) for g in groups] == [2, 2, 2, 2]
        assert len(set.union(*groups)) == 8


@pytest.mark.parametrize(
    ("experts", "ranks", "nodes", "groups", "why"),
    [(16, 8, 2, 3, "nodes must divide the expert groups"), (18, 6, 2, 4, "groups must divide the experts")],
)
def test_hierarchical_says_why_not_and_auto_goes_global(experts, ranks, nodes, groups, why):
    weight = np.random.default_rng(5).lognormal(0, 1, (2, experts))
    with pytest.raises(BadInput, match=why):
        place("eplb", weight, 0, ranks, nodes, groups, mode="hierarchical")
    auto, flat = (place("eplb", weight, 0, ranks, nodes, groups, mode=mode) for mode in ("auto", "global"))
    assert (auto.slot_to_expert_LS == flat.slot_to_expert_LS).all()


def test_replicas_go_where_the_load_a_replica_is_largest():
    """Greedy minimises the largest load a replica: checked against all replica counts."""
    rng = np.random.default_rng(6)
    for _ in range(40):
        experts, spare = int(rng.integers(2, 6)), int(rng.integers(0, 6))
        weight = rng.lognormal(0, 1.2, (1, experts))
        expert, count = replicate(weight, experts + spare)
        counts = (c for c in itertools.product(range(1, spare + 2), repeat=experts) if sum(c) == experts + spare)
        best = min((weight[0] / np.array(c)).max() for c in counts)
        assert (weight / count).max() == pytest.approx(best)
        assert np.bincount(expert[0], minlength=experts).tolist() == count[0].tolist()


def best_packing(load, ranks):
    """Least possible largest rank load of equally many items a rank, by trying all ways."""
    room = len(load) // ranks

    def search(left):
        if not left:
            return 0.0
        head, *tail = left
        return min(
            max(load[head] + sum(load[i] for i in rest), search([i for i in tail if i not in rest]))
            for rest in itertools.combinations(tail, room - 1)
        )

    return search(list(range(len(load))))


@pytest.mark.parametrize(("items", "ranks", "worst"), [(6, 3, 1.0), (6, 2, 7 / 6), (9, 3, 11 / 9)])
def test_packing_against_brute_force(items, ranks, worst, record_property):
    """Never better than the best; with two items a rank equal to it, else within 4/3 - 1/(3 G), Graham's bound."""
    rng = np.random.default_rng(7)
    gaps = []
    for _ in range(200 if items == 6 else 40):
        load = rng.lognormal(0, rng.uniform(0.2, 1.5), (1, items))
        packed = np.take_along_axis(load, pack(load, ranks), axis=1).reshape(ranks, -1).sum(axis=1)
        gaps.append(packed.max() / best_packing(load[0], ranks))
    record_property("mean_gap", float(np.mean(gaps)))
    assert min(gaps) >= 1 - 1e-12
    assert max(gaps) <= worst + 1e-12


def test_replicated_packing_against_brute_force(record_property):
    """Four experts in six slots on three ranks, against all replica counts and all packings: gap reported,
    bounded."""
    rng = np.random.default_rng(8)
    gaps = []
    for _ in range(100):
        weight = rng.lognormal(0, 1.0, (1, 4))
        ours = place("eplb", weight, 2, 3, mode="global").planned_load(weight).max()
        best = np.inf
        for counts in itertools.product((1, 2, 3), repeat=4):
            if sum(counts) == 6:
                best = min(best, best_packing(np.repeat(weight[0] / counts, counts), 3))
        gaps.append(ours / best)
    record_property("mean_gap", float(np.mean(gaps)))
    assert min(gaps) >= 1 - 1e-12
    assert np.mean(gaps) < 1.05
    assert max(gaps) < 1.5


@functools.cache
def loads(kind, seed, layers=58, experts=256, assignments=8_000_000):
    """Expert loads of `layers` layers: multinomial draws of a popularity that is Zipf 1.0, shuffled, or
    lognormal 0.5."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        share = rng.permutation(1.0 / np.arange(1, experts + 1)) if kind == "zipf" else rng.lognormal(0, 0.5, experts)
        rows.append(rng.multinomial(assignments, share / share.sum()))
    weight = np.array(rows, float)
    weight.setflags(write=False)
    return weight


@functools.cache
def at_deepseek_size(popularity, redundant, ranks, nodes, mode):
    """Loads and EPLB's map of them."""
    weight = loads(popularity, 11)
    return weight, place("eplb", weight, redundant, ranks, nodes, 8, mode=mode)


@pytest.mark.parametrize(
    ("redundant", "ranks", "nodes", "mode", "zipf", "lognormal"),
    [
        (32, 32, 4, "global", 1.0035, 1.008),
        (32, 32, 4, "hierarchical", 1.380, 1.028),
        (64, 64, 8, "global", 1.0245, 1.028),
        (64, 64, 8, "hierarchical", 2.530, 1.161),
        (32, 144, 18, "global", 2.054, 1.055),
        (0, 64, 8, "global", 10.57, 1.217),
    ],
)
def test_balance_at_deepseek_size(redundant, ranks, nodes, mode, zipf, lognormal):
    """Largest over mean rank load, mean over 58 layers of 256 experts in 8 groups, as measured on EPLB d52c72d.

    Only the draw of the popularities differs from that measurement. Hierarchical is bound by the load of the nodes,
    which a draw of few large groups moves by several per cent (next test); one unlucky expert does the same without
    redundancy. Elsewhere seeds differ by less than 1 %.
    """
    rel = 0.06 if mode == "hierarchical" or redundant == 0 else 0.015
    for kind, published in (("zipf", zipf), ("lognormal", lognormal)):
        weight, placement = at_deepseek_size(kind, redundant, ranks, nodes, mode)
        balance = placement.balance(weight).mean()
        assert balance == pytest.approx(published, rel=rel)


@pytest.mark.parametrize(("ranks", "nodes", "total", "of_nodes"), [(32, 4, 1.380, 1.27), (64, 8, 2.530, 2.05)])
def test_hierarchical_balance_over_the_balance_of_the_nodes(ranks, nodes, total, of_nodes):
    """The measured figures of the test above divided by the node imbalance measured with them, at zipf 1.0."""
    weight, placement = at_deepseek_size("zipf", ranks, ranks, nodes, "hierarchical")
    node_load = placement.planned_load(weight).reshape(58, nodes, -1).sum(axis=2)
    node_balance = (node_load.max(axis=1) / node_load.mean(axis=1)).mean()
    assert placement.balance(weight).mean() / node_balance == pytest.approx(total / of_nodes, rel=0.01)


def test_eplb_is_never_worse_than_contiguous_on_its_own_traffic():
    weight = loads("zipf", 12, layers=8)
    for mode in ("global", "hierarchical"):
        ours = place("eplb", weight, 32, 32, 4, 8, mode=mode).balance(weight)
        assert (ours <= place("contiguous", weight, 32, 32).balance(weight) + 1e-12).all()


# ---- the Placement itself


def test_tables_by_hand():
    placement = Placement(np.array([[0, 1, 0, 2], [2, 2, 1, 0]]), 3, 2, (0, 1))
    assert placement.slot_to_rank_S.tolist() == [0, 0, 1, 1]
    assert placement.replica_count_LE.tolist() == [[2, 1, 1], [1, 1, 2]]
    assert placement.expert_to_slots_LEX.tolist() == [[[0, 2], [1, -1], [3, -1]], [[3, -1], [2, -1], [0, 1]]]
    assert placement.replica_index_LS.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert placement.replicas_before_rank_LEG[0].tolist() == [[0, 1, 2], [0, 1, 1], [0, 0, 1]]
    assert placement.rank_load(np.arange(8).reshape(2, 4)).tolist() == [[1, 5], [9, 13]]
    assert placement.planned_load([[4.0, 1, 2], [3, 3, 8]]).tolist() == [[3, 4], [8, 6]]
    low, high = placement.node_range_G
    assert (low.tolist(), high.tolist()) == ([0, 1], [1, 2])


@pytest.mark.parametrize(
    ("table", "experts", "ranks", "nodes", "message"),
    [
        ([[0, 1, 2]], 3, 2, (), "multiple of the ranks"),
        ([[0, 1, 1, 0]], 3, 2, (), "expert 2 has none in layer 0"),
        ([[0, 1], [1, 1]], 2, 2, (), "expert 0 has none in layer 1"),
        ([[0, 3]], 3, 2, (), r"must lie in \[0, 3\)"),
        ([[0, -2]], 1, 2, (), r"must lie in \[0, 1\)"),
        ([[0.0, 1.0]], 2, 2, (), "integer array"),
        ([0, 1], 2, 2, (), "integer array"),
        ([[]], 1, 1, (), "positive multiple"),
        ([[0, 1]], 2, 2, (1, 0), "increasing order"),
        ([[0, 1]], 2, 2, (0,), "a node for each of 2 ranks"),
    ],
)
def test_what_is_no_placement_is_refused(table, experts, ranks, nodes, message):
    dtype = None if table != [[]] else int
    with pytest.raises(BadInput, match=message):
        Placement(np.array(table, dtype=dtype), experts, ranks, nodes)


def test_a_placement_cannot_be_changed():
    table = np.array([[0, 1]])
    placement = Placement(table, 2, 2)
    table[0, 0] = 1
    assert placement.slot_to_expert_LS.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="read-only"):
        placement.slot_to_expert_LS[0, 0] = 1


@pytest.mark.parametrize(("ranks", "nodes", "groups"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 3, 1)])
def test_a_context_has_ranks_nodes_and_groups(ranks, nodes, groups):
    with pytest.raises(BadInput, match=r"at least 1|every node needs a rank"):
        PlacementContext(ranks, nodes, groups)


def test_empty_slots_hold_nothing_and_serve_nobody():
    table = np.array([[0, 2, EMPTY, 1, 2, 0], [1, EMPTY, 0, 2, 2, EMPTY]])
    placement = Placement(table, 3, 2)
    assert placement.replica_count_LE.tolist() == [[2, 1, 2], [1, 1, 2]]
    assert placement.expert_to_slots_LEX.tolist() == [[[0, 5], [3, -1], [1, 4]], [[2, -1], [0, -1], [3, 4]]]
    assert placement.planned_load([[4.0, 1, 2], [4.0, 1, 2]]).tolist() == [[3, 4], [5, 2]]
    assert placement.replicas_before_rank_LEG.tolist()[1] == [[0, 1, 1], [0, 1, 1], [0, 0, 2]]
    count = np.array([[5, 1, 2], [5, 1, 3]])
    assert split(count, placement).tolist() == [[3, 1, 0, 1, 1, 2], [1, 0, 5, 2, 1, 0]]
    assert split(count, placement, "first").tolist() == [[5, 2, 0, 1, 0, 0], [1, 0, 5, 3, 0, 0]]
    assert split_local(np.stack([count, count]), placement).tolist() == [
        [[5, 2, 0, 1, 0, 0], [1, 0, 5, 2, 1, 0]],
        [[0, 0, 0, 1, 2, 5], [1, 0, 5, 1, 2, 0]],
    ]
