"""The mapping a scenario file holds, with `--set` overrides on top, and the place of every part of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesim.errors import BadInput, Problem
from moesim.scenario.yamlio import Marks, YamlPath, parse_yaml

__all__ = ["Source", "override_place"]

_MAX_OVERRIDES = 1000
_MAX_KEYS = 20


class Source:
    """`data` is the mapping; `where(path)` is its place: `file:line:col`, or the override that wrote it."""

    def __init__(self, data: Any, marks: Marks) -> None:
        if data is None:
            data = {}
        if not isinstance(data, dict):
            kind = "a list" if isinstance(data, list) else "one value"
            raise BadInput(Problem(marks.where(()), f"a mapping of keys (`name: value`) is needed, and this is {kind}"))
        self.data: dict[str, Any] = data
        self.marks = marks
        self.overridden: dict[YamlPath, str] = {}

    def where(self, path: YamlPath, *, key: bool = False) -> str:
        """The place of the value (or key) at `path`, or of its nearest parent."""
        if path and path not in self.marks and path not in self.overridden:
            below = [text for p, text in self.overridden.items() if p[: len(path)] == path]
            if below:
                return f"--set {below[-1]}"
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return f"--set {self.overridden[path[:end]]}"
            if path[:end] in self.marks or path[:end] in self.marks.keys_at:
                return self.marks.where(path, key=key)
        return self.marks.where(())

    def override(self, texts: list[str] | tuple[str, ...]) -> None:
        """Apply `a.b=c` texts in order. Raises BadInput with every one that cannot be applied."""
        problems: list[Problem] = []
        if len(texts) > _MAX_OVERRIDES:
            raise BadInput(Problem("--set", f"at most {_MAX_OVERRIDES} overrides are taken, got {len(texts)}"))
        for text in texts:
            try:
                self._one(text)
            except BadInput as error:
                problems.extend(error.problems)
        if problems:
            raise BadInput(problems)

    def _one(self, text: str) -> None:
        dotted, equals, value_text = text.partition("=")
        where = override_place(text)
        shown = where.removeprefix("--set ")
        keys = [k.strip() for k in dotted.split(".")]
        if not equals or not all(keys):
            raise BadInput(Problem(where, "an override is written key=value, such as parallel.tp=2"))
        if len(keys) > _MAX_KEYS:
            raise BadInput(Problem(where, f"at most {_MAX_KEYS} keys deep"))
        try:
            value, _ = parse_yaml(value_text, where)
        except BadInput as error:
            raise BadInput([Problem(where, p.message) for p in error.problems]) from None
        path: list[str | int] = []
        here: Any = self.data
        for i, key in enumerate(keys):
            last = i == len(keys) - 1
            if isinstance(here, list):
                if not key.isascii() or not key.isdecimal() or int(key[:9]) >= len(here):
                    message = f"{_dotted(path)} is a list; its items are 0 to {len(here) - 1}, got {key}"
                    raise BadInput(Problem(where, message if here else f"{_dotted(path)} is an empty list"))
                step: str | int = int(key)
            elif isinstance(here, dict):
                step = key
                if not last and here.get(key) is None:
                    here[key] = {}
                elif not last and isinstance(here[key], str) and _takes_name(path, key):
                    here[key] = {"kind" if path else "name": here[key]}
            else:
                raise BadInput(Problem(where, f"{_dotted(path)} holds a value, not a mapping; it has no key {key}"))
            path.append(step)
            if last:
                here[step] = value
            else:
                here = here[step]
        self._note(tuple(path), shown)

    def _note(self, path: YamlPath, text: str) -> None:
        for known in [p for p in self.overridden if p[: len(path)] == path]:
            del self.overridden[known]
        for table in (self.marks, self.marks.keys_at):
            for known in [p for p in table if p[: len(path)] == path]:
                del table[known]
        self.overridden[path] = text


def override_place(text: str) -> str:
    """How messages name the override `text`."""
    return f"--set {text if len(text) <= 100 else text[:97] + '...'}"


def _takes_name(path: list[str | int], key: str) -> bool:
    """`model: x` is short for {name: x} and `placement: x` for {kind: x}; a key can be set below it."""
    return (not path and key == "model") or path == ["policies"]


def _dotted(path: list[str | int]) -> str:
    return ".".join(str(p) for p in path) or "the scenario"


def rebase(value: str, base: Path) -> str:
    """A path from an override: from the current folder if it is only there, else from the scenario's."""
    given = Path(value)
    try:
        if not given.is_absolute() and not (base / given).exists() and given.exists():
            return str(given.resolve())
    except (OSError, ValueError):
        pass
    return value
