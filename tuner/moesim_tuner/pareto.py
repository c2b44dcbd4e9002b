"""Which trials are best: the feasible ones that no other feasible one beats in everything.

Pareto dominance over the objectives, each in its own direction; of trials with equal values the first counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesim_tuner.definition import Definition
from moesim_tuner.records import Trial

__all__ = ["best", "best_so_far", "front"]


def front(definition: Definition, trials: Sequence[Trial]) -> list[Trial]:
    """The front, the best in the first objective first. One objective: the best trial alone."""
    signs = definition.signs

    def gains(trial: Trial) -> tuple[float, ...]:
        return tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))

    feasible = sorted((t for t in trials if t.feasible), key=lambda t: (*(-g for g in gains(t)), t.number))
    out: list[Trial] = []
    for trial in feasible:  # whatever beats one stands before it
        mine = gains(trial)
        if not any(all(a >= b for a, b in zip(gains(other), mine, strict=True)) for other in out):
            out.append(trial)
    return out


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
