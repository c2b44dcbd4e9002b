"""Strategies against a world whose answers are known, and the model's mathematics against direct formulas."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from moesim_tuner.definition import Definition
from moesim_tuner.records import Candidate, Point, Trial, canonical
from moesim_tuner.search import Search, choose_sampler, strategy
from moesim_tuner.search.encoding import Encoding
from moesim_tuner.search.gaussian import Posterior, Scales, fit_scales
from moesim_tuner.search.listed import untried
from moesim_tuner.search.optuna_view import OptunaSampler
from moesim_tuner.search.surrogate import Surrogate
from moesim_tuner.search.told import final_values
from moesim_tuner.space import Space

from moesim.errors import BadInput
from moesim.tune_spec import RungSpec, TuneSpec

KNOBS: dict[str, Any] = {
    "layout": {"choices": ["a", "b", "c"]},
    "batch": {"log_range": [1, 64], "factor": 2},
    "depth": {"range": [0, 4], "when": {"layout": ["a", "b"]}},
    "cache": {"choices": [0, 1, 2]},
    "share": {"range": [0.0, 1.0]},
}
FINITE = {name: knob for name, knob in KNOBS.items() if name != "share"}


def definition(sampler: str, knobs: Any = KNOBS, objectives: int = 1, trials: int = 40, seed: int = 3) -> Definition:
    spec = TuneSpec.model_validate(
        {
            "space": knobs,
            "objectives": ["output_tok_per_s", "tpot_p99_ms"][:objectives],
            "constraints": {"ttft_p99_ms": {"max": 10}},
            "trials": trials,
            "batch": 4,
            "seed": seed,
            "sampler": sampler if sampler != "surrogate" else "auto",
        }
    )
    return Definition("", "world", ".", spec, sampler, (RungSpec(),))


def answer(number: int, candidate: Candidate, objectives: int) -> Trial:
    """More for layout b, batches of 16, depth 3; layout c with a cache of 2 is illegal, batches of 64 do not fit; a
    depth of 4 is too slow; a worker dies at batch 2, cache 0 and layout c."""
    p = candidate.point
    if p["layout"] == "c" and p["cache"] == 2:
        return Trial(number, p, candidate.origin, "illegal", (), {"legality": 1.0})
    if p["batch"] == 64:
        return Trial(number, p, candidate.origin, "infeasible", (), {"memory": 0.5})
    if (p["batch"], p["cache"], p["layout"]) == (2, 0, "c"):
        return Trial(number, p, candidate.origin, "failed", (), {}, (), ("died",))
    value = {"a": 0.0, "b": 5.0, "c": 3.0}[p["layout"]] - abs(math.log2(p["batch"]) - 4)
    value += p.get("depth", 0) * 0.5 + p["cache"] - 3 * abs(p.get("share", 0.5) - 0.3)
    slow = {"ttft_p99_ms": 0.3 if p.get("depth") == 4 else -0.2}
    values = (20 + value, 1.0 + p["batch"] / 8 + p["cache"])[:objectives]
    if number % 7 == 6:
        rungs: tuple[dict[str, float], ...] = ({"output_tok_per_s": values[0] / 2},)
        return Trial(number, p, candidate.origin, "pruned", (values[0] / 2, *values[1:]), slow, rungs)
    rungs = ({"output_tok_per_s": values[0] / 2}, {"output_tok_per_s": values[0]})
    return Trial(number, p, candidate.origin, "complete", values, slow, rungs)


STARTS = (
    Candidate({"layout": "a", "batch": 8, "depth": 0, "cache": 0, "share": 0.5}, "default"),
    Candidate({"layout": "c", "batch": 1, "cache": 1, "share": 0.0}, "heuristic: one"),
)


def batches(made: Search, trials: list[Trial], objectives: int, until: int) -> Iterator[list[Candidate]]:
    while len(trials) < until:
        batch = made.propose(min(4, until - len(trials)))
        if not batch:
            return
        yield batch
        ended = [answer(len(trials) + i, c, objectives) for i, c in enumerate(batch)]
        trials += ended
        made.tell(ended)


def study(sampler: str, until: int, knobs: Any = KNOBS, objectives: int = 1, trials: int = 40) -> list[Trial]:
    told: list[Trial] = []
    starts = STARTS if "share" in knobs else [Candidate(_less(c.point), c.origin) for c in STARTS]
    for _ in batches(strategy(definition(sampler, knobs, objectives, trials), starts), told, objectives, until):
        pass
    return told


def _less(point: Point) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name != "share"}


SAMPLERS = [
    ("surrogate", 1), ("surrogate", 2), ("tpe", 1), ("tpe", 2), ("nsga2", 1), ("nsga2", 2), ("random", 1),
    pytest.param("gp", 1, marks=pytest.mark.slow), pytest.param("gp", 2, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "objectives"), SAMPLERS)
def test_a_strategy_made_anew_proposes_the_same(sampler: str, objectives: int) -> None:
    """Cut before every batch: a strategy that never was there before is told the trials, and goes on."""
    until = 24
    told: list[Trial] = []
    for batch in batches(strategy(definition(sampler, KNOBS, objectives), STARTS), told, objectives, until):
        fresh = strategy(definition(sampler, KNOBS, objectives), STARTS)
        fresh.tell(Trial.from_json(json.loads(canonical(t.to_json(clocks=False)))) for t in told)
        assert fresh.propose(len(batch)) == batch
    assert len(told) == until
    assert [t.origin for t in told[:3]] == ["default", "heuristic: one", sampler]


@pytest.mark.parametrize("sampler", ["surrogate", "tpe", "nsga2", "random", "grid"])
def test_every_point_once_and_then_none(sampler: str) -> None:
    few = {**FINITE, "batch": {"log_range": [1, 64], "factor": 8}}
    space = definition(sampler, few).space
    told = study(sampler, 1000, few)
    assert space.count == 2 * 3 * 5 * 3 + 3 * 3
    assert {space.key(t.point) for t in told} == {space.key(p) for p in space.points()}
    assert len(told) == space.count


@pytest.mark.parametrize("sampler", ["surrogate", "tpe"])
def test_a_study_that_waits_for_some_does_not_ask_them_again(sampler: str) -> None:
    made = strategy(definition(sampler, FINITE))
    asked: list[Candidate] = []
    for number in range(20):
        batch = made.propose(1)
        asked += batch
        if number > 6:  # seven are out at a time
            made.tell([answer(number, asked[number - 7], 1)])
    keys = {definition(sampler, FINITE).space.key(c.point) for c in asked}
    assert len(keys) == 20


def test_the_hash_seed_changes_nothing() -> None:
    """The same proposals from processes whose sets and dicts have other orders."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_tune_search as t\n"
        "for s, k in (('surrogate', 2), ('tpe', 2), ('nsga2', 1)):\n"
        "    print(t.canonical([x.point for x in t.study(s, 17, objectives=k)]))"
    )
    here = [
        canonical([t.point for t in study(s, 17, objectives=k)])
        for s, k in (("surrogate", 2), ("tpe", 2), ("nsga2", 1))
    ]
    out = {"\n".join(here) + "\n"}
    for seed in ("1", "random"):
        path = os.pathsep.join(p for p in sys.path if p)
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        ran = [sys.executable, "-c", code, str(Path(__file__).parent)]
        out.add(subprocess.run(ran, capture_output=True, text=True, check=True, env=env).stdout)
    assert len(out) == 1
    assert len(next(iter(out)).splitlines()) == 3


