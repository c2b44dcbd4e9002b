"""Several ranks for real: one process each on this machine, tokens that travel to their experts over gloo.

    with RealGroup(load_scenario(file, ["parallel.dp=2", "parallel.ep=2", ...])) as group:
        step = group.load(setting)
        times = group.run(step)

Ranks step together: a step's time runs from a barrier to the end of the last rank. Its parts are those of the critical
path, as the simulator has them: between two meetings the parts of the rank that comes to the second one last; an
exchange from when the last rank is there to when all have what they get. They add up to the time of the step. What a
rank waited is told apart. Workers are `real.group_rank`; they end with this process, and one that dies or stalls ends
the group with an error that says which.

Suffixes: L MoE layers, G ranks, S sampled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import IntArray
from moesim.errors import BadInput, MoesimError
from moesim.scenario.load import Scenario, scenario_from_dict
from moesim.simulate import Prepared
from moesim_kernels.ops.processes import WorkerFailed, Workers
from moesim_kernels.real.work import Setting, prepare_real, resolve

__all__ = ["GroupFailed", "GroupStep", "GroupTimes", "Laps", "RealGroup", "critical_path"]

Laps = Sequence[tuple[str, int, int]]
"""One rank's step as it passed: (part, CPU ns of the thread, ns of the machine's clock) at the end of each part; the
first one is its start."""

_EXCHANGES: Mapping[str, str] = {"dispatch": "dispatch", "back": "combine"}
"""laps that are meetings, and the part they belong to"""
_AT_HOME: Mapping[str, str] = {"combine": "experts"}
"""the gate-weighted sum is the experts', as it is measured"""


class GroupFailed(MoesimError):
    """A worker died, stalled or broke: which, and what it said. All workers have been ended."""


@dataclass(frozen=True, slots=True)
class GroupTimes:
    """One step of the group in ns. wall_ns: from a barrier (all have left it) to the end of the last rank. cpu_ns: the
    same with CPU time of the thread in place of the wall wherever a rank computes, exchanges by the wall. part_ns adds
    up to cpu_ns, part_wall_ns to wall_ns; names of `work.PART_OF`.

    rank_cpu_ns [G]: CPU time of each rank's thread in all. wait_ns [G]: what each waited for the last one at meetings.
    sent_LGG: rows that each rank (axis 1) sent to each (axis 2), those for itself included.
    """

    wall_ns: int
    cpu_ns: int
    part_ns: dict[str, int]
    part_wall_ns: dict[str, int]
    rank_cpu_ns: tuple[int, ...]
    wait_ns: tuple[int, ...]
    sent_LGG: IntArray


@dataclass(frozen=True, slots=True)
class GroupStep:
    """A setting that the workers hold ready. remark: what a reader of its times should know."""

    number: int
    setting: Setting
    remark: str = ""


class RealGroup:
    """The ranks of a scenario's deployment as processes: dp = ep of them, one thread each.

    timeout_s bounds the start, each load and each step. Raises BadInput for a scenario that is not executed so,
    GroupFailed where a worker dies, stalls or breaks. Close it, or use `with`. remark: what a reader of its times
    should know.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        opening: tuple[str, ...] = (),
        seed: int = 0,
        apart: bool = False,
        timeout_s: float = 300.0,
    ) -> None:
        """seed: of the weights. Settings may override the scenario; `opening`: overrides that say how many ranks all of
        them have. apart: steps are timed and not told from each other: each has the cache to itself, and other
        placements run on the same weights.
        """
        self.scenario = scenario
        self._prepared: dict[tuple[str, ...], Prepared] = {}
        p = self._prepare(opening).layout
        self.ranks = p.dp
        if self.ranks < 2 or not p.exchanges:
            how = p.communication.all_to_all
            raise BadInput(
                f"a group of processes exchanges tokens: dp = ep of at least 2, each rank with whole experts, not "
                f"dp={p.dp}, ep={p.ep}, all_to_all={how}"
            )
        self._numbers = count()
        root = str(Path(__file__).parents[3])
        base = str(scenario.base.resolve())
        opened = {"do": "open", "scenario": scenario.raw, "base": base, "opening": list(opening)}
        try:
            self._workers = Workers("moesim_kernels.real.group_rank", self.ranks, timeout_s=timeout_s, paths=[root])
        except WorkerFailed as error:
            raise GroupFailed(str(error)) from None
        try:
            answers = self._ask({**opened, "seed": seed, "apart": apart}, "open")
            _refuse(answers, str(scenario.base))
            self.remark = str(answers[0]["remark"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return self._workers.pids

    @property
    def alive(self) -> bool:
        """Whether the group still answers."""
        return self._workers.alive

    def close(self) -> None:
        """End the workers; without effect when they have ended."""
        self._workers.close()

    def _prepare(self, overrides: tuple[str, ...]) -> Prepared:
        found = self._prepared.get(overrides)
        if found is None:
            named = scenario_from_dict(self.scenario.raw, self.scenario.base, overrides) if overrides else self.scenario
            found = self._prepared[overrides] = prepare_real(named)
        return found

    def _ask(self, request: dict[str, Any], what: str) -> list[dict[str, Any]]:
        try:
            return self._workers.ask(request, what)
        except WorkerFailed as error:
            raise GroupFailed(str(error)) from None

    def ready(self, setting: Setting) -> GroupStep:
        """`load`, by the name that the measuring loop has for it."""
        return self.load(setting)

    def load(self, setting: Setting) -> GroupStep:
        """Make a step ready on every rank, before any clock. Raises BadInput for a setting that does not fit."""
        prepared = self._prepare(setting.overrides)
        if prepared.layout.dp != self.ranks:
            raise BadInput(f"the group has {self.ranks} ranks, and this has {prepared.layout.dp}", setting.name)
        resolve(prepared, setting)
        number = next(self._numbers)
        answers = self._ask({"do": "load", "step": number, "setting": setting.to_json()}, setting.name)
        try:
            _refuse(answers, f"setting {setting.name}")
        except BadInput:
            self._ask({"do": "drop", "step": number}, "drop")
            raise
        return GroupStep(number, setting, str(answers[0]["remark"]))

    def run(self, step: GroupStep) -> GroupTimes:
        """One step."""
        answers = self._ask({"do": "run", "step": step.number}, step.setting.name)
        laps = [[(str(part), int(cpu), int(at)) for part, cpu, at in a["laps"]] for a in answers]
        sent_LGG = np.array([a["sent"] for a in answers], np.int64).reshape(self.ranks, -1, self.ranks)
        return critical_path(laps, sent_LGG.transpose(1, 0, 2))

    def logits(self) -> tuple[IntArray, NDArray[np.float32]]:
        """Of the step that ran last: places of its sampled tokens among its tokens, int64 [S], and logits [S, V]."""
        answers = self._ask({"do": "logits"}, "logits")
        place = np.concatenate([np.array(a["places"], np.int64) for a in answers])
        logits = np.concatenate([np.array(a["logits"], np.float32) for a in answers if a["logits"]])
        order = np.argsort(place)
        return place[order], logits[order]

    def drop(self, step: GroupStep) -> None:
        """Forget a step, and what the cache holds of its requests: other steps of the same requests must be dropped,
        too, and loaded again."""
        self._ask({"do": "drop", "step": step.number}, "drop")

    def forget(self, request: int) -> None:
        """A request has ended, its rows of the cache are free."""
        self._ask({"do": "forget", "request": request}, "forget")


def _refuse(answers: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise BadInput with what the first rank refused."""
    for rank, answer in enumerate(answers):
        if "refused" in answer:
            raise BadInput(f"rank {rank}: {answer['refused']}", where)


