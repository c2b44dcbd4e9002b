"""Which case runs next: round after round, in a new order each, within a budget. Pure: it is told what things cost.

First each case is tried once, ceilings before grid before held-out points and those guessed cheap first, in at most
half of the time. Then those tried get their minimum of samples; where the time left does not reach, the cheap ones of
a role come first, so that as many as can be get theirs; then it is the turn of those not yet tried. After that the
time left is dealt out evenly (max-min fair): a case takes no more than it needs for its target, so cheap cases reach it
and long ones share what remains, each spread evenly over the rounds to come.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from moesim_kernels.bench.plan import ROLES

__all__ = ["Schedule", "fair_level"]


def fair_level(need: Sequence[float], total: float) -> float:
    """The level L at which sum(min(need, L)) = total; infinity where all needs fit (water-filling)."""
    if sum(need) <= total:
        return math.inf
    left = total
    ordered = sorted(need)
    for at, value in enumerate(ordered):
        rest = len(ordered) - at
        if value * rest > left:
            return left / rest
        left -= value
    return math.inf


class Schedule:
    """Counts samples and costs of cases, and says what the next round runs.

    roles: id to role; guess: id to a cost in any unit, for the order of the first tries; done: samples that a log
    already holds; seconds everywhere. Raises ValueError for a minimum outside 1 to the target.
    """

    def __init__(
        self,
        roles: Mapping[str, str],
        guess: Mapping[str, float],
        done: Mapping[str, int],
        budget_s: float,
        target: int,
        minimum: int,
        seed: int,
    ) -> None:
        if not 1 <= minimum <= target:
            raise ValueError(f"the minimum of samples must be from 1 to the target: minimum={minimum}, target={target}")
        self.budget_s = budget_s
        self.target = target
        self.minimum = minimum
        self.samples = {key: done.get(key, 0) for key in roles}
        self.refused: set[str] = set()
        self._rank = {key: ROLES.index(role) for key, role in roles.items()}
        self._guess = guess
        self._spent = dict.fromkeys(roles, 0.0)
        self._turns = dict.fromkeys(roles, 0)
        self._credit = dict.fromkeys(roles, 0.0)
        self._random = random.Random(seed)  # noqa: S311  an order of measuring, no secret

    def record(self, key: str, cost_s: float) -> None:
        """One sample was taken and cost `cost_s`, everything around it included."""
        self.samples[key] += 1
        self._spent[key] += cost_s
        self._turns[key] += 1

    def refuse(self, key: str) -> None:
        """The case cannot run; it is not asked for again."""
        self.refused.add(key)

    def cost_s(self, key: str) -> float | None:
        """Mean cost of a sample in this run, or None before the first."""
        return self._spent[key] / self._turns[key] if self._turns[key] else None

    def unfinished(self) -> list[str]:
        """Cases below their target that can run, in the plan's order."""
        return [key for key, n in self.samples.items() if n < self.target and key not in self.refused]

    def short(self) -> list[str]:
        """Cases below their minimum, refused ones included, in the plan's order."""
        return [key for key, n in self.samples.items() if n < self.minimum]

    def need_s(self) -> float:
        """Seconds to bring every case to its target, as far as costs are known."""
        return sum((self.target - self.samples[key]) * (self.cost_s(key) or 0.0) for key in self.unfinished())

    def round(self, among: Sequence[str], left_s: float) -> tuple[list[str], float]:
        """(cases of `among` that the next round runs, in order; the part of `left_s` that it may take).

        No case when nothing is left to do in the time left.
        """
        if left_s <= 0:
            return [], 0.0
        keys = [key for key in among if key not in self.refused and self.samples[key] < self.target]
        self._random.shuffle(keys)
        below = [key for key in keys if self.samples[key] < self.minimum]
        tried = self._affordable([key for key in below if self._turns[key]], left_s)
        if tried:
            return tried, left_s
        untried = [key for key in below if not self._turns[key]]
        if untried:
            return sorted(untried, key=lambda key: (self._rank[key], self._guess.get(key, 0.0))), left_s / 2
        return self._shared(keys, left_s), left_s

    def _affordable(self, keys: list[str], left_s: float) -> list[str]:
        """Those that can reach their minimum in `left_s`, by role: within one the cheapest are taken first."""
        need = {key: (self.minimum - self.samples[key]) * (self.cost_s(key) or 0.0) for key in keys}
        chosen = set()
        for key in sorted(keys, key=lambda key: (self._rank[key], need[key])):
            if need[key] <= left_s:
                left_s -= need[key]
                chosen.add(key)
        return sorted((key for key in keys if key in chosen), key=self._rank.__getitem__)

    def _shared(self, keys: list[str], left_s: float) -> list[str]:
        """The keys whose turn it is when `left_s` is shared evenly and each key's turns are spread over the rounds."""
        # a resumed case may not have run yet: it counts as free until its cost is known
        cost = {key: self.cost_s(key) or 0.0 for key in keys}
        need = {key: (self.target - self.samples[key]) * cost[key] for key in keys}
        level = fair_level(list(need.values()), left_s)
        turns = {key: self.target - self.samples[key] if need[key] <= level else int(level / cost[key]) for key in keys}
        rounds = max(turns.values(), default=0)
        if rounds == 0:
            fitting = [key for key in keys if cost[key] <= left_s]
            return [min(fitting, key=lambda key: (cost[key], key))] if fitting else []
        out = []
        for key in keys:
            self._credit[key] += turns[key] / rounds
            if self._credit[key] >= 1 - 1e-9:
                self._credit[key] -= 1
                out.append(key)
        return out or [max(keys, key=lambda key: (turns[key], key))]
