"""A study in SQLite: Optuna opens it as if it had written it, either half can be made anew from the other, and what
cannot be is said in one line."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from moesim_tuner.records import Candidate, Trial
from moesim_tuner.store import canonical_export, definition_of, list_studies, open_store, read_study
from moesim_tuner.store import mirror as mirror_module
from moesim_tuner.store import sql as sql_module

from moesim.errors import BadInput
from tests.build_study import candidate, definition, fill, in_child, trial

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def db(tmp_path):
    return tmp_path / "tune.db"


def url_of(db: Path) -> str:
    return f"sqlite:///{db}"


def journal_of(db: Path, study: str = "world") -> Path:
    return db.with_name(f"{db.name}.studies") / f"{study}.jsonl"


_EMPTY: list[bytes] = []


def made(db: Path, trials: int = 12, study: str = "world", **how: object) -> list[Trial]:
    """A study of some trials; what it has. Optuna's tables are made once and copied."""
    if not db.exists():
        db.parent.mkdir(exist_ok=True)
        if not _EMPTY:
            optuna.storages.RDBStorage(url_of(db)).engine.dispose()
            _EMPTY.append(db.read_bytes())
        db.write_bytes(_EMPTY[0])
    with open_store(url_of(db), study, definition(), say=unexpected) as store:
        fill(store, 0, trials, **how)  # type: ignore[arg-type]
        store.note("judge", {"winner": 3})
        return store.trials()


def unexpected(text: str) -> None:
    raise AssertionError(text)


def rows(db: Path, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(db) as connection:
        found = connection.execute(query).fetchall()
    connection.close()
    return found


# ---- Optuna's view


def as_optuna_would(number: int) -> optuna.trial.FrozenTrial:
    """Trial `number`, made by Optuna's own functions."""
    t = trial(number)
    d = optuna.distributions
    every = {
        "parallel.ep": d.IntDistribution(8, 64, step=8),
        "policies.placement": d.CategoricalDistribution(["contiguous", "eplb"]),
        "engine.max_num_seqs": d.IntDistribution(16, 1024, log=True),
        "routing.popularity_zipf": d.FloatDistribution(0.0, 1.5),
        "layout": d.CategoricalDistribution(["a", "b"]),
        "policies.placement.num_redundant_experts": d.CategoricalDistribution([0, 32]),
    }
    state = {"complete": "COMPLETE", "failed": "FAIL"}.get(t.state, "PRUNED")
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        values=t.values or None,
        params=dict(t.point),
        distributions={name: every[name] for name in t.point},
        user_attrs={
            "origin": t.origin,
            "state": t.state,
            "feasible": t.feasible,
            "reasons": list(t.reasons),
            "scenario_hash": t.scenario_hash,
            "moesim:trial": json.loads(json.dumps(t.to_json())),
        },
        intermediate_values={i: figures["output_tok_per_s"] for i, figures in enumerate(t.rungs)},
        constraints=dict(t.violations),
    )


def test_optuna_reads_what_it_would_have_written(db, tmp_path):
    """Every field of every trial, beside a study to which Optuna's own `add_trial` wrote the same."""
    made(db, 20)
    ours = optuna.load_study(study_name="world", storage=url_of(db))
    theirs = optuna.create_study(storage=f"sqlite:///{tmp_path}/theirs.db", direction="maximize")
    theirs.add_trials([as_optuna_would(n) for n in range(20)])
    names = ("number", "state", "values", "params", "distributions", "user_attrs", "constraints", "intermediate_values")
    for mine, other in zip(ours.trials, theirs.trials, strict=True):
        for name in names:
            assert getattr(mine, name) == getattr(other, name), name
        assert list(mine.params) == list(other.params)
        mine._validate()
        assert mine.datetime_start.timestamp() == 1.7e9 + mine.number
        assert mine.duration.total_seconds() == 0.5
    assert ours.directions == theirs.directions
    assert ours.best_trial.number == theirs.best_trial.number
    assert ours.metric_names == ["output_tok_per_s"]
    assert ours.user_attrs["moesim:definition"]["definition"] == definition().to_json()
    # and a sampler of Optuna's can go on from it
    asked = optuna.load_study(
        study_name="world", storage=url_of(db), sampler=optuna.samplers.TPESampler(n_startup_trials=2, seed=1)
    ).ask(ours.trials[1].distributions)
    assert set(asked.params) == set(ours.trials[1].params)


