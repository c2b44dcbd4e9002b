"""Databases: connect, make Optuna's tables, read a study back, and say in one line what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import event, exc, select
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from moesim.errors import BadInput
from moesim.strict_json import parse_json
from moesim_tuner.store.kept import Kept, candidate_from, trial_from
from moesim_tuner.store.urls import Place

__all__ = [
    "BATCH", "DEFINITION", "NOTE", "engine_of", "explained", "make_tables", "read_names", "read_study_rows", "tables",
    "torn",
]  # fmt: skip

DEFINITION = "moesim:definition"
"""user attribute of a study: its first record"""
BATCH = "moesim:batch:"
"""system attributes of a study: its batches, by first number"""
NOTE = "moesim:note:"
"""user attributes of a study: its notes"""
BUSY_S = 15.0
CONNECT_S = 5
CHECK_S = 2.0


def tables() -> dict[str, Any]:
    """Optuna's tables by name."""
    from optuna.storages._rdb import models

    return dict(models.BaseModel.metadata.tables)


def engine_of(place: Place, writing: bool) -> Any:
    """An engine whose connections are closed after use. Raises BadInput where a driver lacks."""
    try:
        if place.file is not None:
            return _sqlite_engine(place.file, writing)
        options = {"connect_timeout": CONNECT_S, "application_name": _application()}
        return sqlalchemy.create_engine(place.url, poolclass=NullPool, connect_args=options)
    except (ImportError, exc.NoSuchModuleError):
        raise BadInput("PostgreSQL needs psycopg: pip install 'moesim[postgres]'", f"--storage {place.shown}") from None


def _application() -> str:
    from moesim_tuner.store.locks import whoami

    return f"moesim tune, {whoami()}"[:63]


def _sqlite_engine(file: Path, writing: bool) -> Any:
    # a reader, too, may have to roll back what a killed writer left half done
    mode = "rwc" if writing else "rw" if os.access(file, os.W_OK) and os.access(file.parent, os.W_OK) else "ro"
    uri = f"file:{_quoted(file)}?mode={mode}"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, timeout=BUSY_S, check_same_thread=False, isolation_level=None)

    engine = sqlalchemy.create_engine("sqlite://", creator=connect, poolclass=NullPool)
    if writing:
        event.listen(engine, "begin", _immediate)
    return engine


def _immediate(connection: Any) -> None:
    """A transaction that started by reading could not wait for another writer once it writes."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _quoted(file: Path) -> str:
    import urllib.parse

    return urllib.parse.quote(str(file.absolute()))


def torn(file: Path) -> str | None:
    """What is wrong with a SQLite file; None for one that is well, empty, or too large to be looked through in
    CHECK_S seconds. Raises BadInput where it is locked, OSError where it cannot be read."""
    with file.open("rb") as opened:
        head = opened.read(16)
    if not head:
        return None
    if head != b"SQLite format 3\0":
        return "is no SQLite database"
    end = time.monotonic() + CHECK_S
    connection = sqlite3.connect(f"file:{_quoted(file)}?mode=rw", uri=True, timeout=BUSY_S)
    try:
        connection.set_progress_handler(lambda: time.monotonic() > end, 100_000)
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        return None if found == "ok" else f"is damaged ({' '.join(str(found).split())})"
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            return None
        raise BadInput(f"the database cannot be opened: {error}", str(file)) from None
    except sqlite3.DatabaseError as error:
        return f"is damaged ({error})"
    finally:
        connection.close()


def make_tables(place: Place, engine: Any) -> None:
    """Optuna makes its tables, or finds that they are of its version. Raises BadInput."""
    with explained(place):
        names = set(sqlalchemy.inspect(engine).get_table_names())
        if place.file is not None and names and not names & set(tables()):
            raise BadInput("this database belongs to something else; name another file", f"--storage {place.shown}")
        if "alembic_version" in names and _revision(engine) == _newest_revision():
            return
    import optuna

    with explained(place):
        try:
            # braces in a URL are a template to Optuna
            url = place.url.replace("{", "{{").replace("}", "}}")
            options = {"poolclass": NullPool, "connect_args": _connect_args(place)}
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
        except RuntimeError as error:
            raise BadInput(
                f"the tables are of another version of Optuna ({' '.join(str(error).split())[:200]})",
                f"--storage {place.shown}",
            ) from None
        storage.remove_session()
        storage.engine.dispose()


def _revision(engine: Any) -> str | None:
    """Of the tables."""
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()  # type: ignore[no-any-return]


@cache
def _newest_revision() -> str:
    """Of this Optuna, by the names of the files that it ships: to load them takes longer than all else."""
    import optuna.storages._rdb

    names = [
        path.stem.rstrip("_") for path in Path(optuna.storages._rdb.__file__).parent.glob("alembic/versions/v*.py")
    ]
    return max(names, key=lambda name: ([int(part) for part in re.findall(r"\d+", name)], name), default="")


def _connect_args(place: Place) -> dict[str, Any]:
    if place.file is not None:
        return {"timeout": BUSY_S}
    return {"connect_timeout": CONNECT_S}


@contextlib.contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what a database raises into BadInput, or OSError where there is no room: one line, no password."""
    try:
        yield
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        raise _plain(place, error) from None
    except ImportError:
        raise BadInput("PostgreSQL needs psycopg: pip install 'moesim[postgres]'", f"--storage {place.shown}") from None


