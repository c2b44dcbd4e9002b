"""Runs candidates, each once for a size and seed, and keeps what comparisons need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moesim.errors import BadInput
from moesim.explain_offload.ask import Ask, Base, Size
from moesim.explain_offload.candidates import Candidate
from moesim.observe import Observation, observe
from moesim.simulate import RunResult, simulate

__all__ = ["Played", "Player"]

_USUAL_RUNS = 32


@dataclass(frozen=True, slots=True)
class Played:
    """A candidate's run. summary: of the result; None with reasons where it does not fit, or cannot be run."""

    candidate: Candidate
    summary: dict[str, Any] | None
    observation: Observation | None
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    scenario_hash: str = ""

    def rate(self, ask: Ask) -> float:
        """Output tokens a second of requests of the length asked for, from this run's time to the first token and
        between tokens (its outputs may be shorter); 0 where it does not run."""
        return self._rate(ask, lambda name: None if self.summary is None else self._mean(name))

    def rate90(self, ask: Ask) -> tuple[float, float] | None:
        """Interval of `rate`: both times at their ends at once, because what they share, the profile's error, is the
        most of it; None where a run is too short to say."""
        ends = []
        for side in (1, 0):

            def end(name: str, side: int = side) -> float | None:
                held = None if self.observation is None else self.observation.figures[name].interval90
                return None if held is None else held[side]

            rate = self._rate(ask, end)
            if rate <= 0 or not math.isfinite(rate):
                return None
            ends.append(rate)
        return ends[0], ends[1]

    def _mean(self, name: str) -> float | None:
        seen = None if self.observation is None else self.observation.figures.get(name)
        return None if seen is None else seen.value

    @staticmethod
    def _rate(ask: Ask, figure: Callable[[str], float | None]) -> float:
        first, between = figure("ttft_mean_ms"), figure("tpot_mean_ms")
        if first is None or between is None:
            return 0.0
        return ask.concurrency * ask.output_tokens / (first + (ask.output_tokens - 1) * between) * 1e3


class Player:
    """Remembers what it played."""

    def __init__(self, ask: Ask, progress: Callable[[float], None] | None = None) -> None:
        """progress: is told the share that is done, by the number of runs that a search usually takes."""
        self.base = Base(ask)
        self._told = progress or (lambda _: None)
        self._known: dict[tuple[tuple[str, ...], Size, int], Played] = {}
        self.runs = 0

    def play(self, candidate: Candidate, size: Size, seed: int) -> Played:
        """Simulate it. Raises BadInput where the deployment itself cannot be read."""
        key = (tuple(sorted(candidate.changes)), size, seed)
        if key not in self._known:
            self._known[key] = self._play(candidate, size, seed)
            self.runs += 1
            self._told(min(self.runs / _USUAL_RUNS, 1.0))
        found = self._known[key]
        return Played(candidate, found.summary, found.observation, found.reasons, found.warnings, found.scenario_hash)

    def _play(self, candidate: Candidate, size: Size, seed: int) -> Played:
        scenario = self.base.scenario(candidate.changes, size, seed)
        try:
            result = simulate(scenario)
        except BadInput as error:  # a kind that this deployment cannot have
            if candidate.kind == "none":  # what asks for no tiers fails for reasons that all have
                raise
            return Played(candidate, None, None, tuple(str(problem) for problem in error.problems))
        assert isinstance(result, RunResult)
        if not result.feasible:
            return Played(candidate, None, None, result.reasons, result.warnings, scenario.hash)
        return Played(
            candidate, result.to_json()["summary"], observe(result), (), result.warnings, scenario.hash
        )  # fmt: skip
