"""Policies are found by their file name, checked as a YAML value and turned into an instance.

`kind: eplb` under `policies.placement` is `moesim/placement/eplb.py`, whose `class Policy(Spec)` has the
YAML parameters as fields. A kind is taken from the list of names that exist and never becomes a path, so no
YAML file can import anything. Policies from outside come by the entry-point group `moesim.policies` (entry
named `family.kind`) or from a module given on the command line with `POLICIES = {"family.kind": Policy}`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from moesim.errors import BadInput, Problem
from moesim.spec import Spec

__all__ = [
    "FAMILIES",
    "FOLDERS",
    "Where",
    "branches",
    "did_you_mean",
    "load_plugin",
    "load_policy",
    "policy_class",
    "policy_kinds",
    "spec_problems",
    "step_into",
]

FOLDERS = {
    "routing": "routing",
    "placement": "placement",
    "dispatch": "dispatch",
    "offload": "offload",
    "eviction": "offload/eviction",
    "prefetch": "offload/prefetch",
    "precision": "offload/precision",
    "rebatching": "offload/rebatching",
    "rerouting": "offload/rerouting",
    "batching": "batching",
    "balancing": "balancing",
}
"""Policy family -> the folder of moesim/ that holds its files."""
FAMILIES = tuple(FOLDERS)
ENTRY_POINT_GROUP = "moesim.policies"

Loc = tuple[str | int, ...]
Where = str | Callable[[Loc], str]
"""A place as text, or a function from a path inside the value (`("num_redundant_experts",)`) to its place."""

_KIND_FILE = re.compile(r"[a-z][a-z0-9_]*")
_KIND_NAME = re.compile(r"[a-z][a-z0-9_\-]*")
_POLICY_CLASS = re.compile(rb"^class Policy\b", re.MULTILINE)
_WRONG_KEY = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
# What code we did not write may raise when it is imported. KeyboardInterrupt and MemoryError go through.
_IMPORT_ERRORS = (
    ImportError, SyntaxError, ArithmeticError, LookupError, AttributeError, NameError,
    OSError, RuntimeError, TypeError, ValueError, AssertionError,
)  # fmt: skip

_plugins: dict[str, type[Spec]] = {}


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """` Did you mean 'x'? Known: ...` for an unknown `name`; the guess is left out where nothing is near."""
    near = [k for k in known if len(str(name)) > 2 and str(name) in k]
    near = near or difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"{guess} Known: {', '.join(known)}." if known else f"{guess} None is allowed here."


# ---- finding policies


@functools.cache
def _built_in(family: str) -> tuple[str, ...]:
    """Names of the files in the family's folder that define a class Policy."""
    files = (Path(__file__).parent / FOLDERS[family]).glob("*.py")
    kinds = (f.stem for f in files if _KIND_FILE.fullmatch(f.stem) and _POLICY_CLASS.search(f.read_bytes()) is not None)
    return tuple(sorted(kinds))


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """Installed packages' entry points by `family.kind`; the first in sorted order has a name given twice."""
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value)):
        found.setdefault(entry.name, entry)
    return found


def policy_kinds(family: str) -> list[str]:
    """Every kind of `family` that can be named: our files, entry points, loaded plugins; sorted."""
    outside = [n.partition(".") for n in (*_entry_points(), *_plugins)]
    return sorted({*_built_in(_family(family)), *(kind for fam, _, kind in outside if fam == family and kind)})


def _family(family: str) -> str:
    if family not in FAMILIES:
        raise BadInput(f"unknown policy family {family!r}.{did_you_mean(family, FAMILIES)}")
    return family


