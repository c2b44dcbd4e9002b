"""What a run with tiers found: hit rates, bytes, stalls, and how far from the best that any policy could have done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from moesim.arrays import AnyArray, IntArray
from moesim.cost.offload_setup import Offload, RankPlan
from moesim.cost.offloaded import COUNTERS, KINDS, OffloadDetail, OffloadedPricer
from moesim.cost.pricer import Run
from moesim.hardware import GRADES
from moesim.offload import Proof, fast
from moesim.offload.cache import ExpertCache
from moesim.offload.compression import stored_LE
from moesim.offload.eviction.belady import Policy as Belady
from moesim.offload.future import Future
from moesim.offload.stacks import hits_by_slots
from moesim.scenario.load import Scenario
from moesim.tiers.links import LANES, REASONS
from moesim.tiers.records import PARTS

__all__ = ["cache_figures", "hit_bounds"]


def cache_figures(
    scenario: Scenario, offload: Offload, pricers: list[OffloadedPricer], runs: list[Run]
) -> dict[str, Any]:
    """The `cache` part of a result. runs: all steps that ran, of all groups."""
    details = [cast(OffloadDetail, run.detail) for run in runs]
    count = dict(zip(COUNTERS, np.sum([d.counters for d in details], axis=0).tolist(), strict=True))
    moved = np.sum([d.moved for d in details], axis=0)
    part_ns = np.sum([d.part_ns for d in details], axis=0)
    busy_ns = np.sum([d.busy_ns for d in details], axis=0) / len(offload.ranks)
    total_ns = max(sum(int(run.cumulative_ns[-1]) for run in runs), 1)
    tokens = max(sum(run.key.total_decode + run.key.total_prefill for run in runs), 1)
    stall_ns = int(part_ns[PARTS.index("stall")])
    return {
        "policies": {key: scenario.policies.kinds[key] for key in _FAMILIES if key in scenario.policies.kinds},
        "learned_from": offload.learned_from or None,
        "convention": _convention(scenario),
        **_found(scenario, count),
        "bytes": _bytes(moved * offload.ranks_behind),
        "bytes_per_token": {
            lane: float(moved[number].sum()) * offload.ranks_behind / tokens for number, lane in enumerate(LANES)
        },
        "link_busy_share": {lane: float(busy_ns[number]) / total_ns for number, lane in enumerate(LANES)},
        "stall_ms_per_token": stall_ns / tokens / 1e6,
        "stall_ms_per_step": stall_ns / max(len(runs), 1) / 1e6,
        "prefetch": _prefetch(count, moved * offload.ranks_behind),
        "evictions": count["evictions"],
        "upgrades": count["upgrades"],
        "rerouted": count["rerouted"],
        "fetch": {
            "ms": float(offload.fetch.ns) / 1e6,
            "bytes": int(max(rank.context.size_LE.max() for rank in offload.ranks)),
            "grade": GRADES[int(offload.fetch.grade)],
        },
        "slots": _slots(offload),
        "bound": _bound(scenario, offload, pricers, total_ns - stall_ns, total_ns),
        "proof": {
            "offload": _proof([rank.plan.proof for rank in offload.ranks]),
            "precision": _proof([rank.compressed.proof for rank in offload.ranks]),
        },
    }


_FAMILIES = ("offload", "eviction", "prefetch", "precision", "rebatching", "rerouting")


def _convention(scenario: Scenario) -> str:
    """In which sense a hit is one."""
    assert scenario.tiers is not None
    cold = "is a miss" if scenario.tiers.cold == "miss" else "is a hit"
    return (
        "one look-up a pass, layer and expert that any of its tokens takes; a hit is there when it is asked for; a "
        f"first touch into free room {cold}"
    )


def _found(scenario: Scenario, count: dict[str, int]) -> dict[str, Any]:
    assert scenario.tiers is not None
    asked = sum(count[name] for name in ("hits", "late", "loads", "streams", "on_cpu"))
    rows = sum(count[name] for name in ("hit_rows", "late_rows", "miss_rows", "cpu_rows"))
    cold = count["cold"] if scenario.tiers.cold == "hit" else 0
    return {
        "look_ups": asked,
        "hit_rate": _share(count["hits"] + cold, asked),
        "found": {
            "hit": count["hits"], "late": count["late"], "load": count["loads"], "stream": count["streams"],
            "cpu": count["on_cpu"],
        },
        "cold": count["cold"],
        "rows": rows,
        "hit_rate_rows": _share(count["hit_rows"], rows),
        "cpu_share_rows": _share(count["cpu_rows"], rows),
        "experts_per_look_up": _share(asked, count["calls"]),
    }  # fmt: skip


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _bytes(moved_XR: IntArray) -> dict[str, dict[str, int]]:
    """By link and reason."""
    return {lane: {reason: int(moved_XR[x, r]) for r, reason in enumerate(REASONS)} for x, lane in enumerate(LANES)}


def _prefetch(count: dict[str, int], moved_XR: IntArray) -> dict[str, Any] | None:
    """None where nothing was asked for ahead. accuracy: of what was not given up."""
    asked, used, given_up = count["prefetched"], count["prefetched_used"], count["cancelled"]
    if not asked:
        return None
    return {
        "asked": asked,
        "used": used,
        "cancelled": given_up,
        "accuracy": _share(used, asked - given_up),
        "wasted_share": _share(asked - given_up - used, asked - given_up),
        "bytes": int(moved_XR[:, REASONS.index("prefetch")].sum()),
    }


def _slots(offload: Offload) -> dict[str, float]:
    """Experts on the device of a rank: for good, and places in its cache at the mean size, a layer on average. Only
    experts with weights of their own count: merged and gone ones take no place."""
    rank = offload.ranks[0]
    layers = rank.context.num_layers
    own_LE = stored_LE(rank.compressed)
    size = float(rank.context.size_LE[own_LE].mean())
    return {
        "experts_per_layer": float(own_LE.sum()) / layers,
        "fixed_per_layer": float((rank.plan.fixed_LE & own_LE).sum()) / layers,
        "cache_per_layer": 0.0 if rank.plan.paged else float(rank.plan.capacity_G.sum()) / size / layers,
    }


def _proof(proofs: Sequence[Proof | None]) -> dict[str, float | str] | None:
    """Of the rank with the widest gap; None where the policy says nothing of how good its answer is."""
    said = [proof for proof in proofs if proof is not None]
    if not said:
        return None
    worst = max(said, key=lambda proof: proof.gap)
    return {
        "of": worst.of, "objective": worst.objective, "bound": worst.bound, "gap": worst.gap, "status": worst.status,
        "solver_units": worst.solver_units,
    }  # fmt: skip


# ---- bounds


def _bound(
    scenario: Scenario, offload: Offload, pricers: list[OffloadedPricer], compute_ns: int, total_ns: int
) -> dict[str, Any] | None:
    """Belady's MIN on the run's own look-ups, the most that any cache could find of them, and the time that computing
    takes or the transfers that the latter needs, whichever is longer. None where no cache was looked up in."""
    if offload.plan.paged or not any(rank.plan.capacity_G.sum() for rank in offload.ranks):
        return None
    hits = np.zeros(2, np.int64)
    asked = missed = 0
    transfer_ns = 0.0
    rates, behind = offload.rates, offload.ranks_behind
    for pricer in pricers:
        needed_R = []
        for one, log in zip(offload.ranks, pricer.logs, strict=True):
            found, needed, number = hit_bounds(one, log.table)
            hits, asked = hits + found, asked + number
            needed_R.append(math.floor(needed * _least_copy(one)))
        missed += sum(needed_R) * behind
        # each rank has a link of its own; all of them share the memory of at most so many domains
        transfer_ns += max(max(needed_R) / rates.to_device, sum(needed_R) / (rates.host * rates.domains))
    if not asked:
        return None
    best_ns = max(float(compute_ns), transfer_ns)
    return {
        "look_ups": asked,
        "min": float(hits[0]) / asked,
        "min_bypass": float(hits[1]) / asked,
        "bytes": missed,
        "compute_s": compute_ns / 1e9,
        "transfer_s": transfer_ns / 1e9,
        "time_over_bound": total_ns / best_ns if best_ns else None,
    }


def _least_copy(rank: RankPlan) -> float:
    """Bytes of the smallest copy that a miss may fetch over those of the stored one, so that a bound stays one."""
    bits = float(rank.compressed.bits_LE[stored_LE(rank.compressed)].max())
    return min([1.0, *(fewer / bits for _, fewer in rank.compressed.miss_bits)])


def hit_bounds(rank: RankPlan, table: AnyArray) -> tuple[IntArray, int, int]:
    """Hits [2] on the look-ups of one rank (experts that the CPU computed apart), bytes that the second one fetches,
    and look-ups. First: MIN, in a cache that keeps what a call found until it is over. Second: the most that any cache
    of the capacity finds, whatever misses do (`stacks.hits_by_slots`, policy `bound`); MIN with bypass where a call
    asks for one expert, a little more where it asks for several. Caches start as the plan's did. First touches into
    free room count as in the run (`tiers.cold`); they are fetched either way. table: of a `LookUpLog`.
    """
    asked = table[table[:, 3] != KINDS.index("cpu")]
    key_N = asked[:, 2].astype(np.int64)
    new_N = np.ones(len(asked), bool)
    new_N[1:] = (asked[1:, :2] != asked[:-1, :2]).any(axis=1)
    call_N = np.cumsum(new_N) - 1
    size_K = rank.context.size_K
    there = rank.plan.initial_LE & ~rank.plan.fixed_LE & stored_LE(rank.compressed)
    used = np.unique(np.concatenate([key_N, np.flatnonzero(there.reshape(-1))]))
    sizes = np.unique(size_K[used])  # experts without weights of their own are never asked for
    if len(sizes) > 1:
        return _replayed(rank, key_N, call_N)
    size = int(sizes[0]) if len(sizes) else 1
    fixed_N = rank.plan.fixed_LE.reshape(-1)[key_N]
    group_N = rank.context.group_K[key_N]
    hits, cold = np.full(2, int(fixed_N.sum()), np.int64), 0
    for group, capacity in enumerate(rank.plan.capacity_G.tolist()):
        mine = (group_N == group) & ~fixed_N
        look_ups, before = _look_ups(rank, group, key_N[mine], call_N[mine])
        hits[0] += int(fast.found(look_ups, capacity // size, "opt")[before:].sum())
        hits[1] += int(hits_by_slots(look_ups, "bound", [capacity // size])[0])  # none of the first calls can hit
        new = np.unique(look_ups.id_N[before:])
        cold += min(capacity // size - before, len(new) - int(np.isin(new, look_ups.id_N[:before]).sum()))
    needed = (len(asked) - int(hits[1])) * size
    return hits + (cold if rank.context.semantics.cold == "hit" else 0), needed, len(asked)


def _look_ups(rank: RankPlan, group: int, key_N: IntArray, call_N: IntArray) -> tuple[fast.LookUps, int]:
    """Those of one group, after one call for each expert that is in its cache at the start; how many these are."""
    context, plan = rank.context, rank.plan
    own_LE = stored_LE(rank.compressed)
    there = (plan.initial_LE & ~plan.fixed_LE & own_LE).reshape(-1) & (context.group_K == group)
    start = np.flatnonzero(there)
    first = 0 if context.semantics.pooled else group * context.num_experts
    ids = np.concatenate([start, key_N]) - first
    call = np.concatenate([np.arange(len(start)), call_N + len(start)])
    begins = np.flatnonzero(np.diff(call, prepend=-1))
    call_C = np.append(begins, len(ids)).astype(np.int64)
    experts = context.num_keys if context.semantics.pooled else context.num_experts
    return fast.LookUps(ids.astype(np.uint16), call_C, np.array([0, len(begins)], np.int64), experts), len(start)


def _replayed(rank: RankPlan, key_N: IntArray, call_N: IntArray) -> tuple[IntArray, int, int]:
    """The same for experts of several sizes, look-up by look-up: MIN, and MIN with bypass (where neither is a bound in
    the strict sense)."""
    context, plan = rank.context, rank.plan
    size: list[int] = context.size_K.tolist()
    ends = np.flatnonzero(np.diff(call_N, append=-1)) + 1
    calls = [part.tolist() for part in np.split(key_N, ends[:-1])] if len(key_N) else []
    future = Future(calls, context.num_keys)
    fixed_K = plan.fixed_LE.reshape(-1)
    hits, needed = np.zeros(2, np.int64), 0
    cold_hits = context.semantics.cold == "hit"
    for number, bypass in enumerate((False, True)):
        eviction = Belady().start(replace(context, upcoming=future))
        cache = ExpertCache(context.size_K, context.group_K, plan.capacity_G, eviction, bypass)
        cache.fix(np.flatnonzero(fixed_K).tolist())
        cache.place(np.flatnonzero(plan.initial_LE.reshape(-1) & ~fixed_K).tolist())
        needed = 0
        for keys in calls:
            for one in cache.look_up(keys):
                hits[number] += one.kind == "hit" or (cold_hits and one.cold)
                needed += 0 if one.kind == "hit" else size[one.key]
            cache.release()
    return hits, needed, len(key_N)
