"""Buffers of one expert each: who has which, and that none is lost or given twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moesim_kernels.runtime.sizes import ModelSizes

__all__ = ["Memory", "Slots"]


class Slots:
    """`number` buffers, lent and given back by number; the lowest free one first."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._free = list(range(number - 1, -1, -1))
        self._lent = bytearray(number)

    @property
    def free(self) -> int:
        """How many are."""
        return len(self._free)

    def take(self) -> int:
        """A free one. Raises ValueError where there is none."""
        if not self._free:
            raise ValueError(f"all {self.number} buffers are in use")
        slot = self._free.pop()
        self._lent[slot] = 1
        return slot

    def give(self, slots: Iterable[int]) -> None:
        """These are free again. Raises ValueError for one that was."""
        for slot in slots:
            if not self._lent[slot]:
                raise ValueError(f"buffer {slot} is free already")
            self._lent[slot] = 0
            self._free.append(slot)

    def _check(self, held: Iterable[int]) -> None:
        """Invariants: `held` lists every lent buffer once, and nobody else's."""
        held = list(held)
        assert len(set(held)) == len(held), "one buffer has two owners"
        assert sorted(held) == [i for i, lent in enumerate(self._lent) if lent], "a buffer was lost"
        assert sorted([*held, *self._free]) == list(range(self.number))


class Memory:
    """The bytes behind slots as matrices: w13 [2F, H], w2 [H, F] of each. buffer: uint8 tensor of whole slots."""

    def __init__(self, sizes: ModelSizes, buffer: Any) -> None:
        import torch

        kind = getattr(torch, sizes.dtype)
        first = 2 * sizes.inner * sizes.hidden
        self.buffer = buffer
        self.weights: list[tuple[Any, Any]] = []
        for at in range(0, buffer.numel(), sizes.slot_bytes):
            flat = buffer[at : at + sizes.expert_bytes].view(kind)
            self.weights.append(
                (flat[:first].view(2 * sizes.inner, sizes.hidden), flat[first:].view(sizes.hidden, sizes.inner))
            )