def test_several_objectives(db):
    about = definition(objectives=["output_tok_per_s", "tpot_mean_ms"])
    with open_store(url_of(db), "two", about, say=unexpected) as store:
        fill(store, 0, 12, objectives=2)
    study = optuna.load_study(study_name="two", storage=url_of(db))
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.trials[3].values == list(trial(3, objectives=2).values)
    feasible = [n for n in range(12) if trial(n).feasible]
    # each has more of both than the one before, so none is better in both
    assert sorted(t.number for t in study.best_trials) == feasible
    assert study.metric_names == ["output_tok_per_s", "tpot_mean_ms"]


def test_values_outside_the_space_are_left_to_the_json(db):
    """A scenario may stand where its space does not reach; Optuna would refuse such a parameter when it is read."""
    odd = {"parallel.ep": 12, "policies.placement": "else", "engine.max_num_seqs": True, "routing.popularity_zipf": 1.5}
    with open_store(url_of(db), "odd", definition(), say=unexpected) as store:
        store.propose(0, [Candidate(odd, "start")])
        store.append([Trial(0, odd, "start", "complete", (1.0,), {}, ({"output_tok_per_s": 1.0},))])
    found = optuna.load_study(study_name="odd", storage=url_of(db)).trials[0]
    assert found.params == {"routing.popularity_zipf": 1.5}
    assert found.user_attrs["moesim:trial"]["point"] == odd


def test_tables_follow_while_the_study_runs(db, monkeypatch):
    """A reader beside it sees a beginning of the journal each time, finished trials only, and more and more of them."""
    monkeypatch.setattr(mirror_module, "EVERY_S", 0.02)
    seen: list[int] = []
    with open_store(url_of(db), "world", definition(), say=unexpected) as store:
        ended = threading.Event()

        def read() -> None:
            while not ended.is_set() or not seen:
                numbers = [r[0] for r in rows(db, "SELECT number FROM trials ORDER BY trial_id")]
                assert numbers == list(range(len(numbers)))
                assert not rows(db, "SELECT 1 FROM trials WHERE state IN ('RUNNING', 'WAITING')")
                values = rows(db, "SELECT COUNT(*) FROM trial_values")[0][0]
                assert isinstance(values, int)
                seen.append(len(numbers))

        reader = threading.Thread(target=read)
        reader.start()
        for first in range(0, 40, 4):
            fill(store, first, first + 4)
            time.sleep(0.02)
        ended.set()
        reader.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert rows(db, "SELECT COUNT(*) FROM trials") == [(40,)]


def test_a_study_deleted_meanwhile_is_written_again(db, monkeypatch):
    """The dashboard can do that."""
    monkeypatch.setattr(mirror_module, "EVERY_S", 0.01)
    with open_store(url_of(db), "world", definition(), say=unexpected) as store:
        fill(store, 0, 8)
        deadline = time.monotonic() + 20
        while rows(db, "SELECT COUNT(*) FROM trials") != [(8,)]:
            assert time.monotonic() < deadline
        optuna.delete_study(study_name="world", storage=url_of(db))
        fill(store, 8, 12)
    study = optuna.load_study(study_name="world", storage=url_of(db))
    assert [t.number for t in study.trials] == list(range(12))
    assert read_study(url_of(db), "world").trials == [trial(n) for n in range(12)]


# ---- going on


def test_going_on(db):
    before = made(db)
    said: list[str] = []
    with open_store(url_of(db), "world", say=said.append) as store:
        assert store.trials() == before == [trial(n) for n in range(12)]
        assert store.proposed() == [[candidate(n) for n in range(f, f + 4)] for f in (0, 4, 8)]
        assert store.notes() == {"judge": {"winner": 3}}
        assert store.definition == definition()
        store.propose(12, [candidate(n) for n in range(12, 16)])
        store.append([trial(14)])
    with open_store(url_of(db), "world", definition(), say=said.append) as store:
        assert [t.number for t in store.trials()] == [*range(12), 14]
        assert store.proposed()[-1] == [candidate(n) for n in range(12, 16)]
        store.append([trial(12), trial(15)])
        store.append([trial(13)])
        assert store.trials() == [trial(n) for n in range(16)]
    assert said == []
    assert [t.number for t in optuna.load_study(study_name="world", storage=url_of(db)).trials] == list(range(16))


