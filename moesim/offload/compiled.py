"""Cache cores compiled by numba, one thread each, without the interpreter's lock; imported where numba is there.

Every kernel plays the look-ups of one cache: `id_N` (uint16) in order, parted into calls by `call_C` (look-up `n`
belongs to call c where call_C[c] <= n < call_C[c+1]) and into windows by `cut_W` (in calls): each window starts with an
empty cache. `fast` and `stacks` say what they mean and hold the same in plain Python. Compiled code is kept beside this
file, else in the user's cache folder; where neither can be written each process compiles anew.

The universe of a cache is small (the experts of a layer, or of all layers), so nothing here is a tree or a heap: who
leaves is the least of an array of keys, found by vector instructions, and a key says whose it is: the look-up `n` in
it is of that expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = [
    "bare",
    "bound_hist",
    "calls",
    "lfu_each",
    "lru_each",
    "lru_hist",
    "next_use",
    "opt_each",
    "opt_hist",
    "ranked_hist",
]

NEVER32 = np.int32(2147483647)
LAST64 = np.int64(9223372036854775807)
LRU, LFU, OPT, RANDOM = 0, 1, 2, 3
"""Policies of `calls`."""

_OPTIONS: Any = {"nogil": True, "error_model": "numpy"}


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile at the first call, releasing the interpreter's lock; kept on disk where a folder can be written."""
    try:
        ready: Callable[..., None] = numba.njit(cache=True, **_OPTIONS)(function)
    except (RuntimeError, OSError):  # no folder for the cache
        ready = numba.njit(**_OPTIONS)(function)
    return ready


