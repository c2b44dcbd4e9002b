"""What travels between the parts of the tuner, and what its journal keeps: plain values, JSON in and out.

A *point* is a mapping from parameter to value, for the parameters that mean something there (`space`). A *candidate* is
a point with where it came from. A *task* is what a worker is given: configuration, seed, fidelity; a *row* what it
returns. A *trial* is a candidate with all its rows and the verdict: the unit of a study, numbered from 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:  # the simulator takes two seconds to import; `moesim tune status` has no need of it
    from moesim.observe import Observation

__all__ = ["Candidate", "Point", "Row", "RowState", "Task", "Trial", "TrialState", "canonical", "derived_seed"]

Point: TypeAlias = Mapping[str, Any]
RowState = Literal["done", "infeasible", "illegal", "failed"]
"""done: figures are there. infeasible: legal, and does not fit. illegal: no such scenario. failed: a worker died, hung
or met a mistake of ours."""
TrialState = Literal["complete", "pruned", "infeasible", "illegal", "failed"]
"""complete: climbed every rung. pruned: stopped below the last one. The others as its row."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point to try. origin: `default` (the scenario as written), `start`, `heuristic: NAME`, or a sampler's name."""

    point: Point
    origin: str


@dataclass(frozen=True, slots=True)
class Task:
    """One simulation. text, name, base: the scenario's YAML text, its name, the folder its relative paths are named
    from; overrides: `a.b=c` texts on top of it; seed: of every draw; plugins: modules of policies to load first;
    observe: return what a comparison needs, too. Two tasks of equal content give equal rows, wherever they run."""

    text: str
    name: str
    base: str
    overrides: tuple[str, ...]
    seed: int
    plugins: tuple[str, ...] = ()
    observe: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """What a task came to.

    figures: by name (`figures`), of a run that is done. limits: what a row that is not done broke, by name, as a share
    of what there is (`memory: 0.25`: a quarter more is needed than a device has; `legality: 1`). reasons: sentences for
    the user. scenario_hash: of what was simulated. elapsed_s: on the worker; in no canonical record. observation: where
    it was asked for.
    """

    state: RowState
    figures: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    scenario_hash: str = ""
    elapsed_s: float = 0.0
    observation: Observation | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate and what it came to.

    values: one an objective, in the study's order, in its own unit; none where nothing was measured (illegal,
    infeasible, failed); of a pruned trial those of its last rung. violations: by constraint (also memory and legality),
    <= 0 where it is kept, relative to the limit. rungs: figures by rung climbed, means over its seeds. started_s,
    ended_s: the clock's, in no canonical record.
    """

    number: int
    point: Point
    origin: str
    state: TrialState
    values: tuple[float, ...] = ()
    violations: Mapping[str, float] = field(default_factory=dict)
    rungs: tuple[Mapping[str, float], ...] = ()
    reasons: tuple[str, ...] = ()
    scenario_hash: str = ""
    started_s: float = 0.0
    ended_s: float = 0.0

    @property
    def feasible(self) -> bool:
        """It was run whole and keeps every constraint."""
        return self.state == "complete" and all(v <= 0 for v in self.violations.values())

    @property
    def violation(self) -> float:
        """Sum of what it breaks."""
        return sum(max(0.0, v) for v in self.violations.values())

    def to_json(self, clocks: bool = True) -> dict[str, Any]:
        """As the journal keeps it; without clocks as the canonical export has it."""
        out = asdict(self)
        out["point"], out["rungs"] = dict(self.point), [dict(rung) for rung in self.rungs]
        if not clocks:
            del out["started_s"], out["ended_s"]
        return out

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Trial:
        """What `to_json` made. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            number=int(found["number"]),
            point=dict(found["point"]),
            origin=str(found["origin"]),
            state=found["state"],
            values=tuple(float(v) for v in found["values"]),
            violations={str(k): float(v) for k, v in found["violations"].items()},
            rungs=tuple(dict(rung) for rung in found["rungs"]),
            reasons=tuple(found["reasons"]),
            scenario_hash=str(found["scenario_hash"]),
            started_s=float(found.get("started_s", 0.0)),
            ended_s=float(found.get("ended_s", 0.0)),
        )


def canonical(value: Any) -> str:
    """JSON with one spelling: keys sorted, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def derived_seed(root: int, *keys: int | str) -> int:
    """A seed of 31 bits from the study's and what it is for: the same on every machine and in every process."""
    text = ":".join(str(key) for key in (root, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF
