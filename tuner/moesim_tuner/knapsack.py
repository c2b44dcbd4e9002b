"""One option for every item, at the least total cost within a budget: the multiple-choice knapsack, with a proof.

Bit widths are one (item: an expert, option: a width, size: its bytes), and so is how many experts of each layer stay on
a device (item: a layer, option: a number). Items may belong to groups that have limits of their own.

1. Greedy: an item's options on the lower convex hull of (size, cost) are steps; steps are taken in the order of what
   they save a byte. Sinha and Zoltners, "The multiple-choice knapsack problem" (Operations Research 27, 1979).
2. Bound: with fractions of steps the same order is optimal (also with a least and a most for each group, because the
   constraints are nested), and its prices of a byte give the Lagrangian bound, which is that optimum.
3. Solver: an option whose cost at those prices exceeds the item's best by more than the gap is in no better answer
   (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995). What is left is a core of
   few items, which CP-SAT gets with the greedy answer as its hint.

Legend: N items, B options, G groups, X steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moesim.arrays import BoolArray, FloatArray, IntArray
from moesim_tuner.solving import Better, Part, ask, close_gap, cp_model, whole

__all__ = ["Choices", "choose", "greedy", "prices"]

_MOST_CELLS = 40_000
"""options of the core; above, the solver is not asked"""


@dataclass(frozen=True, slots=True)
class Choices:
    """cost_NB, size_NB: of each option; a cost of inf: there is no such option. budget: of all sizes together. group_N:
    group of each item; least_G, most_G: what sizes of a group must add up to; None: there are no groups. Sizes are
    whole; costs may be anything finite."""

    cost_NB: FloatArray
    size_NB: IntArray
    budget: int
    group_N: IntArray | None = None
    least_G: IntArray | None = None
    most_G: IntArray | None = None

    def groups(self) -> tuple[IntArray, IntArray, IntArray]:
        """(group_N, least_G, most_G), one group of everything where there are none."""
        if self.group_N is None:
            return np.zeros(len(self.cost_NB), np.int64), np.zeros(1, np.int64), np.array([self.budget], np.int64)
        number = int(self.group_N.max(initial=-1)) + 1
        least = np.zeros(number, np.int64) if self.least_G is None else self.least_G
        most = np.full(number, self.budget, np.int64) if self.most_G is None else self.most_G
        return self.group_N, least, most

    def cost(self, option_N: IntArray) -> float:
        """Sum of the chosen options' costs."""
        return float(np.take_along_axis(self.cost_NB, option_N[:, None], axis=1).sum())

    def size(self, option_N: IntArray) -> int:
        """Sum of the chosen options' sizes."""
        return int(np.take_along_axis(self.size_NB, option_N[:, None], axis=1).sum())

    def keeps(self, option_N: IntArray) -> bool:
        """Whether a choice is within the budget and every group's limits."""
        group_N, least_G, most_G = self.groups()
        size_N = np.take_along_axis(self.size_NB, option_N[:, None], axis=1)[:, 0]
        size_G = np.bincount(group_N, weights=size_N, minlength=len(least_G))
        return bool(size_N.sum() <= self.budget and (size_G >= least_G).all() and (size_G <= most_G).all())


def choose(choices: Choices, name: str, tolerance: float, deterministic_time: float) -> tuple[IntArray | None, Part]:
    """Option of each item, int64 [N], and what is proven of its cost; None where nothing was found: no choice keeps
    the limits, or none was found in the solver's time (then the part's status says `feasible` with an infinite cost).

    Costs must add up to at least 0, as a Part's bound does.
    """
    choices = _in_units(choices)
    option_N = greedy(choices)
    price_G, bound = prices(choices)
    value = choices.cost(option_N) if option_N is not None else float("inf")
    if option_N is None:
        found = _core(choices, None, price_G, deterministic_time)
        if found is None or found.objective is None:
            return None, Part(name, value, bound, "feasible", 0.0 if found is None else found.units)
        option_N, value = found.answer, found.objective

    def solve() -> Better | None:
        return _core(choices, option_N, price_G, deterministic_time, value - bound)

    return close_gap(name, option_N, value, bound, tolerance, solve)