def test_more_trials_another_limit_and_other_judges_are_the_same_study(db):
    made(db)
    more = definition(trials=80, timeout_s=5, judge={"finalists": 2}, base="elsewhere")
    with open_store(url_of(db), "world", more, say=unexpected) as store:
        assert store.kept.wanted == 80
    assert read_study(url_of(db), "world").definition == more.to_json()
    shutil.rmtree(journal_of(db).parent)
    assert read_study(url_of(db), "world").definition == more.to_json()
    assert definition_of(read_study(url_of(db), "world")).spec.judge.finalists == 2


def test_another_definition_is_another_study(db):
    made(db)
    other = definition("seed: 2\n", seed=7, batch=5)
    with pytest.raises(
        BadInput, match=r"another definition: text, tune\.batch, tune\.seed differ; use another --study"
    ):
        open_store(url_of(db), "world", other, say=unexpected)
    assert read_study(url_of(db), "world").trials == [trial(n) for n in range(12)]


def test_what_the_text_says_beside_the_scenario_is_free(db):
    """Comments, and the `tune` block, whose meaning is in the definition besides."""
    one = replace(definition("seed: 1 # one\n"), scenario_hash="abc", overrides=("tune.trials=40",))
    open_store(url_of(db), "world", one, say=unexpected).close()
    other = replace(definition("seed: 1 # two\n", trials=50), scenario_hash="abc", overrides=())
    with open_store(url_of(db), "world", other, say=unexpected) as store:
        assert store.definition == other
    with pytest.raises(BadInput, match="another definition: scenario_hash differ"):
        open_store(url_of(db), "world", replace(other, scenario_hash="abd"), say=unexpected)


def test_misuse_is_refused(db):
    with open_store(url_of(db), "world", definition(), say=unexpected) as store:
        store.propose(0, [candidate(0), candidate(1)])
        with pytest.raises(ValueError, match="a batch from trial 1, where 2 comes next"):
            store.propose(1, [candidate(1)])
        with pytest.raises(ValueError, match="must have been proposed"):
            store.append([trial(2)])
        store.append([trial(1)])
        with pytest.raises(ValueError, match="ends once"):
            store.append([trial(0), trial(1)])
        with pytest.raises(ValueError, match="JSON compliant"):
            store.append([Trial(0, {}, "x", "complete", (float("nan"),))])
        assert [t.number for t in store.trials()] == [1]
    assert [t.number for t in read_study(url_of(db), "world").trials] == [1]


# ---- one half made from the other


def test_from_the_tables_alone(db, tmp_path):
    """As on another machine that was given the database."""
    before = made(db, 20)
    exported = canonical_export(read_study(url_of(db), "world"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(db, elsewhere / "tune.db")
    there = elsewhere / "tune.db"
    assert canonical_export(read_study(url_of(there), "world")) == exported
    said: list[str] = []
    with open_store(url_of(there), "world", say=said.append) as store:
        assert store.trials() == before
        assert store.notes() == {"judge": {"winner": 3}}
        fill(store, 20, 24)
    assert said == ["the journal of world was missing; rebuilt from the database, 20 trials"]
    there.unlink()
    assert read_study(url_of(there), "world").trials == [trial(n) for n in range(24)]


def broken_ways(data: bytes) -> dict[str, bytes | None]:
    middle = len(data) // 2
    return {
        "missing": None,
        "empty": b"",
        "first bytes": data[:10],
        "half": data[:middle],
        "last page": data[:-4096],
        "zeros": bytes(len(data)),
        "page of zeros": data[:8192] + bytes(4096) + data[12288:],
        "pages of noise": data[:middle] + bytes(range(256)) * 32 + data[middle + 8192 :],
        "header": b"SQLite format 4\0" + data[16:],
    }


FAST = ("missing", "half", "page of zeros", "header")


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=() if w in FAST else pytest.mark.slow) for w in broken_ways(b"x" * 50_000)]
)
def test_a_torn_database_is_rebuilt_from_the_journal(db, way):
    """Its file is kept aside; the study goes on with all its trials, and Optuna opens it."""
    before = made(db, 16)
    broken = broken_ways(db.read_bytes())[way]
    if broken is None:
        db.unlink()
    else:
        db.write_bytes(broken)
    assert read_study(url_of(db), "world").trials == before
    said: list[str] = []
    with open_store(url_of(db), "world", say=said.append) as store:
        assert store.trials() == before
        fill(store, 16, 20)
    assert [t.number for t in optuna.load_study(study_name="world", storage=url_of(db)).trials] == list(range(20))
    aside = db.with_name("tune.db.torn")
    if way == "empty":
        assert said == []  # as a file that was never written to
    elif way == "missing":
        assert said == [f"{db} is missing; rebuilt from the journal of world, 16 trials"]
    else:
        assert len(said) == 1
        assert "kept as tune.db.torn, and a new one is made from the journal of world, 16 trials" in said[0]
        assert aside.read_bytes() == broken
    assert rows(db, "PRAGMA integrity_check") == [("ok",)]


