"""Where experts' bytes come from: a file past the page cache, or a copy of it in host memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Protocol

import numpy as np

from moesim_kernels.ops.storage import aligned_buffer
from moesim_kernels.runtime.errors import NoRoom, ReadFailed
from moesim_kernels.runtime.sizes import ALIGN
from moesim_kernels.runtime.weights import WeightFile

__all__ = ["DiskSource", "MemorySource", "Source", "free_bytes", "page_buffer"]

_LEFT_SHARE = 0.01  # of a file that may stay in memory after the advice to drop it


class Source(Protocol):
    """Reads parts of experts."""

    remark: str
    """what a reader of the figures should know, or empty"""

    def read(self, key: int, begin: int, view: memoryview) -> None:
        """Bytes of expert `key` from `begin` on, as many as `view` has; both are multiples of 4096."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def free_bytes() -> int | None:
    """Memory that can be taken without swapping, by /proc/meminfo; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def page_buffer(size_bytes: int, what: str) -> mmap.mmap:
    """Page-aligned memory with every page present. Raises NoRoom rather than have the system kill the process."""
    free = free_bytes()
    if free is not None and size_bytes > free:
        raise NoRoom(f"{what} need {size_bytes:,} bytes of memory, {free:,} are free; use a smaller cache")
    try:
        return aligned_buffer(size_bytes)
    except (OSError, MemoryError, OverflowError) as error:
        raise NoRoom(f"{what} need {size_bytes:,} bytes of memory: {error}; use a smaller cache") from None


def _in_memory(descriptor: int, size_bytes: int) -> int:
    """Bytes of a file that stand in the page cache now (mincore(2))."""
    pages = mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    try:
        first = ctypes.c_char.from_buffer(pages)
        present = np.zeros(-(-size_bytes // mmap.PAGESIZE), np.uint8)
        address = ctypes.c_void_p(ctypes.addressof(first))
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(address, ctypes.c_size_t(size_bytes), ctypes.c_void_p(present.ctypes.data))
        del first
        return 0 if failed else int((present & 1).sum()) * mmap.PAGESIZE
    finally:
        pages.close()


class DiskSource:
    """Reads with O_DIRECT where the file system has it, else through the page cache, whose pages of this file are
    dropped after every read. What was found to be so stands in `mode` (`direct`, `dropped`, `memory`) and `remark`.

    check: how often an expert's checksum is compared: `first` time that it is read, `always` or `never`.
    """

    def __init__(self, file: WeightFile, check: str = "first") -> None:
        self.file, self._check = file, check
        self._seen = bytearray(len(file.expert_K))
        self.mode, self.remark, self.descriptor = "direct", "", -1
        try:
            plain = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ReadFailed(f"{file.path}: cannot be read: {error.strerror}") from None
        self.descriptor = plain
        self._close = weakref.finalize(self, os.close, plain)
        os.posix_fadvise(plain, 0, 0, os.POSIX_FADV_DONTNEED)
        if _in_memory(plain, file.file_bytes) > _LEFT_SHARE * file.file_bytes:
            self.mode = "memory"
            self.remark = f"{file.path} lies in memory or its pages cannot be dropped: reads are copies, not a disk's"
            return
        try:
            direct = os.open(file.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            try:
                os.preadv(direct, [aligned_buffer(ALIGN)], file.expert_K[0].offset)
            except OSError:
                os.close(direct)
                raise
        except OSError as error:
            self.mode = "dropped"
            self.remark = (
                f"{file.path}: no O_DIRECT here ({error.strerror}); reads pass through the page cache, which is told to"
                " drop them (posix_fadvise)"
            )
            return
        self._close()
        self.descriptor = direct
        self._close = weakref.finalize(self, os.close, direct)

    def read(self, key: int, begin: int, view: memoryview) -> None:
        """See Source. Raises ReadFailed where the file ends early or the disk fails."""
        block = self.file.expert_K[key]
        offset = block.offset + begin
        part = view
        while part:
            try:
                got = os.preadv(self.descriptor, [part], offset)
            except OSError as error:
                raise ReadFailed(
                    f"{self.file.path}: {self.file.name(key)} cannot be read: {error.strerror or error}. "
                    "Look after the disk, then run again"
                ) from None
            if got == 0:
                raise ReadFailed(
                    f"{self.file.path}: {self.file.name(key)} ends early: the file was cut off at byte {offset} after "
                    "it was opened. Write the model again"
                )
            part, offset = part[got:], offset + got
        if self.mode == "dropped":
            os.posix_fadvise(self.descriptor, block.offset + begin, len(view), os.POSIX_FADV_DONTNEED)

    def done(self, key: int, whole: memoryview) -> None:
        """All of an expert is read: compare its checksum, as often as was asked for. Raises BadInput."""
        if self._check == "always" or (self._check == "first" and not self._seen[key]):
            block = self.file.expert_K[key]
            self.file.verify(whole[: block.size_bytes], block, self.file.name(key))
            self._seen[key] = 1

    def close(self) -> None:
        """See Source."""
        self._close()


class MemorySource:
    """All experts in host memory, where they are copied from, checked once; several runs may share one. `view(key)`: an
    expert's bytes there; `tensor`: all of them, uint8."""

    def __init__(self, file: WeightFile, check: str = "first", pinned: bool = False) -> None:
        """pinned: page-locked, for a CUDA device. Raises NoRoom, ReadFailed, BadInput."""
        import torch

        self.file, self.remark = file, ""
        sizes = file.sizes
        self._slot_bytes = sizes.slot_bytes
        total = sizes.num_keys * sizes.slot_bytes
        free = free_bytes()
        if free is not None and total > free:
            raise NoRoom(f"experts in host memory need {total:,} bytes, {free:,} are free; keep them on disk instead")
        if pinned:
            try:
                self.tensor = torch.empty(total, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                first = str(error).splitlines()[0]
                raise NoRoom(f"{total:,} bytes of page-locked memory: {first}; raise ulimit -l") from None
        else:
            self.tensor = torch.frombuffer(page_buffer(total, "experts in host memory"), dtype=torch.uint8)
        self._view = memoryview(self.tensor.numpy())
        disk = DiskSource(file, check="never" if check == "never" else "first")
        try:
            for key in range(sizes.num_keys):
                at = key * sizes.slot_bytes
                whole = self._view[at : at + sizes.slot_bytes]
                disk.read(key, 0, whole)
                disk.done(key, whole)
        finally:
            disk.close()

    def view(self, key: int) -> memoryview:
        """An expert's slot_bytes in host memory."""
        return self._view[key * self._slot_bytes : (key + 1) * self._slot_bytes]

    def read(self, key: int, begin: int, view: memoryview) -> None:
        """See Source."""
        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(self.view(key)[begin : begin + len(view)], np.uint8))

    def done(self, key: int, whole: memoryview) -> None:
        """Nothing to compare: the copy here was."""

    def close(self) -> None:
        """See Source. The memory goes with the last who uses it."""
