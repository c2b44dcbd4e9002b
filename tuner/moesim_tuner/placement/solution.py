"""What solver-based placements return. How the solver is asked: `moesim_tuner.solving`, whose names stand here, too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.arrays import IntArray
from moesim.placement import Placement
from moesim_tuner.solving import Part, Status, cp_model, joint_status, part_of, relative_gap, run, values_of, whole

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


@dataclass(frozen=True, slots=True)
class Solution:
    """A placement, its objective (less is better), a proven lower bound, and how far the solver came.

    parts: layers or stages by themselves. linear_programmes, solver_calls: how many were solved on the way, and how
    often CP-SAT was asked, where a policy counts them.
    """

    placement: Placement
    objective: float
    bound: float
    status: Status
    parts: tuple[Part, ...] = ()
    linear_programmes: int = 0
    solver_calls: int = 0

    @property
    def gap(self) -> float:
        """How far the objective lies above the bound, relative to the objective."""
        return relative_gap(self.objective, self.bound)

    def __str__(self) -> str:
        text = f"objective {self.objective:.6g}, bound {self.bound:.6g}, gap {self.gap:.2%}, {self.status}"
        left = [part for part in self.parts if part.status != "optimal"]
        if not left or len(self.parts) == 1:
            return text
        widest = max(left, key=lambda part: part.gap)
        return f"{text}; {len(left)} of {len(self.parts)} parts with a gap, {widest.name} the widest: {widest.gap:.2%}"


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
