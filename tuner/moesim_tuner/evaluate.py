"""A task becomes a row: the only thing that workers do. Pure: equal tasks give equal rows (but for elapsed_s)."""

from __future__ import annotations

import time
from pathlib import Path

from moesim.errors import BadInput
from moesim.observe import observe
from moesim.policy import load_plugin
from moesim.scenario.load import load_scenario_text
from moesim.simulate import simulate
from moesim_tuner.figures import figures_of
from moesim_tuner.records import Row, Task

__all__ = ["evaluate"]


def evaluate(task: Task) -> Row:
    """Simulate. A scenario that cannot be is an `illegal` row, one that does not fit `infeasible`; never an exception
    for what the task says."""
    began = time.perf_counter()
    for module in task.plugins:
        load_plugin(module)
    try:
        scenario = load_scenario_text(task.text, Path(task.base), task.overrides, task.seed, task.name)
        result = simulate(scenario)
    except BadInput as error:
        reasons = tuple(str(p) for p in error.problems)
        return Row("illegal", limits={"legality": 1.0}, reasons=reasons, elapsed_s=time.perf_counter() - began)
    if not result.feasible:
        return Row(
            "infeasible", limits={"memory": 1.0}, reasons=result.reasons, warnings=result.warnings,
            scenario_hash=scenario.hash, elapsed_s=time.perf_counter() - began,
        )  # fmt: skip
    return Row(
        "done", figures_of(result), {}, (), result.warnings, scenario.hash, time.perf_counter() - began,
        observe(result) if task.observe else None,
    )  # fmt: skip
