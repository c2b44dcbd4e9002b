"""TensorRT-LLM's expert statistics: folders of safetensors files, real bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.traces.expert_loads import load_expert_loads, recognise

_NAMES = {"i8": "I64", "i4": "I32", "f4": "F32"}


def safetensors(path: Path, tensors: dict[str, Any], **change: Any) -> None:
    """The file that safetensors.torch.save_file writes of these arrays."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, data = 0, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype.str[1:]],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(raw)],
        }
        at, data = at + len(raw), data + raw
    for name, entry in change.items():
        header[name].update(entry)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def folder(path: Path, count_RSLE: Any, layers: tuple[int, ...] = (3, 4), first: int = 100, top_k: int = 2) -> Path:
    meta = {"num_experts": int(count_RSLE.shape[3]), "num_experts_per_token": top_k}
    (path / "meta_info.json").write_text(json.dumps(meta))
    for rank, count_SLE in enumerate(count_RSLE):
        tensors = {
            f"{first + s}_{layers[i]}": count_SLE[s, i] for s in range(len(count_SLE)) for i in range(len(layers))
        }
        safetensors(path / f"rank{rank}.safetensors", tensors)
    return path


def counts(ranks: int = 3, steps: int = 4, experts: int = 6, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 50, (ranks, steps, 2, experts))


def test_ranks_add_up_and_layers_keep_their_numbers(tmp_path: Path) -> None:
    given = counts()
    assert recognise(folder(tmp_path, given)) == "trtllm_statistics"
    loads = load_expert_loads(tmp_path)
    np.testing.assert_array_equal(loads.count_SLE, given.sum(axis=0))
    assert (loads.layer_index, loads.top_k, loads.recorded_ranks, loads.ordered) == ((3, 4), 2, 3, True)
    assert loads.tokens_per_step == pytest.approx(given.sum() / 2 / 4 / 2)
    np.testing.assert_array_equal(load_expert_loads(tmp_path / "rank1.safetensors").count_SLE, loads.count_SLE)


def test_iterations_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    given = counts(1, 3)
    tensors = {f"{s}_{3 + i}": given[0, at, i] for at, s in ((0, 9), (2, 101), (1, 10)) for i in range(2)}
    folder(tmp_path, given)
    safetensors(tmp_path / "rank0.safetensors", tensors)
    np.testing.assert_array_equal(load_expert_loads(tmp_path).count_SLE, given[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "F32"}, "integers, got F32"),
        ({"shape": [7]}, "takes 56 bytes"),
        ({"shape": [-6]}, "whole numbers from 0 on"),
        ({"shape": [1 << 40, 1 << 40]}, "takes"),
        ({"data_offsets": [0, 1 << 50], "shape": [1 << 47]}, "begins at byte|but .* of data"),
        ({"data_offsets": [48, 0]}, "takes 48 bytes"),
        ({"data_offsets": [8, 56]}, "begins at byte 8"),
        ({"extra": 1}, "dtype, shape and data_offsets"),
        ({"shape": True}, "whole numbers from 0 on"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder(tmp_path, counts(1))
    tensors = {"100_3": np.arange(6), "100_4": np.arange(6)}
    safetensors(tmp_path / "rank0.safetensors", tensors, **{"100_3": change})
    with pytest.raises(BadInput, match=words) as caught:
        load_expert_loads(tmp_path)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (struct.pack("<Q", 1 << 60) + b"{}", "a header of"),
        (struct.pack("<Q", 2) + b"{", "a header of"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not UTF-8"),
        (struct.pack("<Q", 2) + b"{}more", "of data"),
        (struct.pack("<Q", 400) + b"[" * 400, "64 levels"),
    ],
)
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    folder(tmp_path, counts(1))
    (tmp_path / "rank0.safetensors").write_bytes(raw)
    with pytest.raises(BadInput, match=words):
        load_expert_loads(tmp_path)


def test_statistics_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, counts(1))
    cases = [
        ({"100_3": np.arange(6), "101_3": np.arange(6), "101_4": np.arange(6)}, "100_4 is missing"),
        ({"100_3": np.arange(5)}, "6 counts are needed"),
        ({"100_3": np.arange(6) - 1}, "not negative"),
        ({"layer3": np.arange(6)}, "named <iteration>_<layer>"),
        ({"100_3": np.zeros(6, int)}, "every count is 0"),
    ]
    for tensors, words in cases:
        safetensors(tmp_path / "rank0.safetensors", tensors)
        with pytest.raises(BadInput, match=words):
            load_expert_loads(tmp_path)
    (tmp_path / "meta_info.json").write_text('{"num_experts": -3}')
    with pytest.raises(BadInput, match="from 1 to 65536"):
        load_expert_loads(tmp_path)
    (tmp_path / "rank0.safetensors").unlink()
    (tmp_path / "meta_info.json").write_text('{"num_experts": 6}')
    with pytest.raises(BadInput, match="0 files rank"):
        load_expert_loads(tmp_path)


def with_ids(path: Path, sizes: tuple[tuple[int, ...], ...] = ((3, 0, 5), (2, 4, 0)), experts: int = 6) -> Any:
    """A folder of counts and the ids they come from, by rank and iteration; the ids [T, L, K] in that order."""
    rng = np.random.default_rng(2)
    ids = {
        (rank, step): np.array([[rng.permutation(experts)[:2] for _ in range(2)] for _ in range(n)], int).reshape(
            n, 2, 2
        )
        for rank, row in enumerate(sizes)
        for step, n in enumerate(row)
    }
    count = np.zeros((len(sizes), len(sizes[0]), 2, experts), int)
    for (rank, step), part in ids.items():
        for layer in range(2):
            count[rank, step, layer] = np.bincount(part[:, layer].ravel(), minlength=experts)
    folder(path, count)
    for rank, row in enumerate(sizes):
        tensors = {f"{100 + s}_{3 + i}": ids[rank, s][:, i].astype("i4") for s in range(len(row)) for i in range(2)}
        safetensors(path / f"rank{rank}_raw.safetensors", tensors)
    return np.concatenate([ids[r, s] for s in range(len(sizes[0])) for r in range(len(sizes))])


def test_raw_ids_become_tokens(tmp_path: Path) -> None:
    expected = with_ids(tmp_path)
    loads = load_expert_loads(tmp_path)
    assert loads.tokens is not None
    assert loads.row_tokens_S is not None
    np.testing.assert_array_equal(loads.tokens.expert_TLK, expected)
    assert loads.row_tokens_S.tolist() == [5, 4, 5]
    assert loads.tokens_per_step == pytest.approx(14 / 3)
    first, _ = loads.split(0.4)
    assert first.tokens is not None
    np.testing.assert_array_equal(first.tokens.count_LE(), first.total_LE)


def test_raw_ids_that_are_not_the_counts_are_refused(tmp_path: Path) -> None:
    with_ids(tmp_path)
    raw = tmp_path / "rank0_raw.safetensors"
    safetensors(raw, {f"100_{layer}": np.array([[0, 1]], "i4") for layer in (3, 4)})
    with pytest.raises(BadInput, match="do not add up to the counts"):
        load_expert_loads(tmp_path)
    safetensors(raw, {"100_3": np.array([[0, 1]], "i4")})
    with pytest.raises(BadInput, match="as many in every layer"):
        load_expert_loads(tmp_path)
    safetensors(raw, {f"100_{layer}": np.array([[0, 6]], "i4") for layer in (3, 4)})
    with pytest.raises(BadInput, match="id 6"):
        load_expert_loads(tmp_path)
