"""Who runs next: rounds over all, minimum first, long cases sharing what is left. Time is counted, not measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moesim_kernels.bench.schedule import Schedule, fair_level


def play(schedule: Schedule, cost: dict[str, float]) -> tuple[list[list[str]], float]:
    """(the cases of each round, seconds used): rounds until the schedule has no more, each sample costing `cost`."""
    spent, rounds = 0.0, []
    while True:
        order, part_s = schedule.round(list(cost), schedule.budget_s - spent)
        if not order:
            return rounds, spent
        until, ran = spent + part_s, []
        for key in order:
            if spent >= until:
                break
            spent += cost[key]
            schedule.record(key, cost[key])
            ran.append(key)
        rounds.append(ran)


def make(cost: dict[str, float], budget_s: float, roles: dict[str, str] | None = None, **more: int) -> Schedule:
    given_roles = roles or dict.fromkeys(cost, "grid")
    options = {"target": 30, "minimum": 5, "seed": 1} | more
    return Schedule(given_roles, cost, {}, budget_s, **options)


def test_every_round_runs_every_case_once_in_another_order():
    cost = {f"c{i}": 0.01 for i in range(12)}
    rounds, _ = play(make(cost, 1e6), cost)
    assert len(rounds) == 30
    assert all(sorted(ran) == sorted(cost) for ran in rounds)
    assert len({tuple(ran) for ran in rounds[1:]}) == 29


def test_the_same_seed_gives_the_same_order():
    cost = {f"c{i}": 0.01 for i in range(12)}
    assert play(make(cost, 1e6, seed=3), cost) == play(make(cost, 1e6, seed=3), cost)
    assert play(make(cost, 1e6, seed=3), cost) != play(make(cost, 1e6, seed=4), cost)


def test_long_case_starves_nobody_and_is_not_starved():
    cost = {"long": 2.0, "long too": 1.0} | {f"c{i}": 0.01 for i in range(50)}
    schedule = make(cost, 60.0)
    _, spent = play(schedule, cost)
    short = [schedule.samples[f"c{i}"] for i in range(50)]
    assert short == [30] * 50
    assert schedule.samples["long"] >= 5
    assert schedule.samples["long too"] > schedule.samples["long"]
    assert 50 < spent <= 60 + 2


def test_long_cases_are_spread_over_the_rounds():
    cost = {"long": 1.0} | {f"c{i}": 0.1 for i in range(5)}
    rounds, _ = play(make(cost, 30.0), cost)
    at = [i for i, ran in enumerate(rounds) if "long" in ran]
    assert at[:5] == [0, 1, 2, 3, 4]
    later = at[5:]
    assert len(later) >= 5
    assert max(later) > 0.7 * len(rounds)


def test_when_time_is_short_ceilings_come_before_grid_before_heldout():
    cost = {"ceiling": 1.0, "grid": 1.0, "heldout": 1.0}
    schedule = make(cost, 8.0, {key: key for key in cost})
    play(schedule, cost)
    assert schedule.samples["ceiling"] >= 5
    assert schedule.short() == ["grid", "heldout"]
    assert schedule.samples["grid"] >= schedule.samples["heldout"]


def test_when_time_is_short_cheap_cases_of_a_role_come_first():
    cost = {"dear": 3.0, "cheap": 0.1, "mean": 0.5}
    schedule = make(cost, 10.0)
    play(schedule, cost)
    assert schedule.short() == ["dear"]


def test_refused_case_is_not_asked_for_again_and_counts_as_short():
    cost = {"a": 0.1, "b": 0.1}
    schedule = make(cost, 100.0)
    schedule.refuse("a")
    rounds, _ = play(schedule, cost)
    assert all(ran == ["b"] for ran in rounds)
    assert (schedule.short(), schedule.unfinished()) == (["a"], [])


def test_a_resumed_run_takes_only_what_is_missing():
    schedule = Schedule({"a": "grid", "b": "grid"}, {}, {"a": 28, "b": 40}, 100.0, 30, 5, 0)
    rounds, _ = play(schedule, {"a": 0.1, "b": 0.1})
    assert rounds == [["a"], ["a"]]


def test_minimum_above_the_target_is_refused():
    with pytest.raises(ValueError, match="minimum=9, target=5"):
        make({"a": 1.0}, 1.0, target=5, minimum=9)


@given(
    st.dictionaries(st.integers(0, 40).map(str), st.floats(1e-3, 5.0), min_size=1, max_size=40),
    st.floats(0.1, 300.0),
    st.integers(0, 5),
)
def test_budget_is_used_and_kept(cost: dict[str, float], budget_s: float, seed: int):
    schedule = make(cost, budget_s, seed=seed)
    rounds, spent = play(schedule, cost)
    assert sum(map(len, rounds)) == sum(schedule.samples.values())
    assert max(schedule.samples.values()) <= 30
    assert spent <= budget_s + max(cost.values())  # only the sample at hand ends late
    if schedule.unfinished():  # ends early only when no sample fits any more
        assert budget_s - spent < min(cost[key] for key in schedule.unfinished())


@given(st.lists(st.floats(0.0, 100.0), max_size=20), st.floats(0.0, 1000.0))
def test_fair_level_spends_the_total(need: list[float], total: float):
    level = fair_level(need, total)
    spent = sum(min(x, level) for x in need)
    assert spent == pytest.approx(min(total, sum(need)), abs=1e-6)
    assert level >= 0
    if level < math.inf:
        assert max(need) > level
