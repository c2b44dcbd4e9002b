"""Collectives between ranks over torch.distributed, and the worker process that runs and times them.

Each function takes flat tensors that the caller has allocated and returns when the result stands in `out` (gloo) or
is ordered before the current stream's next work (nccl). Where a back end lacks a primitive, the composition of
point-to-point sends below stands in for it; the worker finds out which it has by trying each on one element.

Run as a module this is a worker of `moesim_kernels.ops.workers.Group`, which see.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moesim_kernels.ops.workers import OPS, Call

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "all_to_allv",
    "composed_all_to_allv",
    "composed_reduce_scatter",
    "reduce_scatter",
]

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Named *_single since torch 2.13, where the older names warn.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(buffer: torch.Tensor) -> None:
    """Sum `buffer` over ranks, in place; every rank ends with the sum."""
    dist.all_reduce(buffer)


def all_gather(out: torch.Tensor, part: torch.Tensor) -> None:
    """out [ranks * n]: the `part` [n] of every rank, in rank order."""
    _GATHER(out, part)


def reduce_scatter(out: torch.Tensor, buffer: torch.Tensor) -> None:
    """out [n]: this rank's block of the sum over ranks of `buffer` [ranks * n]."""
    _SCATTER(out, buffer)


def all_to_all(out: torch.Tensor, buffer: torch.Tensor) -> None:
    """Block j of `buffer` [ranks * n] goes to rank j; block i of `out` [ranks * n] came from rank i."""
    dist.all_to_all_single(out, buffer)


def all_to_allv(out: torch.Tensor, buffer: torch.Tensor, received: list[int], sent: list[int]) -> None:
    """As `all_to_all` with sent[j] elements to rank j and received[i] from rank i; zeros are allowed."""
    dist.all_to_all_single(out, buffer, received, sent)


def composed_all_to_allv(out: torch.Tensor, buffer: torch.Tensor, received: list[int], sent: list[int]) -> None:
    """`all_to_allv` as a send to and a receive from every other rank, all posted at once."""
    me = dist.get_rank()
    from_R, to_R = list(torch.split(out, received)), list(torch.split(buffer, sent))
    from_R[me].copy_(to_R[me])
    posts = [dist.P2POp(dist.irecv, part, i) for i, part in enumerate(from_R) if i != me and part.numel()]
    posts += [dist.P2POp(dist.isend, part, j) for j, part in enumerate(to_R) if j != me and part.numel()]
    for work in dist.batch_isend_irecv(posts) if posts else []:
        work.wait()


def composed_reduce_scatter(out: torch.Tensor, buffer: torch.Tensor) -> None:
    """`reduce_scatter` as an all-to-all of blocks and a local sum in the buffer's dtype."""
    ranks = dist.get_world_size()
    parts = torch.empty_like(buffer)
    composed_all_to_allv(parts, buffer, [out.numel()] * ranks, [out.numel()] * ranks)
    torch.sum(parts.view(ranks, -1), 0, out=out)


class _Buffers:
    """The tensors of one call on this rank: what it gives (kept), what it works on, what it ends with."""

    def __init__(self, call: Call, device: torch.device, native: bool) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        gives, ends = call.elements(rank, ranks)
        self.call = call
        self.native = native and not call.composed
        self.source = torch.empty(gives, dtype=_TORCH[call.dtype], device=device).normal_()
        self.out = torch.full((ends,), float("nan"), dtype=_TORCH[call.dtype], device=device)
        self.sent = list(call.splits[rank]) if call.splits else [call.count] * ranks
        self.received = [row[rank] for row in call.splits] if call.splits else [call.count] * ranks

    def reset(self) -> None:
        """Before a run: all_reduce works in place, on a fresh copy (else the values double each time)."""
        if self.call.op == "all_reduce":
            self.out.copy_(self.source)

    def run(self) -> None:
        """The collective itself; one that moves nothing anywhere is not called."""
        op = self.call.op
        if self.call.count == 0 and not any(map(sum, self.call.splits)):
            return
        if op == "all_reduce":
            all_reduce(self.out)
        elif op == "all_gather":
            all_gather(self.out, self.source)
        elif op == "reduce_scatter":
            (reduce_scatter if self.native else composed_reduce_scatter)(self.out, self.source)
        elif op == "all_to_all" and self.native:
            all_to_all(self.out, self.source)
        else:
            exchange = all_to_allv if self.native else composed_all_to_allv
            exchange(self.out, self.source, self.received, self.sent)


