"""Why a study has no feasible point, or few: which constraint excludes what, which cannot be kept together, the nearest
point, and what would have to give way.

Nothing here is guessed: every statement is about the trials that were run, and says of how many.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from moesim_tuner.definition import Definition
from moesim_tuner.records import Trial

__all__ = ["Breach", "Diagnosis", "Excluded", "diagnose"]

_STATES = ("memory", "legality")
"""what a trial breaks without having any figure"""


@dataclass(frozen=True, slots=True)
class Breach:
    """A limit that a trial does not keep. value: the figure, in its own unit, None where the run has none; limit: what
    was asked; side: `max` or `min`. `memory` and `legality` have neither, but a reason."""

    constraint: str
    value: float | None = None
    limit: float | None = None
    side: str = ""
    reason: str = ""

    def __str__(self) -> str:
        if self.limit is None:
            return f"{self.constraint}: {self.reason}" if self.reason else self.constraint
        have = "no such figure" if self.value is None else _number(self.value)
        most = "at most" if self.side == "max" else "at least"
        return f"{self.constraint} {have} where {most} {_number(self.limit)} is wanted"


@dataclass(frozen=True, slots=True)
class Excluded:
    """What one constraint did. broken: by so many of the `known` trials that could be judged by it; alone: these break
    nothing else; best: the least broken, or best kept, trial's figure, and its number."""

    constraint: str
    broken: int
    known: int
    alone: int
    best: float | None = None
    trial: int | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """trials, feasible, failed, pruned: how many. excluded: by constraint, the one that excludes most first. reasons:
    why scenarios were illegal or did not fit, one example of each and how often. apart: pairs that no trial keeps
    together though some keep each. nearest: the trial with the least summed violation, its point, and what it breaks
    (the limits that, set to those values, make it feasible). relax: single limits that, moved alone, make some trial
    feasible: constraint -> (that value, trial)."""

    trials: int
    feasible: int
    pruned: int
    failed: int
    excluded: tuple[Excluded, ...]
    reasons: tuple[tuple[str, str, int], ...]
    apart: tuple[tuple[str, str], ...]
    nearest: int | None
    point: Mapping[str, Any]
    breaches: tuple[Breach, ...]
    relax: Mapping[str, tuple[float, int]]

    def to_json(self) -> dict[str, Any]:
        """All of it, plain."""
        out = asdict(self)
        out["reasons"] = [{"constraint": c, "example": text, "trials": n} for c, text, n in self.reasons]
        out["apart"] = [list(pair) for pair in self.apart]
        out["relax"] = {name: {"limit": value, "trial": trial} for name, (value, trial) in self.relax.items()}
        out["point"] = dict(self.point)
        out["excluded"], out["breaches"] = [asdict(e) for e in self.excluded], [asdict(b) for b in self.breaches]
        return out

    def lines(self) -> list[str]:
        """For the terminal."""
        if not self.trials:
            return ["no trial has been run yet"]
        head = f"{self.feasible:,} of {self.trials:,} trials are feasible" if self.feasible else (
            f"none of {self.trials:,} trials is feasible"
        )  # fmt: skip
        stopped = [f"{n:,} {what}" for n, what in ((self.pruned, "stopped early"), (self.failed, "failed")) if n]
        out = [head + (f" ({', '.join(stopped)})" if stopped else "")]
        for e in self.excluded:
            if e.broken:
                best = "" if e.best is None else f"; the best is {_number(e.best)}, of trial {e.trial}"
                alone = f", {e.alone:,} of them by it alone" if e.alone else ""
                out.append(f"{e.constraint} excludes {e.broken:,} of {e.known:,}{alone}{best}")
        out += [f"  {name}, {count:,} times: {text}" for name, text, count in self.reasons]
        out += [f"{a} and {b}: each is kept by some trial, both by none" for a, b in self.apart]
        if self.nearest is not None and not self.feasible:
            where = ", ".join(f"{name} = {value}" for name, value in self.point.items())
            out.append(f"nearest: trial {self.nearest} ({where or 'the scenario as written'})")
            out += [f"  {breach}" for breach in self.breaches]
            moved = [f"{b.side} {_number(b.value)} for {b.constraint}" for b in self.breaches if b.value is not None]
            if moved and all(b.value is not None for b in self.breaches):
                out.append(f"  it is feasible with {' and '.join(moved)}")
        out += [
            f"moving {name} alone to {_number(value)} makes trial {trial} feasible"
            for name, (value, trial) in self.relax.items()
            if not self.feasible and not (len(self.breaches) == 1 and trial == self.nearest)
        ]
        return out

    def text(self) -> str:
        """`lines`, joined."""
        return "\n".join(self.lines())