def _inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a kernel."""
    part: Callable[..., Any] = numba.njit(inline="always", **_OPTIONS)(function)
    return part


@_inline
def _least(key: Any, block: Any) -> Any:
    part = key[block * 64 : block * 64 + 64]
    least = LAST64
    for e in range(len(part)):  # from 0 on, so that it becomes vector instructions
        least = min(least, part[e])
    return least


@_inline
def _most(key: Any, block: Any) -> Any:
    part = key[block * 64 : block * 64 + 64]
    most = np.int32(-1)
    for e in range(len(part)):
        most = max(most, part[e])
    return most


@_compiled
def bare(id_N: Any, out_E: Any) -> None:
    """Counts look-ups by expert: the yardstick of speed."""
    for n in range(len(id_N)):
        out_E[id_N[n]] += 1


@_compiled
def next_use(id_N: Any, call_C: Any, cut_W: Any, experts: Any, next_N: Any) -> None:
    """For each look-up the number of the next one of the same expert in its window; len(id_N) + expert: none."""
    size = len(id_N)
    at = np.empty(experts, np.int32)
    for w in range(len(cut_W) - 1):
        for e in range(experts):
            at[e] = size + e
        for n in range(call_C[cut_W[w + 1]] - 1, call_C[cut_W[w]] - 1, -1):
            x = id_N[n]
            next_N[n] = at[x]
            at[x] = n


# ---- one size, look-ups one by one


@_compiled
def lru_each(id_N: Any, cut_W: Any, slots: Any, experts: Any, hit_N: Any) -> None:
    """Who is there was used at `oldest` or later: `oldest` walks along the look-ups, past those that were not the last
    of their expert, and is the last use of who leaves."""
    last = np.empty(experts, np.int32)
    for w in range(len(cut_W) - 1):
        last[:] = -1
        used = 0
        oldest = cut_W[w]
        for n in range(cut_W[w], cut_W[w + 1]):
            x = id_N[n]
            if last[x] >= oldest:
                hit_N[n] = 1
            elif used < slots:
                used += 1
            else:
                while last[id_N[oldest]] != oldest:
                    oldest += 1
                oldest += 1
            last[x] = n


@_compiled
def lfu_each(id_N: Any, cut_W: Any, slots: Any, experts: Any, residents: Any, bypass: Any, hit_N: Any) -> None:
    """key: uses, then the last look-up; least_B: the least of each 64 of them. residents: an expert that
    enters has been used once."""
    blocks = (experts + 63) // 64
    key = np.empty(experts, np.int64)
    least_B = np.empty(blocks, np.int64)
    uses = np.empty(experts, np.int64)
    for w in range(len(cut_W) - 1):
        key[:] = LAST64
        least_B[:] = LAST64
        uses[:] = 0
        used = 0
        for n in range(cut_W[w], cut_W[w + 1]):
            x = np.int64(id_N[n])
            b = x >> 6
            old = key[x]
            uses[x] = 1 if residents and old == LAST64 else uses[x] + 1
            mine = (uses[x] << 32) | n
            if old != LAST64:
                hit_N[n] = 1
                key[x] = mine
                if least_B[b] == old:
                    least_B[b] = _least(key, b)
                continue
            if used < slots:
                used += 1
            else:
                least = LAST64
                for i in range(blocks):
                    least = min(least, least_B[i])
                if bypass and mine < least:
                    continue
                victim = np.int64(id_N[least & 0xFFFFFFFF])
                key[victim] = LAST64
                least_B[victim >> 6] = _least(key, victim >> 6)
            key[x] = mine
            least_B[b] = min(least_B[b], mine)


@_compiled
def opt_each(id_N: Any, cut_W: Any, next_N: Any, slots: Any, experts: Any, bypass: Any, hit_N: Any) -> None:
    """Belady 1966: who is needed last leaves. key: the next look-up of who is there; most_B: the last of each 64."""
    size = len(id_N)
    blocks = (experts + 63) // 64
    key = np.empty(experts, np.int32)
    most_B = np.empty(blocks, np.int32)
    for w in range(len(cut_W) - 1):
        key[:] = -1
        most_B[:] = -1
        used = 0
        for n in range(cut_W[w], cut_W[w + 1]):
            x = np.int64(id_N[n])
            mine = next_N[n]
            if key[x] >= 0:
                hit_N[n] = 1
            elif used < slots:
                used += 1
            else:
                most = np.int32(-1)
                for i in range(blocks):
                    most = max(most, most_B[i])
                if bypass and mine > most:
                    continue
                victim = np.int64(most - size if most >= size else id_N[most])
                key[victim] = -1
                most_B[victim >> 6] = _most(key, victim >> 6)
            key[x] = mine
            most_B[x >> 6] = max(most_B[x >> 6], mine)


# ---- one size, calls


@_inline
def _key(policy: Any, x: Any, n: Any, uses: Any, rank_N: Any) -> Any:
    """Worth of an expert after look-up `n` of it. Whose it is stands in the low 16 bits, for LFU the look-up in 32."""
    if policy == LFU:
        return (uses << 32) | n
    if policy == OPT:
        return (np.int64(rank_N[n]) << 16) | x
    return (np.int64(n) << 16) | x


@_inline
def _drawn(key: Any, held: Any, slots: Any, draw: Any) -> Any:
    """Any of those that may leave, in the order of slots; -1: none may."""
    free = 0
    for s in range(slots):
        free += key[held[s]] != LAST64
    pick = int(draw * free)
    for s in range(slots):
        if key[held[s]] != LAST64:
            if pick == 0:
                return held[s]
            pick -= 1
    return np.int64(-1)


@_inline
def _victim(policy: Any, key: Any, id_N: Any, mine: Any, bypass: Any) -> Any:
    """Who leaves for one worth `mine`; -1: nobody may, or nobody should."""
    least = LAST64
    for e in range(len(key)):
        least = min(least, key[e])
    if least == LAST64:
        return np.int64(-1)
    if policy == LFU:
        return np.int64(-1) if bypass and mine < least else np.int64(id_N[least & 0xFFFFFFFF])
    if bypass and policy == OPT and mine >> 16 <= least >> 16:
        return np.int64(-1)
    return least & 0xFFFF


@_inline
def _by_worth(policy: Any, turn: Any, worth: Any, many: Any) -> None:
    """Sort the first `many` of `turn`, the worthiest first; of equals the first that was asked for."""
    drop = 16 if policy == OPT else 0
    for i in range(1, many):
        n, mine = turn[i], worth[i]
        j = i - 1
        while j >= 0 and worth[j] >> drop < mine >> drop:
            turn[j + 1], worth[j + 1] = turn[j], worth[j]
            j -= 1
        turn[j + 1], worth[j + 1] = n, mine


@_compiled
def calls(
    id_N: Any, call_C: Any, cut_W: Any, rank_N: Any, draw_N: Any, slots: Any, experts: Any, policy: Any, residents: Any,
    bypass: Any, pinned: Any, hit_N: Any,
) -> None:  # fmt: skip
    """All of a call are judged against the state at its start (`fast.found`). rank_N: of OPT, how early an expert is
    needed again after this look-up (0: never), by calls where pinned, else by look-ups. draw_N: of random. The key of
    who may not leave is LAST64; so is that of who is absent."""
    key = np.empty(experts, np.int64)
    uses = np.empty(experts, np.int64)
    slot = np.empty(experts, np.int64)
    held = np.empty(experts, np.int64)
    turn = np.empty(experts, np.int64)
    worth = np.empty(experts, np.int64)
    for w in range(len(cut_W) - 1):
        key[:] = LAST64
        uses[:] = 0
        slot[:] = -1
        used = 0
        for c in range(cut_W[w], cut_W[w + 1]):
            first, end = call_C[c], call_C[c + 1]
            many = busy = 0
            for n in range(first, end):
                x = np.int64(id_N[n])
                hit_N[n] = slot[x] >= 0
                if hit_N[n] and pinned:
                    key[x] = LAST64
                    busy += 1
                uses[x] = 1 if residents and not hit_N[n] else uses[x] + 1
                if not (hit_N[n] and pinned):
                    turn[many] = n
                    worth[many] = _key(policy, x, n, uses[x], rank_N)
                    many += 1
            if pinned and bypass and (policy in (LFU, OPT)):
                _by_worth(policy, turn, worth, many)
            for i in range(many):
                n = turn[i]
                x = np.int64(id_N[n])
                if slot[x] < 0:
                    if used < slots:
                        slot[x] = used
                        used += 1
                    else:
                        if policy == RANDOM and busy == 0:
                            victim = held[int(draw_N[n] * slots)]
                        elif policy == RANDOM:
                            victim = _drawn(key, held, slots, draw_N[n])
                        else:
                            victim = _victim(policy, key, id_N, worth[i], bypass)
                        if victim < 0:  # it passes through a staging buffer
                            continue
                        slot[x] = slot[victim]
                        slot[victim] = -1
                        key[victim] = LAST64
                    held[slot[x]] = x
                    if residents:
                        uses[x] = 1
                    busy += pinned
                if not pinned:
                    key[x] = _key(policy, x, n, uses[x], rank_N)
            for n in range(first, end):
                x = np.int64(id_N[n])
                if pinned and slot[x] >= 0:
                    key[x] = _key(policy, x, n, uses[x], rank_N)


# ---- every size in one pass


@_compiled
def lru_hist(id_N: Any, call_C: Any, cut_W: Any, weight_N: Any, experts: Any, out_E: Any) -> None:
    """Look-ups by stack distance (Mattson et al. 1970): how many experts were used since an expert's last use. bits_B
    has a bit for each look-up that is the last of its expert, 64 a word; many_B says how many are in a word."""
    weighted = len(weight_N) > 0
    one, all_ones = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
    last = np.empty(experts, np.int32)
    bits_B = np.zeros(len(id_N) // 64 + 1, np.uint64)
    many_B = np.zeros(len(id_N) // 64 + 1, np.int32)
    for w in range(len(cut_W) - 1):
        start = call_C[cut_W[w]]
        last[:] = -1
        bits_B[start >> 6 : (call_C[cut_W[w + 1]] >> 6) + 1] = 0
        many_B[start >> 6 : (call_C[cut_W[w + 1]] >> 6) + 1] = 0
        for c in range(cut_W[w], cut_W[w + 1]):
            first, end = call_C[c], call_C[c + 1]
            word = (first - 1) >> 6  # of the newest look-up that has been served
            for n in range(first, end):
                time = last[id_N[n]]
                if time >= 0:
                    at = time >> 6
                    v = bits_B[at] & (all_ones << np.uint64(time & 63) << one)
                    v -= (v >> one) & np.uint64(0x5555555555555555)
                    v = (v & np.uint64(0x3333333333333333)) + ((v >> np.uint64(2)) & np.uint64(0x3333333333333333))
                    v = (v + (v >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
                    deep = np.int32((v * np.uint64(0x0101010101010101)) >> np.uint64(56))
                    for i in range(at + 1, word + 1):
                        deep = np.int32(deep + many_B[i])
                    out_E[deep] += weight_N[n] if weighted else 1
            for n in range(first, end):
                x = id_N[n]
                time = last[x]
                if time >= 0:
                    bits_B[time >> 6] &= ~(one << np.uint64(time & 63))
                    many_B[time >> 6] -= 1
                bits_B[n >> 6] |= one << np.uint64(n & 63)
                many_B[n >> 6] += 1
                last[x] = n


@_compiled
def opt_hist(
    id_N: Any, call_C: Any, cut_W: Any, next_N: Any, weight_N: Any, experts: Any, bypass: Any, out_E: Any
) -> None:
    """Mattson's priority stack for MIN. It holds next look-ups; whose next is `n` is the expert of look-up n."""
    weighted = len(weight_N) > 0
    stack = np.empty(experts + 1, np.int32)
    for w in range(len(cut_W) - 1):
        depth = 0
        for c in range(cut_W[w], cut_W[w + 1]):
            first, last = call_C[c], call_C[c + 1]
            alone = last - first == 1
            if not alone:
                for i in range(depth):
                    n = stack[i]
                    if n < last:
                        out_E[i] += weight_N[n] if weighted else 1
            for n in range(first, last):
                stack[depth] = n
                i = 0
                carry = next_N[n]
                if not bypass and stack[0] != n:
                    carry, stack[0] = stack[0], carry
                    i = 1
                while stack[i] != n:
                    here = stack[i]
                    stack[i] = min(here, carry)
                    carry = max(here, carry)
                    i += 1
                stack[i] = carry
                if i == depth:
                    depth += 1
                elif alone:
                    out_E[i] += weight_N[n] if weighted else 1


@_compiled
def bound_hist(id_N: Any, call_C: Any, cut_W: Any, next_N: Any, weight_N: Any, experts: Any, out_E: Any) -> None:
    """As `opt_hist` with bypass, but a call's experts that are there get their new next look-ups before any other
    enters, so a cache keeps the best of what it has and what the call brings."""
    weighted = len(weight_N) > 0
    stack = np.empty(experts + 1, np.int32)
    for w in range(len(cut_W) - 1):
        depth = 0
        for c in range(cut_W[w], cut_W[w + 1]):
            first, last = call_C[c], call_C[c + 1]
            for i in range(depth):
                n = stack[i]
                if n < last:
                    out_E[i] += weight_N[n] if weighted else 1
                    stack[i] = next_N[n]
            for n in range(first, last):
                mine = next_N[n]
                stack[depth] = mine
                i = 0
                carry = mine
                while stack[i] != mine:
                    here = stack[i]
                    stack[i] = min(here, carry)
                    carry = max(here, carry)
                    i += 1
                stack[i] = carry
                depth += i == depth


@_compiled
def ranked_hist(
    id_N: Any, call_C: Any, cut_W: Any, weight_N: Any, experts: Any, ahead: Any, bypass: Any, out_E: Any
) -> None:
    """A priority stack by uses, then recency. ahead 0: uses so far (LFU). ahead m: uses in the m calls from this one
    on, those of this call that have been served left out (SCH of arXiv 2505.16056)."""
    weighted = len(weight_N) > 0
    one = np.int64(1) << 32
    rank = np.empty(experts, np.int64)
    stack = np.empty(experts + 1, np.int64)
    place = np.empty(experts, np.int64)
    seen = np.empty(experts, np.bool_)
    for w in range(len(cut_W) - 1):
        depth = 0
        rank[:] = 0
        seen[:] = False
        for n in range(call_C[cut_W[w]], call_C[min(cut_W[w] + ahead, cut_W[w + 1])]):
            rank[id_N[n]] += one
        for c in range(cut_W[w], cut_W[w + 1]):
            first, last = call_C[c], call_C[c + 1]
            alone = last - first == 1
            if not alone:
                for i in range(depth):
                    place[stack[i]] = i
                for n in range(first, last):
                    if seen[id_N[n]]:
                        out_E[place[id_N[n]]] += weight_N[n] if weighted else 1
            for n in range(first, last):
                x = np.int64(id_N[n])
                stack[depth] = x
                uses = (rank[x] >> 32) + (1 if ahead == 0 else -1)
                rank[x] = (uses << 32) | n
                i = 0
                carry = x
                if not bypass and stack[0] != x:
                    carry, stack[0] = stack[0], x
                    i = 1
                worth = rank[carry]
                while stack[i] != x:
                    here = stack[i]
                    other = rank[here]
                    if other < worth:
                        stack[i] = carry
                        carry, worth = here, other
                    i += 1
                stack[i] = carry
                if i == depth:
                    depth += 1
                    seen[x] = True
                elif alone:
                    out_E[i] += weight_N[n] if weighted else 1
            if ahead > 0 and c + ahead < cut_W[w + 1]:
                for n in range(call_C[c + ahead], call_C[c + ahead + 1]):
                    rank[id_N[n]] += one
