"""Bit widths and resident experts that the tuner proves, against brute force, dynamic programming and scipy."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from moesim_tuner import solving
from moesim_tuner.knapsack import Choices, choose, greedy, prices
from moesim_tuner.offload import cuts, resident
from moesim_tuner.offload.layer_times import active_LSE, layer_ns, ns_AM
from moesim_tuner.offload.split_ilp import Policy as Split
from moesim_tuner.precision.bits_ilp import Policy as Bits
from scipy.optimize import linprog

from moesim.errors import BadInput
from moesim.offload import CacheSemantics, MissCosts, OffloadContext, RouteSample
from moesim.offload.compression import check, stored_bytes_LE
from moesim.offload.drive import LayerWork, Work
from moesim.offload.expert_split import Policy as ExpertSplit
from moesim.offload.precision.allocation import allocate
from moesim.offload.precision.edgemoe import lower
from moesim.offload.shares import shortest_layer
from moesim.simulate import simulate
from moesim.terminal import summary
from moesim.tiers import LinkRates
from moesim.tiers.device import DeviceOptions, SimDevice
from moesim.tiers.links import Links
from tests.build import scenario, tiny_model

# ---- the way a solver is asked


def test_a_solver_is_asked_for_a_gap_alone():
    def never():
        raise AssertionError("asked")

    answer, part = solving.close_gap("x", "greedy", 10.0, 10.0, 0.0, never)
    assert (answer, part.status, part.units) == ("greedy", "optimal", 0.0)
    answer, part = solving.close_gap("x", "greedy", 10.0, 9.5, 0.06, never)
    assert (answer, part.status, part.gap) == ("greedy", "feasible", pytest.approx(0.05))
    _, part = solving.close_gap("x", "greedy", 10.0, 9.5, 0.01, lambda: None)
    assert (part.status, part.bound) == ("too_large", 9.5)


def test_the_better_answer_and_the_tighter_bound_count():
    better = solving.Better("solver", 9.0, 8.0, 0.3)
    answer, part = solving.close_gap("x", "greedy", 10.0, 8.5, 0.0, lambda: better)
    assert (answer, part.objective, part.bound, part.status, part.units) == ("solver", 9.0, 8.5, "feasible", 0.3)
    worse = solving.Better("solver", 11.0, 10.0, 0.3)
    answer, part = solving.close_gap("x", "greedy", 10.0, 8.5, 0.0, lambda: worse)
    assert (answer, part.objective, part.status) == ("greedy", 10.0, "optimal")
    nothing = solving.Better(None, None, -np.inf, 0.3)
    answer, part = solving.close_gap("x", "greedy", 10.0, 8.5, 0.0, lambda: nothing)
    assert (answer, part.bound, part.status) == ("greedy", 8.5, "feasible")


# ---- the multiple-choice knapsack


def drawn(rng: np.random.Generator, items: int, options: int, groups: int) -> Choices:
    """Costs that fall with sizes or do not, options that are none, limits that may be tight or contradict."""
    cost, size = rng.random((items, options)) * 10, rng.integers(0, 12, (items, options))
    if rng.random() < 0.5:
        cost, size = -np.sort(-cost, axis=1), np.sort(size, axis=1)
    if rng.random() < 0.3:
        cost[:, 1:][rng.random((items, options - 1)) < 0.2] = np.inf
    budget = int(rng.integers(size.min(axis=1).sum(), size.max(axis=1).sum() + 2))
    if not groups:
        return Choices(cost, size.astype(np.int64), budget)
    group = rng.integers(0, groups, items)
    number = int(group.max()) + 1
    least = rng.integers(0, 6 * items // groups + 1, number)
    return Choices(cost, size.astype(np.int64), budget, group, least, least + rng.integers(0, 20, number))


def brute(choices: Choices) -> float:
    """The least cost over all choices; inf where none keeps the limits."""
    best = np.inf
    for option in itertools.product(range(choices.cost_NB.shape[1]), repeat=len(choices.cost_NB)):
        found = np.array(option)
        if choices.keeps(found):
            best = min(best, choices.cost(found))
    return best


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_a_choice_is_the_optimum_of_all_choices(groups):
    rng = np.random.default_rng(groups)
    asked = without = 0
    for _ in range(40):
        choices = drawn(rng, int(rng.integers(1, 6)), int(rng.integers(2, 5)), groups)
        optimum = brute(choices)
        option, part = choose(choices, "x", 0.0, 5.0)
        if option is None:
            assert optimum == np.inf
            without += 1
            continue
        assert choices.keeps(option)
        assert choices.cost(option) == part.objective == pytest.approx(optimum, abs=1e-9)
        assert part.status == "optimal"
        first = greedy(choices)
        assert first is None or (choices.keeps(first) and choices.cost(first) >= optimum - 1e-9)
        assert prices(choices)[1] <= optimum + 1e-9
        asked += part.units > 0
    assert asked >= 10  # greedy alone does not do here
    assert without or not groups


def by_linprog(choices: Choices) -> float | None:
    """The optimum of the linear relaxation, by scipy; None where there is none."""
    items, options = choices.cost_NB.shape
    one = np.kron(np.eye(items), np.ones(options))
    size = choices.size_NB.reshape(-1).astype(float)
    group_N, least_G, most_G = choices.groups()
    rows, limits = [size], [choices.budget]
    for group in range(len(least_G)):
        mine = size * np.repeat(group_N == group, options)
        rows += [mine, -mine]
        limits += [most_G[group], -least_G[group]]
    bounds = [(0, 1) if np.isfinite(c) else (0, 0) for c in choices.cost_NB.reshape(-1)]
    cost = np.where(np.isfinite(choices.cost_NB), choices.cost_NB, 0.0).reshape(-1)
    answer = linprog(cost, np.array(rows), np.array(limits), one, np.ones(items), bounds=bounds)
    return float(answer.fun) if answer.success else None


@pytest.mark.parametrize("groups", [0, 3])
def test_the_bound_is_the_optimum_with_fractions(groups):
    rng = np.random.default_rng(10 + groups)
    compared = 0
    for _ in range(80):
        choices = drawn(rng, 10, 4, groups)
        relaxed = by_linprog(choices)
        if relaxed is None:
            continue
        bound = prices(choices)[1]
        assert bound <= relaxed + 1e-7
        if not groups or (choices.cost_NB[np.isfinite(choices.cost_NB)].min() >= 0 and _falls(choices)):
            assert bound == pytest.approx(relaxed, abs=1e-7)
            compared += 1
    assert compared >= 10


def _falls(choices: Choices) -> bool:
    """A larger option never costs more, so that a least size is reached by steps that save."""
    real = np.isfinite(choices.cost_NB).all()
    return bool(
        real and (np.diff(choices.cost_NB, axis=1) <= 0).all() and (np.diff(choices.size_NB, axis=1) >= 0).all()
    )


def by_table(cost_NB: np.ndarray, size_B: np.ndarray, budget: int) -> float:
    """Dynamic programming over (items so far, size spent)."""
    best = np.zeros(budget + 1)
    for cost_B in cost_NB:
        new = np.full(budget + 1, np.inf)
        for cost, size in zip(cost_B, size_B.tolist(), strict=True):
            if size <= budget:
                new[size:] = np.minimum(new[size:], best[: budget + 1 - size] + cost)
        best = new
    return float(best.min())


@pytest.mark.parametrize("average", [2.3, 3.1, 5.0])
def test_hundreds_of_items_against_a_table(average):
    rng = np.random.default_rng(int(average * 10))
    width = np.array([2, 3, 4, 8, 16])
    cost = rng.lognormal(0, 1.5, (300, 1)) * 4.0**-width * rng.lognormal(0, 0.2, (300, 5))
    budget = int(average * 300)
    optimum = by_table(cost, width, budget)
    choices = Choices(cost, np.tile(width, (300, 1)), budget)
    option, part = choose(choices, "x", 0.0, 5.0)
    assert choices.size(option) <= budget
    assert part.objective >= optimum - 1e-12
    assert part.bound <= optimum + 1e-12
    assert part.objective == pytest.approx(optimum, rel=1e-9)
    assert part.status == "optimal"
    # greedy lacks one step at most: Sinha and Zoltners 1979
    saved = (cost[:, :-1] - cost[:, 1:]).max()
    assert choices.cost(greedy(choices)) - prices(choices)[1] <= saved + 1e-12


def test_what_is_left_of_a_unit_is_no_room():
    """Experts of one size whose widths are whole bits: greedy steps are optimal, and the bound says so unasked."""
    rng = np.random.default_rng(0)
    cost = rng.lognormal(0, 1, (50, 1)) * 4.0 ** -np.arange(1.0, 4.0)
    group = np.arange(50) % 2
    for more in (0, 1, 999):
        size = np.tile(1000 * np.arange(1, 4) + 7, (50, 1))
        choices = Choices(cost, size, 50 * 7 + 91_000 + more)
        _, part = choose(choices, "x", 0.0, 1.0)
        assert (part.status, part.units) == ("optimal", 0.0)
        assert part.objective == pytest.approx(by_table(cost, np.arange(1, 4), 91), rel=1e-9)
        limits = np.array([36_000, 50_000]) + 25 * 7 + more, np.array([42_000, 60_000]) + 25 * 7 + more
        option, part = choose(replace(choices, group_N=group, least_G=limits[0], most_G=limits[1]), "x", 0.0, 1.0)
        assert part.status == "optimal"
        used_G = np.bincount(group, weights=size[np.arange(50), option], minlength=2)
        assert (limits[0] <= used_G).all()
        assert (used_G <= limits[1]).all()


# ---- bit widths

L, E = 3, 12


def context(seed=0, layers=L, experts=E, top_k=3, tokens=200, capacity=None, running=1, **costs):
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(tokens, layers, experts)) + rng.normal(0, 1.2, (layers, experts))
    ids = np.argsort(-score, axis=2)[:, :, :top_k]
    weight = np.sort(rng.dirichlet(np.ones(top_k), (tokens, layers)))[:, :, ::-1]
    sample = RouteSample(ids, np.arange(tokens) // 20, weight)
    size = np.full((layers, experts), 1600, np.int64)
    given = {"transfer_ns": 690.0, "sync_ns": 40.0, "cpu": 290.0, "gpu": 20.0, **costs}
    miss = MissCosts(
        given["transfer_ns"], lambda rows: given["gpu"], lambda rows: given["cpu"], given["sync_ns"], 200.0,
        lambda rows: 10.0 + given["gpu"] * len(rows), running,
    )  # fmt: skip
    return OffloadContext(
        layers, experts, top_k, size, int(size.sum() // 3) if capacity is None else capacity, 2,
        sample.count_LE(experts), CacheSemantics(), miss, seed, fit=sample,
    )  # fmt: skip


def loss(bits: Bits, ctx: OffloadContext, width_LE: np.ndarray) -> float:
    """The policy's objective for whole widths without scales."""
    f = ctx.popularity_LE / ctx.popularity_LE.sum(axis=1, keepdims=True)
    w = np.zeros(f.shape)
    for layer, expert in np.ndindex(f.shape):
        took = ctx.fit.expert_TLK[:, layer] == expert
        w[layer, expert] = ctx.fit.weight_TLK[:, layer][took].mean() if took.any() else 0.0
    w /= w.sum(axis=1, keepdims=True)
    return float((f**bits.alpha * w**bits.beta * 4.0**-width_LE).sum())


