"""One coordinator a study: a lock on a file beside its journal, gone with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import weakref
from pathlib import Path

from moesim.errors import BadInput

__all__ = ["FileLock", "holder_of", "whoami"]

_TRIES = 10
_PAUSE_S = 0.03
_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def whoami() -> str:
    """`pid 123 on host`."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _forked() -> None:
    """A child of fork shares the lock and would keep it after the parent's death: let go of the child's handle."""
    for lock in list(_held):
        lock.drop()


os.register_at_fork(after_in_child=_forked)


class FileLock:
    """Held from construction to `close` or the end of the process. The file says who holds it and is never removed,
    because two processes could otherwise hold locks on two files of one name."""

    def __init__(self, path: Path, study: str) -> None:
        """Raises BadInput where another process holds it, OSError where there can be no such file."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take()
        except BlockingIOError:
            who = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._file)
            raise BadInput(
                f"the study {study} is being run by {who}; wait for it, end it, or use another --study", str(path)
            ) from None
        except OSError:
            os.close(self._file)
            raise
        _held.add(self)
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{whoami()}\n".encode(), 0)
        except OSError:  # a full disk: the lock holds all the same, only nobody can read by whom
            pass

    def _take(self) -> None:
        """Whoever only looks (`holder_of`) holds it for an instant, and a dead holder's for about as long."""
        for _ in range(_TRIES):
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_PAUSE_S)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None

    def drop(self) -> None:
        """Close this process's handle; the lock stays with whoever else has one."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        """Let go of the lock."""
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self.drop()


def holder_of(path: Path) -> str | None:
    """Who holds the lock now; None where nobody does."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
    finally:
        os.close(file)
    return None
