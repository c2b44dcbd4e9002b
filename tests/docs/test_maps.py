"""docs/maps.md: its commands run, and print what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
PAGE = (ROOT / "docs" / "maps.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```\n```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def recording(folder: Path) -> None:
    """A recording of mode stat: a ring of 64 rows, 40 of them filled, 6 layers of which the first is dense."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    weight_LE = 1 / (1 + np.arange(16.0)) * np.ones((6, 1))
    count = rng.poisson(200 * weight_LE / weight_LE.mean(axis=1, keepdims=True), (64, 6, 16))
    count[:, 0], count[40:] = 0, 0
    data = {"rank": 0, "logical_count": torch.from_numpy(count.astype(np.int32))}
    folder.mkdir()
    torch.save(data, folder / "expert_distribution_recorder_1764.25.pt")


@pytest.mark.parametrize(("script", "printed"), BLOCKS)
def test_commands_print_what_the_page_says(script: str, printed: str, tmp_path: Path) -> None:
    if "../shared" in script and not SHARED.is_dir():
        pytest.skip("reads recorded data from ../shared, which is not here")
    clone = tmp_path / "clone"
    clone.mkdir()
    if SHARED.is_dir():
        (tmp_path / "shared").symlink_to(SHARED)
    if "recorded/" in script:
        recording(clone / "recorded")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, "MOESIM_HOME": str(ROOT)}
    command = ["bash", "-e", "-u", "-c", script]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(printed.rstrip("\n")), done.stdout
    folder = re.search(r"--out (\S+)", script)
    if folder is not None:
        assert (clone / folder[1] / "placement.json").is_file()


def test_every_command_of_the_page_is_run() -> None:
    assert sum(script.count("moesim place") for script, _ in BLOCKS) == len(re.findall(r"^moesim ", PAGE, re.MULTILINE))
