"""The measuring process: a sealed record that is begun, gone on with, or refused; settings that cannot run are said."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from moesim_kernels.real.__main__ import main
from moesim_kernels.real.run import Measurement, measure, read_settings
from moesim_kernels.real.work import Setting

from moesim.errors import BadInput

MODEL = """
name: tiny
source: this test
num_layers: 2
hidden_size: 32
vocab_size: 40
tie_word_embeddings: true
max_position_embeddings: 64
attention: {kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8}
moe: {num_experts: 8, top_k: 2, intermediate_size: 16, router_dtype: fp32}
weight_dtype: fp32
kv_dtype: fp32
activation_dtype: fp32
"""
SCENARIO = """
name: tiny
seed: 3
model: model.yaml
cluster: {device: cpu_epyc_1thread, nodes: 1, gpus_per_node: 1, host_memory_gib: 4}
parallel: {tp: 1, dp: 1, ep: 1}
requests: {format: poisson, rate_per_s: 10, num_requests: 12, prompt_tokens: 20, output_tokens: 8}
routing: {fidelity: token}
engine: {max_num_seqs: 8, max_num_batched_tokens: 32, max_model_len: 48, cuda_graph: false, host_overhead_us: 0}
"""
SETTINGS = (
    Setting("decode", (), ((0, 9, 0), (1, 9, 0))),
    Setting("capacity", ("capacity.factor=1.0",), ((0, 9, 0),), ((1, 4, 8, 0, 1),)),
    Setting("replicas", ("policies.placement={kind: eplb, num_redundant_experts: 4}",), (), ((3, 0, 20, 0, 0),)),
)
EP2 = ["--set", "cluster.gpus_per_node=2", "--set", "parallel.dp=2", "--set", "parallel.ep=2"]
EP2 += ["--set", "communication.all_to_all=pairwise"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.yaml").write_text(MODEL)
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    write(tmp_path, SETTINGS)
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def _as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write(folder: Path, settings: tuple[Setting, ...]) -> None:
    (folder / "settings.json").write_text(json.dumps([s.to_json() for s in settings]))


def run(folder: Path, *more: str, rounds: int = 2) -> int:
    options = [str(folder / "scenario.yaml"), "--settings", str(folder / "settings.json")]
    return main([*options, "--log", str(folder / "log.jsonl"), "--rounds", str(rounds), *more])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_setting_has_its_samples_in_interleaved_rounds(folder: Path) -> None:
    assert run(folder, "--seal", "abc", "--ranks", "1") == 0
    head, *rest = lines(folder)
    assert (head["schema"], head["seal"], head["ranks"]) == (1, "abc", 1)
    assert {"device", "torch", "psi", "kernel"} <= set(head["machine"])
    samples = [line for line in rest if "setting" in line]
    assert Counter((s["setting"], s["round"]) for s in samples) == {(s.name, r): 1 for s in SETTINGS for r in range(2)}
    assert [s["round"] for s in samples] == [0, 0, 0, 1, 1, 1]
    for s in samples:
        assert sum(s["part_ns"].values()) == s["cpu_ns"]
        assert sum(s["part_wall_ns"].values()) == s["wall_ns"]
        assert set(s["part_ns"]) == {"embedding", "own", "attention", "experts", "head"}
        assert s["reference_ns"] > 0
    assert rest[-1]["end"]["samples"] == 6
    assert any("stand in" in line.get("note", "") for line in rest)  # replicas on the memory of the others
    orders = {tuple(s["setting"] for s in samples[at : at + 3]) for at in (0, 3)}
    assert run(folder, "--seal", "abc", rounds=6) == 0
    samples = [line for line in lines(folder) if "setting" in line]
    orders |= {tuple(s["setting"] for s in samples[at : at + 3]) for at in range(0, 18, 3)}
    assert len(samples) == 18
    assert len(orders) > 2


def test_a_record_is_gone_on_with_and_a_torn_line_is_cut_off(folder: Path) -> None:
    assert run(folder) == 0
    whole = (folder / "log.jsonl").read_text()
    kept = whole.splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(kept[:4]) + kept[4][:30])
    assert run(folder) == 0
    samples = [line for line in lines(folder) if "setting" in line]
    assert min(Counter(s["setting"] for s in samples).values()) == 2
    before = (folder / "log.jsonl").read_text()
    assert run(folder) == 0
    assert len([x for x in lines(folder) if "setting" in x]) == len(samples)
    assert (folder / "log.jsonl").read_text().startswith(before)


def test_another_record_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, SETTINGS[:1])
    assert run(folder, "--seal", "first", rounds=1) == 0
    begun = (folder / "log.jsonl").read_text()
    for text, said in (
        (begun, "another seal"),
        ("hello\n" + begun, "not JSON"),
        (begun.replace('"schema":1', '"schema":9'), "no record"),
        ("a picture", "no record"),
    ):
        (folder / "log.jsonl").write_text(text)
        capsys.readouterr()
        assert run(folder, "--seal", "second", rounds=1) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert "Traceback" not in told
        assert said in told
        assert (folder / "log.jsonl").read_text() == text


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "a list"), ("[]", "at least one"), ("[3]", "no setting"), ("[", "settings.json"), (None, "settings.json")],
)
def test_settings_that_are_none(
    folder: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "settings.json").unlink()
    if content is not None:
        (folder / "settings.json").write_text(content)
    assert run(folder) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "log.jsonl").exists()


def test_what_cannot_be_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (
        (["--device", "cuda:77"], "CUDA|device"),
        (["--rounds", "0"], "round"),
        (["--ranks", "2"], "--ranks 2"),
        (["--threads", "0"], "threads"),
        (["--set", "routing.fidelity=count"], "token"),
        (["--set", "model=mixtral-8x7b"], "fit"),
    ):
        assert run(folder, *more) in (2, 3)
        told = capsys.readouterr().err
        assert any(part in told for part in said.split("|")), told
    write(folder, (SETTINGS[0], SETTINGS[0]))
    with pytest.raises(BadInput, match="names of their own"):
        read_settings(folder / "settings.json")
    write(folder, (Setting("far", (), ((0, 400, 0),)),))
    assert run(folder) == 2
    assert "48 tokens" in capsys.readouterr().err


def test_one_rank_of_a_group_alone(folder: Path) -> None:
    write(folder, (Setting("s", (), ((0, 9, 0), (1, 9, 1)), ((2, 0, 9, 1, 1),)),))
    assert run(folder, *EP2, "--alone", "1") == 0
    head, *rest = lines(folder)
    assert (head["ranks"], head["alone"]) == (2, 1)
    assert "not executed" in rest[0]["note"]


def test_a_run_ends_when_its_parent_has_gone(folder: Path) -> None:
    gone = Measurement(
        folder / "scenario.yaml", folder / "settings.json", folder / "log.jsonl", parent=os.getppid() + 1_000_000
    )
    ended = measure(gone)
    assert (ended.samples, ended.signal) == (0, signal.SIGTERM)
    assert "end" in lines(folder)[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_steps_are_measured_on_cuda(folder: Path, backend: str) -> None:
    (folder / "model.yaml").write_text(MODEL.replace(": fp32\n", ": bf16\n"))
    assert run(folder, "--device", "cuda", "--backend", backend) == 0
    head, *rest = lines(folder)
    assert head["machine"]["cuda"]
    samples = [line for line in rest if "setting" in line]
    assert Counter(s["setting"] for s in samples) == {s.name: 2 for s in SETTINGS}
    for s in samples:
        assert s["cpu_ns"] == 0
        assert s["wall_ns"] > 0
        assert set(s["part_ns"]) == {"embedding", "own", "attention", "experts", "head"}
    assert run(folder, *EP2, "--alone", "1", "--log", str(folder / "alone.jsonl"), "--device", "cuda") == 0
