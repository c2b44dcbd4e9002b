"""What judging found, as plain values: JSON in and out. `judge` makes it, reports read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moesim.observe import Observation
from moesim_tuner.figures import figure

__all__ = ["Judged", "Judgement", "Kept", "Score", "Status", "odds", "spoken"]

Status = Literal["kept", "violated", "not sure"]
"""of a constraint: the whole interval inside its limits, the whole outside, or a limit within it"""
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Score:
    """One objective of one finalist. value: mean over the fresh seeds (the geometric one where figures are compared by
    ratio), with its 90 % interval. to_best: ratio to the best finalist's, with its interval at the judgement's
    tie_level; a difference where the figure is compared so (`Figure.absolute`). mark: `best`, or `tie` with it.
    by_chance: the interval of to_best from chance alone, without errors of the profile. promised: by the search."""

    value: float
    interval90: Interval | None
    to_best: float | None = None
    to_best_interval: Interval | None = None
    by_chance: Interval | None = None
    mark: str | None = None
    promised: float | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """One constraint of one finalist. value: None where the runs do not have the figure, which violates it."""

    value: float | None
    interval90: Interval | None
    status: Status


@dataclass(frozen=True, slots=True)
class Judged:
    """One finalist. changes: parameter -> (what the scenario as written has, what it has); None: not in the space.
    state: `done`, or that of its first row that is not. keeps: it ran, and every constraint's value lies within its
    limits. figures: means of all figures over the seeds."""

    trial: int | None
    origin: str
    point: Mapping[str, Any]
    changes: Mapping[str, tuple[Any, Any]]
    state: str
    reasons: tuple[str, ...] = ()
    keeps: bool = False
    scores: Mapping[str, Score] = field(default_factory=dict)
    constraints: Mapping[str, Kept] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    scenario_hash: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """finalists: the default first. winner: number of the trial to use; None where none keeps the constraints, or where
    the scenario as written wins and the search never tried it (then `keep_settings`). chosen: the winner's place among
    the finalists. ties: places of those that cannot be told from the best. front: places of those that no other
    dominates, where there are several objectives. keep_settings: the default is chosen. sentences: the finding in
    words. notes: what was held out. runs: each finalist's observations, one a seed; not kept."""

    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    finalists: tuple[Judged, ...]
    winner: int | None
    chosen: int | None
    ties: tuple[int, ...]
    front: tuple[int, ...]
    keep_settings: bool
    tie_level: float
    sentences: tuple[str, ...]
    notes: tuple[str, ...]
    runs: tuple[tuple[Observation, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All but the observations, as plain values."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("runs", "finalists")}
        out = {name: list(value) if isinstance(value, tuple) else value for name, value in out.items()}
        return {**out, "finalists": [_plain(asdict(one)) for one in self.finalists]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Judgement:
        """What `to_json` made, without observations. Raises KeyError, TypeError or ValueError for anything else."""
        plain: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if name != "finalists"
        }
        return cls(**plain, finalists=tuple(_judged(one) for one in found["finalists"]))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _judged(found: Mapping[str, Any]) -> Judged:
    def pair(value: Any) -> Any:
        return None if value is None else tuple(value)

    ends = ("interval90", "to_best_interval", "by_chance")
    scores = {
        name: Score(**{k: pair(v) if k in ends else v for k, v in score.items()})
        for name, score in found["scores"].items()
    }
    constraints = {
        name: Kept(**{k: pair(v) if k == "interval90" else v for k, v in kept.items()})
        for name, kept in found["constraints"].items()
    }
    changes = {name: tuple(change) for name, change in found["changes"].items()}
    rest = {**found, "scores": scores, "constraints": constraints, "changes": changes}
    return Judged(**{**rest, "reasons": tuple(found["reasons"])})


def odds(probability: float) -> str:
    """A probability in words, which no simulation makes certain."""
    if probability > 0.995:
        return "over 99%"
    return "under 1%" if probability < 0.005 else f"{probability:.0%}"


def spoken(name: str, value: float) -> str:
    """A figure with its unit, as a sentence has it."""
    unit = figure(name).unit
    if unit == "bytes":
        return f"{value / 2**30:.4g} GiB"
    if unit == "share" or name.endswith("_share"):
        return f"{100 * value:.3g} %"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{unit} {text}" if unit == "USD" else f"{text} {unit}".strip()
