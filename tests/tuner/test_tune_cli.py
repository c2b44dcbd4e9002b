"""The real command, real scenarios: the same study whatever the workers and the hash seed; faults in one line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "benchmarks" / "tuner" / "spaces" / "offload_cache.yaml"
SHORT = ["--trials", "10", "--set", "tune.judge.seeds=2", "--set", "tune.judge.finalists=1"]


def moesim(folder: Path, *words: object, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "tuner"))
    return subprocess.run(
        [sys.executable, "-m", "moesim.cli", *map(str, words)],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
    )  # fmt: skip


def test_any_number_of_workers_and_any_hash_seed_find_the_same_study(tmp_path: Path) -> None:
    studies, reports = [], []
    for workers, hash_seed in ((1, "0"), (2, "1"), (4, "random")):
        folder = tmp_path / str(workers)
        folder.mkdir()
        done = moesim(folder, "tune", SPACE, *SHORT, "--workers", workers, "--json", hash_seed=hash_seed)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
        kept = moesim(folder, "tune", "export", "--canonical", hash_seed=hash_seed)
        assert kept.returncode == 0, kept.stderr
        studies.append(kept.stdout)
    assert studies[0] == studies[1] == studies[2]
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["search"]["trials"] == 10
    assert reports[0]["judgement"]["winner"] is not None


def test_a_study_without_a_feasible_point_says_what_excludes_what(tmp_path: Path) -> None:
    limit = ["--set", "tune.constraints={ttft_p99_ms: {max: 1}}", "--set", "tune.judge.seeds=2"]
    done = moesim(tmp_path, "tune", SPACE, "--trials", "6", *limit, "-q")
    assert done.returncode == 0, done.stderr
    report = moesim(tmp_path, "tune", "report").stdout
    assert "ttft_p99_ms" in report
    assert "0 feasible" in report
    again = moesim(tmp_path, "tune", "export", "--out", "out")
    assert (again.returncode, "no feasible trial" in again.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("tune.space={parallel.epp: {choices: [1]}}", "Did you mean parallel.ep?"),
        ("tune.space={tiers.staging: {range: [4, 2]}}", "range"),
        ("tune.objectives=[output_tok_per_sec]", "Did you mean output_tok_per_s?"),
        ("tune.constraints={ttft_p99_ms: {min: 5, max: 1}}", "exchange min and max"),
        ("tune=null", "there is no `tune:` section"),
    ],
)
def test_a_fault_of_the_file_is_one_line_and_leaves_nothing(tmp_path: Path, changed: str, told: str) -> None:
    done = moesim(tmp_path, "tune", SPACE, "--set", changed)
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for words, told in (
        (["report"], "no study is kept there"),
        (["resume", "nothing"], "nothing"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
    ):
        done = moesim(tmp_path, "tune", *words)
        assert (done.returncode, told in done.stderr) == (2, True), (words, done.stderr)
    assert moesim(tmp_path, "tune", "status").stdout.startswith("no study is kept there")
