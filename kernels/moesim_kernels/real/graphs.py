"""A step on CUDA: one captured graph, and one graph for each part, timed between events.

The parts are timed apart because a graph has no laps: all layers' own parts in a row, all attention calls, all experts.
Each reads other weights (or another layer's cache) than the one before, so what they read is as cold as in the step.
The host enqueues while the device still reads a buffer larger than its cache, so no sample waits for a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moesim_kernels.real.loaded import Loaded, StepTimes

if TYPE_CHECKING:
    from moesim_kernels.real.rank import RealRank

__all__ = ["CudaStep"]

_BUSY_READS = 12  # about a millisecond: the launch of a graph of some thousand kernels is hidden behind it
_BUSY_BYTES = 256 << 20


class CudaStep:
    """The graphs of one loaded step. chosen_S: of the last run."""

    def __init__(self, rank: RealRank, loaded: Loaded) -> None:
        import torch

        self._torch, self._rank, self._loaded = torch, rank, loaded
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if rank.busy is None:
            rank.busy = torch.zeros(_BUSY_BYTES // 4, device=rank.device)
        for _ in range(2):  # what is set up at the first call of a kernel must not be captured
            rank.step(loaded)
        torch.cuda.synchronize()
        self._orders: dict[int, tuple[Any, Any]] = {}
        self._keep()
        torch.cuda.synchronize()
        parts: dict[str, Callable[[], None]] = {
            "embedding": lambda: rank.begin(loaded),
            "own": self._own,
            "attention": self._attention,
            "experts": self._experts,
            "head": self._head,
        }
        self._parts = {name: self._captured(name, call) for name, call in parts.items()}
        # last, so that its results stand in memory that no part of it writes to
        self._whole = self._captured("the step", lambda: rank.step(loaded))
        self.chosen_S, self.logits_SV = rank.chosen_S, rank.logits_SV

    def _keep(self) -> None:
        """One step outside of any graph: what each part is given when it runs alone."""
        rank = self._rank
        rank.begin(self._loaded)
        for layer in range(rank.model.num_layers):
            self._qkv_TND = rank.before(layer)
            self._attended_TM = rank.attend(layer, self._qkv_TND)
            rank.after(layer, self._attended_TM)
            if rank.is_moe(layer):
                self._normed_TH = rank.normed_TH
                self._orders[layer] = (rank.order, rank.gate_R)
                rank.local(layer)
        self._hidden_TH, self._residual_TH = rank.hidden_TH, rank.residual_TH
        rank.end()

    def _own(self) -> None:
        rank = self._rank
        rank.residual_TH, rank.hidden_TH = self._residual_TH, self._hidden_TH
        for layer in range(rank.model.num_layers):
            rank.before(layer)
            rank.after(layer, self._attended_TM)
            rank.hidden_TH = self._hidden_TH
        rank.finish()

    def _attention(self) -> None:
        for layer in range(self._rank.model.num_layers):
            self._rank.attend(layer, self._qkv_TND)

    def _experts(self) -> None:
        rank = self._rank
        rank.normed_TH = self._normed_TH
        for layer, (order, gate_R) in self._orders.items():
            rank.experts_of(layer, order, gate_R)

    def _head(self) -> None:
        rank = self._rank
        rank.normed_TH = self._normed_TH
        rank.head()

    def _captured(self, name: str, call: Callable[[], None]) -> Callable[[], Any]:
        """A graph's replay, or the call itself where it cannot be captured (a kernel that waits for the host)."""
        torch, rank = self._torch, self._rank
        if rank.how == "loop":
            self._remark("experts in a loop wait for the host: the step is timed eagerly")
            return call
        if rank.graph_pool is None:
            rank.graph_pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=rank.graph_pool):
                call()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.set_stream(stream)
            rank.graph_pool = None
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that cannot end leaves its own stream current
            rank.graph_pool = None  # torch before 2.12 takes it for in use, and refuses every later capture into it
            torch.cuda.synchronize()
            told = (str(error).splitlines() or [""])[0][:200]
            self._remark(f"{name} cannot be captured into a CUDA graph and is timed eagerly: {told}")
            return call
        replay: Callable[[], Any] = graph.replay
        return replay

    def _remark(self, text: str) -> None:
        if text not in self._loaded.remark:
            self._loaded.remark = "; ".join(x for x in (self._loaded.remark, text) if x)

    def _timed(self, call: Callable[[], Any]) -> int:
        for _ in range(_BUSY_READS):
            self._rank.busy.sum()
        self._first.record()
        call()
        self._last.record()
        self._last.synchronize()
        return max(1, round(float(self._first.elapsed_time(self._last)) * 1e6))

    def run(self) -> StepTimes:
        """The parts one by one, then the step itself, whose results stand until the next run."""
        part_ns = {name: self._timed(call) for name, call in self._parts.items()}
        wall_ns = self._timed(self._whole)
        if self._rank.how == "loop":
            self.chosen_S, self.logits_SV = self._rank.chosen_S, self._rank.logits_SV
        return StepTimes(wall_ns, 0, part_ns, part_ns)
