"""The coordinator: one process owns a study. It asks the strategy for a batch, has it simulated rung by rung, keeps the
trials, tells the strategy, until the trials are done.

What makes a study repeatable: a batch is proposed from the trials of all batches before it and from nothing else; its
trials are told in the order of their numbers, whichever ended first; every draw is keyed by the study's seed. So any
number of workers, a death at any moment, and any hash seed lead to the same study.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moesim.tune_spec import RungSpec, TuneSpec
from moesim_tuner.figures import more_is_better, violation
from moesim_tuner.protocols import Ladder, Store, Strategy, Workers
from moesim_tuner.records import Candidate, Row, Task, Trial, TrialState, derived_seed
from moesim_tuner.space import Space

__all__ = ["Definition", "finish", "run_study"]


@dataclass(frozen=True)
class Definition:
    """What a study is about. text, name, base: the scenario (see `Task`); overrides: `--set` texts; spec: its `tune`
    block; rungs: the ladder, cheapest first; fields: texts that hold for the whole search (which part of the routing
    pool it sees)."""

    text: str
    name: str
    base: str
    spec: TuneSpec
    space: Space
    rungs: tuple[RungSpec, ...]
    overrides: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()

    def tasks(self, candidate: Candidate, rung: int) -> list[Task]:
        """What climbs `rung`: one task a seed, the same seeds for every candidate (common random numbers)."""
        step = self.rungs[rung]
        set_texts = tuple(f"{path}={json.dumps(value)}" for path, value in step.set.items())
        overrides = (*self.overrides, *self.space.overrides(candidate.point), *self.fields, *set_texts)
        seeds = [derived_seed(self.spec.seed, "search", i) for i in range(step.seeds)]
        return [Task(self.text, self.name, self.base, overrides, seed, self.plugins) for seed in seeds]


def run_study(
    definition: Definition,
    strategy: Strategy,
    ladder: Ladder,
    workers: Workers,
    store: Store,
    told: Callable[[Sequence[Trial]], None] = lambda trials: None,
) -> list[Trial]:
    """Run, or go on with, a study until its trials are done or its space is exhausted. Returns every trial."""
    trials = store.trials()
    done = {t.number for t in trials}
    told(trials)
    number = 0
    batches = store.proposed()
    while number < definition.spec.trials:
        if batches:
            batch = batches.pop(0)
        else:
            batch = strategy.propose(min(definition.spec.batch, definition.spec.trials - number))
            if not batch:
                break
            store.propose(number, batch)
        numbers = range(number, number + len(batch))
        new = [n for n in numbers if n not in done]
        if new:
            before = [t for t in trials if t.number < number]
            fresh = _batch(definition, [(n, batch[n - number]) for n in new], ladder, workers, before)
            store.append(fresh)
            trials = sorted([*trials, *fresh], key=lambda t: t.number)
            told(fresh)
        strategy.tell([t for t in trials if t.number in numbers])
        number += len(batch)
    return trials


def _batch(
    definition: Definition,
    batch: Sequence[tuple[int, Candidate]],
    ladder: Ladder,
    workers: Workers,
    before: Sequence[Trial],
) -> list[Trial]:
    """Simulate the candidates, rung by rung, those that climb."""
    began = time.time()
    rows: dict[int, list[list[Row]]] = {number: [] for number, _ in batch}
    climbing = list(batch)
    for rung in range(len(definition.rungs)):
        futures = {n: [workers.submit(task) for task in definition.tasks(c, rung)] for n, c in climbing}
        for n, asked in futures.items():
            rows[n].append([future.result() for future in asked])
        climbing = [(n, c) for n, c in climbing if all(row.state == "done" for row in rows[n][-1])]
        if rung + 1 < len(definition.rungs) and climbing:
            climbing = [
                (n, c) for n, c in climbing if ladder.climbs(rung, finish(definition, n, c, rows[n], began), before)
            ]
    return [finish(definition, n, c, rows[n], began) for n, c in batch]


def finish(
    definition: Definition, number: int, candidate: Candidate, rungs: Sequence[Sequence[Row]], began: float
) -> Trial:
    """The verdict over a candidate's rows."""
    spec = definition.spec
    last = rungs[-1]
    bad = next((row for row in last if row.state != "done"), None)
    means = tuple(_mean([row.figures for row in rows]) for rows in rungs if all(row.state == "done" for row in rows))
    if bad is not None:
        assert bad.state != "done"
        state: TrialState = bad.state
        return Trial(
            number, candidate.point, candidate.origin, state, (), dict(bad.limits), means, bad.reasons,
            bad.scenario_hash, began, time.time(),
        )  # fmt: skip
    figures = means[-1]
    missing = [name for name in spec.objectives if name not in figures]
    if missing:
        reason = f"a run of this scenario has no {', '.join(missing)}"
        return Trial(
            number, candidate.point, candidate.origin, "illegal", (), {"legality": 1.0}, means, (reason,),
            last[0].scenario_hash, began, time.time(),
        )  # fmt: skip
    violations = {name: violation(figures, name, limit.min, limit.max) for name, limit in spec.constraints.items()}
    state = "complete" if len(rungs) == len(definition.rungs) else "pruned"
    values = tuple(figures[name] for name in spec.objectives)
    return Trial(
        number, candidate.point, candidate.origin, state, values, violations, means, (), last[0].scenario_hash, began,
        time.time(),
    )  # fmt: skip


def _mean(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over seeds of the figures that every run has."""
    names = [name for name in figures[0] if all(name in row for row in figures)]
    return {name: sum(row[name] for row in figures) / len(figures) for name in names}


def signs(definition: Definition) -> tuple[int, ...]:
    """1 where an objective is to be large, -1 where it is to be small."""
    return tuple(1 if more_is_better(name) else -1 for name in definition.spec.objectives)
