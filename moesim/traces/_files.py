"""Reading files that strangers wrote: bounded sizes, strict text, all problems in one error."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, Problem

__all__ = ["MAX_FILE_BYTES", "Findings", "checked_text", "gunzip", "read_file", "strict_json", "text_lines"]

MAX_FILE_BYTES = 512 * 2**20
_SHOWN = 20
_MAX_BRACKETS = 5_000_000  # an empty list takes 3 bytes of a file and 64 of memory
_BINARY = {
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
    b"\x93NUMPY": "a NumPy file",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"(\xb5/\xfd": "zstd data",
    b"SQLite format 3": "an SQLite file",
}


class Findings:
    """The problems of one file: the first 20 are kept, the rest are counted."""

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self.count = 0
        self._kept: list[Problem] = []

    def add(self, place: int | str | None, message: str) -> None:
        """`place` is a line number (from 1), a name inside the file, or None for the file as a whole."""
        self.count += 1
        if len(self._kept) < _SHOWN:
            self._kept.append(Problem(self.path if place is None else f"{self.path}:{place}", message))

    def raise_if_any(self) -> None:
        if not self.count:
            return
        rest = self.count - len(self._kept)
        more = [Problem(self.path, f"and {rest:,} more problems of this file")] if rest else []
        raise BadInput(self._kept + more)


def read_file(path: Path, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file, unpacked if it is gzip. Raises BadInput: missing, a folder, too large,
    broken gzip.
    """
    try:
        if path.is_dir():
            raise BadInput("a file is needed, but this is a folder; name the file in it", str(path))
        if not path.exists():
            raise BadInput(_missing(path), str(path))
        if not path.is_file():
            raise BadInput("a regular file is needed, but this is a device, pipe or socket", str(path))
        size = path.stat().st_size
        if size > most_bytes:
            raise BadInput(f"a file may have at most {most_bytes:,} bytes, this one has {size:,}; cut it", str(path))
        with path.open("rb") as handle:
            data = handle.read(most_bytes + 1)
    except (OSError, ValueError) as error:
        raise BadInput(f"the file cannot be read: {error}", str(path)) from None
    if data.startswith(b"\x1f\x8b"):
        return gunzip(data, most_bytes, str(path))
    return data


def _missing(path: Path) -> str:
    from difflib import get_close_matches

    folder = path.parent
    if not folder.is_dir():
        return "no such file: its folder does not exist either"
    names = sorted(entry.name for entry in folder.iterdir())
    near = get_close_matches(path.name, names, n=1, cutoff=0.5)
    return "no such file" + (f"; did you mean {near[0]!r}?" if near else "; nothing in its folder has a similar name")


def gunzip(data: bytes, most_bytes: int, where: str) -> bytes:
    """Unpack gzip, stopping at `most_bytes` or at 200 times the packed size (at least 16 MiB): a bomb costs
    little.
    """
    bound = min(most_bytes, max(16 * 2**20, 200 * len(data)))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            out = packed.read(bound + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"the gzip data is broken or cut off: {error}", where) from None
    if len(out) > bound:
        raise BadInput(
            f"{len(data):,} bytes of gzip unpack to more than {bound:,} bytes; unpack the file yourself",
            where,
        )
    return out


def checked_text(data: bytes, where: str) -> bytes:
    """`data` without a byte-order mark, known to be UTF-8 text that is not empty. Raises BadInput with the
    line.
    """
    if data.startswith(b"version https://git-lfs"):
        raise BadInput("this is a Git LFS pointer, not the data; fetch it with `git lfs pull`", where)
    for magic, what in _BINARY.items():
        if data.startswith(magic):
            raise BadInput(f"a text file is needed, but this is {what}", where)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadInput("the text is UTF-16; save it as UTF-8", f"{where}:1")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise BadInput("the file is empty", where)
    nul = data.find(b"\0")
    if nul >= 0:
        raise BadInput("a text file is needed, but there is a NUL byte", f"{where}:{data[:nul].count(10) + 1}")
    if not data.isascii():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
            message = f"the text is not UTF-8: byte 0x{data[error.start]:02X}; save it as UTF-8"
            raise BadInput(message, f"{where}:{line}:{column}") from None
    return data


def text_lines(data: bytes, where: str, most_chars: int) -> Iterator[str]:
    """Lines (with their ends) of checked text. Raises BadInput for one beyond `most_chars`."""
    for number, line in enumerate(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline=""), 1):
        if len(line) > most_chars:
            raise BadInput(
                f"a line may have at most {most_chars:,} characters, this one has {len(line):,}",
                f"{where}:{number}",
            )
        yield line


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def strict_json(text: str) -> Any:
    """JSON without duplicate keys, NaN or infinity. Raises ValueError (JSONDecodeError knows the line)."""
    if text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise ValueError(f"more than {_MAX_BRACKETS:,} lists and objects")
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
