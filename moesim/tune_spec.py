"""The `tune` block of a scenario: what may be changed, what is wanted, what must hold, and how long to look.

A simulation has no use for it and its hash does not heed it; `moesim tune` (package `moesim_tuner`) does the search.
Here stands only what can be said, so that `moesim check` and `moesim schema` know it on a machine without Optuna.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from moesim.spec import Spec
from moesim.tune_values import Scalar, grid, identity, label, series, shown

__all__ = ["JudgeSpec", "LimitSpec", "ParameterSpec", "RungSpec", "TuneSpec"]


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = isinstance(value, str) and re.fullmatch(r"\s*[-+]?[\d_.]+(e[-+]?\d+)?\s*", value, re.IGNORECASE)
        hint = f"; write {value.strip()} without quotes" if isinstance(value, str) and text else ""
        raise ValueError(f"a number is needed, got {value!r:.60}{hint}")
    return value


def _choices(value: Any) -> Any:
    if not isinstance(value, list | dict) or not 1 <= len(value) <= 1000:
        got = f"{len(value):,}" if isinstance(value, list | dict) else repr(value)[:60]
        raise ValueError(f"1 to 1,000 values in a list are needed, or labels with the fields each sets; got {got}")
    for name, fields in value.items() if isinstance(value, dict) else ():
        if not isinstance(fields, dict):
            told = f"{name!r:.80} is a label and needs the fields it sets"
            raise ValueError(f"{told} ({{parallel.tp: 4}}), got {fields!r:.60}")
    return value


_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Number = Annotated[int | float, Field(allow_inf_nan=False), BeforeValidator(_number)]
_Two = Annotated[list[_Number], Field(min_length=2, max_length=2)]


class ParameterSpec(Spec):
    """One parameter of the search. Exactly one of choices, range, log_range.

    choices: a list of values for the field that the parameter's name is the path of, or a mapping of labels, each to
    the fields it sets (`tp4: {parallel.tp: 4, parallel.dp: 8}`). range: [lowest, highest], both in; whole numbers
    where both (and step) are; step: between values, from the lowest. log_range: the same in equal ratios; factor:
    each value is so many times the last (2: powers of two). when: other parameters -> the value, or list of values, of
    each with which this one means something; elsewhere it is left alone. A policy's value may be named by its kind.
    """

    choices: Annotated[list[Any] | dict[str, dict[str, Any]], BeforeValidator(_choices)] | None = None
    range: _Two | None = None
    log_range: _Two | None = None
    step: _Number | None = None
    factor: _Number | None = None
    when: Annotated[dict[str, Any], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ParameterSpec:
        wrong = _wrong_kind(self) or [*_wrong_bounds(self), *_wrong_choices(self)]
        if wrong:
            raise ValidationError.from_exception_data(
                "parameter",
                [
                    InitErrorDetails(
                        type=PydanticCustomError("value_error", "{message}", {"message": message}), loc=loc, input=None
                    )
                    for loc, message in wrong
                ],
            )
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest of a range; (0, 0) for choices."""
        low, high = self.range or self.log_range or (0, 0)
        return low, high

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


_Loc = tuple[str | int, ...]


def _wrong_kind(spec: ParameterSpec) -> list[tuple[_Loc, str]]:
    """What is given beside what it does not belong to: (place, message) of each."""
    given = [name for name in ("choices", "range", "log_range") if getattr(spec, name) is not None]
    if len(given) != 1:
        what = f"got {' and '.join(given)}; keep one" if given else "got none"
        return [((), f"a parameter needs exactly one of choices, range, log_range, {what}")]
    belongs = {"step": "range", "factor": "log_range"}
    instead = {"step": "factor: 2 (each value twice the last)", "factor": "step, or log_range in the place of range"}
    return [
        ((name,), f"{name} goes with {other}, and this parameter has {given[0]}; remove {name}"
         + (f", or write {instead[name]}" if given[0] != "choices" else ""))
        for name, other in belongs.items()
        if getattr(spec, name) is not None and given[0] != other
    ]  # fmt: skip


def _wrong_bounds(spec: ParameterSpec) -> list[tuple[_Loc, str]]:
    if spec.choices is not None:
        return []
    (low, high), key = spec.bounds, "range" if spec.range is not None else "log_range"
    out: list[tuple[_Loc, str]] = []
    if low > high:
        out.append(((key,), f"the lowest stands first, and {low} is more than {high}; write [{high}, {low}]"))
    if spec.step is not None and spec.step <= 0:
        out.append((("step",), f"a step is more than 0, got {spec.step}"))
    elif spec.step is not None and spec.step > high - low >= 0:
        told = f"a step of {spec.step} leads out of {low} to {high} at once; use {high - low} or less"
        out.append((("step",), told if high > low else f"{told}, or remove step"))
    if key == "log_range" and low <= 0:
        out.append(((key, 0), f"equal ratios start above 0, got {low}; raise it, or use range"))
    if spec.factor is not None and spec.factor <= 1:
        out.append((("factor",), f"each value is `factor` times the last, so it is more than 1, got {spec.factor}"))
    return out


def _wrong_choices(spec: ParameterSpec) -> list[tuple[_Loc, str]]:
    out: list[tuple[_Loc, str]] = []
    if isinstance(spec.choices, dict):
        for name, fields in spec.choices.items():
            if not fields:
                out.append((("choices", name), f"{name} sets no field; write the value that stands there otherwise"))
        return out
    first: dict[tuple[bool, Scalar], int] = {}
    for i, value in enumerate(spec.choices or ()):
        same = first.setdefault(identity(label(value)), i)
        if same != i:
            out.append((("choices", i), f"{shown(value)} is a choice already, as number {same + 1}; remove one"))
    return out


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
