"""The record of measured steps: JSON lines that are only ever appended, so that a run killed anywhere goes on.

    {"schema": 1, "seal": ..., "ranks": N, "device": ..., "machine": {...}}                          first line
    {"setting", "round", "wall_ns", "cpu_ns", "part_ns", "part_wall_ns", "psi", "reference_ns"}      one step that ran
    {"note", "about"}      {"end": {...}}                                                            for people

The seal is an opaque text: whoever asked for the measurement knows what it stands for. A last line without its newline
is torn and cut off before the next run appends; `moesim_kernels.validate.record` reads and checks all of it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, Problem
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.machine import IDENTITY
from moesim_kernels.bench.strict import canonical, parse

__all__ = ["SCHEMA", "Writer"]

SCHEMA = 1
_MAX_BYTES = 256 << 20
_SAME = ("seal", "ranks", "alone", "backend", "weights_seed")
"""what a record that is gone on with must agree in, the machine besides"""


class Writer:
    """A record being written. counts: samples of each setting that it holds; rounds: begun so far."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Begin a record, or go on with one of the same head. Raises BadInput for another's record, or one in use."""
        self.path, self.counts, self.rounds = path, dict[str, int](), 0
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise BadInput(Problem(str(path), f"cannot be written: {error.strerror}; name another --log")) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._go_on(head)
        except BlockingIOError:
            self._file.close()
            raise BadInput(Problem(str(path), "another process writes this record; wait, or name another")) from None
        except BaseException:
            self._file.close()
            raise

    def _go_on(self, head: Mapping[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read(_MAX_BYTES + 1)
        end = data.rfind(b"\n") + 1
        if len(data) > _MAX_BYTES:
            raise BadInput(Problem(str(self.path), f"a record has at most {_MAX_BYTES} bytes; name another --log"))
        if not end and data and not data.startswith(b"{"):
            raise BadInput(Problem(str(self.path), "is no record of a measurement; name another --log"))
        self._file.truncate(end)
        if not end:
            self._line({"schema": SCHEMA, **head})
            return
        lines = data[:end].split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            where = f"{self.path}:{number}"
            try:
                value = parse(line, where)
            except BadPlan as error:
                raise BadInput(Problem(error.where, f"{error.message}. Remove this line, or measure anew")) from None
            if number == 1:
                self._check(value, head, where)
            elif isinstance(value, dict) and isinstance(value.get("setting"), str):
                self.counts[value["setting"]] = self.counts.get(value["setting"], 0) + 1
                self.rounds = max(self.rounds, int(value.get("round", 0)) + 1)

    @staticmethod
    def _check(value: Any, head: Mapping[str, Any], where: str) -> None:
        if not isinstance(value, dict) or value.get("schema") != SCHEMA or not isinstance(value.get("machine"), dict):
            raise BadInput(Problem(where, "is no record of a measurement; name another --log"))
        wrong = [key for key in _SAME if value.get(key) != head.get(key)]
        wrong += [f"machine.{key}" for key in IDENTITY if value["machine"].get(key) != head["machine"].get(key)]
        if wrong:
            told = f"this record was begun under another {', '.join(wrong)}; name another --log"
            raise BadInput(Problem(where, told))

    def _line(self, value: Mapping[str, Any]) -> None:
        self._file.write(canonical(dict(value)).encode() + b"\n")
        self._file.flush()

    def sample(self, setting: str, **values: Any) -> None:
        """One step that ran."""
        self._line({"setting": setting, **values})
        self.counts[setting] = self.counts.get(setting, 0) + 1

    def note(self, about: str, note: str) -> None:
        """What a reader should know of a setting, or of all ("")."""
        self._line({"note": note, "about": about})

    def end(self, facts: Mapping[str, Any]) -> None:
        """How this run ended."""
        self._line({"end": dict(facts)})

    def sync(self) -> None:
        """Put on disk what was written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """All is on disk, and others may write."""
        try:
            self.sync()
        finally:
            self._file.close()
