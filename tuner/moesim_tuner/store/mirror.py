"""Optuna's tables follow the journal: one writer, a thread of its own, many trials a transaction.

A transaction carries what the journal had when it began, so the tables always hold a beginning of the journal, only
finished trials, and either all of a trial or nothing. What cannot be written now is tried again; the journal has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import exc, func, insert, select, update

from moesim.errors import BadInput
from moesim_tuner.records import Trial
from moesim_tuner.store.identity import ordered
from moesim_tuner.store.kept import Kept, batch_record
from moesim_tuner.store.optuna_rows import Rows, directions
from moesim_tuner.store.sql import BATCH, DEFINITION, NOTE, engine_of, explained, make_tables, read_study_rows, tables
from moesim_tuner.store.urls import Place

__all__ = ["Mirror"]

EVERY_S = 1.0
EVERY_TRIALS = 64
RETRY_S = 5.0
LOCK_TRIES = 20
LOCK_PAUSE_S = 0.1
_METRIC_NAMES = "study:metric_names"
"""system attribute under which Optuna keeps `Study.set_metric_names`"""
_open: weakref.WeakSet[Mirror] = weakref.WeakSet()


def _forked() -> None:
    """A child of fork shares the socket, and with it the server's session and its lock: put nothing in its place."""
    for mirror in list(_open):
        mirror.disown()


os.register_at_fork(after_in_child=_forked)


