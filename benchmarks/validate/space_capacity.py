"""Tokens a step and capacity factor: a burst of prompts on one core, until each has its first token.

Small steps let the first prompts go early and read all weights again and again; large ones make everybody wait for all.
A small capacity factor saves the rows of hot experts and drops choices, more in small steps, whose loads are uneven. A
candidate whose steps drop more than `MOST_DROPPED` of the burst's choices is left out: what is dropped follows from the
tokens alone and is the same for the simulator and the executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contested import Candidate, Measuring, Sample, Space
from moesim_kernels.real.work import Setting, StepWork, prepare_real, price, resolve
from moesim_kernels.validate.baseline import roofline_ns

from moesim.scenario.load import load_scenario
from moesim.simulate import Prepared

__all__ = ["Burst", "burst_steps", "first_token_steps", "mean_first_ns", "predict"]

TOKENS = (128, 192, 256, 384, 512, 768, 1024)
FACTORS = (1.25, 1.5, 2.0, None)
MOST_DROPPED = 0.10
REQUESTS = 16
TRAFFIC = ("routing.popularity_zipf=0.4",)


def burst_steps(prompts: Sequence[int], most: int, overrides: tuple[str, ...] = ()) -> list[Setting]:
    """The prompts in order, at most `most` tokens a step, a prompt cut where a step is full."""
    steps: list[list[tuple[int, int, int, int, int]]] = [[]]
    room = most
    for request, length in enumerate(prompts):
        before = 0
        while before < length:
            if not room:
                steps.append([])
                room = most
            part = min(room, length - before)
            steps[-1].append((request, before, part, 0, int(before + part == length)))
            before, room = before + part, room - part
    return [Setting(f"step {i}", overrides, (), tuple(chunks)) for i, chunks in enumerate(steps)]


def first_token_steps(steps: Sequence[Setting]) -> list[int]:
    """Of each prompt, the step that ends it."""
    ends = {c[0]: i for i, step in enumerate(steps) for c in step.chunks if c[4]}
    return [ends[request] for request in sorted(ends)]


def mean_first_ns(step_ns: Sequence[float], steps: Sequence[Setting]) -> float:
    """Mean time to first token of a burst that arrives at once: each waits for its step's end."""
    return float(np.cumsum(np.asarray(step_ns, float))[first_token_steps(steps)].mean())


def predict(file: Path, profile: Path) -> tuple[Space, Burst]:
    """All candidates by the simulator."""
    base = (f"cluster.device={profile}", *TRAFFIC)
    whole = prepare_real(load_scenario(file, base))
    prompts = [int(n) for n in whole.stream.prompt_tokens[:REQUESTS]]
    candidates, works = [], []
    for factor in FACTORS:
        overrides = () if factor is None else (f"capacity.factor={factor}",)
        prepared = prepare_real(load_scenario(file, (*base, *overrides))) if overrides else whole
        for most in TOKENS:
            found = _candidate(prepared, burst_steps(prompts, most, overrides), most, factor)
            if found is not None:
                candidates.append(found[0])
                works.append(found[1])
    space = Space(
        key="capacity",
        title="capacity factor x tokens a step",
        figure="mean time to first token of the burst",
        about=(
            f"{REQUESTS} prompts of {min(prompts)} to {max(prompts)} tokens ({sum(prompts)} in all) arrive at once on "
            f"one core, under traffic of Zipf 0.4; prompts are cut where a step is full. Candidates that drop more "
            f"than {MOST_DROPPED:.0%} of all choices are left out ({len(TOKENS) * len(FACTORS) - len(candidates)} of "
            f"{len(TOKENS) * len(FACTORS)}). The default is the scenario as written: no capacity, all tokens in one "
            "step."
        ),
        candidates=tuple(candidates),
        facts={"prompts": prompts},
    )
    return space, Burst(whole, works)


def _candidate(
    prepared: Prepared, steps: list[Setting], most: int, factor: float | None
) -> tuple[Candidate, tuple[list[Setting], list[StepWork]]] | None:
    works = [resolve(prepared, step) for step in steps]
    refused = sum(int((w.slot_NLK >= w.num_slots).sum()) for w in works) / sum(w.slot_NLK.size for w in works)
    if refused > MOST_DROPPED:
        return None
    name = f"{most} tokens, {'no capacity' if factor is None else f'factor {factor:g}'}"
    candidate = Candidate(
        name=name,
        what={
            "tokens a step": most,
            "capacity factor": "none" if factor is None else factor,
            "steps": len(steps),
            "dropped": f"{refused:.1%}",
        },
        predicted_ns=mean_first_ns([price(prepared, step).ns for step in steps], steps),
        roofline_ns=mean_first_ns([roofline_ns(prepared, work) for work in works], steps),
        default=factor is None and most == max(TOKENS),
        more={"settings": [step.to_json() for step in steps]},
    )
    return candidate, (steps, works)


class Burst(Measuring):
    """Runs a candidate's steps one after the other on one real rank, its cache empty before."""

    def __init__(self, prepared: Prepared, works: list[tuple[list[Setting], list[StepWork]]]) -> None:
        self._prepared, self._works, self._rank = prepared, works, None

    def open(self) -> Burst:
        """With weights in memory."""
        from moesim_kernels.real.rank import RealRank

        self._rank = RealRank(self._prepared)
        return self

    def once(self, candidate: int) -> Sample:
        """See Measuring."""
        rank: Any = self._rank
        steps, works = self._works[candidate]
        rank.run(rank.load(works[0]))  # code and buffers come in
        for request in range(REQUESTS):
            rank.forget(request)
        times = [rank.run(rank.load(work)) for work in works]
        for request in range(REQUESTS):
            rank.forget(request)
        return Sample(mean_first_ns([t.wall_ns for t in times], steps), mean_first_ns([t.cpu_ns for t in times], steps))

    def close(self) -> None:
        """See Measuring."""
        self._rank = None
