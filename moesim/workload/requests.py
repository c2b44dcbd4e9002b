"""Request streams: what arrives, when, and how long it is. Read from a trace or generated.

Legend: R requests. A trace format is a module of `moesim.traces` found by its file name (`format: azure` ->
`moesim/traces/azure.py`) with `OPTIONS` (the keys of RequestsSpec that it uses) and `read(path, options) ->
RawRequests`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, ModelWrapValidatorHandler, model_validator

from moesim.arrays import IntArray
from moesim.errors import BadInput
from moesim.reuse import file_key, reused
from moesim.spec import Spec
from moesim.units import Ms, PerS, Seconds, s_to_ns
from moesim.workload.generators import (
    MAX_REQUESTS,
    MAX_SPAN_S,
    MAX_TOKENS,
    Lengths,
    LengthsSpec,
    did_you_mean,
    draw_lengths,
    fixed_arrivals,
    gamma_arrivals,
    located,
    poisson_arrivals,
    validated,
)

__all__ = [
    "TRACE_OPTIONS",
    "RawRequests",
    "ReadOptions",
    "RequestStream",
    "RequestsSpec",
    "build_requests",
    "request_formats",
]


@dataclass(frozen=True, slots=True)
class RequestStream:
    """R requests in the order in which they arrive.

    arrival_ns int64[R]: non-decreasing, the first at 0. prompt_tokens, output_tokens int64[R]: at least 1.
    session_id int64[R]: -1 where a request belongs to no session. concurrency: None for an open stream; for a
    closed loop all arrivals are 0 and the i-th request starts when one of the `concurrency` in flight ends.
    """

    arrival_ns: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    session_id: IntArray
    concurrency: int | None
    source: str
    warnings: tuple[str, ...]

    def __post_init__(self) -> None:
        for array in (self.arrival_ns, self.prompt_tokens, self.output_tokens, self.session_id):
            array.setflags(write=False)
        self._check()

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def _check(self) -> None:
        """The invariants of the docstring; broken ones are our own mistake, never a user's."""
        count = len(self.arrival_ns)
        arrays = (self.arrival_ns, self.prompt_tokens, self.output_tokens, self.session_id)
        assert count
        assert all(a.shape == (count,) and a.dtype == np.int64 for a in arrays)
        assert self.arrival_ns[0] >= 0
        assert bool((np.diff(self.arrival_ns) >= 0).all())
        assert min(int(self.prompt_tokens.min()), int(self.output_tokens.min())) >= 1
        assert int(self.session_id.min()) >= -1
        assert self.concurrency is None or (self.concurrency >= 1 and not self.arrival_ns.any())


@dataclass(frozen=True, slots=True)
class RawRequests:
    """What a trace reader returns: R requests in the order of the file, times on the trace's own clock.

    arrival_ns int64[R], in any order; clock_zero_ns: where `window_s` counts from (None: the first arrival);
    prompt_tokens, output_tokens int64[R] in 1..2**31; session_id int64[R] (-1 none).
    """

    arrival_ns: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    session_id: IntArray
    warnings: tuple[str, ...] = ()
    clock_zero_ns: int | None = None


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a reader may use to do less: all of it is applied again by `build_requests`.

    seed: for formats that draw. window_ns: [start, end) on the trace's clock. enough: so many requests from
    the start of the window will be used. needs_arrivals: False when a closed loop replaces the recorded
    arrivals.
    """

    seed: int = 0
    window_ns: tuple[int, int] | None = None
    enough: int | None = None
    needs_arrivals: bool = True


_LENGTHS = ("prompt_tokens", "output_tokens")
_CLIPS = ("max_prompt_tokens", "max_output_tokens")
TRACE_OPTIONS = frozenset(("path", "limit", "offset", "window_s", "rate_scale", "concurrency", *_CLIPS))
"""What every trace format uses."""


class _Generator(NamedTuple):
    needed: tuple[str, ...]
    one_of: tuple[tuple[str, ...], ...]  # of each group at least one; of a group of rates, one only
    allowed: tuple[str, ...]

    @property
    def options(self) -> frozenset[str]:
        return frozenset(self.needed + self.allowed + tuple(key for group in self.one_of for key in group))


_AMOUNT = ("num_requests", "duration_s")
_OPEN = ("limit", "rate_scale", *_CLIPS)
_GENERATORS: Mapping[str, _Generator] = {
    "poisson": _Generator(("rate_per_s", *_LENGTHS), (_AMOUNT,), _OPEN),
    "gamma": _Generator(("rate_per_s", "cv", *_LENGTHS), (_AMOUNT,), _OPEN),
    "fixed": _Generator(_LENGTHS, (_AMOUNT, ("rate_per_s", "interval_ms")), _OPEN),
    "closed_loop": _Generator(("concurrency", "num_requests", *_LENGTHS), (), ("limit", *_CLIPS)),
}
_ALIASES = {"csv": "csv_lengths", "deterministic": "fixed"}


def _trace_module(name: str) -> ModuleType | None:
    """The trace format's module, or None when no module of moesim.traces has that name and reads requests."""
    if not name.isidentifier() or name.startswith("_"):
        return None
    full = f"moesim.traces.{name}"
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        return None
    return module if isinstance(getattr(module, "OPTIONS", None), frozenset) else None


