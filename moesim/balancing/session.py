"""A session keeps its target (for its KV cache's sake); requests without a session go round."""

from __future__ import annotations

from moesim.arrays import IntArray
from moesim.balancing import hash_64
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters. The target is a hash of the session's number, whatever the loads."""

    def pick(self, load_D: IntArray, request: int, session: int, count: int) -> int:
        """See `moesim.balancing.BalancingPolicy.pick`."""
        return (count if session < 0 else hash_64(session)) % len(load_D)
