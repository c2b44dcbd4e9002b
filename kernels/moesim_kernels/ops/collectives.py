"""Collectives between ranks over torch.distributed, and the worker process that runs and times them.

Each function takes flat tensors that the caller has allocated and returns when the result stands in `out` (gloo) or
is ordered before the current stream's next work (nccl). Where a back end lacks a primitive, the composition of
point-to-point sends below stands in for it; the worker finds out which it has by trying each on one element.

Run as a module this is a worker of `moesim_kernels.ops.workers.Group`, which see.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from moesim_kernels.ops.exchange import TokenExchange, all_to_allv, composed_all_to_allv, row_tokens
from moesim_kernels.ops.worker import serve
from moesim_kernels.ops.workers import EXCHANGES, OPS, SPLIT, Call

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "all_to_allv",
    "composed_all_to_allv",
    "composed_reduce_scatter",
    "reduce_scatter",
]

_WEIGHTS = 4 << 20  # elements: 16 MiB in fp32, more than a core's share of the last cache
_LAYERS = 3  # exchanges of tokens in one sample
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
        if call.op in EXCHANGES:
            self._begin_exchange(rank, device)

    def _begin_exchange(self, rank: int, device: torch.device) -> None:
        """Rows in the order of slots, as many for each slot of a rank as integers allow."""
        call = self.call
        self.exchange = TokenExchange(self.native)
        self.source, self.out = self.source.view(-1, call.width), self.out.view(-1, call.width)
        self.token_R = row_tokens(call.tokens(rank), sum(self.sent)).to(device)
        slot_S = torch.arange(call.slots)
        count = [sent // call.slots + (slot_S < sent % call.slots) for sent in self.sent]
        self.count_GS = torch.stack(count).to(device)
        self.exchange.sent_G, self.exchange.received_G = self.sent, self.received

    def reset(self) -> None:
        """Before a run: all_reduce works in place, on a fresh copy (else the values double each time)."""
        if self.call.op == "all_reduce":
            self.out.copy_(self.source)

    def run(self) -> None:
        """The collective itself; one that moves nothing anywhere is not called."""
        op = self.call.op
        if op not in EXCHANGES and self.call.count == 0 and not any(map(sum, self.call.splits)):
            return
        if op == "all_reduce":
            all_reduce(self.out)
        elif op == "all_gather":
            all_gather(self.out, self.source)
        elif op == "reduce_scatter":
            (reduce_scatter if self.native else composed_reduce_scatter)(self.out, self.source)
        elif op == "dispatch":
            self.out, _ = self.exchange.dispatch(self.source, self.token_R, self.count_GS)
        elif op == "combine":
            self.out = self.exchange.combine(self.source)
        elif op == "all_to_all" and self.native:
            all_to_all(self.out, self.source)
        else:
            exchange = all_to_allv if self.native else composed_all_to_allv
            exchange(self.out, self.source, self.received, self.sent)


class _Rank:
    """A worker's state: its device, which primitives the back end has, and buffers by call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.native = {op: self._has(op, dist.get_world_size()) for op in OPS}
        self.ready: dict[str, Any] = {"native": self.native}
        self._buffers: dict[Call, _Buffers] = {}
        self._weight_NK: torch.Tensor | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request of the parent."""
        given = request["call"]
        call = Call(**{**given, "splits": tuple(tuple(row) for row in given["splits"])})
        if request["do"] == "time":
            if call not in self._buffers:
                self._buffers[call] = _Buffers(call, self.device, self.native[call.op])
            return {"spans": self._spans(self._buffers[call])}
        if request["do"] == "values":
            buffers = _Buffers(call, self.device, self.native[call.op])
            buffers.source.copy_(torch.tensor(request["given"], dtype=torch.float32).view(buffers.source.shape))
            buffers.reset()
            buffers.run()
            return {"values": buffers.out.float().flatten().tolist()}
        self._buffers.pop(call, None)
        return {}

    def _spans(self, buffers: _Buffers) -> list[tuple[int, int]]:
        """Begin and end of each execution on the machine's clock; with CUDA from 0 between events."""
        buffers.reset()
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            buffers.run()
            end.record()
            end.synchronize()
            return [(0, int(start.elapsed_time(end) * 1e6))]
        exchanges, spans = buffers.call.op in EXCHANGES, list[tuple[int, int]]()
        for _ in range(_LAYERS if exchanges else 1):
            if exchanges:
                self._compute()
            begin = time.perf_counter_ns()
            buffers.run()
            spans.append((begin, time.perf_counter_ns()))
        return spans

    def _compute(self) -> None:
        """What a rank does before it exchanges tokens: a product whose weights come from memory. It takes the caches
        and the rank's share of the cores, as a step does; ranks that idled are quicker, on a busy machine three times.
        """
        if self._weight_NK is None:
            self._weight_NK = torch.randn(_WEIGHTS // 1024, 1024)
        torch.mm(self._weight_NK[:8], self._weight_NK.t())

    def _has(self, op: str, ranks: int) -> bool:
        """Whether the back end brings `op`: one that it lacks is refused before anything is sent."""
        splits = ((1,) * ranks,) * ranks if op in SPLIT else ()
        try:
            _Buffers(Call(op, 1, splits=splits), self.device, native=True).run()
        except (RuntimeError, NotImplementedError) as error:
            if "support" not in str(error).lower() and "implement" not in str(error).lower():
                raise
            return False
        return True


if __name__ == "__main__":
    serve(sys.argv[1:], _Rank)
