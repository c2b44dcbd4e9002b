"""Which points next, by a model of the figures: the sampler that `auto` stands for.

A Gaussian process for each objective, for each constraint that was ever broken, and for whether a point runs at all
(legal, fits). A candidate is worth its expected improvement (Jones, Schonlau and Welch, 1998, equation 15) times the
probability that it keeps everything (Gardner et al., ICML 2014, equation 4). With several objectives each place of a
batch weighs them anew, and improvement is that of the hypervolume scalarisation (Golovin and Zhang, arXiv:2006.04655,
definition 1), whose mean over weights is the hypervolume. Candidates are all points not yet tried where they are few,
else a draw of them with the neighbours of the best. The points of a batch are chosen one after the other, each as if
those before it had come out as expected. Every fourth place goes to a neighbour of the best trials, so that what the
model overlooks next to them is found; and where the model promises next to nothing, most places go to draws.

Everything is a function of the trials told and of the seed: length scales are learned again whenever the trials have
grown by an eighth, from the trials told by then, so a strategy that was made anew knows the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from moesim.rng import generator
from moesim_tuner.records import Point, Trial
from moesim_tuner.search.encoding import Encoding
from moesim_tuner.search.gaussian import Floats, Posterior, Scales, fit_scales
from moesim_tuner.search.told import final_values
from moesim_tuner.space import Scalar, Space

__all__ = ["Surrogate"]

Bools = NDArray[np.bool_]

_MOST_TRAINED = 96
"""trials that a process learns from: the better half, and the latest"""
_MOST_CELLS, _LATER_CELLS = 200_000, 80_000
"""trials learned from times candidates, up to 64 trials and after"""
_LISTED = 50_000
"""points of a space that are listed; of larger ones some are drawn"""
_DRAWN = 512
"""points of a larger space that are drawn each time"""
_SAMPLES = 32
_LITTLE = 0.005
"""where no candidate promises so much of the best value, the model has no more to say, and what it does not know of is
found by trying"""
_FEWEST = 4
"""measured trials that a model is made from"""


class Surrogate:
    """signs: 1 for an objective that is to be large, -1 for a small one; constraints: their names; trials: how many
    the study will have."""

    def __init__(
        self,
        space: Space,
        objectives: Sequence[str],
        signs: Sequence[int],
        constraints: Sequence[str],
        seed: int,
        trials: int,
    ) -> None:
        self._space, self._signs, self._seed = space, tuple(signs), seed
        self._objectives = tuple(objectives)
        self._constraints = tuple(constraints)
        self._encoding = Encoding(space)
        self._design = min(max(6, len(space.parameters) + 4), max(6, trials // 4))
        self._trials: list[Trial] = []
        self._rows: list[Floats] = []
        self._scales: dict[tuple[str, int], Scales] = {}
        self._all_MD = self._encoding.every_row(_LISTED)
        self._free_M = None if self._all_MD is None else np.ones(len(self._all_MD), bool)
        self._told_keys: set[str] = set()

    def tell(self, trial: Trial) -> None:
        """The next trial."""
        self._trials.append(trial)
        self._rows.append(self._encoding.row(trial.point))
        self._told_keys.add(self._space.key(trial.point))
        if self._free_M is not None and trial.point in self._space:
            self._free_M[self._space.index(trial.point)] = False

    def propose(self, count: int, pending: Sequence[Point]) -> list[dict[str, Scalar]]:
        """`count` points, none told nor among `pending`; fewer where there are no more."""
        told = len(self._trials)
        points, at_MD, near = self._candidates(pending)
        count = min(count, len(at_MD))
        if not count:
            return []
        measured = [t for t in self._trials if t.values]
        if told < self._design or len(measured) < _FEWEST:
            return [points(i) for i in self._spread(at_MD, count, told)]
        model = _Model(self, at_MD, near)
        return [points(model.next(place)) for place in range(count)]

    def _candidates(self, pending: Sequence[Point]) -> tuple[Callable[[int], dict[str, Scalar]], Floats, int]:
        """Points not taken that are looked at this time: by number, encoded [M, D], and how many of them, the first
        ones, are neighbours of the best trials."""
        told = len(self._trials)
        room = max(512, (_MOST_CELLS if told <= 64 else _LATER_CELLS) // max(1, min(told, _MOST_TRAINED)))
        rng = generator(self._seed, "tune/candidates", told)
        if self._all_MD is not None and self._free_M is not None:
            free_M = self._free_M.copy()
            free_M[[self._space.index(point) for point in pending if point in self._space]] = False
            near_M = np.array(sorted({i for i in map(self._space.index, self._near_best()) if free_M[i]}), np.int64)
            free_M[near_M] = False
            rest = np.flatnonzero(free_M)
            if len(rest) > room:
                rest = np.sort(rng.permutation(rest)[:room])
            at = np.concatenate([near_M, rest])
            return lambda i: self._space.at(int(at[i])), self._all_MD[at], len(near_M)
        taken = self._told_keys | {self._space.key(point) for point in pending}
        near = {self._space.key(point): point for point in self._near_best()}
        found = {key: point for key, point in near.items() if key not in taken}
        number = len(found)
        for _ in range(min(room, _DRAWN)):
            point = self._space.random(rng)
            key = self._space.key(point)
            if key not in taken:
                found.setdefault(key, point)
        points = list(found.values())
        return lambda i: points[i], self._encoding.rows(points), number

    def _near_best(self) -> list[dict[str, Scalar]]:
        """Neighbours of the best trials."""
        best = sorted((t for t in self._trials if t.values and t.point in self._space), key=self._order)[:4]
        return [n for trial in best for n in self._space.neighbours(trial.point)]

    def _order(self, trial: Trial) -> tuple[float, ...]:
        """Smaller is better: what is broken, then the first objective."""
        kept = 0.0 if trial.state == "complete" else 1e-9
        return (trial.violation + kept, -self._signs[0] * trial.values[0], trial.number)

    def _spread(self, at_MD: Floats, count: int, told: int) -> list[int]:
        """Candidates far from all trials and from each other: each the farthest of 48 drawn."""
        rng = generator(self._seed, "tune/spread", told)
        known = list(self._rows)
        out: list[int] = []
        for _ in range(count):
            drawn = np.unique(rng.integers(len(at_MD), size=48))
            drawn = drawn[~np.isin(drawn, out)]
            if not len(drawn):
                drawn = np.setdiff1d(np.arange(len(at_MD)), out)[:1]
            apart = np.full(len(drawn), math.inf)
            for row in known:
                apart = np.minimum(apart, np.abs(at_MD[drawn] - row).sum(axis=1))
            out.append(int(drawn[int(np.round(apart, 9).argmax())]))
            known.append(at_MD[out[-1]])
        return out

    # ---- what a model is made of

    def learned_from(self, told: int) -> _Data:
        """Of the first `told` trials at most 96: the better half and the latest."""
        trials = self._trials[:told]
        indices = [i for i, t in enumerate(trials) if t.state != "failed"]
        if len(indices) > _MOST_TRAINED:
            good = sorted((i for i in indices if trials[i].values), key=lambda i: self._order(trials[i]))
            keep = set(good[: _MOST_TRAINED // 2])
            late = [i for i in reversed(indices) if i not in keep]
            indices = sorted(keep | set(late[: _MOST_TRAINED - len(keep)]))
        finals = final_values(trials, self._objectives)
        none = (math.nan,) * len(self._signs)
        chosen = [trials[i] for i in indices]
        return _Data(
            np.array([self._rows[i] for i in indices]),
            np.array([finals.get(t.number, none) for t in chosen]) * np.array(self._signs, np.float64),
            {name: np.array([t.violations.get(name, math.nan) for t in chosen]) for name in self._constraints},
            np.array([t.state == "complete" and t.feasible for t in chosen]),
        )

    def posterior(self, name: str, data: _Data, at_MD: Floats) -> Posterior:
        """A process at the candidates. Its scales are those learned from fewer trials, as many as the last term of a
        geometric row, so that they are seldom learned and never depend on when this object was made."""
        column_D, parameters = self._encoding.column_D, self._encoding.parameters
        rows_N, y_N = data.target(name)
        step = 8
        while step * 9 // 8 <= len(self._trials):
            step = step * 9 // 8
        key = (name, step)
        if key not in self._scales:
            early = self.learned_from(step)
            early_N, early_y_N = early.target(name)
            if early_N.sum() < _FEWEST or not early_y_N.any():  # it meant nothing then
                return Posterior(
                    data.x_ND[rows_N], y_N, column_D, fit_scales(data.x_ND[rows_N], y_N, column_D, parameters), at_MD
                )
            self._scales[key] = fit_scales(early.x_ND[early_N], early_y_N, column_D, parameters)
        return Posterior(data.x_ND[rows_N], y_N, column_D, self._scales[key], at_MD)


@dataclass(frozen=True)
class _Data:
    """Trials that are learned from. value_NK: more is better, NaN where nothing was measured; broken_N by constraint;
    kept_N: everything is kept."""

    x_ND: Floats
    value_NK: Floats
    broken: Mapping[str, Floats]
    kept_N: Bools

    @property
    def ran_N(self) -> Bools:
        return np.asarray(~np.isnan(self.value_NK).any(axis=1), bool)

    @property
    def run_mean(self) -> float:
        """Of the labels 1 (it ran) and -1."""
        return float(np.where(self.ran_N, 1.0, -1.0).mean())

    def target(self, name: str) -> tuple[Bools, Floats]:
        """Which trials, and their values: `objective K`, `runs`, or a constraint."""
        if name == "runs":
            return np.ones(len(self.x_ND), bool), np.where(self.ran_N, 1.0, -1.0) - self.run_mean
        if name.startswith("objective "):
            return self.ran_N, _scaled(self.value_NK[self.ran_N, int(name.split()[1])])[0]
        seen_N = self.ran_N & ~np.isnan(self.broken[name])
        y_N = np.clip(self.broken[name][seen_N], -1.0, 1.0)
        return seen_N, y_N / max(float(np.sqrt((y_N * y_N).mean())) if len(y_N) else 1.0, 1e-9)


class _Model:
    """The processes of one batch, at its candidates."""

    def __init__(self, of: Surrogate, at_MD: Floats, near: int) -> None:
        self._near = near
        self._seed, self._told = of._seed, len(of._trials)
        data = of.learned_from(self._told)
        names = [f"objective {k}" for k in range(len(of._signs))]
        self._objectives = [of.posterior(name, data, at_MD) for name in names]
        scaled_NK = np.column_stack([data.target(name)[1] for name in names])
        self._kept_NK = scaled_NK[data.kept_N[data.ran_N]]
        self._run_mean = data.run_mean
        self._runs = None if data.ran_N.all() else of.posterior("runs", data, at_MD)
        broken = [name for name in of._constraints if (data.broken[name][data.ran_N] > 0).any()]
        self._limits = [of.posterior(name, data, at_MD) for name in broken]
        self._processes = [*self._objectives, *self._limits, *([self._runs] if self._runs else [])]
        self._gone: list[int] = []
        # an improvement by half a percent of the best value, in the model's scale
        self._little = _LITTLE
        if len(names) == 1:
            best = float(np.abs(data.value_NK[data.kept_N, 0]).max(initial=0.0))
            self._little *= best / _scaled(data.value_NK[data.ran_N, 0])[1]

    def next(self, place: int) -> int:
        """The candidate that is worth most, which then counts as tried."""
        probability_M = self._probability()
        worth_M = self._improvement(place) * probability_M
        worth_M[self._gone] = -1.0
        little = float(worth_M.max()) < self._little
        if place % 4 == (1 if little else 3) and self._near and float(worth_M[: self._near].max()) >= 0:
            return self._take(int(worth_M[: self._near].argmax()), probability_M)
        if place and little:
            return self._take(self._elsewhere(place, probability_M), probability_M)
        # a rounding that another processor would do otherwise decides nothing; of equals the first
        top = float(worth_M.max())
        index = int((worth_M >= top * (1 - 1e-9)).argmax()) if top > 0 else int(worth_M.argmax())
        return self._take(index, probability_M)

    def _elsewhere(self, place: int, probability_M: Floats) -> int:
        """A draw, by the probability that everything is kept."""
        weight_M = np.round(probability_M, 6) + 1e-9
        weight_M[self._gone] = 0.0
        sum_M = np.cumsum(weight_M)
        drawn = generator(self._seed, "tune/elsewhere", self._told, place).random() * sum_M[-1]
        return min(int(np.searchsorted(sum_M, drawn, side="right")), len(sum_M) - 1)

    def _take(self, index: int, probability_M: Floats) -> int:
        """`index` counts as tried, and as good as its mean where it is likely to keep everything."""
        self._gone.append(index)
        if probability_M[index] > 0.5 and len(self._kept_NK):
            self._kept_NK = np.vstack([self._kept_NK, [process.mean_M[index] for process in self._objectives]])
        for process in self._processes:
            process.imagine(index)
        return index

    def _probability(self) -> Floats:
        """That a candidate runs and keeps every constraint [M]."""
        out = np.ones(len(self._objectives[0].mean_M))
        if self._runs is not None:
            out *= ndtr((self._runs.mean_M + self._run_mean) / np.sqrt(self._runs.deviation_M**2 + 0.003))
        for process in self._limits:
            out *= ndtr(-process.mean_M / process.deviation_M)
        return out

    def _improvement(self, place: int) -> Floats:
        """Expected, over the best trial that keeps everything [M]; where none does, every candidate's is alike."""
        if not len(self._kept_NK):
            return np.ones(len(self._objectives[0].mean_M))
        if len(self._objectives) == 1:
            process = self._objectives[0]
            return _expected(process.mean_M, process.deviation_M, float(self._kept_NK.max()))
        rng = generator(self._seed, "tune/weights", self._told, place)
        weight_K = np.abs(rng.standard_normal(len(self._objectives)))
        weight_K = np.maximum(weight_K / np.linalg.norm(weight_K), 0.02)
        worst_K, best_K = self._kept_NK.min(axis=0), self._kept_NK.max(axis=0)
        span_K = np.maximum(best_K - worst_K, 1e-3)
        worst_K = worst_K - 0.1 * span_K

        def scalar(value_XK: Floats) -> Floats:
            return np.asarray((np.maximum(value_XK - worst_K, 0.0) / span_K / weight_K).min(axis=-1))

        best = float(scalar(self._kept_NK).max())
        mean_MK = np.column_stack([p.mean_M for p in self._objectives])
        deviation_MK = np.column_stack([p.deviation_M for p in self._objectives])
        total_M = np.zeros(len(mean_MK))
        for draw_K in generator(self._seed, "tune/samples").standard_normal((_SAMPLES // 2, len(weight_K))):
            for one_K in (draw_K, -draw_K):
                total_M += np.maximum(scalar(mean_MK + deviation_MK * one_K) - best, 0.0)
        return total_M / _SAMPLES


def _scaled(value_N: Floats) -> tuple[Floats, float]:
    """Mean 0 and deviation 1, with what is far worse than the rest brought nearer: differences among bad points say
    little about where the best is. Also how much one of the scale is, among the good."""
    low, middle, high = np.quantile(value_N, [0.25, 0.5, 0.75])
    span = max(float(high - low), 1e-12 + 1e-9 * abs(float(middle)))
    z_N = (value_N - middle) / span
    z_N = np.where(z_N < -1.0, -1.0 - np.log1p(np.maximum(-1.0 - z_N, 0.0)), z_N)
    deviation = max(float(z_N.std()), 1e-9)
    return np.asarray((z_N - z_N.mean()) / deviation), span * deviation


def _expected(mean_M: Floats, deviation_M: Floats, best: float) -> Floats:
    """Expected improvement over `best`."""
    z_M = (mean_M - best) / deviation_M
    return np.asarray(deviation_M * (z_M * ndtr(z_M) + np.exp(-0.5 * z_M * z_M) / math.sqrt(2 * math.pi)))
