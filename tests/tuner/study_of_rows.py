"""A small study with a strategy that draws by number alone, as its canonical JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moesim_tuner.definition import Definition
from moesim_tuner.protocols import Workers
from moesim_tuner.records import Candidate, Trial, canonical
from moesim_tuner.study import run_study

from moesim.rng import generator
from moesim.tune_spec import RungSpec, TuneSpec

SPACE = {
    "parallel.ep": {"choices": [2, 3, 4, 8]},
    "engine.max_num_seqs": {"choices": [2, 8, 64]},
    "engine.gpu_memory_utilization": {"choices": [0.01, 0.5, 0.9]},
}


class Draws:
    def __init__(self) -> None:
        self.told = 0

    def tell(self, trials: Iterable[Trial]) -> None:
        self.told += len(list(trials))

    def propose(self, count: int) -> list[Candidate]:
        rng = generator(3, "draws", self.told)
        return [
            Candidate({name: p["choices"][int(rng.integers(len(p["choices"])))] for name, p in SPACE.items()}, "draws")
            for _ in range(count)
        ]


class Kept:
    def __init__(self) -> None:
        self.kept: list[Trial] = []

    def trials(self) -> list[Trial]:
        return []

    def proposed(self) -> list[list[Candidate]]:
        return []

    def propose(self, first: int, candidates: Sequence[Candidate]) -> None:
        pass

    def append(self, trials: Sequence[Trial]) -> None:
        self.kept += trials

    def close(self) -> None:
        pass


class Climbs:
    def climbs(self, rung: int, trial: Trial, trials: Sequence[Trial]) -> bool:
        return trial.number % 3 > 0


def study(text: str, base: Path, workers: Workers, trials: int = 16) -> str:
    """Canonical JSON of its trials; workers are closed."""
    made: dict[str, Any] = {"space": SPACE, "objectives": ["output_tok_per_s"], "trials": trials, "batch": 4}
    rungs = (RungSpec(set={"requests.num_requests": 4}), RungSpec(seeds=2))
    definition = Definition(text, "t", str(base), TuneSpec.model_validate(made), "draws", rungs)
    try:
        found = run_study(definition, Draws(), Climbs(), workers, Kept())
    finally:
        workers.close()
    return canonical([trial.to_json(clocks=False) for trial in found])
