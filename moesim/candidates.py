"""What a comparison compares: scenario files times every combination of the values of `--vary`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.compare import Entry
from moesim.cost.routed import pool_source
from moesim.errors import BadInput, Problem
from moesim.observe import Observation, observe
from moesim.scenario.fields import FAMILY_KEYS
from moesim.scenario.load import Scenario, load_scenario
from moesim.scenario.source import override_place
from moesim.simulate import RunResult, simulate
from moesim.training.result import TrainingResult
from moesim.workload.requests import build_requests

__all__ = ["Axis", "Candidate", "load_candidates", "parse_axes", "run_candidates", "split_values"]

_MOST = 200
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class Axis:
    """One `--vary`: `key` as typed, `path` in the scenario, `values` as YAML text."""

    key: str
    path: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One scenario to run. varied: key as typed -> value; scenario: as loaded with the first seed."""

    label: str
    file: Path
    varied: dict[str, str]
    overrides: tuple[str, ...]
    scenario: Scenario

    def seeded(self, seed: int) -> Scenario:
        """The scenario with another seed in it."""
        return load_scenario(self.file, self.overrides, seed)


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """`key=v1,v2` -> axes. `FAMILY.kind` is short for the policy of that family. Raises BadInput with every problem."""
    axes: list[Axis] = []
    problems: list[Problem] = []
    for text in texts:
        key, equals, rest = (part.strip() for part in text.partition("="))
        where = f"--vary {text if len(text) <= 100 else text[:97] + '...'}"
        values = split_values(rest)
        if not equals or not key or not all(values):
            problems.append(Problem(where, "written key=value,value,..., such as parallel.ep=8,16; none is empty"))
            continue
        path = _path(key)
        if path == "seed":
            problems.append(Problem(where, "all candidates run the same seeds; --seeds N runs N of them"))
        elif path in [axis.path for axis in axes]:
            problems.append(Problem(where, f"{path} is varied twice; name all its values in one --vary"))
        elif len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            problems.append(Problem(where, f"the value {twice} stands here twice; name each once"))
        else:
            axes.append(Axis(key, path, tuple(values)))
    if problems:
        raise BadInput(problems)
    return axes


def _path(key: str) -> str:
    """`placement.kind` -> policies.placement: the policy as a whole, not one key of the mapping that names it."""
    family, dot, last = key.partition(".")
    known = {**FAMILY_KEYS, **{name: name for name in FAMILY_KEYS.values()}}
    return f"policies.{known[family]}" if dot and last == "kind" and family in known else key


def split_values(text: str) -> list[str]:
    """Parts of `text` between commas that stand outside brackets and quotes, without the blanks around them."""
    parts, start, closing, quote, i = [], 0, "", "", 0
    while i < len(text):
        char = text[i]
        if quote:
            if (char == "\\" and quote == '"') or (quote == "'" and text[i : i + 2] == "''"):
                i += 1  # an escaped quote does not end it
            elif char == quote:
                quote = ""
        elif char in "'\"" and (not text[:i].rstrip() or text[:i].rstrip()[-1] in ",:[{("):
            quote = char  # elsewhere it is an apostrophe
        elif char in _PAIRS:
            closing += _PAIRS[char]
        elif closing and char == closing[-1]:
            closing = closing[:-1]
        elif char == "," and not closing:
            parts.append(text[start:i].strip())
            start = i + 1
        i += 1
    return [*parts, text[start:].strip()]


def load_candidates(
    files: Sequence[Path], overrides: Sequence[str], axes: Sequence[Axis], seeds: int
) -> tuple[list[Candidate], list[int]]:
    """All candidates, and the seeds to run: the first one's own and those that follow it.

    Raises BadInput with the problems of all files and values at once.
    """
    count = len(files) * math.prod(len(axis.values) for axis in axes)
    if not 2 <= count <= _MOST:
        few = "name another file, or --vary a key over several values" if count < 2 else "vary less"
        raise BadInput(Problem("moesim compare", f"takes 2 to {_MOST} candidates, got {count:,}; {few}"))
    paths = [file.resolve() for file in files]
    twice = [str(file) for i, file in enumerate(files) if paths[i] in paths[:i]]
    if twice:
        raise BadInput(Problem(twice[0], "named twice; name each file once"))
    names = _names(files)
    problems: dict[Problem, None] = {}
    loaded: list[Candidate] = []
    first_seed: int | None = None
    for file, chosen in itertools.product(files, itertools.product(*(axis.values for axis in axes))):
        texts = [f"{axis.path}={value}" for axis, value in zip(axes, chosen, strict=True)]
        try:
            scenario = load_scenario(file, (*overrides, *texts), first_seed)
        except BadInput as error:
            problems |= dict.fromkeys(_placed(problem, axes, chosen, texts) for problem in error.problems)
            continue
        first_seed = scenario.seed
        label = _label(names[file] if len(files) > 1 else "", axes, chosen)
        varied = {axis.key: value for axis, value in zip(axes, chosen, strict=True)}
        loaded.append(Candidate(label, file, varied, (*overrides, *texts), scenario))
    if problems:
        raise BadInput(_once(list(problems), axes))
    modes = sorted({"training" if c.scenario.training is not None else "serving" for c in loaded})
    if len(modes) > 1:
        raise BadInput(Problem("compare", "candidates of one mode can be compared, these are serving and training"))
    _read_inputs(loaded)
    assert first_seed is not None
    return loaded, [first_seed + i for i in range(seeds)]


