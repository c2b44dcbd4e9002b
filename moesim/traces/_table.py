"""CSV with a header -> one array a column. A fast path by columns; where it fails, cells one by one for the
messages.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.errors import BadInput
from moesim.traces._files import Findings, checked_text, read_file, text_lines
from moesim.workload.generators import MAX_REQUESTS, MAX_TOKENS

__all__ = ["MAX_SECONDS", "NUMBER", "Cells", "Column", "Table", "labels", "read_table", "seconds", "tokens"]

MAX_SECONDS = 1e11
"""Largest time stamp in seconds; the Unix clock is at 1.8e9."""
_MAX_LINE = 2**20
_MAX_CELLS = 1000
_CHUNK = 65_536
_DIGITS = re.compile(r"[0-9]{1,18}")
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")


@dataclass(frozen=True, slots=True)
class Cells:
    """How the cells of a column are read: `one(text)` raises ValueError with a message that a user can mend
    by; `many(texts)` gives the same values as an array, or raises ValueError without one.
    """

    one: Callable[[str], Any]
    many: Callable[[Sequence[str]], AnyArray]
    dtype: Any


@dataclass(frozen=True, slots=True)
class Column:
    """A column a format knows, under its `name` or one of `also`."""

    name: str
    cells: Cells
    also: tuple[str, ...] = ()
    required: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """`values[name]` [R] for each column present, and the file's line of each row (from 1) int64[R]."""

    values: dict[str, AnyArray]
    line: IntArray
    ends_in_newline: bool

    def cut_warning(self, path: Path) -> tuple[str, ...]:
        """A warning when the file ends without a newline: a number cut in the middle still is a number."""
        if self.ends_in_newline:
            return ()
        return (f"{path.name}: the file does not end in a newline; its last row may be cut off",)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def tokens(least: int) -> Cells:
    """A whole number of tokens in `least`..2**31."""

    def one(text: str) -> int:
        text = text.strip()
        if not _DIGITS.fullmatch(text):
            if not text:
                raise ValueError("a number of tokens is missing")
            if NUMBER.fullmatch(text):
                if text.lstrip("+-").isdigit() and not text.startswith("-"):
                    raise ValueError(f"at most {MAX_TOKENS:,} tokens, got {_shown(text)}")
                why = "must not be negative" if text.startswith("-") else "must be written as a whole number"
                raise ValueError(f"tokens {why}, got {_shown(text)}")
            raise ValueError(f"a whole number of tokens is needed, got {_shown(text)}")
        value = int(text)
        if not least <= value <= MAX_TOKENS:
            raise ValueError(f"from {least} to {MAX_TOKENS:,} tokens, got {value:,}")
        return value

    def many(texts: Sequence[str]) -> AnyArray:
        if not all(map(_DIGITS.fullmatch, texts)):
            raise ValueError
        values = np.array(list(map(int, texts)), dtype=np.int64)
        if int(values.min()) < least or int(values.max()) > MAX_TOKENS:
            raise ValueError
        return values

    return Cells(one, many, np.int64)


def _one_second(text: str) -> float:
    text = text.strip()
    if not text:
        raise ValueError("a time in seconds is missing")
    if not NUMBER.fullmatch(text):
        raise ValueError(f"a time in seconds is needed, got {_shown(text)}")
    value = float(text)
    if not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"a time is from 0 to {MAX_SECONDS:g} seconds, got {_shown(text)}")
    return value


def _many_seconds(texts: Sequence[str]) -> AnyArray:
    if not all(map(NUMBER.fullmatch, texts)):
        raise ValueError
    values = np.array(list(map(float, texts)), dtype=np.float64)
    if not (float(values.min()) >= 0 and float(values.max()) <= MAX_SECONDS):
        raise ValueError
    return values


seconds = Cells(_one_second, _many_seconds, np.float64)
"""Seconds, 0 to 1e11, as float64."""
labels = Cells(str.strip, lambda texts: np.array([t.strip() for t in texts], dtype=object), object)
"""Any text."""


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", "_", name.strip().lower())


