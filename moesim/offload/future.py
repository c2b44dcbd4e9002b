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
        """calls: the keys of each call, from number 0 on, empty ones included."""
        keys: list[int] = []
        lengths: list[int] = []
        for call in calls:
            keys.extend(call.tolist() if isinstance(call, np.ndarray) else call)
            lengths.append(len(call))
        key_N = np.array(keys, np.int64)
        call_N = np.repeat(np.arange(len(lengths)), lengths)
        order = np.argsort(key_N, kind="stable")
        parts = np.cumsum(np.bincount(key_N, minlength=num_keys))[:-1]
        self._calls_K: list[list[int]] = [part.tolist() for part in np.split(call_N[order], parts)]

    def next_call(self, key: int, now: int) -> int:
        """See `moesim.offload.Upcoming.next_call`."""
        calls = self._calls_K[key]
        at = bisect_right(calls, now)
        return calls[at] if at < len(calls) else NEVER
