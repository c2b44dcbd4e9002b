"""The measuring process: settings in, one line a step that ran out, in interleaved rounds. It is told no price.

Every round runs each setting once in a fresh random order, so that drift of the machine meets all alike, until each has
its samples. About every 20 samples a product that is always the same is timed. Settings under other overrides share
weights: times do not hang on values, so a rank whose slots hold other experts is measured on the same memory, which the
record then says.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moesim.errors import BadInput, Infeasible, Problem
from moesim.rng import generator
from moesim.scenario.load import load_scenario
from moesim.simulate import Prepared
from moesim_kernels.bench.errors import BadPlan
from moesim_kernels.bench.harness import REFERENCE_EVERY, reference_product
from moesim_kernels.bench.machine import facts
from moesim_kernels.bench.pool import Device, Pool
from moesim_kernels.bench.pressure import cpu_pressure
from moesim_kernels.bench.progress import Progress, Status
from moesim_kernels.bench.strict import parse, read_bytes
from moesim_kernels.bench.undisturbed import signals_end
from moesim_kernels.real.loaded import no_room
from moesim_kernels.real.record import Writer
from moesim_kernels.real.work import Setting, StepWork, prepare_real, resolve

__all__ = ["Ended", "Measurement", "measure", "read_settings"]

_MAX_SETTINGS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is asked for. ranks: of the deployment, or None for whatever it has; alone: the rank of a larger group that
    this device plays by itself. seed: of the order of rounds; parent: end once it is no longer our parent."""

    scenario: Path
    settings: Path
    log: Path
    seal: str = ""
    overrides: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    backend: str = "torch"
    rounds: int = 9
    seed: int = 0
    weights_seed: int = 0
    ranks: int | None = None
    alone: int | None = None
    parent: int | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: samples taken, settings that could not run and why, the signal that ended it."""

    samples: int
    seconds: float
    refused: dict[str, str]
    signal: int | None


class Runner(Protocol):
    """Whatever runs steps: ready(setting) before the clocks, run(handle) -> times."""

    remark: str

    def ready(self, setting: Setting) -> Any: ...
    def run(self, handle: Any) -> Any: ...
    def close(self) -> None: ...


def read_settings(path: Path) -> list[Setting]:
    """A JSON list of settings, each with a name of its own. Raises BadInput."""
    try:
        given = parse(read_bytes(path, _MAX_SETTINGS_BYTES), str(path))
    except BadPlan as error:
        raise BadInput(Problem(error.where, error.message)) from None
    if not isinstance(given, list) or not given:
        raise BadInput(Problem(str(path), "a list of settings is needed, at least one"))
    found = [Setting.from_json(one) if isinstance(one, dict) else Setting.from_json({}) for one in given]
    if len({s.name for s in found}) != len(found):
        raise BadInput(Problem(str(path), "settings need names of their own: two have the same"))
    return found


class RankRunner:
    """Steps of one rank: a lone one, or one that plays alone."""

    def __init__(self, asked: Measurement, settings: Sequence[Setting]) -> None:
        from moesim_kernels.real.rank import RealRank

        self._rank_index, self._ranks = asked.alone or 0, dict[tuple[str, ...], RealRank]()
        prepared = _prepared(asked, settings)
        self._works = {s.name: resolve(prepared[s.overrides], s) for s in settings}
        tokens = max(s * c for s, c in (self._shape(work) for work in self._works.values()))
        share, remarks = None, list[str]()
        slots = {o: _slots(p) for o, p in prepared.items()}
        for overrides in sorted(prepared, key=lambda o: -slots[o]):  # who holds most is there for the others
            rank = RealRank(
                prepared[overrides], self._rank_index, device=asked.device, backend=asked.backend,
                threads=asked.threads, seed=asked.weights_seed, alone=asked.alone is not None, cache_tokens=tokens,
                share=share, any_values=True,
            )  # fmt: skip
            share = share or rank
            self._ranks[overrides] = rank
            remarks += [r for r in rank.remark.split("; ") if r and r not in remarks]
        self.remark = "; ".join(remarks)

    def _shape(self, work: StepWork) -> tuple[int, int]:
        """(sequences, longest context) of the rank's share of a step."""
        mine = work.rank_N == self._rank_index
        if not mine.any():
            return 1, 1
        return len(set(work.request_N[mine].tolist())), int(work.position_N[mine].max()) + 1

    def ready(self, setting: Setting) -> Any:
        """Load a step into a cache arranged for it."""
        rank, work = self._ranks[setting.overrides], self._works[setting.name]
        rank.arrange(*self._shape(work))
        return rank, rank.load(work)

    def run(self, handle: Any) -> Any:
        """One step."""
        rank, loaded = handle
        return rank.run(loaded)

    def close(self) -> None:
        """Nothing outlives the process."""


