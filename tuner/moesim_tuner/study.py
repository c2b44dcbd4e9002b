"""The coordinator: one process owns a study. It asks the strategy for a batch, has it simulated rung by rung, keeps
each trial as it ends, tells the strategy, until the trials are done.

What makes a study repeatable: a batch is proposed from the trials of all batches before it and from nothing else; its
trials are told in the order of their numbers, whichever ended first; every draw is keyed by the study's seed. So any
number of workers, a death at any moment, and any hash seed lead to the same study. `asynchronous` gives that up: a
candidate is proposed whenever a worker is free, from whatever has ended by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from moesim_tuner.definition import Definition
from moesim_tuner.figures import violation
from moesim_tuner.protocols import Ladder, Store, Strategy, Workers
from moesim_tuner.records import Candidate, Row, Trial, TrialState

__all__ = ["finish", "run_study"]

Told = Callable[[Sequence[Trial]], None]


def run_study(
    definition: Definition,
    strategy: Strategy,
    ladder: Ladder,
    workers: Workers,
    store: Store,
    told: Told = lambda trials: None,
) -> list[Trial]:
    """Run, or go on with, a study until its trials are done or its space is exhausted.

    told: is given the trials that were there, then those that end, each once they are kept. Returns every trial by
    number. Raises what the store raises; what it has kept until then stays kept.
    """
    run = _Run(definition, strategy, ladder, workers, store, told)
    run.trials = {trial.number: trial for trial in store.trials()}
    if run.trials:
        told([run.trials[number] for number in sorted(run.trials)])
    (run.asynchronous if definition.asynchronous else run.in_batches)()
    return [run.trials[number] for number in sorted(run.trials)]


@dataclass
class _Climber:
    """A candidate on its way up. rows: of each rung so far; asked: of the one it is on."""

    number: int
    candidate: Candidate
    began: float
    rows: list[list[Row]] = field(default_factory=list)
    asked: list[Future[Row]] = field(default_factory=list)


@dataclass
class _Run:
    definition: Definition
    strategy: Strategy
    ladder: Ladder
    workers: Workers
    store: Store
    told: Told
    trials: dict[int, Trial] = field(default_factory=dict)

    def in_batches(self) -> None:
        """Batch after batch; one that was cut off is gone on with."""
        spec, number = self.definition.spec, 0
        batches = self.store.proposed()
        while number < spec.trials:
            if batches:
                batch = batches.pop(0)
            else:
                batch = self.strategy.propose(min(spec.batch, spec.trials - number))
                if not batch:
                    return
                self.store.propose(number, batch)
            numbered = dict(enumerate(batch, number))
            before = [self.trials[n] for n in range(number)]
            climbers = [self._start(n, c) for n, c in numbered.items() if n not in self.trials]
            for ended in self._climb(climbers, lambda _, before=before: before):  # type: ignore[misc]
                self._keep(ended)
            self.strategy.tell([self.trials[n] for n in numbered])
            number += len(batch)

    def asynchronous(self) -> None:
        """One candidate at a time, whenever a worker is free."""
        spec, proposed = self.definition.spec, [c for batch in self.store.proposed() for c in batch]
        self.strategy.tell([self.trials[n] for n in sorted(self.trials)])
        climbers = [self._start(n, c) for n, c in enumerate(proposed) if n not in self.trials]
        number = len(proposed)

        def more() -> None:
            nonlocal number
            while number < spec.trials and len(climbers) < self.workers.parallel:
                batch = self.strategy.propose(1)
                if not batch:
                    return
                self.store.propose(number, batch)
                climbers.append(self._start(number, batch[0]))
                number += 1

        more()
        for ended in self._climb(climbers, lambda _: list(self.trials.values())):
            self._keep(ended)
            self.strategy.tell(ended)
            more()

    def _keep(self, ended: Sequence[Trial]) -> None:
        self.store.append(ended)
        self.trials |= {trial.number: trial for trial in ended}
        self.told(ended)

    def _start(self, number: int, candidate: Candidate) -> _Climber:
        climber = _Climber(number, candidate, time.time())
        self._ask(climber)
        return climber

    def _ask(self, climber: _Climber) -> None:
        tasks = self.definition.tasks(climber.candidate.point, len(climber.rows))
        climber.asked = [self.workers.submit(task) for task in tasks]

    def _climb(self, climbers: list[_Climber], before: Callable[[_Climber], Sequence[Trial]]) -> Iterator[list[Trial]]:
        """Take rows as they come, send candidates up or end them: those that have ended, until none is left. `climbers`
        may grow meanwhile."""
        while climbers:
            wait([f for climber in climbers for f in climber.asked if not f.done()], return_when=FIRST_COMPLETED)
            ended = []
            for climber in [c for c in climbers if all(f.done() for f in c.asked)]:
                climber.rows.append([f.result() for f in climber.asked])
                trial = finish(self.definition, climber.number, climber.candidate, climber.rows, climber.began)
                below = trial.state == "pruned"  # done so far, with rungs above
                if below and self.ladder.climbs(len(climber.rows) - 1, trial, before(climber)):
                    self._ask(climber)
                    continue
                climbers.remove(climber)
                ended.append(trial)
            if ended:
                yield sorted(ended, key=lambda t: t.number)


def finish(
    definition: Definition, number: int, candidate: Candidate, rungs: Sequence[Sequence[Row]], began: float
) -> Trial:
    """The verdict over a candidate's rows: `pruned` where the ladder has rungs that it did not climb."""
    spec, last = definition.spec, rungs[-1]
    bad = next((row for row in last if row.state != "done"), None)
    means = tuple(_mean([row.figures for row in rows]) for rows in rungs if all(row.state == "done" for row in rows))

    def trial(
        state: TrialState,
        violations: Mapping[str, float],
        values: tuple[float, ...] = (),
        reasons: tuple[str, ...] = (),
        of: Row = last[0],
    ) -> Trial:
        return Trial(
            number, candidate.point, candidate.origin, state, values, violations, means, reasons, of.scenario_hash,
            began, time.time(),
        )  # fmt: skip

    if bad is not None:
        assert bad.state != "done"
        return trial(bad.state, dict(bad.limits), reasons=bad.reasons, of=bad)
    figures = means[-1]
    missing = [name for name in spec.objectives if name not in figures]
    if missing:
        reason = f"a run of this scenario has no {', '.join(missing)}"
        return trial("illegal", {"legality": 1.0}, reasons=(reason,))
    violations = {name: violation(figures, name, limit.min, limit.max) for name, limit in spec.constraints.items()}
    values = tuple(figures[name] for name in spec.objectives)
    return trial("complete" if len(rungs) == len(definition.rungs) else "pruned", violations, values)


def _mean(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over seeds of the figures that every run has."""
    names = [name for name in figures[0] if all(name in row for row in figures)]
    return {name: sum(row[name] for row in figures) / len(figures) for name in names}
