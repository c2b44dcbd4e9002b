"""What a `tune` block asks that only the tuner knows: names of figures, and how large the space is.

Problems have places as loading gives them (`file:line:col`). `moesim check` finds `note` by the entry-point group
`moesim.checks`. No Optuna is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moesim.errors import BadInput, Problem
from moesim.scenario.load import Scenario
from moesim.scenario.source import Source
from moesim.scenario.yamlio import load_yaml
from moesim.tune_spec import LimitSpec, TuneSpec
from moesim_tuner.figures import figure_problems, more_is_better
from moesim_tuner.space import Space

__all__ = ["check_figures", "note"]


def check_figures(path: str | Path, overrides: Sequence[str], scenario: Scenario) -> None:
    """Raises BadInput, with places in the file, for every objective or constraint that is no figure, that no run of
    this scenario has, or that holds an objective back."""
    spec = scenario.tune
    if spec is None:
        return
    found = list(figure_problems(scenario, spec, _sets(spec)))
    wrong = {spec.objectives[int(loc[2])] for loc, _ in found if loc[1] == "objectives"}
    for name in spec.objectives:
        if name in spec.constraints and name not in wrong:
            against = _against(more_is_better(name), spec.constraints[name])
            if against:
                found.append((("tune", "constraints", name), f"{name} is an objective, {against}"))
    if not found:
        return
    data, marks = load_yaml(Path(path))
    source = Source(data, marks)
    source.override(tuple(overrides))
    raise BadInput([Problem(source.where(loc, key=loc[1] == "constraints"), _told(loc, told)) for loc, told in found])


def _told(loc: tuple[str | int, ...], told: str) -> str:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    return f"{dotted}: {told}"


def _sets(spec: TuneSpec) -> set[str]:
    """The fields that the search sets."""
    return {
        path
        for name, p in spec.space.items()
        for fields in (p.choices.values() if isinstance(p.choices, dict) else [{name: None}])
        for path in fields
    }


def _against(more: bool, limit: LimitSpec) -> str | None:
    """An objective that a limit keeps from getting better."""
    if more and limit.max is not None:
        return f"and more of it is better, so at most {limit.max} works against it; write min, or remove max"
    if not more and limit.min is not None:
        return f"and less of it is better, so at least {limit.min} works against it; write max, or remove min"
    return None


def note(path: Path, overrides: Sequence[str], scenario: Scenario) -> str | None:
    """A line for `moesim check`: parameters, points, trials. None without a `tune` block. Raises BadInput where figures
    are wrong."""
    if scenario.tune is None:
        return None
    check_figures(path, overrides, scenario)
    space = Space(scenario.tune.space)
    points = "points without number" if space.count is None else _many(space.count, "point")
    outside = space.outside(space.point_of(scenario.raw, scenario.resolved))
    told = f"; the scenario's own value of {', '.join(outside)} is not in the space" if outside else ""
    return (
        f"tune: {_many(len(space.parameters), 'parameter')}, {points}, {_many(scenario.tune.trials, 'trial')} for "
        f"{', '.join(scenario.tune.objectives)}{told}"
    )


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
