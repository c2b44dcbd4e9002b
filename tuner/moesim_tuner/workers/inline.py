"""Tasks run here, one at a time, when they are submitted: nothing to start, nothing to send."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType

from moesim_tuner.records import Row, Task

__all__ = ["InlineWorkers"]


class _TooLong(BaseException):
    """Not an Exception: no `except Exception` on the way may take it for a mistake of the simulation."""


class InlineWorkers:
    """`Workers` in this process. timeout_s is kept in the main thread of a Unix process, as far as Python code
    runs; elsewhere nothing could end a task. A death of this process is nobody's row: use a pool where that may be."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._closed = False

    @property
    def parallel(self) -> int:
        """One at a time."""
        return 1

    def submit(self, task: Task) -> Future[Row]:
        """A future that is done."""
        from moesim_tuner.evaluate import evaluate

        future: Future[Row] = Future()
        if self._closed:
            future.cancel()
            return future
        try:
            with _at_most(self._timeout_s):
                row = evaluate(task)
        except _TooLong:
            reason = f"no answer within {self._timeout_s:g} s (tune.timeout_s)"
            row = Row("failed", reasons=(reason,), elapsed_s=self._timeout_s)
        future.set_result(row)
        return future

    def close(self) -> None:
        """Take no more tasks."""
        self._closed = True


@contextmanager
def _at_most(timeout_s: float) -> Iterator[None]:
    """Raise _TooLong in here after so many seconds."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