def test_a_second_torn_file_does_not_replace_the_first(db):
    made(db)
    for n in range(2):
        db.write_bytes(b"torn %d" % n)
        open_store(url_of(db), "world", say=lambda text: None).close()
    assert db.with_name("tune.db.torn").read_bytes() == b"torn 0"
    assert db.with_name("tune.db.torn2").read_bytes() == b"torn 1"


def test_a_torn_database_without_a_journal_is_left_alone(db):
    db.write_text("my thesis\n")
    for attempt in (
        lambda: open_store(url_of(db), "world", definition(), say=unexpected),
        lambda: read_study(url_of(db), "world"),
        lambda: list_studies(url_of(db)),
    ):
        with pytest.raises(BadInput, match=rf"{db}: .*is no SQLite database.*; name another file"):
            attempt()
    assert db.read_text() == "my thesis\n"


def test_a_journal_that_was_cut_off_and_tables_that_are_behind(db):
    """Each lacks what the other has."""
    made(db, 16)
    lines = journal_of(db).read_bytes().splitlines(keepends=True)
    for table in ("params", "values", "intermediate_values", "user_attributes", "system_attributes"):
        rows(db, f"DELETE FROM trial_{table} WHERE trial_id IN (2, 3, 16)")
    rows(db, "DELETE FROM trials WHERE number IN (1, 2, 15)")
    kept = [line for line in lines if b'"note"' not in line]
    journal_of(db).write_bytes(b"".join(kept[:-3]) + kept[-3][:50])
    assert "13" in kept[-3].decode()
    said: list[str] = []
    with open_store(url_of(db), "world", say=said.append) as store:
        assert [t.number for t in store.trials()] == list(range(15))
        assert store.notes() == {"judge": {"winner": 3}}
    assert said == [
        f"{journal_of(db)}: 50 bytes of an unfinished record, never acknowledged, were cut off",
        "the journal of world lacked 2 trials that the database has; they were added",
    ]
    assert sorted(r[0] for r in rows(db, "SELECT number FROM trials")) == list(range(15))
    assert [t.number for t in read_study(url_of(db), "world").trials] == list(range(15))


def test_contradictions(db, tmp_path):
    made(db)
    kept = journal_of(db).read_bytes()
    other = tmp_path / "other" / "tune.db"
    made(other, changes=1e-9)
    shutil.copy(other, db)
    with pytest.raises(BadInput, match=rf"{journal_of(db)} and {url_of(db)}: the two hold different trials number 0; "):
        open_store(url_of(db), "world", say=unexpected)
    assert journal_of(db).read_bytes() == kept
    # clocks alone make no difference: a batch that was cut off is run again
    shutil.rmtree(other.parent)
    made(other, clock_s=1.8e9)
    shutil.copy(other, db)
    open_store(url_of(db), "world", say=unexpected).close()
    shutil.rmtree(other.parent)
    with open_store(url_of(other), "world", definition("seed: 3\n"), say=unexpected) as store:
        fill(store, 0, 4)
    shutil.copy(other, db)
    with pytest.raises(BadInput, match=r"the two define study world differently \(text\); they are of two runs"):
        open_store(url_of(db), "world", say=unexpected)
    shutil.rmtree(other.parent)
    with open_store(url_of(other), "world", definition(), say=unexpected) as store:
        fill(store, 0, 9, batch=3)
    shutil.copy(other, db)
    with pytest.raises(BadInput, match="the two hold different proposals for trials from 0"):
        open_store(url_of(db), "world", say=unexpected)