class Mirror:
    """The tables of one study, open for writing. say: is told what the user should know."""

    def __init__(self, place: Place, study: str, say: Callable[[str], None]) -> None:
        """Connect, make the tables, take the lock of a server. Raises BadInput or OSError."""
        self.place, self.study, self.say = place, study, say
        self._engine = engine_of(place, writing=True)
        make_tables(place, self._engine)
        self._tables = tables()
        self._connection: Any = None
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pending: list[tuple[str, Any]] = []
        self._since = 0.0
        self._ending = False
        self._unsure = False
        self._told = ""
        self.lost = ""
        _open.add(self)
        with explained(place):
            try:
                self._connected()
            except BaseException:
                self._disconnect()
                raise

    # ---- connections

    def _connected(self) -> Any:
        """SQLite: a new connection each time. A server: one that stays, and with it the lock on the study."""
        if self.place.file is not None:
            return self._engine.connect()
        if self._connection is None or self._connection.closed or self._connection.invalidated:
            self._disconnect()
            self._connection = self._engine.connect()
            self._lock(self._connection)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(exc.SQLAlchemyError):
                self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        connection = self._connected()
        try:
            with connection.begin():
                yield connection
        finally:
            if self.place.file is not None:
                connection.close()

    def _lock(self, connection: Any) -> None:
        """A lock of the server's session, which ends with this process. A dead holder's goes a little after it."""
        digest = hashlib.blake2b(f"moesim tune {self.study}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        for setting in ("tcp_keepalives_idle = 30", "tcp_keepalives_interval = 10", "tcp_keepalives_count = 3"):
            connection.exec_driver_sql(f"SET {setting}")
        for attempt in range(LOCK_TRIES):
            if connection.execute(select(func.pg_try_advisory_lock(key))).scalar_one():
                connection.commit()
                return
            connection.rollback()
            if attempt + 1 < LOCK_TRIES:
                time.sleep(LOCK_PAUSE_S)
        high, low = (key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF
        who = connection.exec_driver_sql(
            "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid WHERE l.granted "
            "AND l.locktype = 'advisory' AND l.classid::bigint = %s AND l.objid::bigint = %s",
            (high, low),
        ).scalar()
        name = str(who or "another process").removeprefix("moesim tune, ")
        raise BadInput(
            f"the study {self.study} is being run by {name}; wait for it, end it, or use another --study",
            f"--storage {self.place.shown}",
        )

    def disown(self) -> None:
        """In a child of fork: turn the shared socket into nothing, without a word to the server."""
        if self._connection is None:
            return
        with contextlib.suppress(Exception):
            file = self._connection.connection.driver_connection.fileno()
            nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(nothing, file)
            os.close(nothing)

    # ---- at the start

    def read(self) -> Kept | None:
        """What the tables hold of the study."""
        with explained(self.place), self._transaction() as connection:
            return read_study_rows(connection, self.study, self.place.shown)

    def catch_up(self, kept: Kept, there: Kept | None) -> None:
        """Bring the tables up to `kept`; `there` is what they hold. Then follow it."""
        self._kept = kept
        self._rows = Rows(kept.definition)
        records: list[tuple[str, Any]] = []
        if there is None:
            records = self._all()
        else:
            if there.header() != kept.header():
                records.append(("definition", None))
            first = there.num_proposed
            for batch in kept.batches[len(there.batches) :]:
                records.append(("proposed", batch_record(first, batch)))
                first += len(batch)
            records.append(("trials", [t for t in kept.trials if t.number not in there.by_number]))
            changed = {name: v for name, v in kept.notes.items() if there.notes.get(name, ...) != v}
            records += [("note", name) for name in changed]
        if there is None or records != [("trials", [])]:
            with explained(self.place):
                self._write(records)
        self._thread = threading.Thread(target=self._follow, name="moesim-tune-mirror", daemon=True)
        self._thread.start()

    def _all(self) -> list[tuple[str, Any]]:
        """Everything that is kept, as records."""
        records: list[tuple[str, Any]] = []
        first = 0
        for batch in self._kept.batches:
            records.append(("proposed", batch_record(first, batch)))
            first += len(batch)
        return [*records, ("trials", self._kept.trials), *(("note", name) for name in self._kept.notes)]

    # ---- following

    def take(self, kind: str, data: Any) -> None:
        """Write this some time soon. Raises BadInput where another coordinator has taken the study."""
        if self.lost:
            raise BadInput(self.lost)
        with self._wake:
            if not self._pending:
                self._since = time.monotonic()
            self._pending.append((kind, data))
            self._wake.notify()

    def _due(self) -> bool:
        trials = sum(len(data) for kind, data in self._pending if kind == "trials")
        return trials >= EVERY_TRIALS or time.monotonic() >= self._since + EVERY_S

    def _follow(self) -> None:
        pause_s = 0.0
        while True:
            with self._wake:
                if pause_s:
                    self._wake.wait(pause_s)
                while not self._ending and not (self._pending and self._due()):
                    left = self._since + EVERY_S - time.monotonic() if self._pending else None
                    self._wake.wait(left)
                if self._ending:
                    return
            pause_s = 0.0 if self._flush() is None else RETRY_S

    def _flush(self) -> Exception | None:
        """Write what is pending; what went wrong, said once. It stays pending then."""
        with self._wake:
            records = list(self._pending)
        if not records:
            return None
        try:
            with explained(self.place):
                self._write(records)
        except (BadInput, OSError) as error:
            text = str(error) if isinstance(error, BadInput) else f"{error.filename}: {error.strerror}"
            if isinstance(error, BadInput) and "is being run by" in text:
                self.lost = text
            if text != self._told:
                self._told = text
                self.say(f"the tables fall behind, the journal does not: {text}")
            return error
        with self._wake:
            del self._pending[: len(records)]
            self._since = time.monotonic()
        if self._told:
            self._told = ""
            self.say("the tables have caught up with the journal")
        return None

    def close(self) -> Exception | None:
        """Write the rest and let go; what went wrong, if anything."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        told, self._told = self._told, ""
        quiet, self.say = self.say, lambda text: None
        error = None if self.lost else self._flush()
        self.say, self._told = quiet, told
        self._disconnect()
        self._engine.dispose()
        return error

    @property
    def num_behind(self) -> int:
        """Trials that the tables lack."""
        return sum(len(data) for kind, data in self._pending if kind == "trials")

    # ---- writing

    def _write(self, records: list[tuple[str, Any]]) -> None:
        """One transaction. Whether a commit that failed half way took place is looked up next time."""
        try:
            with self._transaction() as connection:
                study_id = self._study_id(connection)
                new = study_id is None  # or deleted meanwhile, in the dashboard say
                if study_id is None:
                    study_id = self._new_study(connection)
                    records = self._all()  # what is still to come may be among it
                elif self._unsure:
                    records = self._missing(connection, study_id, records)
                self._insert(connection, study_id, records)
        except BaseException:
            self._unsure = True
            raise
        self._unsure = new

    def _study_id(self, connection: Any) -> int | None:
        studies = self._tables["studies"]
        found = connection.execute(select(studies.c.study_id).where(studies.c.study_name == self.study))
        return found.scalar_one_or_none()  # type: ignore[no-any-return]

    def _new_study(self, connection: Any) -> int:
        t, kept = self._tables, self._kept
        connection.execute(insert(t["studies"]), [{"study_name": self.study}])
        study_id = self._study_id(connection)
        assert study_id is not None
        connection.execute(
            insert(t["study_directions"]),
            [
                {"study_id": study_id, "objective": i, "direction": direction}
                for i, direction in enumerate(directions(kept.definition))
            ],
        )
        self._attribute(connection, "study_user_attributes", study_id, DEFINITION, ordered(kept.header()[1]))
        self._attribute(
            connection, "study_system_attributes", study_id, _METRIC_NAMES,
            json.dumps(kept.definition["spec"]["objectives"]),
        )  # fmt: skip
        return study_id

    def _attribute(self, connection: Any, table: str, study_id: int, key: str, text: str) -> None:
        """Set one, there or not."""
        t = self._tables[table]
        there = (t.c.study_id == study_id) & (t.c.key == key)
        if connection.execute(update(t).where(there), {"value_json": text}).rowcount == 0:
            connection.execute(insert(t), [{"study_id": study_id, "key": key, "value_json": text}])

    def _missing(self, connection: Any, study_id: int, records: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """Those that are not there."""
        t = self._tables["trials"]
        there = set(connection.execute(select(t.c.number).where(t.c.study_id == study_id)).scalars())
        return [
            (kind, [trial for trial in data if trial.number not in there]) if kind == "trials" else (kind, data)
            for kind, data in records
        ]

    def _insert(self, connection: Any, study_id: int, records: list[tuple[str, Any]]) -> None:
        trials: list[Trial] = []
        for kind, data in records:
            if kind == "trials":
                trials += data
            elif kind == "proposed":
                key = f"{BATCH}{data['first']}"
                self._attribute(connection, "study_system_attributes", study_id, key, ordered(data))
            elif kind == "note":
                text = ordered(self._kept.notes[data])
                self._attribute(connection, "study_user_attributes", study_id, f"{NOTE}{data}", text)
            else:
                text = ordered(self._kept.header()[1])
                self._attribute(connection, "study_user_attributes", study_id, DEFINITION, text)
        if trials:
            self._insert_trials(connection, study_id, sorted(trials, key=lambda trial: trial.number))

    def _insert_trials(self, connection: Any, study_id: int, trials: list[Trial]) -> None:
        t = self._tables
        connection.execute(insert(t["trials"]), [self._rows.head(trial, study_id) for trial in trials])
        numbers = [trial.number for trial in trials]
        ids: dict[int, int] = {}
        for start in range(0, len(numbers), 500):  # variables of one statement are limited
            found = select(t["trials"].c.number, t["trials"].c.trial_id).where(
                t["trials"].c.study_id == study_id, t["trials"].c.number.in_(numbers[start : start + 500])
            )
            ids |= {row[0]: row[1] for row in connection.execute(found)}
        gathered: dict[str, list[dict[str, Any]]] = {}
        for trial in trials:
            for table, rows in self._rows.of(trial).items():
                gathered.setdefault(table, []).extend({"trial_id": ids[trial.number], **row} for row in rows)
        for table, rows in gathered.items():
            if rows:
                connection.execute(insert(t[table]), rows)
