"""`moesim validate` whole: real kernels on a tiny model, a sealed prediction, judged again, stopped and gone on."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from moesim_kernels.validate.assemble import judge_folder, write_report
from moesim_kernels.validate.candidates import Ranked, chosen
from moesim_kernels.validate.command import validate
from moesim_kernels.validate.judge import measured_of
from moesim_kernels.validate.pick import judge_candidates
from moesim_kernels.validate.predict import Predicted, Predictions, read_predictions, seal_of
from moesim_kernels.validate.record import Record, Sample, read_record
from moesim_kernels.validate.serving import judge_served_runs
from moesim_kernels.validate.session import Options, Session
from moesim_kernels.validate.terminal import show

from moesim.errors import BadInput

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
expert_dtype: fp32
kv_dtype: fp32
activation_dtype: fp32
"""
SCENARIO = """\
name: tiny
seed: 3
model: model.yaml
cluster: {device: cpu_2core, nodes: 1, gpus_per_node: 1, host_memory_gib: 8}
requests: {format: poisson, rate_per_s: 200, num_requests: 12, prompt_tokens: 24, output_tokens: 6}
routing: {popularity_zipf: 0.8, fidelity: token}
engine: {max_num_seqs: 4, max_num_batched_tokens: 32, max_model_len: 128, cuda_graph: false, host_overhead_us: 0}
"""
FILES = ("predictions.json", "settings.json", "measured.jsonl", "report.json", "report.md", "options.json")


def _run(*arguments: str) -> int:
    """The verb in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(validate).main(args=list(arguments), prog_name="moesim validate")
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scenario of a tiny model, and a profile that the shipped one stands for."""
    folder = tmp_path_factory.mktemp("validate")
    (folder / "model.yaml").write_text(MODEL)
    (folder / "tiny.yaml").write_text(SCENARIO)
    return folder / "tiny.yaml"


PROFILE = Path("hw_profiles/cpu_epyc_1thread.yaml")


@pytest.fixture(scope="module")
def made(scenario: Path) -> tuple[Path, int]:
    """The folder of a whole validation, and its exit code."""
    out = scenario.parent / "results"
    code = _run(
        str(scenario), "--profile", str(PROFILE), "--settings", "12", "--rounds", "3", "--device", "cpu",
        "--no-serve", "--out", str(out), "-q",
    )  # fmt: skip
    (folder,) = out.iterdir()
    return folder, code


def test_a_validation_leaves_everything_that_it_was_judged_by(made: tuple[Path, int]) -> None:
    folder, code = made
    assert re.fullmatch(r"validate-tiny-[0-9a-f]{12}", folder.name)
    for name in FILES:
        assert (folder / name).is_file(), name
    assert not list(folder.glob(".*"))
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"]["exit_code"] == code
    assert code in (0, 4)
    assert report["settings"] == {"measured": 12, "predicted": 12, "rounds": [3, 3]}
    assert {p["part"] for p in report["parts"]} >= {"own", "experts", "attention", "head"}
    assert report["served"] is None
    assert any("made on" in note for note in report["notes"]) or any("assumed" in n for n in report["notes"])


def test_predictions_are_sealed_and_the_measuring_process_saw_no_price(made: tuple[Path, int]) -> None:
    folder, _ = made
    seal = seal_of(folder / "predictions.json")
    head = json.loads((folder / "measured.jsonl").read_text().split("\n")[0])
    assert head["seal"] == seal == json.loads((folder / "report.json").read_text())["seal"]
    order = [(folder / name).stat().st_mtime_ns for name in ("settings.json", "predictions.json", "measured.jsonl")]
    assert order == sorted(order)
    # what the process was given: the scenario on its own device, steps by request and position, and no ns anywhere
    given = (folder / "scenario.yaml").read_text() + (folder / "measured.settings.json").read_text()
    assert "cpu_2core" in given
    assert "cpu_epyc" not in given
    assert "_ns" not in given
    record = read_record(folder / "measured.jsonl", seal)
    assert {s.setting for s in record.samples} == {
        p.name for p in read_predictions(folder / "predictions.json").settings
    }


def test_judging_again_gives_the_same_report_without_torch(made: tuple[Path, int], tmp_path: Path) -> None:
    folder, code = made
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    for name in ("report.json", "report.md", "scenario.yaml"):
        (copy / name).unlink()
    assert _run("judge", str(copy), "-q") == code
    assert (copy / "report.json").read_text() == (folder / "report.json").read_text()


