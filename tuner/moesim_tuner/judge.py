"""The judge: finalists of a search run on fresh seeds and held-out traffic, at full fidelity, and are compared fairly.

All finalists meet the same seeds and the same traffic, so two are compared by the ratio of a figure within each seed
(`moesim.compare`: common random numbers, Student's t over seeds, Bonferroni over the finalists). A *tie* is an interval
that contains 1. Of those that tie with the best, who may be chosen?

- where chance alone could have made the difference, the simplest one: the scenario as written, else the one with the
  fewest changes. Nothing speaks for changing what changes nothing;
- where only the errors of the profile could, the better one: on the figures there are it is better, and the finding
  says how likely it is that this holds. A change of that kind is worth a measurement (`moesim calibrate`).

Nothing that is worse than the scenario as written on the judged figures is ever chosen.

Figures of many seeds that are compared by ratio have a geometric mean, so that the ratio of means is the mean ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from moesim.compare import Difference, difference, interval_of, value_of
from moesim.errors import BadInput
from moesim.observe import Figure, Observation
from moesim.policy import load_plugin
from moesim.scenario.load import Scenario, load_scenario_text
from moesim.tune_spec import LimitSpec
from moesim_tuner.definition import Definition, field_texts
from moesim_tuner.figures import figure, violation
from moesim_tuner.finalists import Finalist, finalists, scaled
from moesim_tuner.heldout import HeldOut, hold_out, search_fields
from moesim_tuner.judgement import Interval, Judged, Judgement, Kept, Score, Status
from moesim_tuner.pareto import undominated
from moesim_tuner.protocols import Workers
from moesim_tuner.records import Point, Row, Task, Trial, derived_seed
from moesim_tuner.telling import sentences

__all__ = [
    "Judgement",
    "Ran",
    "base_scenario",
    "judge",
    "judge_seeds",
    "run_points",
    "same_by_chance",
    "search_fields",
    "tasks_of",
    "weigh",
]

_LEVEL = 0.9
_SAME = 1e-9
"""logarithms of figures nearer than this are equal: what is left is rounding"""
_UNKNOWN = 50.0
"""half of an interval of a logarithm beyond which it says nothing"""


def judge(definition: Definition, trials: Sequence[Trial], workers: Workers) -> Judgement:
    """Choose finalists, run them, compare them. A pure function of the definition and the trials, however many workers
    there are; it may be asked again at any time."""
    scenario = base_scenario(definition)
    held = hold_out(scenario, definition.spec)
    chosen = finalists(definition, trials)
    seeds = judge_seeds(definition)
    tested = run_points(definition, held, [one.point for one in chosen], seeds, workers)
    return weigh(definition, chosen, tested, seeds, held.notes)


def base_scenario(definition: Definition) -> Scenario:
    """The scenario as written, with `--set`; plugins are loaded. Raises BadInput."""
    for module in definition.plugins:
        load_plugin(module)
    return load_scenario_text(definition.text, Path(definition.base), definition.overrides, name=definition.name)


def judge_seeds(definition: Definition) -> tuple[int, ...]:
    """Seeds that the search has not used, `judge.seeds` of them."""
    root = definition.spec.seed
    used = {derived_seed(root, "search", i) for i in range(max(rung.seeds for rung in definition.rungs))}
    out: list[int] = []
    i = 0
    while len(out) < definition.spec.judge.seeds:
        seed = derived_seed(root, "judge", i)
        if seed not in used:
            out.append(seed)
            used.add(seed)
        i += 1
    return tuple(out)


# ---- running


@dataclass(frozen=True, slots=True)
class Ran:
    """What running a point came to. runs: one a seed where all are done, else none, and then state and reasons are of
    the first that is not."""

    state: str
    runs: tuple[Observation, ...] = ()
    reasons: tuple[str, ...] = ()
    scenario_hash: str = ""


def tasks_of(definition: Definition, held: HeldOut, point: Point, seeds: Sequence[int]) -> list[Task]:
    """What judges a point: held-out traffic, full fidelity, `judge.set`. Raises BadInput where there is no such
    scenario."""
    texts = definition.texts(point)
    candidate = load_scenario_text(definition.text, Path(definition.base), texts, name=definition.name)
    texts = (*texts, *held.final(candidate), *field_texts(definition.spec.judge.set))
    return [
        Task(definition.text, definition.name, definition.base, texts, seed, definition.plugins, True) for seed in seeds
    ]


def run_points(
    definition: Definition, held: HeldOut, points: Sequence[Point], seeds: Sequence[int], workers: Workers
) -> list[Ran]:
    """Run every point under every seed, side by side; one that is twice there is run once."""
    asked: list[Ran | list[Future[Row]]] = []
    known: dict[str, int] = {}
    for i, point in enumerate(points):
        first = known.setdefault(definition.space.key(point), i)
        if first < i:
            asked.append(asked[first])
            continue
        try:
            asked.append([workers.submit(task) for task in tasks_of(definition, held, point, seeds)])
        except BadInput as error:
            asked.append(Ran("illegal", reasons=tuple(str(p) for p in error.problems)))
    return [one if isinstance(one, Ran) else _tested([future.result() for future in one]) for one in asked]


def _tested(rows: Sequence[Row]) -> Ran:
    bad = next((row for row in rows if row.state != "done"), None)
    if bad is not None:
        return Ran(bad.state, reasons=bad.reasons, scenario_hash=bad.scenario_hash)
    runs = tuple(row.observation for row in rows if row.observation is not None)
    assert len(runs) == len(rows)
    return Ran("done", runs, scenario_hash=rows[0].scenario_hash)


# ---- weighing


def weigh(
    definition: Definition,
    chosen: Sequence[Finalist],
    tested: Sequence[Ran],
    seeds: Sequence[int],
    notes: Sequence[str] = (),
) -> Judgement:
    """The judgement over finalists, the first of which is the scenario as written. Pure."""
    spec = definition.spec
    limits = [_limits(one, spec.constraints) for one in tested]
    keeps = [
        bool(one.runs)
        and _has(one.runs, spec.objectives)
        and all(_inside(spec.constraints[n], k) for n, k in at.items())
        for one, at in zip(tested, limits, strict=True)
    ]
    runs = [one.runs for one in tested]
    level = 1 - (1 - _LEVEL) / max(1, sum(keeps) - 1)
    scores = _scores(definition, chosen, runs, keeps, level)
    judged = [
        Judged(
            trial=one.trial, origin=one.origin, point=dict(one.point), changes=_changes(chosen[0].point, one.point),
            state=found.state, reasons=found.reasons, keeps=kept, scores=at, constraints=held,
            figures=_means(found.runs), scenario_hash=found.scenario_hash,
        )
        for one, found, kept, at, held in zip(chosen, tested, keeps, scores, limits, strict=True)
    ]  # fmt: skip
    able = [i for i, kept in enumerate(keeps) if kept]
    members = _front(definition, judged, able)
    if len(spec.objectives) == 1:
        chosen_place = _choose_one(spec.objectives[0], judged, runs, able)
    else:
        chosen_place = _choose_of_several(definition, judged, runs, members)
    ties = tuple(i for i in able if judged[i].scores[spec.objectives[0]].mark == "tie")
    out = Judgement(
        objectives=tuple(spec.objectives), seeds=tuple(seeds), finalists=tuple(judged),
        winner=None if chosen_place is None else judged[chosen_place].trial, chosen=chosen_place,
        ties=ties if len(spec.objectives) == 1 else (), front=members, keep_settings=chosen_place == 0,
        tie_level=level, sentences=(), notes=tuple(notes), runs=tuple(runs),
    )  # fmt: skip
    return replace(out, sentences=sentences(out))


def _changes(default: Point, point: Point) -> dict[str, tuple[object, object]]:
    return {name: (default.get(name), value) for name, value in point.items() if default.get(name) != value}


def _has(runs: Sequence[Observation], names: Sequence[str]) -> bool:
    return all(name in run.figures for run in runs for name in names)


def _means(runs: Sequence[Observation]) -> dict[str, float]:
    if not runs:
        return {}
    names = [name for name in runs[0].figures if _has(runs, [name])]
    return {name: value_of(runs, figure(name)) for name in names}


# ---- constraints


def _limits(tested: Ran, constraints: dict[str, LimitSpec]) -> dict[str, Kept]:
    out = {}
    for name, limit in constraints.items() if tested.runs else ():
        if not _has(tested.runs, [name]):
            out[name] = Kept(None, None, "violated")
            continue
        of = figure(name)
        value, interval = value_of(tested.runs, of), interval_of(tested.runs, of)
        out[name] = Kept(value, interval, _status(limit, value, interval, of))
    return out


def _status(limit: LimitSpec, value: float, interval: Interval | None, of: Figure) -> Status:
    def inside(at: float) -> bool:
        return violation({of.name: at}, of.name, limit.min, limit.max) <= 0

    if interval is None:
        return ("kept" if inside(value) else "violated") if of.counted else "not sure"
    low, high = interval
    if inside(low) and inside(high):
        return "kept"
    beyond = (limit.max is not None and low > limit.max) or (limit.min is not None and high < limit.min)
    return "violated" if beyond else "not sure"


def _inside(limit: LimitSpec, kept: Kept) -> bool:
    """By its value: an interval that reaches over a limit is no reason to give a setting up, but to say so."""
    return kept.value is not None and violation({"": kept.value}, "", limit.min, limit.max) <= 0


# ---- objectives


def _scores(
    definition: Definition,
    chosen: Sequence[Finalist],
    runs: Sequence[Sequence[Observation]],
    keeps: Sequence[bool],
    level: float,
) -> list[dict[str, Score]]:
    """By finalist and objective. The best is the best of those that keep the constraints; others are compared with it,
    too, and have no mark."""
    out: list[dict[str, Score]] = [{} for _ in chosen]
    for at, (name, sign) in enumerate(zip(definition.spec.objectives, definition.signs, strict=True)):
        of = figure(name)
        known = [i for i, one in enumerate(runs) if one and _has(one, [name])]
        values = {i: value_of(runs[i], of) for i in known}
        able = [i for i in known if keeps[i]]
        best = max(able, key=lambda i: (sign * values[i], -i)) if able else None
        found = {i: difference(runs[i], runs[best], of, level) for i in known} if best is not None else {}
        tied = [i for i in able if abs(found[i].centre) <= max(found[i].half, of.resolution, _SAME)]
        for i in known:
            promised = chosen[i].promised[at] if chosen[i].promised else None
            score = Score(values[i], interval_of(runs[i], of), promised=promised)
            if found:
                mark = None if i not in tied or len(able) == 1 else ("tie" if len(tied) > 1 else "best")
                centre, half, chance, _ = found[i]
                score = Score(
                    score.value, score.interval90, _told(centre, of), _ends(centre, half, of),
                    _ends(centre, chance, of), mark, promised,
                )  # fmt: skip
            out[i][name] = score
    return out


def _told(centre: float, of: Figure) -> float:
    return centre if of.absolute else math.exp(centre)


def _ends(centre: float, half: float, of: Figure) -> Interval | None:
    if not math.isfinite(half) or (half > _UNKNOWN and not of.absolute):
        return None
    return _told(centre - half, of), _told(centre + half, of)


# ---- choosing


def same_by_chance(found: Difference, of: Figure) -> bool:
    """Chance alone could have made this difference (or it is none)."""
    return abs(found.centre) <= max(found.chance, of.resolution, _SAME)


def _simple(judged: Sequence[Judged], i: int) -> tuple[bool, int, int]:
    """The scenario as written, then fewer changes, then the better in the search."""
    return i != 0, len(judged[i].changes), i


def _choose_one(
    name: str, judged: Sequence[Judged], runs: Sequence[Sequence[Observation]], able: Sequence[int]
) -> int | None:
    if not able:
        return None
    of = figure(name)
    sign = 1 if of.more_is_better else -1
    value = {i: sign * judged[i].scores[name].value for i in able}
    best = max(able, key=lambda i: (value[i], -i))
    level = 1 - (1 - _LEVEL) / max(1, len(able) - 1)
    alike = [i for i in able if same_by_chance(difference(runs[i], runs[best], of, level), of)]
    floor = value.get(0, -math.inf)
    return min((i for i in alike if value[i] >= floor), key=lambda i: _simple(judged, i))


def _front(definition: Definition, judged: Sequence[Judged], able: Sequence[int]) -> tuple[int, ...]:
    if len(definition.spec.objectives) == 1:
        return ()
    values = [[judged[i].scores[name].value for name in definition.spec.objectives] for i in able]
    return tuple(able[i] for i in undominated(values, definition.signs))


def _choose_of_several(
    definition: Definition, judged: Sequence[Judged], runs: Sequence[Sequence[Observation]], members: Sequence[int]
) -> int | None:
    """The knee: the member of the front that is nearest to the best of every objective at once, each scaled over the
    front, by ratio (compromise programming: Yu, Management Science 19 (1973)). Where chance alone could part it from
    the scenario as written in every objective, that one."""
    if not members:
        return None
    names, signs = definition.spec.objectives, definition.signs
    places = scaled([[judged[i].scores[name].value for name in names] for i in members], names)
    ideal = [
        max(column) if sign > 0 else min(column) for column, sign in zip(zip(*places, strict=True), signs, strict=True)
    ]
    away = {i: math.dist(place, ideal) for i, place in zip(members, places, strict=True)}
    knee = min(members, key=lambda i: (away[i], _simple(judged, i)))
    if judged[0].keeps and all(
        same_by_chance(difference(runs[0], runs[knee], figure(name), _LEVEL), figure(name)) for name in names
    ):
        return 0
    return knee