def _plain(place: Place, error: Exception) -> BadInput | OSError:
    """The driver's own words, and what may help."""
    text = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
    password = None if place.file is not None else make_url(place.url).password
    if password:
        text = text.replace(str(password), "***")
    if "disk is full" in text or "No space left" in text or "could not extend file" in text:
        import errno

        return OSError(errno.ENOSPC, f"no room is left for the database ({text})", str(place.file or place.shown))
    hints = {
        "readonly": "it may not be written to; use another --storage",
        "unable to open": f"can files be made in {place.file.parent if place.file else ''}?",
        "is locked": "another program has held it for long; end that, or use another --storage",
        "not a database": "name another file",
        "refused": "is the server running, and is this its port?",
        "No such file": "is the server running, and is this its socket?",
        "authentication failed": "is the password right? psycopg also reads PGPASSWORD and ~/.pgpass",
        "no password": "add one to the URL, or set PGPASSWORD",
        "does not exist": "create it first (`createdb NAME`), or name another",
        "resolve": "is the host's name right?",
        "timeout": "is the host reachable?",
        "permission denied": "the user needs the right to create tables there",
    }
    hint = next((hint for word, hint in hints.items() if word in text), "use another --storage, or see to the database")
    return BadInput(f"the database answered: {text}; {hint}", f"--storage {place.shown}")


# ---- reading


def read_names(connection: Any) -> list[str]:
    """Studies of this tuner, by name."""
    t = tables()
    studies, attributes = t["studies"], t["study_user_attributes"]
    found = connection.execute(
        select(studies.c.study_name)
        .join(attributes, attributes.c.study_id == studies.c.study_id)
        .where(attributes.c.key == DEFINITION)
    )
    return sorted(row[0] for row in found)


def read_study_rows(connection: Any, study: str, where: str) -> Kept | None:
    """A study from the tables; None where they have none of this name. Raises BadInput for one that this tuner did
    not make, or that something else has added to."""
    t = tables()
    study_id = connection.execute(
        select(t["studies"].c.study_id).where(t["studies"].c.study_name == study)
    ).scalar_one_or_none()
    if study_id is None:
        return None
    where = f"{where}: study {study}"
    user = dict(_attributes(connection, t["study_user_attributes"], study_id))
    if DEFINITION not in user:
        raise BadInput("Optuna has a study of this name that `moesim tune` did not make; use another --study", where)
    system = dict(_attributes(connection, t["study_system_attributes"], study_id))
    batches = {int(key[len(BATCH) :]): text for key, text in system.items() if key.startswith(BATCH)}
    try:
        kept = Kept.begin("study", parse_json(user[DEFINITION], where), where)
        for first in sorted(batches):
            kept.propose(first, [candidate_from(c) for c in parse_json(batches[first], where)["candidates"]])
        kept.append(_trials(connection, t, study_id, where))
        kept.notes = {key[len(NOTE) :]: json.loads(text) for key, text in user.items() if key.startswith(NOTE)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"the tables hold something else than was written to them ({error}); where the journal is whole, delete "
            "the study there and resume",
            where,
        ) from None
    return kept


def _attributes(connection: Any, table: Any, study_id: int) -> Any:
    return connection.execute(select(table.c.key, table.c.value_json).where(table.c.study_id == study_id)).all()


def _trials(connection: Any, t: dict[str, Any], study_id: int, where: str) -> list[Any]:
    from moesim_tuner.store.optuna_rows import TRIAL

    trials, attributes = t["trials"], t["trial_user_attributes"]
    whole = (attributes.c.trial_id == trials.c.trial_id) & (attributes.c.key == TRIAL)
    query = (
        select(trials.c.number, attributes.c.value_json)
        .select_from(trials.outerjoin(attributes, whole))
        .where(trials.c.study_id == study_id)
        .order_by(trials.c.number)
    )
    out = []
    for number, text in connection.execute(query):
        if text is None:
            raise BadInput(
                f"something else than `moesim tune` has added trial {number}; delete it, or use another --study", where
            )
        out.append(trial_from(parse_json(text, where)))
    return out
