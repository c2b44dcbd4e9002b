"""A described step: what is executed and what is priced are the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moesim_kernels.real.work import PART_OF, Setting, prepare_real, price, resolve

from moesim.errors import BadInput
from moesim.scenario.load import load_scenario
from moesim.simulate import Prepared, simulate

FILE = Path("workloads/validate_cpu.yaml")
EP2 = ("cluster.gpus_per_node=2", "parallel.dp=2", "parallel.ep=2", "communication.all_to_all=pairwise")


def _prepared(*overrides: str) -> Prepared:
    return prepare_real(load_scenario(FILE, overrides))


@pytest.mark.parametrize(
    "overrides",
    [(), ("capacity.factor=1.0",), EP2, (*EP2, "policies.placement={kind: eplb, num_redundant_experts: 4}")],
)
def test_rows_that_are_executed_are_those_that_are_priced(overrides: tuple[str, ...]) -> None:
    prepared = _prepared(*overrides)
    ranks = prepared.layout.dp
    setting = Setting("s", (), tuple((i, 20 + i, i % ranks) for i in range(7)), ((9, 0, 30, ranks - 1, 1),))
    work, found = resolve(prepared, setting), price(prepared, setting)
    assert sum(found.operation_ns.values()) == found.ns == sum(found.part_ns.values())
    assert sum(found.grade) == pytest.approx(1.0)
    assert set(found.operation_ns) <= set(PART_OF)
    moe = prepared.result.pricers[0].moe
    priced = moe.slot_load_LS()  # type: ignore[attr-defined]
    assert np.array_equal(priced, work.rows_LS())
    kept = (work.slot_NLK < work.num_slots).sum()
    limited = "capacity.factor=1.0" in overrides
    assert (kept < work.slot_NLK.size) == limited
    assert work.rows_LS().sum() == kept


def test_a_lone_step_costs_what_the_served_run_says() -> None:
    """The first step of the simulated run, described by hand."""
    scenario = load_scenario(FILE)
    result = simulate(scenario)
    outcome = result.outcome  # type: ignore[union-attr]
    assert outcome is not None
    prompt = int(outcome.requests.prompt_tokens[0])
    setting = Setting("first", (), (), ((0, 0, prompt, 0, 1),))
    assert price(_prepared(), setting).ns == int(outcome.steps.duration_ns[0])


def test_settings_are_json_and_others_are_refused() -> None:
    setting = Setting("s", ("capacity.factor=2",), ((1, 2, 0),), ((3, 0, 8, 0, 1),))
    assert Setting.from_json(setting.to_json()) == setting
    with pytest.raises(BadInput, match="no setting"):
        Setting.from_json({"name": "s", "decode": [[1]], "chunks": [], "overrides": []})
    prepared = _prepared()
    with pytest.raises(BadInput, match="48 requests"):
        resolve(prepared, Setting("s", (), ((99, 3, 0),)))
    with pytest.raises(BadInput, match="at least one token"):
        price(prepared, Setting("s"))


@pytest.mark.parametrize(
    ("override", "said"),
    [("routing.fidelity=count", "token"), ("model=mixtral-8x7b", "does not fit|GiB"), ("parallel.tp=2", "tp=1")],
)
def test_what_cannot_be_executed_is_refused(override: str, said: str) -> None:
    from moesim.errors import MoesimError

    more = ("cluster.gpus_per_node=2", "parallel.ep=2") if "tp" in override else ()
    with pytest.raises(MoesimError, match=said):
        _prepared(override, *more)
