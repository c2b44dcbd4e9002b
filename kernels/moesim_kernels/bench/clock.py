"""Clocks: one sample of a prepared case, in nanoseconds a call. torch is imported only for CUDA.

A sample of a tiny operation is several calls back to back, each on the next rotation, so that it lasts long against the
clock's resolution. On CUDA it is one replay of a CUDA graph of several calls between two events, after a read of more
than the L2 holds, which empties the cache (a write would leave it full of lines that the sample has to write back) and
keeps the device busy while the host enqueues.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from moesim_kernels.bench.pool import Device, Pool, Prepared

__all__ = ["CudaSampler", "HostSampler", "OwnSampler", "Sampler", "repeats", "sampler"]

MIN_SAMPLE_NS = 1_000_000
RESOLUTIONS = 50
MAX_REPEATS = 10_000
_COLD_CALLS = 2  # of a sample whose every call begins with cold caches
_COVERED_NS = 2_000_000  # a call shorter than this is run once untimed before each sample: code and inputs come in
_LONG_NS = 20_000_000
GRAPH_CALLS = 10
WARM_REPLAYS = 5
_GRAPH_NS = 20_000_000  # no more calls in a graph than fill this


class Sampler(Protocol):
    """Takes samples of one case."""

    remark: str  # what a reader of the log should know, or empty

    def sample(self) -> tuple[float, float]:
        """(ns a call by the case's clock, ns a call by the wall)."""
        ...

    def close(self) -> None:
        """Free what the case holds."""
        ...


def repeats(call_ns: float, resolution_ns: float) -> int:
    """Calls in one sample: at least 1 ms and 50 resolutions of the clock, at most 10,000 calls."""
    least = max(MIN_SAMPLE_NS, RESOLUTIONS * resolution_ns)
    return max(1, min(MAX_REPEATS, -int(-least // max(1.0, call_ns))))


class HostSampler:
    """Samples with a clock of the host: CPU time of this thread, or the wall."""

    def __init__(self, prepared: Prepared, thread: bool, start: int = 0) -> None:
        self.remark = prepared.note
        self._prepared = prepared
        self._now: Callable[[], int] = time.thread_time_ns if thread else time.perf_counter_ns
        self._at = start
        info = time.get_clock_info("thread_time") if thread else time.get_clock_info("perf_counter")
        resolution_ns = info.resolution * 1e9
        self.inner = 1
        call_ns, _ = self._timed(1)
        if call_ns < _LONG_NS:  # else what torch prepares at the first call of a shape does not show
            call_ns, _ = self._timed(1)
            while (wanted := repeats(call_ns, resolution_ns)) > self.inner:
                self.inner = min(wanted, 8 * self.inner)  # a short try overstates a call: come from below
                call_ns, _ = self._timed(self.inner)
        self._cover = prepared.cool is None and (prepared.follows or call_ns < _COVERED_NS)
        if prepared.cool is not None:
            self.inner = _COLD_CALLS

    def _calls(self, count: int) -> None:
        run, rotations, at = self._prepared.run, self._prepared.rotations, self._at
        for i in range(at, at + count):
            run(i % rotations)
        self._at = at + count

    def _timed(self, count: int) -> tuple[float, float]:
        wall, start = time.perf_counter_ns(), self._now()
        self._calls(count)
        taken, wall_taken = self._now() - start, time.perf_counter_ns() - wall
        return max(1, taken) / count, max(1, wall_taken) / count

    def sample(self) -> tuple[float, float]:
        """(ns a call by the clock, ns a call by the wall)."""
        if self._cover:
            self._calls(1)
        if self._prepared.cool is None:
            return self._timed(self.inner)
        each = []
        for _ in range(self.inner):
            self._prepared.cool()
            each.append(self._timed(1))
        return sum(ns for ns, _ in each) / self.inner, sum(wall for _, wall in each) / self.inner

    def close(self) -> None:
        """Free what the case holds."""
        self._prepared.close()


class CudaSampler:
    """Samples with CUDA events, around a replayed graph where the case may be captured, else around eager calls."""

    def __init__(self, prepared: Prepared, device: Device, pool: Pool, start: int = 0) -> None:
        import torch

        self.remark = prepared.note
        self._torch = torch
        self._prepared = prepared
        self._at = start
        self._graph: Any = None
        flush = 5 * device.cache_bytes // 4
        self._flush = pool.get("flush", 4 * flush, lambda: torch.zeros(flush, device=device.torch_device))
        self._first = torch.cuda.Event(enable_timing=True)
        self._last = torch.cuda.Event(enable_timing=True)
        for _ in range(2):
            self._eager(1)
        torch.cuda.synchronize()
        call_ns, _ = self._timed(lambda: self._eager(3), 3)
        self.inner = max(1, min(GRAPH_CALLS, int(_GRAPH_NS / max(1.0, call_ns))))
        if prepared.graph:
            self._capture(pool)
        for _ in range(WARM_REPLAYS if call_ns * self.inner < _GRAPH_NS else 1):
            self._once()
        torch.cuda.synchronize()

    def _capture(self, pool: Pool) -> None:
        """One graph of `inner` calls on as many rotations; every graph of a run shares one memory pool, for none
        reads what another wrote."""
        torch = self._torch
        handle = pool.get("graph pool", 0, torch.cuda.graph_pool_handle)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=handle):
                self._eager(self.inner)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that cannot end leaves its own stream current
            pool.drop("graph pool")  # torch before 2.12 takes it for in use, and refuses every later capture into it
            torch.cuda.synchronize()
            self.remark = f"cannot be captured into a CUDA graph, timed eagerly: {str(error).splitlines()[0][:200]}"
            return
        self._graph = graph

    def _eager(self, count: int) -> None:
        run, rotations, at = self._prepared.run, self._prepared.rotations, self._at
        for i in range(at, at + count):
            run(i % rotations)
        self._at = at + count

    def _once(self) -> None:
        if self._graph is None:
            self._eager(self.inner)
        else:
            self._graph.replay()

    def _timed(self, what: Callable[[], None], count: int) -> tuple[float, float]:
        self._flush.sum()
        wall = time.perf_counter_ns()
        self._first.record()
        what()
        self._last.record()
        self._last.synchronize()
        wall_taken = time.perf_counter_ns() - wall
        return max(1.0, self._first.elapsed_time(self._last) * 1e6) / count, max(1, wall_taken) / count

    def sample(self) -> tuple[float, float]:
        """(ns a call between events, ns a call by the wall)."""
        return self._timed(self._once, self.inner)

    def close(self) -> None:
        """Free the graph and what the case holds."""
        self._graph = None
        self._prepared.close()


class OwnSampler:
    """Samples of a case that times its calls itself: the mean of as many as make a sample."""

    def __init__(self, prepared: Prepared, timed: Callable[[int], int], start: int = 0) -> None:
        self.remark = prepared.note
        self._prepared = prepared
        self._timed = timed
        self._at = start
        self.inner = 1
        self.sample()
        first, _ = self.sample()
        self.inner = repeats(first, 1.0)

    def sample(self) -> tuple[float, float]:
        """(ns a call as the case says, ns a call by the wall)."""
        wall = time.perf_counter_ns()
        taken = sum(self._timed(i % self._prepared.rotations) for i in range(self._at, self._at + self.inner))
        self._at += self.inner
        return max(1, taken) / self.inner, max(1, time.perf_counter_ns() - wall) / self.inner

    def close(self) -> None:
        """Free what the case holds."""
        self._prepared.close()


def sampler(prepared: Prepared, device: Device, pool: Pool, start: int = 0) -> Sampler:
    """The sampler that `prepared.clock` asks for, warmed up. `start`: the rotation to begin with.

    CPU time of a thread says nothing where several work, so a plan with more threads is timed by the wall.
    """
    if prepared.timed is not None:
        return OwnSampler(prepared, prepared.timed, start)
    if prepared.clock == "cuda":
        return CudaSampler(prepared, device, pool, start)
    return HostSampler(prepared, prepared.clock == "thread" and device.threads == 1, start)
