"""Sliding frequency: who was used least in the last tokens leaves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field

from moesim.offload import OffloadContext, StepRoutes
from moesim.offload.ranked import HeapEviction, Recency
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """window: so much of the past counts. unit: of the window; `tokens` (steps count with all their tokens, and the one
    that runs is never cut) or `look_ups` (calls of all layers together). A use counts once a call, whether the expert
    was there or not; of equal counts the least recently touched leaves (`ranked.Recency`).

    It looks back where moe-lrc's segment cache (arXiv:2505.16056: activations of the next m tokens, then recency) looks
    ahead. The default window is the second largest of the four lengths measured there (4, 16, 64, 256 tokens).
    """

    knows_future: ClassVar[bool] = False

    window: int = Field(default=64, ge=1)
    unit: Literal["tokens", "look_ups"] = "tokens"

    def start(self, context: OffloadContext) -> _Sliding:
        """See `moesim.offload.EvictionPolicy.start`."""
        return _Sliding(context, self.window, self.unit == "tokens")


class _Sliding(HeapEviction):
    def __init__(self, context: OffloadContext, window: int, in_tokens: bool) -> None:
        super().__init__(context.group_K)
        self._window, self._in_tokens = window, in_tokens
        self._tokens = 0
        self._uses: deque[tuple[int, int]] = deque()
        """when, and which key, within the window"""
        self._count = [0] * context.num_keys
        self._recency = Recency(context.group_K)

    def rank(self, key: int, now: int) -> tuple[int, int]:
        """Uses within the window, then the last touch."""
        return self._count[key], self._recency.last_K[key]

    def begin(self, step: StepRoutes) -> None:
        """See Eviction."""
        self._tokens += len(step.expert_TLK)

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        self._forget(now)
        self._uses.append((self._tokens if self._in_tokens else now, key))
        self._count[key] += 1
        self._recency.used(key, now)
        self.rerank(key, now)

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        self._recency.loaded(key, now, prefetched)
        super().loaded(key, now, prefetched)

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction."""
        self._forget(now)
        return super().victim(group, incoming, now, evictable)

    def _forget(self, now: int) -> None:
        """Drop the uses before the window: it ends with the token or call that runs."""
        last_out = (self._tokens if self._in_tokens else now) - self._window
        while self._uses and self._uses[0][0] <= last_out:
            key = self._uses.popleft()[1]
            self._count[key] -= 1
            self.rerank(key, now)
