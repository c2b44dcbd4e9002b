"""The coordinator against a world whose answers are known: rows are computed from the point, by workers that end in any
order and a strategy that says what it has been told."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_tuner.definition import Definition
from moesim_tuner.records import Candidate, Row, Task, Trial, canonical, derived_seed
from moesim_tuner.study import run_study

from moesim.tune_spec import RungSpec, TuneSpec

SPEC = TuneSpec.model_validate(
    {
        "space": {"parallel.ep": {"range": [0, 99]}, "parallel.tp": {"range": [0, 9]}},
        "objectives": ["output_tok_per_s"],
        "constraints": {"ttft_p99_ms": {"max": 60}},
        "trials": 23,
        "batch": 4,
    }
)
RUNGS = (RungSpec(set={"requests.num_requests": 10}), RungSpec(), RungSpec(seeds=2))


def definition(asynchronous: bool = False, trials: int = 23) -> Definition:
    spec = SPEC.model_copy(update={"trials": trials})
    return Definition("", "world", ".", spec, "random", RUNGS, asynchronous=asynchronous)


def world(task: Task) -> Row:
    """ep * 10 + tp, less on the short rung, with a little of the seed; ep 13 does not fit, tp 7 is illegal."""
    at = dict(text.split("=") for text in task.overrides)
    ep, tp = int(at["parallel.ep"]), int(at["parallel.tp"])
    if ep == 13:
        return Row("infeasible", limits={"memory": 0.5}, reasons=("too large",))
    if tp == 7:
        return Row("illegal", limits={"legality": 1.0}, reasons=("seven",))
    short = "requests.num_requests" in at
    return Row("done", {"output_tok_per_s": (ep * 10 + tp) * (0.5 if short else 1) + task.seed % 3, "ttft_p99_ms": ep})


class Later:
    """Three threads that answer whenever they like."""

    parallel = 3

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pool = ThreadPoolExecutor(self.parallel)

    def submit(self, task: Task) -> Future[Row]:
        return self.pool.submit(self._answer, task, self.rng.choice((0, 0, 1e-4, 1e-3)))

    def _answer(self, task: Task, after_s: float) -> Row:
        time.sleep(after_s)
        return world(task)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


class Told:
    """A strategy that draws from what it has been told and nothing else."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def tell(self, trials: Iterable[Trial]) -> None:
        self.trials += trials

    def propose(self, count: int) -> list[Candidate]:
        known = canonical([t.to_json(clocks=False) for t in sorted(self.trials, key=lambda t: t.number)])
        rng = random.Random(derived_seed(5, known))
        return [
            Candidate({"parallel.ep": rng.randrange(100), "parallel.tp": rng.randrange(10)}, "test")
            for _ in range(count)
        ]


