"""Tokens take the experts that their router chose, wherever those are."""

from __future__ import annotations

from moesim.arrays import BoolArray
from moesim.offload import OffloadContext
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    def start(self, context: OffloadContext, gone_LE: BoolArray | None = None) -> None:
        """See `moesim.offload.ReroutingPolicy.start`: routes stay as they are."""
