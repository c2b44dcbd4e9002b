"""What is kept, also while it grows: nothing here changes anything."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import BadInput
from moesim_tuner.store.journal import Found, read_journal
from moesim_tuner.store.kept import Kept
from moesim_tuner.store.locks import holder_of
from moesim_tuner.store.mending import unite
from moesim_tuner.store.urls import Place, checked_name, place_of

__all__ = ["StudyLine", "list_studies", "read_study", "unknown"]


@dataclass(frozen=True)
class StudyLine:
    """A study in a list. num_trials of num_wanted have ended; changed_s: when the last one did (0: none); holder: the
    process that runs it now, None where none does on this machine."""

    name: str
    num_trials: int
    num_wanted: int
    changed_s: float
    holder: str | None


def read_study(url: str, study: str, *, journals: Path | None = None) -> Kept:
    """A study as it is kept now; it may be running. SQLite: the journal where there is one, for it is never behind. A
    server: what it has, and what this machine's journal has besides. Raises BadInput, as `open_store`."""
    place = place_of(url, journals)
    checked_name(study)
    journal_path = place.journal(study)
    found = read_journal(journal_path) if journal_path.exists() else Found()
    if found.kept is not None and place.file is not None:
        return found.kept
    kept = unite(found.kept, _read_tables(place, study), study, place, journal_path)
    if kept is None:
        raise unknown(place, study)
    return kept


def list_studies(url: str, *, journals: Path | None = None) -> list[StudyLine]:
    """Every study, by name; none where there is no such file."""
    place = place_of(url, journals)
    kept: dict[str, Kept] = {}
    for path in sorted(place.journals.glob("*.jsonl")):
        found = read_journal(path).kept
        if found is not None:
            kept[found.name] = found
    for name in _table_names(place):
        if place.file is None or name not in kept:
            kept[name] = read_study(url, name, journals=journals)
    return [
        StudyLine(
            name, len(study.by_number), study.wanted, max((t.ended_s for t in study.trials), default=0.0),
            holder_of(place.lock(name)),
        )
        for name, study in sorted(kept.items())
    ]  # fmt: skip


def _table_names(place: Place) -> list[str]:
    if place.file is not None and not _is_database(place.file):
        return []
    from sqlalchemy import inspect

    from moesim_tuner.store.sql import engine_of, explained, read_names

    engine = engine_of(place, writing=False)
    with explained(place), engine.connect() as connection:
        return read_names(connection) if inspect(connection).has_table("study_user_attributes") else []


def _read_tables(place: Place, study: str) -> Kept | None:
    if place.file is not None and not _is_database(place.file):
        return None
    from sqlalchemy import inspect

    from moesim_tuner.store.sql import engine_of, explained, read_study_rows

    engine = engine_of(place, writing=False)
    with explained(place), engine.connect() as connection:
        if not inspect(connection).has_table("study_user_attributes"):
            return None
        return read_study_rows(connection, study, place.shown)


def _is_database(file: Path) -> bool:
    """Raises BadInput for a file that is something else."""
    if not file.exists() or file.stat().st_size == 0:
        return False
    with file.open("rb") as opened:
        if opened.read(16) != b"SQLite format 3\0":
            raise BadInput("this is no SQLite database; name another file", str(file))
    return True


def unknown(place: Place, study: str) -> BadInput:
    """There is no such study, but others."""
    names: list[str] = []
    with contextlib.suppress(BadInput, OSError):
        names = [line.name for line in list_studies(place.url, journals=place.journals)]
    there = f"there are {', '.join(names[:20])}" if names else "there is none; begin one with `moesim tune FILE`"
    return BadInput(f"no study {study}; {there}", f"--storage {place.shown}")
