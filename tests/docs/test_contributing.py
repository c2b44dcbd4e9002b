"""CONTRIBUTING.md's walk "add a policy in one file", walked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "CONTRIBUTING.md").read_text().split("## Add a policy in one file")[1].split("\n## ")[0]
SCENARIO = {
    "name": "walk",
    "model": "deepseek-v2-lite",
    "cluster": {"device": "h100_sxm_datasheet", "gpus_per_node": 8},
    "parallel": {"dp": 8, "ep": 8},
    "requests": {
        "format": "poisson", "rate_per_s": 50, "num_requests": 20, "prompt_tokens": 200, "output_tokens": 20,
    },
    "routing": {"popularity_zipf": 1.0, "pool_tokens": 2048},
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


def moesim(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`moesim` run from `folder`, whose own `moesim` package, if it has one, comes first."""
    environment = {**os.environ, "MOESIM_HOME": str(ROOT), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "moesim.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def hottest(folder: Path, *arguments: str) -> float:
    """Load of the hottest rank over its layer's mean."""
    done = moesim(folder, "simulate", "walk.yaml", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return float(report["summary"]["balance"]["hottest"]["max_over_mean_load"])


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the walk's file in it."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "moesim", folder / "moesim", ignore=shutil.ignore_patterns("__pycache__"))
    where = re.search(r"Write `(moesim/placement/\w+\.py)`", SECTION)
    assert where is not None
    (folder / where[1]).write_text(blocks("python")[0])
    (folder / "walk.yaml").write_text(json.dumps(SCENARIO))
    return folder


def test_the_file_alone_adds_the_policy(clone: Path) -> None:
    as_written = blocks("yaml")[0]
    assert as_written.split() == ["policies:", "placement:", "{kind:", "snake,", "turn:", "true}"]
    dealt = hottest(clone, "--set", "policies={placement: {kind: snake, turn: true}}")
    assert dealt < hottest(clone, "--set", "policies.placement={kind: snake, turn: false}")
    assert dealt < hottest(clone)


def test_the_schema_lists_it_and_mistakes_are_answered(clone: Path) -> None:
    assert '"snake"' in moesim(clone, "schema").stdout
    done = moesim(clone, "check", "walk.yaml", "--set", "policies.placement={kind: snake, trun: false}")
    assert done.returncode == 2
    assert "Did you mean 'turn'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_hand_worked_case_of_the_walk_passes(clone: Path) -> None:
    (clone / "test_snake.py").write_text(blocks("python")[1])
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "test_snake.py"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_same_class_as_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "walk.yaml").write_text(json.dumps(SCENARIO))
    (tmp_path / "my_policies.py").write_text(blocks("python")[0] + "\n\n" + blocks("python")[2])
    command = blocks("sh")[1].split()
    assert command[:3] == ["moesim", "simulate", "scenario.yaml"]
    assert hottest(tmp_path, *command[3:]) < hottest(tmp_path)
