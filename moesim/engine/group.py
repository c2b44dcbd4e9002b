"""A lockstep group: data-parallel ranks that share their experts and therefore step together.

A dense model's ranks are groups of one. A run of steps in which only decode happens is priced at once and is one
event; an arrival cuts it at the first step boundary at or after it (`searchsorted` on integer cumulative time), so
the times are those of the step-by-step engine to the nanosecond (tests/property/test_run_ahead.py).

Events at one instant have a total order: arrivals first, then groups by index. It does not depend on when an event
was put into the queue, which is what makes the two ways of stepping agree.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simpy
from simpy.events import EventPriority

from moesim.arrays import IntArray
from moesim.cost.pricer import Batch, Chunk, Pricer, Run
from moesim.engine.rank import Rank, Sequence
from moesim.record import Recorder

__all__ = ["ARRIVAL", "Group", "Hooks"]

ARRIVAL = 1
"""priority of an arrival among events of one instant; group `i` has `2 + i`"""

_LONGEST_RUN = 4096


class _StepEnd(simpy.Event):
    """Fires `delay_ns` from now at `priority`; carries the version of the run it ends."""

    def __init__(self, env: simpy.Environment, priority: int, delay_ns: int, version: int) -> None:
        super().__init__(env)
        self._ok = True
        self._value = version
        env.schedule(self, priority=EventPriority(priority), delay=delay_ns)


@dataclass(slots=True)
class Hooks:
    """What a group tells the simulation: a sequence ended, each target's load; and which event is being handled."""

    finished: Callable[[Sequence, int], None]
    load: IntArray
    priority: int = ARRIVAL
    alone_until_ns: int = -1
    """until then nothing outside can happen to the only group there is, which may run on by itself (-1: it may not)"""


