"""Least recently used leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from moesim.arrays import IntArray
from moesim.offload import OffloadContext, StepRoutes
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters. Keys of one call count as used in their order, whether they were there or not; so what a group
    holds is always the last ones used, and a larger cache holds what a smaller one does (a stack policy), as long as no
    call asks for more than fits. An expert that was prefetched counts as used when it entered."""

    knows_future: ClassVar[bool] = False

    def start(self, context: OffloadContext) -> _Lru:
        """See `moesim.offload.EvictionPolicy.start`."""
        return _Lru(context.group_K)


class _Lru:
    """Each group's keys in the order of their last use: used again, a key goes to the end. Keys that were asked for and
    have not entered stand in it, too, so that they enter in the order of their use; a victim's search drops them."""

    def __init__(self, group_K: IntArray) -> None:
        self._group: list[int] = group_K.tolist()
        self._order: list[dict[int, None]] = [{} for _ in range(max(self._group, default=0) + 1)]
        self._there = bytearray(len(self._group))

    def begin(self, step: StepRoutes) -> None:
        """See Eviction."""

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        order = self._order[self._group[key]]
        order.pop(key, None)
        order[key] = None

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        order = self._order[self._group[key]]
        if prefetched:
            order.pop(key, None)
        order.setdefault(key)
        self._there[key] = 1

    def evicted(self, key: int) -> None:
        """See Eviction."""
        del self._order[self._group[key]][key]
        self._there[key] = 0

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction."""
        order = self._order[group]
        gone: list[int] = []
        for key in order:
            if evictable(key):
                for old in gone:
                    del order[old]
                return key
            if not self._there[key]:  # before a victim: not of this call, whose keys are the last ones
                gone.append(key)
        return None

    def keeps(self, incoming: int, victim: int, now: int) -> bool:
        """See Eviction. What is asked for now is always the more recent."""
        return True

    def order(self, keys: Sequence[int], now: int) -> Sequence[int]:
        """See Eviction."""
        return keys
