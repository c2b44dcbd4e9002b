"""Where a study is kept: SQLAlchemy URLs, of SQLite files and PostgreSQL servers, and the journals beside them."""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import BadInput

__all__ = ["Place", "checked_name", "journal_name", "place_of"]

_FORMS = "sqlite:///results/tune.db or postgresql://user@host/database"


@dataclass(frozen=True)
class Place:
    """A storage. shown: the URL without its password. file: of SQLite; None for PostgreSQL. journals: the folder."""

    url: str
    shown: str
    file: Path | None
    journals: Path

    def journal(self, study: str) -> Path:
        """The study's journal."""
        return self.journals / f"{journal_name(study)}.jsonl"

    def lock(self, study: str) -> Path:
        """The file whose lock the coordinator holds."""
        return self.journals / f"{journal_name(study)}.lock"


def checked_name(study: str) -> str:
    """A study's name as it is. Raises BadInput for one that no file and no table would hold."""
    if not study or len(study) > 200 or not study.isprintable() or study != study.strip():
        raise BadInput("a study's name is 1 to 200 printable characters, none of them a blank at an end", repr(study))
    return study


def journal_name(study: str) -> str:
    """The name as part of a file's: what is no letter, digit, `-`, `_` or `.` is escaped, a long one cut short."""
    name = urllib.parse.quote(study, safe="")
    if len(name) <= 120:
        return name
    return f"{name[:100]}-{hashlib.blake2b(study.encode(), digest_size=8).hexdigest()}"


def place_of(url: str, journals: Path | None = None) -> Place:
    """What a URL names; a path alone is a SQLite file. journals: where they are, if not beside the file, or under
    results/tune-journals for a server. Raises BadInput for what is neither SQLite nor PostgreSQL."""
    if "\0" in url:
        raise BadInput("a storage's URL has no null byte", repr(url))
    if "://" not in url:
        url = f"sqlite:///{url}"
    scheme = url.partition("://")[0].lower()
    if scheme in ("sqlite", "sqlite+pysqlite"):
        return _sqlite(url, journals)
    if scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        return _postgres(url, journals)
    raise BadInput(f"studies are kept in SQLite or PostgreSQL: {_FORMS}", f"--storage {_shown(url)}")


def _sqlite(url: str, journals: Path | None) -> Place:
    rest = url.partition("://")[2]
    path = rest[1:].partition("?")[0]
    if not rest.startswith("/") or path in ("", ":memory:") or "?" in rest:
        raise BadInput("a SQLite storage is a file, without options: sqlite:///results/tune.db", f"--storage {url}")
    file = Path(urllib.parse.unquote(path) if "%" in path else path)
    if file.is_dir():
        raise BadInput("this is a folder; name a file in it", f"--storage {url}")
    beside = file.with_name(f"{file.name}.studies")
    return Place(f"sqlite:///{file}", f"sqlite:///{file}", file, beside if journals is None else journals)


def _postgres(url: str, journals: Path | None) -> Place:
    made: Any
    try:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            made = make_url(url)
        except (ArgumentError, ValueError):
            raise BadInput(f"this is no URL of a database; write {_FORMS}", f"--storage {_shown(url)}") from None
    except ImportError:
        raise BadInput("the tuner needs Optuna and SQLAlchemy: pip install 'moesim[tuner]'") from None
    if not made.database:
        raise BadInput("the URL names no database; add /NAME", f"--storage {_shown(url)}")
    made = made.set(drivername="postgresql+psycopg")
    key = f"{made.host or made.query.get('host', '')}:{made.port or made.query.get('port', '')}/{made.database}"
    folder = (
        f"{re.sub(r'[^A-Za-z0-9_.-]', '_', made.database)}-{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}"
    )
    where = Path("results/tune-journals") / folder if journals is None else journals
    return Place(made.render_as_string(hide_password=False), made.render_as_string(hide_password=True), None, where)


def _shown(url: str) -> str:
    """A URL that may not be one, without what may be a password."""
    return re.sub(r"(://[^/@:]*):[^@]*@", r"\1:***@", re.sub(r"(?i)(password=)[^&\s]*", r"\1***", url))
