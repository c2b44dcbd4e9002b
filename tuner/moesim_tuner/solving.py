"""The one way in which the tuner asks a solver: a good answer first, a bound next, the solver only for what is left.

`close_gap` runs it: the answer of a heuristic and a proven bound come in; where they differ by more than a tolerance,
CP-SAT gets the programme with that answer as its hint, one worker, a fixed seed and deterministic time, so every
machine finds the same; its status is checked and its bound counts where it is the tighter one. A `Part` says what came
of it, and whether the solver was needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.errors import BadInput

__all__ = [
    "Answer",
    "Better",
    "Part",
    "Status",
    "ask",
    "close_gap",
    "cp_model",
    "joint_status",
    "part_of",
    "relative_gap",
    "run",
    "values_of",
    "whole",
]

Status = Literal["optimal", "feasible", "too_large"]
"""optimal: the bound is reached; feasible: a gap is left; too_large: a gap is left and the solver was not asked,
because the programme is too large for it"""

_SCALE = 1 << 40
_CLOSE = 1e-9
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """One layer, or one stage, of a solution: its objective (less is better), the proven bound and how far the solver
    came. units: deterministic time that the solver took; 0: it was not needed, or not asked."""

    name: str
    objective: float
    bound: float
    status: Status
    units: float = 0.0

    @property
    def gap(self) -> float:
        """How far the objective lies above the bound, relative to the objective."""
        return relative_gap(self.objective, self.bound)

    def __str__(self) -> str:
        asked = f", solver {self.units:.3g} units" if self.units else ", solver not asked"
        return f"objective {self.objective:.6g}, bound {self.bound:.6g}, gap {self.gap:.2%}, {self.status}{asked}"


def relative_gap(objective: float, bound: float) -> float:
    """(objective - bound) / objective; 0 where the bound is reached."""
    return 0.0 if objective <= bound else (objective - bound) / objective


def part_of(name: str, objective: float, bound: float, status: Status = "feasible", units: float = 0.0) -> Part:
    """A Part that is optimal where its bound is reached, up to rounding."""
    bound = min(max(bound, 0.0), objective)
    reached = objective - bound <= _CLOSE * max(objective, 1e-3)
    return Part(name, objective, objective if reached else bound, "optimal" if reached else status, units)


def joint_status(parts: Sequence[Part]) -> Status:
    """The worst of the parts'."""
    said = {part.status for part in parts}
    return "too_large" if "too_large" in said else "feasible" if "feasible" in said else "optimal"


# ---- greedy, bound, solver


class Better(NamedTuple):
    """What a solver found. answer, objective: None where it found nothing in time; bound: proven, in the objective's
    own unit, rounding taken off; units: deterministic time."""

    answer: Any
    objective: float | None
    bound: float
    units: float


def close_gap(
    name: str,
    answer: T,
    objective: float,
    bound: float,
    tolerance: float,
    solve: Callable[[], Better | None],
) -> tuple[T, Part]:
    """The better of a heuristic's answer and the solver's, and what is proven of it.

    objective, bound: of `answer`, and of every answer. tolerance: a gap up to this share of the objective is left
    alone. solve: builds the programme, with `answer` as its hint, and asks; None: it is too large to be asked.
    """
    if relative_gap(objective, bound) <= max(tolerance, _CLOSE):
        return answer, part_of(name, objective, bound)
    found = solve()
    if found is None:
        return answer, part_of(name, objective, bound, "too_large")
    if found.objective is not None and found.objective < objective:
        answer, objective = found.answer, found.objective
    return answer, part_of(name, objective, max(bound, found.bound), units=found.units)


# ---- the solver


class Answer(NamedTuple):
    """solver: with its values, None where it found nothing in time. bound: proven; -inf where there is none, inf where
    it has proven that there is no answer. units: deterministic time it took."""

    solver: Any
    bound: float
    units: float


def cp_model() -> Any:
    """OR-Tools' `cp_model`. Raises BadInput where it is not installed."""
    try:
        from ortools.sat.python import cp_model as module
    except ImportError as error:
        raise BadInput(
            f"this policy needs OR-Tools, which cannot be imported ({error}). Install it with"
            " pip install 'moesim[tuner]', or use one without a solver: placement eplb, affinity, exflow or moetuner;"
            " precision edgemoe or mc_moe; offload expert_split."
        ) from error
    return module


def ask(model: Any, deterministic_time: float, seed: int = 0, may_fail: bool = False) -> Answer:
    """Solve `model` with one worker, a fixed seed and deterministic time: the same answer on every machine. may_fail:
    nobody knows yet whether it has an answer."""
    module = cp_model()
    solver = module.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    solver.parameters.max_deterministic_time = deterministic_time
    status = solver.solve(model)
    units = float(solver.response_proto.deterministic_time)
    if status in (module.OPTIMAL, module.FEASIBLE):
        return Answer(solver, float(solver.best_objective_bound), units)
    if status == module.UNKNOWN:
        bound = float(solver.best_objective_bound)
        return Answer(None, bound if math.isfinite(bound) else -math.inf, units)
    if may_fail and status == module.INFEASIBLE:
        return Answer(None, math.inf, units)
    raise AssertionError(f"the solver calls its own model {solver.status_name(status)}")


def run(model: Any, deterministic_time: float, seed: int) -> tuple[Any, float]:
    """`ask` without the time it took: the solver or None, and its proven bound."""
    found = ask(model, deterministic_time, seed)
    return found.solver, found.bound


def whole(values: AnyArray) -> tuple[IntArray, float]:
    """Numbers as integers, and how many units of those make one of these: as they are where they are whole and small
    enough, else to about 12 digits of their sum."""
    values = np.asarray(values, np.float64)
    total = float(np.abs(values).sum())
    if total == 0.0 or (total < _SCALE and bool((values == np.rint(values)).all())):
        return np.rint(values).astype(np.int64), 1.0
    scale = _SCALE / total
    return np.rint(values * scale).astype(np.int64), scale


def values_of(solver: Any, variables: AnyArray) -> FloatArray:
    """Values of an array of variables or constants, same shape."""
    flat = [float(solver.value(v)) for v in variables.ravel()]
    return np.array(flat).reshape(variables.shape)