def _slots(prepared: Prepared) -> int:
    assert prepared.result.experts is not None
    return prepared.result.experts.placement.slots_per_rank


def _prepared(asked: Measurement, settings: Sequence[Setting]) -> dict[tuple[str, ...], Prepared]:
    """The scenario laid out under each set of overrides."""
    out = {}
    for overrides in dict.fromkeys(s.overrides for s in settings):
        out[overrides] = prepare_real(load_scenario(asked.scenario, (*asked.overrides, *overrides)))
    return out


class ByRanks:
    """Steps of deployments with different numbers of ranks: each by a runner of its own, one after the other."""

    def __init__(self, runners: Mapping[int, Runner], ranks: Mapping[str, int]) -> None:
        """runners by number of ranks, and ranks by setting."""
        self._runners, self._ranks = runners, ranks
        self.remark = "; ".join(r.remark for r in runners.values() if r.remark)

    def ready(self, setting: Setting) -> Any:
        """With whom it is ready."""
        runner = self._runners[self._ranks[setting.name]]
        return runner, runner.ready(setting)

    def run(self, handle: Any) -> Any:
        """One step."""
        runner, own = handle
        return runner.run(own)

    def close(self) -> None:
        """End them all."""
        for runner in self._runners.values():
            runner.close()


def _runner(asked: Measurement, settings: Sequence[Setting]) -> tuple[Runner, int]:
    """Who runs the steps, and of how many ranks they are at most. Raises BadInput where that cannot be."""
    of: dict[tuple[str, ...], int] = {}
    for overrides in dict.fromkeys(s.overrides for s in settings):
        of[overrides] = load_scenario(asked.scenario, (*asked.overrides, *overrides)).parallel.dp
    ranks, most = {s.name: of[s.overrides] for s in settings}, max(of.values())
    if asked.ranks is not None and asked.ranks != most:
        raise BadInput(f"--ranks {asked.ranks}, and the scenario has parallel.dp={most}", str(asked.scenario))
    if asked.alone is not None:
        return RankRunner(asked, settings), most
    runners: dict[int, Runner] = {}
    try:
        for number in sorted(set(ranks.values())):
            runners[number] = _runner_of(asked, number, [s for s in settings if ranks[s.name] == number])
    except BaseException:
        ByRanks(runners, ranks).close()
        raise
    return (ByRanks(runners, ranks) if len(runners) > 1 else runners[most]), most


def _runner_of(asked: Measurement, ranks: int, settings: Sequence[Setting]) -> Runner:
    """Of settings with as many ranks."""
    if ranks == 1:
        return RankRunner(asked, settings)
    if asked.device != "cpu" or asked.threads != 1:
        raise BadInput(
            f"{ranks} ranks are processes of one CPU thread each, not on {asked.device} with {asked.threads} threads; "
            "--alone RANK lets this device play one of them",
            str(asked.scenario),
        )
    from moesim_kernels.real.group import RealGroup

    scenario = load_scenario(asked.scenario, asked.overrides)
    return RealGroup(scenario, opening=settings[0].overrides, seed=asked.weights_seed, apart=True)


