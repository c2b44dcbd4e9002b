"""Which candidates of a search are judged: the best it found, the default, and the best heuristic. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesim_tuner.definition import Definition
from moesim_tuner.figures import figure
from moesim_tuner.pareto import undominated
from moesim_tuner.records import Point, Trial

__all__ = ["Finalist", "finalists", "scaled"]


@dataclass(frozen=True, slots=True)
class Finalist:
    """trial: its number, None where the search never tried the scenario as written. promised: what the search saw, one
    value an objective; empty where it measured nothing."""

    trial: int | None
    point: Point
    origin: str
    promised: tuple[float, ...] = ()


def finalists(definition: Definition, trials: Sequence[Trial]) -> list[Finalist]:
    """The default first, then the others in the order of how good the search found them; no point twice.

    With one objective the `judge.finalists` best feasible trials; with several so many of the Pareto front, spread over
    it. Where too few are feasible, those that break least fill up. Besides, the default and the best heuristic.
    """
    signs, count = definition.signs, definition.spec.judge.finalists
    known: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        if trial.state == "complete":
            known.setdefault(definition.space.key(trial.point), trial)
    ranked = sorted(known.values(), key=lambda t: _rank(t, signs))
    feasible = [t for t in ranked if t.feasible]
    chosen: list[Trial] = feasible[:count] if len(signs) == 1 else []
    while len(chosen) < min(count, len(feasible)):  # a front, and where it is small the one behind it
        left = [t for t in feasible if t not in chosen]
        ahead = [left[i] for i in undominated([t.values for t in left], signs)]
        chosen += _spread(ahead, definition.spec.objectives, signs, count - len(chosen))
    chosen += [t for t in ranked if not t.feasible][: count - len(chosen)]
    heuristics = [t for t in ranked if t.origin.startswith("heuristic")]
    if heuristics and heuristics[0] not in chosen:
        chosen.append(heuristics[0])
    default = next((t for t in sorted(trials, key=lambda t: t.number) if t.origin == "default"), None)
    first = Finalist(None, {}, "default") if default is None else _of(default)
    key = definition.space.key(first.point)
    return [first, *(_of(t) for t in chosen if definition.space.key(t.point) != key)]


def _of(trial: Trial) -> Finalist:
    return Finalist(trial.number, trial.point, trial.origin, trial.values if trial.state == "complete" else ())


def _rank(trial: Trial, signs: Sequence[int]) -> tuple[bool, float, float, int]:
    """Feasible ones first by their value (of several objectives the first), others by what they break."""
    return not trial.feasible, trial.violation, -signs[0] * trial.values[0], trial.number


def scaled(values: Sequence[Sequence[float]], names: Sequence[str]) -> list[tuple[float, ...]]:
    """Each objective between its least (0) and greatest (1): by ratio where the figure is compared so and all values
    are positive, else by difference; 0 where all are alike."""
    columns = []
    for name, column in zip(names, zip(*values, strict=True), strict=True):
        logs = [math.log(v) for v in column] if min(column) > 0 and not figure(name).absolute else list(column)
        low, high = min(logs), max(logs)
        columns.append([(v - low) / (high - low) if high > low else 0.0 for v in logs])
    return list(zip(*columns, strict=True))


def _spread(trials: Sequence[Trial], names: Sequence[str], signs: Sequence[int], count: int) -> list[Trial]:
    """At most `count` of a front: the best of each objective, then always the one farthest from those chosen."""
    if len(trials) <= count:
        return list(trials)
    places = scaled([t.values for t in trials], names)
    chosen: list[int] = []
    for axis, sign in enumerate(signs):
        best = max(range(len(trials)), key=lambda i: (sign * trials[i].values[axis], -i))
        if best not in chosen and len(chosen) < count:
            chosen.append(best)
    while len(chosen) < count:
        left = [i for i in range(len(trials)) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(math.dist(places[i], places[j]) for j in chosen), -i)))
    return [trials[i] for i in sorted(chosen)]