def test_one_layer_is_mc_moes_programme_without_its_rule_of_one_of_each():
    ctx = context(layers=1)
    bits = Bits(widths=(1.0, 2.0, 3.0), average=2.25, group=None, tolerance=0.0)
    found, part = bits.solve(ctx, 16.0)
    f, w = (x[0] for x in (ctx.popularity_LE, np.zeros((1, E))))
    f = f / f.sum()
    w = np.array([ctx.fit.weight_TLK[:, 0][ctx.fit.expert_TLK[:, 0] == e].mean() for e in range(E)])
    w = w / w.sum()
    cost = (f * w**1.5)[:, None] * 4.0 ** -np.array([1.0, 2.0, 3.0])
    exact = allocate(cost, (1, 2, 3), int(2.25 * E))
    assert found.sum() <= 2.25 * E + 1e-9
    assert part.status == "optimal"
    assert part.objective == pytest.approx(float(cost[np.arange(E), exact - 1].sum()), rel=1e-9)
    assert part.objective == pytest.approx(loss(bits, ctx, found), rel=1e-12)


def test_one_budget_for_all_layers_is_no_worse_than_one_for_each():
    ctx = context(3)
    one = Bits(widths=(1.0, 2.0, 3.0), average=2.0, group=None, tolerance=0.0).solve(ctx, 16.0)[1]
    each = Bits(widths=(1.0, 2.0, 3.0), average=2.0, layer_most=2.0, group=None, tolerance=0.0).solve(ctx, 16.0)
    own = [
        Bits(widths=(1.0, 2.0, 3.0), average=2.0, group=None, tolerance=0.0).solve(_layer(ctx, layer), 16.0)[1]
        for layer in range(L)
    ]
    assert one.status == each[1].status == "optimal"
    assert one.objective < each[1].objective
    assert each[1].objective == pytest.approx(sum(part.objective for part in own), rel=1e-9)
    assert (each[0].mean(axis=1) <= 2.0).all()