def _find_columns(header: list[str], columns: Sequence[Column], findings: Findings, line: int) -> dict[str, int]:
    """Where each column stands. Missing, doubled and misspelt ones become findings."""
    plain = [_plain(name) for name in header]
    place: dict[str, int] = {}
    missing: list[Column] = []
    for column in columns:
        names = [_plain(name) for name in (column.name, *column.also)]
        hits = [i for i, name in enumerate(plain) if name in names]
        if len(hits) > 1:
            given = ", ".join(header[i].strip() for i in hits)
            findings.add(line, f"column '{column.name}' must stand once in the header, it stands as: {given}")
        elif hits:
            place[column.name] = hits[0]
        elif column.required:
            missing.append(column)
    if not missing:
        return place
    if all(NUMBER.fullmatch(cell.strip()) or not cell.strip() or cell.strip()[0].isdigit() for cell in header):
        wanted = ",".join(column.name for column in columns if column.required)
        findings.add(
            line,
            f"the first line must be the header ({wanted}), but it holds values: {_shown(','.join(header))}",
        )
        return place
    free = [name for i, name in enumerate(header) if i not in place.values()]
    for column in missing:
        spellings = {_plain(name): name for name in free}
        near = [
            spellings[match]
            for name in (column.name, *column.also)
            for match in get_close_matches(_plain(name), list(spellings), n=1, cutoff=0.6)
        ]
        also = f" (or {', '.join(column.also)})" if column.also else ""
        mend = f"rename {near[0].strip()!r}?" if near else f"the header has: {_shown(', '.join(header))}"
        findings.add(line, f"column '{column.name}'{also} is missing; {mend}")
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            findings.add(line, f"cells must be parted by commas, but the header has {name}")
    return place


def _records(data: bytes, findings: Findings) -> Iterator[tuple[list[str], int]]:
    """(cells, line) of every row that is not blank; a CSV error becomes a finding and ends the file."""
    reader = csv.reader(text_lines(data, findings.path, _MAX_LINE), strict=True)
    try:
        for row in reader:
            if len(row) > _MAX_CELLS:
                message = f"a line may have at most {_MAX_CELLS:,} cells, this one has {len(row):,}"
                raise BadInput(message, f"{findings.path}:{reader.line_num}")
            if len(row) > 1 or (row and row[0].strip()):
                yield row, reader.line_num
    except csv.Error as error:
        findings.add(reader.line_num, f"the line is not CSV: {error}")


def _chunk(
    rows: list[list[str]],
    lines: list[int],
    width: int,
    columns: dict[str, tuple[int, Cells]],
    findings: Findings,
    last_line: int,
) -> dict[str, AnyArray]:
    """Arrays of one chunk of rows; cells that cannot be read become findings."""
    if set(map(len, rows)) == {width}:
        by_column = list(zip(*rows, strict=True))
        try:
            return {name: cells.many(by_column[i]) for name, (i, cells) in columns.items()}
        except ValueError:
            pass
    out: dict[str, list[Any]] = {name: [] for name in columns}
    for row, line in zip(rows, lines, strict=True):
        if len(row) != width:
            what = "the last line is cut off" if line == last_line and len(row) < width else "the line does not fit"
            findings.add(line, f"{what}: {len(row)} cells, but the header has {width}")
            continue
        for name, (i, cells) in columns.items():
            try:
                out[name].append(cells.one(row[i]))
            except ValueError as error:
                findings.add(line, f"column '{name}': {error}")
    return {name: np.array(out[name], dtype=cells.dtype) for name, (_, cells) in columns.items() if not findings.count}


def read_table(path: Path, columns: Sequence[Column]) -> Table:
    """Read the known `columns` of a CSV file (gzip too); others are left alone. Raises BadInput with all
    problems.
    """
    data = checked_text(read_file(path), str(path))
    num_lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if num_lines > MAX_REQUESTS + 1:
        raise BadInput(f"a trace may have at most {MAX_REQUESTS:,} rows, this one has {num_lines:,} lines", str(path))
    last_line = data.rstrip().count(b"\n") + 1
    findings = Findings(path)
    records = _records(data, findings)
    header, header_line = next(records, ([], 1))
    place = _find_columns(header, columns, findings, header_line)
    findings.raise_if_any()
    wanted = {column.name: (place[column.name], column.cells) for column in columns if column.name in place}
    chunks: list[dict[str, AnyArray]] = []
    lines: list[IntArray] = []
    while part := list(islice(records, _CHUNK)):
        rows, numbers = [row for row, _ in part], [line for _, line in part]
        chunks.append(_chunk(rows, numbers, len(header), wanted, findings, last_line))
        lines.append(np.array(numbers, dtype=np.int64))
    if not lines and not findings.count:
        findings.add(header_line, "there is a header but not one request below it")
    findings.raise_if_any()
    values = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in wanted}
    return Table(values, np.concatenate(lines), data.endswith(b"\n"))
