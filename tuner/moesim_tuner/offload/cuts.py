"""A bound on what resident experts can reach where misses that come together cost less than one by one: minimum cuts.

Where a layer's time is concave over missing experts, sum_s h(missing_s) is a sum of terms a * min(missing_s, k), a > 0,
and who is missing at a price for a byte of memory is a minimum cut (a term is a node: cutting it off costs a * k,
leaving it a for each missing expert; Kolmogorov and Zabih, "What energy functions can be minimized via graph cuts?",
PAMI 26, 2004). Cuts of all layers at one price are a Lagrangian bound, exact for h. h is the concave function below the
layer's real time that is highest where the steps of the set at hand are.

Legend: S steps, E experts, A active, M missing, X distinct sets of active experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim.errors import BadInput

__all__ = ["Layer", "concave_below", "cut_bound", "layer_of"]

_MOST_ARCS = 3_000_000
_PRICES = 6
_SCALE = float(1 << 44)


@dataclass(frozen=True, slots=True)
class Layer:
    """active_XE: distinct sets of experts that steps take; share_X: of the steps; h_AM: concave for each A that occurs;
    size_E: bytes."""

    active_XE: BoolArray
    share_X: FloatArray
    h_AM: FloatArray
    size_E: IntArray

    def terms(self) -> list[tuple[IntArray, FloatArray, int]]:
        """(sets, weight of each, k) of each a * min(missing, k)."""
        active_X = self.active_XE.sum(axis=1)
        out = []
        for active in np.unique(active_X[active_X > 1]).tolist():
            sets = np.flatnonzero(active_X == active)
            bend = -np.diff(self.h_AM[active, : active + 1], n=2)
            top = max(float(np.abs(self.h_AM[active, : active + 1]).max()), 1e-30)
            kinks = (np.flatnonzero(bend > 1e-9 * top) + 1).tolist()
            out += [(sets, self.share_X[sets] * bend[k - 1], k) for k in kinks]
        return out

    def arcs(self) -> int:
        """How many a cut needs."""
        active_X = self.active_XE.sum(axis=1)
        return sum(int(active_X[sets].sum()) + len(sets) for sets, _, _ in self.terms())


def layer_of(active_SE: BoolArray, h_AM: FloatArray, size_E: IntArray) -> Layer:
    """Steps that take the same experts count together."""
    packed, first, times = np.unique(np.packbits(active_SE, axis=1), axis=0, return_index=True, return_counts=True)
    assert len(packed) == len(first)
    return Layer(active_SE[first], times / len(active_SE), h_AM, size_E)


def concave_below(ns_M: FloatArray, weight_M: FloatArray) -> FloatArray:
    """The concave function [M + 1] that is nowhere above `ns_M` and highest by the weights: a linear programme."""
    from scipy.optimize import linprog

    number = len(ns_M)
    if number <= 2:
        return ns_M.copy()
    bends = np.zeros((number - 2, number))
    at = np.arange(number - 2)
    bends[at, at], bends[at, at + 1], bends[at, at + 2] = 1.0, -2.0, 1.0
    top = max(float(np.abs(ns_M).max()), 1e-30)
    weight_M = weight_M / max(float(weight_M.sum()), 1e-30) + 1e-4
    answer = linprog(-weight_M, bends, np.zeros(number - 2), bounds=[(None, ns / top) for ns in ns_M])
    assert answer.x is not None, "a line below all is always one"
    found = np.minimum(answer.x * top, ns_M)
    return np.asarray(_made_concave(found))


def _made_concave(h_M: FloatArray) -> FloatArray:
    """Take off what rounding left convex: slopes that do not rise, never above."""
    slope = np.minimum.accumulate(np.diff(h_M))
    out = np.concatenate([h_M[:1], h_M[0] + np.cumsum(slope)])
    return out - max(0.0, float((out - h_M).max()))


def cut_bound(layers: list[Layer], capacity: int, price: float) -> float:
    """The greatest Lagrangian bound of a few prices of a byte, from `price` on; -inf where everything fits, or graphs
    are too large. Raises BadInput without OR-Tools."""
    if sum(layer.arcs() for layer in layers) > _MOST_ARCS:
        return -np.inf
    need = sum(int(layer.size_E.sum()) for layer in layers) - capacity
    if need <= 0:
        return -np.inf
    best, low, high = -np.inf, (0.0, 0.0, 0.0), (np.inf, 0.0, 0.0)
    for _ in range(_PRICES):
        value, gone = 0.0, 0
        for layer in layers:
            least, missing_E = _least(layer, price)
            value += least
            gone += int(layer.size_E[missing_E].sum())
        value += price * need
        best = max(best, value)
        rise = float(need - gone)  # of the bound with the price
        if rise == 0:
            break
        low, high = ((price, value, rise), high) if rise > 0 else (low, (price, value, rise))
        if np.isinf(high[0]):
            price *= 1.5
        elif low[2] == 0.0:
            price *= 0.7
        else:  # where the two lines meet
            price = (high[1] - low[1] + low[2] * low[0] - high[2] * high[0]) / (low[2] - high[2])
    return best


def _least(layer: Layer, price: float) -> tuple[float, BoolArray]:
    """min over sets of missing experts of mean h - price * bytes missing, a little below for rounding, and the set."""
    active_X = layer.active_XE.sum(axis=1)
    last_A = np.zeros(len(layer.h_AM))
    for active in np.unique(active_X[active_X > 0]).tolist():
        last_A[active] = layer.h_AM[active, active] - layer.h_AM[active, active - 1]
    still = float((layer.share_X * layer.h_AM[active_X, 0]).sum())
    cost_E = (layer.share_X * last_A[active_X]) @ layer.active_XE - price * layer.size_E
    scale = _SCALE / max(float(np.abs(cost_E).sum()), still, 1e-30)
    solver = _max_flow()
    experts = np.arange(len(cost_E)) + 2
    gain_E, loss_E = np.ceil(np.maximum(-cost_E, 0) * scale), np.floor(np.maximum(cost_E, 0) * scale)
    _add(solver, np.zeros_like(experts), experts, gain_E)
    _add(solver, experts, np.ones_like(experts), loss_E)
    node = len(cost_E) + 2
    for sets, weight, k in layer.terms():
        unit = np.floor(weight * scale)
        row, expert = np.nonzero(layer.active_XE[sets])
        _add(solver, experts[expert], node + row, unit[row])
        _add(solver, node + np.arange(len(sets)), np.ones(len(sets), np.int64), unit * k)
        node += len(sets)
    status = solver.solve(0, 1)
    assert status == solver.OPTIMAL, f"a flow with whole capacities ends with {status}"
    cut = float(solver.optimal_flow())
    missing_E = np.zeros(len(cost_E), bool)
    side = np.asarray(solver.get_source_side_min_cut(), np.int64)
    missing_E[side[(side >= 2) & (side < len(cost_E) + 2)] - 2] = True
    return still + (cut - float(gain_E.sum())) / scale, missing_E


def _add(solver: Any, start: IntArray, end: IntArray, capacity: FloatArray) -> None:
    some = capacity > 0
    solver.add_arcs_with_capacity(start[some], end[some], capacity[some].astype(np.int64))


def _max_flow() -> Any:
    try:
        from ortools.graph.python import max_flow
    except ImportError as error:
        raise BadInput(
            f"offload split_ilp needs OR-Tools, which cannot be imported ({error}). Install it with pip install"
            " 'moesim[tuner]', or use expert_split."
        ) from error
    return max_flow.SimpleMaxFlow()
