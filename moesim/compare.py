"""Which candidate is better, and where can that not be told? Pure: observations in, verdicts out.

Candidates run under the same seeds, so two of them are compared by the ratio of a figure within each seed (common
random numbers: Law and Kelton, Simulation Modeling and Analysis, 11.2). The interval of that ratio has two parts:

- *chance*: with one seed, what leaving out parts of the run does to the ratio (`moesim.observe`), and the error of the
  bank of routing; with several, the larger of that and the spread of the paired ratios over seeds (Student's t);
- *profile*: errors of the hardware profile that the two do not share. On one profile an operator's error moves both, so
  only the difference of their time shares counts; errors of two profiles are independent.

A *tie*: the interval contains 1. The best of k is chosen after the fact, so each of its k - 1 ratios is held to
1 - 0.1 / (k - 1) (Bonferroni): the truly best one is then marked in at least 90 % of comparisons.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

from moesim.arrays import FloatArray
from moesim.errors import BadInput, Problem
from moesim.observe import DEFAULT_FIGURES, FIGURES, Figure, Observation, Seen

__all__ = [
    "Comparison", "Difference", "Entry", "Row", "Verdict", "chosen_figures", "compare", "difference", "interval_of",
    "ratio_of", "slopes_of", "value_of",
]  # fmt: skip

SCHEMA_VERSION = 1
_LEVEL = 0.9
_SAME = 1e-9
"""logarithms of figures nearer than this are equal: what is left is rounding"""
_UNKNOWN = 50.0
"""half of an interval of a logarithm beyond which it says nothing: a run of a few requests"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One candidate as it went in: a run a seed; none, but reasons, where it does not fit.

    facts: what the report says of it beside its figures (file, what was varied, hash of the scenario).
    """

    label: str
    runs: tuple[Observation, ...]
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure of one candidate. mark: `best` alone, `tie` where several cannot be told from the best, else None.

    ratio: to the best; its interval is at `Row.tie_level`. None where the figure is compared by difference, the
    interval also where there are too few requests to say.
    """

    value: float
    interval90: tuple[float, float] | None
    mark: str | None
    ratio: float | None
    ratio_interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One figure over all candidates, in their order; None where a candidate has none. tie_level: see the module."""

    figure: Figure
    verdicts: tuple[Verdict | None, ...]
    tie_level: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidates in the order given, figures in the order asked for."""

    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]

    @property
    def feasible(self) -> bool:
        return any(entry.runs for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        """The stable report (docs/compare.md)."""
        candidates = []
        for i, entry in enumerate(self.entries):
            found = {row.figure.name: _verdict_json(row.verdicts[i]) for row in self.rows}
            candidates.append(
                {
                    "label": entry.label,
                    **(entry.facts or {}),
                    "feasible": bool(entry.runs),
                    "reasons": list(entry.reasons),
                    "warnings": list(entry.warnings),
                    "figures": found if entry.runs else None,
                }
            )
        return {
            "schema_version": SCHEMA_VERSION,
            "seeds": list(self.seeds),
            "figures": [
                {
                    "name": row.figure.name,
                    "unit": row.figure.unit,
                    "better": "more" if row.figure.more_is_better else "less",
                    "tie_level": row.tie_level,
                }
                for row in self.rows
            ],
            "candidates": candidates,
        }


def _verdict_json(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return {
        "value": verdict.value,
        "interval90": None if verdict.interval90 is None else list(verdict.interval90),
        "mark": verdict.mark,
        "ratio_to_best": verdict.ratio,
        "ratio_interval": None if verdict.ratio_interval is None else list(verdict.ratio_interval),
    }


def compare(entries: Sequence[Entry], figures: Sequence[str], seeds: Sequence[int]) -> Comparison:
    """Judge each figure. Every feasible entry has one run a seed, in the order of `seeds`.

    A figure that no candidate has is left out.
    """
    assert all(len(entry.runs) in (0, len(seeds)) for entry in entries)
    rows = [_row([entry.runs for entry in entries], FIGURES[name]) for name in figures]
    return Comparison(tuple(entries), tuple(row for row in rows if any(row.verdicts)), tuple(seeds))


def _row(runs: Sequence[tuple[Observation, ...]], figure: Figure) -> Row:
    known = [i for i, row in enumerate(runs) if row and all(figure.name in run.figures for run in row)]
    level = 1 - (1 - _LEVEL) / max(1, len(known) - 1)
    values = {i: value_of(runs[i], figure) for i in known}
    if not known:
        return Row(figure, (None,) * len(runs), level)
    sign = -1 if figure.more_is_better else 1
    best = min(known, key=lambda i: (sign * values[i], i))
    found = {i: difference(runs[i], runs[best], figure, level) for i in known}
    tied = [i for i in known if abs(found[i].centre) <= max(found[i].half, figure.resolution, _SAME)]
    verdicts: list[Verdict | None] = []
    for i in range(len(runs)):
        if i not in values:
            verdicts.append(None)
            continue
        mark = None if i not in tied or len(known) == 1 else ("tie" if len(tied) > 1 else "best")
        verdicts.append(Verdict(values[i], interval_of(runs[i], figure), mark, *ratio_of(found[i], figure, i == best)))
    return Row(figure, tuple(verdicts), level)


class Difference(NamedTuple):
    """Mean over seeds of a difference (of logarithms, or of an absolute figure), and half its interval's width.
    chance: half of what chance alone would make; profile: 1 sigma of what errors of the profile do."""

    centre: float
    half: float
    chance: float = 0.0
    profile: float = 0.0


def ratio_of(found: Difference, figure: Figure, best: bool = False) -> tuple[float | None, tuple[float, float] | None]:
    """A difference as a ratio and its interval; None where the figure is compared by difference, the interval also
    where nothing is known. best: of a candidate to itself."""
    if figure.absolute:
        return None, None
    if best:
        return 1.0, (1.0, 1.0)
    if found.half > _UNKNOWN:
        return math.exp(found.centre), None
    return math.exp(found.centre), (math.exp(found.centre - found.half), math.exp(found.centre + found.half))


def chosen_figures(names: Sequence[str]) -> list[str]:
    """The figures named (also `a,b` in one), each once; those compared by default where none is. Raises BadInput."""
    asked = [part.strip() for name in names for part in name.split(",")]
    problems = []
    for name in asked:
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            problems.append(Problem("--metric", f"unknown figure {name!r:.80}.{hint} Known: {', '.join(FIGURES)}"))
    if problems:
        raise BadInput(problems)
    return list(dict.fromkeys(asked or DEFAULT_FIGURES))


# ---- one candidate


def _scaled(values: FloatArray, figure: Figure) -> FloatArray:
    return values if figure.absolute else np.log(np.maximum(values, 1e-300))


def _values(runs: Sequence[Observation], figure: Figure) -> FloatArray:
    return _scaled(np.array([run.figures[figure.name].value for run in runs]), figure)


def value_of(runs: Sequence[Observation], figure: Figure) -> float:
    """The figure; over several seeds its mean, which is the geometric one where figures are compared by ratio."""
    if len(runs) == 1:
        return runs[0].figures[figure.name].value
    mean = float(_values(runs, figure).mean())
    return mean if figure.absolute else math.exp(mean)


def interval_of(runs: Sequence[Observation], figure: Figure) -> tuple[float, float] | None:
    """The result's own with one seed; with several, chance over the seeds and the profile's whole error."""
    held = runs[0].figures[figure.name].interval90
    if len(runs) == 1 and held is not None:
        return held
    if len(runs) == 1 and figure.counted:
        return None
    value = value_of(runs, figure)
    chance = _chance(runs, None, figure, _LEVEL)
    half = math.hypot(chance, float(_normal(_LEVEL)) * _alone(runs, figure))
    if not math.isfinite(half) or (half > _UNKNOWN and not figure.absolute):
        return None
    if figure.absolute:
        return max(0.0, value - half), value + half
    return value * math.exp(-half), value * math.exp(half)


# ---- two candidates


def difference(a: Sequence[Observation], b: Sequence[Observation], figure: Figure, level: float) -> Difference:
    """a - b, of logarithms where the figure is compared by ratio, with half its interval at `level`."""
    centre = float((_values(a, figure) - _values(b, figure)).mean())
    if a is b:
        return Difference(0.0, 0.0)
    chance, profile = _chance(a, b, figure, level), _apart(a, b, figure)
    return Difference(centre, math.hypot(chance, float(_normal(level)) * profile), chance, profile)


def _chance(a: Sequence[Observation], b: Sequence[Observation] | None, figure: Figure, level: float) -> float:
    """Half of the interval that chance alone makes: the larger of what one run and what the seeds say."""
    seeds = len(a)
    others: Sequence[Observation | None] = [None] * seeds if b is None else b
    parts = [_within(x, y, figure) for x, y in zip(a, others, strict=True)]
    traffics = min(len({run.traffic for run in runs}) for runs in (a, b) if runs is not None)
    sampling = sum(part.variance for part in parts) / seeds / traffics
    bank = sum(part.bank for part in parts) / seeds / seeds
    within = math.sqrt(sampling + bank)
    within *= _student(level, min(part.freedom for part in parts)) if math.isfinite(within) else 1.0
    if seeds == 1:
        return within
    apart = _values(a, figure) - (_values(b, figure) if b is not None else 0.0)
    between = _student(level, seeds - 1) * float(apart.std(ddof=1)) / math.sqrt(seeds)
    return max(within, between)


class _Within(NamedTuple):
    variance: float
    bank: float
    freedom: int


def _within(a: Observation, b: Observation | None, figure: Figure) -> _Within:
    """Variance of a difference from one pair of runs: left-out parts, and the banks. Infinite where it is unknown."""
    one = a.figures[figure.name]
    other = b.figures[figure.name] if b is not None else None
    bank = sum((seen.slope * run.bank) ** 2 for seen, run in ((one, a), (other, b)) if seen is not None and run)
    left = [_parts(seen, figure) for seen in (one, other) if seen is not None]
    if any(part is None for part in left):
        return _Within(0.0, bank, 1)
    pieces = [part for part in left if part is not None]
    freedom = min(map(len, pieces)) - 1
    if freedom < 1:
        return _Within(math.inf, bank, 1)
    if len(pieces) == 2 and len(pieces[0]) == len(pieces[1]):
        pieces = [pieces[0] - pieces[1]]
    return _Within(sum(_jackknife(part) for part in pieces), bank, freedom)


def _parts(seen: Seen, figure: Figure) -> FloatArray | None:
    return None if seen.without_G is None else _scaled(seen.without_G, figure)


def _jackknife(left_G: FloatArray) -> float:
    """Variance of a statistic from its G values with one part left out (Efron, The Jackknife, 1982, 3.1)."""
    return (len(left_G) - 1) / len(left_G) * float(((left_G - left_G.mean()) ** 2).sum())


def _student(level: float, freedom: int) -> float:
    return float(stdtrit(freedom, (1 + level) / 2))


def _normal(level: float) -> float:
    return float(ndtri((1 + level) / 2))


# ---- the profile's error


def slopes_of(runs: Sequence[Observation], figure: Figure) -> dict[str, float]:
    """d ln(figure) / d ln(time of an operator), mean over seeds."""
    out: dict[str, float] = {}
    for run in runs:
        slope = run.figures[figure.name].slope
        for operator, share in run.operator_share.items():
            out[operator] = out.get(operator, 0.0) + slope * share / len(runs)
    return out


def _sigma(slopes: Mapping[str, float], run: Observation) -> float:
    variance = sum((slope * run.errors[operator]) ** 2 for operator, slope in slopes.items())
    return math.sqrt(variance + (sum(slopes.values()) * run.speed_error) ** 2)


def _alone(runs: Sequence[Observation], figure: Figure) -> float:
    """1 sigma of ln(figure) from the whole error of the profile."""
    return _sigma(slopes_of(runs, figure), _reference(runs))


def _apart(a: Sequence[Observation], b: Sequence[Observation], figure: Figure) -> float:
    """1 sigma of the ratio from what the two do not share of the profile's error."""
    if a[0].profile != b[0].profile:
        return math.hypot(_alone(a, figure), _alone(b, figure))
    one, other = slopes_of(a, figure), slopes_of(b, figure)
    apart = {operator: one.get(operator, 0.0) - other.get(operator, 0.0) for operator in {**one, **other}}
    return _sigma(apart, _reference([*a, *b]))


def _reference(runs: Sequence[Observation]) -> Observation:
    """A run that knows the error of every operator of all of `runs`, which share a profile."""
    errors = {operator: error for run in runs for operator, error in run.errors.items()}
    first = runs[0]
    return Observation({}, {}, errors, first.speed_error, first.bank, first.profile, first.traffic)
