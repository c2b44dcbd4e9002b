"""The target with the least load, the lowest index among equals."""

from __future__ import annotations

from moesim.arrays import IntArray
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    def pick(self, load_D: IntArray, request: int, session: int, count: int) -> int:
        """See `moesim.balancing.BalancingPolicy.pick`."""
        return int(load_D.argmin())
