"""The journal: one file a study, appended to and never changed, the first to know of anything.

A line is a record, `{"sum":"<checksum of the rest>","seq":<number of the line, from 0>,"kind":...,"data":...}`. What is
appended at once is one line, written in one call and synced: once `append` has returned it survives any death, and at
most the last line can be unfinished. So whatever follows the last whole record was never acknowledged and is cut off
when the journal is next written to; a broken line before a whole one is damage, and said to be.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moesim.errors import BadInput
from moesim.strict_json import parse_json
from moesim_tuner.store.identity import ordered
from moesim_tuner.store.kept import Kept

__all__ = ["MAX_JOURNAL_BYTES", "MAX_LINE_BYTES", "Found", "Journal", "read_journal", "sync_folder"]

MAX_LINE_BYTES = 16 << 20
MAX_JOURNAL_BYTES = 2 << 30
_HEAD = b'{"sum":"'
_SUM_BYTES = 8
_REST = len(_HEAD) + 2 * _SUM_BYTES + 2
"""where the text begins that the checksum is of"""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _sum(rest: bytes) -> bytes:
    return hashlib.blake2b(rest, digest_size=_SUM_BYTES).hexdigest().encode()


def line_of(kind: str, data: Any, seq: int) -> bytes:
    """A record as a line. Raises BadInput for one that is too long to be read again, ValueError for NaN."""
    rest = (ordered({"seq": seq, "kind": kind, "data": data})[1:] + "\n").encode()
    line = _HEAD + _sum(rest) + b'",' + rest
    if len(line) > MAX_LINE_BYTES:
        raise BadInput(f"a record of {len(line)} bytes; a line of a journal has {MAX_LINE_BYTES} at most")
    return line


def _whole(line: bytes) -> bool:
    """Is this a line as `line_of` makes them?"""
    return line.startswith(_HEAD) and line.endswith(b"\n") and line[len(_HEAD) : _REST - 2] == _sum(line[_REST:])


@dataclass(frozen=True)
class Found:
    """A journal that was read. kept: None where there is no whole record, so the study never began. num_records; whole
    and torn: bytes of whole records, and of an unfinished one after them."""

    kept: Kept | None = None
    num_records: int = 0
    whole_bytes: int = 0
    torn_bytes: int = 0


def read_journal(path: Path) -> Found:
    """Raises BadInput, with the line, where a record before the last is broken or cannot be, and for what is no regular
    file or too large; OSError where it cannot be read."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise BadInput("a journal is a regular file", str(path))
    if facts.st_size > MAX_JOURNAL_BYTES:
        raise BadInput(f"a journal of {facts.st_size} bytes; at most {MAX_JOURNAL_BYTES} are read", str(path))
    kept: Kept | None = None
    end = number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if not _whole(line):
                _refuse_if_more(file, path, number + 1)
                return Found(kept, number, end, facts.st_size - end)
            kept = _apply(kept, line, f"{path}:{number + 1}", number)
            end += len(line)
            number += 1
    return Found(kept, number, end)


def _refuse_if_more(file: BinaryIO, path: Path, broken: int) -> None:
    """Raise BadInput for line `broken` where a whole record comes after it."""
    number = broken
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if _whole(line):
            raise BadInput(
                f"this line of the journal is damaged, and line {number} after it is whole. Move the file away and "
                f"resume: the study is restored from its database. Without one, `head -n {broken - 1}` of the file is "
                "what was kept before the damage",
                f"{path}:{broken}",
            )


def _apply(kept: Kept | None, line: bytes, where: str, number: int) -> Kept:
    record = parse_json(line.decode("ascii", errors="replace"), where)
    try:
        if record["seq"] != number:
            raise ValueError(f"record {record['seq']} stands in place of {number}: a line was removed, added or moved")
        if kept is None:
            return Kept.begin(record["kind"], record["data"], where)
        kept.apply(record["kind"], record["data"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        mend = "restore the file as it was, or move it away and resume from the database"
        raise BadInput(f"{text}; {mend}", where) from None
    return kept


def sync_folder(folder: Path) -> None:
    """Make names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """A journal open for writing, by the process that holds the study's lock.

    num_trials: how many it holds, for messages; kept up to date by its owner.
    """

    def __init__(self, path: Path, found: Found) -> None:
        """Open `path`, of which `found` was read, or a new one; what is unfinished is cut off. Raises OSError."""
        new = not path.exists()
        self.path = path
        self.num_trials = 0 if found.kept is None else len(found.kept.by_number)
        self._end, self._seq = found.whole_bytes, found.num_records
        self._broken = ""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            if found.torn_bytes:
                os.ftruncate(self._file, self._end)
            if new or found.torn_bytes:
                os.fsync(self._file)
                sync_folder(path.parent)
        except OSError:
            os.close(self._file)
            raise

    def append(self, kind: str, data: Any) -> None:
        """Add a record and sync it. Raises OSError, naming the file, where that cannot be; nothing of it stays then."""
        if self._broken:
            raise OSError(errno.EIO, self._broken, str(self.path))
        line = line_of(kind, data, self._seq)
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._file, left) :]
            os.fdatasync(self._file)
        except BaseException as error:
            self._cut_back()
            if isinstance(error, OSError):
                raise OSError(error.errno, self._message(error), str(self.path)) from None
            raise
        self._end += len(line)
        self._seq += 1

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        except OSError as error:
            self._broken = f"a half written record could not be cut off ({error.strerror}); resume once it can"

    def _message(self, error: OSError) -> str:
        kept = self.num_trials
        if error.errno in _FULL:
            return f"no room is left ({error.strerror}); the {kept} trials kept so far are safe: make room and resume"
        return f"{error.strerror}; the {kept} trials kept so far are safe: resume when the disk is well"

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
