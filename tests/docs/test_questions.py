"""docs/questions.md: every command runs, and what it prints has the shape of what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "questions.md").read_text()
SECTION = re.compile(
    r"^## (\d+)\. (.+?)\n\nAsked in <(.+?)>\.\n\n```sh\n(.+?)\n```\n\n```text\n(.*?)\n```\n\n(.+?)(?=\n\n## |\Z)",
    re.MULTILINE | re.DOTALL,
)
SECTIONS = {int(number): rest for number, *rest in SECTION.findall(PAGE)}
QUICK = (3,)
"""run by the fast tests: the others take some seconds each"""


def shape(line: str) -> str:
    """A line without its numbers and marks."""
    return re.sub(r"\s+", " ", re.sub(r"[-+±]?\d[\d.,]*", "#", line.replace("*", " ").replace("=", " "))).strip()


def test_the_page_has_the_eleven_questions() -> None:
    assert tuple(SECTIONS) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 15)
    for _, link, command, _, _ in SECTIONS.values():
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", link)
        assert "\n" not in command
        assert command.startswith("moesim ")
        (named,) = re.findall(r"workloads/\w+\.yaml", command)
        assert (ROOT / named).is_file()


@pytest.mark.parametrize("number", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SECTIONS])
def test_a_command_prints_what_the_page_shows(number: int) -> None:
    _, _, command, shown, _ = SECTIONS[number]
    environment = {**os.environ, "COLUMNS": "80"}
    arguments = [sys.executable, "-m", "moesim.cli", *shlex.split(command)[1:]]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if number == 3 else 0), done.stderr
    printed = [shape(line) for line in (done.stdout or done.stderr).splitlines()]
    at = 0
    for line in filter(None, map(shape, shown.splitlines())):
        assert line in printed[at:], f"{line!r} is not printed, or not in this order"
        at = printed.index(line, at) + 1
