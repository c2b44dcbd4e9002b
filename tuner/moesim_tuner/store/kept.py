"""What a study has kept so far: its definition, the batches proposed, the trials. Built record by record, from the
journal or from a database, and checked as it grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import BadInput
from moesim_tuner.records import Candidate, Trial, canonical
from moesim_tuner.store.identity import FORMAT, check, exported, identity

__all__ = ["Kept", "canonical_export", "same_trial"]

_STATES = ("complete", "pruned", "infeasible", "illegal", "failed")


@dataclass
class Kept:
    """name: of the study. definition: JSON, of `Definition.to_json`. version: the moesim that began it. batches: those
    proposed, in order. notes: what else was kept, by name."""

    name: str
    definition: dict[str, Any]
    version: str = ""
    batches: list[list[Candidate]] = field(default_factory=list)
    by_number: dict[int, Trial] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    num_proposed: int = 0

    @property
    def trials(self) -> list[Trial]:
        """By number."""
        return [self.by_number[number] for number in sorted(self.by_number)]

    @property
    def wanted(self) -> int:
        """How many trials the study is to have."""
        return int(self.definition["spec"]["trials"])

    def propose(self, first: int, candidates: Sequence[Candidate]) -> None:
        """Take a batch. Raises ValueError unless it begins where the last one ends."""
        if first != self.num_proposed or not candidates:
            raise ValueError(f"a batch from trial {first}, where {self.num_proposed} comes next")
        self.batches.append(list(candidates))
        self.num_proposed += len(candidates)

    def append(self, trials: Iterable[Trial]) -> None:
        """Take trials. Raises ValueError for one that was not proposed or has been."""
        for trial in trials:
            if not 0 <= trial.number < self.num_proposed:
                raise ValueError(f"trial {trial.number} was not proposed")
            if trial.number in self.by_number:
                raise ValueError(f"trial {trial.number} has ended before")
            self.by_number[trial.number] = trial

    def redefine(self, definition: dict[str, Any]) -> None:
        """Go on with another number of trials, say. Raises ValueError where that is another study."""
        if identity(definition) != identity(self.definition):
            raise ValueError("a definition of another study")
        self.definition = definition

    # ---- records: (kind, data)

    @classmethod
    def begin(cls, kind: str, data: Any, where: str) -> Kept:
        """From the first record. Raises BadInput for one of a newer moesim, ValueError for anything else."""
        if kind != "study" or not isinstance(data, dict):
            raise ValueError("the first record says what the study is")
        version = data.get("format")
        if not isinstance(version, int) or version < 1:
            raise ValueError("the first record says which format this is")
        if version > FORMAT:
            raise BadInput(
                f"the study is kept in format {version}, by a newer moesim; this one knows up to {FORMAT}: update it",
                where,
            )
        definition = check(data.get("definition"))
        if data.get("identity") != identity(definition):
            raise ValueError("the definition and its hash do not belong together")
        return cls(str(data["study"]), definition, str(data.get("version", "")))

    def header(self) -> tuple[str, dict[str, Any]]:
        """The first record."""
        data = {"format": FORMAT, "study": self.name, "definition": self.definition, "version": self.version}
        return "study", {**data, "identity": identity(self.definition)}

    def apply(self, kind: str, data: Any) -> None:
        """Take a record after the first. Raises ValueError, TypeError or KeyError for one that cannot be."""
        if kind == "proposed":
            self.propose(data["first"], [candidate_from(c) for c in data["candidates"]])
        elif kind == "trials":
            self.append([trial_from(t) for t in data])
        elif kind == "definition":
            self.redefine(check(data))
        elif kind == "note":
            self.notes[str(data["name"])] = data["value"]
        else:
            raise ValueError(f"a record of the kind {kind!r}")


def candidate_from(found: Any) -> Candidate:
    """Raises ValueError, TypeError or KeyError."""
    return Candidate(_point(found["point"]), str(found["origin"]))


def trial_from(found: Any) -> Trial:
    """Raises ValueError, TypeError or KeyError."""
    _point(found["point"])
    if found["state"] not in _STATES:
        raise ValueError(f"a trial's state is {found['state']!r}")
    return Trial.from_json(found)


def _point(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or any(isinstance(v, list | dict) for v in found.values()):
        raise ValueError("a point maps parameters to scalars")
    return found


def batch_record(first: int, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """A batch as JSON."""
    return {"first": first, "candidates": [{"point": dict(c.point), "origin": c.origin} for c in candidates]}


def same_trial(one: Trial, other: Trial) -> bool:
    """Equal but for clocks."""
    return canonical(one.to_json(clocks=False)) == canonical(other.to_json(clocks=False))


def canonical_export(study: Kept) -> str:
    """A study as JSON lines: its definition, its batches, its trials by number. No clock, no machine, no name that it
    was given, no notes: byte for byte equal for equal studies."""
    lines: list[Any] = [{"definition": exported(study.definition), "version": study.version}]
    first = 0
    for batch in study.batches:
        lines.append({"proposed": batch_record(first, batch)})
        first += len(batch)
    lines += [{"trial": trial.to_json(clocks=False)} for trial in study.trials]
    return "".join(canonical(line) + "\n" for line in lines)
