"""Belady's MIN: who is used furthest in the future leaves."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import ClassVar

from moesim.errors import BadInput
from moesim.offload import OffloadContext, Upcoming
from moesim.offload.future import NEVER
from moesim.offload.ranked import HeapEviction
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters. L. A. Belady, IBM Systems Journal 5(2), 1966, for experts of one size.

    Where a miss must evict it has the most hits that any choice of victims gives. Where a miss may bypass the cache
    (`semantics.miss: bypass`) an expert is kept only if its next use comes before a resident one's; as long as calls
    ask for one key, this MIN with bypass is the most hits that any cache of the size can have. With more keys a call it
    follows the cache's rules (what a call found stays until the call is over; misses get room in the order of their
    next use) and may fall a little short of that most, which is `replay.most_hits`. Of equal next uses the lower key
    leaves, and the one that is there stays. Experts of several sizes make the optimum a knapsack problem: then this is
    a policy like others, not a bound.
    """

    knows_future: ClassVar[bool] = True

    def start(self, context: OffloadContext) -> _Belady:
        """See `moesim.offload.EvictionPolicy.start`. Raises BadInput where nobody tells the look-ups to come."""
        if context.upcoming is None:
            raise BadInput(
                "eviction belady needs the look-ups to come, which only a replay of recorded routes knows. "
                "Take it for bounds, and a policy such as lru or lfu to serve with."
            )
        return _Belady(context, context.upcoming)


class _Belady(HeapEviction):
    def __init__(self, context: OffloadContext, upcoming: Upcoming) -> None:
        super().__init__(context.group_K)
        self._upcoming = upcoming
        self._due: list[tuple[int, int]] = []
        """when members were to be used, and who, the soonest first"""

    def rank(self, key: int, now: int) -> int:
        """The sooner it is used the more it is worth. What is told stays true until the next use."""
        after = self._upcoming.next_call(key, now)
        if after != NEVER:
            heappush(self._due, (after, key))
        return -after

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        self.rerank(key, now)

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction. Whose call has passed without asking for it (a router that looks at the cache took another,
        or it was pruned) is ranked anew."""
        while self._due and self._due[0][0] <= now:
            after, key = heappop(self._due)
            if self._worth.get(key) == -after:
                self.rerank(key, now)
        return super().victim(group, incoming, now, evictable)

    def keeps(self, incoming: int, victim: int, now: int) -> bool:
        """See Eviction."""
        return self._upcoming.next_call(incoming, now) < self._upcoming.next_call(victim, now)