class Group:
    """Ranks `first_target ..` of the deployment, stepping together."""

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        first_target: int,
        ranks: list[Rank],
        pricer: Pricer,
        recorder: Recorder,
        hooks: Hooks,
        run_ahead: bool = True,
    ) -> None:
        self.env = env
        self.priority = 2 + index
        self.index = index
        self.first_target = first_target
        self.ranks = ranks
        self.pricer = pricer
        self.recorder = recorder
        self.hooks = hooks
        self.longest_run = _LONGEST_RUN if run_ahead else 1
        self.batch = Batch.idle(len(ranks), self._decode_tokens)
        self.single = len(ranks) == 1
        self.prepared = -1
        self.tick = 0
        self.skipped = [0] * len(ranks)  # steps in which a rank's decodes did not run
        self.todo: set[int] = set()
        self.wakes: list[tuple[int, int, int]] = []
        self.wake_version = [0] * len(ranks)
        self.busy = False
        self.handled = 0
        self.version = 0
        self.start_ns = 0
        self.run: Run | None = None
        self.steps = 0
        self.chunks: list[tuple[int, Sequence, int]] = []
        self.paused: list[int] = []  # ranks whose decodes do not run in the current step
        self.waiting_D = [0] * len(ranks)
        self.waiting = 0
        self.planned = (0, 0)

    # -- arrivals -------------------------------------------------------------------------------------------
    def submit(self, sequence: Sequence, rank: int) -> None:
        """Queue a request on rank `rank` of the group; it is seen when the next step is planned."""
        self.ranks[rank].waiting.append(sequence)
        self._tell_load(rank)
        self.todo.add(rank)
        if not self.busy:
            self.busy = True
            self.version += 1
            self._at(0)
        elif self.run is not None and self.steps > 1:
            self._cut()

    def _cut(self) -> None:
        """Shorten the run in progress to the first boundary at which the newcomer can be seen."""
        assert self.run is not None
        side: Literal["left", "right"] = "left" if self.hooks.priority < self.priority else "right"
        elapsed = int(self.env.now) - self.start_ns
        keep = int(np.searchsorted(self.run.cumulative_ns[: self.steps], elapsed, side=side)) + 1
        if keep < self.steps:
            self.steps = keep
            self.version += 1
            self._at(self.start_ns + int(self.run.cumulative_ns[keep - 1]) - int(self.env.now))

    def _at(self, delay_ns: int) -> None:
        event = _StepEnd(self.env, self.priority, delay_ns, self.version)
        assert event.callbacks is not None
        event.callbacks.append(self._wake)

    def _wake(self, event: simpy.Event) -> None:
        if event.value != self.version:
            return
        self.handled += 1
        self.hooks.priority = self.priority
        now = int(self.env.now)
        while True:
            if self.run is not None:
                self._end(now)
            end = self._begin(now)
            if end >= self.hooks.alone_until_ns or self.run is None:
                break
            now = end  # nothing can happen before: go on without an event
        if self.run is not None:
            self.version += 1
            self._at(end - int(self.env.now))
        self.hooks.priority = ARRIVAL

    # -- steps ----------------------------------------------------------------------------------------------
    def _plan(self, now: int) -> int:
        """Ask the ranks that changed what they compute next; returns how many requests were preempted."""
        self.chunks.clear()
        self.paused.clear()
        preempted = 0
        for d in sorted(self.todo) if len(self.todo) > 1 else tuple(self.todo):
            rank = self._sync(d)
            chunks, decode, dropped = rank.plan()
            for sequence in dropped:
                sequence.stalled_ns = now
            preempted += len(dropped)
            if chunks:
                self.chunks.extend((d, sequence, tokens) for sequence, tokens in chunks)
            else:
                self.todo.discard(d)
            if not decode and rank.decoding:
                self.paused.append(d)
            self._touch(d)
        return preempted

    def _begin(self, now: int) -> int:
        """Plan the next step or run of steps and price it; returns when it ends (or `now`, when nothing runs)."""
        preempted = self._plan(now)
        batch = self.batch
        batch.tick = self.tick
        decoding = batch.total_decoding
        self.start_ns = now
        if self.chunks:
            parts = [Chunk(d, s.index, s.computed, tokens, s.computed + tokens == s.target)
                     for d, s, tokens in self.chunks]  # fmt: skip
            self.run = self.pricer.mixed(batch, parts, self.paused)
            self.steps = 1
        elif decoding:
            steps = min(self._horizon(), self.longest_run)
            self.run = self.pricer.decode(batch, steps)
            self.steps = len(self.run.cumulative_ns)
            ahead = self.hooks.alone_until_ns - now
            if 0 < ahead < self.run.cumulative_ns[-1]:
                self.steps = int(self.run.cumulative_ns.searchsorted(ahead)) + 1
        else:
            assert not self.waiting, "a request waits on an idle rank"
            self.busy = False
            self.run = None
            return now
        self.planned = (preempted, self.waiting)
        return now + int(self.run.cumulative_ns[self.steps - 1])

    def _horizon(self) -> int:
        """Decode steps until some rank must be looked at again."""
        if self.single:
            return self.ranks[0].horizon()
        wakes = self.wakes
        while wakes[0][2] != self.wake_version[wakes[0][1]]:
            heapq.heappop(wakes)
        return wakes[0][0] - self.tick

    def _touch(self, d: int) -> None:
        """Rank `d` changed: refresh its row of the batch, its load and its next wake."""
        rank = self.ranks[d]
        self.batch.set(d, rank.decoding, rank.context, rank.growing, rank.context_window)
        if rank.decoding != self.prepared:
            self.pricer.prepare(rank.decoding)
            self.prepared = rank.decoding
        self._tell_load(d)
        if self.single:
            return
        steps = rank.horizon()
        self.wake_version[d] += 1
        if rank.decoding:
            heapq.heappush(self.wakes, (self.tick + steps, d, self.wake_version[d]))

    def _tell_load(self, d: int) -> None:
        rank = self.ranks[d]
        waiting = len(rank.waiting)
        self.waiting += waiting - self.waiting_D[d]
        self.waiting_D[d] = waiting
        self.hooks.load[self.first_target + d] = 4 * waiting + len(rank.running_set)

    def _sync(self, d: int) -> Rank:
        """Bring rank `d` up to the group's tick (ranks are advanced only when they are looked at)."""
        rank = self.ranks[d]
        steps = self.tick - self.skipped[d] - rank.dtick
        if steps:
            rank.advance(steps)
        return rank

    def _end(self, now: int) -> None:
        """Book the run that ends now."""
        run, self.run = self.run, None  # a request that comes back in now is seen by the plan that follows
        assert run is not None
        steps, batch = self.steps, self.batch
        self.tick += steps
        for d in self.paused:
            self.skipped[d] += 1
        self.recorder.run(self.index, self.start_ns, steps, run, batch.running(self.paused), self.planned)
        if self.single:  # its numbers come from the rank when the next run is planned
            changed = {0}
        else:
            batch.advance(steps, self.paused)
            changed = self._woken()
        for d in sorted(changed):
            rank = self._sync(d)
            for sequence in rank.due():
                self.hooks.finished(sequence, now)
        for d, sequence, tokens in self.chunks:
            self._end_chunk(self.ranks[d], sequence, tokens, now)
        self.todo.update(changed)  # requests that came back in have put their ranks there too

    def _woken(self) -> set[int]:
        """Ranks to look at after a run: those that compute prompts, paused ones, and those whose time has come."""
        wakes = self.wakes
        while wakes and (wakes[0][0] <= self.tick or wakes[0][2] != self.wake_version[wakes[0][1]]):
            _, d, version = heapq.heappop(wakes)
            if version == self.wake_version[d]:
                self.todo.add(d)
        changed = self.todo.union(self.paused)
        changed.update(d for d, _, _ in self.chunks)
        return changed

    def _end_chunk(self, rank: Rank, sequence: Sequence, tokens: int, now: int) -> None:
        if not rank.finish_chunk(sequence, tokens):
            return
        if sequence.first_ns < 0:
            sequence.first_ns = now
        else:
            self.recorder.resumed(now - sequence.stalled_ns)
        if sequence.generated == sequence.output:
            rank.drop(sequence)
            self.hooks.finished(sequence, now)
        else:
            rank.join(sequence)

    def _decode_tokens(self) -> tuple[IntArray, IntArray, IntArray]:
        """(request, position, rank) of every token that the next decode step computes; position counts KV tokens."""
        rows: list[tuple[int, int, int]] = []
        for d, rank in enumerate(self.ranks):
            dtick = self.tick - self.skipped[d]
            prefilling = {s.index for s in rank.prefilling}
            rows.extend((s.index, s.offset + dtick, d) for s in rank.running_set.values() if s.index not in prefilling)
        out = np.array(rows, np.int64).reshape(-1, 3)
        return out[:, 0], out[:, 1], out[:, 2]
