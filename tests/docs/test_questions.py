"""docs/questions.md: every command runs, prints what has the shape of what the page shows, and gives its answer."""

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
QUICK = (3, 7, 8)
"""run by the fast tests: the others take 5 to 13 seconds of CPU each"""


def shape(line: str) -> str:
    """A line without its numbers and marks."""
    return re.sub(r"\s+", " ", re.sub(r"[-+±]?\d[\d.,]*", "#", line.replace("*", " ").replace("=", " "))).strip()


def row(printed: str, figure: str) -> list[tuple[float, str]]:
    """A figure of each candidate, in the table's order, and its mark: * best, = tie."""
    (line,) = re.findall(rf"^ *{re.escape(figure)} {{2,}}(.+)$", printed, re.MULTILINE)
    return [(float(value.replace(",", "")), mark) for value, mark in re.findall(r"([\d.,]+)%?(?: ([*=]))?", line)]


def values(printed: str, figure: str) -> list[float]:
    return [value for value, _ in row(printed, figure)]


def percents(text: str) -> list[float]:
    """Signed percentages, as shares."""
    return [float(found) / 100 for found in re.findall(r"([-+][\d.]+) %", text)]


def gain(printed: str, name: str) -> list[float]:
    """Gain of the first candidate whose line ends its name so, and the ends of its interval."""
    (line, *_) = [line for line in printed.splitlines() if re.match(rf"[*= ] .*{name} +[-+]", line)]
    return percents(line)


def is_enabled(printed: str) -> None:
    """1: enable, with a gain whose interval lies above 0."""
    head = printed.splitlines()[0]
    assert head.startswith("enable EPLB: ")
    assert min(percents(head)) > 0
    assert "bound by: balance" in printed


def is_none(printed: str) -> None:
    """2: most tokens a second without replicas, and the evenest; the fastest steps with most."""
    tokens, balance = values(printed, "output tokens/s"), values(printed, "max/mean load")
    assert tokens[0] > tokens[1] > tokens[2]
    assert balance[0] < balance[1] < balance[2]
    assert row(printed, "TPOT p50, ms")[2][1] == "*"


def names_legal_counts(printed: str) -> None:
    """3: 257 experts are none; the nearest that divide by 3 are."""
    assert "parallel.ep must divide the expert slots: ep=3, 256 experts" in printed
    (count,) = re.findall(r"num_redundant_experts (\d+)", printed)
    assert (256 + int(count)) % 3 == 0


def waits_cost(printed: str) -> None:
    """4: waiting for the plan costs more than a quarter, planning aside gains."""
    assert min(gain(printed, "async")) > 0
    assert max(gain(printed, " sync")) < -0.25
    (host, moving, waits) = re.findall(r"host ([\d,]+) ms, moving ([\d,]+) ms; steps wait ([\d,]+) ms", printed)[0]
    assert float(host) > 10 * float(moving) > float(waits)


def skips(printed: str) -> None:
    """5: rebalances that are waited for lose; most are to be skipped, which gains."""
    assert max(gain(printed, " sync")) < 0
    threshold, skipped, due, won = re.findall(
        r"mean/max load of ([\d.]+) and above: (\d+) of (\d+) fewer, (\S+) %", printed
    )[0]
    assert 0 < float(threshold) < 1
    assert int(skipped) > int(due) / 2
    assert float(won) > 25


def hardly_in_bytes(printed: str) -> None:
    """6: within 5 % by either way; less by NVLink, more by NIC; and more even."""
    (nvlink, nvlink_eplb), (nic, nic_eplb) = (values(printed, f"by {way}, GiB") for way in ("NVLink", "NIC"))
    assert 0.95 * nvlink < nvlink_eplb < nvlink
    assert nic < nic_eplb < 1.05 * nic
    assert values(printed, "max/mean load")[1] < 0.9 * values(printed, "max/mean load")[0]


def four_is_ahead(printed: str) -> None:
    """7: by a few per cent, in tokens a second and in the time of a step; and its load is more even."""
    four, eight = row(printed, "output tokens/s")
    assert four[0] > 1.02 * eight[0]
    assert (four[1], eight[1]) == ("*", "")
    assert values(printed, "TPOT p50, ms")[0] < values(printed, "TPOT p50, ms")[1]
    assert values(printed, "max/mean load")[0] < values(printed, "max/mean load")[1]


