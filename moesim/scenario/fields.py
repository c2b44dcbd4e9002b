"""Fields of a scenario by their dotted path: is there one, and what may never stand there.

A path is that of `--set`: `engine.max_num_seqs`, `policies.placement.num_redundant_experts`, items of lists by number.
A value is judged alone, by its field's own rules: what is wrong only beside another field is not wrong here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from moesim.errors import BadInput
from moesim.policy import branches, load_policy, policy_class, policy_kinds, spec_problems, step_into
from moesim.scenario.files import find_named, shown
from moesim.scenario.presets import presets
from moesim.scenario.source import rebase
from moesim.scenario.spec import NOT_YET, PoliciesSpec, ScenarioSpec
from moesim.spec import Spec
from moesim.tune_values import nearest_name

__all__ = ["FAMILY_KEYS", "field_problem", "normal_value", "value_problems"]

FAMILY_KEYS = {
    "routing": "routing",
    "placement": "placement",
    "dispatch": "dispatch",
    "offload": "offload",
    "eviction": "eviction",
    "prefetch": "prefetch",
    "precision": "precision",
    "rebatching": "rebatching",
    "rerouting": "rerouting",
    "batching": "batching",
    "balancing": "balancer",
}
"""Policy family -> its key under `policies`."""

_NAMED = {
    "model": ("workloads/models", "model"),
    "model.name": ("workloads/models", "model"),
    "cluster.device": ("hw_profiles", "device profile"),
    "tiers.cpu.profile": ("hw_profiles", "device profile"),
}
"""Fields that name a file: where it is looked for, what it is."""
_PATHS = ("requests.path", "routing.path", "placement_from.routing.path")

Kinds = Mapping[str, Iterable[str]]
"""Key under `policies` -> the kinds that may stand there."""


def field_problem(path: str, kinds: Kinds) -> str | None:
    """Why `path` is no field of a scenario, with the nearest that is; None where it is one."""
    parts = path.split(".")
    if not all(part and part == part.strip() for part in parts):
        return f"{path!r} is no path of a field; one is written like parallel.ep"
    current: list[Any] = [ScenarioSpec]
    for i, part in enumerate(parts):
        if part in NOT_YET and parts[:i] in ([], ["parallel"], ["engine"]) and not _inside(current, part):
            return f"{NOT_YET[part]} is not simulated yet"
        if i >= 2 and parts[0] == "policies":
            return _policy_problem(path, parts[1], parts[2:], kinds)
        inside = _inside(current, part)
        if not inside:
            return _nothing_there(path, parts, i, current)
        current = inside
    return None


def value_problems(path: str, value: Any, base: Path, kinds: Kinds, below: Iterable[str] = ()) -> list[str]:
    """Why `value` can never stand at `path`, whatever stands elsewhere: its type or range, an unknown policy or
    parameter of one, a file that is not there. below: fields inside it that something else sets, and that `value` may
    leave out. [] where `path` is no field."""
    if field_problem(path, kinds) is not None:
        return []
    parts = path.split(".")
    if parts[0] == "policies" and len(parts) == 2:
        return _wrong_policy(parts[1], value, {name[len(path) + 1 :].split(".")[0] for name in below})
    if parts[0] == "policies" and len(parts) > 2:
        return _wrong_parameter(parts[1], parts[2:], value, kinds)
    current: list[Any] = [ScenarioSpec]
    for part in parts[:-1]:
        current = _inside(current, part)
    wrong = _wrong_value(current, parts[-1], value)
    return wrong or _no_file(path, value, base)


def normal_value(path: str, value: Any) -> Any:
    """`value` as loading reads it at `path`, as JSON has it: units converted, defaults of a policy filled in. What
    cannot be read is returned as it is."""
    parts = path.split(".")
    try:
        if parts[0] == "policies" and len(parts) == 2:
            long = {"kind": value} if isinstance(value, str) else value
            return {"kind": long["kind"], **load_policy(_family(parts[1]), long).model_dump(mode="json")}
        if parts[0] == "policies":
            return value
        current: list[Any] = [ScenarioSpec]
        for part in parts[:-1]:
            current = _inside(current, part)
        for spec in _specs(current):
            if parts[-1] in spec.model_fields:
                read = _alone(spec, parts[-1]).model_validate({parts[-1]: value})
                return read.model_dump(mode="json")[parts[-1]]
    except (BadInput, ValidationError, KeyError, TypeError, StopIteration):
        pass
    return value


def _inside(current: Iterable[Any], part: str) -> list[Any]:
    key: str | int = int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else part
    return [b for t in current for b in step_into(t, key)]


def _specs(current: Iterable[Any]) -> list[type[BaseModel]]:
    return [t for t in current if isinstance(t, type) and issubclass(t, BaseModel)]


def _nothing_there(path: str, parts: list[str], at: int, current: list[Any]) -> str:
    above = ".".join(parts[:at])
    known = sorted({info.alias or name for spec in _specs(current) for name, info in spec.model_fields.items()})
    if not known:
        lists = any(step_into(t, 0) for t in current)
        return f"{above} is a list; name an item by its number" if lists else f"{above} holds a value and has no keys"
    near = nearest_name(parts[at], known)
    guesses = [".".join([*parts[:at], near, *parts[at + 1 :]])] if near else []
    guesses += [p for p in _all_paths() if p.split(".")[-1] == parts[-1] and p != path]
    hint = f" Did you mean {guesses[0]}?" if guesses else ""
    listed = f"{above} has {', '.join(known)}" if above else f"A scenario has {', '.join(known)}"
    return f"a scenario has no field {path}.{hint} {listed}."


@functools.cache
def _all_paths() -> tuple[str, ...]:
    """Every field of a scenario but for policies' parameters, those nearest the top first."""

    def under(spec: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, info in spec.model_fields.items():
            here = (*prefix, name)
            if here[0] == "tune":
                continue
            yield here
            if len(here) < 5:
                for inner in _specs(branches(info.annotation)):
                    yield from under(inner, here)

    return tuple(".".join(p) for p in sorted(set(under(ScenarioSpec, ())), key=lambda p: (len(p), p)))


# ---- values


@functools.cache
def _alone(spec: type[BaseModel], key: str) -> type[Spec]:
    """A spec of that one field."""
    info = copy.copy(spec.model_fields[key])
    made: Any = create_model(f"{spec.__name__}.{key}", __base__=Spec, **{key: (info.annotation, info)})  # type: ignore[call-overload]
    return made  # type: ignore[no-any-return]


def _wrong_value(current: list[Any], key: str, value: Any) -> list[str]:
    """What every type that the field may have says against `value`."""
    told: list[list[str]] = []
    for spec in _specs(current):
        name = next((n for n, info in spec.model_fields.items() if key in (n, info.alias)), None)
        if name is None:
            continue
        try:
            _alone(spec, name).model_validate({key: value})
        except ValidationError as error:
            told.append([p.message for p in spec_problems(error, "", _alone(spec, name))])
        else:
            return []
    return told[0] if told else []


def _no_file(path: str, value: Any, base: Path) -> list[str]:
    if not isinstance(value, str):
        if path == "model" and isinstance(value, dict) and isinstance(value.get("name"), str):
            return _no_file("model.name", value["name"], base)
        return []
    if path in _NAMED:
        folder, what = _NAMED[path]
        try:
            find_named(rebase(value, base) if "/" in value else value, folder, base, "", what)
        except BadInput as error:
            return [p.message for p in error.problems]
    if path in _PATHS:
        try:
            found = base / rebase(value, base)
            if not found.exists():
                return [f"no such file: {shown(found)}"]
        except (OSError, ValueError) as error:
            return [f"cannot be read: {getattr(error, 'strerror', None) or error}"]
    return []


# ---- policies


def _family(key: str) -> str:
    return next(family for family, name in FAMILY_KEYS.items() if name == key)


def _classes(key: str, kinds: Iterable[str]) -> list[type[Spec]]:
    """The classes of those kinds that there are."""
    family = _family(key)
    known = policy_kinds(family)
    rows = presets() if family == "routing" else {}
    names = [kind if kind in known or kind not in rows else rows[kind].kind for kind in kinds]
    return [policy_class(family, name) for name in dict.fromkeys(names) if name in known]


def _policy_problem(path: str, key: str, rest: list[str], kinds: Kinds) -> str | None:
    """Why `path` is no parameter of any policy that may stand there."""
    if key not in PoliciesSpec.model_fields:
        return _nothing_there(f"policies.{key}", ["policies", key], 1, [PoliciesSpec])
    if rest == ["kind"]:
        return None
    here = [kind for kind in kinds.get(key, ()) if _classes(key, [kind])]
    classes: list[Any] = list(_classes(key, here))
    current = classes
    for part in rest:
        current = _inside(current, part)
    if current or not classes:
        return None
    known = sorted({info.alias or name for cls in classes for name, info in cls.model_fields.items()})
    others = [k for k in policy_kinds(_family(key)) if k not in here and _inside(_classes(key, [k]), rest[0])]
    near = nearest_name(rest[0], known)
    hint = f" Did you mean policies.{key}.{near}?" if near else ""
    if not hint and others:
        hint = f" It is one of {', '.join(others)}: make policies.{key} that, or a choice of it."
    has = f"with {', '.join(known)}" if known else "without parameters"
    return f"policies.{key} is {' or '.join(here)}, {has}, and has no {'.'.join(rest)}.{hint}"


def _wrong_policy(key: str, value: Any, below: set[str]) -> list[str]:
    family = _family(key)
    if value is None:
        return []
    kind = value.get("kind") if isinstance(value, dict) else value
    if family == "routing" and isinstance(kind, str) and kind not in policy_kinds(family) and kind in presets():
        row = presets()[kind]
        own = {k: v for k, v in value.items() if k != "kind"} if isinstance(value, dict) else {}
        value = {"kind": row.kind, **row.parameters, **own}
    elif family == "routing" and isinstance(kind, str) and kind not in policy_kinds(family):
        near = nearest_name(kind, [*policy_kinds(family), *presets()])
        return [f"unknown router {kind!r}." + (f" Did you mean {near!r}?" if near else "")]
    try:
        load_policy(family, value, lambda loc: ".".join(map(str, loc)))
    except BadInput as error:
        return [
            p.message
            for p in error.problems
            if not (p.message.endswith("is required and not given") and p.where.split(".")[0] in below)
        ]
    return []


def _wrong_parameter(key: str, rest: list[str], value: Any, kinds: Kinds) -> list[str]:
    if rest == ["kind"]:
        return _wrong_policy(key, value, set()) if isinstance(value, str) else [f"a kind is a name, got {value!r}"]
    current: list[Any] = list(_classes(key, kinds.get(key, ())))
    for part in rest[:-1]:
        current = _inside(current, part)
    return _wrong_value(current, rest[-1], value)