def _in_units(choices: Choices) -> Choices:
    """The same with limits that sizes can meet: where all options of an item differ by multiples of a unit, as widths
    of experts of one size do, what a limit leaves of a unit is no room, and a bound must not sell it."""
    real_NB = np.isfinite(choices.cost_NB)
    least_N = np.where(real_NB, choices.size_NB, np.iinfo(np.int64).max).min(axis=1)
    unit = int(np.gcd.reduce((choices.size_NB - least_N[:, None])[real_NB], initial=0))
    if unit <= 1:
        return choices
    base = int(least_N.sum())
    whole_units = replace(choices, budget=base + (choices.budget - base) // unit * unit)
    if choices.group_N is None:
        return whole_units
    group_N, least_G, most_G = choices.groups()
    base_G = np.bincount(group_N, weights=least_N, minlength=len(least_G)).astype(np.int64)
    return replace(
        whole_units,
        least_G=base_G - (base_G - least_G) // unit * unit,
        most_G=base_G + (most_G - base_G) // unit * unit,
    )


# ---- steps of the hull


class _Steps(NamedTuple):
    """Of all items, the one that saves most a byte first. start_N: option that an item has before its first step; item,
    to, size, saved: of each step, [X]."""

    start_N: IntArray
    item: IntArray
    to: IntArray
    size: IntArray
    saved: FloatArray
    rate: FloatArray


def _steps(choices: Choices) -> _Steps:
    """Walk all items' hulls at once, from the smallest option on."""
    cost_NB, size_NB = choices.cost_NB, choices.size_NB
    rows = np.arange(len(cost_NB))
    real = np.isfinite(cost_NB)
    size = np.where(real, size_NB, np.iinfo(np.int64).max)
    cheap = np.where(size == size.min(axis=1, keepdims=True), cost_NB, np.inf)
    start_N = at_N = cheap.argmin(axis=1)
    found: list[tuple[IntArray, IntArray, IntArray, FloatArray]] = []
    while len(rows):
        more = size[rows] - size[rows, at_N][:, None]
        less = cost_NB[rows, at_N][:, None] - cost_NB[rows]
        open_NB = real[rows] & (more > 0) & (less > 0)
        rate = np.divide(less, more, out=np.full(less.shape, -1.0), where=open_NB)
        best = rate.max(axis=1, keepdims=True)
        to = np.where(rate == best, more, -1).argmax(axis=1)  # of equal rates the longest step
        goes = best[:, 0] > 0
        rows, to = rows[goes], to[goes]
        if len(rows):
            pick = np.arange(len(goes))[goes]
            found.append((rows, to, more[pick, to], less[pick, to]))
        at_N = to
    if not found:
        empty = np.zeros(0, np.int64)
        return _Steps(start_N, empty, empty, empty, np.zeros(0), np.zeros(0))
    item, to, size_X, saved = (np.concatenate(part) for part in zip(*found, strict=True))
    rate_X = saved / size_X
    # an item's own steps stay in order: its rates fall, and of equals the earlier was found first
    order = np.argsort(-rate_X, kind="stable")
    return _Steps(start_N, item[order], to[order], size_X[order], saved[order], rate_X[order])


def prices(choices: Choices) -> tuple[FloatArray, float]:
    """Price of a byte in each group, [G], and the Lagrangian bound at these prices: no choice costs less. Where limits
    contradict each other the bound may be anything; `choose` finds out."""
    steps = _steps(choices)
    group_N, least_G, most_G = choices.groups()
    start_N = np.take_along_axis(choices.size_NB, steps.start_N[:, None], axis=1)[:, 0]
    used_G = np.bincount(group_N, weights=start_N, minlength=len(least_G)).astype(np.int64)
    group_X = group_N[steps.item] if len(steps.item) else steps.item
    left_X, forced_G = _to_least(steps, group_X, used_G, least_G)
    price, price_G = _to_budget(steps, group_X, left_X, used_G, most_G, choices.budget)
    # a group that was filled up to its least has the rate of its last step; one at its most that of the step it lacks
    price_G = np.where(np.isnan(price_G), price, np.maximum(price_G, price))
    price_G = np.where(np.isnan(forced_G), price_G, np.minimum(price_G, forced_G))
    return price_G, _lagrangian(choices, price_G, price)


def _to_least(steps: _Steps, group_X: IntArray, used_G: IntArray, least_G: IntArray) -> tuple[IntArray, FloatArray]:
    """Parts of steps that groups must take whatever they cost: what is left of each step, [X], and each group's rate of
    the last one, nan where it needs none. used_G is brought up to date."""
    left_X = steps.size.copy()
    forced_G = np.full(len(least_G), np.nan)
    for group in np.flatnonzero(used_G < least_G).tolist():
        mine = np.flatnonzero(group_X == group)
        need = int(least_G[group] - used_G[group])
        before = np.cumsum(steps.size[mine]) - steps.size[mine]
        took = np.clip(need - before, 0, steps.size[mine])
        left_X[mine] -= took
        used_G[group] += int(took.sum())
        last = np.flatnonzero(took > 0)
        if len(last):
            forced_G[group] = steps.rate[mine[last[-1]]]
    return left_X, forced_G


def _to_budget(
    steps: _Steps, group_X: IntArray, left_X: IntArray, used_G: IntArray, most_G: IntArray, budget: int
) -> tuple[float, FloatArray]:
    """Take what is left of the steps in order: the rate at which the budget ends (0: it does not), and each group's
    rate at its most, nan where it does not get there."""
    room = budget - int(used_G.sum())
    cap_G = np.full(len(most_G), np.nan)
    took_X = np.zeros(len(left_X), np.int64)
    for group in range(len(most_G)):
        mine = np.flatnonzero(group_X == group)
        before = np.cumsum(left_X[mine]) - left_X[mine]
        took_X[mine] = np.clip(most_G[group] - used_G[group] - before, 0, left_X[mine])
        lacks = np.flatnonzero(took_X[mine] < left_X[mine])
        if len(lacks):
            cap_G[group] = steps.rate[mine[lacks[0]]]
    ends = np.flatnonzero(np.cumsum(took_X) > room)
    price = float(steps.rate[ends[0]]) if len(ends) else 0.0
    return price, cap_G


def _lagrangian(choices: Choices, price_G: FloatArray, price: float) -> float:
    """sum_n min_b (cost + price * size) - price * budget - sum_g over * most + sum_g under * least: a lower bound for
    any prices (over, under: how far a group's price lies above or below the common one, both at least 0)."""
    group_N, least_G, most_G = choices.groups()
    least_N = (choices.cost_NB + price_G[group_N][:, None] * choices.size_NB).min(axis=1)
    over, under = np.maximum(price_G - price, 0), np.maximum(price - price_G, 0)
    return float(least_N.sum() - price * choices.budget - (over * most_G).sum() + (under * least_G).sum())


def greedy(choices: Choices) -> IntArray | None:
    """Whole steps in order, each where it fits; then whatever option saves most in the room that is left. int64 [N];
    None where that keeps the limits nowhere."""
    steps = _steps(choices)
    group_N, least_G, most_G = choices.groups()
    option_N = steps.start_N.copy()
    size_N = np.take_along_axis(choices.size_NB, option_N[:, None], axis=1)[:, 0]
    room_G: list[int] = (most_G - np.bincount(group_N, weights=size_N, minlength=len(most_G)).astype(np.int64)).tolist()
    need_G: list[int] = (least_G - most_G + np.array(room_G)).tolist()
    room = choices.budget - int(size_N.sum())
    if room < 0 or min(room_G) < 0:
        return None
    listed = list(zip(steps.item.tolist(), steps.to.tolist(), steps.size.tolist(), strict=True))
    group_of: list[int] = group_N.tolist()
    at: list[int] = option_N.tolist()
    stuck = [False] * len(at)
    passes = [True, False] if max(need_G) > 0 else [False]
    taken = [False] * len(listed)
    for needed in passes:  # first what groups must have, then the rest
        for number, (item, to, size) in enumerate(listed):
            group = group_of[item]
            if taken[number] or stuck[item] or (needed and need_G[group] <= 0):
                continue
            if size > room or size > room_G[group]:
                stuck[item] = True
                continue
            taken[number] = True
            at[item] = to
            room -= size
            room_G[group] -= size
            need_G[group] -= size
    return _filled_up(choices, np.array(at, np.int64), room, np.array(room_G, np.int64))


def _filled_up(choices: Choices, option_N: IntArray, room: int, room_G: IntArray) -> IntArray | None:
    """Exchange options for dearer ones as long as one fits and saves something, the one that saves most first."""
    group_N = choices.groups()[0]
    rows = np.arange(len(option_N))
    for _ in range(10_000):
        fits_N = np.minimum(room, room_G[group_N])
        more = choices.size_NB - choices.size_NB[rows, option_N][:, None]
        less = choices.cost_NB[rows, option_N][:, None] - choices.cost_NB
        less = np.where(more <= fits_N[:, None], less, 0.0)
        item, to = np.unravel_index(int(less.argmax()), less.shape)
        if less[item, to] <= 0:
            break
        room -= int(more[item, to])
        room_G[group_N[item]] -= int(more[item, to])
        option_N[item] = to
    return option_N if choices.keeps(option_N) else None


# ---- what greedy leaves


def _core(
    choices: Choices, hint_N: IntArray | None, price_G: FloatArray, deterministic_time: float, gap: float = np.inf
) -> Better | None:
    """The best choice by CP-SAT among options that may be in one better than the hint. None: they are too many. Without
    a hint any choice will do, and of too many options those are left that cost least at the prices (so its bound is
    none of all choices)."""
    group_N, least_G, most_G = choices.groups()
    priced = choices.cost_NB + price_G[group_N][:, None] * choices.size_NB
    excess = priced - priced.min(axis=1, keepdims=True)
    slack = 1e-9 * max(1.0, float(np.abs(priced[np.isfinite(priced)]).max(initial=0.0)))
    live = np.isfinite(choices.cost_NB) & (excess <= gap + slack)
    if hint_N is not None:
        live[np.arange(len(hint_N)), hint_N] = True
    elif int(live.sum()) > _MOST_CELLS:
        live &= excess <= np.partition(excess[live], _MOST_CELLS // 2)[_MOST_CELLS // 2]
    open_N = live.sum(axis=1) > 1
    if int(live[open_N].sum()) > _MOST_CELLS:
        return None
    option_N = live.argmax(axis=1)
    return _asked(choices, live, open_N, option_N, hint_N, (group_N, least_G, most_G), deterministic_time)


def _asked(
    choices: Choices, live: BoolArray, open_N: BoolArray, option_N: IntArray, hint_N: IntArray | None,
    limits: tuple[IntArray, IntArray, IntArray], deterministic_time: float,
) -> Better:  # fmt: skip
    """Build the core's programme and solve it. option_N: of items with one option left; the others' are replaced."""
    group_N, least_G, most_G = limits
    fixed_N = ~open_N
    size_N = np.where(fixed_N, np.take_along_axis(choices.size_NB, option_N[:, None], axis=1)[:, 0], 0)
    cost_N = np.where(fixed_N, np.take_along_axis(choices.cost_NB, option_N[:, None], axis=1)[:, 0], 0.0)
    used_G = np.bincount(group_N, weights=size_N, minlength=len(least_G)).astype(np.int64)
    items = np.flatnonzero(open_N)
    at_item, at_option = np.nonzero(live[items])
    cost = choices.cost_NB[items[at_item], at_option]
    base = np.full(len(items), np.inf)
    np.minimum.at(base, at_item, cost)
    unit_X, scale = whole(cost - base[at_item])
    sizes: list[int] = choices.size_NB[items[at_item], at_option].tolist()
    model = cp_model().CpModel()
    chosen = [model.new_bool_var("") for _ in sizes]
    of_item: list[list[int]] = [[] for _ in items]
    of_group: dict[int, list[int]] = {}
    for x, item in enumerate(at_item.tolist()):
        of_item[item].append(x)
        of_group.setdefault(int(group_N[items[item]]), []).append(x)
        if hint_N is not None:
            model.add_hint(chosen[x], int(hint_N[items[item]] == at_option[x]))
    for row in of_item:
        model.add_exactly_one([chosen[x] for x in row])
    model.add(sum(sizes[x] * chosen[x] for x in range(len(sizes))) <= choices.budget - int(size_N.sum()))
    for group in range(len(least_G)) if choices.group_N is not None else ():
        total = sum(sizes[x] * chosen[x] for x in of_group.get(group, []))
        model.add(total >= int(least_G[group] - used_G[group]))
        model.add(total <= int(most_G[group] - used_G[group]))
    model.minimize(sum(int(u) * c for u, c in zip(unit_X.tolist(), chosen, strict=True)))
    found = ask(model, deterministic_time, may_fail=hint_N is None)
    known = float(cost_N.sum() + base.sum())
    # each chosen cost may have been rounded up by as much
    up_N = np.zeros(len(items))
    np.maximum.at(up_N, at_item, unit_X - (cost - base[at_item]) * scale)
    bound = known + (found.bound - float(up_N.sum())) / scale if np.isfinite(found.bound) else -np.inf
    if found.solver is None:
        return Better(None, None, bound, found.units)
    option_N = option_N.copy()
    for x, variable in enumerate(chosen):
        if found.solver.value(variable):
            option_N[items[at_item[x]]] = at_option[x]
    return Better(option_N, choices.cost(option_N), bound, found.units)
