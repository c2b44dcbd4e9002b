"""Generated traffic: when requests arrive and how long they are.

Legend: R requests. Arrivals are integer ns, non-decreasing, the first one at 0; lengths are int64 tokens, at
least 1.

Every array has a draw of its own (component `requests.arrival`, `requests.prompt_tokens`, ...), so a change
of the rate leaves the lengths as they were, and the first R requests of a longer stream are the same R
requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from moesim.arrays import FloatArray, IntArray
from moesim.rng import generator
from moesim.spec import Spec

__all__ = [
    "MAX_REQUESTS",
    "MAX_SPAN_S",
    "MAX_TOKENS",
    "Lengths",
    "LengthsSpec",
    "did_you_mean",
    "draw_lengths",
    "fixed_arrivals",
    "gamma_arrivals",
    "located",
    "poisson_arrivals",
    "validated",
]

MAX_TOKENS = 2**31
"""No prompt or answer is longer: a larger figure is a broken file, not a request."""
MAX_REQUESTS = 10_000_000
MAX_SPAN_S = 1e9
"""32 years: the span of one stream, far inside what int64 ns hold."""

_BLOCK = 65_536
_Made = TypeVar("_Made")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Text that ends an error about a wrong `name`: the nearest valid one, then all of them."""
    valid = sorted(valid)
    near = get_close_matches(name.lower(), valid, n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Valid: {', '.join(valid)}"


def _detail(key: str, message: str, value: Any) -> InitErrorDetails:
    kind = PydanticCustomError("requests", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=(key,), input=value)


def located(title: str, problems: Iterable[tuple[str, str, Any]]) -> ValidationError:
    """One pydantic error from (key, message, value) triples, so that each problem keeps the place of its own
    key.

    Raised inside a model validator, pydantic puts the outer location before each key.
    """
    return ValidationError.from_exception_data(title, [_detail(*problem) for problem in problems])


def validated(title: str, data: Any, handler: Callable[[Any], _Made], more: Sequence[tuple[str, str, Any]]) -> _Made:
    """`handler(data)`, with problems of its fields and `more` (as of `located`) in one error."""
    try:
        made = handler(data)
    except ValidationError as error:
        details = [
            InitErrorDetails(
                type=PydanticCustomError(one["type"], "{message}", {"message": one["msg"]}),
                loc=one["loc"],
                input=one["input"],
            )
            for one in error.errors()
        ]
        named = {one["loc"][0] for one in details if one["loc"]}
        details += [_detail(*problem) for problem in more if problem[0] not in named]
        raise ValidationError.from_exception_data(title, details) from None
    if more:
        raise located(title, more)
    return made


# What each distribution takes: (needed, also allowed).
_LENGTH_PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "constant": (("mean",), ()),
    "uniform": (("min", "max"), ()),
    "lognormal": (("mean", "cv"), ("min", "max")),
    "normal": (("mean", "cv"), ("min", "max")),
    "gamma": (("mean", "cv"), ("min", "max")),
    "geometric": (("mean",), ("min", "max")),
    "exponential": (("mean",), ("min", "max")),
    "empirical": (("values",), ("weights", "min", "max")),
}

_Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class LengthsSpec(Spec):
    """Lengths in tokens. A plain number in YAML is a constant.

    `mean` and `cv` (standard deviation over mean) are those of the continuous distribution before rounding;
    values outside `min`..`max` are set to the bound, which moves the mean. `uniform` draws whole numbers from
    `min` to `max`, both included; `geometric` is on 1, 2, ... with that mean; `empirical` draws from `values`
    (weighed by `weights`).
    """

    distribution: str = Field(
        description="constant, uniform, lognormal, normal, gamma, geometric, exponential, empirical"
    )
    mean: Annotated[float, Field(gt=0, le=MAX_TOKENS)] | None = None
    cv: Annotated[float, Field(ge=0, le=1000)] | None = None
    min: _Tokens | None = None
    max: _Tokens | None = None
    values: Annotated[tuple[_Tokens, ...], Field(strict=False, min_length=1)] | None = None
    weights: Annotated[tuple[Annotated[float, Field(ge=0, le=1e300)], ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> LengthsSpec:
        problems = self._inconsistent()
        if problems:
            raise located("LengthsSpec", problems)
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _belongs(cls, data: Any, handler: ModelWrapValidatorHandler[LengthsSpec]) -> LengthsSpec:
        return validated("LengthsSpec", data, handler, cls._misplaced(data) if isinstance(data, Mapping) else [])

    @classmethod
    def _misplaced(cls, data: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        """Keys that the distribution needs and has not, or has and does not use."""
        kind = data.get("distribution")
        if not isinstance(kind, str):
            return []
        if kind not in _LENGTH_PARAMETERS:
            message = f"unknown length distribution {kind!r}; {did_you_mean(kind, _LENGTH_PARAMETERS)}"
            return [("distribution", message, kind)]
        needed, allowed = _LENGTH_PARAMETERS[kind]
        problems: list[tuple[str, str, Any]] = []
        for key in ("mean", "cv", "min", "max", "values", "weights"):
            value = data.get(key)
            if value is None and key in needed:
                problems.append((key, f"{kind} lengths need {' and '.join(needed)}", value))
            elif value is not None and key not in needed + allowed:
                message = f"{kind} lengths do not use {key}; they take {', '.join(needed + allowed)}"
                problems.append((key, message, value))
        return problems

    def _inconsistent(self) -> list[tuple[str, str, Any]]:
        """Values that are right alone and wrong together."""
        problems: list[tuple[str, str, Any]] = []
        if self.min is not None and self.max is not None and self.min > self.max:
            problems.append(("max", f"max must not be below min: min={self.min}, max={self.max}", self.max))
        if self.distribution == "constant" and self.mean is not None and (self.mean < 1 or self.mean % 1):
            problems.append(("mean", f"a constant length is a whole number from 1: {self.mean}", self.mean))
        if self.distribution == "geometric" and self.mean is not None and self.mean < 1:
            problems.append(("mean", f"a geometric length is at least 1, so its mean is too: {self.mean}", self.mean))
        if self.weights is not None and self.values is not None:
            if len(self.weights) != len(self.values):
                message = f"one weight a value is needed: {len(self.values)} values, {len(self.weights)} weights"
                problems.append(("weights", message, self.weights))
            elif not any(self.weights):
                problems.append(("weights", "one weight at least must be above 0", self.weights))
        return problems


def _plain_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"distribution": "constant", "mean": value}
    return value


Lengths = Annotated[LengthsSpec, BeforeValidator(_plain_number, json_schema_input_type=int | LengthsSpec)]


def draw_lengths(spec: LengthsSpec, count: int, seed: int, component: str) -> tuple[IntArray, int]:
    """`count` lengths int64[R] >= 1, and how many fell below 1 without `min` asking for it (they became 1).

    Lognormal: sigma^2 = ln(1 + cv^2), mu = ln(mean) - sigma^2 / 2; gamma: shape 1 / cv^2, scale mean * cv^2.
    """
    rng = generator(seed, component)
    kind, mean, cv = spec.distribution, spec.mean or 0.0, spec.cv or 0.0
    raw: FloatArray | IntArray
    if kind == "constant":
        raw = np.full(count, mean)
    elif kind == "uniform":
        assert spec.min is not None
        assert spec.max is not None
        raw = rng.integers(spec.min, spec.max, endpoint=True, size=count)
    elif kind == "lognormal":
        sigma2 = math.log1p(cv * cv)
        raw = np.exp(np.minimum(rng.normal(math.log(mean) - sigma2 / 2, math.sqrt(sigma2), count), 50.0))
    elif kind == "normal":
        raw = rng.normal(mean, mean * cv, count)
    elif kind == "gamma":
        raw = rng.gamma(1 / cv**2, mean * cv**2, count) if cv > 1e-6 else np.full(count, mean)
    elif kind == "geometric":
        raw = rng.geometric(1 / mean, count)
    elif kind == "exponential":
        raw = rng.exponential(mean, count)
    else:
        assert spec.values is not None
        values = np.array(spec.values, dtype=np.int64)
        weight = np.ones(len(values)) if spec.weights is None else np.array(spec.weights)
        weight = weight / weight.max()
        cdf = np.cumsum(weight / weight.sum())
        last = int(np.flatnonzero(weight)[-1])  # rounding of the sum must not reach a value of weight 0
        raw = values[np.minimum(np.searchsorted(cdf, rng.random(count), side="right"), last)]
    rounded = np.rint(raw)
    below = int(np.count_nonzero(rounded < 1)) if spec.min is None else 0
    tokens: IntArray = np.clip(rounded, spec.min or 1, spec.max or MAX_TOKENS).astype(np.int64)
    return tokens, below


def _renewal(gap_s: Any, count: int | None, duration_s: float | None) -> IntArray:
    """Arrivals in ns of a renewal process: one at 0, then gaps from `gap_s(n)` (s), until `count` or
    `duration_s`.
    """
    blocks: list[FloatArray] = [np.zeros(1)]
    have, clock = 1, 0.0
    limit = MAX_REQUESTS if count is None else count
    while have < limit and (duration_s is None or clock < duration_s):
        step = clock + np.cumsum(gap_s(min(_BLOCK, limit - have)))
        blocks.append(step)
        have, clock = have + len(step), float(step[-1])
    arrival_s = np.concatenate(blocks)[:limit]
    if duration_s is not None:
        arrival_s = arrival_s[arrival_s < duration_s]
    return np.rint(np.minimum(arrival_s, MAX_SPAN_S) * 1e9).astype(np.int64)


def poisson_arrivals(rate_per_s: float, count: int | None, duration_s: float | None, seed: int) -> IntArray:
    """Arrivals int64 ns [R] of a Poisson process: exponential gaps of mean 1 / `rate_per_s`, the first
    arrival at 0.
    """
    rng = generator(seed, "requests.arrival")
    return _renewal(lambda n: rng.exponential(1 / rate_per_s, n), count, duration_s)


def gamma_arrivals(rate_per_s: float, cv: float, count: int | None, duration_s: float | None, seed: int) -> IntArray:
    """Arrivals int64 ns [R] with gamma gaps of mean 1 / `rate_per_s` and coefficient of variation `cv`.

    Shape 1 / cv^2 (what serving benchmarks call burstiness), scale cv^2 / rate; cv = 1 is a Poisson process.
    """
    rng = generator(seed, "requests.arrival")
    return _renewal(lambda n: rng.gamma(1 / cv**2, cv**2 / rate_per_s, n), count, duration_s)


def fixed_arrivals(interval_s: float, count: int | None, duration_s: float | None) -> IntArray:
    """Arrivals int64 ns [R] one `interval_s` apart, the first at 0; each is rounded by itself, so none
    drifts.
    """
    if duration_s is not None:
        within = max(1, math.ceil(duration_s / interval_s))
        count = within if count is None else min(count, within)
    assert count is not None
    arrival_s = np.arange(count, dtype=np.float64) * interval_s
    return np.rint(np.minimum(arrival_s, MAX_SPAN_S) * 1e9).astype(np.int64)
