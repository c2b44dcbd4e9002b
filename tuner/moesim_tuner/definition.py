"""What a study is about: the scenario, its `tune` block, the ladder, and the tasks that a candidate becomes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from moesim.tune_spec import RungSpec, TuneSpec
from moesim_tuner.figures import more_is_better
from moesim_tuner.records import Point, Task, Trial, canonical, derived_seed
from moesim_tuner.space import Space

__all__ = ["Definition", "Study", "field_texts"]


@dataclass(frozen=True)
class Definition:
    """text, name, base: the scenario (see `Task`); overrides: `--set` texts; spec: its `tune` block; sampler: the one
    chosen when the study was made; rungs: the ladder, cheapest first; fields: texts that hold for the whole search
    (which part of the routing pool it sees); scenario_hash: of the scenario as written."""

    text: str
    name: str
    base: str
    spec: TuneSpec
    sampler: str
    rungs: tuple[RungSpec, ...]
    overrides: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    scenario_hash: str = ""
    asynchronous: bool = False

    @cached_property
    def space(self) -> Space:
        """The parameters."""
        return Space(self.spec.space)

    @property
    def signs(self) -> tuple[int, ...]:
        """1 where an objective is to be large, -1 where it is to be small."""
        return tuple(1 if more_is_better(name) else -1 for name in self.spec.objectives)

    def texts(self, point: Point) -> tuple[str, ...]:
        """Overrides that make the point of the scenario: `--set` first, then the point."""
        return (*self.overrides, *self.space.overrides(point))

    def tasks(self, point: Point, rung: int) -> list[Task]:
        """What climbs `rung`: one task a seed, the same seeds for every candidate (common random numbers)."""
        step = self.rungs[rung]
        overrides = (*self.texts(point), *self.fields, *field_texts(step.set))
        seeds = [derived_seed(self.spec.seed, "search", i) for i in range(step.seeds)]
        return [Task(self.text, self.name, self.base, overrides, seed, self.plugins) for seed in seeds]

    @property
    def hash(self) -> str:
        """Of all that decides which trials a study has, but not how many, nor where files lie."""
        told = self.to_json()
        del told["base"]
        told["spec"] = {key: value for key, value in told["spec"].items() if key != "trials"}
        return hashlib.blake2b(canonical(told).encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Everything, as the store keeps it."""
        return {
            "text": self.text,
            "name": self.name,
            "base": self.base,
            "spec": self.spec.model_dump(mode="json", exclude_none=True),
            "sampler": self.sampler,
            "rungs": [rung.model_dump(mode="json") for rung in self.rungs],
            "overrides": list(self.overrides),
            "fields": list(self.fields),
            "plugins": list(self.plugins),
            "scenario_hash": self.scenario_hash,
            "asynchronous": self.asynchronous,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Definition:
        """What `to_json` made. Raises KeyError, TypeError or ValueError (pydantic's, too) for anything else."""
        return cls(
            text=str(found["text"]),
            name=str(found["name"]),
            base=str(found["base"]),
            spec=TuneSpec.model_validate_json(json.dumps(found["spec"])),
            sampler=str(found["sampler"]),
            rungs=tuple(RungSpec.model_validate_json(json.dumps(rung)) for rung in found["rungs"]),
            overrides=tuple(map(str, found["overrides"])),
            fields=tuple(map(str, found["fields"])),
            plugins=tuple(map(str, found["plugins"])),
            scenario_hash=str(found["scenario_hash"]),
            asynchronous=bool(found["asynchronous"]),
        )


class Study(Protocol):
    """What is known of a study (`moesim_tuner.tune.Found`)."""

    @property
    def name(self) -> str: ...

    @property
    def definition(self) -> Definition: ...

    @property
    def trials(self) -> Sequence[Trial]: ...


def field_texts(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Dotted path -> value, as `a.b=c` texts."""
    return tuple(f"{path}={json.dumps(value)}" for path, value in fields.items())
