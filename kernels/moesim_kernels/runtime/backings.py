"""The kinds of links between slow memory and where experts compute: disk, host memory, CUDA."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.errors import BadInput
from moesim_kernels.runtime.errors import NoRoom
from moesim_kernels.runtime.link import Transfer
from moesim_kernels.runtime.slots import Memory
from moesim_kernels.runtime.source import DiskSource, MemorySource, page_buffer
from moesim_kernels.runtime.weights import WeightFile

__all__ = ["KINDS", "CudaBacking", "DiskBacking", "MemoryBacking", "make_backing", "make_home"]

KINDS = ("disk", "memory", "cuda")


class _Host:
    """What links into ordinary memory share: buffers are page-aligned and every page is present."""

    kind = ""
    saves = True

    def __init__(self, file: WeightFile, source: DiskSource | MemorySource) -> None:
        import torch

        self.source, self._slot_bytes = source, file.sizes.slot_bytes
        self.torch_device = torch.device("cpu")
        self._view = memoryview(b"")

    @property
    def remark(self) -> str:
        """See Backing."""
        return self.source.remark

    def buffer(self, size_bytes: int) -> Any:
        """See Backing."""
        import torch

        pages = page_buffer(size_bytes, "buffers of experts")
        self._view = memoryview(pages)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def start(self, memory: Memory) -> None:
        """See Backing."""

    def move(self, transfer: Transfer, begin: int, end: int) -> None:
        """See Backing."""
        at = transfer.slot * self._slot_bytes
        self.source.read(transfer.key, begin, self._view[at + begin : at + end])
        if end == transfer.size_bytes:
            self.source.done(transfer.key, self._view[at : at + end])

    def computing(self, slot: int) -> None:
        """See Backing. The host has computed when the call returns."""

    def synchronize(self) -> None:
        """See Backing."""

    def close(self) -> None:
        """See Backing."""
        self._view.release()


class DiskBacking(_Host):
    """RAM <- NVMe: direct reads of the model's file into the buffers."""

    kind = "disk"
    saves = False

    def __init__(self, file: WeightFile, check: str = "first") -> None:
        super().__init__(file, DiskSource(file, check))

    def close(self) -> None:
        """See Backing."""
        super().close()
        self.source.close()

    def save(self, slot: int) -> None:
        """See Backing."""
        raise NotImplementedError("the file is read only (`saves`)")

    def host_weights(self, key: int) -> tuple[Any, Any] | None:
        """See Backing."""
        return None


class MemoryBacking(_Host):
    """RAM <- RAM: one thread copies, as a copy engine does. What a machine without a GPU can try of CUDA's way."""

    kind = "memory"

    def __init__(self, file: WeightFile, check: str = "first", home: MemorySource | None = None) -> None:
        """home: where all experts are; None: they are read in now."""
        source = MemorySource(file, check) if home is None else home
        super().__init__(file, source)
        self._home = Memory(file.sizes, source.tensor)
        self._scratch = np.empty(self._slot_bytes, np.uint8)

    def save(self, slot: int) -> None:
        """See Backing."""
        at = slot * self._slot_bytes
        np.copyto(self._scratch, np.frombuffer(self._view[at : at + self._slot_bytes], np.uint8))

    def host_weights(self, key: int) -> tuple[Any, Any] | None:
        """See Backing."""
        weights: tuple[Any, Any] = self._home.weights[key]
        return weights


class CudaBacking:
    """HBM <- page-locked host memory: copies on a stream of their own.

    The link's thread issues one piece, then sleeps until its event has ended, so a transfer has arrived when its bytes
    have, and what is queued can still be overtaken. Before a slot is written the copy stream waits for the event that
    the computing stream recorded behind its last product with it.
    """

    kind = "cuda"
    saves = True

    def __init__(
        self, file: WeightFile, check: str = "first", home: MemorySource | None = None, index: int = 0
    ) -> None:
        """home: where all experts are, page-locked; None: they are read in now."""
        import torch

        if not torch.cuda.is_available():
            raise BadInput("--link cuda needs a CUDA device and torch sees none; --link memory runs here")
        self._torch, self._slot_bytes = torch, file.sizes.slot_bytes
        self.torch_device = torch.device("cuda", index)
        self._pinned = (MemorySource(file, check, pinned=True) if home is None else home).tensor
        self.remark = ""
        self._home = Memory(file.sizes, self._pinned)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._scratch = torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=True)
        self._used: dict[int, Any] = {}
        self._buffer: Any = None

    def buffer(self, size_bytes: int) -> Any:
        """See Backing."""
        torch = self._torch
        try:
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError:
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            raise NoRoom(f"buffers of experts need {size_bytes:,} bytes of device memory, {free:,} are free") from None
        return self._buffer

    def start(self, memory: Memory) -> None:
        """See Backing."""
        self._torch.cuda.synchronize(self.torch_device)

    def move(self, transfer: Transfer, begin: int, end: int) -> None:
        """See Backing."""
        torch = self._torch
        torch.cuda.set_device(self.torch_device)
        ended = torch.cuda.Event(blocking=True)
        to, source = transfer.slot * self._slot_bytes, transfer.key * self._slot_bytes
        with torch.cuda.stream(self._copies):
            used = self._used.get(transfer.slot)
            if begin == 0 and used is not None:
                self._copies.wait_event(used)
            self._buffer[to + begin : to + end].copy_(self._pinned[source + begin : source + end], non_blocking=True)
            ended.record(self._copies)
        ended.synchronize()

    def computing(self, slot: int) -> None:
        """See Backing."""
        event = self._used.get(slot)
        if event is None:
            event = self._used[slot] = self._torch.cuda.Event()
        event.record(self._torch.cuda.current_stream(self.torch_device))

    def synchronize(self) -> None:
        """See Backing."""
        self._torch.cuda.current_stream(self.torch_device).synchronize()

    def save(self, slot: int) -> None:
        """See Backing."""
        at = slot * self._slot_bytes
        self._scratch.copy_(self._buffer[at : at + self._slot_bytes], non_blocking=True)
        self.synchronize()

    def host_weights(self, key: int) -> tuple[Any, Any] | None:
        """See Backing."""
        weights: tuple[Any, Any] = self._home.weights[key]
        return weights

    def close(self) -> None:
        """See Backing."""
        self._torch.cuda.synchronize(self.torch_device)


def make_home(kind: str, file: WeightFile, check: str = "first") -> MemorySource | None:
    """What several runs over one link may share: all experts in host memory; None where they stay on disk."""
    return None if kind == "disk" else MemorySource(file, check, pinned=kind == "cuda")


def make_backing(
    kind: str, file: WeightFile, check: str = "first", home: MemorySource | None = None
) -> DiskBacking | MemoryBacking | CudaBacking:
    """By name. home: of `make_home`, None: its own. Raises BadInput, NoRoom, ReadFailed."""
    if kind not in KINDS:
        raise BadInput(f"a link is {', '.join(KINDS)}, not {kind!r:.40}")
    if kind == "disk":
        return DiskBacking(file, check)
    return CudaBacking(file, check, home) if kind == "cuda" else MemoryBacking(file, check, home)
