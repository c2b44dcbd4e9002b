"""Routers of papers and models by name: rows of `moesim/routing/presets.yaml` put in place of the name.

A row says which mechanism with which parameters, and what else the paper changes: dimensions of the model, a capacity.
What a scenario writes itself stands before what a row says.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

import moesim.routing
from moesim.errors import BadInput, Problem
from moesim.model_changes import ModelChanges
from moesim.policy import did_you_mean, policy_kinds, spec_problems
from moesim.routing.capacity import CapacitySpec
from moesim.scenario.source import Source
from moesim.scenario.yamlio import load_yaml
from moesim.spec import Spec

__all__ = ["Preset", "apply_preset", "presets"]

_Text = Annotated[str, Field(min_length=1, max_length=2000)]


class PresetSpec(Spec):
    """A row: `kind` and its `parameters`; changes of the model's dimensions; a capacity; `source` and `equation`;
    `reconstruction`: what of it is ours because no source states it."""

    kind: _Text
    parameters: dict[str, Any] = Field(default_factory=dict)
    model: ModelChanges = Field(default_factory=ModelChanges)
    capacity: CapacitySpec | None = None
    source: _Text
    equation: _Text
    reconstruction: Annotated[str, Field(max_length=2000)] = ""


@dataclass(frozen=True, slots=True)
class Preset:
    """A row with its name. `model`, `capacity`: only the keys that are written."""

    name: str
    kind: str
    parameters: dict[str, Any]
    model: dict[str, Any]
    capacity: dict[str, Any]
    source: str
    equation: str
    reconstruction: str


@functools.cache
def presets() -> dict[str, Preset]:
    """Every row by name, in the file's order. Raises BadInput where the file is wrong."""
    path = Path(moesim.routing.__file__).parent / "presets.yaml"
    data, marks = load_yaml(path)
    problems: list[Problem] = []
    out: dict[str, Preset] = {}
    for name, row in data.items():
        try:
            spec = PresetSpec.model_validate(row)
        except ValidationError as error:
            problems += spec_problems(
                error, lambda loc, n=name: marks.where((n, *loc)), PresetSpec, (name,)  # type: ignore[misc]
            )  # fmt: skip
            continue
        out[str(name)] = Preset(
            str(name),
            spec.kind,
            dict(spec.parameters),
            spec.model.model_dump(mode="json", exclude_none=True),
            {} if spec.capacity is None else spec.capacity.model_dump(mode="json", exclude_unset=True),
            spec.source,
            spec.equation,
            spec.reconstruction,
        )
    if problems:
        raise BadInput(problems)
    return out


def apply_preset(source: Source, problems: list[Problem], off: Collection[str] = ()) -> Preset | None:
    """Put the row that `policies.routing` names into `source.data`; the row, or None where none is named. `off`: keys
    that the scenario sets to null."""
    policies = source.data.get("policies")
    given = policies.get("routing") if isinstance(policies, dict) else None
    name = given.get("kind") if isinstance(given, dict) else given
    if not isinstance(name, str) or name in policy_kinds("routing"):
        return None
    assert isinstance(policies, dict)
    where = source.where(("policies", "routing", "kind") if isinstance(given, dict) else ("policies", "routing"))
    preset = presets().get(name)
    if preset is None:
        known = [*policy_kinds("routing"), *presets()]
        problems.append(Problem(where, f"policies.routing: unknown router {name!r}.{did_you_mean(name, known)}"))
        del policies["routing"]
        return None
    own = {k: v for k, v in given.items() if k != "kind"} if isinstance(given, dict) else {}
    policies["routing"] = {"kind": preset.kind, **preset.parameters, **own}
    model = source.data.get("model")
    if preset.model and isinstance(model, str | dict):
        written = {"name": model} if isinstance(model, str) else model
        source.data["model"] = {**preset.model, **written}
    capacity = source.data.get("capacity")
    if preset.capacity and "capacity" not in off and (capacity is None or isinstance(capacity, dict)):
        source.data["capacity"] = {**preset.capacity, **(capacity or {})}
    return preset