def _layer(ctx: OffloadContext, layer: int) -> OffloadContext:
    at = slice(layer, layer + 1)
    fit = RouteSample(ctx.fit.expert_TLK[:, at], ctx.fit.sequence_T, ctx.fit.weight_TLK[:, at])
    return replace(
        ctx, num_layers=1, size_LE=ctx.size_LE[at], popularity_LE=ctx.popularity_LE[at], fit=fit
    )  # fmt: skip


def test_never_worse_than_lowering_step_by_step_at_the_same_bytes():
    """EdgeMoE's search has the same objective where gate weights do not count."""
    for seed in range(5):
        ctx = context(seed)
        widths = np.array([8.0, 4.0, 2.0])
        theirs = lower(ctx.popularity_LE, ctx.size_LE, widths, 3.7)
        bits = Bits(widths=(2.0, 4.0, 8.0), average=float(theirs.mean()), beta=0.0, group=None, tolerance=0.0)
        found, part = bits.solve(ctx, 16.0)
        assert found.mean() <= theirs.mean() + 1e-9
        assert part.objective <= loss(bits, ctx, theirs) * (1 + 1e-9)


def test_limits_of_layers_hold_to_the_byte():
    ctx = context(4)
    policy = Bits(average=3.5, layer_least=(3.4, 2.0, 3.0), layer_most=3.75, tolerance=0.0)
    made = policy.compress(ctx, 16.0)
    check(ctx, made)
    size_L = stored_bytes_LE(ctx, made, 16.0).sum(axis=1)
    own_L = ctx.size_LE.sum(axis=1)
    assert (size_L >= np.array([3.4, 2.0, 3.0]) / 16 * own_L - 1).all()
    assert (size_L <= 3.75 / 16 * own_L + E).all()
    assert size_L.sum() <= 3.5 / 16 * own_L.sum() + ctx.size_LE.size
    assert made.proof is not None
    assert made.proof.status == "optimal"
    assert made.proof.objective >= Bits(average=3.5, tolerance=0.0).compress(ctx, 16.0).proof.objective


