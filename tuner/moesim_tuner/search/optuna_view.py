"""Optuna's samplers over a study's trials.

Before every batch a study is made in memory from the trials told, and every point is asked of a sampler made anew with
a seed of its own. Nothing else is carried from batch to batch, so it makes no difference whether this object proposed
the trials or a journal brought them: what a sampler keeps between trials (NSGA-II its generations and parents, in
attributes) follows from their order.

*What has no values* must have some to be a trial that Optuna's samplers heed. Points that are illegal or do not fit
carry the worst values measured so far and a broken constraint. TPE and NSGA-II rank what breaks a constraint below all
else and by how much it breaks, so the values mean nothing to them; the GP sampler learns its objective from them, and
the worst measured is what neither invents a cliff (infinities are cut to the largest float and flatten everything else)
nor praises the spot. Points whose worker failed are left out: nothing is known of them.

*Pruned trials* are told as such, with their values by rung, to TPE with one objective. Optuna has no pruned trials
for several objectives, and NSGA-II and the GP sampler pass over those of one: there they are trials with the values
that they would have come to (`told.final_values`) that break a constraint `climbed` by a millionth, which ranks them
below all that was run whole and above all that breaks something.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from moesim.errors import BadInput
from moesim_tuner.records import Point, Trial, derived_seed
from moesim_tuner.search.told import final_values
from moesim_tuner.space import Parameter, Scalar, Space

__all__ = ["OptunaSampler", "check_gp"]

_GENERATION = "NSGAIISampler:generation"
_BARELY = 1e-6
_SMALL = 20
"""parameters that the GP sampler is for, at most"""


class _Told(optuna.trial.FrozenTrial):  # type: ignore[misc]
    """A finished trial, which a storage may share instead of copying it through and through: nothing changes it."""

    def __deepcopy__(self, memo: Any) -> _Told:
        return copy.copy(self)


class OptunaSampler:
    """kind: `tpe`, `nsga2` or `gp`. Raises BadInput for `gp` where PyTorch is not installed or the space is large."""

    def __init__(
        self,
        kind: str,
        space: Space,
        objectives: Sequence[str],
        signs: Sequence[int],
        constraints: Sequence[str],
        seed: int,
        trials: int,
    ) -> None:
        if kind == "gp":
            check_gp(space)
        self._kind, self._space, self._seed = kind, space, seed
        self._objectives, self._signs = tuple(objectives), tuple(signs)
        self._constraints = (*constraints, "memory", "legality", "climbed")
        self._startup = max(1, min(10, trials // 4))
        self._population = min(50, max(8, trials // 6))
        self._distributions = {p.name: _distribution(p) for p in space.parameters}
        self._trials: list[Trial] = []
        self._frozen: dict[int, _Told] = {}

    def tell(self, trial: Trial) -> None:
        """The next trial."""
        self._trials.append(trial)

    def propose(self, count: int, pending: Sequence[Point]) -> list[dict[str, Scalar]]:
        """`count` points; some may have been told before, and some may be alike."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is experimental in Optuna 5 (group, multivariate) is pinned by it
            study = optuna.create_study(
                directions=["maximize" if sign > 0 else "minimize" for sign in self._signs],
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
            for frozen in self._study_trials():
                study.add_trial(frozen)
            out = []
            for place in range(count):
                study.sampler = self._sampler(
                    derived_seed(self._seed, "propose", len(self._trials), len(pending) + place)
                )
                out.append(self._point(study.ask()))
        return out

    def _sampler(self, seed: int) -> Any:
        if self._kind == "tpe":
            return optuna.samplers.TPESampler(
                n_startup_trials=self._startup, multivariate=True, group=True, constant_liar=True, seed=seed,
                warn_independent_sampling=False,
            )  # fmt: skip
        if self._kind == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=self._population, seed=seed)
        return optuna.samplers.GPSampler(
            n_startup_trials=self._startup, seed=seed, deterministic_objective=True, warn_independent_sampling=False
        )

    def _point(self, trial: Any) -> dict[str, Scalar]:
        """The point that a trial is asked for, parameter by parameter, those that mean something."""
        point: dict[str, Scalar] = {}
        for p in self._space.parameters:  # those of a `when` stand before it
            if p not in self._space.active(point):
                continue
            found = _suggest(trial, p.name, self._distributions[p.name])
            point[p.name] = p.own(found) if p.values is None else p.values[int(found)]
        return point

    def _study_trials(self) -> list[_Told]:
        """The trials as Optuna is told them."""
        finals = final_values(self._trials, self._objectives)
        measured = [v for v in finals.values() if all(map(math.isfinite, v))]
        worst = tuple(
            (min if sign > 0 else max)((v[k] for v in measured), default=0.0) for k, sign in enumerate(self._signs)
        )
        out: list[_Told] = []
        for trial in self._trials:
            if trial.state == "failed":
                continue
            frozen = self._frozen.get(trial.number)
            if frozen is None:
                frozen = self._frozen[trial.number] = self._freeze(trial)
            if frozen.state != optuna.trial.TrialState.PRUNED:
                frozen = copy.copy(frozen)
                frozen.values = list(finals.get(trial.number, worst))
            if self._kind == "nsga2":
                frozen.system_attrs = {**frozen.system_attrs, _GENERATION: len(out) // self._population}
            out.append(frozen)
        return out

    def _freeze(self, trial: Trial) -> _Told:
        """One trial, but for the values of one that was not run whole."""
        single, pruned = len(self._signs) == 1, trial.state == "pruned"
        broken: dict[str, float] = dict.fromkeys(self._constraints, 0.0)
        broken |= trial.violations
        if trial.state in ("illegal", "infeasible") and trial.violation <= 0:
            broken["legality"] = 1.0
        as_pruned = pruned and single and self._kind == "tpe"
        if pruned and not as_pruned:
            broken["climbed"] = _BARELY
        rungs = {r: figures[self._objectives[0]] for r, figures in enumerate(trial.rungs)} if single else {}
        params: dict[str, Any] = {}
        for p in self._space.parameters:
            if p.name in trial.point and trial.point[p.name] in p:
                params[p.name] = p.own(trial.point[p.name]) if p.values is None else p.position(trial.point[p.name])
        made: Any = optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED if as_pruned else optuna.trial.TrialState.COMPLETE,
            values=None if as_pruned else [0.0] * len(self._signs),
            params=params,
            distributions={name: self._distributions[name] for name in params},
            intermediate_values={r: v for r, v in rungs.items() if not math.isnan(v)},
            constraints=broken,
        )
        made.__class__ = _Told
        told: _Told = made
        return told


