"""Static popularity: the least popular of the traffic that was learned from leaves."""

from __future__ import annotations

from typing import ClassVar

from moesim.offload import OffloadContext
from moesim.offload.ranked import HeapEviction
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters. Popularity is `OffloadContext.popularity_LE` and never changes; of equally popular experts the
    higher key leaves, as the warm start of `offload/cached.py` fills.

    Where misses may bypass the cache (`semantics.miss: bypass`) this is a static cache: once the most popular that fit
    are in, none of them ever leaves, and everything else passes through. Where a miss must evict, the least popular
    slots take what passes: as many as one call misses.
    """

    knows_future: ClassVar[bool] = False

    def start(self, context: OffloadContext) -> _Static:
        """See `moesim.offload.EvictionPolicy.start`."""
        return _Static(context)


class _Static(HeapEviction):
    def __init__(self, context: OffloadContext) -> None:
        super().__init__(context.group_K)
        self._popularity: list[float] = context.popularity_LE.reshape(-1).tolist()

    def rank(self, key: int, now: int) -> tuple[float, int]:
        """Activations in the traffic that was learned from."""
        return self._popularity[key], -key
