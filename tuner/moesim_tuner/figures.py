"""Figures of a run that can be objectives or constraints: those of `moesim.observe`, and a few of the tuner's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moesim.observe import FIGURES, observe
from moesim.scenario.load import Scenario
from moesim.simulate import RunResult
from moesim.training.result import TrainingResult
from moesim.tune_spec import TuneSpec
from moesim.tune_values import nearest_name

__all__ = ["figure_problems", "figures_of", "more_is_better", "violation"]

_OWN = {"goodput_req_per_s": True}
"""name -> more is better"""


def more_is_better(name: str) -> bool:
    """The direction in which a figure is better. Raises KeyError for an unknown one."""
    return _OWN[name] if name in _OWN else FIGURES[name].more_is_better


def figures_of(result: RunResult | TrainingResult) -> dict[str, float]:
    """Every figure of a feasible run, by name."""
    found = {name: seen.value for name, seen in observe(result).figures.items()}
    goodput = result.to_json()["summary"].get("goodput_req_per_s")
    if goodput is not None:
        found["goodput_req_per_s"] = float(goodput)
    return found


def violation(figures: Mapping[str, float], name: str, low: float | None, high: float | None) -> float:
    """How far a figure lies outside its limits, as a share of the limit; <= 0 inside. A figure that the run does not
    have breaks it by 1."""
    value = figures.get(name)
    if value is None:
        return 1.0
    over = [] if high is None else [(value - high) / max(abs(high), 1e-12)]
    under = [] if low is None else [(low - value) / max(abs(low), 1e-12)]
    return max(over + under)


def figure_problems(
    scenario: Scenario, spec: TuneSpec, sets: Iterable[str] = ()
) -> list[tuple[tuple[str | int, ...], str]]:
    """What is wrong with a study's objectives and constraints: the place in the scenario and a sentence, for each.
    sets: dotted paths of the fields that the search sets."""
    named: list[tuple[tuple[str | int, ...], str]] = [
        (("tune", "objectives", i), name) for i, name in enumerate(spec.objectives)
    ]
    named += [(("tune", "constraints", name), name) for name in spec.constraints]
    known = {*FIGURES, *_OWN}
    out = []
    for loc, name in named:
        if name not in known:
            near = nearest_name(name, known)
            hint = f" Did you mean {near}?" if near else ""
            out.append((loc, f"unknown figure {name!r}.{hint} Known: {', '.join(sorted(known))}."))
        elif name == "goodput_req_per_s" and scenario.slo is None and "slo" not in {p.split(".")[0] for p in sets}:
            out.append((loc, f"{name}: the scenario has no slo; add one, or choose another figure"))
    return out
