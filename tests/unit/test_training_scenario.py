"""`mode: training` of a scenario: what is read, what is refused, and what the command line does with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from moesim.cli import main
from moesim.errors import BadInput
from moesim.scenario.load import load_scenario_text, scenario_schema
from moesim.simulate import simulate
from tests.build import scenario, tiny_model, training_scenario

GOOD = """\
mode: training
model: deepseek-moe-16b
cluster: {device: h100_sxm_datasheet, nodes: 2, gpus_per_node: 8}
parallel: {tp: 1, dp: 8, ep: 8, replicas: 2}
training:
  sequence_tokens: 2048
  global_batch_sequences: 64
  micro_batch_sequences: 2
  steps: 5
"""


def problems(text: str, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load_scenario_text(text, Path(), overrides or [], name="s")
    return [str(p) for p in caught.value.problems]


def test_a_training_scenario_is_read_with_its_defaults() -> None:
    s = load_scenario_text(GOOD, Path())
    assert s.requests is None
    assert s.training is not None
    t = s.training
    assert (t.recompute, t.zero_stage, t.grad_dtype, t.overlap_grad_reduce, t.packing) == (
        "none",
        0,
        "fp32",
        True,
        "none",
    )
    assert set(s.policies.kinds) == {"routing", "placement"}
    assert {"mode", "training"} <= set(s.resolved)
    assert not {"requests", "engine", "slo"} & set(s.resolved)
    assert [round(t.progress(i), 6) for i in range(5)] == [0.1, 0.3, 0.5, 0.7, 0.9]


def test_serving_says_what_it_said(tmp_path: Path) -> None:
    s = scenario(tmp_path)
    assert not {"mode", "training", "capacity"} & set(s.resolved)
    assert s.hash == scenario(tmp_path, mode="serving").hash


@pytest.mark.parametrize(
    ("extra", "place", "words"),
    [
        ("requests: {format: fixed}\n", "10:1", "requests: nothing is asked for while a model trains"),
        ("engine: {max_num_seqs: 4}\n", "10:1", "engine: what a serving engine is told"),
        ("slo: {ttft_ms: 3}\n", "10:1", "slo: "),
        ("policies: {batching: sglang}\n", "10:12", "policies.batching: training has nothing that it decides"),
        ("policies: {dispatch: random}\n", "10:12", "policies.dispatch"),
        ("policies: {placement: {kind: contiguous, num_redundant_experts: 16}}\n", "10:23", "one place"),
        ("capacity: {factor: 1.0, decode: 2.0}\n", "10:33", "training has no decode"),
    ],
)
def test_what_training_has_no_use_for_is_refused(extra: str, place: str, words: str) -> None:
    lines = problems(GOOD + extra)
    assert len(lines) == 1
    assert lines[0].startswith(f"s.yaml:{place}: ")
    assert words in lines[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.pp=2"], "pipeline parallelism is not simulated yet; remove parallel.pp"),
        (["training.global_batch_sequences=72"], "multiple of micro_batch_sequences * dp * replicas"),
        (["training.global_batch_sequences=63"], "micro_batch_sequences must divide global_batch_sequences"),
        (["training.sequence_tokens=5000"], "must not exceed the model's positions"),
        (["training.measured_from_step=5"], "measured_from_step must lie below steps"),
        (["training.progress_start=0.5", "training.progress_end=0.4"], "progress_end must not lie before"),
        (["training.progress_start=2"], "training.progress_start"),
        (["training.recompute=some"], "'none', 'selective' or 'full'"),
        (["training.zero_stage=4"], "training.zero_stage"),
        (["training.optimiser=adamw"], "Did you mean 'optimizer'"),
        (["training.packing=full"], "training.packing"),
        (["training.optimizer=sgd"], "training.optimizer"),
        (["model.expert_dtype=fp8"], "training in fp8 is not simulated yet"),
        (["model.iterations=2"], "training with it is not simulated yet"),
        (["training.steps=0"], "training.steps"),
        (["parallel.ep=3"], "parallel.ep must divide"),
        (["capacity.factor=-1"], "capacity.factor"),
        (["mode=search"], "'serving' or 'training'"),
        (["routing.fidelity=count"], "remove routing.fidelity"),
        (["routing.popularity_zipf=1", "routing.training_scores.drift=1"], "gives a pool"),
        (["routing.training_scores.drift=-1"], "routing.training_scores.drift"),
    ],
)
def test_bad_values_are_told(overrides: list[str], words: str) -> None:
    lines = problems(GOOD, overrides)
    assert any(words in line for line in lines), lines


def test_each_mode_needs_its_part() -> None:
    without = GOOD.split("training:\n")[0]
    assert problems(without) == ["s.yaml:1:7: training: is required in mode training and not given"]
    lines = problems(GOOD.replace("mode: training\n", ""))
    assert any("training: is read in mode training only" in line for line in lines)
    assert any("requests: is required and not given" in line for line in lines)


def test_a_dense_model_has_no_capacity() -> None:
    lines = problems(GOOD, ["model=llama-3.1-8b", "parallel.ep=1", "capacity.factor=1"])
    assert any("has no experts to limit" in line for line in lines)


def test_the_schema_knows_both_modes() -> None:
    schema = scenario_schema()
    assert "training" in schema["properties"]
    assert "recompute" in schema["$defs"]["TrainingSpec"]["properties"]
    assert schema["then"]["required"] == ["training"]
    assert schema["else"]["required"] == ["requests"]
    assert schema["required"] == ["model", "cluster"]


# ---- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("training")
    data: dict[str, Any] = {
        "mode": "training",
        "seed": 3,
        "model": tiny_model(place),
        "cluster": {"device": "h100_sxm_datasheet", "nodes": 2, "gpus_per_node": 4},
        "parallel": {"dp": 4, "ep": 4, "replicas": 2},
        "capacity": {"factor": 1.0},
        "policies": {"routing": "sinkhorn"},
        "training": {"sequence_tokens": 128, "global_batch_sequences": 16, "steps": 4, "zero_stage": 1},
    }
    (place / "s.yaml").write_text(yaml.safe_dump(data))
    return place


def moesim(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command line, run in `folder`."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
    finally:
        os.chdir(here)
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_simulate_prints_and_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = moesim(folder, capsys, "simulate", "s.yaml")
    assert code == 0, error
    for words in ("model FLOP utilisation", "MaxVio", "optimizer states", "experts backward", "gradient reduction"):
        assert words in out
    (results,) = (folder / "results").iterdir()
    assert sorted(p.name for p in results.iterdir()) == [
        "provenance.json", "result.json", "scenario.yaml", "steps.parquet",
    ]  # fmt: skip
    table = pq.read_table(results / "steps.parquet")
    assert table.num_rows == 4
    assert {"step_ns", "maxvio", "dropped_share", "progress"} <= set(table.column_names)
    report = json.loads((results / "result.json").read_text())
    assert report["summary"]["mode"] == "training"
    assert report["summary"]["step_ms"]["mean"] == pytest.approx(sum(table["step_ns"].to_pylist()) / 4e6)
    code, out, error = moesim(results, capsys, "check", "scenario.yaml")
    assert code == 0, error
    assert "4 training steps of 2,048 tokens" in out


def test_exit_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = moesim(folder, capsys, "simulate", "s.yaml", "--set", "training.gpu_memory_utilization=0.001")
    assert code == 3
    assert "bytes a rank are missing" in error
    code, _, error = moesim(folder, capsys, "simulate", "s.yaml", "--timeline", "t.json")
    assert code == 2
    assert "a timeline of training steps is not made yet" in error


def test_steps_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = moesim(folder, capsys, "compare", "s.yaml", "--vary", "capacity.factor=1.0,2.0", "--json")
    assert code == 0, error
    report = json.loads(out)
    names = [figure["name"] for figure in report["figures"]]
    assert {"step_mean_ms", "tok_per_s", "mfu", "maxvio", "dropped_share", "hbm_used_bytes"} == set(names) - {
        "max_over_mean_load"
    }
    tight, loose = (candidate["figures"] for candidate in report["candidates"])
    assert tight["dropped_share"]["value"] > loose["dropped_share"]["value"]
    assert tight["maxvio"]["mark"] == loose["maxvio"]["mark"] == "tie"  # the router chose the same


def test_every_router_trains(tmp_path: Path) -> None:
    """Each mechanism that is found by its file runs a step, and what it chooses is counted."""
    from moesim.policy import policy_kinds

    small = {"steps": 1, "global_batch_sequences": 8, "sequence_tokens": 64}
    for kind in policy_kinds("routing"):
        result = simulate(training_scenario(tmp_path, policies={"routing": kind}, training=small))
        assert result.feasible, kind
        summary = result.to_json()["summary"]
        assert summary["balance"]["maxvio"] >= -1e-9, kind
        assert 0 < summary["routing"]["experts_per_token"] <= 64, kind
