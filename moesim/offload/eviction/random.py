"""Any one leaves, with equal probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from moesim.offload import OffloadContext
from moesim.offload.ranked import RankedEviction
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Policy"]

_BLOCK = 1024


class Policy(Spec):
    """No parameters: the seed is the run's. The baseline of Read-ME (arXiv:2410.19123, table of hit rates), and what a
    cache without any information does. The n-th victim is a function of the seed, n and who may leave, in the order in
    which they entered; what is asked for now always enters."""

    knows_future: ClassVar[bool] = False

    def start(self, context: OffloadContext) -> _Random:
        """See `moesim.offload.EvictionPolicy.start`."""
        return _Random(context)


class _Random(RankedEviction):
    def __init__(self, context: OffloadContext) -> None:
        super().__init__(context.group_K)
        self._seed = context.seed
        self._drawn = 0
        self._block: list[float] = []

    def victim(self, group: int, incoming: int, now: int, evictable: Callable[[int], bool]) -> int | None:
        """See Eviction."""
        keys = [key for key in self._members[group] if evictable(key)]
        if not keys:
            return None
        block, at = divmod(self._drawn, _BLOCK)
        if at == 0:
            self._block = generator(self._seed, "random eviction", block).random(_BLOCK).tolist()
        self._drawn += 1
        return keys[int(self._block[at] * len(keys))]

    def keeps(self, incoming: int, victim: int, now: int) -> bool:
        """See Eviction."""
        return True

    def order(self, keys: Sequence[int], now: int) -> Sequence[int]:
        """See Eviction."""
        return keys