class _Rank:
    """A worker's state: its device, which primitives the back end has, and buffers by call."""

    def __init__(self, rank: int, ranks: int, backend: str, meeting: str, timeout_s: float) -> None:
        self.device = torch.device("cpu")
        if backend == "nccl":
            if torch.cuda.device_count() < ranks:
                have = torch.cuda.device_count()
                raise RuntimeError(f"nccl runs one process a GPU: {ranks} ranks, {have} CUDA devices here. Use gloo.")
            self.device = torch.device("cuda", rank)
            torch.cuda.set_device(self.device)
        torch.set_num_threads(1)
        torch.manual_seed(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        self.native = {op: self._has(op, ranks) for op in OPS}
        self._buffers: dict[Call, _Buffers] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request of the parent."""
        given = request["call"]
        call = Call(**{**given, "splits": tuple(tuple(row) for row in given["splits"])})
        if request["do"] == "time":
            if call not in self._buffers:
                self._buffers[call] = _Buffers(call, self.device, self.native[call.op])
            return {"ns": self._time_ns(self._buffers[call])}
        if request["do"] == "values":
            buffers = _Buffers(call, self.device, self.native[call.op])
            buffers.source.copy_(torch.tensor(request["given"], dtype=torch.float32))
            buffers.reset()
            buffers.run()
            return {"values": buffers.out.float().tolist()}
        self._buffers.pop(call, None)
        return {}

    def _time_ns(self, buffers: _Buffers) -> int:
        buffers.reset()
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            buffers.run()
            end.record()
            end.synchronize()
            return int(start.elapsed_time(end) * 1e6)
        begin = time.perf_counter_ns()
        buffers.run()
        return time.perf_counter_ns() - begin

    def _has(self, op: str, ranks: int) -> bool:
        """Whether the back end brings `op`: one that it lacks is refused before anything is sent."""
        splits = ((1,) * ranks,) * ranks if op == "all_to_allv" else ()
        try:
            _Buffers(Call(op, 1, splits=splits), self.device, native=True).run()
        except (RuntimeError, NotImplementedError) as error:
            if "support" not in str(error).lower() and "implement" not in str(error).lower():
                raise
            return False
        return True


def _listen(line: socket.socket, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass the parent's requests on; when the parent is gone end at once, even within a collective."""
    with line.makefile("rb") as lines:
        for text in lines:
            requests.put(json.loads(text))
    os._exit(0)


def _serve(arguments: list[str]) -> None:
    """Life of a worker: join, tell what the back end has, answer until told to end or until the parent is gone."""
    fd, rank, ranks, backend, meeting, timeout_s = arguments
    line = socket.socket(fileno=int(fd))
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, requests), daemon=True).start()
    warnings.simplefilter("ignore")
    try:
        state = _Rank(int(rank), int(ranks), backend, meeting, float(timeout_s))
        line.sendall(json.dumps({"native": state.native}).encode() + b"\n")
        while (request := requests.get())["do"] != "end":
            line.sendall(json.dumps(state.answer(request)).encode() + b"\n")
        dist.destroy_process_group()
        os._exit(0)  # nothing is left to do, and an orderly end of torch takes a second
    except Exception as error:  # noqa: BLE001  whatever it is, the parent is told and ends the group
        line.sendall(json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}).encode() + b"\n")
        os._exit(1)


if __name__ == "__main__":
    _serve(sys.argv[1:])
