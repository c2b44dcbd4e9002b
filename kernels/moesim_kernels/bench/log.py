"""The log of a run: JSON lines that are only ever appended, so that a run killed anywhere goes on where it was.

    {"schema": 1, "plan": ID, "machine": {...}}                              first line
    {"id", "round", "ns": [...], "wall_ns": [...], "psi", "reference_ns"}    samples of one case
    {"id", "remark"}      {"id", "refused"}      {"end": {...}}              what else a reader should know

Each line is handed to the system at once (a killed process loses none) and put on disk about once a second. A last
line without its newline is torn: it is ignored, and cut off before the next run appends. Any other line that is not as
above is an error with its number. Reading needs numpy alone.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim_kernels.bench.drift import LEAST_CASES, SAME_SPEED, drift_factors, usual_reference_ns
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.machine import IDENTITY
from moesim_kernels.bench.plan import Case, Plan
from moesim_kernels.bench.strict import canonical, parse, read_bytes

__all__ = ["LogWriter", "Point", "Record", "Samples", "begun_for", "forget", "read_log", "read_points", "speed_error"]

SCHEMA = 1
MAX_LOG_BYTES = 256 << 20
MAX_LINE_BYTES = 1 << 20
MAX_NS = 1e14  # a day and a bit: no call of a benchmark takes that long
_SYNC_S = 1.0
_QUARTERS = 4
_LEAST_USUAL = 4  # samples at the machine's usual speed, below which all of a case's samples count
_COUNTS = ("cpus", "gpus", "sms", "threads", "cache_bytes", "host_memory_bytes", "memory_bytes")
Normalise = Literal["level", "reference", "none"]
_LINKS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "token_exchange")
_OWN_DRIFT = ("copy", "storage", *_LINKS, "launch")


@dataclass(frozen=True)
class Samples:
    """One line of samples: ns a call by the case's clock and by the wall, PSI in percent, the last reference time."""

    id: str
    round: int
    ns: tuple[float, ...]
    wall_ns: tuple[float, ...]
    psi: float | None
    reference_ns: float | None


@dataclass
class Record:
    """All of a log. `refused` and `remarks` by case id; `ends` how each run that ended by itself left it."""

    plan_id: str
    machine: dict[str, Any]
    lines: list[Samples] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    ends: list[dict[str, Any]] = field(default_factory=list)
    whole_bytes: int = 0

    def counts(self) -> dict[str, int]:
        """Samples a case id."""
        out: dict[str, int] = {}
        for line in self.lines:
            out[line.id] = out.get(line.id, 0) + len(line.ns)
        return out


@dataclass(frozen=True)
class Point:
    """A measured case: quartiles over its samples, in ns a call; the wall's median beside it.

    Quartiles are of times without the machine's drift where `read_points` takes it out; the wall's median is as it was.
    drift: 90th over 10th percentile of the reference times of its samples (1 where there are none); psi: the median
    pressure in percent, or None; machine facts stand in the log's first line.
    """

    case: Case
    ns_median: float
    ns_p25: float
    ns_p75: float
    samples: int
    wall_ns_median: float
    drift: float
    psi: float | None = None


