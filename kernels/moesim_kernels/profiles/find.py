"""Profiles as the verbs name them, operators with near misses, and text from files made safe for a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from moesim.errors import BadInput, Problem
from moesim.hardware import OPERATORS, DeviceProfile

__all__ = ["clean", "load_named", "operators_of"]


def load_named(name: str) -> DeviceProfile:
    """The profile at a path, or of that name in hw_profiles/. Raises BadInput: no such file, or not a profile."""
    from moesim.scenario.files import find_named
    from moesim.scenario.load import load_profile

    return load_profile(find_named(name, "hw_profiles", Path(), "", "device profile"))


def operators_of(wanted: Iterable[str]) -> tuple[str, ...]:
    """Operators asked for, all of them if none is; in the house's order. Raises BadInput with the nearest name."""
    asked = tuple(wanted)
    for name in asked:
        if name not in OPERATORS:
            near = difflib.get_close_matches(name, OPERATORS, n=1, cutoff=0.5)
            near = near or [op for op in OPERATORS if op.startswith(name) or name in op][:1]
            hint = f"Did you mean {near[0]!r}?" if near else f"Operators: {', '.join(OPERATORS)}"
            raise BadInput(Problem("--operator", f"unknown operator {name[:60]!r}. {hint}"))
    return tuple(op for op in OPERATORS if not asked or op in asked)


def clean(value: object, most: int = 400) -> str:
    """Text of a file on one line, without control characters, at most `most` long."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
