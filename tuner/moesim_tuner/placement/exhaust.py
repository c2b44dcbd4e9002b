"""Small layers: every replica count and every packing that could still be better, looked at many at a time.

Counts first, then rank after rank: the heaviest copy that is left and its neighbours, all choices of them. A rank must
stay below the best map known, and what is left must fit on the ranks that are left. The last two ranks are one choice.
Loads are whole numbers (2^40 for all of a layer), so sums are exact in any order.

Legend: E experts, S slots, G ranks, N states (a replica count, and the copies not yet placed), M ways to fill a rank.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.placement import EMPTY

__all__ = ["Exhausted", "exhaust", "small"]

_TOTAL = float(1 << 40)
_MOST_COUNTS = 20_000
_MOST_SLOTS = 24
_MOST_WORK = 40_000_000
"""ways to fill a rank that are looked at"""
_SMALL = 5_000_000
"""ways to fill the first rank, all replica counts together, below which all are tried before any search"""
_CHUNK = 400_000
_LEAST_GAIN = 1e-11
"""of the total load: maps that differ by less are equally good (loads of copies are rounded)"""


@dataclass(frozen=True)
class Exhausted:
    """Nothing is better than the best map known or, where there is one, `table_S`."""

    table_S: IntArray | None


def small(experts: int, slots: int, ranks: int) -> bool:
    """Whether trying all takes less than a search."""
    room = -(-slots // ranks)
    many = math.comb(slots - 1, slots - experts)
    return slots <= _MOST_SLOTS and many <= _MOST_COUNTS and many * math.comb(slots - 1, room - 1) <= _SMALL


def exhaust(share_E: FloatArray, slots: int, ranks: int, value: float) -> Exhausted | None:
    """The best map of a layer; None: too many to try. value: the best largest rank load known, mean 1."""
    spare = slots - len(share_E)
    many = math.comb(slots - 1, spare)
    if ranks == 1 or slots < ranks or slots > _MOST_SLOTS or many > _MOST_COUNTS:
        return None
    search = _Search(share_E, slots, ranks, value)
    return Exhausted(search.table_S) if search.run() else None


class _Search:
    def __init__(self, share_E: FloatArray, slots: int, ranks: int, value: float) -> None:
        self.slots, self.ranks = slots, ranks
        self.room, self.more = divmod(slots, ranks)
        self.order = np.argsort(-share_E, kind="stable")
        self.share_E = share_E[self.order]
        self.unit = _TOTAL / float(share_E.sum())
        self.most = int(value * self.unit) - int(_LEAST_GAIN * _TOTAL)
        self.work = 0
        self.table_S: IntArray | None = None

    def run(self) -> bool:
        """Whether all was looked at."""
        count_NE = _every_count(tuple(bool(a == b) for a, b in itertools.pairwise(self.share_E.tolist())), self.slots)
        each_NE = np.rint(self.share_E * self.unit / count_NE).astype(np.int64)
        first = np.argsort(each_NE.max(axis=1), kind="stable")
        count_NE, each_NE = count_NE[first], each_NE[first]
        ways = len(_ways(self.slots - 1, self.room - 1)) + (len(_ways(self.slots - 1, self.room)) if self.more else 0)
        step = max(1, _CHUNK // max(ways, 1))
        step, at = min(step, 64), 0  # a small part first: it may bring down the best map known
        while at < len(count_NE):
            part = slice(at, at + step)
            if not self._counts(count_NE[part], each_NE[part]):
                return False
            at, step = at + step, max(1, _CHUNK // max(ways, 1))
        return True

    def _counts(self, count_NE: IntArray, each_NE: IntArray) -> bool:
        fits = each_NE.max(axis=1) <= self.most
        count_NE, each_NE = count_NE[fits], each_NE[fits]
        if not len(count_NE):
            return True
        flat = np.repeat(np.tile(np.arange(count_NE.shape[1]), len(count_NE)), count_NE.ravel())
        expert_NS = flat.reshape(-1, self.slots)
        load_NS = np.take_along_axis(each_NE, expert_NS, axis=1)
        order_NS = np.argsort(-load_NS, axis=1, kind="stable")
        heavy_NS, sorted_NS = (np.take_along_axis(a, order_NS, axis=1) for a in (expert_NS, load_NS))
        nothing = np.empty((len(load_NS), 0), np.int64)
        return self._fill(sorted_NS, heavy_NS, nothing, nothing.sum(axis=1), self.ranks, self.more)

    def _fill(
        self, load_NS: IntArray, expert_NS: IntArray, placed_NS: IntArray, worst_N: IntArray, ranks: int, more: int
    ) -> bool:
        """Fill one rank in every way, then the others. placed_NS: experts of the ranks before, `room` + 1 to a rank;
        worst_N: the largest load of those ranks."""
        total_N = load_NS.sum(axis=1)
        for room in (self.room, self.room + 1):
            left = more - int(room > self.room)
            if left < 0 or left > ranks - 1 or room == 0 or (room == self.room and more == ranks):
                continue
            way_MQ = _ways(load_NS.shape[1] - 1, room - 1)
            step = max(1, _CHUNK // len(way_MQ))
            for at in range(0, len(load_NS), step):
                load, expert, placed, worst = (a[at : at + step] for a in (load_NS, expert_NS, placed_NS, worst_N))
                self.work += len(load) * len(way_MQ)
                if self.work > _MOST_WORK:
                    return False
                here_NM = np.repeat(load[:, :1], len(way_MQ), axis=1)
                for q in range(room - 1):
                    here_NM += load[:, way_MQ[:, q]]
                there_NM = total_N[at : at + step, None] - here_NM
                if ranks == 2:
                    worst_NM = np.maximum(np.maximum(here_NM, there_NM), worst[:, None])
                    best = int(worst_NM.argmin())
                    if worst_NM.ravel()[best] <= self.most:
                        state, way = divmod(best, len(way_MQ))
                        self.most = int(worst_NM[state, way]) - int(_LEAST_GAIN * _TOTAL)
                        self._found(expert[state], placed[state], way_MQ[way])
                    continue
                n, m = np.nonzero((here_NM <= self.most) & (there_NM <= (ranks - 1) * self.most))
                fuller = np.maximum(worst[n], here_NM[n, m])
                if len(n) and not self._deeper(load, expert, placed, fuller, way_MQ, n, m, ranks, left):
                    return False
        return True

    def _deeper(
        self, load_NS: IntArray, expert_NS: IntArray, placed_NS: IntArray, fuller: IntArray, way_MQ: IntArray,
        n: IntArray, m: IntArray, ranks: int, more: int,
    ) -> bool:  # fmt: skip
        """The other ranks, with the ways m of states n; fuller: the largest rank load of each so far."""
        rest_MS = _others(load_NS.shape[1], way_MQ)
        step = max(1, _CHUNK // 50)
        for at in range(0, len(n), step):
            state, way = n[at : at + step], m[at : at + step]
            mine = np.full((len(state), self.room + 1), EMPTY, np.int64)
            mine[:, 0] = expert_NS[state, 0]
            mine[:, 1 : way_MQ.shape[1] + 1] = np.take_along_axis(expert_NS[state], way_MQ[way], axis=1)
            load, expert = (np.take_along_axis(a[state], rest_MS[way], axis=1) for a in (load_NS, expert_NS))
            placed = np.concatenate([placed_NS[state], mine], axis=1)
            if not self._fill(load, expert, placed, fuller[at : at + step], ranks - 1, more):
                return False
        return True

    def _found(self, expert_S: IntArray, placed_S: IntArray, way_Q: IntArray) -> None:
        """A better map: note it."""
        here = [0, *way_Q.tolist()]
        there = [i for i in range(len(expert_S)) if i not in here]
        width = self.room + 1
        rank_lists = [[e for e in row if e != EMPTY] for row in placed_S.reshape(-1, width).tolist()]
        rank_lists += [expert_S[here].tolist(), expert_S[there].tolist()]
        room = -(-self.slots // self.ranks)
        table = np.full((self.ranks, room), EMPTY, np.int64)
        for rank, experts in enumerate(rank_lists):
            table[rank, : len(experts)] = np.sort(self.order[experts])
        self.table_S = table.ravel()


@cache
def _ways(items: int, chosen: int) -> IntArray:
    """All choices of `chosen` of the items 1 .. items: [M, chosen]."""
    if chosen < 0 or chosen > items:
        return np.empty((0, max(chosen, 0)), np.int64)
    every = list(itertools.combinations(range(1, items + 1), chosen))
    return np.array(every, np.int64).reshape(len(every), chosen)


def _others(items: int, way_MQ: IntArray) -> IntArray:
    """The items that are neither 0 nor chosen, in order: [M, items - 1 - Q]."""
    free_MI = np.ones((len(way_MQ), items), bool)
    free_MI[:, 0] = False
    np.put_along_axis(free_MI, way_MQ, False, axis=1)
    return np.nonzero(free_MI)[1].reshape(len(way_MQ), -1)


@cache
def _every_count(alike: tuple[bool, ...], slots: int) -> IntArray:
    """Replica counts [N, E] with `slots` copies; of experts alike (an expert and the next), the first has no fewer."""
    experts, found = len(alike) + 1, []
    for given in itertools.combinations_with_replacement(range(experts), slots - experts):
        count = [1] * experts
        for expert in given:
            count[expert] += 1
        if all(count[i] >= count[i + 1] for i, same in enumerate(alike) if same):
            found.append(count)
    return np.array(found, np.int64)
