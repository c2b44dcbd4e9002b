"""README.md: every block of commands runs, and the pasted output has the shape of the real one."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHARED = ROOT.parent / "shared"
BLOCKS = [b for b in re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if "make " not in b]


def shell(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a folder that looks like the clone, so that what it writes stays there."""
    place = folder / "clone"
    place.mkdir()
    for name in ("workloads", "hw_profiles"):
        (place / name).symlink_to(ROOT / name)
    if SHARED.is_dir():
        (folder / "shared").symlink_to(SHARED)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = ["bash", "-e", "-u", "-o", "pipefail", "-c", script]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_commands_of_the_readme_run(block: int, tmp_path: Path) -> None:
    script = BLOCKS[block]
    if "../shared" in script and not SHARED.is_dir():
        pytest.skip("reads recorded data from ../shared, which is not here")
    done = shell(tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for written in re.findall(r"(?:--timeline|>) (\S+)", script):
        assert (tmp_path / "clone" / written).stat().st_size > 1000


def test_every_verb_has_an_example() -> None:
    shown = {words[1] for block in BLOCKS for line in block.splitlines() if (words := line.split())[:1] == ["moesim"]}
    listed = subprocess.run(
        [sys.executable, "-m", "moesim.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout.split("Commands:")[1]
    assert shown == {line.split()[0] for line in listed.splitlines() if re.match(r"  \w", line)}


def test_the_pasted_summary_has_the_parts_of_a_real_one(tmp_path: Path) -> None:
    pasted = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[0]
    done = shell(tmp_path, "moesim simulate workloads/quickstart.yaml --set requests.num_requests=20")
    assert done.returncode == 0, done.stderr

    def parts(text: str) -> list[str]:
        """The head, and the lines that start a section."""
        lines = text.splitlines()
        return lines[:4] + [after for before, after in itertools.pairwise(lines) if not before]

    assert parts(pasted) == parts(done.stdout)


def test_the_table_of_scenarios_is_the_folder() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", README.split("| scenario in `workloads/` |")[1].split("\n\n")[0], re.M))
    assert named == {path.stem for path in (ROOT / "workloads").glob("*.yaml")}


def test_the_table_of_speed_is_the_published_one() -> None:
    published = (ROOT / "results" / "validation" / "speed.md").read_text().splitlines()
    pasted = README.split("<!-- speed:")[1].split("<!-- end of speed -->")[0].splitlines()[1:]
    assert [line.lstrip("#") for line in pasted if line] == [
        line.lstrip("#") for line in "\n".join(published[1:]).split("\n## Other simulators")[0].splitlines() if line
    ]
