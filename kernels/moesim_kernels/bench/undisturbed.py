"""What may come between a process and its measurements: signals wait for the sample at hand, garbage for its end."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

__all__ = ["Caught", "no_collection", "signals_end"]


class Caught(Protocol):
    """A run that looks, between samples, whether a signal came: `caught` is its number."""

    caught: int | None


@contextmanager
def signals_end(run: Caught) -> Iterator[None]:
    """SIGINT and SIGTERM end the run after the sample at hand; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: FrameType | None) -> None:
        if run.caught is not None:
            raise SystemExit(128 + number)
        run.caught = number

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside a sample: it is done between rounds."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
