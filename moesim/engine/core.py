"""The simulation: arrivals, the balancer, and groups that step."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import simpy

from moesim.arrays import FloatArray, IntArray
from moesim.balancing import BalancingPolicy, NearPolicy
from moesim.batching import BatchingPolicy
from moesim.cost.pricer import Pricer, Run
from moesim.engine.group import ARRIVAL, Group, Hooks
from moesim.engine.rank import KvShape, Rank, Sequence
from moesim.record import NOT_YET, REJECTED, Recorder, RequestRecords, StepRecords
from moesim.workload.requests import RequestStream

__all__ = ["Deployment", "Outcome", "run"]

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Deployment:
    """What serves: `groups` groups of `ranks_per_group` data-parallel ranks, all alike.

    `pricers`: one a group. `max_model_len`: longer requests are rejected. `ready_ns`: when weights are loaded.
    """

    pricers: list[Pricer]
    ranks_per_group: int
    kv: KvShape
    batching: BatchingPolicy
    balancer: BalancingPolicy
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    run_ahead: bool
    ready_ns: int = 0
    until_ns: int | None = None
    near: tuple[NearPolicy, FloatArray] | None = None
    """the balancer, where it is told which target holds how much of each request's activations [R, D]"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Records of a run; `runs` pairs each row of `steps.run_*` with its price key; `events`: SimPy events handled."""

    requests: RequestRecords
    steps: StepRecords
    runs: list[Run]
    events: int
    end_ns: int
    peak_kv_units: int


class _Simulation:
    def __init__(self, stream: RequestStream, deployment: Deployment, progress: Callable[[float], None] | None) -> None:
        self.env = simpy.Environment()
        self.stream = stream
        self.deployment = deployment
        self.recorder = Recorder()
        self.progress = progress
        self.requests = len(stream.prompt_tokens)
        self.ended = 0
        self.next = 0
        self.placed = 0
        self.prompts: list[int] = stream.prompt_tokens.tolist()
        self.outputs: list[int] = stream.output_tokens.tolist()
        size = deployment.ranks_per_group
        self.load = np.zeros(len(deployment.pricers) * size, np.int64)
        self.first = [-1] * self.requests
        self.finish = [-1] * self.requests
        self.arrival = stream.arrival_ns.tolist()
        self.target = [NOT_YET] * self.requests
        self.preempted = [0] * self.requests
        self.hooks = Hooks(self._finished, self.load)
        self.groups = [
            Group(self.env, g, g * size, [self._rank() for _ in range(size)], pricer, self.recorder, self.hooks,
                  deployment.run_ahead)
            for g, pricer in enumerate(deployment.pricers)
        ]  # fmt: skip

    def _rank(self) -> Rank:
        d = self.deployment
        return Rank(d.kv, d.batching, d.max_num_seqs, d.max_num_batched_tokens)

    def _finished(self, sequence: Sequence, now: int) -> None:
        i = sequence.index
        self.first[i] = sequence.first_ns
        self.finish[i] = now
        self.preempted[i] = sequence.preempted
        self._one_less()
        if self.stream.concurrency is not None:
            self._next_of_closed_loop(now)

    def _one_less(self) -> None:
        self.ended += 1
        if self.progress is not None and self.ended * 100 // self.requests != (self.ended - 1) * 100 // self.requests:
            self.progress(self.ended / self.requests)

    def _next_of_closed_loop(self, now: int) -> None:
        """The next request takes the place of the one that ended; rejected ones end at once."""
        while self.next < self.requests:
            i = self.next
            self.next += 1
            self.arrival[i] = now
            if self._arrive(i):
                return

    def _arrive(self, i: int) -> bool:
        """Request `i` is here; False when it is rejected."""
        d, stream = self.deployment, self.stream
        prompt, output = self.prompts[i], self.outputs[i]
        total = prompt + output
        if total > d.max_model_len or d.kv.units(total) > d.kv.capacity:
            self.target[i] = REJECTED
            self._one_less()
            return False
        if d.near is None:
            target = int(d.balancer.pick(self.load, i, int(stream.session_id[i]), self.placed))
        else:
            target = int(d.near[0].pick_near(self.load, d.near[1][i]))
        self.placed += 1
        self.target[i] = target
        group, rank = divmod(target, d.ranks_per_group)
        self.groups[group].submit(Sequence(i, prompt, output, self.arrival[i]), rank)
        return True

    def _arrivals(self) -> Generator[simpy.Event, None, None]:
        env = self.env
        if self.deployment.ready_ns:
            yield env.timeout(self.deployment.ready_ns)
        if self.stream.concurrency is not None:
            for _ in range(self.stream.concurrency):
                self._next_of_closed_loop(int(env.now))
            self._alone_until(_NEVER)
            return
        for i, arrival in enumerate(self.arrival):
            delay = arrival - env.now
            if delay > 0:
                self._alone_until(arrival)
                yield env.timeout(delay)
            self.hooks.priority = ARRIVAL
            self._arrive(i)
        self._alone_until(_NEVER)

    def _alone_until(self, when_ns: int) -> None:
        """No request will come from outside before `when_ns`; matters where there is one group to get it."""
        if len(self.groups) == 1 and self.deployment.run_ahead:
            until = self.deployment.until_ns
            self.hooks.alone_until_ns = when_ns if until is None else min(when_ns, until)

    def run(self) -> Outcome:
        self.env.process(self._arrivals())
        self.env.run(until=self.deployment.until_ns)
        events = self.requests + sum(group.handled for group in self.groups)
        peak = max(rank.peak for group in self.groups for rank in group.ranks)
        runs = self.recorder.runs
        steps = self.recorder.steps()
        end = max(int(self.env.now), steps.end_ns())
        return Outcome(self._request_records(), steps, runs, events, end, peak)

    def _request_records(self) -> RequestRecords:
        def column(values: list[int]) -> IntArray:
            return np.array(values, np.int64)

        return RequestRecords(
            column(self.arrival), column(self.first), column(self.finish), self.stream.prompt_tokens,
            self.stream.output_tokens, column(self.target), column(self.preempted),
        )  # fmt: skip


def run(stream: RequestStream, deployment: Deployment, progress: Callable[[float], None] | None = None) -> Outcome:
    """Serve `stream` on `deployment` until the last request ends (or `until_ns`). `progress` gets the share done."""
    return _Simulation(stream, deployment, progress).run()
