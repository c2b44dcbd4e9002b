"""Programs that overlap exchange and compute: closed forms against operations played on streams, and their bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import NonlinearConstraint, differential_evolution

from moesim.overlap.fsmoe import Chunk, Coefficients, fsmoe_case, fsmoe_gap, fsmoe_ns, fsmoe_paper_ns, fsmoe_program
from moesim.overlap.gradients import Slot, partition, plan_cost
from moesim.overlap.pipeline import pipeline_ns, pipeline_program
from moesim.overlap.timeline import Op, bounds, play
from moesim.overlap.two_batch import Halves, Order, two_batch_ns, two_batch_program

ORDERS: tuple[Order, ...] = ("aligned", "shifted")
START = 0.3


def best_order(program: list[Op]) -> int:
    """The least makespan of any order of a small program: every order of issue that respects what waits for what."""
    least = int(play(program).makespan)
    for order in itertools.permutations(program):
        done: set[str] = set()
        for op in order:
            if not done.issuperset(op.after):
                break
            done.add(op.name)
        else:
            least = min(least, int(play(order).makespan))
    return least


# ---- the reference itself


def test_streams_run_beside_each_other_and_in_order() -> None:
    program = [
        Op("a", "x", 3),
        Op("b", "x", 2),
        Op("c", "y", 4, ("a",)),
        Op("d", "x", 1, ("c",)),
        Op("e", "y", 5, ("b",)),
    ]
    found = play(program)
    assert {name: int(end) for name, end in found.end.items()} == {"a": 3, "b": 5, "c": 7, "d": 8, "e": 12}
    assert int(found.makespan) == 12
    assert [int(x) for x in bounds(program)] == [9, 8]  # y is busy for 9; the longest chain is a, c, d


def test_what_waits_for_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' waits for 'b'"):
        play([Op("a", "x", 1, ("b",)), Op("b", "x", 1)])
    with pytest.raises(ValueError, match="'a' is issued twice"):
        play([Op("a", "x", 1), Op("a", "x", 1)])


# ---- chunks


def test_closed_pipeline_equals_the_program() -> None:
    d, e, c = np.random.default_rng(0).integers(0, 60, (3, 2000))
    for degree in range(1, 17):
        program = pipeline_program(degree, d, e, c)
        ns = pipeline_ns(degree, d, e, c)
        np.testing.assert_array_equal(play(program).makespan, ns)
        assert (ns >= np.maximum(*bounds(program))).all()
        assert (ns <= degree * (d + e + c)).all()
    np.testing.assert_array_equal(pipeline_ns(1, d, e, c), d + e + c)


@pytest.mark.parametrize("times", [(3, 7, 4), (5, 2, 6), (4, 4, 4), (1, 9, 3), (8, 1, 1)])
def test_no_order_of_two_chunks_is_faster(times: tuple[int, int, int]) -> None:
    """PipeMoE's order, all dispatches before all combines, is the best for equal chunks."""
    program = pipeline_program(2, *times)
    assert best_order(program) == int(play(program).makespan)


# ---- two micro-batches


def draw_halves(layers: int, number: int, seed: int) -> Halves:
    rng = np.random.default_rng(seed)
    own = rng.integers(0, 80, (layers + 1, 2, number))
    return Halves(list(own), *(list(x) for x in rng.integers(0, 60, (3, layers, 2, number))))


@pytest.mark.parametrize("order", ORDERS)
def test_layer_by_layer_equals_the_program(order: Order) -> None:
    for layers in range(5):
        halves = draw_halves(layers, 300, layers)
        program = two_batch_program(halves, order)
        ns = two_batch_ns(halves, order)
        np.testing.assert_array_equal(play(program).makespan, ns)
        total = sum(op.ns for op in program)
        assert (ns >= np.maximum(*bounds(program))).all()
        assert (ns <= total).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_free_exchange_leaves_compute_and_free_compute_the_exchange(order: Order) -> None:
    halves = draw_halves(6, 50, 1)
    nothing = [np.zeros_like(x) for x in halves.experts]
    compute = sum(x.sum(axis=0) for x in (*halves.own, *halves.experts))
    np.testing.assert_array_equal(two_batch_ns(halves._replace(dispatch=nothing, combine=nothing), order), compute)
    idle = halves._replace(own=[np.zeros_like(x) for x in halves.own], experts=nothing)
    exchange = sum(x.sum(axis=0) for x in (*halves.dispatch, *halves.combine))
    np.testing.assert_array_equal(two_batch_ns(idle, order), exchange)


def test_equal_halves_hide_what_fits() -> None:
    """Worked by hand: own 10, dispatch 4, experts 6, combine 4, one layer. Aligned: own A to 10, own B to 20, experts A
    to 26 (its dispatch ended at 14), experts B to 32 (24), combine A to 30, B to 36; last parts A to 42, B to 52."""
    own = [np.full((2, 1), 10)] * 2
    halves = Halves(own, [np.full((2, 1), 4)], [np.full((2, 1), 6)], [np.full((2, 1), 4)])
    assert two_batch_ns(halves, "aligned").tolist() == [52]


