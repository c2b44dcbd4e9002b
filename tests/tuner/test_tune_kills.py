"""Ten of the kill campaign's deaths (`make campaign` has 200, of new interpreters): five on SQLite, five on PostgreSQL.

The processes are forks of this one, so that their imports are done; what they run is `moesim tune`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from benchmarks.tuner.kill_campaign import export_of, journals_of, studies, uninterrupted
from benchmarks.tuner.kill_child import Plan
from benchmarks.tuner.kill_studies import Study, unfinished

TRIALS = 16
DEATHS = {
    "sqlite": [
        Plan("start", after_s=0.05),
        Plan("write", 1, share=0.4),
        Plan("search", 2, after_s=0.02, hold=True),
        Plan("write", 3, share=1),
        Plan("tables", 1, share=0),
    ],
    "postgres": [
        Plan("write", 6, share=0.9),
        Plan("coordinator", 2, after_s=0.02, hold=True),
        Plan("tables", 1, share=0),
        Plan("tables", 1, share=1),
        Plan("search", 1, hold=True),
    ],
}


@pytest.fixture
def folder(monkeypatch):
    """Short, as a socket's path must be, and where the command keeps its results."""
    made = Path(tempfile.mkdtemp(prefix="moesim-kills-"))
    monkeypatch.chdir(made)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize(("storage", "kind"), [("sqlite", "rungs"), ("postgres", "one objective")])
def test_nothing_acknowledged_is_lost(storage, kind, folder, request):
    """Where the coordinator dies alone it has two workers, else it simulates itself: that changes nothing."""
    url = f"sqlite:///{folder}/tune.db" if storage == "sqlite" else request.getfixturevalue("postgres").create("kills")
    undisturbed, _ = uninterrupted(folder, TRIALS, [kind], warm=True)
    every = studies(folder, {storage: url}, TRIALS, [kind], warm=True)
    study: Study = every[0]
    journals = journals_of(url, folder)
    for plan in DEATHS[storage]:
        study.workers = 2 if plan.at == "coordinator" else 1
        assert study.live(plan), f"it ended before it could be killed: {plan}, {study.faults}"
        study.check(journals)
        assert unfinished(url) == 0
        assert study.faults == []
    assert sum(study.kills.values()) == 5
    while not study.ended:
        assert not study.live(Plan())
        study.check(journals)
        assert study.faults == []
    assert unfinished(url) == 0
    assert export_of(study, journals) == undisturbed[kind]
