"""Least recently used leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from moesim.arrays import IntArray
from moesim.offload import OffloadContext, StepRoutes
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    knows_future: ClassVar[bool] = False

    def start(self, context: OffloadContext) -> _Lru:
        """See `moesim.offload.EvictionPolicy.start`."""
        return _Lru(context.group_K)


class _Lru:
    """Each group's keys in the order of their last use: used again, a key goes to the end."""

    def __init__(self, group_K: IntArray) -> None:
        self._group: list[int] = group_K.tolist()
        self._order: list[dict[int, None]] = [{} for _ in range(max(self._group, default=0) + 1)]

    def begin(self, step: StepRoutes) -> None:
        """See Eviction."""

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        order = self._order[self._group[key]]
        if key in order:
            del order[key]
            order[key] = None

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        self._order[self._group[key]][key] = None

    def evicted(self, key: int) -> None:
        """See Eviction."""
        del self._order[self._group[key]][key]

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction."""
        return next((key for key in self._order[group] if evictable(key)), None)

    def keeps(self, incoming: int, victim: int, now: int) -> bool:
        """See Eviction. What is asked for now is always the more recent."""
        return True