def test_bytes_may_be_named_instead_and_the_models_own_width_is_kept():
    ctx = context(5)
    gib = float(ctx.size_LE.sum() * 0.6 / 2**30)
    found, _ = Bits(widths=(2.0, 16.0), gib=gib).solve(ctx, 16.0)
    assert set(np.unique(found)) == {2.25, 16.0}
    assert stored_bytes_LE(ctx, Bits(widths=(2.0, 16.0), gib=gib).compress(ctx, 16.0), 16.0).sum() <= gib * 2**30
    # the experts that keep their width are those that matter most
    f, mean = ctx.popularity_LE, Bits(widths=(2.0, 16.0), gib=gib)
    assert loss(mean, ctx, found) < loss(mean, ctx, np.where(f >= np.sort(f.ravel())[E], 2.25, 16.0))


def test_errors_that_are_given_decide():
    ctx = context(6, layers=1, experts=4, top_k=1)
    table = [[0.0, 0.0, 9.0, 0.0, 1.0, 0.0, 1.0, 0.0]]  # errors at 2 and 8 bits of four experts
    policy = Bits(widths=(2.0, 8.0), error=table, alpha=0.0, beta=0.0, average=3.5, group=None, tolerance=0.0)
    assert policy.solve(ctx, 16.0)[0].tolist() == [[2.0, 8.0, 2.0, 2.0]]
    flat = Bits(widths=(2.0, 8.0), error_by_width=(5.0, 5.0), average=6.0, group=None)
    assert flat.solve(ctx, 16.0)[0].tolist() == [[2.0] * 4]  # bits that mend nothing are not bought


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"average": 1.0}, r"1\.83 bits a weight, scales included"),
        ({"gib": 1e-7}, "the least of the widths"),
        ({"widths": (16.0,)}, "below the model's own 16 bits"),
        ({"layer_most": 1.0}, "layer 0 can have 1.83 bits"),
        ({"average": 5.0, "layer_least": 4.0, "layer_most": 3.0}, "exchange or widen"),
        ({"layer_least": (1.0, 2.0)}, "one for each of the 3 MoE layers"),
        ({"average": 2.5, "layer_least": 3.0}, "no widths were found"),
        ({"error": [[1.0]] * L}, "60 numbers"),
    ],
)
def test_bits_that_cannot_be_are_refused_with_their_mend(value, why):
    with pytest.raises(BadInput, match=why):
        Bits(**value).compress(context(), 16.0)


