"""Runs a plan: interleaved rounds over all cases, within a budget, into a log that can be gone on with.

Every round runs each case whose turn it is once, in a new order, so that a drift of the machine meets all cases alike.
Every few samples a reference GEMM is timed; each line of the log carries the last one. A case is built and warmed
up at its first turn; one that does not fit into memory beside the others waits for the next group. The groups take
turns; a run with one group is the rule, for all weights are views of shared arenas (`pool`).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim_kernels.bench import cases, clock, floors, machine
from moesim_kernels.bench.log import LogWriter, Samples
from moesim_kernels.bench.plan import Case, Plan
from moesim_kernels.bench.pool import Device, Pool
from moesim_kernels.bench.pressure import cpu_pressure
from moesim_kernels.bench.progress import Status
from moesim_kernels.bench.schedule import Schedule
from moesim_kernels.bench.undisturbed import no_collection, signals_end

__all__ = ["MINIMUM", "TARGET", "Run", "Summary", "reference_product", "run"]

TARGET = 30
MINIMUM = 5
REFERENCE_EVERY = {"cpu": 4, "cuda": 20}  # samples; a shared CPU changes its speed within a second
VISITS = 3  # a run with several groups comes back to each so often
BROKE = "broke the device"  # begins the reason of a case after which nothing runs in this process any more


@dataclass
class Summary:
    """How a run ended. `stopped`: complete, budget, interrupted (then `signal` is its number), or broken: a case left
    the device unusable to this process; another run goes on without it.

    `short`: ids below the minimum; `refused`: id to reason. `samples` were taken by this run, in `seconds`.
    """

    stopped: str
    seconds: float
    samples: int
    finished: int
    cases: int
    short: list[str]
    refused: dict[str, str]
    signal: int | None = None


@dataclass
class Run:
    """One run of a plan: what is resident, what waits. `build` makes a sampler of a case, `now_s` is the time, `works`
    says whether the device still does after an error."""

    plan: Plan
    schedule: Schedule
    log: LogWriter
    build: Callable[[Case], clock.Sampler]
    reference: Callable[[], float] | None
    now_s: Callable[[], float]
    progress: Callable[[Status], None]
    resident: dict[str, clock.Sampler] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    works: Callable[[], bool] = lambda: True
    broken: bool = False
    caught: int | None = None
    samples: int = 0
    rounds: int = 0
    _began_s: float = 0.0
    _reference_ns: float | None = None
    _by_id: dict[str, Case] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began_s = self.now_s()
        self._by_id = {case.id: case for case in self.plan.cases}

    def spent_s(self) -> float:
        """Seconds since the run began, setup included."""
        return self.now_s() - self._began_s

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.schedule.budget_s - self.spent_s()

    def leave_out(self, refused: Mapping[str, str]) -> None:
        """Do not run again what broke the device in an earlier run."""
        for key, reason in refused.items():
            if reason.startswith(BROKE):
                self.refused[key] = reason
                self.schedule.refuse(key)

    def go(self, release: Callable[[], None]) -> Summary:
        """Measure until all targets are reached, the budget is used or a signal came. `release` empties the pool."""
        groups: list[list[str]] = []
        while self.caught is None and not self.broken and self.left_s() > 0:
            # first every case is visited once: what does not fit beside the others makes the next group
            known = {key for group in groups for key in group}
            fresh = [key for key in self.schedule.unfinished() if key not in known]
            if fresh:
                self._visit(fresh, self.schedule.minimum, self.left_s(), release)
                groups.append([key for key in fresh if key not in self.waiting])
                continue
            live = [group for group in groups if set(group) & set(self.schedule.unfinished())]
            if not live:
                break
            rounds = -(-self.schedule.target // VISITS) if len(groups) > 1 else self.schedule.target
            before = self.samples
            for at, group in enumerate(live):
                self._visit(group, rounds, self.left_s() / (len(live) - at), release)
            if self.samples == before:
                break
        if not self.broken:
            for sampler in self.resident.values():
                sampler.close()
        return self._summary()

    def _visit(self, keys: list[str], rounds: int, left_s: float, release: Callable[[], None]) -> None:
        """Up to `rounds` rounds over `keys` within `left_s`; another group that is resident makes room first.

        Where some do not fit beside the others, those that do take only their share of the time.
        """
        self.waiting = set()
        if self.resident and not set(keys) & set(self.resident):
            for sampler in self.resident.values():
                sampler.close()
            self.resident.clear()
            gc.collect()
            release()
        began_s = self.spent_s()
        for _ in range(rounds):
            among = [key for key in keys if key not in self.waiting]
            end_s = min(began_s + left_s * len(among) / len(keys), self.schedule.budget_s)
            order, part_s = self.schedule.round(among, end_s - self.spent_s())
            if not order:
                return
            gc.collect(1)  # what the last round left; older objects wait for the end
            until_s = self.spent_s() + part_s
            for key in order:
                if self.spent_s() >= until_s:
                    break
                self._turn(key)
                if self.caught is not None or self.broken:
                    return
            self.rounds += 1

    def _turn(self, key: str) -> None:
        """One sample of a case, the case built first if it is not resident."""
        case = self._by_id[key]
        self.progress(self._status(case))
        if key not in self.resident and not self._prepare(key):
            return
        if self.reference is not None and self.samples % REFERENCE_EVERY[self.plan.device] == 0:
            self._reference_ns = self.reference()
        began_s = self.now_s()
        try:
            ns, wall_ns = self.resident[key].sample()
        except Exception as error:  # noqa: BLE001  a kernel may raise anything; the case is refused, the rest goes on
            self._refuse(key, error)
            return
        self.log.samples(Samples(key, self.rounds, (ns,), (wall_ns,), cpu_pressure(), self._reference_ns))
        self.samples += 1
        self.schedule.record(key, self.now_s() - began_s)

    def _prepare(self, key: str) -> bool:
        """Build and warm up; False where the case waits for room or is refused."""
        try:
            sampler = self.build(self._by_id[key])
        except Exception as error:  # noqa: BLE001  as above: what cannot be built is named, the rest goes on
            if self.resident and _is_no_room(error):
                self.waiting.add(key)
            else:
                self._refuse(key, error)
            return False
        self.resident[key] = sampler
        if sampler.remark:
            self.log.text("remark", key, sampler.remark)
        return True

    def _refuse(self, key: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.broken = not self.works()
        if self.broken:
            reason = f"{BROKE}: {reason}"
        self.refused[key] = reason
        self.schedule.refuse(key)
        self.log.text("refused", key, reason)
        sampler = self.resident.pop(key, None)
        if sampler is not None and not self.broken:
            sampler.close()

    def _status(self, case: Case) -> Status:
        count = self.schedule.samples
        target = self.schedule.target
        need_s = self.schedule.need_s()
        return Status(
            samples=sum(min(n, target) for n in count.values()),
            wanted=target * len(count),
            finished=sum(n >= target for n in count.values()),
            cases=len(count),
            left_s=min(need_s, self.left_s()) if self.rounds else self.left_s(),
            now=case.op,
        )

    def _summary(self) -> Summary:
        stopped = "complete" if not self.schedule.unfinished() else "broken" if self.broken else "budget"
        return Summary(
            stopped="interrupted" if self.caught is not None else stopped,
            seconds=self.spent_s(),
            samples=self.samples,
            finished=sum(n >= self.schedule.target for n in self.schedule.samples.values()),
            cases=len(self.plan.cases),
            short=self.schedule.short(),
            refused=self.refused,
            signal=self.caught,
        )


def _is_no_room(error: Exception) -> bool:
    """Whether memory ran out: the pool's bound, the host's, or the device's (torch names it so since 2.0)."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def run(
    plan: Plan,
    log_path: Path | str,
    budget_s: float,
    progress: Callable[[Status], None] = lambda status: None,
    *,
    target: int = TARGET,
    minimum: int = MINIMUM,
    seed: int = 0,
    device: Device | None = None,
) -> Summary:
    """Measure a plan into a log, or go on with one, for at most about `budget_s` seconds (a running sample ends).

    target and minimum: samples a case. Raises BadPlan for a log that is not this plan's or this machine's, ValueError
    for numbers out of range or a device that is not there. torch's threads are set to the plan's.
    """
    if not 0 < budget_s < 1e7:
        raise ValueError(f"the budget must be above 0 and below 10,000,000 seconds; got {budget_s}")
    import torch

    torch.set_num_threads(plan.threads)
    torch.set_float32_matmul_precision("highest")  # some images turn TF32 on, and fp32 would be measured as that
    device = device or Device.find(plan.device, plan.threads)
    log = LogWriter(log_path, plan, machine.facts(device))
    try:
        done = log.record.counts()
        roles = {case.id: case.role for case in plan.cases}
        guess = {case.id: floors.guess_ns(case, plan.device) for case in plan.cases}
        schedule = Schedule(roles, guess, done, budget_s, target, minimum, seed + len(log.record.lines))
        pool = Pool(device)

        def build(case: Case) -> clock.Sampler:
            prepared = cases.build(case, device, pool)
            try:
                return clock.sampler(prepared, device, pool, done.get(case.id, 0))
            except BaseException:
                prepared.close()
                raise

        bench = Run(plan, schedule, log, build, None, time.monotonic, progress)
        if device.kind == "cuda":
            bench.works = _cuda_works
        bench.leave_out(log.record.refused)
        bench.rounds = max((line.round + 1 for line in log.record.lines), default=0)
        with signals_end(bench), no_collection():
            cases.reserve([case for case in plan.cases if done.get(case.id, 0) < target], pool)
            bench.reference = reference_product(device, pool)
            summary = bench.go(pool.release)
        log.end(_end_facts(summary, target, minimum, budget_s))
        return summary
    finally:
        log.close()


def _cuda_works() -> bool:
    """Whether CUDA still answers: an illegal access or a failed assertion in a kernel ends it for the process."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def reference_product(device: Device, pool: Pool) -> Callable[[], float]:
    """The best of three calls of a GEMM that is always the same."""
    on_cpu = device.kind == "cpu"
    case = Case("peak_gemm", {}, {"n": 384 if on_cpu else 4096}, dtype="fp32" if on_cpu else "bf16")
    sampler = clock.sampler(cases.build(case, device, pool), device, pool)
    return lambda: round(min(sampler.sample()[0] for _ in range(3)), 1)


def _end_facts(summary: Summary, target: int, minimum: int, budget_s: float) -> dict[str, Any]:
    return {
        "stopped": summary.stopped,
        "seconds": round(summary.seconds, 3),
        "budget_s": budget_s,
        "samples": summary.samples,
        "finished": summary.finished,
        "cases": summary.cases,
        "target": target,
        "minimum": minimum,
        "short": summary.short,
        "process": os.getpid(),
    }
