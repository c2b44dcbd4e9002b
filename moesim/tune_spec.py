"""The `tune` block of a scenario: what may be changed, what is wanted, what must hold, and how long to look.

A simulation has no use for it and its hash does not heed it; `moesim tune` (package `moesim_tuner`) does the search.
Here stands only what can be said, so that `moesim check` and `moesim schema` know it on a machine without Optuna.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moesim.spec import Spec
from moesim.tune_values import Scalar, grid, identity, label, series

__all__ = ["JudgeSpec", "LimitSpec", "ParameterSpec", "RungSpec", "TuneSpec"]

_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Number = Annotated[int | float, Field(allow_inf_nan=False)]
_Two = Annotated[list[_Number], Field(min_length=2, max_length=2)]


class ParameterSpec(Spec):
    """One parameter of the search. Exactly one of choices, range, log_range.

    choices: a list of values for the field that the parameter's name is the path of, or a mapping of labels, each to
    the fields it sets (`tp4: {parallel.tp: 4, parallel.dp: 8}`). range: [lowest, highest], both in; whole numbers
    where both (and step) are; step: between values, from the lowest. log_range: the same in equal ratios; factor:
    each value is so many times the last (2: powers of two). when: other parameters -> the value, or list of values, of
    each with which this one means something; elsewhere it is left alone. A policy's value may be named by its kind.
    """

    choices: Annotated[list[Any], Field(min_length=1, max_length=1000)] | dict[str, dict[str, Any]] | None = None
    range: _Two | None = None
    log_range: _Two | None = None
    step: _Number | None = None
    factor: Annotated[float | int, Field(gt=1)] | None = None
    when: dict[str, Any] | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest of a range; (0, 0) for choices."""
        return self.range or self.log_range or (0, 0)

    @property
    def whole(self) -> bool:
        """A range of whole numbers."""
        return self.choices is None and all(isinstance(v, int) for v in (*self.bounds, self.step or 0))

    @property
    def stride(self) -> float | None:
        """What is between values of a range; None where it is continuous, or in equal ratios."""
        return self.step if self.step is not None else 1 if self.whole else None

    @property
    def values(self) -> tuple[Scalar, ...] | None:
        """Every value, in order; None where it is continuous or has over `MOST_VALUES`."""
        if self.choices is not None:
            return tuple(self.choices) if isinstance(self.choices, dict) else tuple(map(label, self.choices))
        low, high = self.bounds
        if self.factor is not None:
            return series(low, high, self.factor, self.whole)
        if self.stride is not None:
            return grid(low, high, self.stride, self.whole)
        return (low,) if low == high else None

    def matching(self, wanted: Any) -> tuple[Scalar, ...]:
        """The values that a `when` names: one value, or a list; a policy by its kind, whatever its parameters."""
        names = {identity(label(one)) for one in (wanted if isinstance(wanted, list) else [wanted])}
        kinds: list[Any] = [None] * len(self.values or ())
        if isinstance(self.choices, list):
            kinds = [one.get("kind") if isinstance(one, dict) else None for one in self.choices]
        return tuple(
            value
            for value, kind in zip(self.values or (), kinds, strict=True)
            if identity(value) in names or (isinstance(kind, str) and identity(kind) in names)
        )


class LimitSpec(Spec):
    """What a figure must keep: at most `max`, at least `min`."""

    max: _Number | None = None
    min: _Number | None = None

    @model_validator(mode="after")
    def _says_something(self) -> LimitSpec:
        if self.max is None and self.min is None:
            raise ValueError("a constraint needs max, min or both")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"nothing can be at least {self.min} and at most {self.max}; exchange min and max")
        return self


class RungSpec(Spec):
    """One step of a ladder of fidelities: fields that are set for it (`requests.num_requests: 100`), and how many
    seeds a candidate has been run with once it has climbed it."""

    set: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[int, Field(ge=1, le=100)] = 1


class JudgeSpec(Spec):
    """How the winners are judged after the search. finalists: how many go in, beside the defaults. seeds: fresh ones
    that each is run with. fit_share: the first sequences of the routing pool, this share of them, are what the search
    (and a placement) sees; the others are what the finalists serve; 0: all serve both. set: fields of the final runs
    (`routing.fidelity: token`)."""

    finalists: Annotated[int, Field(ge=1, le=100)] = 4
    seeds: Annotated[int, Field(ge=2, le=100)] = 5
    fit_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    set: dict[str, Any] = Field(default_factory=dict)


class TuneSpec(Spec):
    """`tune:` of a scenario.

    space: parameter by name, which is the path of the field it sets unless its choices say which. objectives: figures,
    each better in its own direction. constraints: figure -> limit. gpu_hour_usd: price of one device for an hour, for
    costs. start: settings to try first, beside the scenario as written. trials: configurations tried, in batches of
    `batch`, which are proposed together (so any number of workers up to it finds the same). sampler: `auto` chooses by
    the space. rungs: the ladder, cheapest first; none: made from the scenario. timeout_s: a trial's longest time.
    """

    space: Annotated[dict[_Name, ParameterSpec], Field(min_length=1, max_length=64)]
    objectives: Annotated[list[_Name], Field(min_length=1, max_length=4)]
    constraints: dict[_Name, LimitSpec] = Field(default_factory=dict)
    gpu_hour_usd: Annotated[float | int, Field(gt=0)] | None = None
    start: Annotated[list[dict[str, Any]], Field(max_length=100)] = Field(default_factory=list)
    trials: Annotated[int, Field(ge=1, le=100_000)] = 60
    batch: Annotated[int, Field(ge=1, le=256)] = 4
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    sampler: Literal["auto", "tpe", "nsga2", "gp", "random", "grid"] = "auto"
    rungs: Annotated[list[RungSpec], Field(min_length=1, max_length=8)] | None = None
    timeout_s: Annotated[float | int, Field(gt=0)] = 600
    judge: JudgeSpec = Field(default_factory=JudgeSpec)
