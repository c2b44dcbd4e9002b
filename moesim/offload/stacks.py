"""What a cache of every size finds, in one pass: stack algorithms (Mattson, Gecsei, Slutz, Traiger, IBM Systems Journal
9(2), 1970), and how many slots each layer should get.

A policy is a *stack* where a larger cache always holds what a smaller one does. Then one stack, kept over a trace, has
the content of the cache of c slots in its first c places, and a look-up that finds its expert in place d is a hit for
every c > d. LRU is one; so is every policy that ranks experts by something that does not depend on the size, with or
without bypass: LFU over all uses, MIN, and moe-lrc's segment cache. Where calls of several look-ups keep their own
experts in place (`pinned`), inclusion does not hold, except for LRU with slots enough for the longest call; then each
size is played by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import IntArray
from moesim.errors import BadInput
from moesim.offload.fast import Counts, LookUps, OnePolicy, compiled_for, first_uses, found, next_uses

__all__ = ["CurvePolicy", "best_split_of_slots", "cold_by_slots", "hits_by_slots", "is_stack"]

CurvePolicy = Literal["lru", "lfu", "opt", "random", "segment", "bound"]


def is_stack(look_ups: LookUps, policy: CurvePolicy, *, pinned: bool, counts: Counts = "all") -> bool:
    """Whether one pass gives every size exactly (LRU: every size that holds the longest call)."""
    if policy in ("lru", "segment", "bound"):
        return True
    return (policy == "opt" or (policy == "lfu" and counts == "all")) and (not pinned or look_ups.longest <= 1)


def hits_by_slots(
    look_ups: LookUps,
    policy: CurvePolicy,
    sizes: Sequence[int] | None = None,
    *,
    bypass: bool = False,
    pinned: bool = True,
    counts: Counts = "all",
    ahead: int = 1,
    seed: int = 0,
) -> IntArray:
    """What the hits count for in a cache of each of `sizes` (None: 0 .. experts), int64; first touches are misses.

    Keywords as in `fast.found`. policy `segment`: SCH(m) of moe-lrc (arXiv:2505.16056, `41_sch_calc.py`): who has the
    fewest uses in the `ahead` calls from this one on leaves, then the least recent one; never pinned. policy `bound`:
    after a call the cache keeps, of what it had and what the call brought, those that are needed first. No cache that
    fetches on demand hits more, whatever its rules, because it can keep nothing else; for calls of one look-up it is
    MIN with bypass. Raises BadInput where `ahead` is less than 1.
    """
    if ahead < 1:
        raise BadInput(f"a segment has at least one call, got {ahead}")
    wanted_S = np.arange(look_ups.experts + 1) if sizes is None else np.array(sizes, np.int64)
    if wanted_S.size and wanted_S.min() < 0:
        raise BadInput(f"a cache has no less than 0 slots, got {wanted_S.min()}")
    next_N = next_uses(look_ups) if policy in ("opt", "bound") else None
    out_S = np.zeros(len(wanted_S), np.int64)
    alone_S = np.ones(len(wanted_S), bool)
    if is_stack(look_ups, policy, pinned=pinned, counts=counts):
        hist_E = _histogram(look_ups, policy, next_N, bypass, ahead)
        total_C = np.concatenate([[0], np.cumsum(hist_E)])
        out_S = total_C[np.minimum(wanted_S, look_ups.experts)]
        alone_S = wanted_S < look_ups.longest if policy == "lru" and pinned and look_ups.longest > 1 else ~alone_S
    for s in np.flatnonzero(alone_S):
        one: OnePolicy = policy  # type: ignore[assignment]  # `segment` and `bound` are stacks always
        hit_N = found(
            look_ups, int(wanted_S[s]), one, bypass=bypass, pinned=pinned, counts=counts, seed=seed, next_N=next_N
        )
        out_S[s] = look_ups.weighed(hit_N)
    return out_S


def cold_by_slots(look_ups: LookUps) -> IntArray:
    """What first touches into free room count for, by slots 0 .. experts, int64 [E + 1]: of c slots the first c experts
    of a window find room, whatever the policy."""
    first_N = np.flatnonzero(first_uses(look_ups))
    window = look_ups.window_N[first_N]
    start_W = np.searchsorted(window, np.arange(len(look_ups.cut_W) - 1))
    place = np.arange(len(first_N)) - start_W[window]
    weight = None if look_ups.weight_N is None else look_ups.weight_N[first_N].astype(np.float64)
    new_E = np.bincount(place, weight, minlength=look_ups.experts).astype(np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(new_E)])


def _histogram(
    look_ups: LookUps, policy: CurvePolicy, next_N: NDArray[np.int32] | None, bypass: bool, ahead: int
) -> IntArray:
    """Look-ups by the place in the stack where they find their expert, int64 [E]."""
    out_E = np.zeros(look_ups.experts, np.int64)
    id_N, call_C, cut_W, experts = look_ups.id_N, look_ups.call_C, look_ups.cut_W, look_ups.experts
    weight_N = np.empty(0, np.int64) if look_ups.weight_N is None else look_ups.weight_N
    fast = compiled_for(len(id_N))
    if fast is None:
        return _plain(look_ups, policy, next_N, bypass, ahead, out_E)
    if policy == "lru":
        fast.lru_hist(id_N, call_C, cut_W, weight_N, experts, out_E)
    elif policy == "opt":
        fast.opt_hist(id_N, call_C, cut_W, next_N, weight_N, experts, bypass, out_E)
    elif policy == "bound":
        fast.bound_hist(id_N, call_C, cut_W, next_N, weight_N, experts, out_E)
    else:
        fast.ranked_hist(id_N, call_C, cut_W, weight_N, experts, ahead if policy == "segment" else 0, bypass, out_E)
    return out_E


# ---- in plain Python


def _plain(
    look_ups: LookUps, policy: CurvePolicy, next_N: NDArray[np.int32] | None, bypass: bool, ahead: int, out_E: IntArray
) -> IntArray:
    """One stack of experts; `worth` says who stays above whom, the greater one (of LRU the newest: nobody moves but who
    is asked for)."""
    ids, call, cut = look_ups.id_N.tolist(), look_ups.call_C.tolist(), look_ups.cut_W.tolist()
    weight = [1] * len(ids) if look_ups.weight_N is None else look_ups.weight_N.tolist()
    nexts = [] if next_N is None else next_N.tolist()
    for start, stop in itertools.pairwise(cut):
        stack: list[int] = []
        worth: dict[int, tuple[int, int]] = {}
        if policy == "segment":
            _add_uses(worth, ids[call[start] : call[min(start + ahead, stop)]])
        for c in range(start, stop):
            where = {x: i for i, x in enumerate(stack)} if call[c + 1] - call[c] > 1 else None
            for n in range(call[c], call[c + 1]):
                x = ids[n]
                place = where.get(x) if where is not None else (stack.index(x) if x in stack else None)
                if place is not None:
                    out_E[place] += weight[n]
            if policy == "bound":
                worth.update((ids[n], (-nexts[n], 0)) for n in range(call[c], call[c + 1]))
            for n in range(call[c], call[c + 1]):
                x = ids[n]
                if policy in ("opt", "bound"):
                    worth[x] = (-nexts[n], 0)
                elif policy == "lru":
                    worth[x] = (n, 0)
                else:
                    worth[x] = (worth.get(x, (0, 0))[0] + (-1 if policy == "segment" else 1), n)
                _use(stack, worth, x, policy == "bound" or (bypass and policy != "lru"))
            if policy == "segment" and c + ahead < stop:
                _add_uses(worth, ids[call[c + ahead] : call[c + ahead + 1]])
    return out_E


def _add_uses(worth: dict[int, tuple[int, int]], ids: list[int]) -> None:
    for x in ids:
        uses, last = worth.get(x, (0, 0))
        worth[x] = (uses + 1, last)


def _use(stack: list[int], worth: dict[int, tuple[int, int]], x: int, bypass: bool) -> None:
    """`x` goes to the top, or with bypass where its worth puts it; of two that meet the lesser one moves down."""
    place = stack.index(x) if x in stack else len(stack)
    if place == len(stack):
        stack.append(x)
    carry, first = x, 0
    if not bypass and place:
        carry, stack[0], first = stack[0], x, 1
    for i in range(first, place):
        if worth[stack[i]] < worth[carry]:
            stack[i], carry = carry, stack[i]
    stack[place] = carry if place or bypass else x


# ---- slots for layers


def best_split_of_slots(hits_GC: IntArray, total: int, least: int = 0) -> tuple[IntArray, int]:
    """How many of `total` slots each of G caches gets so that their hits are most, and the hits: int64 [G].

    hits_GC: hits by slots 0 .. C - 1 of each cache, growing. least: slots that each must have. Slots that no cache can
    use stay with none. Marginal gains are taken greedily, which is exact where every curve is concave (Fox, Operations
    Research 14(2), 1966); else by dynamic programming over caches. Of equal splits the first caches get more. Raises
    BadInput where `total` is less than G * least, or `least` more than the curves have.
    """
    hits_GC = np.asarray(hits_GC, np.int64)
    groups, width = hits_GC.shape
    if not 0 <= least < width or total < groups * least:
        raise BadInput(
            f"every cache must get its least slots: {groups} caches, at least {least} each, {total} in all, curves up"
            f" to {width - 1}. Give more slots or ask for a smaller least."
        )
    total = min(total, groups * (width - 1))
    gain_GC = np.diff(hits_GC[:, least:], axis=1)
    if (np.diff(gain_GC, axis=1) <= 0).all():
        order = np.argsort(-gain_GC.ravel(), kind="stable")[: total - groups * least]
        slots_G = least + np.bincount(order // max(gain_GC.shape[1], 1), minlength=groups)
    else:
        slots_G = _exact_split(hits_GC, total, least)
    return slots_G.astype(np.int64), int(hits_GC[np.arange(groups), slots_G].sum())


def _exact_split(hits_GC: IntArray, total: int, least: int) -> IntArray:
    """best[s]: most hits of the caches from g on with s slots; the choice of each is kept."""
    groups, width = hits_GC.shape
    best_S = np.zeros(total + 1, np.int64)
    choice_GS = np.zeros((groups, total + 1), np.int64)
    for g in range(groups - 1, -1, -1):
        new_S = np.full(total + 1, -1, np.int64)
        for c in range(width - 1, least - 1, -1):  # of equal ones the most slots here
            value_S = np.where(best_S[: total + 1 - c] >= 0, best_S[: total + 1 - c] + hits_GC[g, c], -1)
            better_S = value_S > new_S[c:]
            new_S[c:][better_S] = value_S[better_S]
            choice_GS[g, c:][better_S] = c
        best_S = new_S
    slots_G, left = np.zeros(groups, np.int64), total
    for g in range(groups):
        slots_G[g] = choice_GS[g, left]
        left -= slots_G[g]
    return slots_G
