"""A PostgreSQL server for the session (without its programs the tests fail, and say what to install); plug-ins that a
test loads are forgotten after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import moesim.policy
from benchmarks.tuner.postgres_server import Server, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A real server on a socket in a temporary folder."""
    with postgres_server() as server:
        yield server


@pytest.fixture(autouse=True)
def own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds that a test's tasks bring along are not there for the next one."""
    monkeypatch.setattr(moesim.policy, "_plugins", dict(moesim.policy._plugins))
