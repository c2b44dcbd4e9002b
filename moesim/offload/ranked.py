"""What eviction policies share that rank experts: the least one leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesim.arrays import IntArray
from moesim.offload import StepRoutes

__all__ = ["RankedEviction"]


class RankedEviction:
    """`moesim.offload.Eviction` where `rank(key, now)` says what a key is worth; of equals the lower key leaves."""

    def __init__(self, group_K: IntArray) -> None:
        self._group: list[int] = group_K.tolist()
        # dicts keep the order of insertion and, unlike sets, do not depend on hashes
        self._members: list[dict[int, None]] = [{} for _ in range(max(self._group, default=0) + 1)]

    def rank(self, key: int, now: int) -> Any:
        """Worth of a key, comparable; the least leaves."""
        raise NotImplementedError

    def begin(self, step: StepRoutes) -> None:
        """See Eviction."""

    def used(self, key: int, now: int) -> None:
        """See Eviction."""

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        self._members[self._group[key]][key] = None

    def evicted(self, key: int) -> None:
        """See Eviction."""
        del self._members[self._group[key]][key]

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction."""
        keys = [key for key in self._members[group] if evictable(key)]
        return min(keys, key=lambda key: (self.rank(key, now), key)) if keys else None

    def keeps(self, incoming: int, victim: int, now: int) -> bool:
        """See Eviction. Equals are kept: fresh news against old."""
        return bool(self.rank(incoming, now) >= self.rank(victim, now))
