"""What a cache of one size finds of a whole trace, fast: the policies of `eviction/` on experts of one size.

`moesim.offload.replay` asks the policies themselves, look-up by look-up, and is the reference; this is the same in a
form that numba compiles (`compiled`, where it is installed and the trace is long) or, with the same results, in plain
Python. `stacks` has every size in one pass, `conventions` cuts recorded routes into look-ups.

Legend: N look-ups, C calls (ends of them: call_C has one more), W windows (likewise), E experts that share the cache.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim.errors import BadInput
from moesim.optional import compiled
from moesim.rng import generator

__all__ = ["MOST_EXPERTS", "Counts", "LookUps", "OnePolicy", "compiled_for", "first_uses", "found", "next_uses"]

OnePolicy = Literal["lru", "lfu", "opt", "random"]
Counts = Literal["all", "resident"]

MOST_EXPERTS = 1 << 16
"""of one cache: keys hold an expert in 16 bits"""
_COMPILED_LOOK_UPS = 1 << 12
"""Shorter traces are not worth an import of numba."""
_CODE = {"lru": 0, "lfu": 1, "opt": 2, "random": 3}


@dataclass(frozen=True, slots=True)
class LookUps:
    """The look-ups of one cache.

    id_N: experts 0 .. experts - 1, uint16, in order; within a call each stands once. call_C: where calls begin, and the
    end, int64. cut_W: the calls at which the cache starts anew, 0 first, and the number of calls, int64. weight_N: what
    a look-up counts for, int64; None: one.
    """

    id_N: NDArray[np.uint16]
    call_C: IntArray
    cut_W: IntArray
    experts: int
    weight_N: IntArray | None = None

    @property
    def longest(self) -> int:
        """Look-ups of the longest call."""
        return int(np.diff(self.call_C).max(initial=0))

    @property
    def total(self) -> int:
        """What all look-ups count for."""
        return len(self.id_N) if self.weight_N is None else int(self.weight_N.sum())

    @property
    def window_N(self) -> IntArray:
        """The window of each look-up."""
        return np.repeat(np.arange(len(self.cut_W) - 1), np.diff(self.call_C[self.cut_W]))

    def weighed(self, hit_N: BoolArray) -> int:
        """What the look-ups count for that a mask names."""
        return int(hit_N.sum()) if self.weight_N is None else int(self.weight_N[hit_N].sum())


def compiled_for(look_ups: int) -> Any:
    """The module `compiled` where it is there, wanted (MOESIM_COMPILED is not 0) and worth it, else None."""
    if look_ups < _COMPILED_LOOK_UPS:
        return None
    return compiled("moesim.offload.compiled")


def next_uses(look_ups: LookUps) -> NDArray[np.int32]:
    """For each look-up the number of the next one of the same expert in its window, int32 [N]; N + expert: none."""
    id_N, size = look_ups.id_N, len(look_ups.id_N)
    next_N = np.empty(size, np.int32)
    if (fast := compiled_for(size)) is not None:
        fast.next_use(id_N, look_ups.call_C, look_ups.cut_W, look_ups.experts, next_N)
        return next_N
    group_N = look_ups.window_N * look_ups.experts + id_N
    order = np.argsort(group_N, kind="stable")
    same = group_N[order[1:]] == group_N[order[:-1]]
    next_N[order] = size + id_N[order].astype(np.int32)
    next_N[order[:-1][same]] = order[1:][same]
    return next_N


def first_uses(look_ups: LookUps, next_N: NDArray[np.int32] | None = None) -> BoolArray:
    """Which look-ups are the first of their expert in their window, bool [N]."""
    next_N = next_uses(look_ups) if next_N is None else next_N
    first_N = np.ones(len(next_N), bool)
    first_N[next_N[next_N < len(next_N)]] = False
    return first_N


def found(
    look_ups: LookUps,
    slots: int,
    policy: OnePolicy,
    *,
    bypass: bool = False,
    pinned: bool = True,
    counts: Counts = "all",
    seed: int = 0,
    next_N: NDArray[np.int32] | None = None,
) -> BoolArray:
    """Which look-ups find their expert in a cache of `slots`, bool [N]; all of a call are judged against the state at
    its start, and first touches are misses.

    policy: `lru`, `lfu`, `random` (any of those that may leave, drawn from `seed`) or `opt` (Belady, IBM Systems
    Journal 5(2), 1966). bypass: a miss enters only where it is worth more than who would leave (lfu, opt; others always
    prefer the newcomer). pinned: nobody leaves whom the running call asked for (`cache.ExpertCache`: they compute); a
    miss that finds nobody else passes through a staging buffer. Not pinned: misses enter one by one and may push each
    other out (moe-lrc). counts: of lfu, all uses, or those since the expert entered. next_N: of these look-ups
    (`next_uses`), where it is known already. Raises BadInput for negative slots.
    """
    if slots < 0:
        raise BadInput(f"a cache has no less than 0 slots, got {slots}")
    size = len(look_ups.id_N)
    hit_N = np.zeros(size, np.uint8)
    if slots == 0 or size == 0:
        return hit_N.view(bool)
    if policy == "opt" and next_N is None:
        next_N = next_uses(look_ups)
    alone = look_ups.longest <= 1
    draw_N = generator(seed, "offload/random", slots).random(size) if policy == "random" else np.empty(0)
    rules = _Rules(slots, _CODE[policy], counts == "resident" and policy == "lfu", bypass, pinned)
    fast = compiled_for(size)
    if fast is not None and alone and policy != "random":
        _each(fast, look_ups, rules, next_N, hit_N)
        return hit_N.view(bool)
    rank_N = _ranks(look_ups, next_N, pinned and not alone) if next_N is not None else np.empty(0, np.int64)
    if fast is None:
        _plain(look_ups, rules, rank_N.tolist(), draw_N, hit_N)
    else:
        fast.calls(
            look_ups.id_N, look_ups.call_C, look_ups.cut_W, rank_N, draw_N, slots, look_ups.experts, rules.policy,
            rules.resident, bypass, pinned, hit_N,
        )  # fmt: skip
    return hit_N.view(bool)


@dataclass(frozen=True, slots=True)
class _Rules:
    slots: int
    policy: int
    resident: bool
    bypass: bool
    pinned: bool


def _ranks(look_ups: LookUps, next_N: NDArray[np.int32], by_calls: bool) -> IntArray:
    """How early an expert is needed again after a look-up, 0: never; by calls, or by look-ups."""
    size = len(next_N)
    if not by_calls:
        return np.maximum(size - next_N.astype(np.int64), 0)
    call_N = np.repeat(np.arange(len(look_ups.call_C) - 1), np.diff(look_ups.call_C))
    return np.where(next_N < size, len(look_ups.call_C) - call_N[np.minimum(next_N, size - 1)], 0)


def _each(
    fast: Any, look_ups: LookUps, rules: _Rules, next_N: NDArray[np.int32] | None, hit_N: NDArray[np.uint8]
) -> None:
    """Look-ups one by one."""
    id_N, cut_W, slots, experts = look_ups.id_N, look_ups.call_C[look_ups.cut_W], rules.slots, look_ups.experts
    if rules.policy == _CODE["lru"]:
        fast.lru_each(id_N, cut_W, slots, experts, hit_N)
    elif rules.policy == _CODE["lfu"]:
        fast.lfu_each(id_N, cut_W, slots, experts, rules.resident, rules.bypass, hit_N)
    else:
        fast.opt_each(id_N, cut_W, next_N, slots, experts, rules.bypass, hit_N)


# ---- in plain Python


class _Cache:
    """The state of `compiled.calls`, by names."""

    def __init__(self, rules: _Rules, ids: list[int], rank: list[int], draw: FloatArray) -> None:
        self.rules, self.ids, self.rank, self.draw = rules, ids, rank, draw
        self.worth: dict[int, tuple[int, int]] = {}
        """of who may leave: (what the policy goes by, what breaks a tie)"""
        self.slot: dict[int, int] = {}
        self.held: list[int] = []
        self.uses: dict[int, int] = {}

    def key(self, n: int) -> tuple[int, int]:
        """Worth of an expert after look-up n of it."""
        x = self.ids[n]
        if self.rules.policy == _CODE["lfu"]:
            return self.uses[x], n
        return (self.rank[n], x) if self.rules.policy == _CODE["opt"] else (n, 0)

    def beats(self, mine: tuple[int, int], least: tuple[int, int]) -> bool:
        """Whether a miss is worth more than who would leave."""
        if not self.rules.bypass or self.rules.policy in (_CODE["lru"], _CODE["random"]):
            return True
        return mine > least if self.rules.policy == _CODE["lfu"] else mine[0] > least[0]

    def victim(self, mine: tuple[int, int], n: int) -> int | None:
        if not self.worth:
            return None
        if self.rules.policy == _CODE["random"]:
            free = [x for x in self.held if x in self.worth]
            return free[int(self.draw[n] * len(free))]
        victim = min(self.worth, key=self.worth.__getitem__)
        return victim if self.beats(mine, self.worth[victim]) else None

    def enter(self, n: int, mine: tuple[int, int]) -> None:
        """A miss gets room, or passes through."""
        x = self.ids[n]
        if len(self.held) < self.rules.slots:
            self.slot[x] = len(self.held)
            self.held.append(x)
        else:
            victim = self.victim(mine, n)
            if victim is None:
                return
            self.slot[x] = self.slot.pop(victim)
            self.held[self.slot[x]] = x
            del self.worth[victim]
        if self.rules.resident:
            self.uses[x] = 1

    def call(self, first: int, end: int, hit_N: AnyArray) -> None:
        pinned, resident = self.rules.pinned, self.rules.resident
        turn: list[tuple[tuple[int, int], int]] = []
        for n in range(first, end):
            x = self.ids[n]
            there = x in self.slot
            hit_N[n] = there
            if there and pinned:
                self.worth.pop(x, None)
            self.uses[x] = 1 if resident and not there else self.uses.get(x, 0) + 1
            if not (there and pinned):
                turn.append((self.key(n), n))
        if pinned and self.rules.bypass and self.rules.policy == _CODE["lfu"]:
            turn.sort(key=lambda one: one[0], reverse=True)
        elif pinned and self.rules.bypass and self.rules.policy == _CODE["opt"]:
            turn.sort(key=lambda one: one[0][0], reverse=True)
        for mine, n in turn:
            x = self.ids[n]
            if x not in self.slot:
                self.enter(n, mine)
            if not pinned and x in self.slot:
                self.worth[x] = self.key(n)
        for n in range(first, end):
            if pinned and self.ids[n] in self.slot:
                self.worth[self.ids[n]] = self.key(n)


def _plain(look_ups: LookUps, rules: _Rules, rank: list[int], draw_N: FloatArray, hit_N: NDArray[np.uint8]) -> None:
    ids, call, cut = look_ups.id_N.tolist(), look_ups.call_C.tolist(), look_ups.cut_W.tolist()
    for start, stop in itertools.pairwise(cut):
        cache = _Cache(rules, ids, rank, draw_N)
        for c in range(start, stop):
            cache.call(call[c], call[c + 1], hit_N)
