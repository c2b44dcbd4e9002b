"""The real device: `moesim.offload.drive.Device` with buffers, a link and matrices.

What computes takes its experts in the order in which their bytes arrive: first those that are there, then whoever comes
next. Buffers are those of the cache, one for each fixed expert, the staging buffers of streamed ones, rings of pages
where a plan streams whole layers, and one more, because a transfer that was voided while it ran ends in its old buffer.
"""

from __future__ import annotations

import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.arrays import AnyArray
from moesim.errors import BadInput, Infeasible
from moesim.offload import OffloadContext, OffloadPlan, StepRoutes
from moesim.offload.cache import ABSENT, ExpertCache
from moesim.offload.drive import LayerWork, Work
from moesim_kernels.runtime.backing import Backing
from moesim_kernels.runtime.link import Link, Transfer
from moesim_kernels.runtime.model import Decoder, expert_out
from moesim_kernels.runtime.slots import Memory, Slots

__all__ = ["RealDevice", "StepTimes", "num_slots"]


@dataclass(slots=True)
class StepTimes:
    """One step, wall ns. begin: embedding. own: dense layers. experts: products of experts. join: adding their results
    up, sorting rows before. sync: hand-overs to the host and back. stall: waits for transfers or the host. end: norm
    and head. woke: of the stalls, between the end of a transfer and the wait's return. cpu: CPU time of the computing
    thread. fetches: transfers asked for."""

    tokens: int = 0
    step_ns: int = 0
    begin_ns: int = 0
    own_ns: int = 0
    experts_ns: int = 0
    join_ns: int = 0
    sync_ns: int = 0
    stall_ns: int = 0
    end_ns: int = 0
    woke_ns: int = 0
    waits: int = 0
    cpu_ns: int = 0
    fetches: int = 0
    arrived_bytes: int = 0
    layer_stall_ns: list[int] = field(default_factory=list)

    @property
    def other_ns(self) -> int:
        """Deciding, asking for transfers, and whatever else."""
        known = (
            self.begin_ns + self.own_ns + self.experts_ns + self.join_ns + self.sync_ns + self.stall_ns + self.end_ns
        )
        return self.step_ns - known