def diagnose(definition: Definition, trials: Sequence[Trial]) -> Diagnosis:
    """Look at the trials of a study, feasible or not. A trial is judged by a constraint where it has its figure; one
    that was illegal or did not fit is excluded by that alone, and one that failed by nothing."""
    names = [*_STATES, *definition.spec.constraints]
    judged = [t for t in trials if t.state != "failed"]
    excluded = tuple(sorted((_excluded(name, judged) for name in names), key=lambda e: -e.broken))
    whole = [t for t in judged if t.state == "complete"]
    measured = whole or [t for t in judged if t.rungs and t.state == "pruned"] or judged
    nearest = min(measured, key=lambda t: (t.violation, t.number), default=None)
    return Diagnosis(
        trials=len(trials),
        feasible=sum(t.feasible for t in trials),
        pruned=sum(t.state == "pruned" for t in trials),
        failed=sum(t.state == "failed" for t in trials),
        excluded=excluded,
        reasons=_reasons(judged),
        apart=_apart(definition, [t for t in judged if t.rungs and t.state in ("complete", "pruned")]),
        nearest=None if nearest is None else nearest.number,
        point={} if nearest is None else dict(nearest.point),
        breaches=() if nearest is None else _breaches(definition, nearest),
        relax=_relax(definition, whole),
    )


def _excluded(name: str, trials: Sequence[Trial]) -> Excluded:
    known = list(trials) if name in _STATES else [t for t in trials if name in t.violations]
    broken = [t for t in known if t.violations.get(name, 0.0) > 0]
    alone = sum(all(v <= 0 for other, v in t.violations.items() if other != name) for t in broken)
    best = min((t for t in known if name not in _STATES), key=lambda t: (t.violations[name], t.number), default=None)
    figure = None if best is None else _figure(best, name)
    return Excluded(
        name, len(broken), len(known), alone, figure, None if figure is None or best is None else best.number
    )


def _figure(trial: Trial, name: str) -> float | None:
    return trial.rungs[-1].get(name) if trial.rungs else None


def _breaches(definition: Definition, trial: Trial) -> tuple[Breach, ...]:
    out = []
    for name, by in sorted(trial.violations.items(), key=lambda item: -item[1]):
        if by <= 0:
            continue
        limit = definition.spec.constraints.get(name)
        if limit is None:
            out.append(Breach(name, reason="; ".join(trial.reasons[:3])))
            continue
        value = _figure(trial, name)
        high = limit.max is not None and (value is None or value > limit.max)
        out.append(Breach(name, value, limit.max if high else limit.min, "max" if high else "min"))
    return tuple(out)


def _apart(definition: Definition, trials: Sequence[Trial]) -> tuple[tuple[str, str], ...]:
    """Pairs of figure limits: each kept by some trial, both by none."""
    kept = {
        name: {t.number for t in trials if t.violations.get(name, 1.0) <= 0} for name in definition.spec.constraints
    }
    return tuple((a, b) for a, b in combinations(kept, 2) if kept[a] and kept[b] and not kept[a] & kept[b])


def _relax(definition: Definition, trials: Sequence[Trial]) -> dict[str, tuple[float, int]]:
    out: dict[str, tuple[float, int]] = {}
    for name in definition.spec.constraints:
        only = [
            t for t in trials
            if t.violations.get(name, 0.0) > 0 and all(v <= 0 for other, v in t.violations.items() if other != name)
        ]  # fmt: skip
        best = min(only, key=lambda t: (t.violations[name], t.number), default=None)
        value = None if best is None else _figure(best, name)
        if best is not None and value is not None:
            out[name] = (value, best.number)
    return out


_PLACE = re.compile(r"^(?:--set [^:]*|\S*:\d+:\d+): ")
_FIGURE = re.compile(r"\d[\d,]*(?:\.\d+)?")


def _reasons(trials: Sequence[Trial]) -> tuple[tuple[str, str, int], ...]:
    """(constraint, one example, how often), those that differ in numbers alone together, the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for t in trials:
        for name in _STATES:
            if t.violations.get(name, 0.0) <= 0:
                continue
            for key, text in {(name, _FIGURE.sub("#", r)): r for r in (_PLACE.sub("", r) for r in t.reasons)}.items():
                counts[key] += 1
                example.setdefault(key, text)
    return tuple((key[0], example[key], count) for key, count in counts.most_common(8))


def _number(value: float) -> str:
    """2,340 or 0.0123: four digits that count."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
