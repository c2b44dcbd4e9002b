"""What a `tune` block asks of the scenario it stands in: fields that are there, values that can be, conditions that can
hold, starts inside the space. Each message: the rule, the facts, the mend."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moesim.errors import Problem
from moesim.scenario.fields import FAMILY_KEYS, field_problem, value_problems
from moesim.scenario.source import Source
from moesim.scenario.spec import ONLY_SERVING, SERVING_POLICIES, PoliciesSpec
from moesim.scenario.yamlio import YamlPath
from moesim.tune_spec import ParameterSpec, TuneSpec
from moesim.tune_values import Scalar, identity, label, nearest_name, shown

__all__ = ["tune_checks"]

_REFUSED = {
    "tune": "the search does not change itself",
    "seed": "every candidate is run with the same seeds, so that luck cannot win; remove it",
    "name": "a name changes nothing that can be searched; remove it",
    "mode": "serving and training have no figure in common; write two scenarios",
}
"""Top-level fields that a search may not set -> why."""

_Names = Mapping[str, frozenset[tuple[bool, Scalar]]]
"""Parameter -> the values of it, by identity, beside which something holds."""


def tune_checks(source: Source, spec: TuneSpec | None, base: Path, training: bool) -> list[Problem]:
    """Every problem of `tune:` with its place. spec: None where the block could not be read as a whole; then what can
    be read of it is checked."""
    unread: set[str] = set()
    if spec is None:
        spec, unread = _readable(source.data.get("tune"))
    if spec is None:
        return []
    check = _Check(source, spec, base, training, unread)
    return [
        *check.parameters(), *check.conditions(), *check.twice(), *check.settings(), *check.starts(),
        *check.objectives(),
    ]  # fmt: skip


def _readable(written: Any) -> tuple[TuneSpec | None, set[str]]:
    """The parameters and settings of a block that can be read by themselves, and the names of the others."""
    if not isinstance(written, Mapping) or not isinstance(written.get("space"), Mapping):
        return None, set()
    parts: dict[str, Any] = {"space": {}, "objectives": ["none"]}
    for name, value in written["space"].items():
        with contextlib.suppress(ValidationError):
            parts["space"][name] = ParameterSpec.model_validate(value)
    for key in ("rungs", "judge", "start", "objectives"):
        with contextlib.suppress(ValidationError, KeyError):
            TuneSpec.model_validate({"space": {"a": {"choices": [1]}}, "objectives": ["a"], key: written[key]})
            parts[key] = written[key]
    try:
        return TuneSpec.model_validate(parts), set(written["space"]) - set(parts["space"])
    except ValidationError:
        return None, set()


class _Check:
    """One look at a block. unread: names of parameters that are wrong by themselves, so nothing is said of them."""

    def __init__(
        self, source: Source, spec: TuneSpec, base: Path, training: bool, unread: Collection[str] = ()
    ) -> None:
        self.source, self.spec, self.base, self.training, self.unread = source, spec, base, training, unread
        self.kinds = _kinds(source, self._set())
        self.paths = {path for path, _, _ in self._set()}
        self.needed: dict[str, _Names] = {}

    def problem(self, loc: YamlPath, message: str, key: bool = False) -> Problem:
        path: YamlPath = ("tune", *loc)
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        return Problem(self.source.where(path, key=key), f"{dotted}: {message}")

    def _set(self) -> Iterator[tuple[str, Any, YamlPath]]:
        """Every field that the search sets, a value that it may get, and where that stands."""
        for name, p in self.spec.space.items():
            here: YamlPath = ("space", name)
            if isinstance(p.choices, dict):
                for each, fields in p.choices.items():
                    yield from ((path, value, (*here, "choices", each, path)) for path, value in fields.items())
            elif p.choices is not None:
                yield from ((name, value, (*here, "choices", i)) for i, value in enumerate(p.choices))
            else:
                kind = "range" if p.range is not None else "log_range"
                ends = p.bounds if p.values is None or not p.values else (p.bounds[0], p.values[-1])
                yield from ((name, value, (*here, kind, i)) for i, value in enumerate(ends))
        yield from self._settings()

    def _settings(self) -> Iterator[tuple[str, Any, YamlPath]]:
        for i, rung in enumerate(self.spec.rungs or ()):
            yield from ((path, value, ("rungs", i, "set", path)) for path, value in rung.set.items())
        yield from ((path, value, ("judge", "set", path)) for path, value in self.spec.judge.set.items())

    def parameters(self) -> list[Problem]:
        """Fields that are not there or not for a search; values that can never stand in them."""
        out: dict[Problem, None] = {}
        for path, value, loc in self._set():
            at = loc if loc[-1] == path else ("space", path)
            why = self._no_field(path)
            if why is not None:
                out[self.problem(at, why, key=True)] = None
                continue
            below = [p for p in self.paths if p.startswith(f"{path}.")]
            for message in value_problems(path, value, self.base, self.kinds, below):
                text = message.removeprefix(f"{path.rsplit('.', 1)[-1]}: ")
                out[self.problem(loc, text if loc[-1] == path else f"{shown(value)} cannot be: {text}")] = None
        return list(out)

    def _no_field(self, path: str) -> str | None:
        top = path.split(".")
        if top[0] in _REFUSED:
            return f"a search cannot set {path}: {_REFUSED[top[0]]}"
        if self.training and top[0] in ONLY_SERVING:
            return f"mode training has no {top[0]}: {ONLY_SERVING[top[0]]}"
        if self.training and top[0] == "policies" and len(top) > 1 and top[1] in SERVING_POLICIES:
            return f"training has nothing that policies.{top[1]} decides"
        if not self.training and top[0] == "training":
            return "training is read in mode training only"
        return field_problem(path, self.kinds)

    # ---- conditions

    def conditions(self) -> list[Problem]:
        """A `when` of no parameter, of no value, of itself, or of what cannot be together."""
        space = self.spec.space
        out = []
        for name, p in space.items():
            for other, wanted in (p.when or {}).items():
                out += self._condition(("space", name, "when", other), name, other, wanted)
        for name in space:
            round_ = [] if name in (space[name].when or {}) else _cycle(name, space)
            if round_ and round_[0] == min(round_[:-1], key=list(space).index):
                told = f"depends on itself ({' -> '.join(round_)}); remove one of these conditions"
                out.append(self.problem(("space", name, "when"), told, key=True))
        if out:
            return out
        for name in space:
            never = [other for other, values in self._needs(name).items() if not values]
            if never:
                told = f"can never hold: it and what it depends on need different values of {never[0]}"
                out.append(self.problem(("space", name, "when"), told, key=True))
        return out

    def _condition(self, loc: YamlPath, name: str, other: str, wanted: Any) -> list[Problem]:
        space = self.spec.space
        if other in self.unread:
            return []
        if other == name:
            return [self.problem(loc, "a parameter cannot depend on itself; remove it", key=True)]
        if other not in space:
            return [self.problem(loc, f"{other} is no parameter of the space.{_near(other, space)}", key=True)]
        values = space[other].values
        if values is None:
            told = f"{other} is continuous, and a condition names values; give it a step or choices"
            return [self.problem(loc, told, key=True)]
        out = [] if wanted != [] else [self.problem(loc, "names no value; give one, or a list of them")]
        for i, one in enumerate(wanted if isinstance(wanted, list) else [wanted]):
            if not space[other].matching(one):
                told = f"{shown(one)} is no value of {other}.{_near(label(one), values)}"
                out.append(self.problem((*loc, i) if isinstance(wanted, list) else loc, told))
        return out

    def _needs(self, name: str, value: Scalar | None = None, fixed: bool = False) -> _Names:
        """The values of other parameters beside which a parameter means something (and has `value`)."""
        if name not in self.spec.space:  # it could not be read
            return {}
        if not fixed and name in self.needed:
            return self.needed[name]
        out: dict[str, frozenset[tuple[bool, Scalar]]] = {}
        parts: list[_Names] = []
        for other, wanted in (self.spec.space[name].when or {}).items():
            if other in self.spec.space:
                parts.append({other: frozenset(map(identity, self.spec.space[other].matching(wanted)))})
                parts.append(self._needs(other))
        if fixed:
            parts.append({name: frozenset([identity(value)])})
        for part in parts:
            for other, values in part.items():
                out[other] = out[other] & values if other in out else values
        if not fixed:
            self.needed[name] = out
        return out

    def twice(self) -> list[Problem]:
        """One field set by two parameters at once."""
        if self.conditions():
            return []
        first: dict[str, list[tuple[str, _Names]]] = {}
        out: dict[Problem, None] = {}
        for name, p in self.spec.space.items():
            for field, needs, loc in self._leaves(name, p):
                for other, beside in first.get(field, ()):
                    if other != name and not any(not needs[k] & beside[k] for k in needs if k in beside):
                        told = f"{field} is set by {other}, too; leave it to one of them, or part them by `when`"
                        out[self.problem(loc, told, key=True)] = None
                first.setdefault(field, []).append((name, needs))
        return list(out)

    def _leaves(self, name: str, p: ParameterSpec) -> Iterator[tuple[str, _Names, YamlPath]]:
        """The fields that a parameter sets to its innermost key, and beside which values."""
        here: YamlPath = ("space", name)
        if isinstance(p.choices, dict):
            for each, fields in p.choices.items():
                for path, value in fields.items():
                    for leaf in _leaves(path, value):
                        yield leaf, self._needs(name, each, True), (*here, "choices", each, path)
        elif p.choices is not None:
            for value in p.choices:
                for leaf in _leaves(name, value):
                    yield leaf, self._needs(name, label(value), True), here
        else:
            yield name, self._needs(name), here

    # ---- what is set beside the space

    def settings(self) -> list[Problem]:
        """A rung or the judge that sets what is searched."""
        searched = {leaf for path, value, loc in self._set() if loc[0] == "space" for leaf in _leaves(path, value)}
        return [
            self.problem(loc, f"{path} is searched, so every candidate would be alike here; remove it", key=True)
            for path, value, loc in self._settings()
            if searched & set(_leaves(path, value)) or any(s.startswith(f"{path}.") for s in searched)
        ]

    def starts(self) -> list[Problem]:
        """Settings to start with that are no parameters, no values, or mean nothing beside the others."""
        space = self.spec.space
        out = []
        for i, start in enumerate(self.spec.start):
            if not start:
                out.append(
                    self.problem(("start", i), "sets nothing, and the scenario as written is tried anyway; remove it")
                )
            for name, value in start.items():
                loc: YamlPath = ("start", i, name)
                if name in self.unread:
                    continue
                if name not in space:
                    out.append(self.problem(loc, f"{name} is no parameter of the space.{_near(name, space)}", key=True))
                    continue
                why = _no_value(space[name], value)
                if why:
                    out.append(self.problem(loc, f"{shown(value)} {why}"))
                    continue
                for other, wanted in (space[name].when or {}).items():
                    known = space.get(other)
                    if known is None or other not in start or _no_value(known, start[other]):
                        continue
                    if not set(map(identity, known.matching(wanted))) & set(
                        map(identity, known.matching(start[other]))
                    ):
                        told = f"means nothing where {other} is {shown(start[other])}; remove one of them"
                        out.append(self.problem(loc, told, key=True))
        return out

    def objectives(self) -> list[Problem]:
        """One figure wanted twice."""
        names = self.spec.objectives
        return [
            self.problem(("objectives", i), f"{name} is an objective already; remove one")
            for i, name in enumerate(names)
            if name in names[:i]
        ]


def _no_value(spec: ParameterSpec, value: Any) -> str | None:
    """Why a parameter does not take a value."""
    if spec.values is not None:
        found = spec.matching(value) if not isinstance(value, list) else spec.matching([value])
        if len(found) > 1:
            return f"is any of {', '.join(map(str, found))}; name one"
        return None if found else f"is not in the space.{_near(label(value), spec.values)}"
    low, high = spec.bounds
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"is no number, and the space has {low} to {high}"
    if spec.whole and value != int(value):
        return "is no whole number, and the space has whole ones"
    return None if low <= value <= high else f"is not in the space: {low} to {high}"


def _near(name: Any, known: Iterable[Any]) -> str:
    texts = [str(k) for k in known]
    near = nearest_name(name, texts) if isinstance(name, str) else None
    listed = ", ".join(texts[:20]) + (", ..." if len(texts) > 20 else "")
    return (f" Did you mean {near}?" if near else "") + f" There are: {listed}."


def _leaves(path: str, value: Any) -> Iterator[str]:
    """The innermost fields of a value; of a policy by name its kind."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}", inner)
    elif path.startswith("policies.") and path.count(".") == 1:
        yield f"{path}.kind"
    else:
        yield path


def _cycle(name: str, space: Mapping[str, ParameterSpec]) -> list[str]:
    """The way from a parameter through conditions back to it; [] where there is none."""
    ways: list[list[str]] = [[name]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        for other in space[way[-1]].when or () if way[-1] in space else ():
            if other == name:
                return [*way, name]
            if other not in seen:
                seen.add(other)
                ways.append([*way, other])
    return []


def _kinds(source: Source, settings: Iterable[tuple[str, Any, YamlPath]]) -> dict[str, list[str]]:
    """The kinds that may stand at each key of `policies`: as written, or as the search sets them."""
    written = source.data.get("policies")
    out: dict[str, list[str]] = {}

    def add(key: str, value: Any) -> None:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        if isinstance(kind, str) and kind not in out.setdefault(key, []):
            out[key].append(kind)

    for key in FAMILY_KEYS.values():
        given = written.get(key) if isinstance(written, Mapping) else None
        add(key, given if given is not None else PoliciesSpec.model_fields[key].default)
    for path, value, _ in settings:
        parts: Sequence[str] = path.split(".")
        if parts[0] == "policies" and parts[1:] and parts[1] in out and parts[2:] in ([], ["kind"]):
            add(parts[1], value)
    return out
