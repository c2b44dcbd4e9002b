"""A tuning from file to finding: the definition, the search, the judgement, the reasons. What `cli` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import BadInput, Problem
from moesim_tuner.definition import Definition
from moesim_tuner.records import Trial
from moesim_tuner.store import Kept, definition_of, list_studies, open_store, read_study
from moesim_tuner.store.urls import place_of

if TYPE_CHECKING:
    from moesim_tuner.protocols import Workers
    from moesim_tuner.store import DurableStore

__all__ = ["Found", "Session", "begin", "define", "found_of", "go_on", "latest", "search"]

JUDGEMENT, WHY = "judgement", "why"
"""names of notes in the store"""


def define(
    file: Path,
    overrides: Sequence[str],
    plugins: Sequence[str],
    changed: Mapping[str, int | None],
    asynchronous: bool,
) -> tuple[Definition, list[str]]:
    """What the study of a file is about, and notes for the user. changed: keys of `tune` that the command line sets.

    Raises BadInput with every problem of the scenario and of its `tune` section.
    """
    from moesim.scenario.load import load_scenario
    from moesim.scenario.yamlio import read_text
    from moesim_tuner.checks import check_figures
    from moesim_tuner.judge import search_fields
    from moesim_tuner.ladder import default_rungs
    from moesim_tuner.search import choose_sampler

    told = (*overrides, *(f"tune.{key}={value}" for key, value in changed.items() if value is not None))
    scenario = load_scenario(file, told)
    spec = scenario.tune
    if spec is None:
        message = "there is no `tune:` section, so nothing is to be searched; docs/tune.md shows one"
        raise BadInput(Problem(str(file), message))
    check_figures(file, told, scenario)
    fields, notes = search_fields(scenario, spec)
    definition = Definition(
        text=read_text(file),
        name=scenario.name,
        base=str(file.parent.resolve()),
        spec=spec,
        sampler=spec.sampler,
        rungs=tuple(spec.rungs) if spec.rungs is not None else default_rungs(scenario),
        overrides=tuple(told),
        fields=tuple(fields),
        plugins=tuple(plugins),
        scenario_hash=scenario.hash,
        asynchronous=asynchronous,
    )
    return replace(definition, sampler=choose_sampler(definition)), [*scenario.warnings, *notes]


@dataclass
class Session:
    """A study that is open for writing. storage: its URL; shown_storage: without a password."""

    name: str
    storage: str
    definition: Definition
    store: DurableStore

    @property
    def shown_storage(self) -> str:
        """For messages."""
        return place_of(self.storage).shown

    def __enter__(self) -> Session:
        """Itself."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Everything kept is brought up to date."""
        self.store.__exit__(kind, error, trace)


def begin(definition: Definition, name: str, storage: str) -> Session:
    """Open a study, new or of the same definition. Raises BadInput, OSError (see `open_store`)."""
    store = open_store(storage, name, definition)
    return Session(name, storage, store.definition, store)


def go_on(name: str | None, storage: str, trials: int | None) -> Session:
    """Open a study that is kept, the latest without a name; trials: how many it is to have now."""
    name = name or latest(storage)
    store = open_store(storage, name)
    definition = store.definition
    if trials is not None and trials != definition.spec.trials:
        store.close()
        spec = definition.spec.model_copy(update={"trials": trials})
        return begin(replace(definition, spec=spec), name, storage)
    return Session(name, storage, definition, store)


def latest(storage: str) -> str:
    """The study that changed last. Raises BadInput where there is none."""
    found = list_studies(storage)
    if not found:
        where = place_of(storage).shown
        raise BadInput(Problem(where, "no study is kept there; `moesim tune FILE` begins one"))
    return max(found, key=lambda line: (line.changed_s, line.name)).name


def search(
    session: Session,
    workers: int,
    cluster: str | None,
    told: Callable[[Sequence[Trial]], None],
    stage: Callable[[str], None],
) -> Found:
    """Search, judge, explain. stage: is told what is done now, in a few words."""
    from moesim_tuner.workers import make_workers

    timeout_s = float(session.definition.spec.timeout_s)
    pool = make_workers(workers, timeout_s, cluster=cluster)  # starts while the rest is imported
    try:
        _search(session, pool, told, stage)
    finally:
        pool.close()
    return _found(session.name, session.store.kept)


def _search(
    session: Session, pool: Workers, told: Callable[[Sequence[Trial]], None], stage: Callable[[str], None]
) -> None:
    from moesim_tuner.heuristics import starts
    from moesim_tuner.judge import base_scenario, judge
    from moesim_tuner.ladder import Rungs
    from moesim_tuner.search import strategy
    from moesim_tuner.study import run_study
    from moesim_tuner.why import why

    definition, store = session.definition, session.store
    scenario = base_scenario(definition)
    if scenario.hash != definition.scenario_hash:
        message = (
            "the scenario's files have changed since the study began, so new trials could not be compared with old"
            " ones. Begin another study (--study NAME)"
        )
        raise BadInput(Problem(session.name, message))
    first = starts(scenario, definition.space, definition.spec)
    stage("searching")
    trials = run_study(definition, strategy(definition, first), Rungs(definition), pool, store, told)
    if any(trial.feasible for trial in trials):
        stage("judging the best on fresh seeds and held-out traffic")
        judgement = judge(definition, trials, pool)
        store.note(JUDGEMENT, judgement.to_json())
        if judgement.winner is not None:
            stage("asking why")
            store.note(WHY, why(definition, trials, judgement, pool).to_json())


@dataclass(frozen=True)
class Found:
    """What is known of a study. judgement, why: JSON of the last time it was judged, None before."""

    name: str
    kept: Kept
    definition: Definition
    trials: list[Trial]
    judgement: dict[str, Any] | None
    why: dict[str, Any] | None

    @property
    def winner(self) -> int | None:
        """The number of the trial to use: the judgement's; before there is one, None."""
        return None if self.judgement is None else self.judgement["winner"]


def found_of(name: str | None, storage: str) -> Found:
    """What is kept of a study, the latest without a name; it may be running."""
    name = name or latest(storage)
    return _found(name, read_study(storage, name))


def _found(name: str, kept: Kept) -> Found:
    notes = kept.notes
    return Found(name, kept, definition_of(kept), kept.trials, notes.get(JUDGEMENT), notes.get(WHY))
