"""Which experts stay on the device so that the expected step is shortest, with a bound that holds for any set.

min sum_l mean_s ns[active_sl, missing_sl] within a number of bytes: a layer's time depends on how many of a step's
experts are missing *together*, so the popular ones are not all that counts. Where a layer has few experts, every set of
them is an option, and the multiple-choice knapsack over layers (`moesim_tuner.knapsack`) is exact. Else a layer's
options are the prefixes of three orders (by use; each next one what it saves most beside those before; the reverse of
each next one what is missed least), and the bound is that of the relaxation in which experts may stay by parts and a
layer's time is the convex envelope over missing experts; Frank and Wolfe's steps find it, and any step's is a bound.

Legend: L layers, S steps, E experts, B options, A active, M missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim_tuner.knapsack import Choices, choose
from moesim_tuner.solving import Part, part_of

__all__ = ["Problem", "Resident", "expected_ns", "solve"]

_EVERY_SET = 8
"""experts of a layer up to which all its sets are options"""
_ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """active_LSE: experts that a step takes. ns_AM: time of a layer. size_LE: bytes. capacity: of all that stay."""

    active_LSE: BoolArray
    ns_AM: FloatArray
    size_LE: IntArray
    capacity: int


class Resident(NamedTuple):
    """stays_LE: on the device. part: the expected ns of all layers' experts in a step, and what is proven of it; parts:
    the bound over any sets, and the knapsack over the sets that were options (None: all of them were)."""

    stays_LE: BoolArray
    part: Part
    options: Part | None


def expected_ns(problem: Problem, stays_LE: BoolArray) -> float:
    """Of all layers' experts in a step, mean over the steps."""
    total = 0.0
    for layer, active_SE in enumerate(problem.active_LSE):
        active_S = active_SE.sum(axis=1)
        missing_S = active_S - (active_SE & stays_LE[layer]).sum(axis=1)
        total += float(problem.ns_AM[active_S, missing_S].mean())
    return total


def solve(problem: Problem, tolerance: float, deterministic_time: float) -> Resident:
    """The best of the options, and a bound for any set."""
    experts = problem.size_LE.shape[1]
    few = experts <= _EVERY_SET
    sets = [_every_set(experts)] * len(problem.size_LE) if few else [
        _prefixes(problem, layer) for layer in range(len(problem.size_LE))
    ]  # fmt: skip
    cost_LB = np.stack([_mean_ns(problem, layer, sets_BE) for layer, sets_BE in enumerate(sets)])
    size_LB = np.stack([sets_BE @ problem.size_LE[layer] for layer, sets_BE in enumerate(sets)])
    option_L, part = choose(Choices(cost_LB, size_LB, problem.capacity), "sets", tolerance, deterministic_time)
    assert option_L is not None, "nothing at all on the device always fits"
    stays_LE = np.stack([sets_BE[b] for sets_BE, b in zip(sets, option_L.tolist(), strict=True)])
    if few:
        return Resident(stays_LE, part, None)
    bound = _envelope_bound(problem, stays_LE)
    whole = part_of("any sets", part.objective, bound, "feasible", part.units)
    return Resident(stays_LE, whole if whole.status == "optimal" else whole, part)


# ---- options of a layer


def _every_set(experts: int) -> BoolArray:
    """All 2^E sets, bool [B, E]."""
    return ((np.arange(1 << experts)[:, None] >> np.arange(experts)) & 1).astype(bool)


def _prefixes(problem: Problem, layer: int) -> BoolArray:
    """Prefixes of the three orders, bool [B, E]."""
    active_SE, size_E = problem.active_LSE[layer], problem.size_LE[layer]
    used = active_SE.sum(axis=0) / size_E
    orders = (np.argsort(-used, kind="stable"), _forward(problem, layer), _backward(problem, layer))
    experts = len(size_E)
    sets = np.zeros((3, experts + 1, experts), bool)
    for number, order in enumerate(orders):
        place_E = np.empty(experts, np.int64)
        place_E[order] = np.arange(experts)
        sets[number] = place_E[None, :] < np.arange(experts + 1)[:, None]
    return sets.reshape(-1, experts)


def _forward(problem: Problem, layer: int) -> IntArray:
    """Experts in the order in which each next one saves most a byte beside those before it."""
    active_SE, size_E = problem.active_LSE[layer], problem.size_LE[layer]
    weigh_SE, active_S = active_SE.astype(np.float32), active_SE.sum(axis=1)
    missing_S, left_E = active_S.copy(), np.ones(len(size_E), bool)
    order = np.empty(len(size_E), np.int64)
    for place in range(len(size_E)):
        saved_S = _ns(problem, active_S, missing_S) - _ns(problem, active_S, missing_S - 1)
        saved_E = (saved_S.astype(np.float32) @ weigh_SE) / size_E
        order[place] = best = int(np.where(left_E, saved_E, -np.inf).argmax())
        left_E[best] = False
        missing_S -= active_SE[:, best]
    return order


