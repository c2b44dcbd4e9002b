"""What opening a study takes: folders, the lock, a torn file put aside, and journal and tables brought together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import BadInput
from moesim_tuner.records import canonical
from moesim_tuner.store.identity import differences, identity
from moesim_tuner.store.journal import Found, Journal, sync_folder
from moesim_tuner.store.kept import Kept, batch_record, same_trial
from moesim_tuner.store.locks import FileLock
from moesim_tuner.store.urls import Place

if TYPE_CHECKING:
    from moesim_tuner.definition import Definition

__all__ = ["bring_up", "lock_study", "make_folder", "mend_file", "unite"]

Say = Callable[[str], None]


def make_folder(folder: Path) -> None:
    """With the folders above it, each made to last. Raises BadInput."""
    try:
        missing = [f for f in (folder, *folder.parents) if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync_folder(made.parent)
    except (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise BadInput(
            f"the folder cannot be made: {error.strerror}; use another --storage", str(error.filename or folder)
        ) from None
    except OSError as error:
        if error.strerror and "ead-only" in error.strerror:
            raise BadInput("the folder is on a read-only file system; use another --storage", str(folder)) from None
        raise


def lock_study(path: Path, study: str) -> FileLock:
    """Raises BadInput where another process runs the study, or no file can be made there."""
    try:
        return FileLock(path, study)
    except (PermissionError, IsADirectoryError) as error:
        raise BadInput(f"cannot be written: {error.strerror}; use another --storage", str(path)) from None
    except OSError as error:
        if error.strerror and "ead-only" in error.strerror:
            raise BadInput("this is on a read-only file system; use another --storage", str(path)) from None
        raise


def mend_file(place: Place, study: str, found: Found, say: Say) -> None:
    """Put a SQLite file that is torn aside, where the journal can fill a new one. Raises BadInput where it cannot."""
    if place.file is None:
        return
    if not place.file.exists():
        if found.kept is not None and found.kept.by_number:
            say(f"{place.file} is missing; rebuilt from the journal of {study}, {len(found.kept.by_number)} trials")
        return
    from moesim_tuner.store.sql import torn

    wrong = torn(place.file)
    if wrong is None:
        return
    if found.kept is None:
        raise BadInput(
            f"{wrong}, and there is no journal of {study} to rebuild it from; name another file", str(place.file)
        )
    aside = next(
        path
        for n in range(1, 10_000)
        if not (path := place.file.with_name(f"{place.file.name}.torn{'' if n == 1 else n}")).exists()
    )
    for ending in ("-journal", "-wal", "-shm", ""):
        part = place.file.with_name(place.file.name + ending)
        if part.exists():
            part.rename(aside.with_name(aside.name + ending))
    sync_folder(place.file.parent)
    say(
        f"{place.file} {wrong}; it is kept as {aside.name}, and a new one is made from the journal of {study}, "
        f"{len(found.kept.by_number)} trials. Other studies in it are rebuilt when they are resumed"
    )


def unite(a: Kept | None, b: Kept | None, study: str, place: Place, journal: Path) -> Kept | None:
    """What the journal (a) and the tables (b) hold together. Raises BadInput where they contradict each other."""
    if a is None or b is None:
        return a or b
    where = f"{journal} and {place.shown}"
    mend = "they are of two runs: move one of them away, or use another --study"
    if identity(a.definition) != identity(b.definition):
        parts = ", ".join(differences(a.definition, b.definition))
        raise BadInput(f"the two define study {study} differently ({parts}); {mend}", where)
    more = b if b.num_proposed > a.num_proposed or b.by_number.keys() - a.by_number.keys() else a
    fewer = a if more is b else b
    united = Kept(study, more.definition, a.version)
    longer, shorter = (a, b) if len(a.batches) >= len(b.batches) else (b, a)
    for i, batch in enumerate(shorter.batches):
        if canonical(batch_record(0, batch)) != canonical(batch_record(0, longer.batches[i])):
            raise BadInput(f"the two hold different proposals for trials from {united.num_proposed}; {mend}", where)
        united.propose(united.num_proposed, batch)
    for batch in longer.batches[len(shorter.batches) :]:
        united.propose(united.num_proposed, batch)
    for number, trial in a.by_number.items():
        other = b.by_number.get(number)
        if other is not None and not same_trial(trial, other):
            raise BadInput(f"the two hold different trials number {number}; {mend}", where)
    united.append((b.by_number | a.by_number).values())
    united.notes = {**fewer.notes, **more.notes}
    return united


def bring_up(
    journal: Journal, found: Found, kept: Kept | None, there: Kept | None, definition: Definition | None, study: str,
    say: Say,
) -> Kept:  # fmt: skip
    """Write to the journal what it lacks of `kept`, and the definition where it is new."""
    from moesim import __version__

    if found.torn_bytes and found.kept is not None:
        say(f"{journal.path}: {found.torn_bytes} bytes of an unfinished record, never acknowledged, were cut off")
    if kept is None:
        assert definition is not None
        kept = Kept(study, definition.to_json(), __version__)
        journal.append(*kept.header())
        return kept
    if definition is not None:
        _agree(kept, definition.to_json())
    had = found.kept or Kept(study, kept.definition, kept.version)
    if found.kept is None:
        journal.append(*had.header())
        say(f"the journal of {study} was missing; rebuilt from the database, {len(kept.by_number)} trials")
    first = had.num_proposed
    for batch in kept.batches[len(had.batches) :]:
        journal.append("proposed", batch_record(first, batch))
        first += len(batch)
    new = [trial.to_json() for trial in kept.trials if trial.number not in had.by_number]
    if new and found.kept is not None:
        say(f"the journal of {study} lacked {len(new)} trials that the database has; they were added")
    for start in range(0, len(new), 256):
        journal.append("trials", new[start : start + 256])
    for name, value in kept.notes.items():
        if had.notes.get(name, ...) != value:
            journal.append("note", {"name": name, "value": value})
    journal.num_trials = len(kept.by_number)
    wanted = kept.definition if definition is None else definition.to_json()
    if wanted != had.definition:
        journal.append("definition", wanted)
        kept.definition = wanted
    if kept.version != __version__:
        say(f"study {study} was begun by moesim {kept.version}; trials of {__version__} may not be comparable")
    return kept


def _agree(kept: Kept, definition: dict[str, Any]) -> None:
    parts = differences(kept.definition, definition)
    if parts:
        raise BadInput(
            f"study {kept.name} was begun with another definition: {', '.join(parts)} differ; use another --study, or "
            "`moesim tune resume` to go on with the one that is kept"
        )
