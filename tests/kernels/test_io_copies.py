"""Copies give equal bytes, in every direction that this machine has."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.io_cases import IO_BUILDERS
from moesim_kernels.bench.plan import Case
from moesim_kernels.bench.pool import Device, Pool
from moesim_kernels.ops.copies import DIRECTIONS, DeviceCopy, chunks, host_copy
from moesim_kernels.ops.errors import NotSupported


def case_of(direction: str, memory: str = "pageable", streams: int = 1, busy: bool = False, size: int = 1000) -> Case:
    shape = {"direction": direction, "memory": memory, "streams": streams, "busy": busy}
    return Case("copy", shape, {"bytes": size})


@given(bytes_=st.integers(1, 1 << 34), streams=st.integers(1, 8))
def test_chunks_cover_every_byte_once(bytes_: int, streams: int) -> None:
    parts = chunks(bytes_, streams)
    assert parts[0][0] == 0
    assert parts[-1][1] == bytes_
    assert all(end == begin for (_, end), (begin, _) in pairwise(parts))
    assert all(begin < end and begin % 256 == 0 for begin, end in parts)
    assert len(parts) <= streams
    sizes = [end - begin for begin, end in parts]
    assert sizes[:-1] == sizes[:1] * (len(parts) - 1)


def test_chunks_need_bytes_and_streams() -> None:
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least one byte"):
            chunks(*wrong)


@pytest.mark.parametrize("size", [1, 4096, 1_000_003])
def test_host_copy_copies(size: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    to = np.full(size, 255, dtype=np.uint8)
    host_copy(to, source)
    np.testing.assert_array_equal(to, source)


def test_host_case_copies_more_than_the_cache_keeps() -> None:
    pool = Pool(Device("cpu", cache_bytes=1 << 20))
    prepared = IO_BUILDERS["copy"](case_of("host", size=300_000), pool.device, pool)
    assert prepared.rotations * prepared.bytes >= 2 << 20
    assert prepared.clock == "thread"
    for call in range(prepared.rotations):
        prepared.run(call)
    source, to = pool.get(("copy ram", prepared.rotations * 300_000), 0, lambda: None)  # type: ignore[misc]
    np.testing.assert_array_equal(to, source)
    assert source.any()


def test_cases_that_cannot_run_say_why() -> None:
    pool = Pool(Device("cpu"))
    for wrong, says in (
        (case_of("h2d", "pinned"), "use host"),
        (case_of("d2h"), "use host"),
        (case_of("host", "pinned"), "one thread"),
        (case_of("host", streams=2), "one thread"),
        (case_of("host", busy=True), "one thread"),
    ):
        with pytest.raises(BadPlan, match=says):
            IO_BUILDERS["copy"](wrong, pool.device, pool)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_the_error_names_what_runs() -> None:
    flat = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(NotSupported, match="direction host runs here"):
        DeviceCopy("h2d", flat, flat, 10)
    with pytest.raises(ValueError, match="h2d or d2h"):
        DeviceCopy("sideways", flat, flat, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("busy", [False, True], ids=["alone", "busy"])
@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_device_copies_equal_bytes(direction: str, pinned: bool, streams: int, busy: bool) -> None:
    size = 1_000_003
    host = torch.randint(0, 256, (3 * size,), dtype=torch.uint8)
    host = host.pin_memory() if pinned else host
    device = torch.randint(0, 256, (3 * size,), dtype=torch.uint8, device="cuda")
    wanted = (host if direction == "h2d" else device).cpu().clone()
    copier = DeviceCopy(direction, host, device, size, streams=streams, busy=busy)
    assert copier.calls == 3
    assert all(copier.time_ns(call) > 0 for call in range(3))
    torch.testing.assert_close(host, wanted, rtol=0, atol=0)
    torch.testing.assert_close(device.cpu(), wanted, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_device_case_runs() -> None:
    pool = Pool(Device.find("cuda"))
    prepared = IO_BUILDERS["copy"](case_of("h2d", "pinned", 2, True, 1 << 20), pool.device, pool)
    assert prepared.timed is not None
    assert prepared.timed(prepared.rotations - 1) > 0