def critical_path(laps_G: Sequence[Laps], sent_LGG: IntArray) -> GroupTimes:
    """What a step of the group took, from how it passed on every rank. All ranks have the same meetings in order."""
    stages_G = [_stages(laps) for laps in laps_G]
    part: dict[str, int] = {}
    wall: dict[str, int] = {}
    wait_G = [0] * len(laps_G)
    free = max(laps[0][2] for laps in laps_G)
    for stage_G in zip(*stages_G, strict=True):
        here_G = [stage.arrived for stage in stage_G]
        last = int(np.argmax(here_G))
        _spread(wall, stage_G[last].wall_ns, max(0, here_G[last] - free))
        slowest = max(stage_G, key=lambda stage: sum(stage.cpu_ns.values()))
        _spread(part, slowest.cpu_ns, sum(slowest.cpu_ns.values()))
        meeting = stage_G[0].meeting
        free = max(stage.end for stage in stage_G)
        if meeting:
            for name in (part, wall):
                name[meeting] = name.get(meeting, 0) + free - here_G[last]
            wait_G = [wait + here_G[last] - here for wait, here in zip(wait_G, here_G, strict=True)]
    return GroupTimes(
        wall_ns=sum(wall.values()),
        cpu_ns=sum(part.values()),
        part_ns=part,
        part_wall_ns=wall,
        rank_cpu_ns=tuple(laps[-1][1] - laps[0][1] for laps in laps_G),
        wait_ns=tuple(wait_G),
        sent_LGG=sent_LGG,
    )


@dataclass(slots=True)
class _Stage:
    """What a rank did up to a meeting (empty: the end of the step), when it came there and when it had what it gets."""

    cpu_ns: dict[str, int]
    wall_ns: dict[str, int]
    arrived: int
    end: int
    meeting: str = ""


def _stages(laps: Laps) -> list[_Stage]:
    out: list[_Stage] = []
    stage = _Stage({}, {}, laps[0][2], laps[0][2])
    for (_, cpu_before, before), (name, cpu, at) in pairwise(laps):
        stage.end = at
        if name in _EXCHANGES:
            stage.arrived, stage.meeting = before, _EXCHANGES[name]
            out.append(stage)
            stage = _Stage({}, {}, at, at)
            continue
        part = _AT_HOME.get(name, name)
        stage.cpu_ns[part] = stage.cpu_ns.get(part, 0) + cpu - cpu_before
        stage.wall_ns[part] = stage.wall_ns.get(part, 0) + at - before
        stage.arrived = at
    return [*out, stage]


def _spread(into: dict[str, int], parts: Mapping[str, int], total: int) -> None:
    """Add `total` to the parts in proportion, to the nanosecond."""
    whole, left = sum(parts.values()), total
    for i, (name, ns) in enumerate(parts.items(), 1):
        share = left if i == len(parts) else min(left, total * ns // max(whole, 1))
        into[name] = into.get(name, 0) + share
        left -= share