def num_slots(context: OffloadContext, plan: OffloadPlan) -> int:
    """Buffers for a plan. Raises Infeasible where experts differ in size (then a buffer is no expert's own)."""
    size = int(context.size_LE.flat[0])
    if (context.size_LE != size).any():
        raise Infeasible(
            ["the mini-runtime's buffers are of one size; experts of several precisions are simulated only"]
        )
    if plan.paged and plan.look_ahead >= context.num_layers:
        raise BadInput(f"pages may be {context.num_layers - 1} layers ahead at most here, not {plan.look_ahead}")
    pages = (plan.look_ahead + 1) * context.num_experts if plan.paged else 0
    cached = sum(int(capacity) // size for capacity in plan.capacity_G)
    return cached + int(plan.fixed_LE.sum()) + context.staging + pages + 1


class RealDevice:
    """See the module. `steps`: times of each step. `digest`: a CRC chain over all logits, bit by bit."""

    def __init__(
        self,
        decoder: Decoder,
        backing: Backing,
        context: OffloadContext,
        plan: OffloadPlan,
        chunk_bytes: int = 0,
        keep_logits: bool = False,
    ) -> None:
        """Fills the buffers of what the plan has in place, before any clock runs. Raises NoRoom, ReadFailed, BadInput,
        Infeasible."""
        if plan.cpu_LE.any() and backing.host_weights(0) is None:
            raise BadInput(
                f"policies.offload: experts on the CPU need their weights in host memory, but the link {backing.kind} "
                "has them on a disk, which computes nothing. Use --link memory or cuda"
            )
        if plan.write_back and not backing.saves:
            raise BadInput("policies.offload: evicted experts have nowhere to travel back to; their file is read only")
        self.decoder, self.backing, self.context, self.plan = decoder, backing, context, plan
        self.sizes = decoder.sizes
        self.slots = Slots(num_slots(context, plan))
        self.memory = Memory(self.sizes, backing.buffer(self.slots.number * self.sizes.slot_bytes))
        backing.start(self.memory)
        self.link = Link(backing.move, chunk_bytes, f"link {backing.kind}")
        self._slot: dict[int, int] = {}
        """key -> its buffer, whether or not its bytes are there"""
        self._there: dict[int, int] = {}
        """key whose bytes are -> how many had arrived before"""
        self._came = 0
        self._arrived: dict[int, None] = {}
        self._streamed: list[Transfer] = []
        """experts in staging buffers, not computed yet"""
        self._host = ThreadPoolExecutor(1, "host experts")
        self._late: tuple[Future[Any], Any] | None = None
        self._times = StepTimes()
        self.steps: list[StepTimes] = []
        self.products: list[tuple[int, int]] = []
        """(rows, ns) of every expert's product"""
        self.host_products: list[tuple[int, int]] = []
        """the same of those on the host"""
        self.digest = 0
        self.logits: list[Any] | None = [] if keep_logits else None
        self._fill()

    def _fill(self) -> None:
        keys = np.flatnonzero((self.plan.initial_LE | self.plan.fixed_LE).reshape(-1)).tolist()
        for key in keys:
            self.fetch(key, int(self.context.size_K[key]), urgent=False)
        self.settle()
        self._arrived.clear()
        self.link.log.clear()

    # -- what the Driver asks -----------------------------------------------------------------------------------
    def begin(self, step: StepRoutes) -> None:
        """See Device."""
        self._times = StepTimes(len(step.expert_TLK))
        self._logged = len(self.link.log)
        self._cpu = time.thread_time_ns()
        self._start = time.perf_counter_ns()
        self.link.look()
        self._step = step
        if self.context.semantics.completion == "logical":
            self._arrived.clear()  # nobody asks
        self.decoder.begin(step)
        self._times.begin_ns = time.perf_counter_ns() - self._start

    def own(self, layer: int, tokens: int) -> None:
        """See Device. The host reads the router's choice, as an engine does that looks experts up there."""
        start = time.perf_counter_ns()
        self.link.look()
        self.decoder.own(layer).tolist()
        self._times.own_ns += time.perf_counter_ns() - start

    def fetch(self, key: int, size_bytes: int, urgent: bool) -> None:
        """See Device."""
        if size_bytes != int(self.context.size_K[key]):
            raise BadInput(
                "the mini-runtime carries experts as they are stored; copies of fewer bits are simulated only"
            )
        self._slot[key] = slot = self._take()
        self._ask(Transfer(key, slot, self.sizes.slot_bytes, urgent))

    def hurry(self, key: int) -> None:
        """See Device."""
        self.link.hurry(key)

    def cancel(self, key: int) -> bool:
        """See Device."""
        if not self.link.pending(key):
            return False
        slot = self.link.cancel(key)
        if slot is None:
            return False
        self.slots.give([self._slot.pop(key)])
        return True

    def arrived(self) -> list[int]:
        """See Device."""
        self._note(self.link.arrived())
        out = list(self._arrived)
        self._arrived.clear()
        return out

    def evict(self, key: int, write_back: bool) -> None:
        """See Device."""
        slot = self._slot.pop(key)
        self._arrived.pop(key, None)
        if self.link.pending(key):
            if self.link.void(key) is None:
                return  # the buffer comes back when the bytes that are under way have ended
        elif write_back:
            start = time.perf_counter_ns()
            self.backing.save(slot)
            self._times.stall_ns += time.perf_counter_ns() - start
        self._there.pop(key, None)
        self.slots.give([slot])

    def page(self, layer: int, size_bytes: int) -> None:
        """See Device. The dense part of a layer is small and stays; its experts travel."""
        base = layer * self.context.num_experts
        fixed_K = self.plan.fixed_LE.reshape(-1)
        for key in range(base, base + self.context.num_experts):
            if not fixed_K[key]:
                self._slot[key] = slot = self._take()
                self._ask(Transfer(key, slot, self.sizes.slot_bytes, urgent=False))

    def experts(self, layer: int, work: LayerWork) -> None:
        """See Device."""
        assert work.ids_TK is not None
        before = self._times.stall_ns
        start = time.perf_counter_ns()
        task = self._layer(layer, work.ids_TK)
        self._times.join_ns += time.perf_counter_ns() - start
        host = self._on_host(work.cpu, task)
        later = self._on_host(work.deferred, task)
        waiting = [w.key for w in (*work.here, *work.coming) if self.link.pending(w.key)]
        if work.paged:
            base = layer * self.context.num_experts
            waiting = [k for k in range(base, base + self.context.num_experts) if self.link.pending(k)]
        for key in waiting:
            self.link.hurry(key)
        if work.paged:
            self._wait_all(set(waiting))
            waiting = []
        self._compute(task, work, set(waiting))
        if work.paged:
            self._drop_page(layer)
        self._join(task, host, later)
        self._times.layer_stall_ns.append(self._times.stall_ns - before)

    def end(self) -> None:
        """See Device."""
        start = time.perf_counter_ns()
        logit_TV = self.decoder.end()
        self.backing.synchronize()
        now = time.perf_counter_ns()
        times = self._times
        times.end_ns = now - start
        times.step_ns, times.cpu_ns = now - self._start, time.thread_time_ns() - self._cpu
        times.arrived_bytes = sum(t.size_bytes for t in self.link.log[self._logged :])
        self.steps.append(times)
        self._keep(logit_TV)

    def _ask(self, transfer: Transfer) -> None:
        self._times.fetches += 1
        self.link.ask(transfer)

    # -- buffers ------------------------------------------------------------------------------------------------
    def _take(self) -> int:
        """A free buffer; waits for the one that a void transfer is about to give back, where no other is free."""
        self.slots.give(self.link.freed())
        if not self.slots.free:
            start = time.perf_counter_ns()
            self.slots.give(self.link.freed(wait=True))
            self._times.stall_ns += time.perf_counter_ns() - start
        return self.slots.take()

    def _note(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            if transfer.number != transfer.key:
                self._streamed.append(transfer)
                continue
            self._there[transfer.key] = self._came
            self._came += 1
            self._arrived[transfer.key] = None

    def _wait_all(self, keys: set[int]) -> None:
        """Until all of them are there."""
        while keys - self._there.keys():
            self._wait()

    def _wait(self) -> None:
        """Until some transfer has ended."""
        start = time.perf_counter_ns()
        came = self.link.wait_any()
        now = time.perf_counter_ns()
        self._times.stall_ns += now - start
        self._times.woke_ns += max(0, now - max(came[-1].end_ns, start))
        self._times.waits += 1
        self._note(came)

    def _drop_page(self, layer: int) -> None:
        base, fixed_K = layer * self.context.num_experts, self.plan.fixed_LE.reshape(-1)
        for key in range(base, base + self.context.num_experts):
            if not fixed_K[key]:
                self._there.pop(key, None)
                self.slots.give([self._slot.pop(key)] if key in self._slot else [])

    # -- computing ----------------------------------------------------------------------------------------------
    def _layer(self, layer: int, ids_TK: AnyArray) -> _Layer:
        """The choices sorted by expert, and room for each one's result: zeros [T * K, H]."""
        torch, x = self.decoder.torch, self.decoder.normed_TH
        flat = ids_TK.ravel().astype(np.int64)
        order_R = np.argsort(flat, kind="stable")
        begin_E = np.searchsorted(flat[order_R], np.arange(self.context.num_experts + 1))
        out = torch.zeros((ids_TK.size, self.sizes.hidden), dtype=x.dtype, device=x.device)
        rows_R = torch.from_numpy(order_R).to(x.device)
        return _Layer(layer, ids_TK, out, order_R, begin_E.tolist(), rows_R, rows_R // ids_TK.shape[1])

    def _compute(self, task: _Layer, work: LayerWork, waiting: set[int]) -> None:
        """What is there, then what comes, as it comes; streams are asked for as staging buffers get free."""
        streams = list(reversed(work.streams))
        staged = self._stream(streams, 0)
        for one in (*work.here, *work.coming):
            if one.key not in waiting:
                self._product(task, one.key, self._slot[one.key])
        while waiting or staged:
            came = sorted(waiting & self._there.keys(), key=self._there.__getitem__)
            for key in came:
                waiting.discard(key)
                self._product(task, key, self._slot[key])
            streamed = len(self._streamed)
            while self._streamed:
                self._product(task, self._streamed[0].key, self._streamed[0].slot)
                self.slots.give([self._streamed.pop(0).slot])
            staged = self._stream(streams, staged - streamed)
            if came or streamed:
                self._note(self.link.arrived())
            else:
                self._wait()

    def _stream(self, streams: list[Work], staged: int) -> int:
        """Ask for streamed experts (the first one stands last) while there are staging buffers; how many are under
        way."""
        while streams and staged < self.context.staging:
            slot = self._take()
            key = streams.pop().key
            self._ask(Transfer(key, slot, self.sizes.slot_bytes, True, self.context.num_keys + key))
            staged += 1
        return staged

    def _product(self, task: _Layer, key: int, slot: int) -> None:
        start = time.perf_counter_ns()
        begin, end = task.run_of(key % self.context.num_experts)
        out_NH = expert_out(self.decoder.normed_TH[task.token_R[begin:end]], *self.memory.weights[slot])
        task.out[task.row_R[begin:end]] = out_NH
        self.backing.computing(slot)
        took = time.perf_counter_ns() - start
        self.products.append((end - begin, took))
        self._times.experts_ns += took

    def _on_host(self, work: list[Work], task: _Layer) -> Future[Any] | None:
        """Experts that the host computes, beside the rest: a thread with their weights in host memory."""
        if not work:
            return None
        start = time.perf_counter_ns()
        torch = self.decoder.torch
        choices = [self._choices(task, one) for one in work]
        x_TH = self.decoder.normed_TH.to("cpu")
        weights = [self.backing.host_weights(one.key) for one in work]
        if any(w is None for w in weights):
            raise BadInput(
                f"policies.offload computes experts on the CPU, but the link {self.backing.kind} has their weights on "
                "a disk, which computes nothing. Use --link memory or cuda"
            )

        def run() -> Any:
            out = torch.zeros((task.ids_TK.size, self.sizes.hidden), dtype=x_TH.dtype)
            for rows, pair in zip(choices, weights, strict=True):
                assert pair is not None
                begin = time.perf_counter_ns()
                tokens = torch.from_numpy(rows // task.ids_TK.shape[1])
                out[torch.from_numpy(rows)] = expert_out(x_TH[tokens], *pair)
                self.host_products.append((len(rows), time.perf_counter_ns() - begin))
            return out

        future = self._host.submit(run)
        self._times.sync_ns += time.perf_counter_ns() - start
        return future

    def _choices(self, task: _Layer, one: Work) -> AnyArray:
        """An expert may be shared between now and one layer later: the first rows that nobody has taken yet."""
        begin, end = task.run_of(one.key % self.context.num_experts)
        rows = task.order_R[begin:end]
        taken = task.taken.get(one.key, 0)
        task.taken[one.key] = taken + one.rows
        return rows[taken : taken + one.rows]

    def _join(self, task: _Layer, host: Future[Any] | None, later: Future[Any] | None) -> None:
        """Add the results up in the order of the choices, whoever computed them."""
        torch, decoder = self.decoder.torch, self.decoder
        out = task.out
        if host is not None:
            start = time.perf_counter_ns()
            found = host.result()
            self._times.stall_ns += time.perf_counter_ns() - start
            start = time.perf_counter_ns()
            out = out + found.to(out.device)
            self._times.sync_ns += time.perf_counter_ns() - start
        start = time.perf_counter_ns()
        tokens, top_k = task.ids_TK.shape
        weight = self._step.weight_TLK
        shares = np.full((tokens, top_k), 1.0 / top_k) if weight is None else np.asarray(weight[:, task.layer], float)
        weight_TK = torch.from_numpy(shares).to(out.dtype).to(out.device)
        mixed = (out.view(tokens, top_k, -1) * weight_TK[:, :, None]).sum(1)
        if self._late is not None:
            mixed = mixed + self._late_result(tokens, top_k)
        self._late = None if later is None else (later, weight_TK)
        decoder.x_TH = decoder.x_TH + mixed
        self._times.join_ns += time.perf_counter_ns() - start

    def _late_result(self, tokens: int, top_k: int) -> Any:
        """What the layer before left to the host."""
        assert self._late is not None
        future, weight_TK = self._late
        out = future.result().to(weight_TK.device)
        return (out.view(tokens, top_k, -1) * weight_TK[:, :, None]).sum(1)

    # -- afterwards ---------------------------------------------------------------------------------------------
    def _keep(self, logit_TV: Any) -> None:
        """The logits' bits enter the digest, after the clock has stopped."""
        host = logit_TV.detach().to("cpu").contiguous()
        data = host.view(self.decoder.torch.uint8).numpy()
        self.digest = zlib.crc32(data, self.digest)
        if self.logits is not None:
            self.logits.append(host.float().numpy())

    def settle(self) -> None:
        """Wait for everything that is on its way, and take note of it."""
        self._note(self.link.drain())
        self.slots.give(self.link.freed())

    def recover(self) -> None:
        """After an error: a new thread; what was queued is carried, what a layer was waiting for is dropped with it."""
        self.link.restart()
        self.settle()
        for transfer in self._streamed:
            self.slots.give([transfer.slot])
        self._streamed = []
        self._late = None
        if self.plan.paged:
            for layer in range(self.context.num_layers):
                self._drop_page(layer)

    def verify(self) -> None:
        """Compare the checksum of every expert that is there with the file's. Raises BadInput for one that differs."""
        for key in sorted(self._there):
            at = self._slot[key] * self.sizes.slot_bytes
            data = self.memory.buffer[at : at + self.sizes.expert_bytes].to("cpu").numpy()
            self.decoder.file.verify(memoryview(data), self.decoder.file.expert_K[key], self.decoder.file.name(key))

    def close(self) -> None:
        """End the threads and give the memory back."""
        self.link.close()
        self._host.shutdown(wait=True, cancel_futures=True)
        self.backing.close()

    def _check(self, cache: ExpertCache | None = None) -> None:
        """Invariants: no buffer lost or owned twice, what is there is not on its way, and (with `cache`) who has room
        in the cache has a buffer, and nobody else."""
        self.link._check()
        streams = [t.slot for t in self._streamed]
        owned = set(self._slot.values())
        void_or_staged = [slot for slot in self.link.slots() if slot not in owned]
        self.slots._check([*self._slot.values(), *streams, *void_or_staged])
        for key in self._slot:
            assert (key in self._there) != self.link.pending(key), "neither there nor on its way, or both"
        if cache is not None and not self.plan.paged:
            held = {key for key in range(self.context.num_keys) if cache.state(key) != ABSENT}
            assert held == set(self._slot), "the cache and the buffers disagree"


@dataclass(slots=True)
class _Layer:
    """A layer whose experts are being computed. out: [T * K, H], a row a choice. order_R: numbers of the choices,
    expert after expert, begin_E where each expert's begin; row_R, token_R: the same on the device, and the tokens they
    are of. taken: choices given to the host, by key."""

    layer: int
    ids_TK: AnyArray
    out: Any
    order_R: AnyArray
    begin_E: list[int]
    row_R: Any
    token_R: Any
    taken: dict[int, int] = field(default_factory=dict)

    def run_of(self, expert: int) -> tuple[int, int]:
        """Where an expert's choices stand in order_R."""
        return self.begin_E[expert], self.begin_E[expert + 1]