def request_formats() -> list[str]:
    """Every value `requests.format` may take."""
    traces = importlib.import_module("moesim.traces")
    names = {name for _, name, _ in pkgutil.iter_modules(traces.__path__) if _trace_module(name) is not None}
    return sorted((names | set(_GENERATORS) | set(_ALIASES)) - {"csv_lengths"})


def _options_of(name: str) -> frozenset[str] | None:
    name = _ALIASES.get(name, name)
    if name in _GENERATORS:
        return _GENERATORS[name].options
    module = _trace_module(name)
    if module is None:
        return None
    options: frozenset[str] = module.OPTIONS
    return options


class RequestsSpec(Spec):
    """The `requests` part of a scenario. Which key belongs to which format is checked; one that is not used
    is refused.

    Trace formats take path, limit, offset, window_s, rate_scale, concurrency, max_prompt_tokens,
    max_output_tokens. Generators take num_requests or duration_s (both: whichever ends first), prompt_tokens
    and output_tokens, and poisson rate_per_s; gamma rate_per_s and cv; fixed rate_per_s or interval_ms;
    closed_loop concurrency.
    """

    format: str = Field(
        description="a trace format (azure, burstgpt, csv, mooncake, servegen, vllm_bench) or a generator "
        "(poisson, gamma, fixed, closed_loop)"
    )
    path: Annotated[str, Field(min_length=1)] | None = Field(None, description="trace file, relative to the scenario")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="use the first N requests")
    offset: Annotated[int, Field(ge=0)] = Field(0, description="skip the first N requests of the window")
    window_s: Annotated[tuple[Seconds, Seconds], Field(strict=False)] | None = Field(
        None, description="use arrivals in [start, end) seconds from the trace's first"
    )
    rate_scale: Annotated[float, Field(ge=1e-3, le=1e6)] = Field(1.0, description="2: twice as many requests a second")
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="longer prompts are clipped")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="longer answers are clipped")
    num_requests: Annotated[int, Field(ge=1, le=MAX_REQUESTS)] | None = None
    duration_s: Annotated[Seconds, Field(gt=0, le=MAX_SPAN_S)] | None = None
    rate_per_s: Annotated[PerS, Field(gt=0, le=1e9)] | None = None
    interval_ms: Annotated[Ms, Field(ge=1e-6)] | None = None
    cv: Annotated[float, Field(gt=0, le=1000)] | None = Field(None, description="of the gaps between arrivals")
    concurrency: Annotated[int, Field(ge=1, le=MAX_REQUESTS)] | None = Field(
        None, description="closed loop: requests in flight; with a trace its arrival times are not used"
    )
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RequestsSpec:
        problems = self._inconsistent()
        if problems:
            raise located("RequestsSpec", problems)
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _belongs(cls, data: Any, handler: ModelWrapValidatorHandler[RequestsSpec]) -> RequestsSpec:
        return validated("RequestsSpec", data, handler, cls._misplaced(data) if isinstance(data, Mapping) else [])

    @classmethod
    def _misplaced(cls, data: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        """Keys that the format does not use, or needs and has not."""
        name = data.get("format")
        if not isinstance(name, str):
            return []
        options = _options_of(name)
        if options is None:
            message = f"unknown request format {name!r}; {did_you_mean(name, request_formats())}"
            return [("format", message, name)]
        problems: list[tuple[str, str, Any]] = []
        for key, field in cls.model_fields.items():
            value = data.get(key)
            if key not in ("format", *options) and value is not None and value != field.default:
                message = f"format {name} does not use {key}; it takes {', '.join(sorted(options))}"
                problems.append((key, message, value))
        generator = _GENERATORS.get(_ALIASES.get(name, name))
        if generator is None:
            if data.get("path") is None:
                problems.append(("path", f"format {name} reads a file: path is missing", None))
            return problems
        groups = [(key,) for key in generator.needed] + list(generator.one_of)
        lacking = [group for group in groups if all(data.get(key) is None for key in group)]
        return problems + [(g[0], f"format {name} needs {' or '.join(g)}, which is missing", None) for g in lacking]

    def _inconsistent(self) -> list[tuple[str, str, Any]]:
        """Values that are right alone and wrong together."""
        problems: list[tuple[str, str, Any]] = []
        if self.rate_per_s is not None and self.interval_ms is not None:
            problems.append(("interval_ms", "give rate_per_s or interval_ms, not both", self.interval_ms))
        if self.window_s is not None and not self.window_s[0] < self.window_s[1]:
            message = f"a window is [start, end] with start < end: {list(self.window_s)}"
            problems.append(("window_s", message, self.window_s))
        if self.path is not None and self.concurrency is not None and self.rate_scale != 1.0:
            message = "a closed loop (concurrency) has no arrival times to scale; leave rate_scale out"
            problems.append(("rate_scale", message, self.rate_scale))
        rate = self._rate_per_s()
        if rate is not None and self.duration_s is not None and self.num_requests is None:
            expected = rate * self.duration_s
            if expected > 0.9 * MAX_REQUESTS:
                message = f"a stream has at most {MAX_REQUESTS:,} requests, here are {expected:,.0f}"
                problems.append(("duration_s", message, self.duration_s))
        elif rate is not None and self.num_requests is not None and self.num_requests / rate > MAX_SPAN_S / 2:
            message = f"a stream spans at most {MAX_SPAN_S:g} s: "
            message += f"{self.num_requests:,} requests at {rate:g}/s are longer"
            problems.append(("num_requests", message, self.num_requests))
        return problems

    def _rate_per_s(self) -> float | None:
        return 1e3 / self.interval_ms if self.interval_ms is not None else self.rate_per_s


def build_requests(spec: RequestsSpec, base: Path, seed: int) -> RequestStream:
    """The stream that `spec` describes; a relative path is relative to `base`.

    Order of the steps: sort by arrival (equal times keep the file's order), window, offset, limit, first
    arrival to 0, rate_scale, clip. Raises BadInput with every problem of the file. Runs may share it
    (`moesim.reuse`).
    """
    name = _ALIASES.get(spec.format, spec.format)

    def key() -> tuple[Any, ...] | None:
        file = () if spec.path is None else file_key(Path(base) / spec.path)
        return None if file is None else (file, spec, seed)

    return reused(
        "requests",
        key,
        lambda: _generate(spec, name, seed) if name in _GENERATORS else _replay(spec, name, base, seed),
    )


def _generate(spec: RequestsSpec, name: str, seed: int) -> RequestStream:
    count = spec.num_requests if spec.limit is None else min(spec.limit, spec.num_requests or MAX_REQUESTS)
    arrivals: Mapping[str, Callable[[], IntArray]] = {
        "poisson": lambda: poisson_arrivals(spec.rate_per_s or 0.0, count, spec.duration_s, seed),
        "gamma": lambda: gamma_arrivals(spec.rate_per_s or 0.0, spec.cv or 1.0, count, spec.duration_s, seed),
        "fixed": lambda: fixed_arrivals(1 / (spec._rate_per_s() or 1.0), count, spec.duration_s),
        "closed_loop": lambda: np.zeros(count or 1, dtype=np.int64),
    }
    arrival_ns = arrivals[name]()
    total = len(arrival_ns)
    if int(arrival_ns[-1]) >= s_to_ns(MAX_SPAN_S):
        raise BadInput(f"a stream spans at most {MAX_SPAN_S:g} s; give fewer requests or a lower cv", "requests")
    if count is None and total >= MAX_REQUESTS:
        raise BadInput(
            f"a stream has at most {MAX_REQUESTS:,} requests; give num_requests or a shorter duration_s", "requests"
        )
    warnings: list[str] = []
    tokens: list[IntArray] = []
    for key in _LENGTHS:
        lengths = getattr(spec, key)
        assert isinstance(lengths, LengthsSpec)
        values, below = draw_lengths(lengths, total, seed, f"requests.{key}")
        if below > 0.01 * total:
            warnings.append(
                f"requests.{key}: {below:,} of {total:,} lengths drawn below 1 became 1; the mean is "
                f"{values.mean():.6g} for {lengths.mean:g}; give a lower cv or a lognormal distribution"
            )
        tokens.append(values)
    rate = spec._rate_per_s()
    how = f"{spec.concurrency} in flight" if name == "closed_loop" else f"{(rate or 0) * spec.rate_scale:g} req/s"
    return RequestStream(
        arrival_ns=_scale(arrival_ns, spec.rate_scale),
        prompt_tokens=_clip(tokens[0], spec.max_prompt_tokens, "prompts", warnings),
        output_tokens=_clip(tokens[1], spec.max_output_tokens, "answers", warnings),
        session_id=np.full(total, -1, dtype=np.int64),
        concurrency=spec.concurrency,
        source=f"{spec.format} ({how}, {total:,} requests)",
        warnings=tuple(warnings),
    )


def _replay(spec: RequestsSpec, name: str, base: Path, seed: int) -> RequestStream:
    assert spec.path is not None
    path = Path(base) / spec.path
    module = _trace_module(name)
    assert module is not None
    window_ns = None if spec.window_s is None else (s_to_ns(spec.window_s[0]), s_to_ns(spec.window_s[1]))
    options = ReadOptions(
        seed=seed,
        window_ns=window_ns,
        enough=None if spec.limit is None else spec.offset + spec.limit,
        needs_arrivals=spec.concurrency is None,
    )
    raw: RawRequests = module.read(path, options)
    warnings = list(raw.warnings)
    chosen = _choose(raw, spec, window_ns, path, warnings)
    arrival_ns = raw.arrival_ns[chosen]
    if spec.concurrency is not None:
        arrival_ns = np.zeros(len(chosen), dtype=np.int64)
    if int(arrival_ns[-1]) - int(arrival_ns[0]) > s_to_ns(MAX_SPAN_S):
        raise BadInput(f"a stream spans at most {MAX_SPAN_S:g} s; choose a part with window_s or limit", str(path))
    return RequestStream(
        arrival_ns=_scale(arrival_ns - arrival_ns[0], spec.rate_scale),
        prompt_tokens=_clip(raw.prompt_tokens[chosen], spec.max_prompt_tokens, "prompts", warnings),
        output_tokens=_clip(raw.output_tokens[chosen], spec.max_output_tokens, "answers", warnings),
        session_id=raw.session_id[chosen],
        concurrency=spec.concurrency,
        source=f"{spec.format} {path.name} ({len(chosen):,} requests)",
        warnings=tuple(warnings),
    )


def _choose(
    raw: RawRequests, spec: RequestsSpec, window_ns: tuple[int, int] | None, path: Path, warnings: list[str]
) -> IntArray:
    """Rows to use, in the order of arrival."""
    arrival_ns = raw.arrival_ns
    order = np.arange(len(arrival_ns))
    late = int(np.count_nonzero(np.diff(arrival_ns) < 0))
    if late:
        order = np.argsort(arrival_ns, kind="stable")
        warnings.append(f"{path.name}: {late:,} rows arrive before the row above them; the rows were sorted by arrival")
    first_ns = int(arrival_ns[order[0]]) if raw.clock_zero_ns is None else raw.clock_zero_ns
    if window_ns is not None:
        since_ns = arrival_ns[order] - first_ns
        order = order[(since_ns >= window_ns[0]) & (since_ns < window_ns[1])]
        if not len(order):
            span_s = (int(arrival_ns.max()) - first_ns) / 1e9
            raise BadInput(
                f"no request arrives in window_s {list(spec.window_s or ())}; the trace is 0 to {span_s:g} s",
                str(path),
            )
    if spec.offset >= len(order):
        message = f"offset must be below the number of requests: offset={spec.offset:,}, requests={len(order):,}"
        raise BadInput(message, str(path))
    order = order[spec.offset :]
    if spec.limit is not None and spec.limit > len(order):
        warnings.append(f"{path.name}: limit is {spec.limit:,} but only {len(order):,} requests are there")
    return order[: spec.limit]


def _scale(arrival_ns: IntArray, rate_scale: float) -> IntArray:
    """Arrivals at `rate_scale` times the rate, each rounded to a whole ns."""
    if rate_scale == 1.0:
        return arrival_ns
    return np.rint(arrival_ns / rate_scale).astype(np.int64)


def _clip(tokens: IntArray, most: int | None, what: str, warnings: list[str]) -> IntArray:
    if most is None or most >= MAX_TOKENS:
        return tokens
    longer = int(np.count_nonzero(tokens > most))
    if longer:
        lost = int((tokens - np.minimum(tokens, most)).sum())
        warnings.append(f"{longer:,} of {len(tokens):,} {what} were clipped to {most:,} tokens ({lost:,} tokens less)")
    return np.minimum(tokens, most)