def test_a_prediction_that_was_changed_afterwards_is_refused(made: tuple[Path, int], tmp_path: Path) -> None:
    copy = tmp_path / "changed"
    shutil.copytree(made[0], copy)
    text = (copy / "predictions.json").read_text()
    (copy / "predictions.json").write_text(text.replace('"tokens":', '"tokens": ', 1))
    with pytest.raises(BadInput, match="written or changed after it was begun"):
        judge_folder(copy)
    with pytest.raises(BadInput, match="holds no predictions"):
        judge_folder(tmp_path)


@pytest.mark.slow
def test_a_stopped_measurement_goes_on_and_nothing_is_measured_twice(
    scenario: Path, made: tuple[Path, int], tmp_path: Path
) -> None:
    folder, _ = made
    out = tmp_path / "results"
    shutil.copytree(folder.parent, out)
    record = out / folder.name / "measured.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:20]) + lines[20][:9])  # killed within a line
    sealed = (out / folder.name / "predictions.json").read_bytes()
    options = Options(scenario, (), PROFILE, settings=12, rounds=3, device="cpu", serve=False, quiet=True)
    session = Session(options, out)
    assert session.folder.name == folder.name
    session.open()
    predictions = session.predictions(session.profile())
    session.measure(predictions, again=False)
    assert (out / folder.name / "predictions.json").read_bytes() == sealed
    assert record.read_text().startswith("".join(lines[:20]))
    assert len(read_record(record).samples) == 36