class Third:
    """A ladder: every third number stops at the first rung, and what is below the median so far at the second."""

    def climbs(self, rung: int, trial: Trial, trials: Sequence[Trial]) -> bool:
        if rung == 0:
            return trial.number % 3 != 0
        past = sorted(t.rungs[1]["output_tok_per_s"] for t in trials if len(t.rungs) > 1)
        return not past or trial.values[0] >= past[len(past) // 2]


class Memory:
    """A store that can be killed: it raises once `lives` trials are kept, after keeping them."""

    def __init__(self, lives: int = 10**9) -> None:
        self.kept: list[Trial] = []
        self.batches: list[list[Candidate]] = []
        self.lives = lives

    def trials(self) -> list[Trial]:
        return sorted(self.kept, key=lambda t: t.number)

    def proposed(self) -> list[list[Candidate]]:
        return [list(batch) for batch in self.batches]

    def propose(self, first: int, candidates: Sequence[Candidate]) -> None:
        assert first == sum(map(len, self.batches))
        self.batches.append(list(candidates))

    def append(self, trials: Sequence[Trial]) -> None:
        assert not {t.number for t in trials} & {t.number for t in self.kept}
        self.kept += trials
        if len(self.kept) >= self.lives:
            raise KeyboardInterrupt

    def close(self) -> None: ...


def study(trials: Sequence[Trial]) -> str:
    return canonical([t.to_json(clocks=False) for t in trials])


def run(seed: int = 0, store: Memory | None = None, **about: int | bool) -> list[Trial]:
    store = store if store is not None else Memory()
    workers = Later(seed)
    try:
        return run_study(definition(**about), Told(), Third(), workers, store)  # type: ignore[arg-type]
    finally:
        workers.close()


def test_every_trial_ends_once_with_the_state_that_the_world_gives_it() -> None:
    trials = run(trials=200)
    assert [t.number for t in trials] == list(range(200))
    for trial in trials:
        ep, tp = trial.point["parallel.ep"], trial.point["parallel.tp"]
        if ep == 13:
            assert (trial.state, trial.violations, trial.values) == ("infeasible", {"memory": 0.5}, ())
        elif tp == 7:
            assert (trial.state, trial.reasons, trial.rungs) == ("illegal", ("seven",), ())
        elif trial.number % 3 == 0:
            assert (trial.state, len(trial.rungs)) == ("pruned", 1)
        else:
            assert trial.state == ("complete" if len(trial.rungs) == 3 else "pruned")
            assert trial.violations["ttft_p99_ms"] == pytest.approx((ep - 60) / 60)
            assert trial.feasible == (trial.state == "complete" and ep <= 60)
    assert {t.state for t in trials} == {"complete", "pruned", "infeasible", "illegal"}


def test_a_rung_is_the_mean_over_its_seeds_and_all_candidates_run_the_same() -> None:
    trials = run()
    seeds = [derived_seed(0, "search", i) for i in range(2)]
    for trial in (t for t in trials if t.state == "complete"):
        value = trial.point["parallel.ep"] * 10 + trial.point["parallel.tp"]
        assert trial.values == (value + sum(seed % 3 for seed in seeds) / 2,)
        assert trial.rungs[0]["output_tok_per_s"] == value / 2 + seeds[0] % 3


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_whichever_ends_first_the_study_is_the_same(seed: int) -> None:
    assert study(run(seed)) == study(run(0))


@pytest.mark.parametrize("lives", range(1, 24))
def test_a_study_that_was_cut_off_anywhere_ends_as_if_it_had_not_been(lives: int) -> None:
    store = Memory(lives)
    with pytest.raises(KeyboardInterrupt):
        run(lives, store)
    kept = {t.number: t for t in store.kept}
    store.lives = 10**9
    trials = run(lives + 1, store)
    assert study(trials) == study(run(0))
    assert all(trials[number] == trial for number, trial in kept.items())


@given(st.integers(0, 10**6), st.integers(1, 22))
@settings(max_examples=20, deadline=None)
def test_asynchronous_studies_end_every_trial_also_after_a_death(seed: int, lives: int) -> None:
    store = Memory(lives)
    with pytest.raises(KeyboardInterrupt):
        run(seed, store, asynchronous=True)
    store.lives = 10**9
    trials = run(seed + 1, store, asynchronous=True)
    assert [t.number for t in trials] == list(range(23))
    assert sum(map(len, store.batches)) == 23


def test_more_trials_go_on_where_the_study_ended() -> None:
    store = Memory()
    run(0, store, trials=8)
    assert study(run(1, store, trials=24)) == study(run(2, trials=24))


def test_an_exhausted_space_ends_the_study() -> None:
    class Few(Told):
        def propose(self, count: int) -> list[Candidate]:
            return super().propose(count)[: max(0, 10 - len(self.trials))]

    trials = run_study(definition(), Few(), Third(), Later(1), Memory())
    assert len(trials) == 10


def test_a_definition_is_kept_and_read_back() -> None:
    one = definition()
    assert Definition.from_json(one.to_json()) == one
    assert replace(one, base="elsewhere").hash == one.hash != replace(one, sampler="tpe").hash
    assert definition(trials=99).hash == one.hash
