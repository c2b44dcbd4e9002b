"""What a kind of link needs of the machine: `backings` has one for a disk, for host memory and for CUDA."""

from __future__ import annotations

from typing import Any, Protocol

from moesim_kernels.runtime.link import Transfer
from moesim_kernels.runtime.slots import Memory

__all__ = ["Backing"]


class Backing(Protocol):
    """What a kind of link needs of the machine (`backings`)."""

    kind: str
    saves: bool
    """evicted experts can travel back"""
    torch_device: Any

    @property
    def remark(self) -> str:
        """What a reader of the figures should know, or empty."""
        ...

    def buffer(self, size_bytes: int) -> Any:
        """uint8 tensor of so many bytes where experts compute. Raises NoRoom."""
        ...

    def move(self, transfer: Transfer, begin: int, end: int) -> None:
        """Carry bytes [begin, end) of a transfer into its slot; called by the link's thread, returns when they are
        there."""
        ...

    def computing(self, slot: int) -> None:
        """The computing thread has issued work that reads `slot`."""
        ...

    def synchronize(self) -> None:
        """What the computing thread has issued is done."""
        ...

    def save(self, slot: int) -> None:
        """Carry a slot back to the host; returns when it may be written over."""
        ...

    def host_weights(self, key: int) -> tuple[Any, Any] | None:
        """w13, w2 of an expert in host memory, to compute there; None: nothing can compute from where they are."""
        ...

    def start(self, memory: Memory) -> None:
        """The buffers behind the slots."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...
