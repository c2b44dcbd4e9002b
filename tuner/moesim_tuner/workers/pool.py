"""Worker processes on this machine.

Each worker has a socket of its own, so that one that is killed at any moment, in the middle of a message too, harms no
other; a pool whose workers share a pipe and its lock (multiprocessing's, Pebble's) waits for ever, or reads rubbish,
when a worker dies while it holds the lock. One thread of the coordinator hands out tasks, watches the clock and the
deaths. Workers are forked by `moesim_tuner.workers.nursery`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import BadInput
from moesim_tuner.records import Row, Task
from moesim_tuner.workers.frames import Frames

__all__ = ["ONE_THREAD", "PoolWorkers", "death"]

ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
        "NUMBA_NUM_THREADS",
    ),
    "1",
)  # fmt: skip
"""Numeric libraries use one thread: workers share the cores among themselves."""
_ATTEMPTS = 2
_STARTS = 3
"""times in a row that nothing comes of starting workers before that is given up"""
_PAUSE_S = 1.0
_LAST_WORDS_S = 5.0
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from moesim_tuner.workers.nursery import main; main(int(sys.argv[2]), sys.argv[3])"
)


def death(code: int | None) -> str:
    """How a process ended, in words: its exit code, negative for a signal; None: not known."""
    if code is None:
        return "cause unknown"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


@dataclass
class _Job:
    task: Task
    future: Future[Row]
    deaths: list[str] = field(default_factory=list)


@dataclass
class _Worker:
    frames: Frames
    pid: int | None = None
    """None: not started yet"""
    job: _Job | None = None
    deadline: float = float("inf")
    late: bool = False
    """killed, because its task took too long"""
    gone: float | None = None
    """since when its socket is closed"""


class PoolWorkers:
    """`Workers` of `number` processes. A task whose worker dies is tried once more on a fresh one; one that takes
    longer than `timeout_s` ends with its worker. Both come back as rows. `result()` of a future raises
    BadInput only where no worker can be had at all, or `close` came first (CancelledError).

    function: `module:name` of what turns a task into a row. debug: workers' stderr, with tracebacks, is shown.
    """

    def __init__(
        self, number: int, timeout_s: float, *, debug: bool = False, function: str = "moesim_tuner.evaluate:evaluate"
    ) -> None:
        if number < 1:
            raise BadInput(f"at least one worker is needed, got {number}")
        if not hasattr(socket, "send_fds"):
            raise BadInput("a pool of processes needs Unix; use --workers 1 here, or --cluster")
        self._number, self._timeout_s, self._debug, self._function = number, timeout_s, debug, function
        self._jobs: deque[_Job] = deque()
        self._workers: dict[int, _Worker] = {}
        self._next = 0
        self._fruitless = 0
        self._not_before = 0.0
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: Frames | None = None
        self._hatched = False
        self._closing = False
        self._broken: BadInput | None = None
        self._lock = threading.Lock()
        self._events = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._events.register(self._wake_in, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="moesim-workers", daemon=True)
        self._thread.start()

    @property
    def parallel(self) -> int:
        """How many tasks run at a time."""
        return self._number

    def submit(self, task: Task) -> Future[Row]:
        """The row, some time."""
        future: Future[Row] = Future()
        with self._lock:
            if self._broken is not None:
                future.set_exception(self._broken)
                return future
            if self._closing:
                future.cancel()
                return future
            self._jobs.append(_Job(task, future))
        self._wake()
        return future

    def pids(self) -> list[int]:
        """Numbers of the worker processes that run."""
        return [w.pid for w in list(self._workers.values()) if w.pid is not None and w.gone is None]

    def close(self) -> None:
        """End every worker; those that run are not waited for. What was not done is cancelled."""
        with self._lock:
            self._closing = True
        self._wake()
        self._thread.join(timeout=10)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_out.send(b"x")

    # ---- the thread

    def _run(self) -> None:
        try:
            while not self._closing and self._broken is None:
                self._fill()
                self._watch_writes()
                for key, _ in self._events.select(self._patience()):
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_in.recv(4096)
                    elif key.data == "control":
                        self._hear_nursery()
                    else:
                        self._hear(key.data)
                self._end_late()
        finally:
            self._finish()

    def _patience(self) -> float | None:
        """Seconds until something is due without anything heard."""
        now = time.monotonic()
        due = [w.deadline for w in self._workers.values() if w.job is not None and not w.late]
        due += [w.gone + _LAST_WORDS_S for w in self._workers.values() if w.gone is not None]
        if self._not_before > now:
            due.append(self._not_before)
        return max(0.0, min(due) - now) if due and min(due) < float("inf") else None

    def _fill(self) -> None:
        """Start workers that are missing, hand out tasks."""
        if time.monotonic() >= self._not_before:
            if self._nursery is None:
                self._start_nursery()
            if self._hatched:
                while sum(w.gone is None for w in self._workers.values()) < self._number:
                    self._start_worker()
        for worker in self._workers.values():
            if worker.pid is not None and worker.job is None and worker.gone is None:
                job = self._take()
                if job is None:
                    return
                worker.job, worker.deadline = job, time.monotonic() + self._timeout_s
                worker.frames.put(job.task)

    def _take(self) -> _Job | None:
        with self._lock:
            while self._jobs:
                job = self._jobs.popleft()
                if not job.future.cancelled():
                    return job
        return None

    def _start_nursery(self) -> None:
        mine, its = socket.socketpair()
        environment = {**os.environ, **ONE_THREAD, **({"MOESIM_DEBUG": "1"} if self._debug else {})}
        arguments = [sys.executable, "-c", _START, json.dumps(sys.path), str(its.fileno()), self._function]
        try:
            self._nursery = subprocess.Popen(  # noqa: S603  our own interpreter and module
                arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=None if self._debug else subprocess.DEVNULL, pass_fds=(its.fileno(),), env=environment,
                process_group=0,
            )  # fmt: skip
        except OSError as error:
            mine.close()
            self._no_luck(f"a process cannot be started: {error.strerror}")
            return
        finally:
            its.close()
        self._control = Frames(mine)
        self._events.register(mine, selectors.EVENT_READ, "control")

    def _start_worker(self) -> None:
        assert self._control is not None
        mine, its = socket.socketpair()
        number, self._next = self._next, self._next + 1
        self._workers[number] = _Worker(Frames(mine))
        self._events.register(mine, selectors.EVENT_READ, number)
        self._control.channel.setblocking(True)  # orders are nine bytes, and the nursery always listens
        try:
            socket.send_fds(self._control.channel, [b"s%08d" % number], [its.fileno()])
        except OSError:  # it is gone, which is heard next
            pass
        finally:
            self._control.channel.setblocking(False)
            its.close()

    def _order_kill(self, number: int) -> None:
        if self._control is not None:
            self._control.channel.setblocking(True)
            with contextlib.suppress(OSError):
                self._control.channel.sendall(b"k%08d" % number)
            self._control.channel.setblocking(False)

    def _hear_nursery(self) -> None:
        assert self._control is not None
        try:
            for message in self._control.messages():
                self._heed(*message)
        except EOFError:
            self._nursery_gone()

    def _heed(self, what: str, *told: Any) -> None:
        if what == "ready":
            self._hatched = True
        elif what == "started":
            number, pid = told
            if number in self._workers:
                self._workers[number].pid = pid
        elif what == "died":
            number, code = told
            self._dead(number, code)
        elif what == "failed":
            number, why = told
            self._forget(number)
            if not any(w.pid is not None for w in self._workers.values()):
                self._no_luck(f"a worker cannot be started: {why}")
            self._not_before = time.monotonic() + _PAUSE_S
        elif what == "broken":
            self._broken = BadInput(f"workers cannot be started: {told[0]}")

    def _hear(self, number: int) -> None:
        """Read what a worker sent."""
        worker = self._workers.get(number)
        if worker is None or worker.gone is not None:
            return
        try:
            for row in worker.frames.messages():
                job, worker.job, worker.deadline = worker.job, None, float("inf")
                self._fruitless = 0
                if job is not None:
                    _settle(job, row)
        except EOFError:
            worker.gone = time.monotonic()  # the nursery says what of
            self._events.unregister(worker.frames.channel)
        except Exception:  # noqa: BLE001  a message that cannot be read: end the worker, as if it had died
            self._order_kill(number)
            worker.gone = time.monotonic()
            self._events.unregister(worker.frames.channel)

    def _end_late(self) -> None:
        """Kill workers whose task takes too long; give up waiting for the last word on one that is gone."""
        now = time.monotonic()
        for number, worker in list(self._workers.items()):
            if worker.gone is not None and now >= worker.gone + _LAST_WORDS_S:
                self._order_kill(number)
                self._dead(number, None)
            elif worker.job is not None and now >= worker.deadline and not worker.late:
                worker.late = True
                self._order_kill(number)

    def _dead(self, number: int, code: int | None) -> None:
        """A worker has ended: settle its task, or put it first in the queue for another try."""
        worker = self._forget(number)
        if worker is None or worker.job is None:
            return
        job = worker.job
        if worker.late:
            reason = f"no answer within {self._timeout_s:g} s (tune.timeout_s)"
            _settle(job, Row("failed", reasons=(reason,), elapsed_s=self._timeout_s))
            return
        job.deaths.append(death(code))
        if len(job.deaths) < _ATTEMPTS:
            with self._lock:
                self._jobs.appendleft(job)
            return
        first, last = job.deaths
        reason = f"the worker died ({last}) twice" if first == last else f"the worker died twice ({first}, then {last})"
        _settle(job, Row("failed", reasons=(reason,)))

    def _forget(self, number: int) -> _Worker | None:
        worker = self._workers.pop(number, None)
        if worker is not None:
            if worker.gone is None:
                with contextlib.suppress(EOFError):  # what it sent before it died counts
                    for row in worker.frames.messages():
                        job, worker.job = worker.job, None
                        if job is not None:
                            _settle(job, row)
                self._events.unregister(worker.frames.channel)
            worker.frames.channel.close()
        return worker

    def _nursery_gone(self) -> None:
        """It was killed, and its workers with it."""
        assert self._control is not None
        assert self._nursery is not None
        self._events.unregister(self._control.channel)
        self._control.channel.close()
        self._nursery.kill()
        code = self._nursery.wait()
        self._control = self._nursery = None
        self._hatched = False
        for number in list(self._workers):
            self._dead(number, -signal.SIGKILL)
        if self._broken is None:
            self._no_luck(f"the process that starts workers died ({death(code)})")

    def _no_luck(self, why: str) -> None:
        self._fruitless += 1
        self._not_before = time.monotonic() + _PAUSE_S
        if self._fruitless >= _STARTS:
            self._broken = BadInput(f"workers cannot be started: {why}, {self._fruitless} times in a row")

    def _watch_writes(self) -> None:
        """Wait for room where something is left to send."""
        for number, worker in self._workers.items():
            if worker.gone is None:
                worker.frames.flush()
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.frames.waiting else 0)
                if self._events.get_key(worker.frames.channel).events != wanted:
                    self._events.modify(worker.frames.channel, wanted, number)

    def _finish(self) -> None:
        """End all processes, cancel what is left or say why nothing can be done."""
        if self._control is not None:
            self._control.channel.close()  # the nursery kills its workers and ends
        if self._nursery is not None:
            try:
                self._nursery.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self._nursery.kill()
                self._nursery.wait()
        with self._lock:
            self._closing = True
            left = [*self._jobs, *(w.job for w in self._workers.values() if w.job is not None)]
            self._jobs.clear()
        for worker in self._workers.values():
            worker.frames.channel.close()
        self._events.close()
        for job in left:
            with contextlib.suppress(InvalidStateError):
                if self._broken is not None:
                    job.future.set_exception(self._broken)
                else:
                    job.future.cancel()


def _settle(job: _Job, row: Row) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
        job.future.set_result(row)