def _object(value: Any, keys: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        got = ", ".join(map(repr, value))[:200] if isinstance(value, dict) else f"{value!r:.80}"
        raise BadPlan(f"a line with the keys {', '.join(sorted(keys))} is needed; got {got}. {_MEND}", where)
    return value


_MEND = "Remove this line, or begin a new log"


def _times(name: str, value: Any, where: str) -> tuple[float, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(type(x) in (int, float) and 0 < x <= MAX_NS and math.isfinite(x) for x in value)
    ):
        raise BadPlan(f"{name} must be a list of times in ns above 0; got {value!r:.80}. {_MEND}", where)
    return tuple(map(float, value))


def _number(name: str, value: Any, high: float, where: str) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= high:
        raise BadPlan(f"{name} must be null or a number from 0 to {high:g}; got {value!r:.80}. {_MEND}", where)
    return float(value)


def _text(name: str, value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadPlan(f"{name} must be a text; got {value!r:.80}. {_MEND}", where)
    return value


def _header(value: Any, where: str) -> Record:
    head = _object(value, {"schema", "plan", "machine"}, where)
    if type(head["schema"]) is not int or head["schema"] != SCHEMA:
        raise BadPlan(f"schema must be {SCHEMA}; got {head['schema']!r:.80}. Begin a new log", where)
    if not isinstance(head["machine"], dict):
        raise BadPlan("machine must be an object. Begin a new log", where)
    for key in _COUNTS:
        _number(f"machine.{key}", head["machine"].get(key), 2.0**62, where)
    for key in ("device", "cpu"):
        _text(f"machine.{key}", head["machine"].get(key) or "", where)
    return Record(_text("plan", head["plan"], where), head["machine"])


def _add_line(record: Record, value: Any, known: Mapping[str, Any] | None, where: str) -> None:
    """Check one line after the first and put it into the record. Raises BadPlan."""
    if isinstance(value, dict) and "end" in value:
        end = _object(value, {"end"}, where)["end"]
        if not isinstance(end, dict):
            raise BadPlan(f"end must be an object. {_MEND}", where)
        _number("end.seconds", end.get("seconds"), MAX_NS, where)
        record.ends.append(end)
        return
    kind = next((k for k in ("remark", "refused") if isinstance(value, dict) and k in value), None)
    keys = {"id", kind} if kind else {"id", "round", "ns", "wall_ns", "psi", "reference_ns"}
    line = _object(value, keys, where)
    key = _text("id", line["id"], where)
    if known is not None and key not in known:
        raise BadPlan(f"no case of the plan has the id {key!r:.40}. {_MEND}", where)
    if kind:
        texts = record.remarks if kind == "remark" else record.refused
        texts[key] = _text(kind, line[kind], where)
        return
    if type(line["round"]) is not int or not 0 <= line["round"] < 1 << 40:
        raise BadPlan(f"round must be a whole number from 0; got {line['round']!r:.80}. {_MEND}", where)
    ns, wall = _times("ns", line["ns"], where), _times("wall_ns", line["wall_ns"], where)
    if len(ns) != len(wall):
        raise BadPlan(f"ns and wall_ns must be equally long; got {len(ns)} and {len(wall)}. {_MEND}", where)
    psi = _number("psi", line["psi"], 100.0, where)
    reference = _number("reference_ns", line["reference_ns"], MAX_NS, where)
    record.lines.append(Samples(key, line["round"], ns, wall, psi, reference))


def _parse_log(data: bytes, plan: Plan | None, path: str) -> Record | None:
    """The record of all whole lines, or None where there is not even a whole first one."""
    end = data.rfind(b"\n") + 1
    record: Record | None = None
    known = {case.id: case for case in plan.cases} if plan else None
    for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise BadPlan(f"a line has at most {MAX_LINE_BYTES} bytes. {_MEND}", where)
        try:
            value = parse(line, where)
        except BadPlan as error:
            raise BadPlan(f"{error.message}. {_MEND}", error.where) from None
        if record is not None:
            _add_line(record, value, known, where)
            continue
        record = _header(value, where)
        if plan is not None and record.plan_id != plan.plan_id:
            raise BadPlan(
                f"this log belongs to plan {record.plan_id}, not to {plan.plan_id}. "
                "Give the plan it was begun with, or name another log",
                where,
            )
    if record is not None:
        record.whole_bytes = end
    return record


def read_log(path: Path | str, plan: Plan | None = None) -> Record:
    """Read and check a whole log; with a plan, check that it is this plan's. Raises BadPlan with `file:line`."""
    path = Path(path)
    record = _parse_log(read_bytes(path, MAX_LOG_BYTES), plan, str(path))
    if record is None:
        raise BadPlan("has no whole first line; measure again", str(path))
    return record


def read_points(plan: Plan, path: Path | str, normalise: Normalise | None = None) -> list[Point]:
    """The measured cases of a plan, in its order; cases without a sample are left out.

    normalise: `level` takes out the drift that all compute cases share (see `drift`; those that move bytes through
    disks, links and other processes are left as they are), `reference` divides by the last reference GEMM, `none` does
    neither. By default `level` for a CPU and `none` for CUDA. Under `level` a case's samples are those that were taken
    at the speed that the machine had most often (`drift.usual_reference_ns`), where it has `_LEAST_USUAL` of them.
    Raises BadPlan with `file:line`.
    """
    record = read_log(path, plan)
    how = normalise or ("level" if plan.device == "cpu" else "none")
    usual = _usual(record) if how == "level" else np.ones(len(record.lines), np.bool_)
    factors = np.array(_factors(record, plan, how))
    if len(factors) and usual.any():
        factors = factors / np.median(factors[usual])
    by_id: dict[str, list[tuple[Samples, float, bool]]] = {}
    for line, factor, same in zip(record.lines, factors.tolist(), usual.tolist(), strict=True):
        by_id.setdefault(line.id, []).append((line, factor, same))
    points = []
    for case in plan.cases:
        found = by_id.get(case.id, [])
        if not found:
            continue
        there = [(line, factor) for line, factor, same in found if same]
        lines = there if len(there) >= _LEAST_USUAL else [(line, factor) for line, factor, _ in found]
        ns = np.array([x / factor for line, factor in lines for x in line.ns])
        low, median, high = np.percentile(ns, [25, 50, 75])
        seen = [line.reference_ns for line, _ in lines if line.reference_ns]
        drift = float(np.percentile(seen, 90) / np.percentile(seen, 10)) if seen else 1.0
        psi = [line.psi for line, _ in lines if line.psi is not None]
        wall = float(np.median([x for line, _ in lines for x in line.wall_ns]))
        pressure = float(np.median(psi)) if psi else None
        points.append(Point(case, float(median), float(low), float(high), ns.size, wall, drift, pressure))
    return points


def _usual(record: Record) -> NDArray[np.bool_]:
    """Lines that were measured while the machine was as fast as it was most often; all where that is not known."""
    seen = np.array([line.reference_ns or 0.0 for line in record.lines])
    usual_ns = usual_reference_ns(seen)
    if usual_ns is None:
        return np.ones(len(seen), np.bool_)
    return np.asarray((seen > 0) & (np.abs(np.log(np.maximum(seen, 1.0) / usual_ns)) <= SAME_SPEED))


def speed_error(plan: Plan, record: Record) -> float:
    """How far the machine's own speed may be off in another run, 1 sigma of log: the spread of the drift (see `drift`)
    between the quarters of this run, each standing for a run. 0 for a log too short to tell.
    """
    steady = {case.id for case in plan.cases if case.op not in _OWN_DRIFT}
    factor = np.array(_factors(record, plan, "level"))
    log = np.log(factor[[line.id in steady for line in record.lines]])
    if len(log) < _QUARTERS * LEAST_CASES:
        return 0.0
    return float(np.std([np.mean(part) for part in np.array_split(log, _QUARTERS)]))


def _factors(record: Record, plan: Plan, how: Normalise) -> list[float]:
    """What each line's times are divided by."""
    factors = np.ones(len(record.lines))
    if how == "reference":
        known = [line.reference_ns for line in record.lines if line.reference_ns]
        middle = float(np.median(known)) if known else 1.0
        factors[:] = [(line.reference_ns or middle) / middle for line in record.lines]
    elif how == "level":
        steady = {case.id: at for at, case in enumerate(plan.cases) if case.op not in _OWN_DRIFT}
        at = [i for i, line in enumerate(record.lines) if line.id in steady]
        ns = np.array([float(np.median(record.lines[i].ns)) for i in at])
        factors[at] = drift_factors(ns, np.array([steady[record.lines[i].id] for i in at], dtype=np.int64))
    return [float(factor) for factor in factors]


def begun_for(path: Path | str) -> str | None:
    """The id of the plan that a log was begun for; None where there is no log yet. Raises BadPlan for another file."""
    path = Path(path)
    if not path.exists():
        return None
    data = read_bytes(path, MAX_LOG_BYTES)
    first, newline, _ = data[: MAX_LINE_BYTES + 1].partition(b"\n")
    if not newline:
        _check_empty(first, str(path))
        return None
    try:
        return _header(parse(first, f"{path}:1"), f"{path}:1").plan_id
    except BadPlan:
        raise BadPlan("is no log of a run and will not be overwritten; name another log", str(path)) from None


def forget(path: Path | str) -> None:
    """Remove a log, if there is one. Raises BadPlan for a file that is no log, or one that a run still writes."""
    path = Path(path)
    begun_for(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadPlan("another run writes this log; wait for its end, or name another log", str(path)) from None
        path.unlink()


class LogWriter:
    """Appends to a log that nobody else may write meanwhile. `record` is what it held when it was opened."""

    def __init__(self, path: Path | str, plan: Plan, machine: Mapping[str, Any]) -> None:
        """Open or begin a log. Raises BadPlan: in use, malformed, of another plan, of another machine."""
        self.path = Path(path)
        where = str(self.path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BadPlan(f"cannot be written: {error.strerror or error}. Name another log", where) from None
        self._synced = time.monotonic()
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BadPlan("another run writes this log; wait for its end, or name another log", where) from None
            data = read_bytes(self.path, MAX_LOG_BYTES)
            found = _parse_log(data, plan, where)
            if found is None:
                found = Record(plan.plan_id, dict(machine))
                _check_empty(data, where)
                os.ftruncate(self._file, 0)
                self._write({"schema": SCHEMA, "plan": plan.plan_id, "machine": dict(machine)})
            else:
                _check_machine(found.machine, machine, where)
                os.ftruncate(self._file, found.whole_bytes)
        except BaseException:
            os.close(self._file)
            raise
        self.record: Record = found

    def samples(self, line: Samples) -> None:
        """Append the samples of one case."""
        self._write(
            {
                "id": line.id,
                "round": line.round,
                "ns": [round(x, 1) for x in line.ns],
                "wall_ns": [round(x, 1) for x in line.wall_ns],
                "psi": line.psi,
                "reference_ns": line.reference_ns,
            }
        )

    def text(self, kind: str, key: str, text: str) -> None:
        """Append a `remark` on a case, or why it was `refused`."""
        self._write({"id": key, kind: text[:1000]})

    def end(self, facts: Mapping[str, Any]) -> None:
        """Append how the run ended, and put everything on disk."""
        self._write({"end": dict(facts)})
        os.fsync(self._file)

    def close(self) -> None:
        """Put everything on disk and let others write."""
        os.fsync(self._file)
        os.close(self._file)

    def _write(self, value: dict[str, Any]) -> None:
        data = (canonical(value) + "\n").encode()
        # a full disk writes a part: the line is torn and the next run cuts it off
        if os.write(self._file, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        now = time.monotonic()
        if now - self._synced > _SYNC_S:
            os.fsync(self._file)
            self._synced = now


def _check_empty(data: bytes, where: str) -> None:
    """A file without a whole line is overwritten only if it is the beginning of a log."""
    start = b'{"machine":'
    if data[: len(start)] != start[: len(data)]:
        raise BadPlan("is no log of a run and will not be overwritten; name another log", where)


def _check_machine(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    for key in IDENTITY:
        if old.get(key) != new.get(key):
            raise BadPlan(
                f"this log was begun with {key} = {old.get(key)!r:.80}, now it is {new.get(key)!r:.80}. "
                "Times of two machines or versions do not mix: name another log",
                f"{where}:1",
            )