# ---- times of a layer


class Times:
    """gpu 10 and 20 an expert, CPU 290 an expert, sync 40."""

    def begin(self, tokens): ...

    def own_ns(self, layer):
        return 0

    def gpu_ns(self, layer, rows):
        return 10 + 20 * len(rows)

    def cpu_ns(self, layer, rows):
        return 290 * len(rows)

    def sync_ns(self, layer):
        return 40

    def join_ns(self, layer):
        return 0

    def end_ns(self):
        return 0


@pytest.mark.parametrize("transfer", [100, 333, 690])
def test_a_layer_takes_what_the_simulated_device_takes(transfer):
    """The device of `moesim.tiers`, with a buffer for each expert that travels."""
    costs = context(transfer_ns=float(transfer)).costs
    for active in range(1, 9):
        for missing in range(active + 1):
            on_cpu = shortest_layer(np.full(missing, 290.0), transfer, 40.0)
            keys = list(range(active))
            work = LayerWork(
                here=[Work(k, 1) for k in keys[missing:]],
                streams=[Work(k, 1, 100 * transfer) for k in keys[:missing] if not on_cpu[k]],
                cpu=[Work(k, 1) for k in keys[:missing] if on_cpu[k]],
            )
            links = Links(LinkRates(100.0, 1e6, 1.0))
            device = SimDevice(Times(), links, np.full(8, 100 * transfer), options=DeviceOptions(staging=8))
            device.experts(0, work)
            assert layer_ns(costs, active, missing, 1) == pytest.approx(device.now_ns, abs=2), (active, missing)


def test_steps_are_tokens_evenly_apart():
    sample = RouteSample(np.arange(12).reshape(12, 1, 1) % 6, np.zeros(12, np.int64))
    ctx = replace(context(layers=1, experts=6, top_k=1), fit=sample)
    one = active_LSE(sample, ctx, 1, 100)
    assert one.shape == (1, 12, 6)
    assert one[0].argmax(axis=1).tolist() == [0, 1, 2, 3, 4, 5] * 2
    two = active_LSE(sample, ctx, 3, 4)  # tokens 0, 3, 6, 9 start a step; its others are 4 and 8 rows further
    assert [np.flatnonzero(step).tolist() for step in two[0]] == [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5]]
    table = ns_AM(ctx.costs, two.sum(axis=2), 3)
    assert table[3, :4].tolist() == [layer_ns(ctx.costs, 3, missing, 1) for missing in range(4)]


