"""The cache of experts on a device, as a state machine: who is there, who comes, who may leave.

It knows no clock and moves no bytes. Simulator and mini-runtime both ask it, so they decide alike. Within a look-up
call what was found stays until `release`: experts that compute cannot leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from moesim.arrays import IntArray
from moesim.offload import Eviction

__all__ = ["ABSENT", "LOADING", "RESIDENT", "ExpertCache", "Found"]

ABSENT, LOADING, RESIDENT = 0, 1, 2
"""States of a key: LOADING has its room, and its bytes are on the way."""

Kind = Literal["hit", "late", "load", "stream"]


class Found(NamedTuple):
    """What a look-up found of one key. hit: it is there. late: a prefetch is on its way. load: missed, and it has got
    room now. stream: missed, and it passes through a staging buffer without being kept. cold: a load of what was never
    there before, into free room. evicted: keys that left for it."""

    key: int
    kind: Kind
    cold: bool = False
    evicted: tuple[int, ...] = ()


class ExpertCache:
    """See the module. All sizes in bytes (or any unit); keys are 0 .. len(size_K) - 1."""

    def __init__(
        self, size_K: IntArray, group_K: IntArray, capacity_G: IntArray, eviction: Eviction, bypass: bool = False
    ) -> None:
        """size_K: of each expert. group_K: whose capacity it takes. capacity_G: of each group. bypass: a miss may be
        streamed where the policy would rather keep what is there."""
        self._size: list[int] = size_K.tolist()
        self._group: list[int] = group_K.tolist()
        self._capacity: list[int] = capacity_G.tolist()
        if min(self._size, default=1) <= 0 or min(self._capacity, default=0) < 0:
            raise ValueError("sizes must be positive and capacities not negative")
        if len(self._group) != len(self._size) or max(self._group, default=0) >= len(self._capacity):
            raise ValueError("every key needs a size and a group that exists")
        self.eviction = eviction
        self.bypass = bypass
        self.now = 0
        """look-up calls so far"""
        self._state = bytearray(len(self._size))
        self._fixed = bytearray(len(self._size))
        self._seen = bytearray(len(self._size))
        self._used = [0] * len(self._capacity)
        self._pinned: set[int] = set()

    # -- what is there ------------------------------------------------------------------------------------------
    def state(self, key: int) -> int:
        """ABSENT, LOADING or RESIDENT."""
        return self._state[key]

    def fixed(self, key: int) -> bool:
        """It is on the device for good."""
        return bool(self._fixed[key])

    def resident(self) -> list[int]:
        """Keys that are there, fixed ones included, in order."""
        return [key for key, state in enumerate(self._state) if state == RESIDENT]

    @property
    def pinned(self) -> set[int]:
        """What the last call found and has not been released: it computes."""
        return self._pinned

    def used_G(self) -> IntArray:
        """Taken of each group's capacity, transfers on their way included: int64 [G]."""
        return np.array(self._used, np.int64)

    # -- set-up -------------------------------------------------------------------------------------------------
    def fix(self, keys: Iterable[int]) -> None:
        """These are on the device for good, and take nothing of the capacity."""
        for key in keys:
            if self._state[key] != ABSENT:
                raise ValueError(f"expert {key} is in the cache already")
            self._state[key], self._fixed[key], self._seen[key] = RESIDENT, 1, 1

    def unfix(self, keys: Iterable[int]) -> None:
        """These are not on the device any more. Raises ValueError for one that was not fixed, or computes."""
        for key in keys:
            if not self._fixed[key] or key in self._pinned:
                raise ValueError(f"expert {key} is not fixed, or in use")
            self._state[key], self._fixed[key] = ABSENT, 0

    def place(self, keys: Iterable[int]) -> None:
        """These are in the cache already, in the order in which they came. Raises ValueError where they do not fit."""
        for key in keys:
            if self._state[key] != ABSENT:
                continue
            if self._free(key) < 0:
                raise ValueError(f"expert {key} does not fit into the cache of its group")
            self._enter(key, prefetched=False)
            self._seen[key] = 1

    # -- while it serves ----------------------------------------------------------------------------------------
    def look_up(self, keys: Sequence[int]) -> list[Found]:
        """One call: all `keys` (each once) are judged against what is there now, then misses enter one by one, in
        order. What is found or enters stays until `release`."""
        now = self.now
        self.now += 1
        found: dict[int, Found] = {}
        for key in keys:
            self.eviction.used(key, now)
            if self._state[key] != ABSENT:
                found[key] = Found(key, "hit" if self._state[key] == RESIDENT else "late")
                self._pinned.add(key)
        for key in keys:
            if key not in found:
                found[key] = self._miss(key, now)
            self._seen[key] = 1
        return [found[key] for key in keys]

    def prefetch(self, key: int, arrived: bool) -> tuple[int, ...] | None:
        """Give `key` room before it is asked for. Returns who left for it; None where it is there already, or nobody
        may leave. arrived: it counts as RESIDENT at once (logical completion), else as LOADING."""
        if self._state[key] != ABSENT:
            return None
        left = self._make_room(key, self.now, ask=False)
        if left is None:
            return None
        self._enter(key, prefetched=True)
        self._seen[key] = 1
        if not arrived:
            self._state[key] = LOADING
        return left

    def arrived(self, key: int) -> None:
        """The bytes of a LOADING key are there."""
        if self._state[key] != LOADING:
            raise ValueError(f"expert {key} is not on its way")
        self._state[key] = RESIDENT

    def cancelled(self, key: int) -> None:
        """The transfer of a LOADING key was given up. Raises ValueError where a look-up waits for it."""
        if self._state[key] != LOADING or key in self._pinned:
            raise ValueError(f"expert {key} is not on its way, or waited for")
        self._leave(key)

    def release(self) -> None:
        """What the last call found may leave again."""
        self._pinned.clear()

    # -- inside -------------------------------------------------------------------------------------------------
    def _free(self, key: int) -> int:
        group = self._group[key]
        return self._capacity[group] - self._used[group] - self._size[key]

    def _evictable(self, key: int) -> bool:
        return self._state[key] == RESIDENT and not self._fixed[key] and key not in self._pinned

    def _miss(self, key: int, now: int) -> Found:
        cold = not self._seen[key] and self._free(key) >= 0
        left = self._make_room(key, now, ask=self.bypass)
        if left is None:
            return Found(key, "stream")
        self._enter(key, prefetched=False)
        self._pinned.add(key)
        return Found(key, "load", cold, left)

    def _make_room(self, key: int, now: int, ask: bool) -> tuple[int, ...] | None:
        """Evict until `key` fits, all or nobody; None: it cannot, or the policy keeps what is there."""
        group = self._group[key]
        short = -self._free(key)
        if short <= 0:
            return ()
        if self._size[key] > self._capacity[group]:
            return None
        leaving: list[int] = []
        while short > 0:
            victim = self.eviction.victim(group, key, now, lambda k: self._evictable(k) and k not in leaving)
            if victim is None or (ask and not self.eviction.keeps(key, victim, now)):
                return None
            if not self._evictable(victim) or self._group[victim] != group or victim in leaving:
                raise ValueError(f"the policy evicts expert {victim}, which may not leave")
            leaving.append(victim)
            short -= self._size[victim]
        for victim in leaving:
            self._leave(victim)
        return tuple(leaving)

    def _enter(self, key: int, prefetched: bool) -> None:
        self._state[key] = RESIDENT
        self._used[self._group[key]] += self._size[key]
        self.eviction.loaded(key, self.now, prefetched)

    def _leave(self, key: int) -> None:
        self._state[key] = ABSENT
        self._used[self._group[key]] -= self._size[key]
        self.eviction.evicted(key)

    def _check(self) -> None:
        """Invariants: capacity is kept, every byte is accounted for, who is pinned or fixed is there."""
        used = [0] * len(self._capacity)
        for key, state in enumerate(self._state):
            if state != ABSENT and not self._fixed[key]:
                used[self._group[key]] += self._size[key]
            assert not self._fixed[key] or state == RESIDENT
        assert used == self._used
        assert all(0 <= u <= c for u, c in zip(self._used, self._capacity, strict=True))
        assert all(self._state[key] != ABSENT for key in self._pinned)
