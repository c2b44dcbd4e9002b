"""Which experts stay on the device so that the expected step is shortest, with a bound that holds for any set.

min sum_l mean_s ns[active_sl, missing_sl] within a number of bytes: a layer's time depends on how many of a step's
experts are missing *together*, so the popular ones are not all that counts. Where a layer has few experts, every set of
them is an option, and the multiple-choice knapsack over layers (`moesim_tuner.knapsack`) is exact. Else there are too
many sets: a layer's options are the prefixes of three orders (by use; each next expert the one that saves most beside
those before; the reverse of each next one to go being missed least), and the bound is the better of two. One is that of
the relaxation in which experts may stay by parts and a layer's time is its convex envelope over missing experts: Frank
and Wolfe's steps find it, and what any step finds is a bound. The other is by minimum cuts (`cuts`), for times that are
concave, where misses that come together cost less.

Legend: L layers, S steps, E experts, B options, A active, M missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim_tuner.knapsack import Choices, choose
from moesim_tuner.offload.cuts import concave_below, cut_bound, layer_of
from moesim_tuner.solving import Part, part_of, relative_gap

__all__ = ["Problem", "Resident", "expected_ns", "solve"]

_EVERY_SET = 8
"""experts of a layer up to which all its sets are options"""
_ROUNDS = 30


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
    few = problem.size_LE.shape[1] <= _EVERY_SET
    options = [(_every_set if few else _prefixes)(problem, layer) for layer in range(len(problem.size_LE))]
    sets = [sets_BE for sets_BE, _ in options]
    cost_LB = np.stack([cost_B for _, cost_B in options])
    size_LB = np.stack([sets_BE @ problem.size_LE[layer] for layer, sets_BE in enumerate(sets)])
    option_L, part = choose(Choices(cost_LB, size_LB, problem.capacity), "sets", tolerance, deterministic_time)
    assert option_L is not None, "nothing at all on the device always fits"
    stays_LE = np.stack([sets_BE[b] for sets_BE, b in zip(sets, option_L.tolist(), strict=True)])
    if few:
        return Resident(stays_LE, part, None)
    bound = _envelope_bound(problem, stays_LE)
    if relative_gap(part.objective, bound) > tolerance:
        bound = max(bound, _bound_by_cuts(problem, stays_LE, part.objective))
    return Resident(stays_LE, part_of("any sets", part.objective, bound, "too_large", part.units), part)


# ---- options of a layer


def _every_set(problem: Problem, layer: int) -> tuple[BoolArray, FloatArray]:
    """All 2^E sets, bool [B, E], and the layer's expected ns with each, [B]."""
    active_SE = problem.active_LSE[layer]
    experts = active_SE.shape[1]
    sets_BE = ((np.arange(1 << experts)[:, None] >> np.arange(experts)) & 1).astype(bool)
    taken, times = np.unique(active_SE @ (1 << np.arange(experts)), return_counts=True)  # what steps take, as numbers
    active_X = sets_BE[taken].sum(axis=1)
    missing_XB = (sets_BE[taken][:, None, :] & ~sets_BE[None, :, :]).sum(axis=2)
    return sets_BE, np.asarray(times @ problem.ns_AM[active_X[:, None], missing_XB] / len(active_SE))


def _prefixes(problem: Problem, layer: int) -> tuple[BoolArray, FloatArray]:
    """Prefixes of the three orders, bool [B, E], and the layer's expected ns with each, [B]."""
    size_E = problem.size_LE[layer]
    walk = _Walk(problem, layer)
    orders = [np.argsort(-walk.used_E / size_E, kind="stable"), walk.forward(), walk.backward()]
    sets_NBE = np.zeros((len(orders), len(size_E) + 1, len(size_E)), bool)
    for number, order in enumerate(orders):
        sets_NBE[number, :, order] = np.arange(len(size_E) + 1)[None, :] > np.arange(len(size_E))[:, None]
    cost_NB = [walk.along(order) for order in orders]
    return sets_NBE.reshape(-1, len(size_E)), np.concatenate(cost_NB)


