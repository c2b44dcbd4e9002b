"""How good the samplers are: studies over spaces whose every point is known, against the best there is.

    python benchmarks/tuner/quality.py                        # rewrites results/validation/tuner_search.md
    python benchmarks/tuner/quality.py --show --samplers surrogate --spaces serve_layout --seeds 3

A study runs as `moesim tune` runs it (`run_study`, the heuristics first, one rung, batches of 4) but for two parts: its
workers look a point up in the table that `exhaust.py` made, and its store is in memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from moesim_tuner.definition import Definition
from moesim_tuner.heuristics import starts
from moesim_tuner.ladder import Rungs
from moesim_tuner.records import Candidate, Row, Task, Trial
from moesim_tuner.search import strategy
from moesim_tuner.study import finish, run_study

from benchmarks.tuner.exhaust import Enumerable, spaces
from moesim.scenario.load import load_scenario_text
from moesim.tune_spec import RungSpec

PAGE = Path(__file__).resolve().parents[2] / "results" / "validation" / "tuner_search.md"
DEVELOPED_ON = ("serve_layout", "train_capacity", "batch_limits", "overlap")
"""spaces that were looked at while the model's settings were chosen; the others only in earlier runs of this page"""
TRIALS, BATCH, NEAR = 60, 4, 0.01
NAMES = {
    "surrogate": "surrogate (`auto`)",
    "tpe": "Optuna TPE",
    "nsga2": "Optuna NSGA-II",
    "gp": "Optuna GP",
    "random": "random",
}


class Memory:
    """`protocols.Store` of a study that nobody wants to keep."""

    def __init__(self) -> None:
        self.kept: list[Trial] = []
        self.batches: list[list[Candidate]] = []

    def trials(self) -> list[Trial]:
        return list(self.kept)

    def proposed(self) -> list[list[Candidate]]:
        return [list(batch) for batch in self.batches]

    def propose(self, first: int, candidates: Sequence[Candidate]) -> None:
        self.batches.append(list(candidates))

    def append(self, trials: Sequence[Trial]) -> None:
        self.kept += trials

    def close(self) -> None:
        return


class World:
    """A space with its table: `protocols.Workers` that know every answer, and what the best is."""

    parallel = BATCH

    def __init__(self, name: str) -> None:
        self.name = name
        self.space = Enumerable(name)
        self.rows = self.space.table()
        self._row = {self.space.space.overrides(p): row for p, row in zip(self.space.points, self.rows, strict=True)}
        scenario = load_scenario_text(self.space.text, self.space.path.parent, (), None, name)
        self.starts = starts(scenario, self.space.space, self.space.spec)
        if self.starts[0].point not in self.space.space:
            raise ValueError(f"{name}: the scenario as written is no point of its space")

    def submit(self, task: Task) -> Future[Row]:
        future: Future[Row] = Future()
        future.set_result(self._row[task.overrides])
        return future

    def close(self) -> None:
        return

    def definition(self, sampler: str, seed: int, trials: int = TRIALS) -> Definition:
        spec = self.space.spec.model_copy(update={"seed": seed, "trials": trials, "batch": BATCH})
        e = self.space
        return Definition(e.text, e.name, str(e.path.parent), spec, sampler, (RungSpec(),))

    def study(self, sampler: str, seed: int, trials: int = TRIALS) -> list[Trial]:
        """A study's trials, in order."""
        definition = self.definition(sampler, seed, trials)
        return run_study(definition, strategy(definition, self.starts), Rungs(definition), self, Memory())

    # ---- how far from the best

    @cached_property
    def all(self) -> list[Trial]:
        """Every point as a trial."""
        definition = self.definition("random", 0)
        points = zip(self.space.points, self.rows, strict=True)
        return [finish(definition, i, Candidate(p, "all"), [[row]], 0.0) for i, (p, row) in enumerate(points)]

    @cached_property
    def gain(self) -> np.ndarray:
        """Objectives of every feasible point, the more the better [F, K]."""
        return np.array([self._gains(t) for t in self.all if t.feasible])

    def _gains(self, trial: Trial) -> tuple[float, ...]:
        return tuple(s * v for s, v in zip(self.definition("random", 0).signs, trial.values, strict=True))

    @cached_property
    def best(self) -> float:
        """The best value; of two objectives the hypervolume of the whole front."""
        return self._worth(self.gain)

    def _worth(self, gain_FK: np.ndarray) -> float:
        if gain_FK.shape[1] == 1:
            return float(gain_FK.max())
        low_K, high_K = self.gain.min(axis=0), self.gain.max(axis=0)
        return _area((gain_FK - low_K) / (high_K - low_K))

    def regrets(self, trials: Sequence[Trial]) -> np.ndarray:
        """After each trial, how far the best so far is from the best there is, as a share of it [N]; infinite before
        there is a feasible one."""
        out, found = np.full(len(trials), np.inf), []
        for i, trial in enumerate(trials):
            if trial.feasible:
                found.append(self._gains(trial))
            if found:
                out[i] = (self.best - self._worth(np.array(found))) / abs(self.best)
        return out


