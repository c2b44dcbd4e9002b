"""The seams of the tuner: who proposes, who simulates, who keeps. The coordinator (`study`) knows no more of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from moesim_tuner.records import Candidate, Row, Task, Trial

__all__ = ["Ladder", "Store", "Strategy", "Workers"]


class Strategy(Protocol):
    """Which points next. After the same trials have been told, in order of their numbers, it proposes the same,
    whether they were proposed by this object or come from a journal."""

    def tell(self, trials: Iterable[Trial]) -> None:
        """Finished trials, each once, in the order of their numbers."""
        ...

    def propose(self, count: int) -> list[Candidate]:
        """`count` candidates to try together; fewer, or none, where the space is exhausted. Draws are keyed by the
        study's seed and the number of trials told."""
        ...


class Ladder(Protocol):
    """Which candidates climb on. Pure: rungs are compared with those of the trials before."""

    def climbs(self, rung: int, trial: Trial, trials: Sequence[Trial]) -> bool:
        """Does a candidate, whose last rung so far is `rung`, go on to the next? trial: what it came to up to there;
        trials: all of the batches before its own. Nothing else may decide, so that a batch that was cut off can be
        gone on with."""
        ...


class Workers(Protocol):
    """Runs tasks, on this process, a pool or a cluster. A worker that dies, hangs or raises comes back as a row whose
    state is `failed` and whose reasons say which; never as an exception."""

    def submit(self, task: Task) -> Future[Row]:
        """The row, some time."""
        ...

    @property
    def parallel(self) -> int:
        """How many tasks run at a time."""
        ...

    def close(self) -> None:
        """End every worker; those that run are not waited for."""
        ...


class Store(Protocol):
    """Keeps a study. What `append` has returned from survives any death of this process and of the machine."""

    def trials(self) -> list[Trial]:
        """Those kept, by number."""
        ...

    def proposed(self) -> list[list[Candidate]]:
        """The batches proposed so far, in order, with those whose trials are not all there."""
        ...

    def propose(self, first: int, candidates: Sequence[Candidate]) -> None:
        """Keep a batch before it runs; its trials are numbered from `first`."""
        ...

    def append(self, trials: Sequence[Trial]) -> None:
        """Keep finished trials. Raises BadInput or OSError where that cannot be, with nothing half kept."""
        ...

    def note(self, name: str, value: Any) -> None:
        """Keep something else of the study under a name, as JSON, in place of what the name had: the judgement."""
        ...

    def notes(self) -> dict[str, Any]:
        """What `note` kept."""
        ...

    def close(self) -> None:
        """Bring everything behind the journal up to date and let go of it."""
        ...