def whole_experts_are_ahead(printed: str) -> None:
    """8: EP 8 ahead of EP 1."""
    one, eight = row(printed, "output tokens/s")
    assert eight[0] > 1.02 * one[0]
    assert (one[1], eight[1]) == ("", "*")
    for figure in ("TTFT p50, ms", "TPOT p50, ms"):
        assert values(printed, figure)[1] < values(printed, figure)[0]


def gathering_is_ahead(printed: str) -> None:
    """10: all-gather, then DeepEP, then pairwise, and the profile does not tell them apart."""
    (deepep, pairwise, gather), time = row(printed, "output tokens/s"), values(printed, "TPOT p50, ms")
    assert gather[0] > deepep[0] > pairwise[0]
    assert gather[1] == deepep[1] == "="
    assert time[2] < time[0] < time[1]


def the_largest_does_not_fit(printed: str) -> None:
    """11: 32768 does not, by so many bytes; what fits takes more memory the larger it is."""
    needed, usable, missing = re.findall(
        r"32768:.*?([\d,]+)\s+bytes\s+are\s+needed,\s+([\d,]+)\s+are\s+usable.*?([\d,]{5,})\s+bytes\s+a\s+rank",
        printed, re.DOTALL,
    )[0]  # fmt: skip
    number = [int(text.replace(",", "")) for text in (needed, usable, missing)]
    assert number[0] > number[1]
    assert number[0] - number[1] <= number[2] < 1.01 * (number[0] - number[1])  # and room for some KV cache
    memory, tokens = values(printed, "HBM at peak, GiB"), values(printed, "output tokens/s")
    assert memory == sorted(memory)
    assert tokens == sorted(tokens)
    assert len(memory) == 3


def less_is_faster(printed: str) -> None:
    """15: padding is paid in full: the smaller the factor, the more tokens a second, and the more are dropped."""
    tokens, dropped = values(printed, "tokens trained/s"), values(printed, "dropped share")
    assert tokens[0] > tokens[1] > tokens[2]
    assert dropped[0] > dropped[1] > dropped[2]


def hardly_more_are_found(printed: str) -> None:
    """13: six times the experts gain a few per cent; the same number by popularity finds more than twice as many."""
    tokens, found = values(printed, "output tokens/s"), values(printed, "experts found there")
    assert 1 < tokens[1] / tokens[0] < 1.15
    assert found[0] < found[1] < 0.15
    assert found[2] > 2 * found[1]
    assert tokens[2] > 1.1 * tokens[1]


def so_many_layers_fit(printed: str) -> None:
    """14: fewer layers than the model has, and the flags of both engines for as many experts as fit."""
    held, total = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ([\d,]+) \(\d+%\)\s+fit", printed)[0])
    assert 0 < held < total == 48 * 128
    (on_cpu,) = re.findall(r"--n-cpu-moe (\d+) ", printed)
    (a_layer,) = re.findall(r"--kt-num-gpu-experts (\d+) ", printed)
    assert int(a_layer) == held // 48
    assert (48 - int(on_cpu)) * 128 <= held < (48 - int(on_cpu) + 1) * 128


ANSWERS = {
    1: is_enabled, 2: is_none, 3: names_legal_counts, 4: waits_cost, 5: skips, 6: hardly_in_bytes, 7: four_is_ahead,
    8: whole_experts_are_ahead, 10: gathering_is_ahead, 11: the_largest_does_not_fit,
    13: hardly_more_are_found, 14: so_many_layers_fit, 15: less_is_faster,
}  # fmt: skip


@pytest.mark.parametrize("number", SECTIONS)
def test_the_page_shows_the_answer_that_is_asked_for(number: int) -> None:
    ANSWERS[number](SECTIONS[number][3])


def test_the_page_has_the_thirteen_questions() -> None:
    assert tuple(SECTIONS) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 14, 15)
    for _, link, command, _, _ in SECTIONS.values():
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", link)
        assert "\n" not in command
        assert command.startswith("moesim ")
        (named,) = re.findall(r"workloads/\w+\.yaml", command)
        assert (ROOT / named).is_file()


@pytest.mark.parametrize("number", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SECTIONS])
def test_a_command_prints_what_the_page_shows_and_its_answer(number: int) -> None:
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
    ANSWERS[number](done.stdout or done.stderr)
