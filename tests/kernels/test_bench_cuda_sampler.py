"""What the sampler of CUDA does around a capture that fails, on a torch.cuda that only keeps book."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moesim_kernels.bench.clock import CudaSampler
from moesim_kernels.bench.pool import Device, Pool, Prepared


class Cuda:
    """Streams, graphs and events of torch.cuda as far as a sampler asks: one call takes 1 ms of counted time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.now_ms, self.handles, self.used = "default", 0.0, 0, set[int]()
        self.capturing, self.replays = False, 0
        fakes = {
            "Event": lambda enable_timing: Event(self),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "graph": lambda graph, pool: Capture(self, pool),
            "graph_pool_handle": self.handle,
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": lambda: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def replay(self) -> None:
        self.replays += 1
        self.now_ms += 1.0


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.at = cuda, 0.0

    def record(self) -> None:
        self.at = self.cuda.now_ms

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


class Capture:
    """As torch.cuda.graph before 2.12: one that fails keeps its stream current and its pool in use."""

    def __init__(self, cuda: Cuda, pool: int) -> None:
        self.cuda, self.pool = cuda, pool

    def __enter__(self) -> None:
        if self.pool in self.cuda.used:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.before, self.cuda.stream, self.cuda.capturing = self.cuda.stream, "capture", True

    def __exit__(self, kind: object, *_: object) -> None:
        self.cuda.capturing = False
        if kind is not None:
            self.cuda.used.add(self.pool)
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.stream = self.before


def test_a_capture_that_fails_leaves_the_next_one_its_stream_and_a_new_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device = Cuda(monkeypatch), Device("cpu", cache_bytes=1 << 10)
    pool = Pool(device)

    def waits(i: int) -> Any:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        cuda.now_ms += 1.0

    def fine(i: int) -> Any:
        cuda.now_ms += 0.0 if cuda.capturing else 1.0

    def made(run: Any) -> CudaSampler:
        return CudaSampler(Prepared(run, 1, 0.0, 0.0, "cuda", graph=True), device, pool)

    eager = made(waits)
    assert eager.remark.startswith("cannot be captured into a CUDA graph, timed eagerly: operation failed")
    assert cuda.stream == "default"
    assert eager.sample()[0] == pytest.approx(1e6)
    assert cuda.replays == 0
    graphed = made(fine)
    assert (graphed.remark, cuda.stream) == ("", "default")
    before = cuda.replays
    assert graphed.sample()[0] == pytest.approx(1e6 / graphed.inner)
    assert cuda.replays == before + 1