class _Walk:
    """A layer whose experts come and go one at a time. Only steps that take an expert mind whether it is there, so an
    expert costs a look at those alone."""

    def __init__(self, problem: Problem, layer: int) -> None:
        active_SE = problem.active_LSE[layer]
        self._ns_AM, self._size_E = problem.ns_AM, problem.size_LE[layer]
        self._experts = active_SE.shape[1]
        self._active_S = active_SE.sum(axis=1)
        self.used_E = active_SE.sum(axis=0)
        """steps that take each expert"""
        of_expert, steps = np.nonzero(active_SE.T)
        self._steps_E = np.split(steps, np.searchsorted(of_expert, np.arange(1, self._experts)))
        # ids of each step, padded with the number of experts
        order = np.argsort(~active_SE, axis=1, kind="stable")[:, : int(self._active_S.max(initial=0))]
        self._ids_SA = np.where(np.arange(order.shape[1]) < self._active_S[:, None], order, self._experts)

    def along(self, order: IntArray) -> FloatArray:
        """Mean ns with the first 0, 1, ... experts of an order on the device, [E + 1]."""
        missing_S = self._active_S.copy()
        ns_S = self._ns(self._active_S, missing_S)
        out = np.empty(len(order) + 1)
        out[0] = ns_S.sum()
        for place, expert in enumerate(order.tolist()):
            steps = self._steps_E[expert]
            missing_S[steps] -= 1
            now = self._ns(self._active_S[steps], missing_S[steps])
            out[place + 1] = out[place] + (now - ns_S[steps]).sum()
            ns_S[steps] = now
        return out / max(len(ns_S), 1)

    def forward(self) -> IntArray:
        """Experts in the order in which each next one saves most a byte beside those before it."""
        return self._one_by_one(self._active_S.copy(), -1)

    def backward(self) -> IntArray:
        """The reverse of the order in which each next one to go is missed least for its bytes."""
        return self._one_by_one(np.zeros_like(self._active_S), 1)[::-1]

    def _one_by_one(self, missing_S: IntArray, change: int) -> IntArray:
        """Experts in the order in which one after the other comes (change -1) or goes (1), the one that then costs
        least for its bytes first."""
        cost_S = self._cost(slice(None), missing_S, change)
        cost_E = self._by_expert(slice(None), cost_S)
        left_E = np.ones(self._experts, bool)
        order = np.empty(self._experts, np.int64)
        for place in range(self._experts):
            order[place] = best = int(np.where(left_E, cost_E / self._size_E, np.inf).argmin())
            left_E[best] = False
            steps = self._steps_E[best]
            missing_S[steps] += change
            now = self._cost(steps, missing_S, change)
            cost_E += self._by_expert(steps, now - cost_S[steps])
            cost_S[steps] = now
        return order

    def _cost(self, at: IntArray | slice, missing_S: IntArray, change: int) -> FloatArray:
        """What one more that comes, or goes, costs each step that takes it."""
        active, missing = self._active_S[at], missing_S[at]
        return self._ns(active, missing + change) - self._ns(active, missing)

    def _by_expert(self, at: IntArray | slice, value: FloatArray) -> FloatArray:
        """Sum of the steps' values for each expert that they take, [E]."""
        ids = self._ids_SA[at]
        each = np.repeat(value, ids.shape[1])
        out = np.bincount(ids.reshape(-1), weights=each, minlength=self._experts + 1)[:-1]
        return out.astype(np.float64, copy=False)

    def _ns(self, active: IntArray, missing: IntArray) -> FloatArray:
        """Of each step; where nothing is left to be missing, or to come back, the nearest."""
        found: FloatArray = self._ns_AM[active, np.minimum(np.maximum(missing, 0), active)]
        return found


# ---- bounds for any sets


def _bound_by_cuts(problem: Problem, stays_LE: BoolArray, objective: float) -> float:
    """`cuts.cut_bound` with the functions that are highest where the steps of `stays` are."""
    active_LS = problem.active_LSE.sum(axis=2)
    missing_LS = active_LS - (problem.active_LSE & stays_LE[:, None, :]).sum(axis=2)
    h_AM = np.zeros(problem.ns_AM.shape)
    for active in np.unique(active_LS[active_LS > 0]).tolist():
        weight_M = np.bincount(missing_LS[active_LS == active], minlength=active + 1)
        h_AM[active, : active + 1] = concave_below(problem.ns_AM[active, : active + 1], weight_M.astype(np.float64))
    layers = [layer_of(a, h_AM, size) for a, size in zip(problem.active_LSE, problem.size_LE, strict=True)]
    still = float(problem.ns_AM[active_LS, 0].mean(axis=1).sum())
    gone = int(problem.size_LE[~stays_LE].sum())
    return cut_bound(layers, problem.capacity, (objective - still) / max(gone, 1))


def _envelope_bound(problem: Problem, stays_LE: BoolArray) -> float:
    """The greatest lower bound that Frank and Wolfe's steps came to, from the set that was found."""
    slope_AM = _envelope(problem.ns_AM)
    layers, steps, experts = problem.active_LSE.shape
    active_LS = problem.active_LSE.sum(axis=2)
    step_X, expert_X = np.nonzero(problem.active_LSE.reshape(-1, experts))  # step_X: numbered over all layers
    key_X = step_X // steps * experts + expert_X
    gone_LE = (~stays_LE).astype(np.float64)
    best = 0.0
    for number in range(_ROUNDS):
        missing = np.bincount(step_X, weights=gone_LE.reshape(-1)[key_X], minlength=layers * steps)
        missing_LS = np.minimum(missing.reshape(layers, steps), active_LS)
        # a supporting line of each step's envelope: value there, and slope
        value, slope_LS = _support(slope_AM, problem.ns_AM[:, 0], active_LS, missing_LS)
        rise = np.bincount(key_X, weights=slope_LS.reshape(-1)[step_X], minlength=layers * experts) / steps
        line = value - float((slope_LS * missing_LS).mean(axis=1).sum())
        vertex_LE, cost = _cheapest_to_go(rise.reshape(layers, experts), problem.size_LE, problem.capacity)
        best = max(best, line + cost)
        gone_LE += 2.0 / (number + 2.0) * (vertex_LE - gone_LE)
    return best


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