# ---- who stays


def problem(seed=0, layers=2, experts=5, top_k=2, share=0.4, uneven=False, **costs) -> resident.Problem:
    ctx = context(seed, layers, experts, top_k, **costs)
    size = np.random.default_rng(seed).integers(500, 3000, (layers, experts)) if uneven else ctx.size_LE
    ctx = replace(ctx, size_LE=size, capacity_bytes=int(size.sum() * share))
    return Split().problem(ctx)


def least_ns(p: resident.Problem) -> float:
    """Over all sets of all layers together."""
    shape = p.size_LE.shape
    best = np.inf
    for bits in range(1 << p.size_LE.size):
        stays = ((bits >> np.arange(p.size_LE.size)) & 1).astype(bool).reshape(shape)
        if p.size_LE[stays].sum() <= p.capacity:
            best = min(best, resident.expected_ns(p, stays))
    return best


@pytest.mark.parametrize("costs", [{}, {"sync_ns": 600.0}, {"cpu": 60.0}])
@pytest.mark.parametrize("uneven", [False, True])
def test_few_experts_are_placed_as_well_as_can_be(costs, uneven):
    for seed in range(2):
        p = problem(seed, uneven=uneven, experts=4, **costs)
        found = resident.solve(p, 0.0, 5.0)
        assert p.size_LE[found.stays_LE].sum() <= p.capacity
        assert resident.expected_ns(p, found.stays_LE) == pytest.approx(found.part.objective, rel=1e-12)
        assert found.part.objective == pytest.approx(least_ns(p), rel=1e-9)
        assert found.part.status == "optimal"


@pytest.mark.parametrize("costs", [{}, {"sync_ns": 600.0}, {"cpu": 60.0}, {"gpu": 200.0}])
def test_the_bound_holds_for_any_set(monkeypatch, costs):
    monkeypatch.setattr(resident, "_EVERY_SET", 0)
    gaps = []
    for seed in range(3):
        p = problem(seed, uneven=seed == 2, experts=4, **costs)
        found, least = resident.solve(p, 0.0, 5.0), least_ns(p)
        assert p.size_LE[found.stays_LE].sum() <= p.capacity
        assert found.part.bound <= least * (1 + 1e-9)
        assert found.part.objective >= least * (1 - 1e-9)
        assert resident.expected_ns(p, found.stays_LE) == pytest.approx(found.part.objective, rel=1e-12)
        gaps.append(found.part.objective / least - 1)
    assert max(gaps) < 0.03


@pytest.mark.parametrize("price", [0.0, 0.05, 0.15, 0.4])
def test_a_cut_is_the_least_of_all_sets_at_a_price(price):
    """Times concave in the misses: by brute force over who is missing."""
    for seed in range(3):
        active = problem(seed, layers=1, experts=7, top_k=3).active_LSE[0]
        h = np.zeros((4, 4))
        h[3] = [100.0, 400.0, 520.0, 580.0]
        size = np.random.default_rng(seed).integers(500, 3000, 7)
        value, missing = cuts._least(cuts.layer_of(active, h, size), price)

        def cost(missing_E, active=active, h=h, size=size):
            return float(h[3, (active & missing_E).sum(axis=1)].mean()) - price * size[missing_E].sum()

        least = min(cost(np.array(some, bool)) for some in itertools.product((0, 1), repeat=7))
        assert value == pytest.approx(least, rel=1e-6)
        assert value <= least + 1e-9
        assert cost(missing) == pytest.approx(least, rel=1e-6)


def test_the_concave_function_below_is_one():
    rng = np.random.default_rng(0)
    for number in (1, 2, 3, 7, 20):
        ns, weight = np.sort(rng.random(number)) * 1e6, rng.random(number)
        h = cuts.concave_below(ns, weight)
        assert (h <= ns).all()
        assert (np.diff(h, n=2) <= 1e-6).all()
    straight = np.array([0.0, 3.0, 5.0, 6.0])
    np.testing.assert_allclose(cuts.concave_below(straight, np.ones(4)), straight, rtol=1e-9)  # concave: itself