@dataclass
class _Run:
    """One run of a measurement: what is ready, what was refused."""

    asked: Measurement
    settings: list[Setting]
    writer: Writer
    runner: Runner
    reference: Any
    handles: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    noted: set[str] = field(default_factory=set)
    samples: int = 0
    caught: int | None = None

    def wanted(self) -> list[Setting]:
        """Settings that lack samples."""
        counts = self.writer.counts
        return [s for s in self.settings if counts.get(s.name, 0) < self.asked.rounds and s.name not in self.refused]

    def stopped(self) -> bool:
        """A signal came, or the parent has gone."""
        if self.asked.parent is not None and os.getppid() != self.asked.parent:
            self.caught = self.caught or signal.SIGTERM
        return self.caught is not None

    def prepare(self) -> None:
        """Load every step and run it once: what is set up at a first call does not count."""
        for setting in self.wanted():
            if self.stopped():
                return
            try:
                with no_room(f"setting {setting.name}"):
                    handle = self.runner.ready(setting)
                    self.runner.run(handle)
            except (BadInput, Infeasible) as error:
                self.refused[setting.name] = " ".join(str(error).split())[:400]
                self.writer.note(setting.name, f"not measured: {self.refused[setting.name]}")
                continue
            self.handles[setting.name] = handle
            remark = _remark_of(handle)
            if remark and remark not in self.noted:
                self.noted.add(remark)
                self.writer.note(setting.name, remark)

    def go(self, progress: Progress) -> None:
        """Rounds until every setting has its samples."""
        reference_ns = None
        while wanted := self.wanted():
            number = self.writer.rounds
            order = generator(self.asked.seed, "real/order", number).permutation(len(wanted)).tolist()
            gc.collect(1)
            for at in order:
                if self.stopped():
                    return
                setting = wanted[at]
                progress(self._status(setting.name))
                # beside a CPU's steps the product takes no time; between replays on CUDA it would cool the caches
                every = 1 if self.asked.device == "cpu" else REFERENCE_EVERY["cuda"]
                if self.reference is not None and self.samples % every == 0:
                    reference_ns = self.reference()
                times = self.runner.run(self.handles[setting.name])
                self.writer.sample(
                    setting.name, round=number, wall_ns=times.wall_ns, cpu_ns=times.cpu_ns, part_ns=times.part_ns,
                    part_wall_ns=times.part_wall_ns, psi=cpu_pressure(), reference_ns=reference_ns,
                )  # fmt: skip
                self.samples += 1
            self.writer.rounds += 1
            self.writer.sync()

    def _status(self, now: str) -> Status:
        rounds, counts = self.asked.rounds, self.writer.counts
        done = [min(rounds, counts.get(s.name, 0)) for s in self.settings]
        return Status(sum(done), rounds * len(done), sum(d == rounds for d in done), len(done), 0.0, now)


def _remark_of(handle: Any) -> str:
    """What a step that is ready says of its times; runners hand out themselves beside it."""
    while isinstance(handle, tuple):
        handle = handle[1]
    return str(getattr(handle, "remark", ""))


def measure(asked: Measurement) -> Ended:
    """Measure the settings into the log, or go on with it. Raises BadInput for what cannot be measured, Infeasible
    where it does not fit. SIGINT and SIGTERM end it after the step at hand."""
    settings, began_s = read_settings(asked.settings), time.monotonic()
    if asked.rounds < 1:
        raise BadInput("at least one round is needed", "--rounds")
    runner, ranks = _runner(asked, settings)
    try:
        device = Device.find("cuda" if asked.device.startswith("cuda") else "cpu", asked.threads)
        head = {
            "seal": asked.seal, "ranks": ranks, "alone": asked.alone, "device": asked.device, "backend": asked.backend,
            "threads": asked.threads, "weights_seed": asked.weights_seed, "machine": facts(device),
        }  # fmt: skip
        writer = Writer(asked.log, head)
        try:
            if runner.remark:
                writer.note("", runner.remark)
            run = _Run(asked, settings, writer, runner, reference_product(device, Pool(device)))
            progress = Progress(sys.stderr)
            run.noted.add(runner.remark)
            with signals_end(run), _steady():
                run.prepare()
                try:
                    run.go(progress)
                finally:
                    progress.end()
            ended = Ended(run.samples, time.monotonic() - began_s, run.refused, run.caught)
            writer.end({"samples": ended.samples, "seconds": round(ended.seconds, 3), "signal": ended.signal})
            return ended
        finally:
            writer.close()
    finally:
        runner.close()


@contextmanager
def _steady() -> Iterator[None]:
    """No garbage collection inside a step; and what is there already is not looked through again, which capturing a
    CUDA graph would do each time."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()
