"""docs/rebalancing.md: its block names every key there is, its first command prints what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from moesim.rebalance_spec import RebalanceSpec

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rebalancing.md").read_text()


def test_the_block_has_every_key_and_is_valid() -> None:
    block = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])["rebalance"]
    assert set(block) == set(RebalanceSpec.model_fields)
    RebalanceSpec.model_validate(block)


def test_the_output_is_that_of_the_command(tmp_path: Path) -> None:
    command = re.findall(r"```sh\nmoesim (.*?)\n", PAGE)[0].split()
    done = subprocess.run(
        [sys.executable, "-m", "moesim.cli", *command, "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (shown,) = re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL)
    assert shown in done.stdout