def _read_inputs(candidates: Sequence[Candidate]) -> None:
    """Read the traffic and recorded routing of all candidates once, so that what is wrong with any is said now."""
    problems: dict[Problem, None] = {}
    read: set[str] = set()
    for candidate in candidates:
        s = candidate.scenario
        key = f"{s.base} {s.requests!r} {s.routing!r} {s.model.name}"
        if key in read:
            continue
        read.add(key)
        try:
            if s.requests is not None:
                build_requests(s.requests, s.base, s.seed)
            if s.model.is_moe and getattr(s.routing, "path", None) is not None:
                pool_source(s, s.seed)
        except BadInput as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise BadInput(list(problems))


# ---- words


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """Stems where they tell the files apart, else the paths as given."""
    stems = [file.stem for file in files]
    return {file: file.stem if stems.count(file.stem) == 1 else str(file) for file in files}


def _label(name: str, axes: Sequence[Axis], chosen: Sequence[str]) -> str:
    """What differs only: the file where there are several, and the values; keys where more than one is varied."""
    parts = [name] if name else []
    several = [axis for axis in axes if len(axis.values) > 1]
    for axis, value in zip(axes, chosen, strict=True):
        if axis in several:
            text = value[1:-1].strip() if value[:1] == "{" and value[-1:] == "}" else value
            text = re.sub(r"^kind:\s*", "", text)
            if len(several) > 1:
                text = f"{_short(axis.key, several)}={f'({text})' if ',' in text else text}"
            parts.append(text)
    return ", ".join(parts)


def _short(key: str, axes: Sequence[Axis]) -> str:
    last = [axis.key.removesuffix(".kind").rpartition(".")[2] for axis in axes]
    mine = key.removesuffix(".kind").rpartition(".")[2]
    return mine if last.count(mine) == 1 else key


def _placed(problem: Problem, axes: Sequence[Axis], chosen: Sequence[str], texts: Sequence[str]) -> Problem:
    """The problem of a value of --vary, placed there and not in the `--set` that stands for it."""
    for axis, value, text in zip(axes, chosen, texts, strict=True):
        if problem.where == override_place(text):
            return Problem(f"--vary {axis.key}={value}", problem.message)
    return problem


def _once(problems: list[Problem], axes: Sequence[Axis]) -> list[Problem]:
    """What several values of one key are refused for in the same words is one problem of the key."""
    out: dict[Problem, None] = {}
    for problem in problems:
        placed = problem
        for axis in axes:
            same = [p for p in problems if p.message == problem.message and p.where.startswith(f"--vary {axis.key}=")]
            if problem in same and len(same) > 1:
                placed = Problem(f"--vary {axis.key}", problem.message)
        out[placed] = None
    return list(out)


# ---- running


def run_candidates(
    candidates: Sequence[Candidate],
    seeds: Sequence[int],
    progress: Callable[[float], None] | None = None,
    done: Callable[[RunResult | TrainingResult, Scenario], None] | None = None,
) -> list[Entry]:
    """Simulate one after another. `done` gets each feasible result before it is dropped.

    Candidates that come to the same scenario are run once. Raises BadInput, with the candidate named.
    """
    entries: list[Entry] = []
    known: dict[str, tuple[Observation | None, tuple[str, ...], tuple[str, ...]]] = {}
    total = len(candidates) * len(seeds)
    for i, candidate in enumerate(candidates):
        runs: list[Observation] = []
        reasons: tuple[str, ...] = ()
        warnings: dict[str, None] = {}
        for j, seed in enumerate(seeds):
            scenario = candidate.scenario if j == 0 else candidate.seeded(seed)
            if scenario.hash not in known:
                before = (i * len(seeds) + j) / total
                result = _simulate(scenario, candidate, _part(progress, before, 1 / total))
                known[scenario.hash] = (observe(result) if result.feasible else None, result.reasons, result.warnings)
                if result.feasible and done is not None:
                    done(result, scenario)
            seen, reasons, notes = known[scenario.hash]
            warnings |= dict.fromkeys(notes)
            if seen is None:
                runs = []
                break
            runs.append(seen)
        facts: dict[str, Any] = {
            "file": str(candidate.file),
            "varied": dict(candidate.varied),
            "name": candidate.scenario.name,
            "scenario_hash": candidate.scenario.hash,
            "profile": candidate.scenario.cluster.profile.name,
        }
        entries.append(Entry(candidate.label, tuple(runs), reasons, tuple(warnings), facts))
    return entries


def _simulate(
    scenario: Scenario, candidate: Candidate, progress: Callable[[float], None] | None
) -> RunResult | TrainingResult:
    try:
        return simulate(scenario, progress=progress)
    except BadInput as error:
        named = ", ".join([str(candidate.file), *(f"{key}={value}" for key, value in candidate.varied.items())])
        problems = [Problem(f"{named}: {p.where}" if p.where else named, p.message) for p in error.problems]
        raise BadInput(problems) from None


def _part(progress: Callable[[float], None] | None, before: float, share: float) -> Callable[[float], None] | None:
    return None if progress is None else lambda done: progress(before + share * done)
