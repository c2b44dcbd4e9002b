"""How far a search is, on stderr: a live view on a terminal, a line every ten seconds elsewhere, nothing when quiet.

Everything shown is counted from the trials told; only the rate and the time left know the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from moesim_tuner.definition import Definition
from moesim_tuner.pareto import best, front
from moesim_tuner.records import Trial
from moesim_tuner.words import figure, settings_in_short

if TYPE_CHECKING:
    from rich.live import Live

__all__ = ["Progress"]

_EVERY_S = 10.0
_SHOWN = 5
"""trials of the front"""
_RECENT = 20
"""trials that the rate is taken from"""


class Progress:
    """A context whose `told` is for `run_study`, and whose `stage` names what comes next.

    file: where it goes; clock: seconds, monotonic.
    """

    def __init__(
        self,
        definition: Definition,
        enabled: bool = True,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._definition = definition
        self._enabled = enabled
        self._file = file if file is not None else sys.stderr
        self._clock = clock
        self._trials: dict[int, Trial] = {}
        self._ended_s: list[float] = []
        self._resumed = 0
        self._stage = "searching"
        self._began_s = self._said_s = clock()
        self._opened_s = time.time()
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        """Begin to show."""
        self._began_s = self._said_s = self._clock()
        if self._enabled and self._file.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._file, highlight=False, emoji=False)
            self._live = Live(console=console, refresh_per_second=2, transient=True, get_renderable=self._view)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the view away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def told(self, trials: Sequence[Trial]) -> None:
        """Trials that have ended; those that were there before come first, all at once."""
        before = sum(trial.ended_s < self._opened_s for trial in trials)
        self._resumed += before
        self._ended_s += [self._clock()] * (len(trials) - before)
        self._trials = {**self._trials, **{trial.number: trial for trial in trials}}  # another thread may look at it
        self._say()

    def stage(self, what: str) -> None:
        """What is done now, in a few words."""
        if what != self._stage:
            self._stage = what
            self._say(now=what != "searching")

    # ---- what is shown

    @property
    def rate_per_s(self) -> float | None:
        """Trials a second, of the last ones of this run; None before the first has ended."""
        ended = self._ended_s
        if not ended:
            return None
        first = ended[-_RECENT - 1] if len(ended) > _RECENT else self._began_s
        count = min(len(ended), _RECENT)
        return count / max(self._clock() - first, 1e-9)

    def line(self) -> str:
        """The state in one line."""
        parts = [self._count()]
        rate = self.rate_per_s
        if rate is not None and self._stage == "searching":
            left = self._definition.spec.trials - len(self._trials)
            parts.append(f"{_rate(rate)}, {_duration(left / rate)} left")
        feasible = sum(t.feasible for t in self._trials.values())
        parts.append(f"{feasible} feasible" + self._excluded())
        top = best(self._definition, list(self._trials.values()))
        if top is not None:
            parts.append(f"best {self._values(top)} (trial {top.number})")
        head = "" if self._stage == "searching" else f"{self._stage}: "
        return head + "; ".join(parts)

    def _count(self) -> str:
        resumed = f" ({self._resumed} from before)" if self._resumed else ""
        return f"{len(self._trials)}/{self._definition.spec.trials} trials{resumed}"

    def _excluded(self) -> str:
        """Shares of those that do not fit, are none, break a limit."""
        trials = list(self._trials.values())
        if not trials:
            return ""
        counts = {
            "do not fit": sum(t.state == "infeasible" for t in trials),
            "illegal": sum(t.state == "illegal" for t in trials),
            "over a limit": sum(t.state == "complete" and not t.feasible for t in trials),
            "stopped early": sum(t.state == "pruned" for t in trials),
            "failed": sum(t.state == "failed" for t in trials),
        }
        shown = [f"{n / len(trials):.0%} {what}" for what, n in counts.items() if n]
        return f", {', '.join(shown)}" if shown else ""

    def _values(self, trial: Trial) -> str:
        names = self._definition.spec.objectives
        return ", ".join(f"{name} {figure(value, name)}" for name, value in zip(names, trial.values, strict=True))

    def _say(self, now: bool = False) -> None:
        """A plain line, where there is no live view and the last one is old enough."""
        if not self._enabled or self._live is not None:
            return
        at = self._clock()
        if now or at - self._said_s >= _EVERY_S:
            self._said_s = at
            print(self.line(), file=self._file, flush=True)

    def _view(self) -> Any:
        """For rich: a bar, a line of rates, the best so far."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        spec, done = self._definition.spec, len(self._trials)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self._stage, style="bold"), ProgressBar(total=spec.trials, completed=done, width=30), self._count()
        )
        rate = self.rate_per_s
        told = "first trials are running"
        if rate is not None:
            told = f"{_rate(rate)}, {_duration((spec.trials - done) / rate)} left"
        feasible = sum(t.feasible for t in self._trials.values())
        told += f"; {feasible} feasible{self._excluded()}"
        lines: list[Any] = [bar, Text(told, style="dim")]
        shown = front(self._definition, list(self._trials.values()))
        if shown:
            lines.append(self._front(shown))
        return Group(*lines)

    def _front(self, shown: Sequence[Trial]) -> Any:
        from rich.table import Table

        names = self._definition.spec.objectives
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        table.add_column("front" if len(names) > 1 else "best", justify="right", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
        for trial in shown[:_SHOWN]:
            values = [figure(value, name) for name, value in zip(names, trial.values, strict=True)]
            told = trial.origin if trial.origin == "default" else settings_in_short(trial.point)
            table.add_row(str(trial.number), *values, told)
        if len(shown) > _SHOWN:
            table.caption, table.caption_justify = f"{len(shown) - _SHOWN} more", "left"
        return table


def _rate(per_s: float) -> str:
    return f"{per_s:.1f} trials/s" if per_s >= 1 else f"{1 / per_s:.1f} s a trial"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
