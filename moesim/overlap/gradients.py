"""Adaptive gradient partitioning (FSMoE, arXiv:2501.10714): which layer hides how much of the gradients.

While a backward pass goes from the last layer to the first, gradients that are ready are summed beside later work. Work
that can hide a sum is a *slot*: a dense block hides all its time, a MoE layer the time that its own all-to-alls leave
on the stream between nodes. A slot has options (degrees of its pipeline), each with the time it takes without a sum
(`base`) and the part of it that shares the sum's stream (`floor`): with a sum of g it takes max(base, floor + g).

The paper first fills every slot's free time in order and spreads what is left by differential evolution. Here all
options and amounts are decided at once and exactly (`partition`): what is not summed yet only ever waits in a queue, so
after each slot a plan is two numbers, time spent and queue left, and plans that are behind in both are dropped. A slot
either takes what hides, or all there is: past what hides every further byte costs its own time, here or later. A test
holds the result against differential evolution of the same objective.

Legend: N slots in the order of the backward pass, R options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moesim.arrays import FloatArray, IntArray

__all__ = ["Plan", "Slot", "partition", "plan_cost"]


class Slot(NamedTuple):
    """base_R, floor_R: see above, one unit of time. ready: time that the sums of the gradients take which are ready
    when the slot starts, the start of a collective apart."""

    base_R: FloatArray
    floor_R: FloatArray
    ready: float


class Plan(NamedTuple):
    """total: time of all slots and of the sum that is left at the end. option_N: the option of each slot. hidden_N:
    what each slot sums, in the time it takes without the start. rest: summed at the end."""

    total: float
    option_N: IntArray
    hidden_N: FloatArray
    rest: float


class _State(NamedTuple):
    """A plan so far: what it took, the queue, and the way here."""

    spent: float
    queue: float
    option: int
    hidden: float
    before: _State | None


def partition(slots: Sequence[Slot], start: float) -> Plan:
    """The plan of least total. start: what a collective takes besides its bytes, each time (alpha)."""
    front = [_State(0.0, 0.0, -1, 0.0, None)]
    for slot in slots:
        grown: list[_State] = []
        for state in front:
            queue = state.queue + slot.ready
            for option, (base, floor) in enumerate(zip(slot.base_R.tolist(), slot.floor_R.tolist(), strict=True)):
                grown.append(_State(state.spent + base, queue, option, 0.0, state))
                free = base - floor - start
                hidden = min(free, queue)
                if hidden > 0:
                    grown.append(_State(state.spent + base, queue - hidden, option, hidden, state))
                if queue > max(free, 0.0):
                    spent = state.spent + max(base, floor + start + queue)
                    grown.append(_State(spent, 0.0, option, queue, state))
        front = _undominated(grown)
    best = min(front, key=lambda s: s.spent + _sum_ns(s.queue, start))
    options, hidden_ns = [], []
    at = best
    while at.before is not None:
        options.append(at.option)
        hidden_ns.append(at.hidden)
        at = at.before
    total = best.spent + _sum_ns(best.queue, start)
    return Plan(total, np.array(options[::-1], np.int64), np.array(hidden_ns[::-1], np.float64), best.queue)


def plan_cost(slots: Sequence[Slot], start: float, hidden_N: FloatArray) -> float:
    """Time of all slots when each sums `hidden_N` of what is ready, every slot under its best option, and of the sum
    that is left. What is not ready yet cannot be summed: such a plan costs infinitely much."""
    spent = queue = 0.0
    for slot, hidden in zip(slots, hidden_N.tolist(), strict=True):
        queue += slot.ready - hidden
        if queue < -1e-9 * max(1.0, hidden):
            return float("inf")
        spent += float(np.maximum(slot.base_R, slot.floor_R + _sum_ns(hidden, start)).min())
    return spent + _sum_ns(max(queue, 0.0), start)


def _sum_ns(size: float, start: float) -> float:
    return start + size if size > 1e-9 else 0.0


def _undominated(states: list[_State]) -> list[_State]:
    """Those that no other one beats in time and queue."""
    out: list[_State] = []
    least = float("inf")
    for state in sorted(states, key=lambda s: (s.spent, s.queue)):
        if state.queue < least:
            out.append(state)
            least = state.queue
    return out