def test_a_second_measurement_is_compared_with_the_first(made: tuple[Path, int], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made[0], copy)
    shutil.copy(copy / "measured.jsonl", copy / "measured-2.jsonl")
    report = judge_folder(copy)
    again = report["again"][0]
    assert (again["record"], again["settings"], again["inside"], again["shift"]) == ("measured-2.jsonl", 12, 12, 0.0)
    assert again["agree"]
    write_report(copy, report, "a command")
    page = (copy / "report.md").read_text()
    assert page.startswith("# moesim validate tiny\n\n**" + report["verdict"]["sentence"])
    assert "Against the first measurement" in page


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_fit_and_say_the_verdict_first(made: tuple[Path, int], width: int) -> None:
    report = json.loads((made[0] / "report.json").read_text())
    text = io.StringIO()
    show(report, text, width)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    shown = " ".join(" ".join(lines).split())
    assert shown.startswith(f"tiny seed 3 {report['verdict']['sentence']}")
    for word in ("Error by part", "Order of the steps", "bare roofline", "Found beside the bounds", "Worst error"):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "parallel.tp=2", "--set", "cluster.gpus_per_node=2", "--set", "parallel.ep=2"), "tp=1"),
        (("--calibrate-budget", "0.1s", ), "--calibrate-budget"),
        (("--profile", "x.yaml", "--calibrate-budget", "9s"), "leave out one"),
        (("--set", "routing.fidelity=count"), "token"),
        (("--device", "tpu"), "cpu or cuda"),
        (("--profile", "nowhere.yaml"), "no such file"),
        (("--profile", "README.md"), "not YAML"),
        (("--set", "model.weight_dtype=fp8"), "the kernels here run"),
    ],
)  # fmt: skip
def test_what_cannot_be_validated_is_one_clear_error(
    scenario: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        typer.main.get_command(validate).main(
            args=[str(scenario), "--device", "cpu", "--out", str(tmp_path / "r"), *arguments], standalone_mode=False
        )
    assert not (tmp_path / "r").exists()


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--help") == 0
    said = capsys.readouterr().out
    assert "SCENARIO" in said
    assert "judge DIR" in said


@pytest.mark.slow
def test_a_profile_with_twice_the_memory_bandwidth_is_caught(tmp_path: Path) -> None:
    """Calibrate for real, then predict with an edited profile; its operators at fault are those that read memory."""
    out = tmp_path / "results"
    assert _run("workloads/validate_cpu.yaml", "--calibrate-budget", "90s", "--device", "cpu", "--no-serve", "--out",
                str(out), "-q") in (0, 4)  # fmt: skip
    (honest,) = out.iterdir()
    text = (honest / "profile.yaml").read_text()
    doubled = re.sub(r"hbm_gb_per_s: ([\d.]+)", lambda m: f"hbm_gb_per_s: {2 * float(m[1])}", text)
    (tmp_path / "doubled.yaml").write_text(doubled)
    shutil.copy(honest / "profile.json", tmp_path / "profile.json")
    code = _run("workloads/validate_cpu.yaml", "--profile", str(tmp_path / "doubled.yaml"), "--device", "cpu",
                "--no-serve", "--out", str(tmp_path / "wrong"), "-q")  # fmt: skip
    (folder,) = (tmp_path / "wrong").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert code == 4
    assert report["verdict"]["state"] == "wrong profile"
    assert {f["operator"] for f in report["wrong"]} & {"gemm", "moe", "attention_decode", "elementwise"}
    assert all(f["factor"] > 1.2 for f in report["wrong"])
    wrong = {f["part"] for f in json.loads((honest / "report.json").read_text())["wrong"]}
    assert not wrong & {"experts", "head"}, "an honest profile was called wrong"


@pytest.mark.slow
def test_a_second_measurement_and_served_runs_join_the_report(scenario: Path, tmp_path: Path) -> None:
    code = _run(str(scenario), "--profile", str(PROFILE), "--settings", "12", "--rounds", "3", "--device", "cpu",
                "--again", "--out", str(tmp_path), "-q")  # fmt: skip
    (folder,) = tmp_path.iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert code == report["verdict"]["exit_code"]
    assert report["again"][0]["settings"] == 12
    assert report["served"]["runs"] == 2
    assert json.loads((folder / "served-1.json").read_text())["seal"] == report["seal"]


# ---- served


def _served(folder: Path, number: int, requests: dict[str, list[int]], seal: str = "s", clock: str = "wall") -> None:
    run = {"seal": seal, "clock": clock, "psi": [1.0, None], "requests": requests, "reference_ns": [700.0, 710.0]}
    (folder / f"served-{number}.json").write_text(json.dumps(run))


REQUESTS: dict[str, list[int]] = {
    "arrival_ns": [0, 10, 20],
    "first_token_ns": [100, 110, 140],
    "finish_ns": [3000, 4100, 5400],
    "output_tokens": [3, 4, 5],
}


def test_served_runs_are_judged_by_their_own_bounds(tmp_path: Path) -> None:
    assert judge_served_runs(REQUESTS, tmp_path, "s") is None
    slower = {k: [round(x * 1.1) for x in v] if k.endswith("ns") else v for k, v in REQUESTS.items()}
    for number in (1, 2):
        _served(tmp_path, number, slower)
    found = judge_served_runs(REQUESTS, tmp_path, "s")
    assert found is not None
    rows = {b["figure"].split(",")[0]: b for b in found["bounds"]}
    # everything takes 1.1 times as long: off by 1 - 1 / 1.1 = 9.1 %, where 8 % and 15 % are the bounds
    assert rows["makespan"]["found"] == pytest.approx(1 - 1 / 1.1, abs=1e-4)
    assert rows["makespan"]["binds"]
    assert not rows["makespan"]["met"]
    assert rows["time to first token (TTFT)"]["met"]
    elsewhere = judge_served_runs(REQUESTS, tmp_path, "s", calibrated_ns=1000.0)
    assert elsewhere is not None
    assert {b["why_not"] for b in elsewhere["bounds"]} == {"speed changed"}
    assert elsewhere["speed_shift"] == pytest.approx(0.705)
    there = judge_served_runs(REQUESTS, tmp_path, "s", calibrated_ns=690.0)
    assert there is not None
    assert there["bounds"] == found["bounds"]
    _served(tmp_path, 2, slower, clock="cpu")
    again = judge_served_runs(REQUESTS, tmp_path, "s")
    assert again is not None
    assert not any(b["binds"] for b in again["bounds"])


def test_served_runs_of_another_seal_or_none_are_refused(tmp_path: Path) -> None:
    _served(tmp_path, 1, REQUESTS, seal="other")
    with pytest.raises(BadInput, match="another seal"):
        judge_served_runs(REQUESTS, tmp_path, "s")
    broken: list[dict[str, Any]] = [{**REQUESTS, "finish_ns": [1]}, {**REQUESTS, "finish_ns": ["a", "b", "c"]}, {}]
    for wrong in broken:
        _served(tmp_path, 1, wrong)
        with pytest.raises(BadInput, match="no record of a served run"):
            judge_served_runs(REQUESTS, tmp_path, "s")


# ---- candidates


def _ranked(values: list[float], default: int) -> list[Ranked]:
    return [Ranked(n, (f"a={n}",), v, n == default) for n, v in enumerate(values)]


def test_candidates_are_best_middle_random_and_the_default_each_once() -> None:
    found = chosen(_ranked([float(x) for x in range(30)], default=29), 5, seed=1)
    roles = [c.role for c in found]
    assert [c.number for c in found if c.role == "best"] == [0, 1, 2, 3, 4]
    assert [c.number for c in found if c.role == "middle"] == [13, 14, 15, 16, 17]
    assert roles.count("random") in (4, 5)
    assert found[-1].number == 29
    assert found[-1].role in ("default", "random")
    assert len({c.number for c in found}) == len(found)
    assert [c.value for c in found] == sorted(c.value for c in found)
    assert chosen(_ranked([float(x) for x in range(30)], default=29), 5, seed=1) == found


def test_trials_of_one_scenario_count_once_and_few_are_all_taken() -> None:
    twice = [Ranked(0, ("a=1",), 1.0, False), Ranked(1, ("a=1",), 1.0, True), Ranked(2, ("a=2",), 2.0, False)]
    found = chosen(twice, 5, seed=0)
    assert [c.number for c in found] == [1, 2]
    assert len(chosen(_ranked([3.0, 1.0, 2.0], default=0), 5, 0)) == 3


def _candidate(name: str, ns: float, roofline: float, default: bool) -> dict[str, Any]:
    return {
        "name": name, "role": "best", "trial": 0, "overrides": [], "study_value": ns, "default": default,
        "predicted_ns_per_token": ns, "roofline_ns_per_token": roofline, "settings": [f"{name}/a", f"{name}/b"],
        "fresh": [f"{name}/fresh"],
    }  # fmt: skip


def test_regret_of_the_pick_stands_beside_that_of_others() -> None:
    """Three candidates, predicted 100, 110, 130; measured 1.2, 1.0 and 1.0 times as long: 120, 110, 130."""
    names = ["c1/a", "c1/b", "c2/a", "c2/b", "c3/a", "c3/b", "c2/fresh"]
    rows = [Predicted(n, "decode", (), 1, 1, 1000, {}, {}, {}, 0.1, {}, (1.0, 0.0, 0.0, 0.0), {}, 1.0) for n in names]
    facts = {
        "study": "s", "objective": "tpot", "skipped": {},
        "candidates": [
            _candidate("c1", 100, 3, False), _candidate("c2", 110, 2, False), _candidate("c3", 130, 1, True)
        ],
    }  # fmt: skip
    factor = {"c1/a": 1.3, "c1/b": 1.1}
    samples = []
    for r in range(5):
        times = {n: 1000 * factor.get(n, 1.0) * (1 + 1e-5 * r) for n in names}
        samples += [Sample(n, r, ns, 0.0, {}, {}, None, None) for n, ns in times.items()]
    predictions = Predictions(tuple(rows), {"device": "cpu"})
    record = Record("s", 1, {}, samples)
    m = measured_of(predictions, record, names[:6])
    found = judge_candidates(m, facts, measured_of(predictions, record, names[6:]))
    assert found is not None
    assert (found["pick"], found["best"]) == ("c1", "c2")
    assert found["regret"]["pick"] == pytest.approx(120 / 110 - 1, abs=1e-3)
    assert found["regret"]["roofline"] == found["regret"]["default"] == pytest.approx(130 / 110 - 1, abs=1e-3)
    assert found["regret"]["random"] == pytest.approx(120 / 110 - 1, abs=1e-3)
    assert found["tau_without_ties"] == pytest.approx(1 / 3, abs=1e-4)
    assert [(b["figure"], b["met"], b["bound"]) for b in found["bounds"]] == [("regret of the pick", False, 0.02)]
    assert not found["bounds"][0]["binds"], "two steps of which one is off by 18 % say little of a run"
    assert [f["name"] for f in found["fresh"]] == ["c2"]
    assert judge_candidates(measured_of(predictions, record, ["c1/a", "c1/b"]), facts, None) is None
