"""Figures of a run that can be objectives or constraints: those of `moesim.observe`, and a few of the tuner's own."""

from __future__ import annotations

from collections.abc import Mapping

from moesim.observe import FIGURES, observe
from moesim.simulate import RunResult
from moesim.training.result import TrainingResult

__all__ = ["figures_of", "more_is_better", "violation"]

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
