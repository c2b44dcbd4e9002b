"""What solver-based placements return, and the one way in which they run the solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.errors import BadInput
from moesim.placement import Placement

__all__ = [
    "Part",
    "Solution",
    "Status",
    "cp_model",
    "first_come",
    "joint_status",
    "part_of",
    "run",
    "values_of",
    "whole",
]

Status = Literal["optimal", "feasible", "too_large"]
"""optimal: the bound is reached; feasible: the solver's time ended with a gap; too_large: the solver was not asked"""

_SCALE = 1 << 40
_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class Part:
    """One layer, or one stage, of a solution: its objective, the proven bound and how far the solver came."""

    name: str
    objective: float
    bound: float
    status: Status

    @property
    def gap(self) -> float:
        """How far the objective lies above the bound, relative to the objective."""
        return _gap(self.objective, self.bound)


@dataclass(frozen=True, slots=True)
class Solution:
    """A placement, its objective (less is better), a proven lower bound, and how far the solver came.

    parts: layers or stages by themselves.
    """

    placement: Placement
    objective: float
    bound: float
    status: Status
    parts: tuple[Part, ...] = ()

    @property
    def gap(self) -> float:
        """How far the objective lies above the bound, relative to the objective."""
        return _gap(self.objective, self.bound)

    def __str__(self) -> str:
        text = f"objective {self.objective:.6g}, bound {self.bound:.6g}, gap {self.gap:.2%}, {self.status}"
        left = [part for part in self.parts if part.status != "optimal"]
        if not left or len(self.parts) == 1:
            return text
        widest = max(left, key=lambda part: part.gap)
        return f"{text}; {len(left)} of {len(self.parts)} parts with a gap, {widest.name} the widest: {widest.gap:.2%}"


def _gap(objective: float, bound: float) -> float:
    return 0.0 if objective <= bound else (objective - bound) / objective


def part_of(name: str, objective: float, bound: float, status: Status = "feasible") -> Part:
    """A Part that is optimal where its bound is reached, up to rounding."""
    bound = min(max(bound, 0.0), objective)
    reached = objective - bound <= _CLOSE * max(objective, 1e-3)
    return Part(name, objective, objective if reached else bound, "optimal" if reached else status)


def joint_status(parts: Sequence[Part]) -> Status:
    """The worst of the parts'."""
    said = {part.status for part in parts}
    return "too_large" if "too_large" in said else "feasible" if "feasible" in said else "optimal"


def cp_model() -> Any:
    """OR-Tools' `cp_model`. Raises BadInput where it is not installed."""
    try:
        from ortools.sat.python import cp_model as module
    except ImportError as error:
        raise BadInput(
            f"this placement needs OR-Tools, which cannot be imported ({error}). Install it with"
            " pip install 'moesim[tuner]', or use a placement without a solver: eplb, affinity, exflow or moetuner."
        ) from error
    return module


def whole(values: AnyArray) -> tuple[IntArray, float]:
    """Numbers as integers, and how many units of those make one of these: as they are where they are whole and small
    enough, else to about 12 digits of their sum."""
    values = np.asarray(values, np.float64)
    total = float(np.abs(values).sum())
    if total == 0.0 or (total < _SCALE and bool((values == np.rint(values)).all())):
        return np.rint(values).astype(np.int64), 1.0
    scale = _SCALE / total
    return np.rint(values * scale).astype(np.int64), scale


def first_come(rank_LE: IntArray, alike: bool = True) -> IntArray:
    """The same assignment with bins numbered as the first layer's experts come to them."""
    if not alike or not len(rank_LE):
        return rank_LE
    _, first = np.unique(rank_LE[0], return_index=True)
    used = rank_LE[0][np.sort(first)]
    order = np.concatenate([used, np.setdiff1d(np.arange(int(rank_LE.max()) + 1), used)])
    rename = np.empty(len(order), np.int64)
    rename[order] = np.arange(len(order))
    return rename[rank_LE]


def run(model: Any, deterministic_time: float, seed: int) -> tuple[Any, float]:
    """Solve `model`: the solver, with its values, and its proven bound; (None, bound) where it found nothing in time.

    One worker, a fixed seed and deterministic time: the same answer on every machine.
    """
    module = cp_model()
    solver = module.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    solver.parameters.max_deterministic_time = deterministic_time
    status = solver.solve(model)
    if status in (module.OPTIMAL, module.FEASIBLE):
        return solver, float(solver.best_objective_bound)
    if status == module.UNKNOWN:
        bound = float(solver.best_objective_bound)
        return None, bound if math.isfinite(bound) else -math.inf
    raise AssertionError(f"the solver calls its own model {solver.status_name(status)}")


def values_of(solver: Any, variables: AnyArray) -> FloatArray:
    """Values of an array of variables or constants, same shape."""
    flat = [float(solver.value(v)) for v in variables.ravel()]
    return np.array(flat).reshape(variables.shape)
