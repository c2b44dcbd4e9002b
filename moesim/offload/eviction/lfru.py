"""Least frequent, recently used: frequency and recency together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import AnyArray, IntArray
from moesim.offload import OffloadContext
from moesim.offload.ranked import ArrayEviction, Recency
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """form: `weighted` or `partitioned`. counts: `resident` counts uses since an expert entered, the one that fetched
    it included, and forgets them when it leaves; `all` counts since the start. privileged: share of a group's experts
    that `partitioned` protects.

    - `weighted` is what offloading engines call LFRU (vLLM's pull request 37190 and what descends from it): the worth
      of an expert is its uses over its age, the age being the touches of its group since its last one, plus one.
      Engines forget the counts, so `resident` is the default. Ours: a call is told as a whole before its misses evict.
    - `partitioned` is LFRU of cache networks (M. Bilal, S.-G. Kang, IEEE Access 5, 2017, arXiv:1702.04078): new content
      enters a privileged part that is ordered by recency, what leaves that part falls into an unprivileged one, and the
      least frequent of the latter leaves. A reconstruction from the abstract: privileged are the most recently touched
      `privileged` of a group's experts, rounded up (default one half: the paper's share was not found), and frequency
      is counted exactly, where theirs is an approximation by windows.

    Of equals the least recently touched leaves.
    """

    knows_future: ClassVar[bool] = False

    form: Literal["weighted", "partitioned"] = "weighted"
    counts: Literal["resident", "all"] = "resident"
    privileged: float = Field(default=0.5, ge=0, le=1)

    def start(self, context: OffloadContext) -> _Lfru:
        """See `moesim.offload.EvictionPolicy.start`."""
        forget = self.counts == "resident"
        return _Lfru(context, forget) if self.form == "weighted" else _Partitioned(context, forget, self.privileged)


class _Lfru(ArrayEviction):
    def __init__(self, context: OffloadContext, forget: bool) -> None:
        super().__init__(context.group_K)
        self._forget = forget
        self._count_K = np.zeros(context.num_keys, np.int64)
        self._recency = Recency(context.group_K)
        self._last_K = np.zeros(context.num_keys, np.int64)

    def ranks(self, key_M: IntArray, now: int) -> tuple[AnyArray, ...]:
        """Uses over age, then the last touch."""
        if not len(key_M):
            return (key_M,)
        last_M = self._last_K[key_M]
        clock = self._recency.clock_G[self._group[int(key_M[0])]]  # keys of one comparison share a group
        return self._count_K[key_M] / (clock - last_M + 1), last_M

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        self._recency.used(key, now)
        self._last_K[key] = self._recency.last_K[key]
        if self._forget and not self._there_K[key]:
            self._count_K[key] = 0
        self._count_K[key] += 1

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        missed = self._recency.loaded(key, now, prefetched)
        self._last_K[key] = self._recency.last_K[key]
        if self._forget:
            self._count_K[key] = missed
        super().loaded(key, now, prefetched)


class _Partitioned(_Lfru):
    def __init__(self, context: OffloadContext, forget: bool, privileged: float) -> None:
        super().__init__(context, forget)
        self._share = privileged

    def ranks(self, key_M: IntArray, now: int) -> tuple[AnyArray, ...]:
        """Privileged or not, then uses (last touch for the privileged), then the last touch."""
        last_M = self._last_K[key_M]
        protected = int(np.ceil(self._share * len(key_M)))
        recent_M = np.argsort(np.argsort(-last_M, kind="stable"), kind="stable") < protected
        return recent_M, np.where(recent_M, last_M, self._count_K[key_M]), last_M

    def keeps(self, incoming: int, victim: int, now: int) -> bool:
        """See Eviction. What is asked for now is the most recent, so it is privileged."""
        return True

    def order(self, keys: Sequence[int], now: int) -> Sequence[int]:
        """See Eviction."""
        return keys
