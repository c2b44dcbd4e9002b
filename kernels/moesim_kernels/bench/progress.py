"""A progress line on a terminal: how far, what now, time left. Plain text."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TextIO

__all__ = ["Progress", "Status", "span"]


@dataclass(frozen=True)
class Status:
    """Where a run stands: samples taken and wanted, cases with all their samples, seconds left at most."""

    samples: int
    wanted: int
    finished: int
    cases: int
    left_s: float
    now: str


def span(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Rewrites one line, at most five times a second; silent where the stream is no terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._on = self._stream.isatty()
        self._last = -1.0
        self._width = 0

    def __call__(self, status: Status) -> None:
        """Show `status`."""
        now = time.monotonic()
        if not self._on or now - self._last < 0.2:
            return
        self._last = now
        line = self.line(status)
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    @staticmethod
    def line(status: Status) -> str:
        """The text of one status, at most 100 characters."""
        share = min(1.0, status.samples / max(1, status.wanted))
        bar = ("#" * round(24 * share)).ljust(24, ".")
        done = f"{status.finished}/{status.cases} cases"
        return f"[{bar}] {share:4.0%}  {done}  {span(status.left_s)} left  {status.now}"[:100]

    def end(self) -> None:
        """Leave the line."""
        if self._on and self._width:
            self._stream.write("\n")
            self._stream.flush()
