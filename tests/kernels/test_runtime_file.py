"""The file of a model: written whole or not at all, opened without trusting a number in it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_kernels.runtime.sizes import ModelSizes, read_sizes, shrunk
from moesim_kernels.runtime.source import DiskSource, MemorySource
from moesim_kernels.runtime.weights import open_weights, write_weights

from moesim.errors import BadInput
from moesim.scenario.load import load_model

SIZES = ModelSizes(
    layers=2, hidden=32, inner=24, experts=4, top_k=2, heads=2, kv_heads=1, head_dim=8, vocabulary=20, max_context=32
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("written") / "m.moe"
    write_weights(path, SIZES, 3)
    return path.read_bytes()


def remade(data: bytes, change: dict[str, object]) -> bytes:
    """The file with another index, header and checksum in order."""
    index_bytes = struct.unpack_from("<Q", data, 8)[0]
    about = json.loads(data[32 : 32 + index_bytes]) | change
    index = json.dumps(about, separators=(",", ":")).encode()
    head = struct.pack("<8sQI12s", b"MOESIMW1", len(index), zlib.crc32(index), bytes(12)) + index
    return head + data[len(head) :]


def test_what_is_written_is_read(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "m.moe"
    path.write_bytes(written)
    file = open_weights(path)
    assert file.sizes == SIZES
    assert (file.seed, file.file_bytes) == (3, len(written))
    file.check()
    ends = [b.offset + b.size_bytes for b in (file.dense, *file.expert_K)]
    starts = [b.offset for b in file.expert_K]
    assert all(end <= start for end, start in zip(ends, starts, strict=False))
    assert all(start % 4096 == 0 for start in starts)
    write_weights(tmp_path / "again.moe", SIZES, 3)
    assert (tmp_path / "again.moe").read_bytes() == written
    write_weights(tmp_path / "other.moe", SIZES, 4)
    assert open_weights(tmp_path / "other.moe").expert_K[0].crc != file.expert_K[0].crc


def test_bfloat16_is_rounded_as_torch_does(tmp_path: Path) -> None:
    import torch

    for dtype in ("float32", "bfloat16"):
        write_weights(tmp_path / f"{dtype}.moe", SIZES.model_copy(update={"dtype": dtype}), 0)
    single, half = (open_weights(tmp_path / f"{d}.moe") for d in ("float32", "bfloat16"))
    one = torch.from_numpy(single.read(single.expert_K[1], "it").copy()).view(torch.float32)
    other = torch.from_numpy(half.read(half.expert_K[1], "it").copy()).view(torch.bfloat16)
    assert torch.equal(one.to(torch.bfloat16), other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sizes": SIZES.model_dump() | {"experts": 60_000, "layers": 4096}}, "experts"),
        ({"sizes": SIZES.model_dump() | {"layers": 3}}, "must list 12 experts"),
        ({"sizes": SIZES.model_dump() | {"hidden": 1 << 40}}, "hidden"),
        ({"sizes": SIZES.model_dump() | {"unknown": 1}}, "unknown key"),
        ({"sizes": None}, "mapping"),
        ({"experts": [[1 << 62, 1 << 62, 0]] * 8}, "the index says that expert 0 of layer 0 is"),
        ({"experts": [[-1, 5, 0]] * 8}, "no [offset, bytes, crc]"),
        ({"experts": 5}, "must list 8"),
        ({"dense": [0, 1, 2]}, "the dense part"),
        ({"format": 2}, "format 1"),
        ({"more": 1}, "has more"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, written: bytes, change: dict[str, object], says: str) -> None:
    path = tmp_path / "lies.moe"
    path.write_bytes(remade(written, change))
    with pytest.raises(BadInput) as error:
        open_weights(path)
    assert says in str(error.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_broken_file_does_worse_than_bad_input(
    tmp_path_factory: pytest.TempPathFactory, written: bytes, data: st.DataObject
) -> None:
    """Cut anywhere, or any byte before the experts changed: refused, or (padding, dense part) found by `check`."""
    path = tmp_path_factory.getbasetemp() / "broken.moe"
    if data.draw(st.booleans()):
        path.write_bytes(written[: data.draw(st.integers(0, len(written) - 1))])
        with pytest.raises(BadInput):
            open_weights(path)
        return
    at = data.draw(st.integers(0, 900))
    broken = bytearray(written)
    broken[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(broken)
    index_end = 32 + struct.unpack_from("<Q", written, 8)[0]
    if at < index_end:
        with pytest.raises(BadInput):
            open_weights(path)
    else:
        open_weights(path)


def test_a_changed_expert_is_found(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "m.moe"
    path.write_bytes(written)
    block = open_weights(path).expert_K[5]
    broken = bytearray(written)
    broken[block.offset + 7] ^= 1
    path.write_bytes(broken)
    file = open_weights(path)
    with pytest.raises(BadInput, match="expert 1 of layer 1 is not what was written"):
        file.check()
    with pytest.raises(BadInput, match="expert 1 of layer 1"):
        MemorySource(file)


def test_a_limit_on_file_sizes_leaves_nothing_behind(tmp_path: Path) -> None:
    """The kernel refuses the write: code 5, one line, and the model that stood there before stays whole."""
    path = tmp_path / "m.moe"
    write_weights(path, SIZES, 0)
    before = path.read_bytes()
    code = (
        "import resource, sys; from moesim_kernels.runtime.__main__ import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code, "write", str(path), "--set", "layers=2", "--set", "hidden=32"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert "File too large" in done.stderr
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.moe"]


def test_places_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "m.moe", Path("/dev/full")):
        with pytest.raises(BadInput):
            write_weights(path, SIZES, 0)
    for path in (tmp_path, tmp_path / "nothing.moe", Path("/dev/null"), Path("a\0b")):
        with pytest.raises(BadInput):
            open_weights(path)


def test_sizes_come_from_json_or_a_model_made_smaller(tmp_path: Path) -> None:
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"layers": 2, "experts": 8}))
    assert read_sizes(path).experts == 8
    path.write_text('{"layers": 2, "expert": 8, "top_k": "x"}')
    with pytest.raises(BadInput) as error:
        read_sizes(path)
    assert len(error.value.problems) == 2
    small = shrunk(load_model(ROOT / "workloads/models/deepseek-v2-lite.yaml"), 8)
    assert (small.layers, small.experts, small.top_k, small.hidden, small.inner) == (26, 64, 6, 256, 176)
    assert small.expert_bytes == 3 * 256 * 176 * 4
    with pytest.raises(BadInput, match="dense"):
        shrunk(load_model(ROOT / "workloads/models/llama-3.1-8b.yaml"), 8)


def test_reads_pass_by_the_page_cache_or_say_so(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "m.moe"
    path.write_bytes(written)
    os.sync()
    source = DiskSource(open_weights(path))
    assert source.mode in ("direct", "dropped", "memory")
    assert (source.remark == "") == (source.mode == "direct")
    from moesim_kernels.ops.storage import aligned_buffer

    buffer = aligned_buffer(SIZES.slot_bytes)
    source.read(3, 0, memoryview(buffer))
    block = source.file.expert_K[3]
    assert buffer[: block.size_bytes] == written[block.offset : block.offset + block.size_bytes]
    half = aligned_buffer(4096)
    source.read(3, 4096, memoryview(half))
    np.testing.assert_array_equal(np.frombuffer(half, np.uint8), np.frombuffer(buffer, np.uint8)[4096:8192])
    source.close()
