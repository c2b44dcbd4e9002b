"""Who simulates: this process, a pool of processes on this machine, or an existing cluster; one seam for all
(`moesim_tuner.protocols.Workers`), one function behind it (`moesim_tuner.evaluate.evaluate`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what workers are forked from has no use for it
    from moesim_tuner.protocols import Workers

__all__ = ["make_workers"]


def make_workers(
    number: int = 1, timeout_s: float = 600.0, cluster: str | None = None, *, debug: bool = False
) -> Workers:
    """number: tasks at a time; 1: in this process. cluster: address of a Dask scheduler (`tcp://host:port`) whose
    workers do it, instead. timeout_s: a task's longest time. debug: show tracebacks.

    A pool starts in the background: make it before other slow beginnings. Raises BadInput for a number below 1, and for
    a cluster that cannot be used.
    """
    if cluster is not None:
        from moesim_tuner.workers.cluster import ClusterWorkers

        return ClusterWorkers(cluster, timeout_s)
    if number == 1:
        from moesim_tuner.workers.inline import InlineWorkers

        return InlineWorkers(timeout_s)
    from moesim_tuner.workers.pool import PoolWorkers

    return PoolWorkers(number, timeout_s, debug=debug)
