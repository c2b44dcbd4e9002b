"""A PostgreSQL server for the session; without its programs the tests fail, and say what to install."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.tuner.postgres_server import Server, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A real server on a socket in a temporary folder."""
    with postgres_server() as server:
        yield server
