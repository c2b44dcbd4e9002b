"""Ranks of one or two copies: the packing is known for any replica counts, so only those are searched.

With at most two copies a rank, the heaviest copies stand alone (where there are ranks of one) and of the others the
heaviest goes with the lightest: exchanging partners of two ranks never lowers the larger load. The search takes a copy
from one expert and gives it to an expert of the fullest ranks, as long as that makes the sum of a high power of rank
loads smaller, which sees more than the fullest rank alone.

Legend: N replica counts side by side, E experts, S slots, G ranks.
"""

from __future__ import annotations

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.placement import EMPTY

__all__ = ["fits", "pair_counts", "paired"]

_POWER = 60
_FULLEST = 4
"""ranks whose experts may have one more copy"""
_STEPS = 200


def fits(slots: int, ranks: int) -> bool:
    """Whether ranks have one or two copies."""
    return ranks <= slots <= 2 * ranks


def _in_pairs(share_E: FloatArray, count_NE: IntArray, ranks: int) -> tuple[FloatArray, IntArray]:
    """Loads of ranks [N, G], and experts of copies, heaviest first [N, S]; copy i and S - 1 - (i - single) share rank
    i, where `single` ranks have one."""
    number, experts = count_NE.shape
    expert_NS = np.repeat(np.tile(np.arange(experts), number), count_NE.ravel()).reshape(number, -1)
    load_NS = np.take_along_axis(share_E / count_NE, expert_NS, axis=1)
    order_NS = np.argsort(-load_NS, axis=1, kind="stable")
    load_NS = np.take_along_axis(load_NS, order_NS, axis=1)
    expert_NS = np.take_along_axis(expert_NS, order_NS, axis=1)
    load_NG = load_NS[:, :ranks].copy()
    single = 2 * ranks - load_NS.shape[1]
    load_NG[:, single:] += load_NS[:, ranks:][:, ::-1]
    return load_NG, expert_NS


def pair_counts(share_E: FloatArray, count_E: IntArray, ranks: int) -> IntArray:
    """Replica counts [E] whose fullest rank is no fuller. share_E: loads, mean rank load 1."""
    load_NG, expert_NS = _in_pairs(share_E, count_E[None], ranks)
    best_E: IntArray = count_E
    least = float(load_NG.max())
    unit = 1.0 / least
    soft = float(((load_NG * unit) ** _POWER).sum())
    single = 2 * ranks - expert_NS.shape[1]
    for _ in range(_STEPS):
        full = np.argsort(-load_NG[0], kind="stable")[:_FULLEST]
        taker = np.unique(np.concatenate([expert_NS[0, full], expert_NS[0, -1 - (full[full >= single] - single)]]))
        several = np.flatnonzero(count_E > 1)
        giver, taker = np.repeat(several, len(taker)), np.tile(taker, len(several))
        giver, taker = giver[giver != taker], taker[giver != taker]
        if not len(giver):
            break
        count_NE = np.tile(count_E, (len(giver), 1))
        turn = np.arange(len(giver))
        count_NE[turn, giver] -= 1
        count_NE[turn, taker] += 1
        every_NG, every_NS = _in_pairs(share_E, count_NE, ranks)
        soft_N = np.minimum((every_NG * unit) ** _POWER, 1e300).sum(axis=1)
        at = int(soft_N.argmin())
        if soft_N[at] >= soft * (1 - 1e-12):
            break
        soft, count_E = float(soft_N[at]), np.asarray(count_NE[at])
        load_NG, expert_NS = every_NG[[at]], every_NS[[at]]
        if load_NG.max() < least:
            best_E, least = count_E, float(load_NG.max())
    return np.asarray(best_E)


def paired(share_E: FloatArray, count_E: IntArray, ranks: int) -> IntArray:
    """The packing: the expert of each slot [G * ceil(S / G)], EMPTY where there is none."""
    expert_S = _in_pairs(share_E, count_E[None], ranks)[1][0]
    single = 2 * ranks - len(expert_S)
    if single == ranks:
        return np.asarray(expert_S)
    table_GQ = np.full((ranks, 2), EMPTY, np.int64)
    table_GQ[:, 0] = expert_S[:ranks]
    table_GQ[single:, 1] = expert_S[ranks:][::-1]
    return table_GQ.ravel()
