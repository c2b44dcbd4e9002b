"""A bound on the largest rank load from the linear programme over rank patterns, and replica counts that it suggests.

A pattern is what one rank may hold: S // G copies or one more, of a load of T at most. Gilmore and Gomory's programme
(Operations Research 9, 1961, for cutting stock) asks for G patterns, taken in fractions, that hold every expert, in
fractions of replica counts; where that is impossible, so is T. The proof is the dual: a worth u(x) of a copy of load x,
not decreasing in x (a dual feasible function), such that

    sum over experts e of  min over counts r of  r * u(w_e / r)   >   sum over ranks of the most worth a rank can hold.

u comes from HiGHS in floating point and is rounded; then both sides are worked out anew in whole numbers, for every
count and every pattern, so the proof does not lean on the solver's arithmetic. Loads are rounded down to a grid. One u
refutes a range of T: the largest one is looked up.

Legend: E experts, C classes of experts of nearly one load, R replica counts, U sizes of copies, K copies on a rank,
W grid (loads of 0 to T).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from moesim.arrays import FloatArray, IntArray

__all__ = ["Patterns"]

_GRID = 8192
"""cells from 0 to the largest rank load known"""
_MERGED = 6e-3
"""copies that differ by less than this share of the load, over the copies of a rank, count as the lighter one"""
_WORTH = float(1 << 24)
"""u is a multiple of 1 / _WORTH, so that sums of it are exact"""
_CLOSE_ENOUGH = 0.3
"""of the gap: bounds are looked for in steps down to this"""
_MOST_COPIES = 16
"""a rank with more is bound by the mean, or left to other bounds"""
_NEW_PATTERNS = 40
"""added in a round at most, a number of copies"""


@dataclass
class Patterns:
    """The programme of one layer. share_E: loads, mean rank load 1. value: the largest rank load that is known to do.

    rounds: linear programmes solved so far. fractions: of every T that was not refuted, the experts of a class by
    replica count [C, R]."""

    share_E: FloatArray
    slots: int
    ranks: int
    value: float
    rounds: int = 0
    fractions: list[FloatArray] = field(default_factory=list)
    class_E: IntArray = field(init=False)

    def __post_init__(self) -> None:
        room, more = divmod(self.slots, self.ranks)
        self.ranks_K = {room: self.ranks - more} | ({room + 1: more} if more else {})
        if room == 0:
            del self.ranks_K[0]
        self.unit = self.value / _GRID
        apart = _MERGED * self.value / max(self.ranks_K)
        order = np.argsort(self.share_E, kind="stable")
        self.class_E = np.empty(len(order), np.int64)
        self.class_E[order] = _merge(self.share_E[order], apart)
        self.first_C = np.minimum.reduceat(self.share_E[order], np.unique(self.class_E[order], return_index=True)[1])
        self.experts_C = np.bincount(self.class_E)
        need_C = np.maximum(np.ceil(self.first_C / (self.value * (1 + 1e-9))), 1.0).astype(np.int64)
        self.spare = self.slots - int((need_C * self.experts_C).sum())
        self.count_CR = need_C[:, None] + np.arange(max(self.spare, 0) + 1)
        size_CR = np.floor(self.first_C[:, None] / self.count_CR / self.unit * (1 - 1e-12)).astype(np.int64)
        every = np.unique(size_CR)
        cell = _merge(every.astype(np.float64), apart / self.unit)
        self.size_U = np.array([every[np.searchsorted(cell, i)] for i in range(cell[-1] + 1)])
        self.cell_CR = np.searchsorted(self.size_U, size_CR, "right") - 1
        self.size_CR = self.size_U[self.cell_CR]
        self.pool: dict[tuple[int, ...], None] = {}
        self.pairs: dict[tuple[int, int], None] = {}

    @property
    def useful(self) -> bool:
        """Whether a rank holds few enough copies."""
        return self.spare >= 0 and max(self.ranks_K) <= _MOST_COPIES

    def bound(self, bound: float, tolerance: float, programmes: int) -> float:
        """The best bound proven in so many linear programmes: `bound` at least, and no more than the gap asks for."""
        aim = high = self.value / (1 + tolerance) * (1 + 1e-9)
        while self.rounds < programmes and bound < aim:
            left = high - bound
            if left <= max(0.25 * tolerance * self.value, _CLOSE_ENOUGH * (self.value - bound)):
                break
            near = high == aim and left <= 2 * tolerance * self.value
            most = high if near else bound + 0.5 * left
            found = self.refute(most, programmes - self.rounds)
            bound, high = (max(bound, found), high) if found else (bound, most)
        return bound

    def counts(self, share_CR: FloatArray) -> IntArray:
        """Replica counts [E] that come near a solution in fractions, with copies in every slot."""
        above_CR = np.cumsum(share_CR[:, ::-1], axis=1)[:, ::-1][:, 1:]  # experts with more than r copies
        low, high = 0.0, 1.0
        for _ in range(40):  # rounding up from `middle` on: ever fewer copies
            middle = (low + high) / 2
            given = int(np.floor(above_CR + 1 - middle).clip(0, self.experts_C[:, None]).sum())
            low, high = (middle, high) if given > self.spare else (low, middle)
        more_CR = np.floor(above_CR + 1 - high).clip(0, self.experts_C[:, None]).astype(np.int64)
        count_E = np.empty(len(self.share_E), np.int64)
        for c in range(len(self.first_C)):
            mine = np.flatnonzero(self.class_E == c)
            mine = mine[np.argsort(-self.share_E[mine], kind="stable")]
            count_E[mine] = self.count_CR[c, 0] + (np.arange(len(mine))[:, None] < more_CR[c]).sum(axis=1)
        while count_E.sum() > self.slots:  # classes need less than their heaviest: not more than fit
            count_E[np.where(count_E > 1, self.share_E / np.maximum(count_E - 1, 1), np.inf).argmin()] -= 1
        while count_E.sum() < self.slots:
            count_E[(self.share_E / count_E).argmax()] += 1
        return count_E

    def refute(self, most: float, rounds: int) -> float:
        """A proven bound above `most`, or 0.0 where none was found in so many linear programmes."""
        cap = min(int(most / self.unit), _GRID)
        if not self.pool:
            self._begin(cap)
        nothing_U = np.zeros(len(self.size_U))
        proven = self._proven(nothing_U, self._filled(nothing_U), cap)
        if proven:  # a copy, or the lightest ones together, weigh more
            return proven
        for at, row_R in enumerate(self.size_CR <= cap):
            self.pairs[at, int(row_R.argmax())] = None
        for _ in range(rounds):
            self.rounds += 1
            worth_U, best_C, best_K, share_CR, gain = self._programme(cap)
            best = self._filled(worth_U)
            proven = self._proven(worth_U, best, cap)
            if proven:
                return proven
            if gain <= 1e-7 * self.slots or not self._extend(worth_U, best_C, best_K, best, cap):
                self.fractions.append(share_CR)
                return 0.0
        return 0.0

    def _begin(self, cap: int) -> None:
        """Patterns that are worth most by simple measures, and the lightest."""
        self.pool = {(0,) * copies: None for copies in self.ranks_K}
        size = self.size_U.astype(np.float64)
        steps = [np.where(parts * size > cap, 1.0, 0.0) for parts in (2, 3)]
        measures: list[FloatArray] = [size, np.sqrt(size), *steps, np.ones(len(size))]
        for worth_U in measures:
            best = self._filled(worth_U)
            for copies in self.ranks_K:
                for cell in np.flatnonzero(best.through(copies, cap) > -np.inf).tolist():
                    self.pool[best.trace(copies, cell, cap)] = None
        for at in range(len(self.first_C)):
            for r in range(min(2, self.count_CR.shape[1])):
                self.pairs[at, r] = None

    def _programme(self, cap: int) -> tuple[FloatArray, FloatArray, dict[int, float], FloatArray, float]:
        """max sum over classes - sum over ranks. Variables: u [U] in -1..1, v [C], the most of a rank by its copies."""
        cells, classes = len(self.size_U), len(self.first_C)
        column_K = {copies: cells + classes + i for i, copies in enumerate(self.ranks_K)}
        pair_P2 = np.array([p for p in self.pairs if self.size_CR[p] <= cap], np.int64)
        rows, class_P = np.arange(len(pair_P2)), pair_P2[:, 0]
        at = class_P, pair_P2[:, 1]
        entries = [  # v_c <= r u
            (rows, cells + class_P, np.ones(len(rows))),
            (rows, self.cell_CR[at], -self.count_CR[at].astype(np.float64)),
        ]
        row = len(rows)
        for copies, column in column_K.items():  # what a pattern is worth is at most the most of a rank
            pattern_PK = np.array([p for p in self.pool if len(p) == copies], np.int64)
            pattern_PK = pattern_PK[self.size_U[pattern_PK].sum(axis=1) <= cap]
            rows = np.arange(row, row + len(pattern_PK))
            entries += [(rows, np.full(len(rows), column), -np.ones(len(rows)))]
            entries += [(rows, cell_P, np.ones(len(rows))) for cell_P in pattern_PK.T]
            row += len(rows)
        rows, cell = np.arange(row, row + cells - 1), np.arange(cells - 1)  # u does not decrease
        entries += [(rows, cell, np.ones(cells - 1)), (rows, cell + 1, -np.ones(cells - 1))]
        row += cells - 1
        size = cells + classes + len(column_K)
        aim = np.zeros(size)
        aim[cells : cells + classes] = -self.experts_C
        for copies, column in column_K.items():
            aim[column] = self.ranks_K[copies]
        row_I, column_I, value_I = (np.concatenate(part) for part in zip(*entries, strict=True))
        matrix: Any = coo_array((value_I, (row_I, column_I)), (row, size)).tocsr()
        box: list[tuple[float | None, float | None]] = [(-1.0, 1.0)] * cells + [(None, None)] * (size - cells)
        found = linprog(
            aim,
            A_ub=matrix,
            b_ub=np.zeros(row),
            bounds=box,
            method="highs-ds",
        )
        if found.x is None:
            raise AssertionError(f"the linear programme over patterns has a solution, HiGHS says: {found.message}")
        solution: FloatArray = np.asarray(found.x, np.float64)
        worth_U = np.maximum.accumulate(np.rint(solution[:cells] * _WORTH))
        share_CR = np.zeros(self.count_CR.shape)
        share_CR[at] = -np.asarray(found.ineqlin.marginals)[: len(pair_P2)]
        best_K = {copies: float(solution[column]) for copies, column in column_K.items()}
        return worth_U, solution[cells : cells + classes], best_K, share_CR, -float(aim @ solution)

    def _filled(self, worth_U: FloatArray) -> _Filled:
        return _Filled.of(self.size_U, worth_U, max(self.ranks_K))

    def _least_C(self, worth_U: FloatArray, cap: int) -> FloatArray:
        """The least worth of an expert of each class over all counts whose copies weigh `cap` at most."""
        worth_CR = np.where(self.size_CR <= cap, self.count_CR * worth_U[self.cell_CR], np.inf)
        return np.asarray(worth_CR.min(axis=1))

    def _left(self, worth_U: FloatArray, best: _Filled, cap: int) -> float:
        """Worth of the experts less what ranks of load `cap` hold: above 0, the load is refuted. Not rising in cap."""
        held = sum(ranks * best.through(copies, cap).max() for copies, ranks in self.ranks_K.items())
        return float((self._least_C(worth_U, cap) * self.experts_C).sum() - held)

    def _proven(self, worth_U: FloatArray, best: _Filled, cap: int) -> float:
        """The largest load that this worth refutes, and 0.0 where it does not refute `cap`."""
        if not self._left(worth_U, best, cap) > 0:
            return 0.0
        low, high = cap, _GRID + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._left(worth_U, best, middle) > 0 else (low, middle)
        return (low + 1) * self.unit * (1 - 1e-9)

    def _extend(
        self, worth_U: FloatArray, best_C: FloatArray, best_K: dict[int, float], best: _Filled, cap: int
    ) -> bool:
        """Add the rows that this solution breaks. False: there are none."""
        before = len(self.pool) + len(self.pairs)
        worth_CR = np.where(self.size_CR <= cap, self.count_CR * worth_U[self.cell_CR] / _WORTH, np.inf)
        for c in np.flatnonzero(worth_CR.min(axis=1) < best_C - 1e-7):
            self.pairs[int(c), int(worth_CR[c].argmin())] = None
        for copies in self.ranks_K:
            value_U = best.through(copies, cap) / _WORTH
            order = np.argsort(-value_U, kind="stable")[:_NEW_PATTERNS]
            for cell in order[value_U[order] > best_K[copies] + 1e-7]:
                self.pool[best.trace(copies, int(cell), cap)] = None
        return len(self.pool) + len(self.pairs) > before


def _merge(sorted_I: FloatArray, apart: float) -> IntArray:
    """Groups of sorted numbers, none further than `apart` from its first: the group of each."""
    out, group, first = np.empty(len(sorted_I), np.int64), -1, -np.inf
    for i, number in enumerate(sorted_I.tolist()):
        if number - first > apart or group < 0:
            group, first = group + 1, number
        out[i] = group
    return out


@dataclass
class _Filled:
    """The most worth of 0, 1, .. copies within each load of the grid, and the last copy that gives it."""

    size_U: IntArray
    worth_U: FloatArray
    most_KW: list[FloatArray]
    last_KW: list[NDArray[np.int16]]

    @classmethod
    def of(cls, size_U: IntArray, worth_U: FloatArray, copies: int) -> _Filled:
        useful = [0, *(np.flatnonzero(np.diff(worth_U) > 0) + 1).tolist()]  # heavier and worth no more: never better
        most_KW, last_KW = [np.zeros(_GRID + 1)], [np.zeros(_GRID + 1, np.int16)]
        for _ in range(1, copies):
            most_W, last_W = np.full(_GRID + 1, -np.inf), np.zeros(_GRID + 1, np.int16)
            for cell in useful:
                size = int(size_U[cell])
                if size > _GRID:
                    break
                with_W = most_KW[-1][: _GRID + 1 - size] + worth_U[cell]
                better_W = with_W > most_W[size:]
                np.copyto(most_W[size:], with_W, where=better_W)
                last_W[size:][better_W] = cell
            most_KW.append(most_W)
            last_KW.append(last_W)
        return cls(size_U, worth_U, most_KW, last_KW)

    def through(self, copies: int, cap: int) -> FloatArray:
        """The most worth of so many copies of load `cap` at most, one of which is of each size: [U], -inf where none
        is."""
        left_U = cap - self.size_U
        value_U = self.most_KW[copies - 1][np.maximum(left_U, 0)] + self.worth_U
        return np.where(left_U >= 0, value_U, -np.inf)

    def trace(self, copies: int, cell: int, cap: int) -> tuple[int, ...]:
        """The copies of that pattern, by size."""
        pattern, left = [cell], cap - int(self.size_U[cell])
        for number in range(copies - 1, 0, -1):
            pattern.append(int(self.last_KW[number][left]))
            left -= int(self.size_U[pattern[-1]])
        return tuple(sorted(pattern))
