"""A run's bookkeeping on counted time: groups that do not fit together, refusals, the budget, the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from moesim_kernels.bench.harness import BROKE, Run, Summary
from moesim_kernels.bench.log import LogWriter, read_log
from moesim_kernels.bench.plan import Case, Plan
from moesim_kernels.bench.pool import PoolFull
from moesim_kernels.bench.schedule import Schedule

MACHINE = {"device": "counted"}
CASES = tuple(Case("gemm", {"n": 8, "k": 8}, {"m": m}, "fp32") for m in range(1, 7))


@dataclass
class World:
    """Time that passes only when something runs, and room for `room` cases at once."""

    room: int = 100
    build_s: float = 0.5
    sample_s: float = 1.0
    now: float = 1000.0
    built: list[int] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    releases: int = 0
    most_open: int = 0
    fails: Callable[[int], None] = lambda m: None
    works: Callable[[], bool] = lambda: True
    full: type[Exception] = PoolFull

    def build(self, case: Case) -> Counted:
        m = int(case.size["m"])
        if len(self.open) >= self.room:
            raise self.full(2, 1)
        self.now += self.build_s
        self.built.append(m)
        self.open.add(m)
        self.most_open = max(self.most_open, len(self.open))
        return Counted(self, m)

    def release(self) -> None:
        assert not self.open
        self.releases += 1


@dataclass
class Counted:
    """A sampler that takes `sample_s` and says so in nanoseconds times the case's m."""

    world: World
    m: int
    remark: str = ""

    def sample(self) -> tuple[float, float]:
        self.world.fails(self.m)
        self.world.now += self.world.sample_s
        return 100.0 * self.m, 200.0 * self.m

    def close(self) -> None:
        self.world.open.discard(self.m)


def go(world: World, path: Path, budget_s: float = 1e6, target: int = 6, minimum: int = 2) -> Summary:
    plan = Plan("cpu", CASES)
    log = LogWriter(path, plan, MACHINE)
    roles = {case.id: "grid" for case in CASES}
    schedule = Schedule(roles, {}, log.record.counts(), budget_s, target, minimum, 0)
    seen: list[float] = []
    run = Run(plan, schedule, log, world.build, lambda: 5.0, lambda: world.now, lambda s: seen.append(s.left_s))
    run.works = world.works
    run.leave_out(log.record.refused)
    try:
        summary = run.go(world.release)
    finally:
        log.close()
    assert all(left <= budget_s for left in seen)
    assert summary.stopped == "broken" or not world.open
    return summary


def counts(path: Path) -> list[int]:
    have = read_log(path, Plan("cpu", CASES)).counts()
    return [have.get(case.id, 0) for case in CASES]


def test_all_cases_reach_the_target_round_by_round(tmp_path: Path):
    world = World()
    summary = go(world, tmp_path / "log")
    assert (summary.stopped, summary.finished, summary.samples, summary.short) == ("complete", 6, 36, [])
    assert summary.seconds == 6 * 0.5 + 36 * 1.0  # setup is part of it
    assert counts(tmp_path / "log") == [6] * 6
    record = read_log(tmp_path / "log")
    assert [line.round for line in record.lines] == [i // 6 for i in range(36)]
    for n in range(6):
        assert len({line.id for line in record.lines if line.round == n}) == 6
    assert {line.reference_ns for line in record.lines} == {5.0}
    assert {line.ns for line in record.lines} == {(100.0 * m,) for m in range(1, 7)}


def test_what_does_not_fit_together_takes_turns(tmp_path: Path):
    world = World(room=4)
    summary = go(world, tmp_path / "log")
    assert (summary.stopped, summary.refused) == ("complete", {})
    assert counts(tmp_path / "log") == [6] * 6
    assert world.most_open == 4
    assert world.releases >= 3  # the groups were changed more than once: they came back
    lines = read_log(tmp_path / "log").lines
    first = {line.id for line in lines[:8]}
    assert len(first) == 4
    assert {line.id for line in lines[8:12]}.isdisjoint(first)  # minimum of one group, then of the other


def test_groups_share_the_time(tmp_path: Path):
    summary = go(World(room=3, build_s=0.0), tmp_path / "log", budget_s=12.0)
    assert (summary.stopped, summary.short) == ("budget", [])
    assert counts(tmp_path / "log") == [2] * 6


def test_case_that_fits_not_even_alone_is_refused(tmp_path: Path):
    summary = go(World(room=0), tmp_path / "log")
    assert summary.samples == 0
    assert len(summary.refused) == len(summary.short) == 6
    assert set(summary.refused.values()) == {"PoolFull: needs 0.00 GB where 0.00 GB are to be used"}
    assert read_log(tmp_path / "log").refused == summary.refused


def test_case_that_fails_is_named_and_the_rest_goes_on(tmp_path: Path):
    def fails(m: int) -> None:
        if m == 3:
            raise RuntimeError("no kernel for 3\nmore lines")

    summary = go(World(fails=fails), tmp_path / "log")
    assert counts(tmp_path / "log") == [6, 6, 0, 6, 6, 6]
    assert summary.refused == {CASES[2].id: "RuntimeError: no kernel for 3"}
    assert (summary.stopped, summary.finished) == ("complete", 5)


def test_a_device_that_a_case_broke_ends_the_run_and_the_next_goes_on_without_that_case(tmp_path: Path):
    left = iter(range(8))

    def fails(m: int) -> None:
        if next(left, None) is None:
            raise RuntimeError("an illegal memory access")

    world = World(fails=fails, works=lambda: False)
    summary = go(world, tmp_path / "log")
    assert (summary.stopped, summary.samples) == ("broken", 8)
    assert len(world.open) == 6  # closing would ask a dead device
    assert list(summary.refused.values()) == [f"{BROKE}: RuntimeError: an illegal memory access"]
    again = go(World(), tmp_path / "log")
    assert (again.stopped, again.refused) == ("complete", summary.refused)
    assert sorted(counts(tmp_path / "log")) == [1, 6, 6, 6, 6, 6]


def test_memory_of_the_device_that_runs_out_makes_groups_too(tmp_path: Path):
    class OutOfMemoryError(RuntimeError):
        """As torch names it."""

    summary = go(World(room=4, full=OutOfMemoryError), tmp_path / "log")
    assert (summary.stopped, summary.refused) == ("complete", {})
    assert counts(tmp_path / "log") == [6] * 6


def test_budget_ends_the_run_within_one_sample(tmp_path: Path):
    summary = go(World(build_s=0.0), tmp_path / "log", budget_s=20.0)
    assert (summary.stopped, summary.short) == ("budget", [])
    assert 20.0 <= summary.seconds <= 21.0
    assert sum(counts(tmp_path / "log")) == summary.samples == 20


def test_budget_too_small_names_who_is_short(tmp_path: Path):
    summary = go(World(), tmp_path / "log", budget_s=5.0)
    have = counts(tmp_path / "log")
    assert {case.id for case, n in zip(CASES, have, strict=True) if n < 2} == set(summary.short)
    assert summary.short


def test_crash_in_the_middle_loses_nothing_and_the_next_run_ends_alike(tmp_path: Path):
    world = World()
    left = iter(range(17))

    def fails(m: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    world.fails = fails
    with pytest.raises(KeyboardInterrupt):
        run_open(world, tmp_path / "log")
    assert sum(counts(tmp_path / "log")) == 17
    go(World(), tmp_path / "log")
    assert counts(tmp_path / "log") == [6] * 6


def run_open(world: World, path: Path) -> None:
    """As `go`, for a run that is to break off."""
    try:
        go(world, path)
    finally:
        world.open.clear()
