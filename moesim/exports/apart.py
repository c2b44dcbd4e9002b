"""Replicas of an expert on ranks of their own: for engines where a rank finds an expert by its number.

Two replicas on one rank share no load between ranks, so little is lost: each further one changes places with a slot of
another rank, the one that leaves the lower of the two ranks' larger load. Ours; no engine's rule.
"""

from __future__ import annotations

import numpy as np

from moesim.arrays import FloatArray
from moesim.placement import Placement

__all__ = ["keep_apart"]


def keep_apart(placement: Placement, weight_LE: FloatArray) -> tuple[Placement, int]:
    """The placement without two replicas of an expert on a rank, and how many slots changed places.

    Where no change of places helps (more replicas than ranks), the rest stays as it is. Ties: the lowest slot.
    """
    table_LS = placement.slot_to_expert_LS.copy()
    share_LE = np.asarray(weight_LE, np.float64) / placement.replica_count_LE
    moved = 0
    for layer in range(placement.num_layers):
        moved += _layer(table_LS[layer].reshape(placement.num_ranks, -1), share_LE[layer])
    return Placement(table_LS, placement.num_experts, placement.num_ranks, placement.rank_to_node), moved


def _layer(table_Gs: np.ndarray[tuple[int, int], np.dtype[np.int32]], share_E: FloatArray) -> int:
    """Change `table_Gs` [G, slots a rank] in place; the number of changes."""
    ranks, slots = table_Gs.shape
    held_GE = np.zeros((ranks, len(share_E) + 1), np.int64)  # the last column: empty slots
    np.add.at(held_GE, (np.repeat(np.arange(ranks), slots), table_Gs.ravel()), 1)
    share_E = np.append(share_E, 0.0)
    load_G = (held_GE * share_E).sum(axis=1)
    moved = 0
    for rank, expert in np.argwhere(held_GE[:, :-1] > 1).tolist():
        for slot in np.flatnonzero(table_Gs[rank] == expert)[1:].tolist():
            gain_Gs = share_E[expert] - share_E[table_Gs]  # what the other rank gains, and this one loses
            worse_Gs = np.maximum(load_G[:, None] + gain_Gs, load_G[rank] - gain_Gs)
            allowed_Gs = (held_GE[:, expert] == 0)[:, None] & (held_GE[rank][table_Gs] == 0)
            if not allowed_Gs.any():
                break
            other, there = (
                int(i) for i in np.unravel_index(np.where(allowed_Gs, worse_Gs, np.inf).argmin(), table_Gs.shape)
            )
            given = int(table_Gs[other, there])
            load_G[other] += gain_Gs[other, there]
            load_G[rank] -= gain_Gs[other, there]
            for g, e, change in ((rank, expert, -1), (rank, given, 1), (other, given, -1), (other, expert, 1)):
                held_GE[g, e] += change
            table_Gs[rank, slot], table_Gs[other, there] = given, expert
            moved += 1
    return moved
