"""Typed look-ups in a `config.json`: one fact under many names, wrong values kept until all are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesim.errors import BadInput, Problem

__all__ = ["Keys"]


class Keys:
    """A config whose values are asked for by fact. Collects problems; `raise_if_wrong` raises them together.

    A name may be dotted (`ffn_config.moe_top_k`). null counts as absent. `used` maps each fact to the key it
    was read from, so that a later disagreement can name that key. `where_of` turns a key into `file:line`.
    """

    def __init__(self, config: dict[str, Any], where_of: Callable[[str], str]) -> None:
        self.config = config
        self.where_of = where_of
        self.used: dict[str, str] = {}
        self.problems: list[Problem] = []

    def wrong(self, key: str, message: str) -> None:
        """Note that `key` cannot be used."""
        self.problems.append(Problem(self.where_of(key), f"{key}: {message}"))

    def raise_if_wrong(self) -> None:
        """Raise BadInput with every problem so far."""
        if self.problems:
            raise BadInput(self.problems)

    def raw(self, name: str) -> Any:
        """The value of a (dotted) name, None where it or a level above is absent."""
        value: Any = self.config
        for step in name.split("."):
            if not isinstance(value, dict):
                return None
            value = value.get(step)
        return value

    def find(self, names: tuple[str, ...], fact: str = "") -> tuple[str, Any]:
        """(name, value) of the first present name; ("", None) when none is. Two names must not disagree."""
        present = [(name, self.raw(name)) for name in names]
        present = [(name, value) for name, value in present if value is not None]
        if not present:
            return "", None
        name, value = present[0]
        for other, its in present[1:]:
            if its != value:
                self.wrong(other, f"{other} = {its!r:.60} disagrees with {name} = {value!r:.60}")
        self.used[fact or names[0]] = name
        return name, value

    def integer(
        self,
        names: tuple[str, ...],
        default: int | None = None,
        low: int = 1,
        high: int = 1 << 24,
        fact: str = "",
    ) -> int:
        """A whole number in [low, high]; a list of equal numbers (one a layer) counts as that number.

        With no default a missing value is a problem. Returns `low` in place of what is wrong.
        """
        name, value = self.find(names, fact)
        if not name:
            if default is None:
                self.wrong(names[0], f"missing; it is needed{_or_names(names)}")
                return low
            return default
        if isinstance(value, list) and value and all(v == value[0] and type(v) is int for v in value):
            value = value[0]
        if isinstance(value, list):
            self.wrong(name, "one whole number is needed; layers that differ in it are not modelled")
            return low
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.wrong(name, f"a whole number is needed, got {value!r:.60}")
            return low
        if not low <= value <= high:
            self.wrong(name, f"a number from {low} to {high} is needed, got {value!r:.60}")
            return low
        return value

    def flag(self, names: tuple[str, ...], default: bool) -> bool:
        """true or false."""
        name, value = self.find(names)
        if not name:
            return default
        if not isinstance(value, bool):
            self.wrong(name, f"true or false is needed, got {value!r:.60}")
            return default
        return value

    def text(self, names: tuple[str, ...], default: str) -> str:
        """A text."""
        name, value = self.find(names)
        if not name:
            return default
        if not isinstance(value, str):
            self.wrong(name, f"a text is needed, got {value!r:.60}")
            return default
        return value

    def items(self, names: tuple[str, ...], kind: type, length: int | None = None) -> list[Any] | None:
        """A list of `kind` (bool is no int), of `length` when given; None when absent or wrong."""
        name, value = self.find(names)
        if not name:
            return None
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            self.wrong(name, f"a list of {kind.__name__} is needed, got {value!r:.60}")
            return None
        if length is not None and len(value) != length:
            self.wrong(name, f"one value a layer is needed: {len(value)} values for {length} layers")
            return None
        return value


def _or_names(names: tuple[str, ...]) -> str:
    return f" (also read as {', '.join(names[1:])})" if len(names) > 1 else ""
