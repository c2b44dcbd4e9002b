"""A study as rows of Optuna's tables, as Optuna 5 writes them: `optuna.load_study` and its dashboard open it.

A trial that climbed every rung is COMPLETE, with its constraints; one that was stopped is PRUNED, and so is one that
was not legal or did not fit: it has constraints and no values. FAIL is left to those of which a worker died.
"""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from moesim.tune_spec import ParameterSpec
from moesim_tuner.figures import more_is_better
from moesim_tuner.records import Trial
from moesim_tuner.space import Parameter, Scalar, Space
from moesim_tuner.store.identity import ordered

__all__ = ["TRIAL", "Rows", "directions"]

TRIAL = "moesim:trial"
"""user attribute: the whole trial"""
_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "illegal": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def directions(definition: Mapping[str, Any]) -> list[Any]:
    """Optuna's directions of the objectives."""
    return [
        StudyDirection.MAXIMIZE if more_is_better(name) else StudyDirection.MINIMIZE
        for name in definition["spec"]["objectives"]
    ]


class Rows:
    """Rows of the trials of one study."""

    def __init__(self, definition: Mapping[str, Any]) -> None:
        """From its JSON (`Definition.to_json`)."""
        spec = definition["spec"]
        specs = {name: ParameterSpec.model_validate_json(ordered(p)) for name, p in spec["space"].items()}
        self._distributions = {p.name: _distribution(p) for p in Space(specs).parameters}
        self._json = {name: optuna.distributions.distribution_to_json(d) for name, d in self._distributions.items()}
        self._objectives: list[str] = spec["objectives"]

    def of(self, trial: Trial) -> dict[str, list[dict[str, Any]]]:
        """Table -> rows of a trial, without its id."""
        failed = trial.state == "failed"
        steps = enumerate(trial.rungs) if len(self._objectives) == 1 else ()  # as Optuna: no reports of several
        return {
            "trial_params": [row for name, value in trial.point.items() for row in self._param(name, value)],
            "trial_values": [
                {"objective": i, "value": value, "value_type": "FINITE"}
                for i, value in enumerate(() if failed else trial.values)
            ],
            "trial_intermediate_values": [
                {"step": i, "intermediate_value": figures[self._objectives[0]], "intermediate_value_type": "FINITE"}
                for i, figures in steps
                if self._objectives[0] in figures
            ],
            "trial_system_attributes": _attributes({f"constraints:{k}": v for k, v in trial.violations.items()}),
            "trial_user_attributes": _attributes(
                {
                    "origin": trial.origin,
                    "state": trial.state,
                    "feasible": trial.feasible,
                    "reasons": list(trial.reasons),
                    "scenario_hash": trial.scenario_hash,
                    TRIAL: trial.to_json(),
                }
            ),
        }

    def head(self, trial: Trial, study_id: int) -> dict[str, Any]:
        """The row of table `trials`."""
        return {
            "number": trial.number,
            "study_id": study_id,
            "state": _STATES[trial.state],
            "datetime_start": _utc(trial.started_s),
            "datetime_complete": _utc(trial.ended_s),
        }

    def _param(self, name: str, value: Scalar) -> list[dict[str, Any]]:
        """None where the value is outside the space, as a setting of the scenario may be: Optuna would refuse it."""
        d = self._distributions.get(name)
        if d is None:
            return []
        if isinstance(d, optuna.distributions.CategoricalDistribution):
            same = [i for i, choice in enumerate(d.choices) if type(choice) is type(value) and choice == value]
            inside = float(same[0]) if same else None
        elif isinstance(value, bool) or not isinstance(value, int | float):
            inside = None
        else:
            inside = float(value) if d._contains(float(value)) else None
        if inside is None:
            return []
        return [{"param_name": name, "param_value": inside, "distribution_json": self._json[name]}]


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in values.items()]


def _utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).replace(tzinfo=None)


def _distribution(p: Parameter) -> Any:
    """A parameter as one of Optuna's: a range on its own axis and scale, which is how the dashboard draws it; choices
    as choices."""
    d = optuna.distributions
    if p.values is None:
        if p.whole:
            return d.IntDistribution(round(p.low), round(p.high), log=p.log, step=round(p.step or 1))
        return d.FloatDistribution(p.low, p.high, log=p.log, step=p.step)
    numbers = [v for v in p.values if isinstance(v, int | float) and not isinstance(v, bool)]
    if p.sets is not None or len(numbers) < len(p.values) or len(numbers) < 2:
        return d.CategoricalDistribution(p.values)
    low, high = numbers[0], numbers[-1]
    whole = all(isinstance(v, int) for v in numbers)
    if p.log:
        return d.IntDistribution(int(low), int(high), log=True) if whole else d.FloatDistribution(low, high, log=True)
    step = numbers[1] - numbers[0]
    if whole:
        return d.IntDistribution(int(low), int(high), step=int(step))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a last step that is short by a rounding
        return d.FloatDistribution(low, high, step=step)
