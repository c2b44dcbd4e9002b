"""A scenario served for real: its requests arrive, are scheduled and computed step by step, on a clock that runs.

The scheduler is the simulator's own (`engine.rank.Rank` under the scenario's batching policy), and so are the records
that come out. Steps take what they take: planning, making index tensors and computing are all on the clock. Two clocks:
the wall's, on which an idle server sleeps until the next request comes; and the computing thread's CPU time, on which
idle time is skipped, for a machine that others use as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.cost.pricer import Chunk, Key, Run
from moesim.engine.core import Outcome
from moesim.engine.rank import Rank, Sequence
from moesim.errors import BadInput
from moesim.record import NOT_YET, REJECTED, Recorder, RequestRecords
from moesim.simulate import Prepared
from moesim_kernels.real.work import StepWork, couples_tokens, make_work, phase_of, slots_of

__all__ = ["IDLE_NS", "Clock", "CpuClock", "Executor", "Served", "WallClock", "serve"]


IDLE_NS = 50_000_000
"""of a pause in which something else may be done"""


class Clock(Protocol):
    """ns since it was started."""

    def start(self) -> None: ...
    def now_ns(self) -> int: ...
    def wait_until(self, when_ns: int) -> None: ...


class WallClock:
    """Real time."""

    def start(self) -> None:
        self._zero = time.perf_counter_ns()

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._zero

    def wait_until(self, when_ns: int) -> None:
        """Sleep."""
        left = when_ns - self.now_ns()
        if left > 0:
            time.sleep(left * 1e-9)


class CpuClock:
    """CPU time of this thread; waiting is skipped. Says nothing of a device that computes beside it."""

    def start(self) -> None:
        self._zero = time.thread_time_ns()

    def now_ns(self) -> int:
        return time.thread_time_ns() - self._zero

    def wait_until(self, when_ns: int) -> None:
        """Be there."""
        self._zero -= max(0, when_ns - self.now_ns())


class Executor(Protocol):
    """What `real.rank.RealRank` is to a server."""

    def load(self, work: StepWork) -> Any: ...
    def run(self, loaded: Any) -> Any: ...
    def forget(self, request: int) -> None: ...


@dataclass(slots=True)
class Served:
    """A served run. outcome: records as the simulator's. host_ns: of each step, what was not the step itself (planning,
    index tensors). times: what the executor said of each."""

    outcome: Outcome
    host_ns: list[int] = field(default_factory=list)
    times: list[Any] = field(default_factory=list)


def serve(
    prepared: Prepared,
    executor: Executor,
    clock: Clock,
    told: Callable[[int, int], None] | None = None,
    idle: Callable[[], None] | None = None,
) -> Served:
    """Serve all requests of a scenario of one rank. told: requests that have ended, and all. idle: called while no
    request is there and none is due for a while (`IDLE_NS`). Raises BadInput for a deployment of several ranks, and
    where max_model_len lets no request in."""
    if prepared.layout.dp > 1:
        raise BadInput(f"one rank is served for real, and the deployment has {prepared.layout.dp}; set dp and ep to 1")
    return _Server(prepared, executor, clock, told, idle).run()


class _Server:
    def __init__(
        self,
        prepared: Prepared,
        executor: Executor,
        clock: Clock,
        told: Callable[[int, int], None] | None,
        idle: Callable[[], None] | None,
    ) -> None:
        deployment, stream = prepared.deployment, prepared.stream
        assert deployment is not None
        self.prepared, self.executor, self.clock, self.told, self.idle = prepared, executor, clock, told, idle
        self.kv, self.max_model_len = deployment.kv, deployment.max_model_len
        self.rank = Rank(deployment.kv, deployment.batching, deployment.max_num_seqs, deployment.max_num_batched_tokens)
        self.stream = stream
        self.prompts, self.outputs = stream.prompt_tokens.tolist(), stream.output_tokens.tolist()
        self.arrival: list[int] = stream.arrival_ns.tolist()
        self.requests = len(self.prompts)
        self.first, self.finish = [-1] * self.requests, [-1] * self.requests
        self.target, self.preempted = [NOT_YET] * self.requests, [0] * self.requests
        self.next = self.ended = 0
        self.recorder = Recorder()
        self.served = Served(None)  # type: ignore[arg-type]  # set when it ends
        self.slots = None if couples_tokens(prepared) else _slot_tables(prepared)

    # -- the loop -----------------------------------------------------------------------------------------------
    def run(self) -> Served:
        self.clock.start()
        if self.stream.concurrency is not None:
            for _ in range(self.stream.concurrency):
                self._next_of_closed_loop(0)
        while self.ended < self.requests:
            now = self.clock.now_ns()
            self._admit(now)
            if not self.rank.waiting and not self.rank.running_set:
                if self.next < self.requests:
                    if self.idle is not None and self.arrival[self.next] - self.clock.now_ns() > IDLE_NS:
                        self.idle()
                    self.clock.wait_until(self.arrival[self.next])
                continue
            self._step(now)
        end = self.recorder.steps().end_ns()
        self.served.outcome = Outcome(
            self._request_records(), self.recorder.steps(), self.recorder.runs, 0, end, self.rank.peak
        )
        return self.served

    def _step(self, now: int) -> None:
        """Plan, compute and book one step that begins now."""
        rank = self.rank
        waiting = len(rank.waiting)
        planned, decode, dropped = rank.plan()
        for sequence in dropped:
            sequence.stalled_ns = now
            self.executor.forget(sequence.index)
        decoding = rank.decoding if decode else 0
        if not planned and not decoding:
            raise BadInput("a request waits and no step can be planned; the KV cache is too small for it")
        loaded = self.executor.load(self._work(planned, bool(decoding)))
        began = self.clock.now_ns()
        self.served.times.append(self.executor.run(loaded))
        end = self.clock.now_ns()
        self.served.host_ns.append(began - now)
        key = Key(0, decoding, 0, decoding, 0, 0, 0, 0, decoding, sum(t for _, t in planned), decoding)
        run = Run(np.array([end - now], np.int64), key)
        self.recorder.run(0, now, 1, run, decoding, (len(dropped), waiting))
        if decoding:
            rank.advance(1)
            for sequence in rank.due():
                self._finished(sequence, end)
        for sequence, tokens in planned:
            self._end_chunk(sequence, tokens, end)

    def _end_chunk(self, sequence: Sequence, tokens: int, end: int) -> None:
        rank = self.rank
        if not rank.finish_chunk(sequence, tokens):
            return
        if sequence.first_ns < 0:
            sequence.first_ns = end
        else:
            self.recorder.resumed(end - sequence.stalled_ns)
        if sequence.generated == sequence.output:
            rank.drop(sequence)
            self._finished(sequence, end)
        else:
            rank.join(sequence)

    def _work(self, planned: list[tuple[Sequence, int]], decode: bool) -> StepWork:
        """The step's tokens and their slots."""
        rank = self.rank
        filling = {s.index for s in rank.prefilling}
        rows = [(s.index, s.offset + rank.dtick) for s in rank.running_set.values() if s.index not in filling]
        rows = rows if decode else []
        chunks = [Chunk(0, s.index, s.computed, tokens, s.computed + tokens == s.target) for s, tokens in planned]
        request = np.concatenate(
            [np.array([r for r, _ in rows], np.int64), *(np.full(c.tokens, c.request, np.int64) for c in chunks)]
        )
        position = np.concatenate(
            [np.array([p for _, p in rows], np.int64), *(np.arange(c.start, c.start + c.tokens) for c in chunks)]
        )
        none = np.zeros_like(request)
        if self.slots is None:
            phase = phase_of(len(request) - len(rows), len(request))
            slot = slots_of(self.prepared, request, position, none, phase)
        else:
            parts = [self.slots[r][p : p + 1] for r, p in rows]
            slot = np.concatenate(parts + [self.slots[c.request][c.start : c.start + c.tokens] for c in chunks])
        return make_work(self.prepared, (request, position, none), slot, len(rows), chunks)

    # -- requests -----------------------------------------------------------------------------------------------
    def _admit(self, now: int) -> None:
        if self.stream.concurrency is not None:
            return
        while self.next < self.requests and self.arrival[self.next] <= now:
            self.next += 1
            self._arrive(self.next - 1)

    def _next_of_closed_loop(self, now: int) -> None:
        while self.next < self.requests:
            i = self.next
            self.next += 1
            self.arrival[i] = now
            if self._arrive(i):
                return

    def _arrive(self, i: int) -> bool:
        prompt, output = self.prompts[i], self.outputs[i]
        if prompt + output > self.max_model_len or self.kv.units(prompt + output) > self.kv.capacity:
            self.target[i] = REJECTED
            self.ended += 1
            return False
        self.target[i] = 0
        self.rank.waiting.append(Sequence(i, prompt, output, self.arrival[i]))
        return True

    def _finished(self, sequence: Sequence, now: int) -> None:
        i = sequence.index
        self.first[i], self.finish[i], self.preempted[i] = sequence.first_ns, now, sequence.preempted
        self.executor.forget(i)
        self.ended += 1
        if self.told is not None:
            self.told(self.ended, self.requests)
        if self.stream.concurrency is not None:
            self._next_of_closed_loop(now)

    def _request_records(self) -> RequestRecords:
        def column(values: list[int]) -> IntArray:
            return np.array(values, np.int64)

        return RequestRecords(
            column(self.arrival), column(self.first), column(self.finish), self.stream.prompt_tokens,
            self.stream.output_tokens, column(self.target), column(self.preempted),
        )  # fmt: skip


def _slot_tables(prepared: Prepared) -> list[AnyArray]:
    """Slots of every token of every request [positions, L, K], looked up before the clock starts."""
    length_R = (prepared.stream.prompt_tokens + prepared.stream.output_tokens).astype(np.int64)
    out = []
    for request, length in enumerate(length_R.tolist()):
        position = np.arange(length, dtype=np.int64)
        out.append(slots_of(prepared, np.full(length, request), position, np.zeros(length, np.int64)))
    return out
