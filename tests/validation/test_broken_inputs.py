"""Every broken scenario, trace and data file: one clear message, exit code 2 or 3, no traceback, nothing written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moesim import cli
from tests.validation.broken_inputs import BASE, CASES, Case, trace

_PROCESSES = {
    "yaml-alias-bomb", "yaml-python-tag", "value-parallel.tp=0", "together-ep-not-dividing-ranks",
    "infeasible-deepseek-v3-bf16-on-8", "azure-cut-off-row", "routing-objects", "config-deep",
}  # fmt: skip
"""Cases that also run as a process of their own."""


def _prepare(case: Case, folder: Path) -> list[str]:
    text = case.text
    (folder / "s.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    for name, content in case.files:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
    return ["simulate", "s.yaml", *(part for text in case.sets for part in ("--set", text))]


def _judge(case: Case, code: object, out: str, err: str, folder: Path) -> None:
    assert code == case.code, (code, err)
    assert out == ""
    assert "Traceback" not in err
    assert case.words in err
    start = "infeasible: " if case.code == 3 else "error: "
    lines = err.splitlines()
    assert lines
    assert len(lines) <= 60
    assert all(line.startswith((start, "note: ")) and len(line) < 1500 for line in lines), err
    assert not (folder / "results").exists()


def test_there_are_at_least_200_and_each_has_its_name() -> None:
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_broken_input(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    arguments = _prepare(case, tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    _judge(case, ended.value.code, *capsys.readouterr(), tmp_path)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in _PROCESSES], ids=lambda c: c.name)
def test_broken_input_as_a_process(case: Case, tmp_path: Path) -> None:
    import subprocess

    arguments = _prepare(case, tmp_path)
    command = [sys.executable, "-m", "moesim.cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    _judge(case, done.returncode, done.stdout, done.stderr, tmp_path)


def test_what_the_cases_are_made_from_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(BASE)
    np.savez(tmp_path / "t.npz", expert_ids=trace())
    for more in ([], ["--set", "routing={path: t.npz}"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["simulate", "s.yaml", "-q", *more])
        assert ended.value.code == 0
