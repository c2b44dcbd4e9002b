"""A proven lower bound of the largest over the mean rank load, so that a placement's gap to it is known.

Every slot holds an expert, an expert's replicas share its load evenly, ranks have S // G slots or one more. A value T
of the largest rank load is refuted by counting, for any replica counts and any packing:

1. An expert of load w needs m = ceil(w / T') replicas, T' = T less the least that its neighbours on a rank can weigh.
   More replicas than there are slots: refuted. What is left are `spare` ones, which any expert may have besides, so a
   replica weighs at least w / (m + spare).
2. Pigeonhole: of the j * G + 1 heaviest replicas j + 1 share a rank, with the lightest ones beside them.
3. Neighbours: replicas of which no two fit on a rank need S // G - 1 neighbours each, light enough to stand beside them
   (Hall's condition), and together weigh no more than T a rank.

The bound is the largest value refuted, found by bisection. Hierarchical maps: also the bound of whole groups on nodes.

Legend: L layers (or any rows), E experts, S slots, G ranks, I replicas in order of their weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.placement import check_weights

__all__ = ["balance_bound"]

_SLACK = 1e-9
"""relative; a value of T is refuted only by more than this, whatever was rounded"""
_STEPS = 40
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def balance_bound(weight_LE: Floats, slots: int, ranks: int, groups: int = 1, nodes: int = 1) -> Floats:
    """No map of `slots` filled slots on `ranks` ranks has a smaller max/mean rank load, [L] (1: nothing proven).

    groups, nodes: of hierarchical maps, where every group of consecutive experts lies on one of `nodes` equal nodes
    that hold equally many groups. Raises BadInput unless loads are loads.
    """
    weight_LE = check_weights(weight_LE)
    bound_L = np.ones(len(weight_LE))
    busy_L = weight_LE.max(axis=1, initial=0.0) > 0
    if not busy_L.any() or ranks == 1:
        return bound_L
    weight = weight_LE[busy_L] / weight_LE[busy_L].max(axis=1, keepdims=True)
    weight *= ranks / weight.sum(axis=1, keepdims=True)
    best = _flat_bound(weight, slots, ranks)
    if nodes > 1:
        group = weight.reshape(len(weight), groups, -1).sum(axis=2) * (nodes / ranks)
        best = np.maximum(best, _flat_bound(group, groups, nodes))
    bound_L[busy_L] = best
    return bound_L


def _flat_bound(weight_LE: Floats, slots: int, ranks: int) -> Floats:
    """weight_LE: rows of mean rank load 1. Bisection between 1 and twice what one rank with everything would have."""
    low_L, high_L = np.ones(len(weight_LE)), np.full(len(weight_LE), 2.0 * ranks)
    low_L = np.where(_refuted(weight_LE, slots, ranks, low_L), low_L, -low_L)
    for _ in range(_STEPS):
        open_L = low_L > 0
        if not open_L.any():
            break
        middle_L = np.sqrt(np.abs(low_L) * high_L)
        refuted_L = _refuted(weight_LE, slots, ranks, middle_L)
        low_L = np.where(open_L & refuted_L, middle_L, low_L)
        high_L = np.where(open_L & ~refuted_L, middle_L, high_L)
    return np.abs(low_L)


@dataclass(frozen=True, slots=True)
class _Replicas:
    """Replicas of one weight an expert, by the row, in order of weight: what the first n weigh. weight, number and sums
    up to and with each expert, [L, E]."""

    weight_LE: Floats
    end_LE: Floats
    sum_LE: Floats

    @classmethod
    def of(cls, weight_LE: Floats, number_LE: Floats, heaviest_first: bool) -> _Replicas:
        order_LE = np.argsort(-weight_LE if heaviest_first else weight_LE, axis=1, kind="stable")
        weight_LE, number_LE = (np.take_along_axis(a, order_LE, 1) for a in (weight_LE, number_LE))
        return cls(weight_LE, np.cumsum(number_LE, axis=1), np.cumsum(weight_LE * number_LE, axis=1))

    def first(self, number_L: Floats) -> Floats:
        """Sum of the first `number_L` replicas (0 where that is negative; beyond the last nothing is added), [L]."""
        number_L = np.clip(number_L, 0.0, self.end_LE[:, -1])
        row_L = np.arange(len(number_L))
        at_L = np.minimum((self.end_LE < number_L[:, None]).sum(axis=1), self.end_LE.shape[1] - 1)
        over_L = self.end_LE[row_L, at_L] - number_L
        return np.asarray(self.sum_LE[row_L, at_L] - over_L * self.weight_LE[row_L, at_L])


def _refuted(weight_LE: Floats, slots: int, ranks: int, most_L: Floats) -> NDArray[np.bool_]:
    """Whether a largest rank load of `most_L` is impossible, [L]."""
    room = slots // ranks
    most_L = most_L * (1 + _SLACK)
    beside_L = np.zeros(len(weight_LE))
    for _ in range(4):  # heavier neighbours need more replicas, fewer spare ones make neighbours heavier
        need_LE = np.maximum(np.ceil(weight_LE / np.maximum(most_L - beside_L, 1e-300)[:, None]), 1.0)
        spare_L = slots - need_LE.sum(axis=1)
        light = _Lightest.of(weight_LE, need_LE, np.maximum(spare_L, 0.0))
        beside_L = np.maximum(beside_L, light.weigh(max(room - 1, 0)))
    return np.asarray(
        (spare_L < 0)
        | _pigeonhole(weight_LE, need_LE, light, most_L, slots, ranks)
        | _neighbours(weight_LE, need_LE, light, most_L, ranks, room)
    )


@dataclass(frozen=True, slots=True)
class _Lightest:
    """The least that a number of replicas can weigh together: the better of two bounds.

    n of an expert's m + k replicas weigh n w / (m + k) >= (n - k) w / m: k spare ones take no more than k replicas off
    a selection of those that are `plain`. And each weighs at least w / (m + spare), as many as there may be: `split`.
    """

    plain: _Replicas
    split: _Replicas
    least_LE: Floats
    spare_L: Floats

    @classmethod
    def of(cls, weight_LE: Floats, need_LE: Floats, spare_L: Floats) -> _Lightest:
        most_LE = need_LE + spare_L[:, None]
        least_LE = weight_LE / most_LE
        return cls(
            _Replicas.of(weight_LE / need_LE, need_LE, False), _Replicas.of(least_LE, most_LE, False), least_LE, spare_L
        )

    def weigh(self, number: int) -> Floats:
        number_L = np.full(len(self.spare_L), float(number))
        return np.maximum(self.plain.first(number_L - self.spare_L), self.split.first(number_L))


def _pigeonhole(
    weight_LE: Floats, need_LE: Floats, light: _Lightest, most_L: Floats, slots: int, ranks: int
) -> NDArray[np.bool_]:
    """j + 1 of the j * G + 1 heaviest replicas share a rank with the lightest ones: too much for it? [L]"""
    heavy = _Replicas.of(light.least_LE, need_LE, True)
    room, refuted_L = slots // ranks, np.zeros(len(weight_LE), bool)
    for j in range(min(-(-slots // ranks), 64)):
        last_L = np.full(len(weight_LE), float(j * ranks + 1))
        together_L = heavy.first(last_L) - heavy.first(last_L - j - 1)
        held_L = last_L <= heavy.end_LE[:, -1]
        refuted_L |= held_L & (together_L + light.weigh(max(room - j - 1, 0)) > most_L)
    return refuted_L


def _neighbours(
    weight_LE: Floats, need_LE: Floats, light: _Lightest, most_L: Floats, ranks: int, room: int
) -> NDArray[np.bool_]:
    """Replicas of at least x each, no two of which fit on a rank: too few neighbours light enough for them? [L]"""
    if room < 2:
        return np.zeros(len(weight_LE), bool)
    third_L1 = light.weigh(room - 2)[:, None]
    heavy = _Replicas.of(light.least_LE, need_LE, True)
    x_LE = heavy.weight_LE
    apart_LE = 2 * x_LE + third_L1 > most_L[:, None]
    may_LE = most_L[:, None] - third_L1 - x_LE
    # experts that can be as light as may_LE, with all spare replicas theirs
    order_LE = np.argsort(light.least_LE, axis=1, kind="stable")
    least_LE, number_LE = (np.take_along_axis(a, order_LE, 1) for a in (light.least_LE, need_LE))
    ends_LE = np.concatenate([np.zeros((len(x_LE), 1)), np.cumsum(number_LE, axis=1)], axis=1)
    at_LE = np.stack([np.searchsorted(row, may, "right") for row, may in zip(least_LE, may_LE, strict=True)])
    there_LE = np.take_along_axis(ends_LE, at_LE, 1) + light.spare_L[:, None]
    return np.asarray((apart_LE & (there_LE < heavy.end_LE * (room - 1))).any(axis=1))
