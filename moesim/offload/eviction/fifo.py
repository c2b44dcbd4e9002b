"""First in, first out: who entered first leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from moesim.offload import OffloadContext
from moesim.offload.ranked import RankedEviction
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters. Uses do not count; what is asked for now always enters."""

    knows_future: ClassVar[bool] = False

    def start(self, context: OffloadContext) -> _Fifo:
        """See `moesim.offload.EvictionPolicy.start`."""
        return _Fifo(context.group_K)


class _Fifo(RankedEviction):
    """Members are kept in the order in which they entered."""

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction."""
        return next((key for key in self._members[group] if evictable(key)), None)

    def keeps(self, incoming: int, victim: int, now: int) -> bool:
        """See Eviction."""
        return True

    def order(self, keys: Sequence[int], now: int) -> Sequence[int]:
        """See Eviction."""
        return keys
