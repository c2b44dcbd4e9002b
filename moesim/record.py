"""What happened: runs of steps and requests, as columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moesim.arrays import IntArray

if TYPE_CHECKING:
    from moesim.cost.pricer import Run

__all__ = ["NOT_YET", "REJECTED", "Recorder", "RequestRecords", "StepRecords"]

REJECTED, NOT_YET = -1, -2
"""`RequestRecords.target` of requests that no rank got: too long to be served; not there when the run was cut off."""


@dataclass(frozen=True, slots=True)
class StepRecords:
    """One row a run of steps (`run_*`, in order of their ends) and one row a step (`duration_ns`, same order)."""

    run_group: IntArray
    run_start_ns: IntArray
    run_steps: IntArray
    run_decoding: IntArray  # decode tokens in each step of the run, over the group's ranks
    run_waiting: IntArray  # requests in the group's queues when the run was planned
    run_preempted: IntArray
    duration_ns: IntArray  # [steps]
    stall_ns: IntArray  # gaps between output tokens that a preemption caused

    @property
    def steps(self) -> int:
        return len(self.duration_ns)

    def start_ns(self) -> IntArray:
        """Start of every step."""
        cumulative = np.cumsum(self.duration_ns) - self.duration_ns
        first = np.cumsum(self.run_steps) - self.run_steps
        base = self.run_start_ns - cumulative[first] if len(first) else self.run_start_ns
        return np.asarray(cumulative + np.repeat(base, self.run_steps))

    def end_ns(self) -> int:
        """End of the last step; 0 where there is none."""
        if not len(self.run_steps):
            return 0
        last = np.add.reduceat(self.duration_ns, np.cumsum(self.run_steps) - self.run_steps)
        return int((self.run_start_ns + last).max())

    def per_step(self, column: IntArray) -> IntArray:
        """A column of runs repeated for each of their steps."""
        return np.repeat(column, self.run_steps)


@dataclass(frozen=True, slots=True)
class RequestRecords:
    """One row a request, in the order of the stream. Times are -1 where a request was rejected."""

    arrival_ns: IntArray
    first_token_ns: IntArray
    finish_ns: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    target: IntArray  # replica * dp + data-parallel rank; REJECTED; NOT_YET
    preemptions: IntArray

    @property
    def completed(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """True where a request ran to its last token."""
        done: np.ndarray[tuple[int], np.dtype[np.bool_]] = self.finish_ns >= 0
        return done


@dataclass(slots=True)
class Recorder:
    """Grows while the engine runs; lists, because appending to a list is the cheapest thing Python does."""

    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    """(group, start_ns, steps, decoding, preempted, waiting) of each run"""
    runs: list[Run] = field(default_factory=list)
    stalls: list[int] = field(default_factory=list)

    def run(self, group: int, start_ns: int, steps: int, run: Run, decoding: int, planned: tuple[int, int]) -> None:
        """A run ended after `steps` of the steps it was priced for; `planned`: (preempted, waiting) at its start."""
        self.rows.append((group, start_ns, steps, decoding, *planned))
        self.runs.append(run if len(run.cumulative_ns) == steps else run.cut(steps))

    def resumed(self, stall_ns: int) -> None:
        """A preempted request put out its next token `stall_ns` after the one before."""
        self.stalls.append(stall_ns)

    def steps(self) -> StepRecords:
        """What was recorded, as columns."""
        rows = np.array(self.rows, np.int64).reshape(-1, 6).T
        group, start, steps, decoding, preempted, waiting = (np.ascontiguousarray(row) for row in rows)
        duration = np.concatenate([run.cumulative_ns for run in self.runs]) if self.runs else np.zeros(0, np.int64)
        first = np.cumsum(steps) - steps
        before = np.roll(duration, 1)
        before[first] = 0
        stalls = np.array(self.stalls, np.int64)
        return StepRecords(group, start, steps, decoding, waiting, preempted, duration - before, stalls)
