"""Which trials are best: the feasible ones that no other feasible one beats in everything.

Pareto dominance over the objectives, each in its own direction; of trials with equal values the first counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesim_tuner.definition import Definition
from moesim_tuner.records import Trial

__all__ = ["best", "best_so_far", "dominates", "front", "undominated"]


def dominates(a: Sequence[float], b: Sequence[float], signs: Sequence[int]) -> bool:
    """a is as good as b in every objective and better in one."""
    gains = [sign * (x - y) for sign, x, y in zip(signs, a, b, strict=True)]
    return min(gains) >= 0 and max(gains) > 0


def undominated(values: Sequence[Sequence[float]], signs: Sequence[int]) -> list[int]:
    """Places of the values that no other dominates, in their order; of equal ones the first."""
    # in this order none dominates one before it
    order = sorted(range(len(values)), key=lambda i: ([-sign * v for sign, v in zip(signs, values[i], strict=True)], i))
    kept: list[int] = []
    for i in order:
        if not any(dominates(values[j], values[i], signs) or tuple(values[j]) == tuple(values[i]) for j in kept):
            kept.append(i)
    return sorted(kept)


def front(definition: Definition, trials: Sequence[Trial]) -> list[Trial]:
    """The feasible trials that no other beats, the best in the first objective first. One objective: the best alone."""
    feasible = [t for t in trials if t.feasible]
    ahead = [feasible[i] for i in undominated([t.values for t in feasible], definition.signs)]
    return sorted(ahead, key=lambda t: (-definition.signs[0] * t.values[0], t.number))


def best(definition: Definition, trials: Sequence[Trial]) -> Trial | None:
    """The first of the front."""
    return next(iter(front(definition, trials)), None)


def best_so_far(definition: Definition, trials: Sequence[Trial]) -> list[tuple[int, float]]:
    """(number, first objective) of each feasible trial that is better in it than all before."""
    out: list[tuple[int, float]] = []
    sign = definition.signs[0]
    for trial in sorted(trials, key=lambda t: t.number):
        if trial.feasible and (not out or sign * trial.values[0] > sign * out[-1][1]):
            out.append((trial.number, trial.values[0]))
    return out
