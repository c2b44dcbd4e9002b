"""ServeGen data sets (github.com/alibaba/ServeGen; Xiang et al., NSDI'26): a service as clients, each with
its windows.

`chunk-N-trace.csv`, no header, one window a line: start (s), rate (requests/s), CV, arrival family (Gamma,
Weibull or nothing for an idle window), its shape and scale. `chunk-N-dataset.json`: start of a period ->
probabilities of `input_tokens` and `output_tokens` (text of a mapping, tokens to probability); an empty
mapping is an idle period.

How requests are drawn here (own reconstruction from the published statistics): a window of d seconds holds
rate * d requests (the fraction by one draw), so its rate is reproduced exactly; their gaps are of the stated
family and shape, rescaled to fill the window, which for Gamma is the renewal process given its count. Scale
and CV are then implied and not used. Lengths are independent draws from the latest period that has any. Every
window has draws of its own, keyed by client and start: a shorter `window_s` or `limit` takes a part of the
same stream.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moesim.arrays import FloatArray, IntArray
from moesim.errors import BadInput
from moesim.rng import generator
from moesim.traces._chunks import Client, read_clients
from moesim.traces._files import Findings, checked_text, strict_json
from moesim.traces._json import near_key, shown
from moesim.traces._table import NUMBER
from moesim.units import s_to_ns
from moesim.workload.generators import MAX_REQUESTS, MAX_SPAN_S, MAX_TOKENS, did_you_mean
from moesim.workload.requests import TRACE_OPTIONS, RawRequests, ReadOptions

__all__ = ["OPTIONS", "read"]

OPTIONS = TRACE_OPTIONS
_FAMILIES = {"gamma": "Gamma", "weibull": "Weibull"}
_KEY = re.compile(r"([{,]\s*)([0-9]{1,12})\s*:")
_FIELDS = ("input_tokens", "output_tokens")
_DEFAULT_WINDOW_S = 600.0
_MAX_WINDOWS = 1_000_000


@dataclass(frozen=True, slots=True)
class _Window:
    """One window of one client that is not idle."""

    client: int
    line: int
    start_s: float
    duration_s: float
    rate_per_s: float
    family: str
    shape: float

    @property
    def expected(self) -> float:
        return self.rate_per_s * self.duration_s

    def count(self, rng: np.random.Generator) -> int:
        """How many requests: the expected number, a fraction decided by the generator's first draw."""
        whole = math.floor(self.expected + 1e-6)
        return whole + int(rng.random() < self.expected - whole)


def _number(text: str, what: str, least: float, most: float) -> float:
    if not NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{what}: a number is needed, got {shown(text)}")
    value = float(text)
    if not least <= value <= most:
        raise ValueError(f"{what}: from {least:g} to {most:g}, got {shown(text)}")
    return value


def _row(line: str) -> tuple[float, float, str, float]:
    """(start s, rate, family or '', shape). Raises ValueError."""
    cells = line.strip().split(",")
    if len(cells) != 6:
        raise ValueError(f"6 cells are needed (start, rate, cv, family, shape, scale), got {len(cells)}")
    start = _number(cells[0], "start", 0, MAX_SPAN_S)
    rate = _number(cells[1], "rate", 0, 1e7)
    _number(cells[2], "cv", 0, 1e6)
    family = cells[3].strip()
    if not rate:
        return start, 0.0, "", 0.0
    if family.lower() not in _FAMILIES:
        raise ValueError(f"arrival family {shown(family)} is not known; {did_you_mean(family, _FAMILIES.values())}")
    shape = _number(cells[4], "shape", 1e-6, 1e9)
    _number(cells[5], "scale", 0, 1e300)
    return start, rate, _FAMILIES[family.lower()], shape