def test_a_damaged_journal_is_restored_from_the_tables(db):
    """By what its message says."""
    before = made(db)
    lines = journal_of(db).read_bytes().splitlines(keepends=True)
    journal_of(db).write_bytes(b"".join([*lines[:3], lines[3][:-9] + b"damaged!\n", *lines[4:]]))
    for look in (lambda: read_study(url_of(db), "world"), lambda: open_store(url_of(db), "world")):
        with pytest.raises(BadInput, match=f"{journal_of(db)}:4: this line of the journal is damaged"):
            look()
    journal_of(db).rename(journal_of(db).with_suffix(".broken"))
    with open_store(url_of(db), "world", say=lambda text: None) as store:
        assert store.trials() == before


# ---- others


def test_one_coordinator_a_study(db):
    with open_store(url_of(db), "world", definition(), say=unexpected) as store:
        fill(store, 0, 4)
        with pytest.raises(BadInput, match=rf"the study world is being run by pid {os.getpid()} on .*; wait for it"):
            open_store(url_of(db), "world", say=unexpected)
        with open_store(url_of(db), "beside", definition(), say=unexpected) as beside:
            fill(beside, 0, 4)
            running = {line.name: line.holder for line in list_studies(url_of(db))}
            assert all(holder and holder.startswith(f"pid {os.getpid()} on ") for holder in running.values())
        fill(store, 4, 8)
    lines = list_studies(url_of(db))
    assert [(line.name, line.num_trials, line.num_wanted, line.holder) for line in lines] == [
        ("beside", 4, 40, None),
        ("world", 8, 40, None),
    ]
    assert lines[1].changed_s == trial(7).ended_s


def test_a_worker_that_outlives_the_coordinator_holds_nothing(db):
    """It was forked, so it shares the coordinator's open files; the next coordinator gets the study all the same."""
    held, release = os.pipe()

    def coordinator() -> None:
        store = open_store(url_of(db), "world", definition(), say=unexpected)
        fill(store, 0, 4)
        if os.fork() == 0:
            os.close(release)
            os.read(held, 1)  # until the test ends
            os._exit(0)
        os._exit(0)  # dies without closing anything

    in_child(coordinator)
    try:
        with open_store(url_of(db), "world", say=lambda text: None) as store:
            assert store.trials() == [trial(n) for n in range(4)]
    finally:
        os.close(release)
        os.close(held)


def test_studies_of_others(db):
    study = optuna.create_study(study_name="theirs", storage=url_of(db))
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=2)
    made(db)
    for look in (
        lambda: read_study(url_of(db), "theirs"),
        lambda: open_store(url_of(db), "theirs", definition(), say=unexpected),
    ):
        with pytest.raises(BadInput, match="study theirs: Optuna has a study of this name that `moesim tune` did not"):
            look()
    assert [line.name for line in list_studies(url_of(db))] == ["world"]
    assert len(optuna.load_study(study_name="theirs", storage=url_of(db)).trials) == 2
    optuna.load_study(study_name="world", storage=url_of(db)).ask()
    with pytest.raises(BadInput, match="something else than `moesim tune` has added trial 12; delete it, or use"):
        open_store(url_of(db), "world", say=unexpected)


def test_a_database_of_something_else(db):
    with sqlite3.connect(db) as connection:
        connection.execute("CREATE TABLE thesis (page TEXT)")
    connection.close()
    with pytest.raises(BadInput, match="this database belongs to something else; name another file"):
        open_store(url_of(db), "world", definition(), say=unexpected)
    assert rows(db, "SELECT name FROM sqlite_master") == [("thesis",)]
    assert list_studies(url_of(db)) == []


def test_the_newest_revision_is_optunas_head(db):
    """By names of files; Optuna's own way loads every migration."""
    storage = optuna.storages.RDBStorage(url_of(db))
    assert sql_module._newest_revision() == storage.get_head_version()