@pytest.mark.parametrize(("sampler", "objectives"), [("surrogate", 1), ("tpe", 1), ("nsga2", 1), ("surrogate", 2)])
def test_it_learns_what_is_good_and_what_is_not_allowed(sampler: str, objectives: int) -> None:
    """Later trials are better than a draw's, and fewer of them are illegal, too large or too slow."""
    number = 40 if sampler == "surrogate" else 80
    late = study(sampler, number, objectives=objectives, trials=number)[number // 2 :]
    drawn = study("random", 250, trials=250)

    def kept(trials: list[Trial]) -> float:
        run = [t for t in trials if t.state in ("complete", "pruned") and t.violation <= 0]
        return len(run) / len(trials)

    def good(trials: list[Trial]) -> float:
        return float(np.mean([t.values[0] for t in trials if t.state == "complete"]))

    if sampler != "nsga2":  # six generations of a dozen are no more than a beginning
        assert kept(late) > kept(drawn)
    if objectives == 1:
        assert good(late) > good(drawn) + 0.5


def test_it_finds_the_best_of_210_in_40() -> None:
    values = [t.values[0] for t in study("surrogate", 40, FINITE) if t.feasible]
    every = [answer(0, Candidate(p, ""), 1) for p in definition("random", FINITE).space.points()]
    assert max(values) == max(t.values[0] for t in every if t.feasible)


def test_tpe_heeds_what_is_broken_and_not_the_values_that_stand_in() -> None:
    """Told other stand-in values for what is illegal, Optuna's TPE proposes the same."""
    told = study("tpe", 24)
    out = []
    for shift in (0.0, -1e6):
        d = definition("tpe")
        sampler = OptunaSampler("tpe", d.space, d.spec.objectives, d.signs, ["ttft_p99_ms"], 3, 40)
        for trial in told:
            sampler.tell(trial)
        frozen = sampler._study_trials()
        for f in frozen:
            if f.constraints["legality"] > 0 or f.constraints["memory"] > 0:
                f.values = [v + shift for v in f.values]
        sampler._study_trials = lambda frozen=frozen: frozen  # type: ignore[method-assign]
        out.append(sampler.propose(4, []))
    assert out[0] == out[1]


@pytest.mark.parametrize(("sampler", "objectives", "states"), [("tpe", 1, {"PRUNED"}), ("nsga2", 1, {"COMPLETE"}),
                                                               ("tpe", 2, {"COMPLETE"})])  # fmt: skip
def test_pruned_trials_rank_between(sampler: str, objectives: int, states: set[str]) -> None:
    d = definition(sampler, KNOBS, objectives)
    made = OptunaSampler(sampler, d.space, d.spec.objectives, d.signs, ["ttft_p99_ms"], 3, 40)
    told = study(sampler, 30, objectives=objectives)
    for trial in told:
        made.tell(trial)
    alive = [t for t in told if t.state != "failed"]
    pruned = [f for t, f in zip(alive, made._study_trials(), strict=True) if t.state == "pruned"]
    assert {f.state.name for f in pruned} == states
    for f in pruned:
        if states == {"PRUNED"}:
            assert list(f.intermediate_values) == [0]
        else:
            assert 0 < f.constraints["climbed"] < 1e-3


def test_values_of_pruned_trials_grow_as_others_did() -> None:
    whole = [Trial(i, {}, "", "complete", (v * 3,), {}, ({"a": v}, {"a": v * 3})) for i, v in enumerate((1.0, 2.0))]
    found = final_values([*whole, Trial(2, {}, "", "pruned", (5.0,), {}, ({"a": 5.0},))], ["a"])
    assert found == {0: (3.0,), 1: (6.0,), 2: (15.0,)}
    assert final_values([Trial(0, {}, "", "illegal")], ["a"]) == {}


def test_auto_lists_a_space_that_the_trials_go_through() -> None:
    def chosen(trials: int, knobs: Any, asked: str = "surrogate") -> str:
        return choose_sampler(definition(asked, knobs, trials=trials))

    assert chosen(231, FINITE) == "grid"
    assert chosen(230, FINITE) == "surrogate"
    assert chosen(230, KNOBS) == "surrogate"
    assert chosen(230, KNOBS, "nsga2") == "nsga2"
    with pytest.raises(BadInput, match="give it a step"):
        chosen(10, KNOBS, "grid")


def test_gp_is_for_few_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"p{i}": {"choices": [1, 2]} for i in range(21)}
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    with pytest.raises(BadInput, match="at most 20 parameters"):
        choose_sampler(definition("gp", many))
    assert choose_sampler(definition("gp", KNOBS)) == "gp"
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadInput, match="PyTorch is not installed"):
        choose_sampler(definition("gp", {"p0": {"choices": [1, 2]}}))


