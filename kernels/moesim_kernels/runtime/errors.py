"""What goes wrong while real bytes move, as errors with exit codes of the house."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from moesim.errors import MoesimError

__all__ = ["EXIT_RESOURCES", "LinkDied", "NoRoom", "ReadFailed", "no_room"]

EXIT_RESOURCES = 5
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(MoesimError):
    """Memory or disk is too small for what was asked."""

    exit_code = EXIT_RESOURCES


class ReadFailed(MoesimError):
    """The system could not read what the file says is there."""

    exit_code = EXIT_RESOURCES


class LinkDied(MoesimError):
    """The thread that carries transfers ended before it was told to."""


@contextmanager
def no_room(what: str) -> Iterator[None]:
    """A full disk, a quota or a limit on file sizes, as NoRoom."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoRoom(f"{what}: {error.strerror}; free some room, or write a smaller model elsewhere") from None
