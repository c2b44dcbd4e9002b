"""Which study is which: what of a definition (as JSON, `Definition.to_json`) decides the trials, and what may change
while a study goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["FORMAT", "check", "differences", "exported", "identity", "ordered"]

FORMAT = 1
"""of journals, and of what the tables hold"""

_KEYS = {
    "text": str, "name": str, "base": str, "overrides": list, "fields": list, "plugins": list, "spec": dict,
    "rungs": list, "sampler": str,
}  # fmt: skip
_FREE_KEYS = ("base",)
_FREE_SPEC_KEYS = ("trials", "timeout_s", "judge")
"""A study that goes on may be told other ones of these: they change no trial that there is."""


def ordered(value: Any) -> str:
    """JSON that keeps the order of keys: that of parameters and choices decides what is proposed."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def check(found: Any) -> dict[str, Any]:
    """`found` where it can be a definition. Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError("a definition is an object")
    for key, kind in _KEYS.items():
        if not isinstance(found.get(key), kind):
            raise ValueError(f"a definition needs {key!r}, a {kind.__name__}")
    spec = found["spec"]
    if not isinstance(spec.get("trials"), int) or not isinstance(spec.get("objectives"), list):
        raise ValueError("a definition's spec needs trials and objectives")
    return found


def exported(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A definition without what differs between machines."""
    return {key: value for key, value in definition.items() if key != "base"}


def _fixed(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The hash of the scenario stands for its text and overrides, which also hold comments and the `tune` block."""
    free = (*_FREE_KEYS, "text", "overrides") if definition.get("scenario_hash") else _FREE_KEYS
    out = {key: definition[key] for key in sorted(definition) if key not in free}
    out["spec"] = {key: definition["spec"][key] for key in sorted(definition["spec"]) if key not in _FREE_SPEC_KEYS}
    return out


def identity(definition: Mapping[str, Any]) -> str:
    """Hash of all that decides which trials a study has and what they come to, but not how many there are."""
    return hashlib.blake2b(ordered(_fixed(definition)).encode(), digest_size=16).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the parts that make two studies of two definitions; of the `tune` block, which keys."""
    a, b = _fixed(one), _fixed(other)
    spec_a, spec_b = a.pop("spec"), b.pop("spec")

    def unlike(x: Mapping[str, Any], y: Mapping[str, Any]) -> list[str]:
        return [key for key in sorted(x.keys() | y.keys()) if ordered(x.get(key)) != ordered(y.get(key))]

    return unlike(a, b) + [f"tune.{key}" for key in unlike(spec_a, spec_b)]