def test_a_point_in_the_place_of_one_that_was_tried() -> None:
    space = Space(definition("random", FINITE).spec.space)
    points = list(space.points())
    tried = {space.key(p) for p in points[:-1]}
    rng = np.random.default_rng(0)
    assert untried(space, points[0], lambda p: space.key(p) in tried, 1, rng) == points[-1]
    assert untried(space, points[-1], lambda p: space.key(p) in tried, 1, rng) == points[-1]
    assert untried(space, points[0], lambda p: True, 0, rng) is None


# ---- the model


def test_rows_of_a_whole_space_are_those_of_its_points() -> None:
    space = Space(definition("random", FINITE).spec.space)
    encoding = Encoding(space)
    every = encoding.every_row(10_000)
    assert every is not None
    np.testing.assert_array_equal(every, encoding.rows(list(space.points())))
    assert encoding.every_row(10) is None
    apart = ((every[:, None] - every[None]) ** 2).sum(axis=2)
    assert (apart + np.eye(len(every)) > 1e-9).all()  # no two points are one
    assert Encoding(Space(definition("random").spec.space)).every_row(10_000) is None


def _matern(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    r = np.sqrt(5 * ((x_ND[:, None] - y_MD[None]) ** 2).sum(axis=2))
    return (1 + r + r * r / 3) * np.exp(-r)


def test_posterior_is_the_textbook_one() -> None:
    rng = np.random.default_rng(1)
    x, y, at = rng.random((12, 3)), rng.standard_normal(12), rng.random((5, 3))
    scales = Scales(np.array([0.5, 2.0]), 0.01)
    column = np.array([0, 0, 1])
    made = Posterior(x, y, column, scales, at)
    length = scales.length_P[column]
    k = _matern(x / length, x / length) + 0.01 * np.eye(12)
    across = _matern(x / length, at / length)
    signal = y @ np.linalg.solve(k, y) / 12
    np.testing.assert_allclose(made.mean_M, across.T @ np.linalg.solve(k, y), rtol=1e-9)
    variance = signal * (1 - np.einsum("nm,nm->m", across, np.linalg.solve(k, across)))
    np.testing.assert_allclose(made.deviation_M, np.sqrt(variance), rtol=1e-7)
    # a candidate that is imagined to have its mean, against a process that has seen it
    made.imagine(2)
    k = _matern(np.vstack([x, at[2:3]]) / length, np.vstack([x, at[2:3]]) / length) + 0.01 * np.eye(13)
    across = _matern(np.vstack([x, at[2:3]]) / length, at / length)
    variance = signal * (1 - np.einsum("nm,nm->m", across, np.linalg.solve(k, across)))
    np.testing.assert_allclose(made.deviation_M, np.sqrt(variance), rtol=1e-6)


def test_length_scales_tell_a_parameter_that_matters_from_one_that_does_not() -> None:
    rng = np.random.default_rng(2)
    x = rng.random((40, 3))
    scales = fit_scales(x, np.sin(6 * x[:, 0]), np.arange(3), 3)
    assert scales.length_P[0] < 0.5 * scales.length_P[1:].min()
    assert scales.noise < 0.05


def test_a_batch_is_spread_by_what_it_imagines() -> None:
    """Four proposals at once are four points, of which the first is what one alone would be."""
    d = definition("surrogate", FINITE)
    made = Surrogate(d.space, d.spec.objectives, d.signs, ["ttft_p99_ms"], 3, 40)
    for trial in study("surrogate", 24, FINITE):
        made.tell(trial)
    four = made.propose(4, [])
    assert four[0] == made.propose(1, [])[0]
    assert len({d.space.key(p) for p in four}) == 4
