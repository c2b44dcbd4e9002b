"""The process that reads .pt files: what it hands on, and what it refuses, byte by real byte.

`main` runs here in this process, with the limits that it would set left out; tests/unit/traces/test_sglang_recorder.py
runs it as moesim does.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moesim_kernels.dumps import __main__ as dumps  # noqa: E402 - after torch is known to be there


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumps, "_limit", lambda *given: None)


def record(tokens: int = 3, **change: Any) -> dict[str, Any]:
    made = {
        "forward_pass_id": 4,
        "rank": 0,
        "gatherer_key": "primary",
        "global_physical_count": torch.ones(2, 4, dtype=torch.int32),
        "input_ids": list(range(tokens)),
        "positions": list(range(tokens)),
        "extend_seq_lens": None,
        "forward_mode": 2,
        "topk_ids_of_layer": torch.zeros(2, tokens, 8, dtype=torch.int32),
        "misc_objects": [{"layer_id": 1, "num_tokens_per_rank": [1]}],
    }
    return {k: v for k, v in {**made, **change}.items() if v is not ...}


def recording(*records: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {
        "records": list(records),
        "last_physical_to_logical_map": torch.arange(8).reshape(2, 4) % 4,
        **change,
    }


def run(tmp_path: Path, data: Any) -> tuple[int, Path]:
    source = tmp_path / "dump.pt"
    torch.save(data, source)
    return dumps.main([str(source), "--into", str(tmp_path)]), tmp_path / "dump.npz"


def test_stat_comes_out_as_it_went_in(tmp_path: Path) -> None:
    count = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    code, made = run(tmp_path, {"rank": 0, "logical_count": count, "average_utilization_rate_over_window": 0.5})
    assert code == 0
    with np.load(made) as arrays:
        np.testing.assert_array_equal(arrays["logical_count"], count.numpy())
        assert int(arrays["kind"]) == 0


def test_records_come_out_joined(tmp_path: Path) -> None:
    code, made = run(tmp_path, recording(record(2), record(3, forward_pass_id=5, extend_seq_lens=[1, 2])))
    assert code == 0
    with np.load(made) as arrays:
        assert int(arrays["kind"]) == 2
        assert arrays["topk_ids"].shape == (2, 5, 8)
        assert arrays["tokens"].tolist() == [2, 3]
        assert arrays["extends"].tolist() == [0, 2]
        assert arrays["forward_pass_id"].tolist() == [4, 5]
        assert arrays["global_physical_count"].shape == (2, 2, 4)


class _Runs:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


HOSTILE: dict[str, tuple[Any, str]] = {
    "pickle payload": ({"logical_count": _Runs()}, "nothing of it was run"),
    "payload beside": ({"logical_count": torch.ones(1, 1, 1, dtype=torch.int32), "x": _Runs()}, "nothing of it"),
    "strided expansion": (
        {"logical_count": torch.zeros(1, dtype=torch.int32).expand(1 << 20, 60, 256)}, "over 4 bytes of data",
    ),
    "NaN": ({"logical_count": torch.full((2, 2, 2), torch.nan)}, "integers, got torch.float32"),
    "complex": ({"logical_count": torch.zeros(2, 2, 2, dtype=torch.complex64)}, "a plain tensor"),
    "sparse": ({"logical_count": torch.zeros(2, 2, 2, dtype=torch.int32).to_sparse()}, "a plain tensor"),
    "meta": ({"logical_count": torch.zeros(2, 2, 2, dtype=torch.int32, device="meta")}, "a plain tensor"),
    "axes": ({"logical_count": torch.zeros(2, 2, dtype=torch.int32)}, "3 axes are needed"),
    "no tensor": ({"logical_count": [[1, 2]]}, "a tensor is needed, got list"),
    "no dictionary": ([1, 2], "a recording is a dictionary, got list"),
    "other file": ({"state_dict": 1}, "it has state_dict"),
    "records": (recording(records=3), "a list of dictionaries"),
    "no records": (recording(), "from 1 to"),
    "no map": ({"records": [record()]}, "it has records"),
    "missing key": (recording(record(rank=...)), "rank is missing"),
    "text id": (recording(record(forward_pass_id="4")), "a whole number is needed, got str"),
    "lengths": (recording(record(3, input_ids=[1])), "3 tokens in topk_ids_of_layer, 1 in input_ids"),
    "shapes differ": (
        recording(record(), record(global_physical_count=torch.ones(2, 5, dtype=torch.int32))), "different shapes",
    ),
    "float token": (recording(record(1, input_ids=[0.5])), "whole numbers are needed"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line_and_no_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, words = HOSTILE[name]
    code, _ = run(tmp_path, data)
    said = capsys.readouterr().err
    assert code == 2
    assert words in said
    assert said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dump.pt"]  # nothing ran, nothing half-written


def test_many_views_of_one_storage_are_counted_by_what_they_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moesim_kernels.dumps.sglang.MOST_BYTES", 1000)
    shared = torch.ones(2, 4, dtype=torch.int32)
    code, _ = run(tmp_path, recording(*(record(0, global_physical_count=shared) for _ in range(40))))
    assert code == 2
    assert "more than 1000 bytes" in capsys.readouterr().err


def test_packed_and_cut_off_files_are_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.pt"
    torch.save({"logical_count": torch.zeros(64, 64, 64, dtype=torch.int32)}, good)
    packed, cut, legacy, text = (tmp_path / f"{name}.pt" for name in ("packed", "cut", "legacy", "text"))
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    cut.write_bytes(good.read_bytes()[:-2000])
    torch.save({"logical_count": torch.zeros(1, 1, 1)}, legacy, _use_new_zipfile_serialization=False)
    text.write_text("layer,e0\n")
    for file, words in (
        (packed, "stores them as they are"),
        (cut, "cut off"),
        (legacy, "no file that"),
        (text, "no file"),
    ):
        assert dumps.main([str(file), "--into", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("device", ["cuda:3", "npu:0"])
def test_recordings_made_on_an_accelerator_are_read_without_one(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: device)
    code, made = run(tmp_path, {"logical_count": torch.ones(1, 2, 3, dtype=torch.int32)})
    assert code == 0
    with np.load(made) as arrays:
        assert arrays["logical_count"].sum() == 6
