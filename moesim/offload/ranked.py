"""What eviction policies share that rank experts: the least one leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.offload import StepRoutes

__all__ = ["ArrayEviction", "HeapEviction", "RankedEviction", "Recency"]


class RankedEviction:
    """`moesim.offload.Eviction` where `rank(key, now)` says what a key is worth; of equals the lower key leaves.

    Looks at every member of a group for each victim, so ranks may change at any time.
    """

    def __init__(self, group_K: IntArray) -> None:
        self._group: list[int] = group_K.tolist()
        # dicts keep the order of insertion and, unlike sets, do not depend on hashes
        self._members: list[dict[int, None]] = [{} for _ in range(max(self._group, default=0) + 1)]

    def rank(self, key: int, now: int) -> Any:
        """Worth of a key, comparable; the least leaves. Asked of keys that are absent, too."""
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

    def order(self, keys: Sequence[int], now: int) -> Sequence[int]:
        """See Eviction: by rank, the greatest first, of equals the first that was asked for."""
        return sorted(keys, key=lambda key: self.rank(key, now), reverse=True)  # a stable sort, reversed or not


class HeapEviction(RankedEviction):
    """A RankedEviction where the rank of a member changes only when the policy says so (`rerank`), so that victims come
    from a heap in logarithmic time. A key is ranked when it enters."""

    def __init__(self, group_K: IntArray) -> None:
        super().__init__(group_K)
        self._heap: list[list[tuple[Any, int]]] = [[] for _ in self._members]
        self._worth: dict[int, Any] = {}
        """rank of each member as last told"""

    def rerank(self, key: int, now: int) -> None:
        """The rank of a member has changed; nothing happens for others."""
        if key not in self._worth:
            return
        group = self._group[key]
        heap, members = self._heap[group], self._members[group]
        self._worth[key] = worth = self.rank(key, now)
        if len(heap) > 64 + 8 * len(members):  # old ranks stay in the heap until they come up, or are too many
            heap[:] = [(self._worth[member], member) for member in members]
            heapify(heap)
        else:
            heappush(heap, (worth, key))

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        super().loaded(key, now, prefetched)
        self._worth[key] = None
        self.rerank(key, now)

    def evicted(self, key: int) -> None:
        """See Eviction."""
        super().evicted(key)
        del self._worth[key]

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction."""
        heap, worth = self._heap[group], self._worth
        found: int | None = None
        aside: list[tuple[Any, int]] = []
        while heap:
            rank, key = heap[0]
            if key not in worth or worth[key] != rank:
                heappop(heap)
            elif evictable(key):
                found = key
                break
            else:
                aside.append(heappop(heap))
        for entry in aside:
            heappush(heap, entry)
        return found


class ArrayEviction(RankedEviction):
    """A RankedEviction whose ranks are arrays over keys, for ranks that change with every call."""

    def __init__(self, group_K: IntArray) -> None:
        super().__init__(group_K)
        self._keys_G = [np.flatnonzero(group_K == group) for group in range(len(self._members))]
        self._there_K = np.zeros(len(group_K), bool)

    def ranks(self, key_M: IntArray, now: int) -> tuple[AnyArray, ...]:
        """Worth of keys, the most significant part first, each part an array [M]; of equals the lower key leaves."""
        raise NotImplementedError

    def rank(self, key: int, now: int) -> tuple[float, ...]:
        """See RankedEviction."""
        return tuple(part.item() for part in self.ranks(np.array([key]), now))

    def members(self, group: int) -> IntArray:
        """Keys of a group that are in the cache, ascending."""
        keys = self._keys_G[group]
        there: IntArray = keys[self._there_K[keys]]
        return there

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        self._there_K[key] = True

    def evicted(self, key: int) -> None:
        """See Eviction."""
        self._there_K[key] = False

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction."""
        key_M = self.members(group)
        order_M = np.lexsort((key_M, *reversed(self.ranks(key_M, now))))
        return next((key for key in key_M[order_M].tolist() if evictable(key)), None)


class Recency:
    """When keys were last touched, as a running number of their group: every use is a touch, and so is entering without
    having been asked for in this call (prefetched, or there at the start). Touches of a group are never equal, so they
    break every tie."""

    def __init__(self, group_K: IntArray) -> None:
        self._group: list[int] = group_K.tolist()
        self.last_K = [0] * len(self._group)
        """number of the last touch of each key; 0: never"""
        self.clock_G = [0] * (max(self._group, default=0) + 1)
        """touches of each group so far"""
        self._call_K = [-2] * len(self._group)

    def used(self, key: int, now: int) -> None:
        """A look-up asked for `key`."""
        self._call_K[key] = now
        self._touch(key)

    def loaded(self, key: int, now: int, prefetched: bool) -> bool:
        """`key` has entered. Returns whether it did because this call asked for it."""
        missed = not prefetched and self._call_K[key] == now
        if not missed:
            self._touch(key)
        return missed

    def _touch(self, key: int) -> None:
        group = self._group[key]
        self.clock_G[group] += 1
        self.last_K[key] = self.clock_G[group]
