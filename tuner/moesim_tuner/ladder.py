"""Who climbs from rung to rung, and which rungs a scenario gets that names none.

A rung is a cheaper look at a candidate: fewer requests or steps, fewer seeds. What a candidate shows there is compared
with what the trials that went all the way had shown there. One objective: the median rule (Golovin et al., KDD 2017,
section 3.2.2; Optuna's `PercentilePruner`): a candidate that is worse than their median stops. Several: it stops where
two of them beat it in every objective by a margin (there is no median of fronts, and what is only just dominated on a
short run may not be on a long one). Broken constraints come first: a candidate that breaks more than the median of
them stops, but what is broken by little counts as kept, for short runs exaggerate their beginning and end.

The scenario as written, the user's starts and the heuristics always climb, so that the result can be held against them;
so does everybody until enough trials have gone all the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesim.scenario.load import Scenario
from moesim.tune_spec import RungSpec
from moesim_tuner.definition import Definition
from moesim_tuner.figures import violation
from moesim_tuner.records import Trial

__all__ = ["Rungs", "default_rungs"]

_FIRST = 6
"""trials that climb all the way before any is stopped"""
_TOLERANCE = 0.01
"""share of its value by which a candidate may miss the median"""
_MARGIN = 0.05
"""share by which a trial must beat another in every objective, and how many must"""
_BEATEN = 2
_SLACK = 0.1
"""a constraint broken by so much of its limit on a lower rung counts as kept"""

_SHORT_REQUESTS, _SHORT_STEPS = 100, 4
_LONG = 4
"""the whole run must be so many times the short one to be worth a rung"""
_BANK = 4


class Rungs:
    """`protocols.Ladder` of a study."""

    def __init__(
        self,
        definition: Definition,
        first: int = _FIRST,
        tolerance: float = _TOLERANCE,
        margin: float = _MARGIN,
    ) -> None:
        self._objectives, self._signs = tuple(definition.spec.objectives), definition.signs
        self._limits = {name: (limit.min, limit.max) for name, limit in definition.spec.constraints.items()}
        self._first, self._tolerance, self._margin = first, tolerance, margin

    def climbs(self, rung: int, trial: Trial, trials: Sequence[Trial]) -> bool:
        """See `protocols.Ladder`."""
        if trial.origin in ("default", "start") or trial.origin.startswith("heuristic"):
            return True
        whole = [t for t in trials if t.state == "complete" and len(t.rungs) > rung]
        if len(whole) < self._first:
            return True
        broken = self._broken(trial.rungs[rung])
        if broken > 0 and broken > _median([self._broken(t.rungs[rung]) for t in whole]):
            return False
        mine = self._values(trial.rungs[rung])
        theirs = [self._values(t.rungs[rung]) for t in whole if not self._broken(t.rungs[rung])]
        if len(theirs) < self._first:
            return True
        if len(mine) > 1:
            return sum(self._beats(other, mine) for other in theirs) < _BEATEN
        middle = _median([value for (value,) in theirs])
        return mine[0] >= middle - self._tolerance * abs(middle)

    def _values(self, figures: Mapping[str, float]) -> tuple[float, ...]:
        """Objectives on a rung, the more the better; what is missing is worst."""
        worst = float("-inf")
        return tuple(
            s * figures[n] if n in figures else worst for n, s in zip(self._objectives, self._signs, strict=True)
        )

    def _broken(self, figures: Mapping[str, float]) -> float:
        """Sum over constraints of what is broken beyond the slack."""
        return sum(max(0.0, violation(figures, n, *limit) - _SLACK) for n, limit in self._limits.items())

    def _beats(self, a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        """Is `a` better than `b` in everything, by the margin?"""
        return all(x > y + self._margin * abs(y) for x, y in zip(a, b, strict=True))


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def default_rungs(scenario: Scenario) -> tuple[RungSpec, ...]:
    """The ladder of a scenario whose `tune` names none: a short look, where the whole run is long enough to be worth
    one, and the whole run.

    The short look at serving: the first requests, an eighth of them and at least 100, on four bank entries a size and
    counts of experts instead of tokens where nothing in the scenario needs tokens; at training: an eighth of the steps,
    at least 4. A recorded trace of which no `limit` says how much is used is not cut: its length is not known before it
    is read, and it may be small.
    """
    short = _short_training(scenario) if scenario.training is not None else _short_serving(scenario)
    return (RungSpec(set=short), RungSpec()) if short else (RungSpec(),)


def _short_serving(scenario: Scenario) -> dict[str, Any]:
    requests = scenario.requests
    assert requests is not None
    field = "limit" if requests.path is not None else "num_requests"
    number = getattr(requests, field)
    if number is None:
        return {}
    few = max(_SHORT_REQUESTS, number // 8)
    if number < _LONG * few:
        return {}
    out: dict[str, Any] = {f"requests.{field}": few}
    counts = scenario.routing.fidelity == "count"
    needs_tokens = (
        scenario.tiers is not None
        or scenario.rebalance is not None
        or getattr(scenario.policies.balancer, "uses_affinity", False)
        or scenario.communication.coherent
    )
    if scenario.model.is_moe and not needs_tokens and scenario.routing.fidelity != "count":
        out["routing.fidelity"] = "count"
        counts = True
    if scenario.model.is_moe and counts and scenario.engine.bank_entries > _BANK:
        out["engine.bank_entries"] = _BANK
    return out


def _short_training(scenario: Scenario) -> dict[str, Any]:
    training = scenario.training
    assert training is not None
    few = max(_SHORT_STEPS, training.steps // 8)
    if training.steps < _LONG * few:
        return {}
    out: dict[str, Any] = {"training.steps": few}
    if training.measured_from_step:
        out["training.measured_from_step"] = min(training.measured_from_step, few // 2)
    return out