def _suggest(trial: Any, name: str, d: Any) -> Any:
    if isinstance(d, CategoricalDistribution):
        return trial.suggest_categorical(name, d.choices)
    if isinstance(d, IntDistribution):
        return trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
    return trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)


def _distribution(p: Parameter) -> Any:
    """A parameter's values as Optuna has them: positions in `values`, ordered or not; a continuous one as it is."""
    if p.values is not None:
        number = len(p.values)
        return IntDistribution(0, number - 1) if p.ordered else CategoricalDistribution(tuple(range(number)))
    if p.whole:
        low, high = round(p.low), round(p.high)
        return IntDistribution(low, high, log=p.log, step=1 if p.log else round(p.step or 1))
    return FloatDistribution(p.low, p.high, log=p.log, step=None if p.log else p.step)


def check_gp(space: Space) -> None:
    """Raises BadInput where Optuna's GP sampler cannot be had."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise BadInput(
            "tune.sampler: gp is Optuna's Gaussian process, which needs PyTorch, and PyTorch is not installed. Install "
            "it, or set sampler to auto, whose own needs none"
        ) from None
    if len(space.parameters) > _SMALL:
        raise BadInput(
            f"tune.sampler: gp is for spaces of at most {_SMALL} parameters, and this one has {len(space.parameters)}. "
            "Set sampler to auto or tpe"
        )
