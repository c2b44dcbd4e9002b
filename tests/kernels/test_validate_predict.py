"""Predictions: the simulator's own prices, intervals as results have them, a bare roofline by hand, and the seal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from moesim_kernels.real.work import Setting, prepare_real, price, resolve
from moesim_kernels.validate.baseline import roofline_ns, step_bytes, step_flop
from moesim_kernels.validate.predict import Predictions, predict, read_predictions, seal_of, write_sealed
from moesim_kernels.validate.profile import profile_facts, strangeness

from moesim.errors import BadInput
from moesim.scenario.load import load_scenario
from moesim.simulate import Prepared, simulate

FILE = Path("workloads/validate_cpu.yaml")
EP2 = ("cluster.gpus_per_node=2", "parallel.dp=2", "parallel.ep=2", "communication.all_to_all=pairwise")
SETTINGS = (
    Setting("decode-01", (), ((3, 40, 0), (5, 7, 0))),
    Setting("mixed-01", ("capacity.factor=1.0",), ((3, 40, 0),), ((7, 0, 30, 0, 1), (8, 16, 5, 0, 0))),
)


def _prepared(overrides: tuple[str, ...]) -> Prepared:
    return prepare_real(load_scenario(FILE, overrides))


def test_a_prediction_is_the_simulators_price_and_its_parts_add_up() -> None:
    found = predict(SETTINGS, _prepared, {"a": 1})
    for setting, p in zip(SETTINGS, found.settings, strict=True):
        step = price(_prepared(setting.overrides), setting)
        assert p.ns == step.ns == sum(p.part_ns.values()) == sum(p.operation_ns.values())
        assert set(p.part_ns) == {"own", "attention", "experts", "head", "embedding"}
        assert sum(p.grade) == pytest.approx(1.0, abs=1e-3)
        assert all(sum(shares) == pytest.approx(1.0, abs=1e-3) for shares in p.part_grade.values())
        # all parts' grades, by time, are the step's
        mixed = sum(np.array(p.part_grade[part]) * ns for part, ns in p.part_ns.items()) / p.ns
        np.testing.assert_allclose(mixed, p.grade, atol=1e-3)
    assert [p.kind for p in found.settings] == ["decode", "mixed"]
    assert [p.context for p in found.settings] == [41 + 8, 41 + 30 + 21]


def test_the_interval_is_that_of_a_results_errors() -> None:
    """`RunResult.errors` of a run whose only step is the setting."""
    scenario = load_scenario(FILE)
    setting = Setting("s", (), ((3, 40, 0), (5, 7, 0)))
    prepared = prepare_real(scenario)
    result = simulate(scenario)
    step = price(prepared, setting)
    result.explanation.ns = dict(step.operation_ns)  # type: ignore[union-attr]
    sigma = result.errors.profile  # type: ignore[union-attr]
    p = predict([setting], _prepared, {}).settings[0]
    assert p.half_width == pytest.approx(1.645 * sigma, rel=1e-3)
    profile = scenario.cluster.profile
    assert p.part_half_width["experts"] == pytest.approx(
        1.645 * np.hypot(profile.error("moe"), profile.speed_error), rel=1e-3
    )


def test_firmness_by_part_adds_up_to_that_of_the_run() -> None:
    result = simulate(load_scenario(FILE))
    e = result.explanation  # type: ignore[union-attr]
    assert e is not None
    np.testing.assert_allclose(e.grade_ns, sum(e.part_grade_ns.values()))
    assert e.grade_ns.sum() == pytest.approx(sum(e.ns.values()))
    for name, ns in e.ns.items():
        assert e.part_grade_ns[name].sum() == pytest.approx(ns)


def test_the_bare_roofline_by_hand() -> None:
    """One token of one request at position 9: hidden 768, 12 heads and 4 KV heads of 64, 6 layers, 4 of 32 experts."""
    prepared = _prepared(())
    setting = Setting("s", (), ((3, 9, 0),))
    work = resolve(prepared, setting)
    projections = 768 * (12 + 2 * 4) * 64 + 12 * 64 * 768
    expert = 3 * 768 * 384
    weights = 6 * (projections + 768 * 32 + 4 * expert) + 768 * 8192
    keys = 10 * 2 * 4 * 64 * 6
    router = 6 * 768 * 32 * (4 - _router_bytes(prepared))  # the router's weights may be in another format
    assert step_bytes(prepared, work, 0) == 4 * (weights + keys) - router
    flop = 2 * weights + 2 * 10 * 6 * 12 * (64 + 64)
    assert step_flop(prepared, work, 0) == flop
    profile = prepared.result.scenario.cluster.profile
    expected = (4 * (weights + keys) - router) / profile.hbm_bytes_per_s + flop / profile.flop_rate("fp32")
    assert roofline_ns(prepared, work) == pytest.approx(expected * 1e9)


def _router_bytes(prepared: Prepared) -> float:
    from moesim.dtypes import dtype_bytes

    return dtype_bytes(prepared.result.scenario.model.router_dtype)


def test_the_roofline_of_a_group_is_its_slowest_ranks() -> None:
    prepared = _prepared(EP2)
    setting = Setting("s", (), ((3, 200, 0), (4, 200, 0), (5, 200, 0), (6, 0, 1)))
    work = resolve(prepared, setting)
    profile = prepared.result.scenario.cluster.profile
    each = [
        step_bytes(prepared, work, g) / profile.hbm_bytes_per_s
        + step_flop(prepared, work, g) / profile.flop_rate("fp32")
        for g in range(2)
    ]
    assert roofline_ns(prepared, work) == pytest.approx(max(each) * 1e9)
    rows = sum(float(work.rows_LS()[:, g * 16 : (g + 1) * 16].sum()) for g in range(2))
    assert rows == 4 * 4 * 6


def test_predictions_come_back_and_the_seal_is_of_the_files_bytes(tmp_path: Path) -> None:
    found = predict(SETTINGS, _prepared, {"device": "cpu", "ranks": 1})
    path = tmp_path / "predictions.json"
    seal = write_sealed(path, found)
    assert seal == hashlib.sha256(path.read_bytes()).hexdigest() == seal_of(path)
    back = read_predictions(path)
    assert back.facts == {"device": "cpu", "ranks": 1}
    assert [p.name for p in back.settings] == ["decode-01", "mixed-01"]
    assert back.settings[1].operation_ns == found.settings[1].operation_ns
    assert write_sealed(tmp_path / "again.json", back) == seal, "one spelling"
    assert write_sealed(tmp_path / "other.json", Predictions(found.settings[:1], found.facts)) != seal


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 1}', '{"schema": 2, "settings": []}', "{", '{"a":1,"a":2}'])
def test_what_holds_no_predictions_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(BadInput):
        read_predictions(tmp_path / "p.json")


def test_a_profile_of_another_machine_is_told() -> None:
    facts = profile_facts(load_scenario(FILE).cluster.profile, "a file")
    here = {"device": "cpu", "cpu": facts["made_on"], "kernel": facts["kernel"], "torch": facts["torch"], "threads": 1}
    assert strangeness({**facts, "threads": 1}, here) == []
    other = strangeness({**facts, "threads": 1}, {**here, "cpu": "another CPU", "torch": "9.9"})
    assert len(other) == 2
    assert "another CPU" in other[0]
    assumed = strangeness({**facts, "kind": "assumed"}, here)
    assert "assumed" in assumed[0]
    json.dumps(facts)
