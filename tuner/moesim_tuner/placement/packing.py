"""CP-SAT over replica counts and packing, with a map as its hint.

k[e, c] = 1 where expert e has c replicas, n[e, c, g] how many of them on rank g; the load of a rank is the sum of
n[e, c, g] * w_e / c, each rounded to a whole number. Ranks are alike, so the fullest comes first.

Legend: E experts, S slots, G ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.placement import EMPTY
from moesim_tuner.placement.solution import cp_model, run

__all__ = ["held_of", "solved", "table_of"]

_UNIT = float(1 << 34)


def held_of(table_S: IntArray, experts: int, ranks: int) -> IntArray:
    """Copies of each expert on each rank [E, G] of a map [S]."""
    held_EG = np.zeros((experts, ranks), np.int64)
    held_S, rank_S = table_S != EMPTY, np.arange(len(table_S)) // (len(table_S) // ranks)
    np.add.at(held_EG, (table_S[held_S], rank_S[held_S]), 1)
    return held_EG


def table_of(held_EG: IntArray, room: int) -> IntArray:
    """The map [G * room] of copies by expert and rank, experts of a rank in order, EMPTY last."""
    table_GQ = np.full((held_EG.shape[1], room), EMPTY, np.int64)
    for rank, count_E in enumerate(held_EG.T):
        table_GQ[rank, : count_E.sum()] = np.repeat(np.arange(len(count_E)), count_E)
    return table_GQ.ravel()


def solved(
    share_E: FloatArray, hint_EG: IntArray, counts: Sequence[range], sizes: tuple[int, int], deterministic_time: float
) -> tuple[IntArray, float]:
    """The solver's copies by expert and rank [E, G], the hint's where it found none, and its bound on the largest load.

    counts: replica counts that each expert may have. sizes: least and most copies of a rank. Raises BadInput without
    OR-Tools.
    """
    ranks = hint_EG.shape[1]
    slots = int(hint_EG.sum())
    model = cp_model().CpModel()
    hint_EG = hint_EG[:, np.argsort(-(np.rint(share_E / hint_EG.sum(axis=1) * _UNIT) @ hint_EG), kind="stable")]
    load_G: list[Any] = [0] * ranks
    size_G: list[Any] = [0] * ranks
    start_G = [0] * ranks
    total: Any = 0
    number: dict[tuple[int, int], list[Any]] = {}
    for expert, choices in enumerate(counts):
        chosen = [model.new_bool_var("") for _ in choices]
        model.add_exactly_one(chosen)
        for count, here in zip(choices, chosen, strict=True):
            mine = count == int(hint_EG[expert].sum())
            model.add_hint(here, int(mine))
            each = int(np.rint(share_E[expert] / count * _UNIT))
            row = []
            for rank in range(ranks):
                n = model.new_int_var(0, min(count, sizes[1]), "")
                model.add_hint(n, int(hint_EG[expert, rank]) if mine else 0)
                start_G[rank] += each * int(hint_EG[expert, rank]) if mine else 0
                number.setdefault((expert, rank), []).append(n)
                load_G[rank] = load_G[rank] + each * n
                size_G[rank] = size_G[rank] + n
                row.append(n)
            model.add(sum(row) == count * here)
            total = total + count * here
    peak = model.new_int_var(0, max(start_G), "")
    model.add_hint(peak, max(start_G))
    model.add(total == slots)
    for rank in range(ranks):
        model.add_linear_constraint(size_G[rank], *sizes)
        model.add(load_G[rank] <= (load_G[rank - 1] if rank else peak))
    model.minimize(peak)
    solver, bound = run(model, deterministic_time, 0)
    proven = (bound - 0.5 * slots) / _UNIT  # every copy's load is rounded to a unit
    if solver is None:
        return hint_EG, proven
    held_EG = np.zeros_like(hint_EG)
    for at, variables in number.items():
        held_EG[at] = sum(int(solver.value(n)) for n in variables)
    return held_EG, proven
