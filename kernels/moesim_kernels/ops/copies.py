"""Copies between host memory and a CUDA device, and within host memory.

A copy to or from a device takes `streams` equal chunks on a stream each, from pinned or pageable memory, alone or
beside a matrix product on another stream that is seen to run from before the copy begins until after it ends.
Within host memory a copy is one thread's; it stands in for a device where none is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim_kernels.ops.errors import NotSupported

__all__ = ["DIRECTIONS", "DeviceCopy", "chunks", "host_copy"]

DIRECTIONS = ("h2d", "d2h")
_ALIGN = 256  # chunks begin on what a copy engine moves at once
_PRODUCT = 8192  # rows, columns and depth of the matrix product that keeps a device busy
_MOST_PRODUCTS = 512


def host_copy(to: NDArray[Any], source: NDArray[Any]) -> None:
    """to[:] = source, both preallocated and of one shape, by one thread."""
    np.copyto(to, source)


def chunks(bytes_: int, streams: int) -> list[tuple[int, int]]:
    """(begin, end) of at most `streams` parts of [0, bytes_), as equal as whole multiples of 256 bytes allow."""
    if bytes_ < 1 or streams < 1:
        raise ValueError(f"a copy has at least one byte and one stream: {bytes_} bytes, {streams} streams")
    step = -(-bytes_ // (streams * _ALIGN)) * _ALIGN
    return [(at, min(at + step, bytes_)) for at in range(0, bytes_, step)]


class DeviceCopy:
    """Copies between flat uint8 tensors `host` and `device`, `bytes_` at a time.

    direction: h2d or d2h. calls: how many calls touch different memory. busy: beside a matrix product. Raises
    NotSupported without CUDA, ValueError for an unknown direction or tensors that are too small.
    """

    def __init__(
        self, direction: str, host: Any, device: Any, bytes_: int, *, streams: int = 1, busy: bool = False
    ) -> None:
        import torch

        if direction not in DIRECTIONS:
            raise ValueError(f"a copy goes {' or '.join(DIRECTIONS)}, not {direction!r}")
        if not torch.cuda.is_available():
            raise NotSupported(f"a copy {direction} needs a CUDA device and torch sees none; direction host runs here")
        self._chunks = chunks(bytes_, streams)
        self.calls = min(host.numel(), device.numel()) // bytes_
        if self.calls < 1:
            raise ValueError(f"buffers of {host.numel()} and {device.numel()} bytes do not hold {bytes_}")
        self._bytes = bytes_
        self._source, self._to = (host, device) if direction == "h2d" else (device, host)
        self._device = device.device
        self._streams = [torch.cuda.Stream(self._device) for _ in self._chunks]
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._products = 2
        self._load: tuple[Any, ...] = ()
        if busy:
            operands = torch.randn(2, _PRODUCT, _PRODUCT, dtype=torch.bfloat16, device=self._device)
            self._load = (torch.cuda.Stream(self._device), *operands, torch.empty_like(operands[0]))
        torch.cuda.synchronize(self._device)

    def time_ns(self, call: int) -> int:
        """Nanoseconds of one copy between events on the device, as the host issues it; the host waits for its end.

        Raises RuntimeError when no number of matrix products outlasts a copy that was to run beside them.
        """
        import torch

        if not self._load:
            return self._copy_ns(call)
        stream, left, right, out = self._load
        running, last = torch.cuda.Event(), torch.cuda.Event()
        while True:
            with torch.cuda.stream(stream):
                torch.mm(left, right, out=out)
                running.record(stream)
                for _ in range(self._products):
                    torch.mm(left, right, out=out)
                last.record(stream)
            torch.cuda.current_stream(self._device).wait_event(running)
            ns = self._copy_ns(call)
            covered = not last.query()
            stream.synchronize()
            if covered:
                return ns
            if self._products >= _MOST_PRODUCTS:
                raise RuntimeError(f"a copy of {self._bytes} bytes outlasts {self._products} matrix products")
            self._products *= 2

    def _copy_ns(self, call: int) -> int:
        import torch

        at = call % self.calls * self._bytes
        current = torch.cuda.current_stream(self._device)
        self._start.record(current)
        for stream, (begin, end) in zip(self._streams, self._chunks, strict=True):
            stream.wait_event(self._start)
            with torch.cuda.stream(stream):
                self._to[at + begin : at + end].copy_(self._source[at + begin : at + end], non_blocking=True)
            current.wait_stream(stream)
        self._end.record(current)
        self._end.synchronize()
        return int(self._start.elapsed_time(self._end) * 1e6)
