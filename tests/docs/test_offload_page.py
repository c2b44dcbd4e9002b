"""docs/offload.md: its block names every key, its table every kind, its scenarios exist, its first command prints what
the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moesim.policy import policy_kinds
from moesim.scenario.load import load_scenario
from moesim.tiers_spec import CpuSpec, TiersSpec

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "offload.md").read_text()
SHIPPED = sorted((ROOT / "workloads").glob("offload_*.yaml"))


def test_the_block_has_every_key_and_is_valid() -> None:
    block = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])["tiers"]
    assert set(block) == set(TiersSpec.model_fields)
    assert set(block["cpu"]) | {"profile"} == set(CpuSpec.model_fields)
    TiersSpec.model_validate(block)


@pytest.mark.parametrize("family", ["offload", "eviction", "prefetch", "precision", "rebatching", "rerouting"])
def test_the_table_names_every_kind(family: str) -> None:
    (row,) = re.findall(rf"^\| `{family}`: .*? \| (.*) \|$", PAGE, re.MULTILINE)
    assert set(re.findall(r"`([a-z_]+)`", row)) == set(policy_kinds(family))


def test_every_scenario_is_on_the_page_and_is_read() -> None:
    for file in SHIPPED:
        assert f"workloads/{file.name}" in PAGE
        if "../shared" not in file.read_text() or (ROOT.parent / "shared").is_dir():
            assert load_scenario(file).tiers is not None
    assert len(SHIPPED) == len(set(re.findall(r"workloads/(offload_\w+)\.yaml", PAGE)))


def test_the_output_is_that_of_the_command(tmp_path: Path) -> None:
    command = re.findall(r"```sh\nmoesim (.*?)\n", PAGE)[0].split()
    done = subprocess.run(
        [sys.executable, "-m", "moesim.cli", *command, "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (shown,) = re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL)
    assert shown in done.stdout