# ---- FSMoE

_time = st.integers(0, 1000).map(float)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), _time, _time, _time, _time, _time)
def test_fsmoe_program_keeps_its_bounds(r: int, a2a: float, ag: float, rs: float, experts: float, gar: float) -> None:
    ns = fsmoe_ns(r, a2a, ag, rs, experts, gar)
    assert ns >= max(*(float(x) for x in bounds(fsmoe_program(r, a2a, ag, rs, experts, gar))))
    if r == 1 and not gar:
        assert ns == 2 * a2a + ag + rs + experts


@pytest.mark.parametrize("gradients", [False, True])
def test_the_paper_s_forms_are_the_program_or_below_it(gradients: bool) -> None:
    """In more than nine of ten draws both agree; else the paper's form has left something out."""
    rng = np.random.default_rng(3)
    cases = []
    for degree in range(1, 9):
        ag = rng.uniform(0, 10, 4000)
        chunk = Chunk(rng.uniform(0, 10, 4000), ag, ag * rng.uniform(0.8, 1.2, 4000), rng.uniform(0, 20, 4000))
        gar = rng.uniform(0, 60, 4000) if gradients else 0.0
        short = fsmoe_ns(degree, *chunk, gar) - fsmoe_paper_ns(degree, chunk, gar)
        assert short.min() > -1e-9
        assert (short < 1e-9).mean() > 0.9
        cases += np.unique(fsmoe_case(degree, chunk, gar)).tolist()
    assert set(cases) == ({1, 2, 3, 4} if gradients else {2, 3, 4})


def test_what_hides_in_a_layer_is_free_and_no_more() -> None:
    rng = np.random.default_rng(4)
    chunk = Chunk(*rng.uniform(1, 10, (4, 2000)))
    for degree in (1, 2, 3, 5, 8):
        alone, gap = fsmoe_paper_ns(degree, chunk), fsmoe_gap(degree, chunk)
        np.testing.assert_allclose(fsmoe_paper_ns(degree, chunk, gap * 0.999), alone)
        np.testing.assert_allclose(fsmoe_paper_ns(degree, chunk, gap + 1.0), alone + 1.0)


def test_coefficients_halve_sizes_and_keep_starts() -> None:
    costs = Coefficients((1.0, 8.0), (0.5, 2.0), (0.25, 4.0), (2.0, 16.0))
    assert [float(x) for x in costs.chunk(4)] == [3.0, 1.0, 1.25, 6.0]
    assert [float(x) for x in costs.backward().chunk(4)] == [3.0, 1.0, 1.25, 12.0]


# ---- gradients


def draw_slots(rng: np.random.Generator, number: int, options: int) -> list[Slot]:
    out = []
    for _ in range(number):
        floor = rng.uniform(1, 5, options)
        out.append(Slot(floor + rng.uniform(0, 5, options), floor, float(rng.uniform(0, 6))))
    return out


@pytest.mark.filterwarnings("ignore:delta_grad")
def test_exact_partition_is_no_worse_than_differential_evolution() -> None:
    """The paper spreads what is left by differential evolution; the same objective, amounts and options."""
    rng = np.random.default_rng(5)
    for case in range(3):
        slots = draw_slots(rng, 4, 3)
        plan = partition(slots, START)
        assert plan.total == pytest.approx(plan_cost(slots, START, plan.hidden_N))
        ready = np.cumsum([slot.ready for slot in slots])
        found = differential_evolution(
            lambda x, slots=slots: min(plan_cost(slots, START, x), 1e6),
            [(0, float(y)) for y in ready],
            constraints=NonlinearConstraint(lambda x, ready=ready: ready - np.cumsum(x), 0, np.inf),
            seed=case,
            maxiter=60,
        )
        assert plan.total <= found.fun + 1e-6


def test_exact_partition_equals_all_amounts_of_a_grid() -> None:
    """Whole numbers only: some best plan then hides whole amounts, so a grid finds it."""
    rng = np.random.default_rng(6)
    for _ in range(40):
        slots = []
        for _ in range(3):
            floor = rng.integers(1, 4, 2).astype(float)
            slots.append(Slot(floor + rng.integers(0, 4, 2), floor, float(rng.integers(0, 4))))
        amounts = itertools.product(range(4), range(7), range(10))
        least = min(plan_cost(slots, 1.0, np.array(x, float)) for x in amounts)
        assert partition(slots, 1.0).total == pytest.approx(least)


def test_gradients_that_fit_are_free() -> None:
    slots = [Slot(np.array([10.0]), np.array([4.0]), 2.0), Slot(np.array([10.0]), np.array([4.0]), 3.0)]
    plan = partition(slots, 1.0)
    assert (plan.total, plan.rest, plan.hidden_N.tolist()) == (20.0, 0.0, [2.0, 3.0])
