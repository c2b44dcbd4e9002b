"""What an engine is told of a winner: options with the scenario's fields that they carry, and the fields that no option
carries, each with a reason."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesim.exports import Target
from moesim.run_result import RunResult
from moesim.scenario.load import Scenario
from moesim.training.result import TrainingResult

__all__ = ["Settings", "Sheet", "Winner", "leaves"]


@dataclass(frozen=True, eq=False)
class Winner:
    """What is exported. varied: the fields that the study chose, dotted path to value. target: the placement of all MoE
    layers, where an engine that starts by itself would have another; `untold` says why there is none. folder: where the
    files will lie, for command lines."""

    scenario: Scenario
    varied: Mapping[str, Any]
    result: RunResult | TrainingResult
    target: Target | None
    untold: str = ""
    folder: str = "."

    @property
    def ranks(self) -> int:
        """Devices of one replica."""
        return self.scenario.parallel.tp * self.scenario.parallel.dp

    @property
    def nodes(self) -> int:
        """Nodes that one replica spans."""
        return -(-self.ranks // self.scenario.cluster.gpus_per_node)


@dataclass(frozen=True)
class Settings:
    """One engine's part of an export. words: the command; files: name -> text, which the command names; unset: field of
    the scenario -> its value and why no option carries it; notes: what to know."""

    engine: str
    words: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    unset: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command as a shell takes it, an option a line."""
        lines: list[list[str]] = [[]]
        for word in self.words:
            if word.startswith("--") and len(lines[-1]) > 0:
                lines.append([])
            lines[-1].append(shlex.quote(word))
        return " \\\n  ".join(" ".join(line) for line in lines)


class Sheet:
    """Collects an engine's options."""

    def __init__(self, engine: str, winner: Winner, *program: str) -> None:
        self.engine = engine
        self.words = list(program)
        self.files: dict[str, str] = {}
        self.notes: list[str] = []
        self._varied = winner.varied
        self._written = winner.scenario.raw
        self._carried: set[str] = set()
        self._unset: dict[str, str] = {}

    def option(self, name: str, value: object = None, *fields: str) -> None:
        """An option, with a value unless it is None, and the fields it carries."""
        self.words.append(name)
        if value is not None:
            self.words.append(value if isinstance(value, str) else json.dumps(value))
        self.carries(*fields)

    def carries(self, *fields: str) -> None:
        """These fields are said, by options or by their absence."""
        self._carried |= set(fields)

    def cannot(self, path: str, value: object, why: str) -> None:
        """No option says `value` of a field."""
        self._unset[path] = f"{value if isinstance(value, str) else json.dumps(value)}: {why}"

    def settings(self) -> Settings:
        """The sheet. Listed are fields that the study set or the scenario says, and no option carries; what stands at
        the simulator's default unsaid is the engine's own business."""
        unset = {path: told for path, told in self._unset.items() if path in self._varied or self._says(path)}
        for path, value in self._varied.items():
            if path not in self._carried and path not in unset:
                unset[path] = f"{value if isinstance(value, str) else json.dumps(value)}: {self.engine} has no option"
        return Settings(self.engine, tuple(self.words), self.files, unset, tuple(self.notes))

    def _says(self, path: str) -> bool:
        here: Any = self._written
        for key in path.split("."):
            here = here.get(key) if isinstance(here, Mapping) else None
        return here is not None


def leaves(path: str, value: Any) -> dict[str, Any]:
    """A field's value as its leaves: a policy is its kind and its parameters."""
    if not isinstance(value, Mapping):
        return {path: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= {path: inner} if key == "kind" else leaves(f"{path}.{key}", inner)
    return out
