"""Look-ahead: who is used furthest ahead in what the queued requests' known routes show leaves."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from moesim.arrays import AnyArray, IntArray
from moesim.errors import BadInput
from moesim.offload import OffloadContext, Upcoming
from moesim.offload.future import NEVER
from moesim.offload.ranked import ArrayEviction, Recency
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """window: look-up calls after the one that runs whose routes are known. Read-ME (arXiv:2410.19123) routes all
    layers of a token before it runs, so the routes of queued requests are known, and evicts the expert whose next use
    is furthest. What is not used within the window leaves first, the least recently touched before others (ours: the
    paper does not say; with a window beyond the end this is `belady` but for such ties). The default is a batch of 64
    tokens of Read-ME's model, whose layers share one route: one call a token.

    Only engines whose router does not need the hidden state can run it; for all others it is a bound, hence
    `knows_future`.
    """

    knows_future: ClassVar[bool] = True

    window: int = Field(default=64, ge=0)

    def start(self, context: OffloadContext) -> _LookAhead:
        """See `moesim.offload.EvictionPolicy.start`. Raises BadInput where nobody tells the look-ups to come."""
        if context.upcoming is None:
            raise BadInput(
                "eviction look_ahead needs the routes of queued requests, which a replay of recorded routes knows. "
                "Take lru or lfu for traffic whose routes are not known beforehand."
            )
        return _LookAhead(context, context.upcoming, self.window)


class _LookAhead(ArrayEviction):
    def __init__(self, context: OffloadContext, upcoming: Upcoming, window: int) -> None:
        super().__init__(context.group_K)
        self._upcoming, self._window = upcoming, window
        self._next_K = np.full(context.num_keys, NEVER, np.int64)
        self._recency = Recency(context.group_K)
        self._last_K = np.zeros(context.num_keys, np.int64)

    def ranks(self, key_M: IntArray, now: int) -> tuple[AnyArray, ...]:
        """The sooner within the window, the more it is worth, then the last touch."""
        for key in key_M[self._next_K[key_M] <= now].tolist():  # its call has passed without asking for it
            self._next_K[key] = self._upcoming.next_call(key, now)
        next_M = self._next_K[key_M]
        return np.where(next_M > now + self._window, -NEVER, -next_M), self._last_K[key_M]

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        self._next_K[key] = self._upcoming.next_call(key, now)
        self._recency.used(key, now)
        self._last_K[key] = self._recency.last_K[key]

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        self._next_K[key] = self._upcoming.next_call(key, now)
        self._recency.loaded(key, now, prefetched)
        self._last_K[key] = self._recency.last_K[key]
        super().loaded(key, now, prefetched)
