"""Write what a run found: `results/<name>-<hash>/`, whole or not at all.

Everything is written into a hidden folder beside the target and then renamed; whatever stops the run before
that (an error, Ctrl-C, a signal) leaves nothing behind. A folder of the same name is exchanged in one system
call.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moesim.errors import BadInput, Problem

if TYPE_CHECKING:
    from moesim.arrays import AnyArray
    from moesim.scenario.load import Scenario

__all__ = ["Result", "json_text", "rebased", "replacing_file", "results_folder", "write_results", "write_texts"]

SCHEMA_VERSION = 1
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Result(Protocol):
    """What `moesim.simulate.simulate` returns, as far as writing it down goes."""

    def to_json(self) -> dict[str, Any]: ...

    def tables(self) -> Mapping[str, Mapping[str, AnyArray]]: ...


def json_text(data: Any) -> str:
    """JSON with an indent of one and a newline at the end. NaN and infinity are errors, not text."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def results_folder(scenario: Scenario, out: Path) -> Path:
    """Where a run of `scenario` goes: `<out>/<name>-<hash>`."""
    return out / f"{scenario.name}-{scenario.hash}"


def write_results(result: Result, scenario: Scenario, out: Path, command: list[str] | None = None) -> Path:
    """Write scenario.yaml, result.json, the tables and provenance.json; returns the folder.

    An earlier result of the same name is replaced at once. Raises BadInput when the folder cannot be written
    or something that is no result lies in its place.
    """
    from moesim.scenario.yamlio import dump_yaml

    target = results_folder(scenario, out)
    report = result.to_json()

    def fill(folder: Path) -> None:
        (folder / "scenario.yaml").write_text(dump_yaml(rebased(scenario, target)), encoding="utf-8")
        (folder / "result.json").write_text(json_text(report), encoding="utf-8")
        for name, table in result.tables().items():
            _write_parquet(folder / f"{name}.parquet", table)
        (folder / "provenance.json").write_text(json_text(_provenance(report, scenario, command)), encoding="utf-8")

    with _write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() or (target.exists() and not (target / "result.json").is_file()):
            raise BadInput(Problem(str(target), "is there already and is no result; move it away or use --out"))
        _replace_folder(target, fill)
    return target


def write_texts(target: Path, files: Mapping[str, str], marker: str) -> None:
    """Write a folder of text files, whole or not at all; an earlier one, known by its file `marker`, is replaced.

    Raises BadInput where the folder cannot be written, or something else lies in its place.
    """

    def fill(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

    with _write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        known = not target.exists() or (target / marker).is_file() or (target.is_dir() and not any(target.iterdir()))
        if target.is_symlink() or not known:
            raise BadInput(Problem(str(target), f"is there already and holds no {marker}; name another folder"))
        _replace_folder(target, fill)


def _replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        made.chmod(0o777 & ~_umask())
        fill(made)
        if not target.exists():
            with contextlib.suppress(FileExistsError):
                made.rename(target)
                return
        _exchange(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: at once where the system can, else by two renames that are undone on failure."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
    except (AttributeError, OSError):
        pass  # not Linux, or a C library without renameat2
    aside = new.with_name(new.name + ".old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to; renamed to `path` at the end, removed on any failure."""
    if path.is_dir():
        raise BadInput(Problem(str(path), "is a folder; name a file"))
    hidden = path.with_name(f".{os.getpid()}.{path.name}")
    with _write_errors(path):
        try:
            yield hidden
            hidden.replace(path)
        finally:
            hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """A folder that cannot be written is bad input; a full disk stays an OSError (exit code 5)."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise
        reason = error.strerror or str(error)
        raise BadInput(Problem(str(path), f"cannot be written: {reason}")) from None


def _write_parquet(path: Path, table: Mapping[str, AnyArray]) -> None:
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    schema_version = {"moesim.schema_version": str(SCHEMA_VERSION)}
    # from buffers: `pa.array` of NumPy columns imports pandas, where it is installed, to ask whether they are its own
    columns = {name: np.ascontiguousarray(column) for name, column in table.items()}
    assert all(column.dtype.kind in "iuf" for column in columns.values())  # Arrow packs truth values into bits
    arrow = pa.Table.from_arrays(
        [
            pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [None, pa.py_buffer(column)])
            for column in columns.values()
        ],
        names=list(columns),
    )
    parquet.write_table(arrow.replace_schema_metadata(schema_version), path, compression="zstd")


def rebased(scenario: Scenario, target: Path) -> dict[str, Any]:
    """The scenario as written, with the files it names as seen from `target`, so that it runs there too."""
    raw: dict[str, Any] = json.loads(json.dumps(scenario.raw))
    places = [("requests", "path"), ("routing", "path"), ("placement_from.routing", "path"), ("cluster", "device")]
    places += [("model", "name"), ("tiers.cpu", "profile")]
    if isinstance(raw.get("model"), str):
        raw["model"] = _seen_from(raw["model"], scenario.base, target)
    for part, key in places:
        holder: Any = raw
        for name in part.split("."):
            holder = holder.get(name) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = _seen_from(holder[key], scenario.base, target)
    return raw


def _seen_from(name: str, base: Path, target: Path) -> str:
    path = base / name
    if Path(name).is_absolute() or not path.exists():
        return name
    return os.path.relpath(path.resolve(), target.resolve())


def _provenance(report: dict[str, Any], scenario: Scenario, command: list[str] | None) -> dict[str, Any]:
    """What the result rests on, and when, where and how it was made: the one file that differs by run."""
    return {
        "schema_version": SCHEMA_VERSION,
        "made": {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command or [],
            "host": platform.node(),
            "machine": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "python": sys.version.split()[0],
        },
        "provenance": report.get("provenance"),
        "scenario": scenario.resolved,
    }
