"""The tuning examples of workloads/: each is a sound question, stands in its own space, and a short study of it ends in
a report and an export."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from moesim_tuner.checks import check_figures
from moesim_tuner.definition import Definition
from moesim_tuner.export import export
from moesim_tuner.heuristics import starts
from moesim_tuner.judge import base_scenario
from moesim_tuner.ladder import Rungs
from moesim_tuner.records import Candidate, Trial
from moesim_tuner.report import render, to_json
from moesim_tuner.search import strategy
from moesim_tuner.study import run_study
from moesim_tuner.tune import define
from moesim_tuner.workers import make_workers

from moesim.scenario.load import Scenario, load_scenario
from tests.tuner.studies import Found

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "workloads").glob("tune_*.yaml"))
SHORT = {
    "tune_batch_limits": ("requests.num_requests=16", "routing.pool_tokens=512", "engine.bank_entries=1"),
    "tune_capacity_training": ("training.steps=1", "training.routing_tokens=64", "training.sequence_tokens=512",
                               "training.global_batch_sequences=32"),
    "tune_ep_32gpu": ("requests.num_requests=16", "requests.concurrency=16", "routing.pool_tokens=256",
                      "engine.bank_entries=1"),
    "tune_offload_24gb": ("requests.num_requests=1", "requests.prompt_tokens=4", "requests.output_tokens=2",
                          "routing.pool_tokens=1024"),
    "tune_redundant_interval": ("requests.num_requests=8", "requests.concurrency=8", "requests.prompt_tokens=8",
                                "requests.output_tokens=8", "routing.pool_tokens=512"),
}  # fmt: skip
"""horizons at which a trial takes a moment"""
LONG = ("tune_capacity_training", "tune_ep_32gpu")
"""and where it still takes more"""


class Memory:
    """A store that keeps nothing beyond the process."""

    def __init__(self) -> None:
        self.kept: list[Trial] = []

    def trials(self) -> list[Trial]:
        return list(self.kept)

    def proposed(self) -> list[list[Candidate]]:
        return []

    def propose(self, first: int, candidates: object) -> None: ...

    def append(self, trials: list[Trial]) -> None:
        self.kept += trials

    def note(self, name: str, value: object) -> None: ...

    def notes(self) -> dict[str, object]:
        return {}

    def close(self) -> None: ...


def defined(file: Path, overrides: tuple[str, ...] = ()) -> tuple[Definition, Scenario]:
    definition, _ = define(file, overrides, (), {}, False)
    return definition, base_scenario(definition)


def test_every_example_has_a_short_form() -> None:
    assert {file.stem for file in EXAMPLES} == set(SHORT)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_the_question_is_sound(file: Path) -> None:
    """Figures are there to be had, the head names the file's own command, and the scenario as written is a point of the
    space: else the search could not be compared with it."""
    scenario = load_scenario(file)
    check_figures(file, (), scenario)
    assert scenario.name == file.stem
    head = re.match(r"(?:#.*\n)+", file.read_text())
    assert head is not None
    assert f"#   moesim tune workloads/{file.name}\n" in head[0]
    definition, scenario = defined(file, SHORT[file.stem])
    (first, *_) = starts(scenario, definition.space, definition.spec)
    assert first.origin == "default"
    assert {p.name for p in definition.space.active(first.point)} == set(first.point)
    assert 40 <= definition.spec.trials <= 60
    assert definition.space.count is not None
    assert definition.space.count > 4 * definition.spec.trials


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=[pytest.mark.slow] * (file.stem in LONG)) for file in EXAMPLES],
    ids=lambda f: f.stem,
)
def test_a_short_study_ends_in_a_report_and_an_export(file: Path, tmp_path: Path) -> None:
    definition, scenario = defined(file, ("tune.trials=4", "tune.constraints={}", "tune.rungs=[{}]", *SHORT[file.stem]))
    first = starts(scenario, definition.space, definition.spec)[:2]
    workers, store = make_workers(1), Memory()
    try:
        trials = run_study(definition, strategy(definition, first), Rungs(definition), workers, store)
    finally:
        workers.close()
    assert [t.number for t in trials] == [0, 1, 2, 3]
    assert not [t for t in trials if t.state == "failed"], trials
    assert trials[0].feasible, trials[0].reasons
    found = Found(definition, trials, file.stem)
    out = io.StringIO()
    render(found, out, 100)
    assert "4 of 4 trials" in out.getvalue()
    winner = to_json(found)["front"][0]["trial"]
    made = export(found, winner, tmp_path / "out")
    assert load_scenario(tmp_path / "out" / "scenario.yaml").hash == trials[winner].scenario_hash
    if scenario.tiers is None:
        assert made.engines
