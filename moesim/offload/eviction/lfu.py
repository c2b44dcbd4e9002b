"""Least frequently used leaves."""

from __future__ import annotations

from typing import ClassVar, Literal

from moesim.offload import OffloadContext
from moesim.offload.ranked import HeapEviction, Recency
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """counts: `all` counts every use since the start, whether the expert was there or not (moe-lrc's and MoE-Infinity's
    visits; what a router's counters give); `resident` counts from an expert's entry, the use that fetched it included,
    and forgets it when it leaves (in-cache LFU). Of equal counts the least recently touched leaves (`ranked.Recency`).
    The default is `all`: forgetting makes every newcomer the next victim."""

    knows_future: ClassVar[bool] = False

    counts: Literal["all", "resident"] = "all"

    def start(self, context: OffloadContext) -> _Lfu:
        """See `moesim.offload.EvictionPolicy.start`."""
        return _Lfu(context, self.counts == "resident")


class _Lfu(HeapEviction):
    def __init__(self, context: OffloadContext, forget: bool) -> None:
        super().__init__(context.group_K)
        self._forget = forget
        self._count = [0] * context.num_keys
        self._recency = Recency(context.group_K)

    def rank(self, key: int, now: int) -> tuple[int, int]:
        """Uses, then the last touch."""
        return self._count[key], self._recency.last_K[key]

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        self._recency.used(key, now)
        self._count[key] = 1 if self._forget and key not in self._worth else self._count[key] + 1
        self.rerank(key, now)

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        missed = self._recency.loaded(key, now, prefetched)
        if self._forget:
            self._count[key] = int(missed)
        super().loaded(key, now, prefetched)
