"""CONTRIBUTING.md's walks "add a policy in one file" and "add a router in one file", walked."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTION = TEXT.split("## Add a policy in one file")[1].split("\n## ")[0]
ROUTER = TEXT.split("## Add a router in one file")[1].split("\n## ")[0]
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


def blocks(language: str, section: str = SECTION) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def moesim(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`moesim` run from `folder`, whose own `moesim` package, if it has one, comes first."""
    environment = {**os.environ, "MOESIM_HOME": str(ROOT), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "moesim.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def summary(folder: Path, *arguments: str) -> dict[str, Any]:
    done = moesim(folder, "simulate", "walk.yaml", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)["summary"]
    return report


def hottest(folder: Path, *arguments: str) -> float:
    """Load of the hottest rank over its layer's mean."""
    return float(summary(folder, *arguments)["balance"]["hottest"]["max_over_mean_load"])


def run_tests(folder: Path, *arguments: str) -> str:
    """Output of pytest run in `folder`, which passes."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the walks' files in it."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "moesim", folder / "moesim", ignore=shutil.ignore_patterns("__pycache__"))
    for section in (SECTION, ROUTER):
        where = re.search(r"Write `(moesim/\w+/\w+\.py)`", section)
        assert where is not None
        (folder / where[1]).write_text(blocks("python", section)[0])
    presets = folder / "moesim/routing/presets.yaml"
    presets.write_text(presets.read_text() + "\n" + blocks("yaml", ROUTER)[1])
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
    assert "1 passed" in run_tests(clone, "test_snake.py")


def test_the_same_class_as_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "walk.yaml").write_text(json.dumps(SCENARIO))
    (tmp_path / "my_policies.py").write_text(blocks("python")[0] + "\n\n" + blocks("python")[2])
    command = blocks("sh")[1].split()
    assert command[:3] == ["moesim", "simulate", "scenario.yaml"]
    assert hottest(tmp_path, *command[3:]) < hottest(tmp_path)


def test_the_router_of_the_walk_runs_in_a_scenario(clone: Path) -> None:
    as_written = blocks("yaml", ROUTER)[0]
    assert as_written.split() == ["policies:", "routing:", "{kind:", "close_call,", "margin:", "0.5}"]
    command = shlex.split(blocks("sh", ROUTER)[0])
    assert command[:3] == [".venv/bin/moesim", "simulate", "workloads/quickstart.yaml"]
    assert command[3:] == ["--set", "policies.routing={kind: close_call, margin: 0.5}"]
    wide, close, cautious = (
        float(summary(clone, "--set", f"policies.routing={router}")["routing"]["experts_per_token"])
        for router in ("{kind: close_call, margin: 50.0}", command[4].partition("=")[2], "cautious")
    )
    assert wide == 6  # the model's K
    assert 1 <= cautious < close < wide
    done = moesim(clone, "check", "walk.yaml", "--set", "policies.routing={kind: close_call, margn: 1.0}")
    assert done.returncode == 2
    assert "Did you mean 'margin'?" in done.stderr


def test_the_router_of_the_walk_is_held_to_its_promises(clone: Path) -> None:
    (clone / "test_close_call.py").write_text(blocks("python", ROUTER)[1])
    assert "1 passed" in run_tests(clone, "test_close_call.py")
    shutil.copy(ROOT / "tests/conformance/test_routing.py", clone / "test_conformance.py")
    found = re.search(r"(\d+) passed", run_tests(clone, "test_conformance.py", "-k", "close_call or cautious"))
    assert found is not None
    assert int(found[1]) > 30
