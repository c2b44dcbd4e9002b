"""The cache of experts on a device, as a state machine: who is there, who comes, who may leave.

It knows no clock and moves no bytes. Simulator and mini-runtime both ask it, so they decide alike. Within a look-up
call what was found stays until `release`: experts that compute cannot leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, cast

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
        """size_K: of each expert; 0 is allowed (nothing is stored of it). group_K: whose capacity it takes. capacity_G:
        of each group. bypass: a miss may be streamed where the policy would rather keep what is there. Raises
        ValueError for negative sizes and groups that do not exist."""
        self._size: list[int] = size_K.tolist()
        self._group: list[int] = group_K.tolist()
        self._capacity: list[int] = capacity_G.tolist()
        if min(self._size, default=0) < 0 or min(self._capacity, default=0) < 0:
            raise ValueError("sizes and capacities must not be negative")
        groups = range(len(self._capacity))
        if len(self._group) != len(self._size) or not all(group in groups for group in set(self._group)):
            raise ValueError("every key needs a size and a group that exists")
        self.eviction = eviction
        self.bypass = bypass
        self.now = 0
        """look-up calls so far; the last one had number now - 1, which is what policies are told"""
        keys = len(self._size)
        self._state = bytearray(keys)
        self._fixed = bytearray(keys)
        self._seen = bytearray(keys)
        self._may = bytearray(keys)
        """1 for who may leave: RESIDENT, neither fixed nor pinned, not chosen to leave already"""
        self._used = [0] * len(self._capacity)
        self._pinned: set[int] = set()
        self._stuck: set[int] = set()
        """groups in which the running call has found that nobody may leave"""
        self._hit = [Found(key, "hit") for key in range(keys)]
        self._evictable = cast("Callable[[int], bool]", self._may.__getitem__)

    # -- what is there ------------------------------------------------------------------------------------------
    def state(self, key: int) -> int:
        """ABSENT, LOADING or RESIDENT."""
        return self._state[key]

    def absent(self, keys: Iterable[int]) -> list[int]:
        """Those of `keys` that are ABSENT, in their order."""
        state = self._state
        return [key for key in keys if state[key] == ABSENT]

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
        """These are on the device for good, and take nothing of the capacity. Raises ValueError for one that is in the
        cache; then none is fixed."""
        keys = list(keys)
        for key in keys:
            if self._state[key] != ABSENT:
                raise ValueError(f"expert {key} is in the cache already")
        for key in keys:
            self._state[key], self._fixed[key], self._seen[key] = RESIDENT, 1, 1

    def unfix(self, keys: Iterable[int]) -> None:
        """These are not on the device any more. Raises ValueError for one that was not fixed, or computes; then all
        stay."""
        keys = list(keys)
        for key in keys:
            if not self._fixed[key] or key in self._pinned:
                raise ValueError(f"expert {key} is not fixed, or in use")
        for key in keys:
            self._state[key], self._fixed[key] = ABSENT, 0

    def place(self, keys: Iterable[int]) -> None:
        """These are in the cache already, in the order in which they came; who is there stays as it is. Raises
        ValueError where they do not fit."""
        for key in keys:
            if self._state[key] != ABSENT:
                continue
            if self._free(key) < 0:
                raise ValueError(f"expert {key} does not fit into the cache of its group")
            self._enter(key, prefetched=False)
            self._seen[key] = self._may[key] = 1

    # -- while it serves ----------------------------------------------------------------------------------------
    def look_up(self, keys: Sequence[int]) -> list[Found]:
        """One call: all `keys` (each once) are judged against what is there now, then misses enter one by one, in
        their order; where they may bypass the cache, in the policy's order. What is found or enters stays until
        `release`. So a call may ask for more than fits: who finds nobody that may leave is streamed.

        Raises ValueError where a missed key stands twice in `keys`.
        """
        now = self.now
        self.now += 1
        state, pinned, may, used = self._state, self._pinned, self._may, self.eviction.used
        out: list[Found | None] = []
        misses: list[int] = []
        for key in keys:
            used(key, now)
            there = state[key]
            if there == ABSENT:
                misses.append(key)
                out.append(None)
                continue
            pinned.add(key)
            may[key] = 0
            out.append(self._hit[key] if there == RESIDENT else Found(key, "late"))
        if not misses:
            return cast("list[Found]", out)
        self._stuck.clear()
        if self.bypass and len(misses) > 1:
            misses = list(self.eviction.order(misses, now))
            entered = {key: self._miss(key) for key in misses}
            return [entered[key] if found is None else found for key, found in zip(keys, out, strict=True)]
        miss = self._miss
        return [miss(key) if found is None else found for key, found in zip(keys, out, strict=True)]

    def prefetch(self, key: int, arrived: bool) -> tuple[int, ...] | None:
        """Give `key` room before it is asked for. Returns who left for it; None where it is there already, or nobody
        may leave. arrived: it counts as RESIDENT at once (logical completion), else as LOADING."""
        if self._state[key] != ABSENT:
            return None
        left = self._make_room(key, ask=False)
        if left is None:
            return None
        self._enter(key, prefetched=True)
        self._seen[key] = 1
        if arrived:
            self._may[key] = 1
        else:
            self._state[key] = LOADING
        return left

    def arrived(self, key: int) -> None:
        """The bytes of a LOADING key are there."""
        if self._state[key] != LOADING:
            raise ValueError(f"expert {key} is not on its way")
        self._state[key] = RESIDENT
        self._may[key] = key not in self._pinned

    def cancelled(self, key: int) -> None:
        """The transfer of a LOADING key was given up. Raises ValueError where a look-up waits for it."""
        if self._state[key] != LOADING or key in self._pinned:
            raise ValueError(f"expert {key} is not on its way, or waited for")
        self._leave(key)

    def release(self) -> None:
        """What the last call found may leave again."""
        state, fixed, may = self._state, self._fixed, self._may
        for key in self._pinned:
            may[key] = state[key] == RESIDENT and not fixed[key]
        self._pinned.clear()

    # -- inside -------------------------------------------------------------------------------------------------
    def _free(self, key: int) -> int:
        """Room that would be left with `key`; negative: so much must leave."""
        group = self._group[key]
        return self._capacity[group] - self._used[group] - self._size[key]

    def _miss(self, key: int) -> Found:
        if self._state[key] != ABSENT:
            raise ValueError(f"a look-up asks for expert {key} twice")
        seen, self._seen[key] = self._seen[key], 1
        group, size = self._group[key], self._size[key]
        left: tuple[int, ...] = ()
        if self._used[group] + size > self._capacity[group]:
            gone = None if group in self._stuck else self._make_room(key, ask=self.bypass)
            if gone is None:
                return Found(key, "stream")
            left = gone
        self._enter(key, prefetched=False)
        self._pinned.add(key)
        return Found(key, "load", not seen and not left, left)

    def _make_room(self, key: int, ask: bool) -> tuple[int, ...] | None:
        """Evict until `key` fits, all or nobody; None: it cannot, or the policy keeps what is there."""
        group, now, may = self._group[key], self.now - 1, self._may
        short = -self._free(key)
        if short <= 0:
            return ()
        if self._size[key] > self._capacity[group]:
            return None
        leaving: list[int] = []
        while short > 0:
            victim = self.eviction.victim(group, key, now, self._evictable)
            if victim is None and not leaving:
                self._stuck.add(group)
            if victim is None or (ask and not self.eviction.keeps(key, victim, now)):
                for chosen in leaving:
                    may[chosen] = 1
                return None
            if not may[victim] or self._group[victim] != group:
                raise ValueError(f"the policy evicts expert {victim}, which may not leave")
            leaving.append(victim)
            may[victim] = 0
            short -= self._size[victim]
        for victim in leaving:
            self._leave(victim)
        return tuple(leaving)

    def _enter(self, key: int, prefetched: bool) -> None:
        self._state[key] = RESIDENT
        self._used[self._group[key]] += self._size[key]
        self.eviction.loaded(key, self.now - 1, prefetched)

    def _leave(self, key: int) -> None:
        self._state[key] = ABSENT
        self._may[key] = 0
        self._used[self._group[key]] -= self._size[key]
        self.eviction.evicted(key)

    def _check(self) -> None:
        """Invariants: capacity is kept, every byte is accounted for, who is pinned or fixed is there, and who may leave
        is there, not fixed and not pinned."""
        used = [0] * len(self._capacity)
        for key, state in enumerate(self._state):
            if state != ABSENT and not self._fixed[key]:
                used[self._group[key]] += self._size[key]
            assert not self._fixed[key] or state == RESIDENT
            assert self._may[key] == (state == RESIDENT and not self._fixed[key] and key not in self._pinned)
        assert used == self._used
        assert all(0 <= u <= c for u, c in zip(self._used, self._capacity, strict=True))
        assert all(self._state[key] != ABSENT for key in self._pinned)
