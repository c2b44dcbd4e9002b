"""`moesim calibrate` from a scenario to a profile that simulates it: real kernels, a tiny model, a few seconds."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from moesim_kernels.bench.plan import load_plan, save_plan
from moesim_kernels.calibrate.deployment import from_scenario
from moesim_kernels.calibrate.fitted import calibrate_log
from moesim_kernels.calibrate.plan import make_plan
from moesim_kernels.calibrate.run import Broken, measure
from moesim_kernels.calibrate.write import write_profile

from moesim import cli
from moesim.errors import BadInput
from moesim.scenario.load import load_profile, load_scenario
from moesim.simulate import simulate

MODEL = """\
name: tiny
source: made up for tests
num_layers: 2
hidden_size: 128
vocab_size: 512
tie_word_embeddings: false
max_position_embeddings: 256
attention: {kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 32}
moe: {num_experts: 8, top_k: 2, intermediate_size: 64, router_dtype: fp32}
weight_dtype: fp32
kv_dtype: fp32
activation_dtype: fp32
"""
SCENARIO = """\
name: tiny
model: model.yaml
cluster: {device: cpu_2core, nodes: 1}
requests: {format: poisson, rate_per_s: 50, num_requests: 12, prompt_tokens: 24, output_tokens: 12}
routing: {fidelity: count}
engine: {max_num_seqs: 4, max_num_batched_tokens: 32, max_model_len: 128, bank_entries: 2, cuda_graph: false}
"""


def moesim(*arguments: str) -> int:
    """Run the command line in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scenario, its plan without what the machine has beside the kernels (copies, disks, other processes), measured
    for a few seconds."""
    out = tmp_path_factory.mktemp("calibrate")
    (out / "model.yaml").write_text(MODEL)
    (out / "scenario.yaml").write_text(SCENARIO)
    whole = make_plan([from_scenario(out / "scenario.yaml", [])], "cpu")
    few = ("storage", "all_reduce", "all_gather", "reduce_scatter", "token_exchange", "copy")
    plan = type(whole)("cpu", tuple(c for c in whole.cases if c.op not in few), 1, whole.note)
    save_plan(plan, out / "p.json")
    command = [sys.executable, "-m", "moesim_kernels.bench", "--plan", str(out / "p.json")]
    measure(
        [*command, "--log", str(out / "l.jsonl"), "--budget", "60s", "--target", "2", "--minimum", "2"],
        out / "l.jsonl",
        True,
    )
    return out


@pytest.fixture(scope="module")
def profile(folder: Path) -> Path:
    """The profile that `--from` makes of the log."""
    out = folder / "made" / "here.yaml"
    assert moesim("calibrate", "--from", str(folder / "p.json"), str(folder / "l.jsonl"), "--out", str(out), "-q") == 0
    return out


def test_the_profile_is_measured_says_where_from_and_grades_the_scenario_as_measured(
    folder: Path, profile: Path
) -> None:
    made = load_profile(profile)
    said = made.provenance
    assert made.kind == "measured"
    for key in ("date", "command", "driver", "kernel", "plan", "log_blake2b", "psi_percent", "held_out", "assumed"):
        assert said[key] is not None or key == "psi_percent", key
    assert said["versions"]["torch"]
    assert "node.nvlink_gb_per_s" in said["assumed"]
    assert said["points"]["not_reached"] == 0
    assert set(said["held_out"]) == {"moe", "gemm", "block", "attention_prefill", "attention_decode", "elementwise"}
    assert made.interval("moe", 1) is not None
    scenario = load_scenario(folder / "scenario.yaml", [f"cluster.device={profile}"])
    shares = simulate(scenario).to_json()["provenance"]["shares"]
    # host overhead is the one assumed figure; prompts of one chunk, contexts and batches lie on the measured grids
    host = simulate(scenario).to_json()["summary"]["time_share"]["host"]
    assert shares["assumed"] == pytest.approx(host, abs=0.01)
    assert shares["extrapolated"] < 0.02
    assert shares["measured"] > 0.1


def test_fitting_a_log_again_gives_the_same_bytes_apart_from_the_command(folder: Path, profile: Path) -> None:
    plan, first = load_plan(folder / "p.json"), yaml.safe_load(profile.read_text())
    (folder / "again").mkdir()
    out = folder / "again" / "here.yaml"
    again = calibrate_log(plan, folder / "l.jsonl", "here", first["provenance"]["command"])
    write_profile(out, again.spec, again.curves)
    assert first["provenance"]["command"].split()[0] == "moesim"
    assert out.read_bytes() == profile.read_bytes()
    assert out.with_suffix(".json").read_bytes() == profile.with_suffix(".json").read_bytes()


def test_a_torn_log_fits_and_a_log_without_ceilings_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    plan, text = load_plan(folder / "p.json"), (folder / "l.jsonl").read_bytes()
    (tmp_path / "torn.jsonl").write_bytes(text[:-20])
    assert calibrate_log(plan, tmp_path / "torn.jsonl", "torn", "").judged
    head = text[: text.index(b"\n") + 1]
    (tmp_path / "empty.jsonl").write_bytes(head)
    with pytest.raises(BadInput, match="Raise --budget"):
        calibrate_log(plan, tmp_path / "empty.jsonl", "empty", "")


def test_a_short_log_gives_what_it_can_or_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    plan, lines = load_plan(folder / "p.json"), (folder / "l.jsonl").read_text().splitlines(keepends=True)
    by_op: dict[str, list[str]] = {}
    for case in plan.cases:
        by_op.setdefault(f"{case.role} {case.op}", []).append(case.id)

    def fitted(*left_out: str) -> dict[str, Any]:
        (tmp_path / "l").write_text("".join(line for line in lines if not any(key in line for key in left_out)))
        return calibrate_log(plan, tmp_path / "l", "short", "").spec

    with pytest.raises(BadInput, match=r"no point of peak_gemm in bf16, fp32.*Raise --budget"):
        fitted(*by_op["ceiling peak_gemm"])
    few = [keys[2:] for role, keys in by_op.items() if role.startswith("grid")]
    with pytest.raises(BadInput, match=r"no operator has 3 points.*Raise --budget"):
        fitted(*(key for keys in few for key in keys), *by_op["heldout moe"])
    spec = fitted(*by_op["grid moe"][3:], *by_op["heldout gemm"])
    assert spec["provenance"]["priced_by_physics_alone"] == ["moe"]
    assert set(spec["provenance"]["held_out"]) == {"attention_prefill", "attention_decode", "block", "elementwise"}


def test_nothing_is_left_half_written(folder: Path, profile: Path, tmp_path: Path, monkeypatch: Any) -> None:
    made = calibrate_log(load_plan(folder / "p.json"), folder / "l.jsonl", "x", "")
    target = tmp_path / "x.yaml"
    target.write_text("the old one")
    (tmp_path / "x.json").write_text("the old curves")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_profile(target, made.spec, made.curves)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.yaml"]
    assert target.read_text() == "the old one"
    assert (tmp_path / "x.json").read_text() == "the old curves"


@pytest.mark.slow
def test_an_interrupt_reaches_the_child_keeps_the_log_and_the_same_command_goes_on(folder: Path) -> None:
    out = folder / "interrupted.yaml"
    command = [sys.executable, "-m", "moesim.cli", "calibrate", str(folder / "scenario.yaml"), "--device", "cpu"]
    command += ["--out", str(out), "--budget"]
    log = out.with_suffix(".log.jsonl")
    running = subprocess.Popen([*command, "120s"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and (not log.exists() or log.read_bytes().count(b"\n") < 5):
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert not out.exists()
    kept = log.read_bytes()
    with log.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody writes it any more
    again = subprocess.run([*command, "20s"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "going on with it" in again.stdout
    assert log.read_bytes().startswith(kept)
    assert load_profile(out).kind == "measured"


def test_a_child_that_dies_is_told_apart_from_one_that_refused(tmp_path: Path) -> None:
    log = tmp_path / "l"
    kill = "import os, signal; os.kill(os.getpid(), signal.{})"
    with pytest.raises(Broken, match="lack of memory") as killed:
        measure([sys.executable, "-c", kill.format("SIGKILL")], log, True)
    assert killed.value.exit_code == 5
    with pytest.raises(Broken, match="SIGABRT") as died:
        measure([sys.executable, "-c", kill.format("SIGABRT")], log, True)
    assert died.value.exit_code == 1
    with pytest.raises(Broken, match="code 7"):
        measure([sys.executable, "-c", "raise SystemExit(7)"], log, True)
    with pytest.raises(SystemExit) as refused:
        measure([sys.executable, "-c", "raise SystemExit(2)"], log, True)
    assert refused.value.code == 2
    with pytest.raises(KeyboardInterrupt):
        measure([sys.executable, "-c", "raise SystemExit(130)"], log, True)


def _broken(folder: Path, tmp: Path) -> dict[str, tuple[list[str], str]]:
    """Broken inputs by name: the arguments after `calibrate`, and what the message must say."""
    scenario, plan, log = str(folder / "scenario.yaml"), str(folder / "p.json"), str(folder / "l.jsonl")
    (tmp / "foreign.yaml").write_text("name: mine\n")
    (tmp / "file").write_text("")
    (tmp / "noise.json").write_bytes(b"\xff\x00{")
    lines = (folder / "l.jsonl").read_text().splitlines()
    (tmp / "begun.jsonl").write_text(lines[0] + "\n")
    (tmp / "other.jsonl").write_text(lines[0].replace('"plan":"', '"plan":"ff') + "\n")
    (tmp / "wrong.jsonl").write_text("\n".join([*lines[:2], '{"id": 3}', *lines[2:]]) + "\n")
    case = json.loads(Path(plan).read_text())
    case["cases"][0]["op"] = "warp"
    (tmp / "warp.json").write_text(json.dumps(case))
    out = ["--out", str(tmp / "new.yaml")]
    return {
        "no such scenario": (["nowhere.yaml", *out], "nowhere.yaml"),
        "no such model": (["--model", "olmoe", *out], "Did you mean"),
        "model and scenario": ([scenario, "--model", "olmoe-1b-7b", *out], "leave out one"),
        "limits of nothing": (["--max-seqs", "4", *out], "--model"),
        "budget": ([scenario, "--budget", "soon", *out], "--budget"),
        "budget of nothing": ([scenario, "--budget", "0s", *out], "5m"),
        "layout": (["--model", "olmoe-1b-7b", "--parallel", "tp:2", *out], "tp=1,dp=8,ep=8"),
        "layout twice": (["--model", "olmoe-1b-7b", "--parallel", "tp=2,tp=4", *out], "each degree once"),
        "degrees": (["--model", "olmoe-1b-7b", "--parallel", "tp=3", *out], "attention heads"),
        "dtype": ([scenario, "--dtype", "fp4", *out], "bf16 or fp32"),
        "format": (["--model", "deepseek-v3", *out], "--dtype bf16"),
        "device": ([scenario, "--device", "tpu", *out], "cpu or cuda"),
        "backend": ([scenario, "--backend", "cutlass", *out], "grouped"),
        "triton on a CPU": ([scenario, "--device", "cpu", "--backend", "triton", *out], "torch, loop or grouped"),
        "no YAML": ([scenario, "--out", str(tmp / "x.json")], ".yaml"),
        "a foreign file": ([scenario, "--out", str(tmp / "foreign.yaml")], "no calibration wrote it"),
        "a folder that is a file": ([scenario, "--out", str(tmp / "file" / "x.yaml")], "cannot be written"),
        "seqs above tokens": ([scenario, "--max-seqs", "99", *out], "max_num_batched_tokens"),
        "from and a model": (["--from", plan, log, "--model", "olmoe-1b-7b", *out], "leave out --model"),
        "from nowhere": (["--from", plan, str(tmp / "none"), *out], "No such file"),
        "a plan of noise": (["--from", str(tmp / "noise.json"), log, *out], "noise.json"),
        "an unknown operator": (["--from", str(tmp / "warp.json"), log, *out], "cases[0]"),
        "a log of other options": ([scenario, "--log", str(tmp / "begun.jsonl"), *out], "--fresh"),
        "fresh on no log": ([scenario, "--log", str(tmp / "foreign.yaml"), "--fresh", *out], "is no log"),
        "another plan's log": (["--from", plan, str(tmp / "other.jsonl"), *out], "belongs to plan"),
        "a wrong line": (["--from", plan, str(tmp / "wrong.jsonl"), *out], "wrong.jsonl:3"),
        "plan into nowhere": ([scenario, "--plan-only", str(tmp / "file" / "p.json")], "cannot be written"),
    }


def test_broken_input_ends_with_code_2_one_line_a_problem_and_nothing_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (arguments, said) in _broken(folder, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        assert moesim("calibrate", *arguments) == 2, name
        err = capsys.readouterr().err
        assert said in err, f"{name}: {err}"
        assert err.startswith("error: "), name
        assert "Traceback" not in err, name
        assert sorted(tmp_path.rglob("*")) == before, name


def test_without_torch_measuring_says_what_to_install_and_fitting_works(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import sys, importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.startswith('torch') else real(name, *a)\n"
        "class No:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name == 'torch': raise ModuleNotFoundError('no torch here', name='torch')\n"
        "sys.meta_path.insert(0, No())\n"
        "from moesim import cli\n"
        "cli.main(sys.argv[1:])\n"
    )
    run = [sys.executable, "-c", code, "calibrate"]
    out = ["--out", str(tmp_path / "x.yaml")]
    measured = subprocess.run([*run, str(folder / "scenario.yaml"), *out], capture_output=True, text=True)
    assert measured.returncode == 2
    assert "install moesim[kernels]" in measured.stderr
    fitted = subprocess.run(
        [*run, "--from", str(folder / "p.json"), str(folder / "l.jsonl"), *out], capture_output=True, text=True
    )
    assert fitted.returncode == 0, fitted.stderr
    assert "Error on held-out points" in fitted.stdout
    assert load_profile(tmp_path / "x.yaml").kind == "measured"


def test_plan_only_writes_the_plan_and_says_how_to_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert moesim("calibrate", str(folder / "scenario.yaml"), "--device", "cuda", "--plan-only", str(path)) == 0
    said = capsys.readouterr().out
    assert "moesim_kernels.bench" in said
    assert "--from" in said
    assert load_plan(path).device == "cuda"


def test_the_profile_comes_as_json_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "l.jsonl", tmp_path / "l.jsonl")
    arguments = ("--from", str(folder / "p.json"), str(tmp_path / "l.jsonl"), "--out", str(tmp_path / "x.yaml"))
    assert moesim("calibrate", *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "x"
