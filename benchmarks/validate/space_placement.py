"""Placements and replicas on two ranks: real processes, real tokens that travel, a step as slow as its slowest rank.

Placements are made from the popularity that the scenario tells them and see none of the steps that are judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contested import Candidate, Measuring, Sample, Space
from moesim_kernels.real.work import Setting, prepare_real, price, resolve
from moesim_kernels.validate.baseline import roofline_ns

from moesim.scenario.load import Scenario, load_scenario

__all__ = ["EP2", "Group", "predict", "steps"]

EP2 = (
    "cluster.gpus_per_node=2",
    "parallel.dp=2",
    "parallel.ep=2",
    "communication.all_to_all=pairwise",
    "engine.max_num_batched_tokens=128",
)
PLACEMENTS: tuple[tuple[str, int], ...] = (
    ("contiguous", 0),
    ("round_robin", 0),
    ("random", 0),
    ("eplb", 0),
    ("eplb", 2),
    ("eplb", 4),
    ("eplb", 8),
    ("eplb_swap", 0),
    ("eplb_swap", 4),
)
DEFAULT = ("contiguous", 0)


def steps(overrides: tuple[str, ...] = ()) -> list[Setting]:
    """What a candidate runs: decode of 16 requests a rank, twice a prompt of 128 tokens a rank, and a mixed step with
    uneven ranks."""
    few = tuple((i, 30 + i, i % 2) for i in range(8, 14))
    return [
        Setting("decode", overrides, tuple((i, 20 + i, i % 2) for i in range(32)), ()),
        Setting("prompts", overrides, (), ((0, 0, 128, 0, 1), (1, 0, 128, 1, 1))),
        Setting("more prompts", overrides, (), ((2, 0, 128, 0, 1), (3, 0, 128, 1, 1))),
        Setting("mixed", overrides, few, ((20, 0, 80, 0, 1), (21, 0, 48, 1, 1))),
    ]


def predict(file: Path, profile: Path) -> tuple[Space, Group]:
    """All candidates by the simulator."""
    base = (f"cluster.device={profile}", *EP2)
    candidates, settings = [], []
    for kind, redundant in PLACEMENTS:
        more = f", num_redundant_experts: {redundant}" if redundant or kind.startswith("eplb") else ""
        overrides = (f"policies.placement={{kind: {kind}{more}}}",)
        prepared = prepare_real(load_scenario(file, (*base, *overrides)))
        own = steps(overrides)
        works = [resolve(prepared, step) for step in own]
        load = [int(w.rows_LS().reshape(-1, 2, w.slots_per_rank).sum(axis=2).max(axis=1).sum()) for w in works]
        even = [int(w.rows_LS().sum()) / 2 for w in works]
        candidates.append(
            Candidate(
                name=kind if not redundant else f"{kind} + {redundant}",
                what={"placement": kind, "redundant": redundant, "busiest / mean": f"{sum(load) / sum(even):.2f}"},
                predicted_ns=float(sum(price(prepared, step).ns for step in own)),
                roofline_ns=sum(roofline_ns(prepared, work) for work in works),
                default=(kind, redundant) == DEFAULT,
                more={"settings": [step.to_json() for step in own]},
            )
        )
        settings.append(own)
    space = Space(
        key="placement",
        title="placement x replicas, EP 2",
        figure="sum of four steps (decode, prompts twice, mixed)",
        about=(
            "Two processes with gloo, one thread each; traffic of Zipf 1.2. Decode of 16 requests a rank, prompts of "
            "128 tokens a rank, a mixed step with uneven ranks. The default is contiguous, without redundant experts."
        ),
        candidates=tuple(candidates),
    )
    return space, Group(load_scenario(file, base), settings)


class Group(Measuring):
    """Every candidate's steps in one group of processes that holds the weights of all candidates."""

    def __init__(self, scenario: Scenario, settings: list[list[Setting]]) -> None:
        self._scenario, self._settings = scenario, settings
        self._group: Any = None

    def open(self) -> Group:
        """With all weights in memory."""
        from moesim_kernels.real.group import RealGroup

        self._group = RealGroup(self._scenario)
        try:
            for own in self._settings:
                self._run(own[0])
        except BaseException:
            self.close()
            raise
        return self

    def _run(self, setting: Setting) -> Any:
        """Once untimed, so that code and buffers come in, then timed."""
        step = self._group.load(setting)
        self._group.run(step)
        times = self._group.run(step)
        self._group.drop(step)
        return times

    def once(self, candidate: int) -> Sample:
        """See Measuring."""
        times = [self._run(setting) for setting in self._settings[candidate]]
        return Sample(float(sum(t.wall_ns for t in times)), float(sum(t.cpu_ns for t in times)))

    def close(self) -> None:
        """See Measuring."""
        if self._group is not None:
            self._group.close()
            self._group = None
