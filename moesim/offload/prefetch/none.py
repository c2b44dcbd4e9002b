"""Nothing is fetched before it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.offload import OffloadContext, StepRoutes, Wanted
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    def start(self, context: OffloadContext) -> _Nothing:
        """See `moesim.offload.PrefetchPolicy.start`."""
        return _Nothing()


class _Nothing:
    def begin(self, step: StepRoutes) -> None:
        """See Prefetch."""

    def wanted(self, layer: int) -> list[Wanted]:
        """See Prefetch."""
        return []

    def told(self, layer: int, found: Sequence[tuple[int, str]]) -> None:
        """See Prefetch."""