def _backward(problem: Problem, layer: int) -> IntArray:
    """The reverse of the order in which each next one to go is missed least for its bytes."""
    active_SE, size_E = problem.active_LSE[layer], problem.size_LE[layer]
    weigh_SE, active_S = active_SE.astype(np.float32), active_SE.sum(axis=1)
    missing_S, left_E = np.zeros_like(active_S), np.ones(len(size_E), bool)
    order = np.empty(len(size_E), np.int64)
    for place in range(len(size_E) - 1, -1, -1):
        costs_S = _ns(problem, active_S, missing_S + 1) - _ns(problem, active_S, missing_S)
        costs_E = (costs_S.astype(np.float32) @ weigh_SE) / size_E
        order[place] = least = int(np.where(left_E, costs_E, np.inf).argmin())
        left_E[least] = False
        missing_S += active_SE[:, least]
    return order


def _ns(problem: Problem, active_S: IntArray, missing_S: IntArray) -> FloatArray:
    """Of each step; where nothing is left to be missing, or to come back, the nearest."""
    return problem.ns_AM[active_S, np.clip(missing_S, 0, active_S)]


def _mean_ns(problem: Problem, layer: int, sets_BE: BoolArray) -> FloatArray:
    """Expected ns of a layer with each of its options, [B]."""
    active_SE = problem.active_LSE[layer]
    there_SB = active_SE.astype(np.float32) @ sets_BE.T.astype(np.float32)
    active_S = active_SE.sum(axis=1)
    missing_SB = active_S[:, None] - np.rint(there_SB).astype(np.int64)
    return np.asarray(problem.ns_AM[active_S[:, None], missing_SB].mean(axis=0))


# ---- a bound for any sets


def _envelope_bound(problem: Problem, stays_LE: BoolArray) -> float:
    """The greatest lower bound that Frank and Wolfe's steps came to, from the set that was found."""
    slope_AM = _envelope(problem.ns_AM)
    active_LS = problem.active_LSE.sum(axis=2)
    weigh_LSE = problem.active_LSE.astype(np.float32)
    gone_LE = (~stays_LE).astype(np.float64)
    best = 0.0
    for number in range(_ROUNDS):
        missing_LS = np.einsum("lse,le->ls", weigh_LSE, gone_LE.astype(np.float32)).astype(np.float64)
        missing_LS = np.minimum(missing_LS, active_LS)
        # a supporting line of each step's envelope: value there, and slope
        value, slope_LS = _support(slope_AM, problem.ns_AM[:, 0], active_LS, missing_LS)
        rise_LE = np.einsum("ls,lse->le", slope_LS.astype(np.float32), weigh_LSE).astype(np.float64)
        rise_LE /= active_LS.shape[1]
        line = value - float((slope_LS * missing_LS).mean(axis=1).sum())
        vertex_LE, cost = _cheapest_to_go(rise_LE, problem.size_LE, problem.capacity)
        best = max(best, line + cost)
        gone_LE += 2.0 / (number + 2.0) * (vertex_LE - gone_LE)
    return best * (1 - 1e-6)  # sums are in single precision


def _envelope(ns_AM: FloatArray) -> FloatArray:
    """Slope of the lower convex envelope of each row between M - 1 and M missing, [A, M]; rows that do not occur: 0."""
    out = np.zeros(ns_AM.shape)
    for active in range(1, len(ns_AM)):
        if not np.isfinite(ns_AM[active, 0]):
            continue
        row, at = ns_AM[active, : active + 1], 0
        while at < active:
            rate = (row[at + 1 :] - row[at]) / np.arange(1, active - at + 1)
            to = at + 1 + int(len(rate) - 1 - rate[::-1].argmin())
            out[active, at + 1 : to + 1] = rate.min()
            at = to
    return out


def _support(
    slope_AM: FloatArray, start_A: FloatArray, active_LS: IntArray, missing_LS: FloatArray
) -> tuple[float, AnyArray]:
    """Sum over layers of the mean envelope at `missing`, and its slope there (of the two at a corner the right one)."""
    whole_LS = np.minimum(np.floor(missing_LS).astype(np.int64), np.maximum(active_LS - 1, 0))
    height_AM = start_A[:, None] + np.cumsum(slope_AM, axis=1)
    height_AM = np.concatenate([start_A[:, None], height_AM[:, 1:]], axis=1)
    slope_LS = slope_AM[active_LS, np.minimum(whole_LS + 1, slope_AM.shape[1] - 1)]
    slope_LS = np.where(active_LS > 0, slope_LS, 0.0)
    value_LS = height_AM[active_LS, whole_LS] + slope_LS * (missing_LS - whole_LS)
    return float(value_LS.mean(axis=1).sum()), slope_LS


def _cheapest_to_go(rise_LE: FloatArray, size_LE: IntArray, capacity: int) -> tuple[FloatArray, float]:
    """Who goes (by parts) where going costs `rise`, with at most `capacity` bytes left: the fractional knapsack. Its
    choice, [L, E], and what it costs."""
    rise, size = np.maximum(rise_LE, 0).reshape(-1), size_LE.reshape(-1)
    order = np.argsort(-rise / size, kind="stable")
    before = np.cumsum(size[order]) - size[order]
    stays = np.empty(len(size))
    stays[order] = np.clip((capacity - before) / size[order], 0.0, 1.0)
    gone = 1.0 - stays
    return gone.reshape(rise_LE.shape), float((gone * rise).sum() + np.minimum(rise_LE, 0).sum())
