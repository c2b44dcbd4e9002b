"""Which points of a tuning study are measured: the best by prediction, some of the middle, some at random, the default.

The study ranks by its own objective, on simulated served runs. What is measured is what the hardware can be asked in
little time: steps that stand for each candidate's own run (`steps.py`), as step time a generated token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesim.errors import BadInput, Problem
from moesim.rng import generator

__all__ = ["Candidate", "Ranked", "chosen", "read_candidates"]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A trial of a study: number, overrides that make it of the scenario, value (smaller is better), whether it is the
    scenario as written."""

    number: int
    overrides: tuple[str, ...]
    value: float
    default: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """role: best, middle, random or default."""

    name: str
    role: str
    number: int
    overrides: tuple[str, ...]
    value: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "role": self.role,
            "trial": self.number,
            "overrides": list(self.overrides),
            "study_value": self.value,
        }


def chosen(trials: Sequence[Ranked], top: int, seed: int) -> list[Candidate]:
    """The `top` best, `top` around the middle, `top` at random of the others, and the default; trials that make one
    scenario count once. Fewer where there are fewer."""
    unique: dict[tuple[str, ...], Ranked] = {}
    for trial in sorted(trials, key=lambda t: (t.value, t.number)):
        first = unique.setdefault(trial.overrides, trial)
        if trial.default and not first.default:
            unique[trial.overrides] = trial
    ranked = list(unique.values())
    default = next((t for t in ranked if t.default), None)
    picked: dict[int, str] = {t.number: "best" for t in ranked[:top]}
    start = max(0, len(ranked) // 2 - top // 2)
    for t in ranked[start : start + top]:
        picked.setdefault(t.number, "middle")
    rest = [t for t in ranked if t.number not in picked]
    drawn = generator(seed, "validate/candidates").permutation(len(rest))[:top]
    for i in sorted(drawn.tolist()):
        picked.setdefault(rest[i].number, "random")
    if default is not None:
        picked.setdefault(default.number, "default")
    out = [t for t in ranked if t.number in picked]
    return [Candidate(f"c{i + 1:02d}", picked[t.number], t.number, t.overrides, t.value) for i, t in enumerate(out)]


def read_candidates(study: str, storage: str, top: int, seed: int) -> tuple[list[Candidate], dict[str, Any]]:
    """Candidates of a study of `moesim tune`, and what to say of it. Raises BadInput: no such study, too few trials, or
    a moesim without its tuner."""
    try:
        from moesim_tuner.definition import Definition
        from moesim_tuner.store.looking import read_study
    except ImportError as error:
        raise BadInput(
            Problem("--from", f"studies are read by moesim's tuner: {error}; install moesim[tuner]")
        ) from None
    kept = read_study(storage, study)
    definition = Definition.from_json(kept.definition)
    sign = definition.signs[0]
    trials = [
        Ranked(t.number, definition.space.overrides(t.point), -sign * t.values[0], t.origin == "default")
        for t in kept.trials
        if t.feasible and t.values
    ]
    if len(trials) < 2:
        message = (
            f"{len(trials)} of {len(kept.trials)} trials ran and keep the constraints; two are needed for a ranking"
        )
        raise BadInput(Problem(f"--from {study}", f"{message}. Search further with moesim tune resume"))
    facts = {
        "study": study,
        "objective": definition.spec.objectives[0],
        "more_is_better": sign > 0,
        "trials": len(trials),
        "scenario_hash": definition.scenario_hash,
        "overrides": list(definition.overrides),
    }
    return chosen(trials, top, seed), facts
