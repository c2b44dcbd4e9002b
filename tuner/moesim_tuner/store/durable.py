"""The store of a study that is being run: opened, appended to, closed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import BadInput
from moesim_tuner.records import Candidate, Trial
from moesim_tuner.store.journal import Found, Journal, read_journal
from moesim_tuner.store.kept import Kept, batch_record, candidate_from, trial_from
from moesim_tuner.store.locks import FileLock
from moesim_tuner.store.looking import unknown
from moesim_tuner.store.mending import bring_up, lock_study, make_folder, mend_file, unite
from moesim_tuner.store.urls import Place, checked_name, place_of

if TYPE_CHECKING:
    from moesim_tuner.definition import Definition
    from moesim_tuner.store.mirror import Mirror

__all__ = ["DurableStore", "definition_of", "open_store"]

Say = Callable[[str], None]


def _aloud(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def open_store(
    url: str,
    study: str,
    definition: Definition | None = None,
    *,
    journals: Path | None = None,
    say: Say = _aloud,
) -> DurableStore:
    """Open a study for writing, a new one or one that goes on.

    url: of SQLAlchemy, SQLite or PostgreSQL, or a path. definition: what the study is about; None goes on with what is
    kept. One that differs only in how many trials there are to be, in a trial's time limit or in how it is judged,
    takes the place of what was kept. journals: the folder of journals, if not the usual one (`urls`). say: is told
    what was mended and where the tables fall behind.

    Raises BadInput: another process runs the study; there is none to go on with; it has another definition; journal
    and tables contradict each other; either is damaged beyond mending; the storage cannot be used. OSError: no room.
    """
    place = place_of(url, journals)
    checked_name(study)
    journal_path = place.journal(study)
    make_folder(place.journals)
    if place.file is not None:
        make_folder(place.file.parent)
    lock = lock_study(place.lock(study), study)
    mirror: Mirror | None = None
    journal: Journal | None = None
    try:
        found = read_journal(journal_path) if journal_path.exists() else Found()
        if found.kept is not None and found.kept.name != study:
            raise BadInput(f"this journal is of the study {found.kept.name}, not {study}", str(journal_path))
        if found.kept is None and definition is None and place.file is not None and not place.file.exists():
            raise unknown(place, study)
        mend_file(place, study, found, say)
        from moesim_tuner.store.mirror import Mirror

        mirror = Mirror(place, study, say)
        there = mirror.read()
        kept = unite(found.kept, there, study, place, journal_path)
        if kept is None and definition is None:
            raise unknown(place, study)
        journal = Journal(journal_path, found)
        kept = bring_up(journal, found, kept, there, definition, study, say)
        mirror.catch_up(kept, there)
        return DurableStore(kept, journal, mirror, lock, place, say)
    except BaseException as error:
        if mirror is not None:
            mirror.close()
        if journal is not None:
            journal.close()
        lock.close()
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(journal_path)) from None
        raise


class DurableStore:
    """A study open for writing (`protocols.Store`); also a context manager. kept: what it holds; read it, only."""

    def __init__(self, kept: Kept, journal: Journal, mirror: Mirror, lock: FileLock, place: Place, say: Say) -> None:
        """By `open_store`."""
        self.kept, self.place = kept, place
        self._journal, self._mirror, self._lock, self._say = journal, mirror, lock, say
        self._closed = False

    @property
    def name(self) -> str:
        """The study's."""
        return self.kept.name

    @property
    def definition(self) -> Definition:
        """What it is about."""
        return definition_of(self.kept)

    def trials(self) -> list[Trial]:
        """See `protocols.Store`."""
        return self.kept.trials

    def proposed(self) -> list[list[Candidate]]:
        """See `protocols.Store`."""
        return [list(batch) for batch in self.kept.batches]

    def propose(self, first: int, candidates: Sequence[Candidate]) -> None:
        """See `protocols.Store`. Raises ValueError unless the batch begins where the last one ends."""
        data = batch_record(first, candidates)
        kept = [candidate_from(c) for c in data["candidates"]]
        if first != self.kept.num_proposed or not kept:
            raise ValueError(f"a batch from trial {first}, where {self.kept.num_proposed} comes next")
        self._journal.append("proposed", data)
        self.kept.propose(first, kept)
        self._mirror.take("proposed", data)

    def append(self, trials: Sequence[Trial]) -> None:
        """See `protocols.Store`. Raises ValueError for a trial that was not proposed, or has ended before."""
        if not trials:
            return
        numbers = [trial.number for trial in trials]
        if len(set(numbers)) < len(numbers) or any(
            not 0 <= n < self.kept.num_proposed or n in self.kept.by_number for n in numbers
        ):
            raise ValueError(f"trials {numbers}: each must have been proposed and ends once")
        data = [trial.to_json() for trial in trials]
        as_read = [trial_from(one) for one in data]
        self._journal.append("trials", data)
        self.kept.append(as_read)
        self._journal.num_trials = len(self.kept.by_number)
        self._mirror.take("trials", as_read)

    def note(self, name: str, value: Any) -> None:
        """See `protocols.Store`."""
        self._journal.append("note", {"name": name, "value": value})
        self.kept.notes[name] = value
        self._mirror.take("note", name)

    def notes(self) -> dict[str, Any]:
        """See `protocols.Store`."""
        return dict(self.kept.notes)

    def close(self) -> None:
        """See `protocols.Store`. Raises BadInput or OSError where the tables cannot be brought up to date; the journal
        has everything then, and whoever opens the study next writes the rest."""
        self._close(raising=True)

    def _close(self, raising: bool) -> None:
        if self._closed:
            return
        self._closed = True
        error = self._mirror.close()
        behind = self._mirror.num_behind
        self._journal.close()
        self._lock.close()
        if error is None:
            return
        rest = f"its tables lack the last {behind} trials, its journal none: resume once that is mended"
        if raising and isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror}; {rest}", error.filename)
        if raising:
            raise BadInput(f"{error}; {rest}")
        self._say(f"study {self.name}: {rest}")

    def __enter__(self) -> DurableStore:
        """Itself."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close. What ends the block is what the user is told, rather than what closing met."""
        self._close(raising=kind is None)


def definition_of(kept: Kept) -> Definition:
    """A study's definition. Raises BadInput where this moesim reads it otherwise than the one that kept it."""
    from moesim_tuner.definition import Definition

    try:
        return Definition.from_json(kept.definition)
    except (KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise BadInput(
            f"study {kept.name} was begun by moesim {kept.version}, and this one cannot read what it is about "
            f"({text}); use that version"
        ) from None
