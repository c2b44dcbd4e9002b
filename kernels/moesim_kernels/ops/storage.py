"""Reads of blocks of a file in random order: past the page cache (O_DIRECT), into a cold one, out of a warm one.

A call loads `bytes` as an offloaded expert is loaded: blocks of the file, in random order and none twice until all
have been read, land in one preallocated page-aligned buffer, `depth` reads at a time by a small pool of threads.

Nothing is believed that can be checked: mincore(2) tells whether an O_DIRECT read passed through the page cache after
all (tmpfs accepts the flag and is memory), and whether the advice to drop pages was followed. A disk behind a
hypervisor may still be cached by its host, which no guest can see.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import signal
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moesim_kernels.ops.errors import NotSupported

__all__ = ["MODES", "UNIT_BYTES", "Reader", "StoredFile", "aligned_buffer"]

MODES = ("direct", "buffered", "warm")
UNIT_BYTES = 128 << 10  # what one checksum of the file covers
_ALIGN = 4096  # multiple of every logical block size in use
_CHUNK = 8 << 20
_FREE_SHARE = 0.5  # of the free disk space that a file may take
_LEFT_SHARE = 0.01  # of a file that may stay cached after the advice to drop it
MAX_DEPTH = 256


def aligned_buffer(bytes_: int) -> mmap.mmap:
    """An anonymous page-aligned buffer with every page present."""
    buffer = mmap.mmap(-1, bytes_)
    for at in range(0, bytes_, mmap.PAGESIZE):
        buffer[at] = 1
    return buffer


class StoredFile:
    """`size_bytes` random bytes on the disk of `folder` (default: the temporary folder, which TMPDIR names).

    The file loses its name before the first byte is written, so the system removes it however the process ends.
    checksums: CRC-32 of each UNIT_BYTES. Raises ValueError for a size that is no positive multiple of UNIT_BYTES,
    NotSupported where the folder has no room for it (at most half of what is free) or the system is not Linux.
    """

    def __init__(self, size_bytes: int, folder: Path | None = None, seed: int = 0) -> None:
        if size_bytes <= 0 or size_bytes % UNIT_BYTES:
            raise ValueError(f"a file is a positive multiple of {UNIT_BYTES} bytes, not {size_bytes}")
        if not all(hasattr(os, name) for name in ("O_DIRECT", "preadv", "posix_fadvise")):
            raise NotSupported("storage is measured on Linux (O_DIRECT, preadv, posix_fadvise); not supported here")
        folder = Path(tempfile.gettempdir()) if folder is None else folder
        free = shutil.disk_usage(folder).free
        if size_bytes > _FREE_SHARE * free:
            raise NotSupported(
                f"a file of {size_bytes} bytes would take more than half of the {free} that are free in {folder}; "
                "name another folder (TMPDIR) or a smaller size"
            )
        self.size_bytes = size_bytes
        self.folder = folder
        self.descriptor, self.direct_descriptor = _nameless(folder)
        self._close = weakref.finalize(self, _close, self.descriptor, self.direct_descriptor)
        try:
            self.checksums = _fill(self.descriptor, size_bytes, seed)
            self._map = mmap.mmap(self.descriptor, size_bytes)  # never touched: mincore looks at it
        except BaseException:
            self._close()
            raise
        self.drop()

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which frees its disk space."""
        self._map.close()
        self._close()

    def drop(self) -> None:
        """Advise the system to drop the file's pages from its cache. It is advice: `cached_bytes` says what came."""
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def cached_bytes(self) -> int:
        """Bytes of the file that stand in the page cache now."""
        present = np.zeros(-(-self.size_bytes // mmap.PAGESIZE), dtype=np.uint8)
        first = ctypes.c_char.from_buffer(self._map)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            address = ctypes.c_void_p(ctypes.addressof(first))
            if libc.mincore(address, ctypes.c_size_t(self.size_bytes), ctypes.c_void_p(present.ctypes.data)) != 0:
                raise OSError(ctypes.get_errno(), "mincore failed")
        finally:
            del first  # else the map cannot be closed
        return int((present & 1).sum()) * mmap.PAGESIZE


class Reader:
    """Calls that load `bytes_` of `file` in blocks of `block_bytes`, `depth` at a time, into `buffer`.

    mode: "direct" (O_DIRECT), "buffered" (page cache, the file dropped from it before each call), "warm" (page cache,
    each call read once before). calls: how many calls read different blocks. The last block of a call is shorter
    where block_bytes does not divide bytes_. Raises ValueError for sizes that are no multiples of 4096 or do not
    fit, NotSupported where the folder's file system has no O_DIRECT, or where reads come from memory all the same.
    """

    def __init__(
        self,
        file: StoredFile,
        mode: str,
        block_bytes: int,
        depth: int,
        bytes_: int,
        *,
        buffer: mmap.mmap | None = None,
        seed: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"a mode of reading is one of {', '.join(MODES)}, not {mode!r}")
        if not 1 <= depth <= MAX_DEPTH:
            raise ValueError(f"the queue depth is from 1 to {MAX_DEPTH}, not {depth}")
        for name, value in (("block_bytes", block_bytes), ("bytes", bytes_)):
            if value <= 0 or value % _ALIGN:
                raise ValueError(f"{name} is a positive multiple of {_ALIGN}, not {value}")
        per_call = -(-bytes_ // block_bytes)
        blocks = file.size_bytes // block_bytes
        if per_call > blocks:
            raise ValueError(f"a call of {bytes_} bytes in blocks of {block_bytes} exceeds the file: {file.size_bytes}")
        self.mode, self.bytes, self.block_bytes, self.calls = mode, bytes_, block_bytes, blocks // per_call
        self.buffer = aligned_buffer(bytes_) if buffer is None else buffer
        if len(self.buffer) < bytes_:
            raise ValueError(f"the buffer has {len(self.buffer)} bytes, a call reads {bytes_}")
        self._file = file
        order = np.random.default_rng([seed, block_bytes]).permutation(blocks)[: self.calls * per_call]
        self._offsets = (order.reshape(self.calls, per_call) * block_bytes).tolist()
        self._descriptor = self._checked()
        self._depth = depth
        self._threads = ThreadPoolExecutor(depth, "storage") if depth > 1 else None

    def offsets(self, call: int) -> list[int]:
        """Where in the file the blocks of a call stand, in the order of the buffer."""
        offsets: list[int] = self._offsets[call % self.calls]
        return offsets

    def read_ns(self, call: int) -> int:
        """Wall nanoseconds of one call; what the mode needs of the cache is done before the clock starts."""
        if self.mode == "buffered":
            self._file.drop()
        elif self.mode == "warm":
            self._read(call)
        begin = time.perf_counter_ns()
        self._read(call)
        return time.perf_counter_ns() - begin

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()

    def _read(self, call: int) -> None:
        blocks = iter(enumerate(self.offsets(call)))  # `next` of this iterator is one step: threads may share it
        if self._threads is None:
            self._take(blocks)
        else:
            for done in [self._threads.submit(self._take, blocks) for _ in range(self._depth)]:
                done.result()

    def _take(self, blocks: Iterator[tuple[int, int]]) -> None:
        """Read blocks to their places in the buffer until none is left."""
        view = memoryview(self.buffer)[: self.bytes]
        for place, offset in blocks:
            part = view[place * self.block_bytes : (place + 1) * self.block_bytes]
            while part:
                got = os.preadv(self._descriptor, [part], offset)
                if got == 0:
                    raise OSError(f"the file of this benchmark ended at byte {offset}")
                part, offset = part[got:], offset + got

    def _checked(self) -> int:
        """The descriptor to read from, once the mode has been seen to do what it says. Raises NotSupported."""
        file = self._file
        if self.mode == "warm":
            return file.descriptor
        if self.mode == "direct" and file.direct_descriptor is None:
            raise NotSupported(f"the file system of {file.folder} has no O_DIRECT; not supported here: use TMPDIR")
        file.drop()
        left = file.cached_bytes()
        if left > _LEFT_SHARE * file.size_bytes:
            raise NotSupported(
                f"{left} of {file.size_bytes} bytes stay in memory after the advice to drop them: {file.folder} is "
                "memory, or keeps its cache; not supported here: use TMPDIR"
            )
        if file.direct_descriptor is None or self.mode != "direct":
            return file.descriptor
        probe = memoryview(self.buffer)[: min(self.block_bytes, self.bytes)]
        try:
            os.preadv(file.direct_descriptor, [probe], self._offsets[0][0])
        except OSError as error:
            raise NotSupported(f"O_DIRECT reads fail in {file.folder} ({error}); not supported here") from None
        if file.cached_bytes() > left:
            raise NotSupported(f"O_DIRECT reads in {file.folder} pass through the page cache; not supported here")
        return file.direct_descriptor


def _nameless(folder: Path) -> tuple[int, int | None]:
    """Descriptors of a new file without a name: one to write and read, one with O_DIRECT where there is such."""
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    try:
        descriptor, name = tempfile.mkstemp(prefix="moesim-storage-", dir=folder)
        try:
            direct = os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            direct = None
        os.unlink(name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
    return descriptor, direct


def _fill(descriptor: int, size_bytes: int, seed: int) -> list[int]:
    """Write random bytes, bring them to the disk, and return their checksums."""
    os.posix_fallocate(descriptor, 0, size_bytes)
    draw = np.random.default_rng(seed)
    checksums = []
    for at in range(0, size_bytes, _CHUNK):
        chunk = memoryview(draw.bytes(min(_CHUNK, size_bytes - at)))
        checksums += [zlib.crc32(chunk[i : i + UNIT_BYTES]) for i in range(0, len(chunk), UNIT_BYTES)]
        written = 0
        while written < len(chunk):
            written += os.pwrite(descriptor, chunk[written:], at + written)
    os.fsync(descriptor)
    return checksums


def _close(*descriptors: int | None) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)