def _area(point_FK: np.ndarray) -> float:
    """Hypervolume over the origin of two objectives in [0, 1]."""
    area, top = 0.0, 0.0
    for x, y in sorted(point_FK.tolist(), reverse=True):
        if y > top:
            area, top = area + x * (y - top), y
    return area


@dataclass(frozen=True)
class Result:
    """Of one sampler on one space. regret_SN: after each trial by seed."""

    regret_SN: np.ndarray
    cpu_ms: float

    @property
    def last_S(self) -> np.ndarray:
        return self.regret_SN[:, -1]

    @property
    def near(self) -> float:
        """Median number of trials until within 1 % of the best; infinite."""
        there_SN = self.regret_SN <= NEAR
        first_S = np.where(there_SN.any(axis=1), there_SN.argmax(axis=1) + 1.0, np.inf)
        return float(np.median(first_S))


def measure(world: World, sampler: str, seeds: int, trials: int = TRIALS) -> Result:
    """Studies of `seeds` seeds. Random search at equal trials starts with the same heuristics as the others."""
    began, regrets = time.process_time(), []
    for seed in range(seeds):
        found = world.study(sampler, seed, trials)
        regrets.append(world.regrets(found))
    return Result(np.array(regrets), (time.process_time() - began) / seeds / trials * 1e3)


def _percent(share: float) -> str:
    return "-" if not np.isfinite(share) else f"{100 * share:.2f}"


def page(names: Sequence[str], samplers: Sequence[str], seeds: int) -> str:
    """The tables."""
    lines = [
        "# Quality of the search",
        "",
        "Made by `python benchmarks/tuner/quality.py` from the tables that `python benchmarks/tuner/exhaust.py all`"
        " made of every point of every space in `benchmarks/tuner/spaces/`.",
        "",
        f"Studies of {TRIALS} trials in batches of {BATCH}, {seeds} seeds each, run by the coordinator as `moesim tune`"
        " runs them: the scenario as written and the heuristics first, then the sampler. Regret: how far the best"
        " feasible trial is from the best of all points, in % of it (of two objectives: of the hypervolume over the"
        " worst feasible values). Trials to 1 %: median over seeds; `-`: in fewer than half of them. All samplers start"
        " with the same heuristics, random search too.",
        "",
        "Settings of the surrogate were chosen on " + ", ".join(DEVELOPED_ON) + "; the others (marked *) were seen"
        " in earlier runs of this page alone, and nothing was changed for them. `overlap` joined the four after such"
        " a run had shown it missed; `batch_limits` was made harder when random search had been as good there.",
        "",
        "| space | points | feasible | illegal | do not fit | within 1 % | default's regret | best start's regret |",
        "|---|---|---|---|---|---|---|---|",
    ]
    worlds = [World(name) for name in names]
    for w in worlds:
        states = [t.state for t in w.all]
        single = w.gain.shape[1] == 1
        near = f"{int((w.gain[:, 0] >= w.best - NEAR * abs(w.best)).sum()):,}" if single else "(a front)"
        first = w.regrets([w.all[w.space.space.index(c.point)] for c in w.starts])
        star = "" if w.name in DEVELOPED_ON else " *"
        lines.append(
            f"| {w.name}{star} | {len(w.rows):,} | {len(w.gain):,} | {states.count('illegal'):,} |"
            f" {states.count('infeasible'):,} | {near} | {_percent(first[0])} | {_percent(first[-1])} |"
        )
    lines += [
        "",
        "| space | sampler | median regret, % | worst of the seeds, % | trials to 1 % | CPU ms a trial, all in all |",
        "|---|---|---|---|---|---|",
    ]
    for w in worlds:
        for sampler in samplers:
            result = measure(w, sampler, seeds)
            near = "-" if not np.isfinite(result.near) else f"{result.near:.0f}"
            lines.append(
                f"| {w.name} | {NAMES[sampler]} | {_percent(float(np.median(result.last_S)))} |"
                f" {_percent(float(result.last_S.max()))} | {near} | {result.cpu_ms:.1f} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spaces", default=",".join(spaces()))
    parser.add_argument("--samplers", default="surrogate,tpe,nsga2,random")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--show", action="store_true", help="print, and leave the page as it is")
    asked = parser.parse_args()
    text = page(asked.spaces.split(","), asked.samplers.split(","), asked.seeds)
    if asked.show:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
