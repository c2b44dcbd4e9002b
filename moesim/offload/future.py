"""The look-ups to come, for bounds and for policies that see queued routes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import numpy as np

from moesim.arrays import IntArray

__all__ = ["NEVER", "Future"]

NEVER = 1 << 62


class Future:
    """Which look-up call asks for which keys (`moesim.offload.Upcoming`)."""

    def __init__(self, calls: Iterable[IntArray | list[int]], num_keys: int) -> None:
        """calls: the keys of each call, from number 0 on."""
        self._calls_K: list[list[int]] = [[] for _ in range(num_keys)]
        for number, keys in enumerate(calls):
            for key in np.asarray(keys).tolist():
                self._calls_K[key].append(number)

    def next_call(self, key: int, now: int) -> int:
        """See `moesim.offload.Upcoming.next_call`."""
        calls = self._calls_K[key]
        at = bisect_right(calls, now)
        return calls[at] if at < len(calls) else NEVER