def _windows(client: Client, path: Path, findings: Findings) -> list[_Window]:
    """The windows of a client that are not idle; problems become findings."""
    name = client.name("trace.csv")
    if client.trace is None:
        findings.add(name, "the client has a dataset but this file is missing")
        return []
    text = checked_text(client.trace, f"{path}:{name}").decode("utf-8")
    rows: list[tuple[int, tuple[float, float, str, float]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
            if rows and row[0] <= rows[-1][1][0]:
                raise ValueError(f"windows must start one after the other: {row[0]:g} s after {rows[-1][1][0]:g} s")
            rows.append((number, row))
        except ValueError as error:
            findings.add(f"{name}:{number}", str(error))
    if len(rows) > _MAX_WINDOWS:
        findings.add(name, f"at most {_MAX_WINDOWS:,} windows, got {len(rows):,}")
    if not rows:
        return []  # each line of it is a finding already
    starts = [row[0] for _, row in rows]
    steps = [b - a for a, b in pairwise(starts)]
    steps.append(steps[-1] if steps else _DEFAULT_WINDOW_S)
    return [
        _Window(client.number, number, start, step, rate, family, shape)
        for (number, (start, rate, family, shape)), step in zip(rows, steps, strict=True)
        if rate > 0
    ]


class _Dataset:
    """A client's length probabilities, parsed period by period when one is first asked for."""

    def __init__(self, client: Client, path: Path, findings: Findings) -> None:
        self._name = client.name("dataset.json")
        self._findings = findings
        self._periods: dict[int, dict[str, Any]] = {}
        self._parsed: dict[int, tuple[tuple[IntArray, FloatArray], ...] | None] = {}
        self.broken = False
        if client.dataset is None:
            return
        text = checked_text(client.dataset, f"{path}:{self._name}").decode("utf-8")
        try:
            document = strict_json(text)
        except json.JSONDecodeError as error:
            self._problem(f":{error.lineno}:{error.colno}", f"not JSON, or cut off: {error.msg}")
            return
        except ValueError as error:
            self._problem("", str(error))
            return
        if not isinstance(document, dict):
            self._problem("", f"an object of periods is needed, got {shown(document)}")
            return
        for key, fields in document.items():
            if not re.fullmatch(r"[0-9]{1,9}", key):
                self._problem("", f"a period's key is its start in whole seconds, got {shown(key)}")
            elif not isinstance(fields, dict):
                self._problem(
                    "", f"period {key}: an object with {' and '.join(_FIELDS)} is needed, got {shown(fields)}"
                )
            else:
                self._periods[int(key)] = {name: fields[name] if name in _FIELDS else None for name in fields}
        self._periods = dict(sorted(self._periods.items()))

    def _problem(self, place: str, message: str) -> None:
        self.broken = True
        self._findings.add(self._name + place, message)

    def at(self, start_s: float) -> tuple[tuple[IntArray, FloatArray], ...] | None:
        """(tokens int64, cumulative probability) of the input and of the output, from the latest period that
        started by `start_s` and is not empty; None where there is none.
        """
        for start in reversed([s for s in self._periods if s <= start_s]):
            if start not in self._parsed:
                self._parsed[start] = self._parse(start)
            found = self._parsed[start]
            if found is not None:
                return found
        return None

    def _parse(self, start: int) -> tuple[tuple[IntArray, FloatArray], ...] | None:
        fields = self._periods[start]
        out = []
        for field in _FIELDS:
            if field not in fields:
                self._problem("", f"period {start}: {near_key(field, fields)}")
                return None
            try:
                table = _probabilities(fields[field])
            except ValueError as error:
                self._problem("", f"period {start}, {field}: {error}")
                return None
            if table is None:
                return None
            out.append(table)
        return tuple(out)


def _probabilities(value: Any) -> tuple[IntArray, FloatArray] | None:
    """`{45: 0.01, 46: ...}` as text, or the same as an object, -> (tokens ascending, cumulative probability);
    None if empty. Raises ValueError.
    """
    mapping = strict_json(_KEY.sub(r'\1"\2":', value)) if isinstance(value, str) else value
    if not isinstance(mapping, dict):
        raise ValueError(f"a mapping of tokens to probability is needed, got {shown(mapping)}")
    if not mapping:
        return None
    wrong = next((key for key in mapping if not re.fullmatch(r"[0-9]{1,12}", key)), None)
    if wrong is not None:
        raise ValueError(f"a whole number of tokens is needed, got {shown(wrong)}")
    bad = next((p for p in mapping.values() if type(p) not in (int, float) or not 0 <= p <= 1), None)
    if bad is not None:
        raise ValueError(f"a probability is from 0 to 1, got {shown(bad)}")
    pairs = sorted((int(key), float(p)) for key, p in mapping.items() if p > 0)
    total = math.fsum(p for _, p in pairs)
    if abs(total - 1) > 1e-3:
        raise ValueError(f"the probabilities must sum to 1, they sum to {total:.6g}")
    if pairs[0][0] < 1 or pairs[-1][0] > MAX_TOKENS:
        raise ValueError(f"from 1 to {MAX_TOKENS:,} tokens, got {pairs[0][0]:,} to {pairs[-1][0]:,}")
    tokens = np.array([n for n, _ in pairs], dtype=np.int64)
    cdf = np.cumsum(np.array([p for _, p in pairs]) / total)
    cdf[-1] = 1.0
    return tokens, cdf


def _places(window: _Window, count: int, rng: np.random.Generator) -> FloatArray:
    """`count` places in (0, 1), ascending: gaps of the window's family and shape, rescaled to fill it."""
    if window.family == "Gamma":
        gaps = rng.standard_gamma(window.shape, count + 1)
    else:  # Weibull: E^(1/shape), E exponential; by logarithms, since small shapes would overflow
        log_gap = np.log(rng.standard_exponential(count + 1)) / window.shape
        gaps = np.exp(log_gap - log_gap.max())
    upto = np.cumsum(gaps)
    total = float(upto[-1])
    # All gaps below the smallest float: one burst at the window's start.
    return upto[:-1] / total if total > 0 else np.zeros(count)


def _draw(window: _Window, dataset: _Dataset, seed: int) -> tuple[IntArray, IntArray, IntArray] | None:
    """Arrivals (ns), prompt tokens and output tokens of a window's requests."""
    rng = generator(seed, "requests.servegen", window.client, s_to_ns(window.start_s))
    count = window.count(rng)
    lengths = dataset.at(window.start_s)
    if not count or lengths is None:
        return None
    start_ns, duration_ns = s_to_ns(window.start_s), s_to_ns(window.duration_s)
    inside = np.minimum((_places(window, count, rng) * duration_ns).astype(np.int64), duration_ns - 1)
    prompt, output = (tokens[np.searchsorted(cdf, rng.random(count), side="right")] for tokens, cdf in lengths)
    return start_ns + inside, prompt, output


def _useful(windows: list[_Window], options: ReadOptions) -> list[_Window]:
    """Windows that can hold a request that will be used."""
    if options.window_ns is not None:
        start_s, end_s = options.window_ns[0] / 1e9, options.window_ns[1] / 1e9
        windows = [w for w in windows if w.start_s < end_s and w.start_s + w.duration_s > start_s]
    if options.enough is None:
        return windows
    whole_from_s = 0.0 if options.window_ns is None else options.window_ns[0] / 1e9
    have = 0
    for window in sorted(windows, key=lambda w: w.start_s + w.duration_s):
        if window.start_s >= whole_from_s:
            have += math.floor(window.expected + 1e-6)
        if have >= options.enough:
            end_s = window.start_s + window.duration_s
            return [w for w in windows if w.start_s < end_s]
    return windows


def read(path: Path, options: ReadOptions) -> RawRequests:
    """Draw the requests of a ServeGen folder or .tar.gz. Times count from the data set's time 0.

    Raises BadInput with every problem as `archive:member:line`; also when more than 10 million requests would
    be drawn.
    """
    clients = read_clients(path)
    findings = Findings(path)
    windows: list[_Window] = []
    datasets: dict[int, _Dataset] = {}
    for client in clients:
        try:
            windows += _windows(client, path, findings)
            datasets[client.number] = _Dataset(client, path, findings)
        except BadInput as error:
            for problem in error.problems:
                findings.add(problem.where.removeprefix(f"{path}:"), problem.message)
    findings.raise_if_any()
    windows = _useful(windows, options)
    for window in windows:
        dataset = datasets[window.client]
        if dataset.at(window.start_s) is None and not dataset.broken:
            place = f"chunk-{window.client}-trace.csv:{window.line}"
            findings.add(place, f"the window has a rate but chunk-{window.client}-dataset.json has no lengths for it")
    findings.raise_if_any()
    expected = math.fsum(window.expected for window in windows)
    if expected > 0.9 * MAX_REQUESTS:
        message = f"at most {MAX_REQUESTS:,} requests, here are {expected:,.0f}; take a part with window_s"
        raise BadInput(message, str(path))
    drawn = [part for w in windows if (part := _draw(w, datasets[w.client], options.seed)) is not None]
    if not drawn:
        raise BadInput("no window with a rate above 0 is left: there is no request to draw", str(path))
    arrival_ns, prompt, output = (np.concatenate(column) for column in zip(*drawn, strict=True))
    order = np.argsort(arrival_ns, kind="stable")
    return RawRequests(
        arrival_ns=arrival_ns[order],
        prompt_tokens=prompt[order],
        output_tokens=output[order],
        session_id=np.full(len(order), -1, dtype=np.int64),
        clock_zero_ns=0,
    )
