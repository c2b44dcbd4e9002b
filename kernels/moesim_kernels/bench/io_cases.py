"""Cases that move bytes: copies, reads of a disk, collectives between processes.

Files and worker groups are shared by all cases that need the same one and live in the pool; they end with it. The
file to read stands in the temporary folder: set TMPDIR to the disk to be measured.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.plan import Case
from moesim_kernels.bench.pool import Device, Pool, Prepared
from moesim_kernels.ops.copies import DIRECTIONS, DeviceCopy, host_copy
from moesim_kernels.ops.routing import exchange_splits
from moesim_kernels.ops.storage import Reader, StoredFile, aligned_buffer
from moesim_kernels.ops.workers import DTYPES, Call, Group, WorkerFailed

__all__ = ["IO_BUILDERS"]

FILE_BYTES = 512 << 20  # what random blocks are read from, at least: a load is at most half of its file
_ARENA_BYTES = 256 << 20  # host memory that copies to and from a device go through, at least
_TIMEOUT_S = 120.0


def _copy(case: Case, device: Device, pool: Pool) -> Prepared:
    """One copy of `bytes`. direction host: from RAM to RAM by one thread; else between host and CUDA device."""
    direction, size = str(case.shape["direction"]), int(case.size["bytes"])
    if direction not in DIRECTIONS:
        return _host_copy(case, size, pool)
    if device.kind != "cuda":
        raise BadPlan(f"direction {direction} needs a plan for cuda; use host on a CPU", f"case {case.id}")
    import torch

    pinned, streams, busy = case.shape["memory"] == "pinned", int(case.shape["streams"]), bool(case.shape["busy"])
    wide = max(_ARENA_BYTES, 1 << (size - 1).bit_length())
    host = pool.get(("copy host", pinned, wide), wide, lambda: _random_bytes(wide, pinned))
    there = pool.get(
        ("copy device", wide), wide, lambda: torch.zeros(wide, dtype=torch.uint8, device=device.torch_device)
    )
    copier = DeviceCopy(direction, host, there, size, streams=streams, busy=busy)
    calls = min(copier.calls, pool.rotations(size))
    return Prepared(copier.time_ns, calls, size, 0.0, "cuda", timed=copier.time_ns)


def _host_copy(case: Case, size: int, pool: Pool) -> Prepared:
    if case.shape["memory"] != "pageable" or case.shape["streams"] != 1 or case.shape["busy"]:
        raise BadPlan("direction host is copied by one thread: memory pageable, streams 1, busy false", case.id)
    calls = pool.rotations(2 * size)
    wide = calls * size

    def made() -> tuple[Any, Any]:
        return _random_bytes(wide, pinned=False).numpy(), np.zeros(wide, dtype=np.uint8)

    source, to = pool.get(("copy ram", wide), 2 * wide, made)

    def run(call: int) -> None:
        part = slice(call * size, (call + 1) * size)
        host_copy(to[part], source[part])

    return Prepared(run, calls, 2.0 * size, 0.0, "thread")


def _random_bytes(bytes_: int, pinned: bool) -> Any:
    """A flat uint8 tensor of host memory, every page present: a block of random bytes over and over."""
    import torch

    block = np.random.default_rng(0).integers(0, 256, min(bytes_, 4 << 20), dtype=np.uint8)
    flat = torch.empty(bytes_, dtype=torch.uint8, pin_memory=pinned)
    flat.numpy()[:] = np.resize(block, bytes_)
    return flat


def _storage(case: Case, device: Device, pool: Pool) -> Prepared:
    """One load of `bytes` in blocks in random order. Raises NotSupported where the disk cannot be measured so."""
    size, block, depth = int(case.size["bytes"]), int(case.shape["block_bytes"]), int(case.shape["depth"])
    wide = max(FILE_BYTES, 2 << (size - 1).bit_length())
    buffer: mmap.mmap = pool.get(("storage buffer", size), size, lambda: aligned_buffer(size))
    file: StoredFile = pool.get(("storage file", wide), 0, lambda: StoredFile(wide))
    mode = str(case.shape["mode"])
    try:
        reader = Reader(file, mode, block, depth, size, buffer=buffer, seed=case.seed)
    except ValueError as error:
        raise BadPlan(str(error), f"case {case.id}") from None
    note = "pages were dropped from the cache on advice (posix_fadvise)" if mode == "buffered" else ""
    return Prepared(
        reader.read_ns, reader.calls, size, 0.0, "wall", close=reader.close, timed=reader.read_ns, note=note
    )


def exchange_call(elements: int, ranks: int, dtype: str) -> Call:
    """The all-to-all in which each rank sends `elements` to the others together, as evenly as integers allow.

    Each also keeps a block of its own, as the equal-split primitive does.
    """
    even, more = divmod(elements, ranks - 1)
    if more == 0:
        return Call("all_to_all", even, dtype)
    splits = tuple(tuple(even + (1 <= (to - source) % ranks <= more) for to in range(ranks)) for source in range(ranks))
    return Call("all_to_allv", dtype=dtype, splits=splits)


def _call_of(case: Case, ranks: int) -> Call:
    """What a case asks of a group of workers. Raises ValueError where that cannot be."""
    size = int(case.size["bytes"])
    elements = size // DTYPES[case.dtype]
    if case.op == "all_to_all":
        return exchange_call(elements, ranks, case.dtype)
    if case.op != "token_exchange":
        return Call(case.op, elements, case.dtype)
    hidden, slots, top_k = (int(case.shape[name]) for name in ("hidden", "slots", "top_k"))
    if elements % hidden:
        raise ValueError(f"bytes must be whole rows of {hidden} {case.dtype} elements; got {size}")
    splits = exchange_splits(elements // hidden, ranks, str(case.size["spread"]), case.seed)
    way = str(case.shape["way"])
    return Call(way, dtype=case.dtype, splits=splits, width=hidden, slots=slots, top_k=top_k)


def _collective(case: Case, device: Device, pool: Pool) -> Prepared:
    """One collective, timed by its slowest rank after a barrier. bytes as in moesim.cost.operators."""
    ranks, backend, size = int(case.shape["ranks"]), str(case.shape["backend"]), int(case.size["bytes"])
    where = f"case {case.id}"
    if case.dtype not in DTYPES:
        raise BadPlan(f"collectives run in {', '.join(DTYPES)}; got {case.dtype}", where)
    if size % DTYPES[case.dtype]:
        raise BadPlan(f"bytes must be whole {case.dtype} elements of {DTYPES[case.dtype]} bytes; got {size}", where)
    if not 2 <= ranks <= 64:
        raise BadPlan(f"ranks run from 2 to 64 on one machine; got {ranks}", where)
    if backend == "nccl" and device.kind != "cuda":
        raise BadPlan("backend nccl needs a plan for cuda; use gloo", where)
    if backend == "nccl" and ranks > (gpus := _gpus()):  # said before processes are started that can only fail
        raise BadPlan(f"nccl runs one process a GPU: {ranks} ranks, and torch sees {gpus}", where)
    try:
        call = _call_of(case, ranks)
    except ValueError as error:
        raise BadPlan(str(error), where) from None
    group = _group(ranks, backend, pool)
    key = ("collective", ranks, backend, call)
    pool.get(key, call.buffer_bytes(ranks), lambda: call)  # the workers' memory counts as the pool's

    def close() -> None:
        with suppress(WorkerFailed):  # then it has ended, and its memory with it
            group.release(call)
        pool.drop(key)

    def timed(_: int) -> int:
        nonlocal group
        group = _group(ranks, backend, pool)  # a new one where another case broke it
        return group.time_ns(call)

    port = {"all_reduce": 2.0 * (ranks - 1) / ranks, "all_to_all": 1.0, "token_exchange": 1.0}.get(case.op, ranks - 1.0)
    note = "" if group.native[call.op] else f"{backend} has no {call.op}: composed of sends and receives"
    return Prepared(timed, 1, port * size, 0.0, "wall", close=close, timed=timed, note=note)


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def _group(ranks: int, backend: str, pool: Pool) -> Group:
    """The worker group of these ranks, started where there is none or the last one failed. One that could not start
    is not tried again, which might take its whole timeout for every case.
    """
    key = ("group", ranks, backend)
    failed: list[str] = pool.get(("group failed", ranks, backend), 0, list)

    def start() -> Group:
        if failed:
            raise WorkerFailed(failed[0])
        try:
            return Group(ranks, backend, timeout_s=_TIMEOUT_S, buffers_bytes=pool.device.capacity_bytes)
        except WorkerFailed as error:
            failed.append(str(error))
            raise

    group: Group = pool.get(key, 0, start)
    if not group.alive:
        pool.drop(key)
        group = pool.get(key, 0, start)
    return group


IO_BUILDERS: dict[str, Callable[[Case, Device, Pool], Prepared]] = {
    "copy": _copy,
    "storage": _storage,
    "all_reduce": _collective,
    "all_gather": _collective,
    "reduce_scatter": _collective,
    "all_to_all": _collective,
    "token_exchange": _collective,
}
