"""Predictions of settings, and the file that holds them: whole on disk, hashed, before anything is measured.

The hash (SHA-256 of the file's bytes) is the *seal*: the measuring process is given it and nothing else of the file,
and writes it into the head of its record, so a record cannot be older than the prediction it is judged by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import moesim
from moesim.errors import BadInput, Problem
from moesim.hardware import GRADES, DeviceProfile
from moesim.simulate import Prepared
from moesim_kernels.bench.strict import canonical
from moesim_kernels.real.work import PART_OF, PricedStep, Setting, price, resolve
from moesim_kernels.validate.baseline import roofline_ns
from moesim_kernels.validate.bounds import LEVEL
from moesim_kernels.validate.settings import kind_of_setting

__all__ = ["Predicted", "Predictions", "predict", "read_predictions", "seal_of", "write_sealed"]

SCHEMA = 1
SIGMAS = 1.645
"""of a normal distribution, two-sided 90 %"""


@dataclass(frozen=True, slots=True)
class Predicted:
    """A setting: ns in all, by operation and by part; half_width: of the 90 % interval of ln(ns), in all and by part;
    half_width_cpu: that of thread CPU time, where it is another; grade: shares of the time by grade, of all and of
    each part; operator: of each operation; roofline_ns: a baseline's word."""

    name: str
    kind: str
    overrides: tuple[str, ...]
    tokens: int
    context: int
    ns: int
    operation_ns: Mapping[str, int]
    operator: Mapping[str, str]
    part_ns: Mapping[str, int]
    half_width: float
    part_half_width: Mapping[str, float]
    grade: tuple[float, ...]
    part_grade: Mapping[str, tuple[float, ...]]
    roofline_ns: float
    half_width_cpu: float | None = None


@dataclass(frozen=True, slots=True)
class Predictions:
    """All of a file. facts: of the scenario, the profile and the run, JSON through and through."""

    settings: tuple[Predicted, ...]
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schema": SCHEMA,
            "moesim": moesim.__version__,
            "level": LEVEL,
            **self.facts,
            "settings": [asdict(s) for s in self.settings],
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any], where: str) -> Predictions:
        """Back from `to_json`. Raises BadInput for anything else."""
        try:
            if given["schema"] != SCHEMA:
                raise ValueError(f"schema {given['schema']}, where {SCHEMA} is known")
            rows = [
                {**row, "overrides": tuple(row["overrides"]), "grade": tuple(row["grade"])} for row in given["settings"]
            ]
            facts = {k: v for k, v in given.items() if k not in ("schema", "moesim", "level", "settings")}
            return cls(tuple(Predicted(**row) for row in rows), facts)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(Problem(where, f"these are no predictions of moesim validate: {error}")) from None


def predict(
    settings: Iterable[Setting],
    prepared_for: Callable[[tuple[str, ...]], Prepared],
    facts: Mapping[str, Any],
    told: Callable[[int], None] | None = None,
) -> Predictions:
    """Every setting by the simulator's own pricer. prepared_for: the scenario with these overrides, laid out."""
    out = []
    for number, setting in enumerate(settings):
        if told is not None:
            told(number)
        prepared = prepared_for(setting.overrides)
        out.append(_predicted(prepared, setting, price(prepared, setting)))
    return Predictions(tuple(out), facts)


def _predicted(prepared: Prepared, setting: Setting, step: PricedStep) -> Predicted:
    profile = prepared.result.scenario.cluster.profile
    spent = {name: int(ns) for name, ns in step.operation_ns.items() if ns}
    parts: dict[str, list[str]] = {}
    for name in spent:
        parts.setdefault(PART_OF.get(name, name), []).append(name)
    return Predicted(
        name=setting.name,
        kind=kind_of_setting(setting),
        overrides=setting.overrides,
        tokens=setting.tokens,
        context=sum(p + 1 for _, p, _ in setting.decode) + sum(c[1] + c[2] for c in setting.chunks),
        ns=step.ns,
        operation_ns=spent,
        operator={name: step.operator[name] for name in spent},
        part_ns={part: sum(spent[name] for name in names) for part, names in parts.items()},
        half_width=round(_half_width(step, spent, profile), 5),
        part_half_width={part: round(_half_width(step, names, profile), 5) for part, names in parts.items()},
        grade=tuple(round(x, 4) for x in step.grade),
        part_grade={part: _grades(step, names) for part, names in parts.items()},
        roofline_ns=round(roofline_ns(prepared, resolve(prepared, setting)), 1),
    )


def _half_width(step: PricedStep, names: Iterable[str], profile: DeviceProfile) -> float:
    """Of ln(ns) of these operations: each operator's held-out error at its share, independent of the others', and the
    device's own speed, which all share (as `RunResult.errors`)."""
    share: dict[str, float] = {}
    names = list(names)
    total = max(sum(step.operation_ns[n] for n in names), 1)
    for name in names:
        operator = step.operator[name]
        share[operator] = share.get(operator, 0.0) + step.operation_ns[name] / total
    device = {op: s for op, s in share.items() if op != "host"}
    variance = sum((s * profile.error(op)) ** 2 for op, s in device.items())
    variance += (sum(device.values()) * profile.speed_error) ** 2
    return SIGMAS * float(np.sqrt(variance))


def _grades(step: PricedStep, names: Iterable[str]) -> tuple[float, ...]:
    spent = np.zeros(len(GRADES))
    for name in names:
        spent += np.array(step.operation_grade.get(name, (0.0,) * len(GRADES))) * step.operation_ns[name]
    return tuple(round(float(x), 4) for x in spent / max(float(spent.sum()), 1e-300))


# ---- the file


def seal_of(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises BadInput where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(Problem(str(path), f"cannot be read: {error.strerror or error}")) from None


def write_sealed(path: Path, predictions: Predictions) -> str:
    """Write canonical JSON, whole and on disk before it takes its name; returns its seal."""
    import os

    from moesim.results import replacing_file

    with replacing_file(path) as hidden, hidden.open("w", encoding="utf-8") as file:
        file.write(canonical(predictions.to_json()) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return seal_of(path)


def read_predictions(path: Path) -> Predictions:
    """Raises BadInput for a file that holds none."""
    from moesim_kernels.bench.errors import BadPlan
    from moesim_kernels.bench.strict import parse, read_bytes

    try:
        given = parse(read_bytes(path, 64 << 20), str(path))
    except BadPlan as error:
        raise BadInput(Problem(error.where, error.message)) from None
    if not isinstance(given, dict):
        raise BadInput(Problem(str(path), "these are no predictions of moesim validate"))
    return Predictions.from_json(given, str(path))