def test_tables_of_another_optuna(db):
    made(db)
    rows(db, "UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    with pytest.raises(BadInput, match="the tables are of another version of Optuna"):
        open_store(url_of(db), "world", say=unexpected)


def test_a_newer_format(db):
    made(db)
    journal_of(db).unlink()
    rows(db, """UPDATE study_user_attributes SET value_json = replace(value_json, '"format":1', '"format":2')""")
    for look in (lambda: read_study(url_of(db), "world"), lambda: open_store(url_of(db), "world", say=unexpected)):
        with pytest.raises(BadInput, match="is kept in format 2, by a newer moesim"):
            look()


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    cases = {
        f"sqlite:///{tmp_path}": "this is a folder; name a file in it",
        f"sqlite:///{tmp_path}/file/tune.db": "the folder cannot be made: Not a directory; use another --storage",
        "sqlite:////proc/moesim/tune.db": "the folder cannot be made: .*; use another --storage",
        "sqlite://": "a SQLite storage is a file",
        "sqlite:///:memory:": "a SQLite storage is a file",
        "sqlite:///x.db?mode=ro": "a SQLite storage is a file",
        "mysql://me:secret@host/db": r"mysql://me:\*\*\*@host/db: studies are kept in SQLite or PostgreSQL",
        "postgresql://me:secret@host": r"postgresql://me:\*\*\*@host: the URL names no database; add /NAME",
        "postgresql://me:secret@host:port/db": r"postgresql://me:\*\*\*@host:port/db: this is no URL of a database",
    }
    for url, message in cases.items():
        with pytest.raises(BadInput, match=message) as caught:
            open_store(url, "world", definition(), say=unexpected)
        assert "secret" not in str(caught.value)
    for name in ("", " x", "a\nb", "x" * 201):
        with pytest.raises(BadInput, match="a study's name is 1 to 200 printable characters"):
            open_store(f"sqlite:///{tmp_path}/tune.db", name, definition(), say=unexpected)


@pytest.mark.skipif(os.geteuid() != 0, reason="others cannot become somebody else")
def test_folders_that_may_not_be_written_to_as_root(tmp_path):
    check_read_only(tmp_path, lambda: (os.setgroups([]), os.setgid(65534), os.setuid(65534)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_that_may_not_be_written_to(tmp_path):
    check_read_only(tmp_path, lambda: None)


def check_read_only(tmp_path: Path, become: object) -> None:
    db = tmp_path / "there" / "tune.db"
    made(db)
    for folder in tmp_path.parents:
        if folder.owner() == tmp_path.owner() and folder.name.startswith(("pytest-", "popen-")):
            folder.chmod(0o755)
    for path in (tmp_path, db.parent, journal_of(db).parent):
        path.chmod(0o555)

    def child() -> None:
        become()  # type: ignore[operator]
        os.chdir("/")
        assert read_study(url_of(db), "world").trials == [trial(n) for n in range(12)]
        for place, message in ((db, "cannot be written"), (tmp_path / "new" / "tune.db", "the folder cannot be made")):
            with pytest.raises(BadInput, match=f"{message}: Permission denied; use another --storage"):
                open_store(url_of(place), "world", definition(), say=unexpected)

    try:
        in_child(child)
    finally:
        for path in (tmp_path, db.parent, journal_of(db).parent):
            path.chmod(0o755)


def test_no_such_study(db):
    with pytest.raises(BadInput, match="no study world; there is none; begin one with `moesim tune FILE`"):
        open_store(url_of(db), "world", say=unexpected)
    assert list_studies(url_of(db)) == []
    assert not db.exists()
    made(db, study="a")
    made(db, study="b")
    for look in (lambda: read_study(url_of(db), "c"), lambda: open_store(url_of(db), "c", say=unexpected)):
        with pytest.raises(BadInput, match="no study c; there are a, b"):
            look()


def test_names_that_are_no_file_names(db):
    names = ["../up", "..", "a/b", "ünï", "x" * 200, "y" * 200, "%2e", "sp ace"]
    for name in names:
        made(db, 4, study=name)
    assert [line.name for line in list_studies(url_of(db))] == sorted(names)
    assert {p.parent for p in db.parent.rglob("*.jsonl")} == {journal_of(db).parent}
    db.unlink()
    assert [line.name for line in list_studies(url_of(db))] == sorted(names)


def test_no_room_for_the_tables(db):
    """The journal goes on, the user is told once, closing says so, and whoever opens it next brings the tables up to
    date."""

    def child() -> None:
        said: list[str] = []
        store = open_store(url_of(db), "world", definition(trials=400), say=said.append)
        fill(store, 0, 4)
        os.truncate(journal_of(db), journal_of(db).stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (db.stat().st_size, resource.RLIM_INFINITY))
        fill(store, 4, 40)
        with pytest.raises((OSError, BadInput), match=r"its tables lack the last \d+ trials, its journal none: resume"):
            store.close()

    in_child(child)
    said: list[str] = []
    with open_store(url_of(db), "world", say=said.append) as store:
        assert store.trials() == [trial(n) for n in range(40)]
    assert said == []
    assert len(optuna.load_study(study_name="world", storage=url_of(db)).trials) == 40


def test_what_ends_the_block_is_not_hidden(db, monkeypatch):
    said: list[str] = []

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device", "tune.db")

    monkeypatch.setattr(mirror_module.Mirror, "_insert_trials", refuse)
    store = open_store(url_of(db), "world", definition(), say=said.append)
    fill(store, 0, 4)
    with pytest.raises(KeyboardInterrupt), store:
        raise KeyboardInterrupt
    assert said[-1] == ("study world: its tables lack the last 4 trials, its journal none: resume once that is mended")


# ---- the dashboard


def test_optuna_dashboard_opens_it(db):
    from optuna_dashboard._app import create_app
    from optuna_dashboard._storage_url import get_storage

    made(db, 20)
    app = create_app(get_storage(url_of(db)))

    def get(path: str) -> dict[str, object]:
        status: list[str] = []
        environment = {
            "REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "x", "SERVER_PORT": "80",
            "QUERY_STRING": "after=0", "wsgi.input": io.BytesIO(), "wsgi.errors": None, "wsgi.url_scheme": "http",
        }  # fmt: skip
        body = b"".join(app(environment, lambda s, h, e=None: status.append(s)))
        assert status[0].startswith("200")
        return json.loads(body)  # type: ignore[no-any-return]

    (summary,) = get("/api/studies")["study_summaries"]  # type: ignore[misc]
    assert summary["study_name"] == "world"
    detail = get(f"/api/studies/{summary['study_id']}")
    trials = detail["trials"]
    assert [t["number"] for t in trials] == list(range(20))  # type: ignore[attr-defined, index]
    states = {"complete": "Complete", "failed": "Fail"}
    assert [t["state"] for t in trials] == [states.get(trial(n).state, "Pruned") for n in range(20)]  # type: ignore[attr-defined, index]
    third = trials[3]  # type: ignore[index]
    assert third["values"] == list(trial(3).values)
    assert {a["key"]: a["value"] for a in third["user_attrs"]}["feasible"] == "True"
    assert {p["name"]: p["param_external_value"] for p in third["params"]} == {
        name: str(value) for name, value in trial(3).point.items()
    }
    assert detail["objective_names"] == ["output_tok_per_s"]


def test_the_order_of_parameters_and_choices_is_kept(db):
    """What is proposed hangs on it, so it must come back, from the journal as from the tables; and another order is
    another study."""
    space = {name: definition().to_json()["spec"]["space"][name] for name in ("routing.popularity_zipf", "layout")}
    layout = {"choices": {"z": {"parallel.tp": 2}, "a": {"parallel.tp": 1}}}
    about = definition(space={**space, "layout": layout})
    open_store(url_of(db), "world", about, say=unexpected).close()

    def order() -> list[list[str]]:
        told = read_study(url_of(db), "world").definition["spec"]["space"]
        return [list(told), list(told["layout"]["choices"])]

    expected = [["routing.popularity_zipf", "layout"], ["z", "a"]]
    assert order() == expected
    shutil.rmtree(journal_of(db).parent)
    assert order() == expected
    other = definition(space={"layout": layout, "routing.popularity_zipf": space["routing.popularity_zipf"]})
    with pytest.raises(BadInput, match=r"tune\.space differ"):
        open_store(url_of(db), "world", other, say=unexpected)
