"""Reads of storage give the bytes that were written, by the way they claim, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from moesim_kernels.bench import io_cases
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.io_cases import IO_BUILDERS
from moesim_kernels.bench.plan import Case
from moesim_kernels.bench.pool import Device, Pool
from moesim_kernels.ops.errors import NotSupported
from moesim_kernels.ops.storage import MODES, UNIT_BYTES, Reader, StoredFile, aligned_buffer

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredFile]:
    with StoredFile(8 * MIB, tmp_path_factory.mktemp("disk"), seed=1) as file:
        yield file


def reader(file: StoredFile, mode: str, block: int, depth: int, size: int) -> Reader:
    try:
        return Reader(file, mode, block, depth, size)
    except NotSupported as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [1, 4, 16])
@pytest.mark.parametrize("block", [UNIT_BYTES, MIB], ids=["128KiB", "1MiB"])
def test_blocks_are_what_was_written(file: StoredFile, mode: str, depth: int, block: int) -> None:
    loads = reader(file, mode, block, depth, 2 * MIB)
    for call in range(loads.calls):
        loads.buffer[:] = b"\xff" * len(loads.buffer)
        assert loads.read_ns(call) > 0
        for place, offset in enumerate(loads.offsets(call)):
            for unit in range(0, block, UNIT_BYTES):
                at = place * block + unit
                got = zlib.crc32(loads.buffer[at : at + UNIT_BYTES])
                assert got == file.checksums[(offset + unit) // UNIT_BYTES]
    loads.close()


def test_checksums_are_those_of_the_file_and_no_two_units_are_alike(file: StoredFile) -> None:
    units = [os.pread(file.descriptor, UNIT_BYTES, at) for at in range(0, file.size_bytes, UNIT_BYTES)]
    assert [zlib.crc32(unit) for unit in units] == file.checksums
    assert len(set(file.checksums)) == len(units)


def test_every_block_is_read_once_before_any_is_read_again(file: StoredFile) -> None:
    loads = reader(file, "warm", UNIT_BYTES, 1, 3 * UNIT_BYTES)
    seen = [offset for call in range(loads.calls) for offset in loads.offsets(call)]
    assert len(seen) == len(set(seen)) == 63  # of 64 blocks, three a call
    assert all(offset % UNIT_BYTES == 0 and 0 <= offset < file.size_bytes for offset in seen)
    assert seen != sorted(seen)


def test_a_last_block_may_be_short(file: StoredFile) -> None:
    loads = reader(file, "warm", MIB, 4, MIB + UNIT_BYTES)
    loads.read_ns(0)
    last = loads.offsets(0)[1]
    assert zlib.crc32(loads.buffer[MIB : MIB + UNIT_BYTES]) == file.checksums[last // UNIT_BYTES]
    loads.close()


def test_direct_reads_leave_the_page_cache_alone_and_buffered_ones_fill_it(file: StoredFile) -> None:
    direct = reader(file, "direct", MIB, 1, 4 * MIB)
    file.drop()
    before = file.cached_bytes()
    direct.read_ns(0)
    assert file.cached_bytes() == before
    warm = reader(file, "warm", MIB, 1, 4 * MIB)
    warm.read_ns(0)
    assert file.cached_bytes() >= 4 * MIB


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_memory_does_not_pass_for_a_disk(mode: str) -> None:
    shared = Path("/dev/shm")
    mounts = Path("/proc/mounts")
    if not mounts.exists() or " /dev/shm tmpfs " not in mounts.read_text() or not os.access(shared, os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    with StoredFile(MIB, shared) as file, pytest.raises(NotSupported, match="not supported here"):
        Reader(file, mode, UNIT_BYTES, 1, MIB)


def test_a_file_system_without_direct_reads_is_refused_not_replaced(file: StoredFile) -> None:
    descriptor, file.direct_descriptor = file.direct_descriptor, None  # what opening leaves on such a file system
    try:
        with pytest.raises(NotSupported, match="no O_DIRECT; not supported here"):
            Reader(file, "direct", UNIT_BYTES, 1, MIB)
    finally:
        file.direct_descriptor = descriptor


def test_the_file_has_no_name_and_its_descriptors_are_closed(tmp_path: Path) -> None:
    file = StoredFile(MIB, tmp_path)
    assert list(tmp_path.iterdir()) == []
    descriptor = file.descriptor
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
def test_nothing_is_left_when_the_process_is_ended(tmp_path: Path, sign: signal.Signals) -> None:
    program = (
        "from moesim_kernels.ops.storage import StoredFile\n"
        "import time\n"
        "file = StoredFile(1 << 20)\n"
        "print(file.cached_bytes(), flush=True)\n"
        "time.sleep(1000)\n"
    )
    home = str(Path(__file__).parents[2] / "kernels")
    environment = {**os.environ, "PYTHONPATH": home, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        process.send_signal(sign)
    assert process.returncode == -sign
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_half_the_free_space_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="name another folder"):
        StoredFile(1 << 60, tmp_path)


def test_refuses_sizes_that_cannot_be(file: StoredFile) -> None:
    for size in (0, -UNIT_BYTES, 1000):
        with pytest.raises(ValueError, match="multiple"):
            StoredFile(size)
    small = aligned_buffer(4 * KIB)
    for mode, block, depth, size, buffer, says in (
        ("mmap", UNIT_BYTES, 1, MIB, None, "a mode of reading"),
        ("warm", 1000, 1, MIB, None, "block_bytes is"),
        ("warm", UNIT_BYTES, 0, MIB, None, "queue depth"),
        ("warm", UNIT_BYTES, 1, MIB + 1, None, "bytes is"),
        ("warm", UNIT_BYTES, 1, 16 * MIB, None, "exceeds the file"),
        ("warm", UNIT_BYTES, 1, MIB, small, "the buffer has"),
    ):
        with pytest.raises(ValueError, match=says):
            Reader(file, mode, block, depth, size, buffer=buffer)


def test_cases_share_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_cases, "FILE_BYTES", 4 * MIB)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pool = Pool(Device("cpu"))
    for depth in (1, 4):
        case = Case("storage", {"mode": "warm", "block_bytes": UNIT_BYTES, "depth": depth}, {"bytes": MIB})
        prepared = IO_BUILDERS["storage"](case, pool.device, pool)
        assert prepared.timed is not None
        assert [prepared.timed(i) > 0 for i in range(prepared.rotations)] == [True] * 4
        assert prepared.bytes == MIB
        prepared.close()
    assert pool.get(("storage file", 4 * MIB), 0, lambda: None) is not None
    large = Case("storage", {"mode": "warm", "block_bytes": MIB, "depth": 1}, {"bytes": 3 * MIB})
    assert IO_BUILDERS["storage"](large, pool.device, pool).rotations == 2  # of a file of 8 MiB
    odd = Case("storage", {"mode": "warm", "block_bytes": 1000, "depth": 1}, {"bytes": MIB})
    with pytest.raises(BadPlan, match="multiple of 4096"):
        IO_BUILDERS["storage"](odd, pool.device, pool)
