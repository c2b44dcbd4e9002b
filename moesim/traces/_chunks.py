"""The files of a ServeGen data set, from a folder or a tar archive, held in memory: nothing is ever written
to disk.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import BadInput
from moesim.traces._files import Findings, read_file

__all__ = ["Client", "read_clients"]

_NAME = re.compile(r"chunk-([0-9]{1,9})-(trace\.csv|dataset\.json)")
_MAX_MEMBER_BYTES = 64 * 2**20
_MAX_TOTAL_BYTES = 128 * 2**20
_MAX_MEMBERS = 20_000


@dataclass(frozen=True, slots=True)
class Client:
    """The two files of one client as bytes; None where a file is absent."""

    number: int
    trace: bytes | None
    dataset: bytes | None

    def name(self, kind: str) -> str:
        return f"chunk-{self.number}-{kind}"


def read_clients(path: Path) -> list[Client]:
    """Clients in the order of their numbers. Raises BadInput: no chunk files, broken archive, sizes beyond
    the bounds.
    """
    files = _from_folder(path) if path.is_dir() else _from_archive(path)
    if not files:
        raise BadInput("no chunk-N-trace.csv with its chunk-N-dataset.json was found in it", str(path))
    numbers = sorted({number for number, _ in files})
    return [Client(n, files.get((n, "trace.csv")), files.get((n, "dataset.json"))) for n in numbers]


def _from_folder(path: Path) -> dict[tuple[int, str], bytes]:
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise BadInput(f"the folder cannot be read: {error}", str(path)) from None
    files: dict[tuple[int, str], bytes] = {}
    findings = Findings(path)
    total = 0
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match is None:
            continue
        key = (int(match[1]), match[2])
        if key in files:
            findings.add(entry.name, f"client {key[0]} has two files of this kind; keep one")
        files[key] = read_file(entry, _MAX_MEMBER_BYTES)
        total += len(files[key])
        if total > _MAX_TOTAL_BYTES:
            raise BadInput(f"the chunk files may have at most {_MAX_TOTAL_BYTES:,} bytes together", str(path))
    findings.raise_if_any()
    return files


def _from_archive(path: Path) -> dict[tuple[int, str], bytes]:
    data = read_file(path, _MAX_TOTAL_BYTES)  # unpacks gzip within the bound
    if not data:
        raise BadInput("the file is empty", str(path))
    files: dict[tuple[int, str], bytes] = {}
    findings = Findings(path)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for count, member in enumerate(archive, 1):
                if count > _MAX_MEMBERS:
                    raise BadInput(f"an archive may have at most {_MAX_MEMBERS:,} members", str(path))
                match = _NAME.fullmatch(member.name.rsplit("/", 1)[-1])
                if match is None:
                    continue
                if not member.isreg() or member.issparse():
                    findings.add(member.name, "a regular file is needed, but the archive has a link or a special file")
                elif member.size > _MAX_MEMBER_BYTES or member.offset_data + member.size > len(data):
                    findings.add(
                        member.name,
                        f"the archive is cut off, or the file is beyond {_MAX_MEMBER_BYTES:,} bytes",
                    )
                elif (int(match[1]), match[2]) in files:
                    findings.add(member.name, f"client {int(match[1])} has two files of this kind; keep one")
                else:
                    end = member.offset_data + member.size
                    files[int(match[1]), match[2]] = data[member.offset_data : end]
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        message = f"a tar archive (or .tar.gz) or a folder of chunk files is needed: {error}"
        raise BadInput(message, str(path)) from None
    findings.raise_if_any()
    return files
