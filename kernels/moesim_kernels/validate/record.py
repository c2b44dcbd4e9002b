"""The record of a measurement: JSON lines, only ever appended, the first one sealed.

    {"schema": 1, "seal": SHA-256 of predictions.json, "ranks": N, "machine": {...}, ...}        first line
    {"setting": NAME, "round": R, "wall_ns": ..., "cpu_ns": ..., "part_ns": {...}, "psi": ..., "reference_ns": ...}
    {"note": TEXT, "about": SETTING or ""}      {"end": {...}}

A last line without its newline is torn and ignored; any other broken line is an error with its number. `part_ns` is
in CPU time where `cpu_ns` is above 0; `part_wall_ns` may stand beside it. Other keys are for people and left alone.
Reading needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, Problem
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.strict import parse, read_bytes

__all__ = ["Record", "Sample", "read_record"]

SCHEMA = 1
MAX_BYTES = 256 << 20
MAX_NS = 1e14
_MEND = "Remove this line, or measure anew"


@dataclass(frozen=True, slots=True)
class Sample:
    """One step that ran. cpu_ns: of the computing thread (of all ranks' the most), 0 where no CPU computed."""

    setting: str
    round: int
    wall_ns: float
    cpu_ns: float
    part_ns: Mapping[str, float]
    part_wall_ns: Mapping[str, float]
    psi: float | None
    reference_ns: float | None


@dataclass
class Record:
    """All of a record, samples in the order they were taken; notes: (setting or "", text)."""

    seal: str
    ranks: int
    machine: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def refused(self) -> dict[str, str]:
        """Settings that could not run, and why."""
        ran = {s.setting for s in self.samples}
        return {about: text for about, text in self.notes if about and about not in ran}


def read_record(path: Path, seal: str | None = None) -> Record:
    """Read and check a record. Raises BadInput with `file:line`, also where its seal is not `seal`."""
    try:
        return _parse(read_bytes(path, MAX_BYTES), seal, str(path))
    except BadPlan as error:
        raise BadInput(Problem(error.where, error.message)) from None


def _parse(data: bytes, seal: str | None, path: str) -> Record:
    end = data.rfind(b"\n") + 1
    record: Record | None = None
    for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
        where = f"{path}:{number}"
        value = parse(line, where)
        if not isinstance(value, dict):
            raise BadPlan(f"an object is needed. {_MEND}", where)
        if record is None:
            record = _head(value, seal, where)
        elif "setting" in value:
            record.samples.append(_sample(value, where))
        elif isinstance(value.get("note"), str) and isinstance(value.get("about"), str):
            record.notes.append((value["about"], value["note"]))
    if record is None:
        raise BadPlan("has no whole first line; measure again", path)
    return record


def _head(value: Mapping[str, Any], seal: str | None, where: str) -> Record:
    if value.get("schema") != SCHEMA or not isinstance(value.get("seal"), str):
        raise BadPlan("is no record of a measurement: the first line has schema 1 and a seal", where)
    if seal is not None and value["seal"] != seal:
        raise BadPlan(
            f"this record is sealed with {value['seal'][:16]}, and the predictions have {seal[:16]}: they were written "
            "or changed after it was begun, so it judges nothing. Measure anew",
            where,
        )
    machine, ranks = value.get("machine"), value.get("ranks", 1)
    if not isinstance(machine, dict) or type(ranks) is not int or ranks < 1:
        raise BadPlan("the first line names the machine and how many ranks ran. Measure anew", where)
    return Record(value["seal"], ranks, machine)


def _sample(value: Mapping[str, Any], where: str) -> Sample:
    if type(value["setting"]) is not str or type(value.get("round")) is not int or value["round"] < 0:
        raise BadPlan(f"a sample names its setting and its round. {_MEND}", where)
    parts, parts_wall = value.get("part_ns", {}), value.get("part_wall_ns", {})
    if not isinstance(parts, dict) or not isinstance(parts_wall, dict):
        raise BadPlan(f"part_ns holds times by part. {_MEND}", where)
    return Sample(
        setting=value["setting"],
        round=value["round"],
        wall_ns=_ns("wall_ns", value.get("wall_ns"), where, above=True),
        cpu_ns=_ns("cpu_ns", value.get("cpu_ns"), where),
        part_ns={str(k): _ns(f"part_ns.{k}", v, where) for k, v in parts.items()},
        part_wall_ns={str(k): _ns(f"part_wall_ns.{k}", v, where) for k, v in parts_wall.items()},
        psi=None if value.get("psi") is None else _ns("psi", value["psi"], where),
        reference_ns=None if value.get("reference_ns") is None else _ns("reference_ns", value["reference_ns"], where),
    )


def _ns(name: str, value: Any, where: str, above: bool = False) -> float:
    if (
        type(value) not in (int, float)
        or not math.isfinite(value)
        or not 0 <= value <= MAX_NS
        or (above and value == 0)
    ):
        raise BadPlan(f"{name} must be a number {'above' if above else 'from'} 0; got {value!r:.80}. {_MEND}", where)
    return float(value)