def test_cuts_mend_the_bound_where_misses_share_the_hand_over():
    ctx = context(2, 4, 16, 4, sync_ns=300.0, gpu=20.0)
    p = Split().problem(ctx)
    found = resident.solve(p, 0.0, 1.0)
    relaxed = resident._envelope_bound(p, found.stays_LE)
    assert found.part.bound > relaxed * 1.03
    assert found.part.bound <= found.part.objective


def test_prefixes_cost_what_their_sets_cost():
    p = problem(1, layers=1, experts=9, top_k=3, running=3)
    sets, cost = resident._prefixes(p, 0)
    assert len(sets) == 30
    for stays, expected in zip(sets, cost, strict=True):
        assert resident.expected_ns(p, stays[None]) == pytest.approx(expected, rel=1e-12)


def test_no_worse_than_the_split_by_popularity_on_what_it_learned_from():
    for seed, running in ((0, 1), (1, 4)):
        ctx = context(seed, 4, 16, 4, running=running)
        p = Split().problem(ctx)
        found, theirs = Split().solve(ctx), ExpertSplit(share="entropy").plan(ctx).fixed_LE
        popular = ExpertSplit().plan(ctx).fixed_LE
        assert found.part.objective <= min(resident.expected_ns(p, theirs), resident.expected_ns(p, popular)) * 1.001
        assert found.part.bound <= found.part.objective


def test_where_misses_come_together_matters():
    """Experts 0 to 2 come together with one another, and so do 3 to 5; all are equally popular. The first misses of a
    step cost a hand-over that outweighs all else, so a whole triple stays, not the first experts of both."""
    sample = RouteSample(np.array([[[0, 1, 2]], [[3, 4, 5]]] * 10), np.zeros(20, np.int64))
    ctx = context(layers=1, experts=6, top_k=3, sync_ns=5000.0, transfer_ns=1e5, cpu=10.0)
    ctx = replace(ctx, fit=sample, popularity_LE=sample.count_LE(6), capacity_bytes=3 * 1600)
    for every in (8, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resident, "_EVERY_SET", every)
            fixed = Split().plan(ctx).fixed_LE[0]
        assert np.flatnonzero(fixed).tolist() in ([0, 1, 2], [3, 4, 5])


def test_without_a_sample_the_popular_stay_and_nothing_is_claimed():
    ctx = replace(context(), fit=None)
    plan = Split().plan(ctx)
    assert plan.proof is None
    assert plan.fixed_LE.sum() == ctx.capacity_bytes // 1600
    assert ctx.popularity_LE[plan.fixed_LE].min() >= ctx.popularity_LE[~plan.fixed_LE].max()


# ---- where users see it


def test_a_run_shows_what_is_proven(tmp_path):
    """In the result, and on screen; no entry point is needed for a policy that is given as one."""
    parts = {
        "model": tiny_model(tmp_path),
        "requests": {"format": "closed_loop", "concurrency": 2, "num_requests": 4, "prompt_tokens": 8,
                     "output_tokens": 8},
        "tiers": {"experts": 0.005},
        "policies": {"offload": "expert_split", "precision": "uniform"},
    }  # fmt: skip
    plain = scenario(tmp_path, **parts)
    assert simulate(plain).to_json()["summary"]["cache"]["proof"] == {"offload": None, "precision": None}
    policies = replace(plain.policies, offload=Split(), precision=Bits(average=6.0))
    proven = replace(plain, policies=policies)
    report = simulate(proven).to_json()
    proof = report["summary"]["cache"]["proof"]
    for family, of in (("offload", "ns of a step's experts"), ("precision", "weighted error")):
        assert proof[family]["of"] == of
        assert 0 < proof[family]["bound"] <= proof[family]["objective"]
        assert proof[family]["gap"] == pytest.approx(1 - proof[family]["bound"] / proof[family]["objective"])
    text = io.StringIO()
    summary(report, proven, text, 200)
    assert f"gap {proof['offload']['gap']:.2%} ({proof['offload']['status'].replace('_', ' ')}" in text.getvalue()
    assert "weighted error" in text.getvalue()
    assert "found, of experts looked up" in text.getvalue()
