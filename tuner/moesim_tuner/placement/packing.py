"""CP-SAT over replica counts and packing, with a map as its hint.

k[e, c] = 1 where expert e has c replicas, n[e, c, g] how many of them on rank g; the load of a rank is the sum of
n[e, c, g] * w_e / c, each rounded to a whole number. Ranks are alike, so the fullest comes first.

Legend: E experts, S slots, G ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.placement import EMPTY
from moesim_tuner.placement.solution import cp_model, run

__all__ = ["Solved", "solved"]

_MOST_CELLS = 6_000
"""(expert, count, rank) triples of a model; above, the solver is not asked"""
_UNIT = float(1 << 34)


class Solved(NamedTuple):
    """The solver's map, which may be its hint, and its bound on the largest rank load."""

    table_S: IntArray
    bound: float


def solved(share_E: FloatArray, hint_S: IntArray, slots: int, ranks: int, deterministic_time: float) -> Solved | None:
    """share_E: loads, mean rank load 1. hint_S: the expert of each slot. None: the model would be too large. Raises
    BadInput without OR-Tools."""
    experts = len(share_E)
    most = slots - experts + 1
    if experts * most * ranks > _MOST_CELLS:
        return None
    room, more = divmod(slots, ranks)
    held_EG = np.zeros((experts, ranks), np.int64)
    held, rank_S = hint_S != EMPTY, np.arange(len(hint_S)) // (len(hint_S) // ranks)
    np.add.at(held_EG, (hint_S[held], rank_S[held]), 1)
    model = cp_model().CpModel()
    each_EC = np.rint(share_E[:, None] / np.arange(1, most + 1) * _UNIT).astype(np.int64)
    mine_E = held_EG.sum(axis=1)
    start_G = each_EC[np.arange(experts), mine_E - 1] @ held_EG
    order = np.argsort(-start_G, kind="stable")
    held_EG, start_G = held_EG[:, order], start_G[order]
    load_G: list[Any] = [0] * ranks
    size_G: list[Any] = [0] * ranks
    total: Any = 0
    number: dict[tuple[int, int, int], Any] = {}
    for expert in range(experts):
        chosen = [model.new_bool_var("") for _ in range(most)]
        model.add_exactly_one(chosen)
        for count, here in enumerate(chosen, 1):
            mine = count == int(mine_E[expert])
            model.add_hint(here, int(mine))
            row = []
            for rank in range(ranks):
                n = model.new_int_var(0, min(count, room + (more > 0)), "")
                model.add_hint(n, int(held_EG[expert, rank]) if mine else 0)
                number[expert, count, rank] = n
                load_G[rank] = load_G[rank] + int(each_EC[expert, count - 1]) * n
                size_G[rank] = size_G[rank] + n
                row.append(n)
            model.add(sum(row) == count * here)
            total = total + count * here
    peak = model.new_int_var(0, int(start_G.max()), "")
    model.add_hint(peak, int(start_G.max()))
    model.add(total == slots)
    for rank in range(ranks):
        model.add_linear_constraint(size_G[rank], room, room + (more > 0))
        model.add(load_G[rank] <= (load_G[rank - 1] if rank else peak))
    model.minimize(peak)
    solver, bound = run(model, deterministic_time, 0)
    bound = (bound - 0.5 * slots) / _UNIT  # every copy's load is rounded to a unit
    if solver is None:
        return Solved(hint_S, bound)
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for (expert, _, rank), n in number.items():
        rows[rank] += [expert] * int(solver.value(n))
    table = np.full((ranks, room + (more > 0)), EMPTY, np.int64)
    for rank, row in enumerate(rows):
        table[rank, : len(row)] = row
    return Solved(table.ravel(), bound)