def policy_class(family: str, kind: str) -> type[Spec]:
    """The class behind `kind`, imported now. Raises BadInput for an unknown kind or a broken plugin."""
    name = f"{_family(family)}.{kind}"
    if kind in _built_in(family):
        return _checked(getattr(importlib.import_module(_module(family, kind)), "Policy", None), name, "moesim")
    if name in _plugins:
        return _plugins[name]
    entry = _entry_points().get(name)
    if entry is None:
        raise BadInput(f"unknown {family} policy {kind!r}.{did_you_mean(kind, policy_kinds(family))}")
    try:
        loaded = entry.load()
    except _IMPORT_ERRORS as error:
        raise BadInput(
            f"the policy {name} of the installed package {_dist_name(entry)} cannot be imported"
            f" ({type(error).__name__}: {error}). Repair or uninstall that package."
        ) from error
    return _checked(loaded, name, _dist_name(entry))


def _module(family: str, kind: str) -> str:
    return f"moesim.{FOLDERS[family].replace('/', '.')}.{kind}"


def _dist_name(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _checked(cls: object, name: str, origin: str) -> type[Spec]:
    if not (isinstance(cls, type) and issubclass(cls, Spec)):
        raise BadInput(f"a policy is a class derived from moesim.spec.Spec, but {name} of {origin} is {cls!r}")
    return cls


def load_plugin(module_name: str) -> list[str]:
    """Import `module_name` (from the command line, never from a file) and register its `POLICIES`.

    Returns the names registered, sorted. Raises BadInput when the module cannot be imported, has no
    `POLICIES: dict["family.kind", class]`, or takes a name that exists already. Loading it twice is harmless.
    """
    try:
        module = importlib.import_module(module_name)
    except _IMPORT_ERRORS as error:
        raise BadInput(
            f"the plugin {module_name!r} cannot be imported ({type(error).__name__}: {error})."
            " Give the name of a module on PYTHONPATH, such as my_policies or package.module."
        ) from error
    policies = getattr(module, "POLICIES", None)
    if not isinstance(policies, Mapping) or not policies:
        raise BadInput(f'the plugin {module_name!r} needs POLICIES = {{"family.kind": Policy, ...}}, has {policies!r}')
    checked = {
        _outside_name(name, cls, module_name): _checked(cls, name, module_name) for name, cls in policies.items()
    }
    _plugins.update(checked)
    return sorted(checked)


def _outside_name(name: object, cls: object, module_name: str) -> str:
    """`name` if it is a free `family.kind`."""
    family, _, kind = str(name).partition(".")
    if not isinstance(name, str) or family not in FAMILIES or not _KIND_NAME.fullmatch(kind):
        raise BadInput(
            f"the plugin {module_name!r} names a policy {name!r}; a name is family.kind, kind of"
            f" lower-case letters, digits, - and _, family one of {', '.join(FAMILIES)}"
        )
    if kind in _built_in(family) or _plugins.get(name, cls) is not cls:
        raise BadInput(f"the plugin {module_name!r} takes the name {name}, which exists already. Choose another kind.")
    return name


# ---- building policies


def load_policy(family: str, value: Any, where: Where = "") -> Any:
    """The policy instance that `value` (a kind, or a mapping with `kind` and parameters) describes.

    Raises BadInput with every problem found: unknown kind or parameter (nearest name given), values that the
    policy's fields refuse.
    """
    _family(family)
    if isinstance(value, Spec):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        raise BadInput(
            Problem(
                _place(where, ()),
                f"a {family} policy is a name or a mapping with `kind`, got {_short(value)}",
            )
        )
    if "kind" not in value:
        kinds = ", ".join(policy_kinds(family))
        raise BadInput(Problem(_place(where, ()), f"a {family} policy needs `kind`: one of {kinds}"))
    kind = value["kind"]
    at = _place(where, ("kind",))
    if not isinstance(kind, str) or kind not in policy_kinds(family):
        message = f"unknown {family} policy {_short(kind)}.{did_you_mean(kind, policy_kinds(family))}"
        raise BadInput(Problem(at, message))
    try:
        cls = policy_class(family, kind)
    except BadInput as error:
        raise BadInput([Problem(at, p.message) for p in error.problems]) from error
    parameters = {k: v for k, v in value.items() if k != "kind"}
    try:
        return cls.model_validate(parameters)
    except ValidationError as error:
        raise BadInput(spec_problems(error, where, cls)) from None


# ---- errors of specs, in words


def _place(where: Where, loc: Loc) -> str:
    return where if isinstance(where, str) else where(loc)


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def spec_problems(
    error: ValidationError, where: Where = "", model: type[BaseModel] | None = None, prefix: Loc = ()
) -> list[Problem]:
    """Each error of a pydantic ValidationError as a Problem that a user can act on.

    `where` gives the place (text, or a function from the path to `file:line:col`), `model` the class that was
    validated (then unknown keys get the nearest known one, and union tags stay out of the paths), `prefix`
    the path of the value within the file, put before each path.
    """
    problems: dict[tuple[str, str], Problem] = {}
    for item in error.errors(include_url=False):
        path, parents = _resolve(item["loc"], model, item["type"] in _WRONG_KEY)
        loc = prefix + path
        problem = Problem(_place(where, loc), f"{_dotted(loc)}{_words(dict(item), path, parents)}")
        problems.setdefault((problem.where, problem.message), problem)
    return list(problems.values())


def _dotted(loc: Loc) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    return f"{text}: " if text else ""


def _words(item: dict[str, Any], path: Loc, parents: list[type[BaseModel]]) -> str:
    kind, given = item["type"], item.get("input")
    if kind in _WRONG_KEY:
        known = sorted({name for parent in parents for name in _fields(parent)})
        return f"unknown key {path[-1] if path else given!r}." + (did_you_mean(path[-1], known) if parents else "")
    if kind == "missing":
        return "is required and not given"
    if kind in ("model_type", "dict_type"):
        return f"should be a mapping of keys, got {_short(given)}"
    if kind in ("tuple_type", "list_type"):
        return f"should be a list, got {_short(given)}"
    if kind in ("value_error", "assertion_error", "requests"):  # "requests": moesim.workload.generators.located
        return str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = str(item["msg"]).removeprefix("Input ")
    if kind in ("literal_error", "enum") and isinstance(given, str):
        allowed = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
        near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
        message += f", got {_short(given)}" + (f". Did you mean {near[0]!r}?" if near else "")
    elif kind != "json_invalid":
        message += f", got {_short(given)}"
    return message


def _fields(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _resolve(loc: Loc, model: type[BaseModel] | None, wrong_key: bool) -> tuple[Loc, list[type[BaseModel]]]:
    """The part of a pydantic `loc` that a user wrote (no union tags), and the specs its last key stands in.

    `wrong_key`: the last part is a key that no spec has; any other part without a type behind it is a tag.
    """
    if model is None:
        return loc, []
    path: list[str | int] = []
    current: list[Any] = [model]
    parents: list[type[BaseModel]] = []
    for i, part in enumerate(loc):
        specs = [t for t in current if isinstance(t, type) and issubclass(t, BaseModel)]
        inside = [a for t in current for a in step_into(t, part)]
        if inside or (wrong_key and i == len(loc) - 1):
            path.append(part)
            parents, current = specs, inside
        else:
            current = [t for t in specs if t.__name__ == part] or current
    return tuple(path), parents


def step_into(annotation: Any, part: str | int) -> list[Any]:
    """Types behind key or index `part` of a value of type `annotation`; [] where there is no such key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if part in (name, field.alias):
                return branches(field.annotation)
        return []
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, tuple, set, frozenset) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return [b for a in arguments if a is not Ellipsis for b in branches(a)] if isinstance(part, int) else []
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
        return branches(arguments[1])
    return []


def branches(annotation: Any) -> list[Any]:
    """The alternatives of a union, without Annotated."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return branches(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [b for a in typing.get_args(annotation) for b in branches(a)]
    if origin is Literal:
        return [str]
    return [annotation]
