"""What a run says of the machine and of itself: facts, pressure, the progress line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from moesim_kernels.bench.machine import IDENTITY, facts, kernel_hash
from moesim_kernels.bench.pool import Device
from moesim_kernels.bench.pressure import cpu_pressure
from moesim_kernels.bench.progress import Progress, Status, span

STATUS = Status(samples=25, wanted=100, finished=3, cases=12, left_s=75.0, now="moe")


def test_pressure_is_read_or_absent(tmp_path: Path):
    path = tmp_path / "cpu"
    path.write_text("some avg10=12.50 avg60=1.00 avg300=0.10 total=9\nfull avg10=0.00 avg60=0.00 total=0\n")
    assert cpu_pressure(path) == 12.5
    path.write_text("something else\n")
    assert cpu_pressure(path) is None
    path.write_bytes(b"\xff\xfe")
    assert cpu_pressure(path) is None
    assert cpu_pressure(tmp_path / "none") is None


def test_kernel_hash_follows_names_and_sources(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = kernel_hash(tmp_path)
    (tmp_path / "note.txt").write_text("no source")
    assert kernel_hash(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    second = kernel_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, kernel_hash(tmp_path)}) == 3
    assert len(kernel_hash()) == 16


def test_facts_are_json_and_hold_what_makes_a_log_another_machines():
    pytest.importorskip("torch")
    found = facts(Device("cpu", threads=1))
    assert json.loads(json.dumps(found)) == found
    assert set(IDENTITY) <= set(found)
    assert (found["device"], found["threads"], found["cuda"]) == ("cpu", 1, None)
    assert found["cpu"]
    assert {"cudnn", "numpy", "python", "date", "psi"} <= set(found)
    steady = {key: value for key, value in found.items() if key not in ("date", "psi")}
    assert {key: facts(Device("cpu"))[key] for key in steady} == steady


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (-3, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")],
)
def test_spans(seconds: float, text: str):
    assert span(seconds) == text


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        bar = Progress(stream)
        bar(STATUS)
        bar(STATUS)  # at once: left out
        bar.end()
    assert terminal.getvalue() == "\r[######..................]  25%  3/12 cases  1 min 15 s left  moe\n"
    assert pipe.getvalue() == ""
