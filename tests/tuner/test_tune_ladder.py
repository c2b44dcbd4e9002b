"""Who climbs: against Optuna's percentile pruner, and by hand; the ladder of a scenario that names none."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_tuner.definition import Definition
from moesim_tuner.ladder import Rungs, default_rungs
from moesim_tuner.records import Trial, TrialState

from moesim.scenario.load import load_scenario, load_scenario_text
from moesim.tune_spec import RungSpec, TuneSpec

WORKLOADS = Path(__file__).resolve().parents[2] / "workloads"
RUNGS = (RungSpec(set={"requests.num_requests": 10}), RungSpec())


def definition(objectives: tuple[str, ...] = ("output_tok_per_s",), constraints: Any = None) -> Definition:
    spec = TuneSpec.model_validate(
        {
            "space": {"parallel.ep": {"range": [0, 999]}},
            "objectives": list(objectives),
            "constraints": constraints or {},
        }
    )
    return Definition("", "world", ".", spec, "random", RUNGS)


def trial(number: int, state: TrialState = "pruned", origin: str = "surrogate", **figures: float) -> Trial:
    rungs = (figures,) if state == "pruned" else (figures, figures)
    return Trial(number, {"parallel.ep": number}, origin, state, (), {}, rungs)


def whole(values: list[float], name: str = "output_tok_per_s") -> list[Trial]:
    return [trial(i, "complete", **{name: v}) for i, v in enumerate(values)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=6, max_size=13), st.integers(0, 50), st.booleans())
def test_one_objective_is_optunas_median_rule(seen: list[int], mine: int, more: bool) -> None:
    name = "output_tok_per_s" if more else "tpot_p99_ms"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.PercentilePruner(50.0, n_startup_trials=6)
        study = optuna.create_study(direction="maximize" if more else "minimize", pruner=pruner)
    for value in seen:
        made = optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE, value=0.0, intermediate_values={0: value}
        )
        study.add_trial(made)
    asked = study.ask()
    asked.report(float(mine), 0)
    ladder = Rungs(definition((name,)), first=6, tolerance=0.0)
    theirs = whole([float(v) for v in seen], name)
    assert ladder.climbs(0, trial(99, **{name: float(mine)}), theirs) == (not asked.should_prune())


def test_the_known_and_the_first_always_climb() -> None:
    ladder = Rungs(definition())
    many = whole([10.0] * 9)
    for origin in ("default", "start", "heuristic: eplb"):
        assert ladder.climbs(0, trial(9, origin=origin, output_tok_per_s=1.0), many)
    assert not ladder.climbs(0, trial(9, output_tok_per_s=1.0), many)
    assert ladder.climbs(0, trial(9, output_tok_per_s=1.0), many[:5])
    assert ladder.climbs(0, trial(9, output_tok_per_s=9.95), many)  # a tie as far as a short run can tell
    pruned = [trial(i, output_tok_per_s=100.0) for i in range(20)]
    assert ladder.climbs(0, trial(30, output_tok_per_s=9.95), [*many, *pruned])  # who stopped sets no standard


def test_broken_constraints_come_first() -> None:
    ladder = Rungs(definition(constraints={"ttft_p99_ms": {"max": 100}}))
    kept = [trial(i, "complete", output_tok_per_s=10.0, ttft_p99_ms=90.0) for i in range(8)]
    assert not ladder.climbs(0, trial(9, output_tok_per_s=99.0, ttft_p99_ms=150.0), kept)
    assert ladder.climbs(0, trial(9, output_tok_per_s=99.0, ttft_p99_ms=108.0), kept)  # by little
    broken = [trial(i, "complete", output_tok_per_s=10.0, ttft_p99_ms=300.0) for i in range(8)]
    assert ladder.climbs(0, trial(9, output_tok_per_s=1.0, ttft_p99_ms=150.0), broken)  # better than most
    assert not ladder.climbs(0, trial(9, output_tok_per_s=1.0), kept)  # the figure is not there


def test_several_objectives_stop_what_two_beat_by_a_margin() -> None:
    ladder = Rungs(definition(("output_tok_per_s", "tpot_p99_ms")))
    front = [trial(i, "complete", output_tok_per_s=10.0 + i, tpot_p99_ms=10.0 + i) for i in range(8)]
    assert not ladder.climbs(0, trial(9, output_tok_per_s=9.0, tpot_p99_ms=13.0), front)
    assert ladder.climbs(0, trial(9, output_tok_per_s=9.0, tpot_p99_ms=9.0), front)
    assert ladder.climbs(0, trial(9, output_tok_per_s=10.9, tpot_p99_ms=12.0), front)  # one beats it, and by little
    assert ladder.climbs(0, trial(9, output_tok_per_s=30.0, tpot_p99_ms=90.0), front)


def test_only_the_trials_before_and_the_candidate_count() -> None:
    """The same answer however often, and in whatever order, it is asked."""
    ladder, before = Rungs(definition()), whole([float(v) for v in range(9)])
    asked = [trial(20 + i, output_tok_per_s=float(i)) for i in range(9)]
    first = [ladder.climbs(0, t, before) for t in asked]
    assert [ladder.climbs(0, t, before[::-1]) for t in reversed(asked)] == first[::-1]
    assert first == [False] * 4 + [True] * 5


# ---- default rungs


@pytest.mark.parametrize(
    ("name", "overrides", "short"),
    [
        ("quickstart", (), {"requests.num_requests": 250, "engine.bank_entries": 4}),
        ("quickstart", ("requests.num_requests=300",), None),
        ("rebalance_qwen3_30b_ep8", (), {"requests.num_requests": 100}),  # what is popular drifts: tokens count
        ("offload_qwen3_30b_4090", (), None),
        ("train_mixtral_ep8", (), None),
        ("train_mixtral_ep8", ("training.steps=40",), {"training.steps": 5}),
        (
            "train_mixtral_ep8",
            ("training.steps=40", "training.measured_from_step=20"),
            {"training.steps": 5, "training.measured_from_step": 2},
        ),
    ],
)
def test_a_short_look_where_the_run_is_long(
    name: str, overrides: tuple[str, ...], short: dict[str, Any] | None
) -> None:
    found = default_rungs(load_scenario(WORKLOADS / f"{name}.yaml", overrides))
    assert found == ((RungSpec(set=short), RungSpec()) if short else (RungSpec(),))
    if short:  # and the scenario takes it
        load_scenario(WORKLOADS / f"{name}.yaml", (*overrides, *(f"{k}={v}" for k, v in short.items())))


def test_token_fidelity_gives_way_to_counts_on_the_short_look() -> None:
    text = (WORKLOADS / "quickstart.yaml").read_text().replace("fidelity: count", "fidelity: token")
    found = default_rungs(load_scenario_text(text, WORKLOADS))
    assert found[0].set["routing.fidelity"] == "count"
    assert found[0].set["engine.bank_entries"] == 4
