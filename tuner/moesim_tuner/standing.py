"""Where a scenario stands in a space: which of a parameter's values it has, whether written or left to a default.

Values are compared as loading reads them: `12 GiB` is 12, a policy by its kind is the mapping with that kind, and what
is not written is what it is by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from moesim.scenario.fields import normal_value
from moesim.tune_values import Scalar, identity
from moesim_tuner.parameter import Parameter

__all__ = ["value_at", "written_at"]


def written_at(path: str, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """What stands at `path`: as written (`raw`), else by default; None where nothing does."""
    found = _at(_long(raw), path)
    return _at(defaults, path) if found is None else found


def value_at(
    p: Parameter, raw: Mapping[str, Any], defaults: Mapping[str, Any], others: Iterable[str] = ()
) -> tuple[Scalar] | None:
    """The value of `p` (in a tuple of one) that sets every field as it stands; None where there is none. others: fields
    that other parameters set; what they set inside a mapping is no part of the comparison."""
    if p.values is None:
        found = normal_value(p.name, written_at(p.name, raw, defaults))
        if isinstance(found, int | float) and not isinstance(found, bool) and found in p:
            return (p.own(found),)
        return None
    others = list(others)
    for value in p.values:
        fields = p.fields(value).items()
        if all(_stands(path, wanted, raw, defaults, others) for path, wanted in fields):
            return (value,)
    return None


def _stands(path: str, wanted: Any, raw: Mapping[str, Any], defaults: Mapping[str, Any], others: list[str]) -> bool:
    given = _at(_long(raw), path)
    if wanted is None:
        return given is None and (path.startswith("policies.") or _at(defaults, path) is None)
    here = given if given is not None else _at(defaults, path)
    if here is None:
        return False
    inside = [name[len(path) + 1 :] for name in others if name.startswith(f"{path}.")]
    return _same(_without(normal_value(path, here), inside), _without(normal_value(path, wanted), inside))


def _long(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`model: x` as {name: x}, policies by name as {kind: name}."""
    model, policies = raw.get("model"), raw.get("policies")
    out = dict(raw)
    if isinstance(model, str):
        out["model"] = {"name": model}
    if isinstance(policies, Mapping):
        out["policies"] = {k: {"kind": v} if isinstance(v, str) else v for k, v in policies.items()}
    return out


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        elif isinstance(tree, list | tuple) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return None
    return tree


def _without(value: Any, inside: Iterable[str]) -> Any:
    for path in inside:
        first, _, rest = path.partition(".")
        if isinstance(value, Mapping) and first in value:
            value = {k: v for k, v in value.items() if k != first or rest}
            if rest:
                value[first] = _without(value[first], [rest])
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)  # 250 us is 249.99999999999997
    if isinstance(a, str | int | float | bool) and isinstance(b, str | int | float | bool):
        return identity(a) == identity(b)
    return a is None and b is None
