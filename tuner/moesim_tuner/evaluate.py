"""A task becomes a row: the only thing that workers do. Pure: equal tasks give equal rows (but for elapsed_s), whatever
the process ran before. What tasks have in common is computed once a process (`moesim.reuse`)."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import replace
from pathlib import Path

from moesim.errors import BadInput, Infeasible
from moesim.policy import load_plugin
from moesim.record import REJECTED
from moesim.reuse import Reuse, reusing
from moesim.run_result import RunResult
from moesim.scenario.load import Scenario, load_scenario_text
from moesim.simulate import simulate
from moesim_tuner.figures import figures_of, observed
from moesim_tuner.records import Row, Task

__all__ = ["evaluate"]

_REUSE = Reuse(limit_bytes=1 << 30)


def evaluate(task: Task) -> Row:
    """Simulate. A scenario that cannot be is an `illegal` row, one that does not fit `infeasible` (limits: by how
    much), one that meets a mistake of ours or of a plugin, or a machine without the memory to simulate it, `failed`;
    never an exception for what the task says. A row has the scenario's hash as soon as there is a scenario."""
    began = time.perf_counter()
    with reusing(_REUSE):
        row = _row(task)
    return replace(row, elapsed_s=time.perf_counter() - began)


def _row(task: Task) -> Row:
    known = ""
    try:
        for module in task.plugins:
            load_plugin(module)
        scenario = load_scenario_text(task.text, Path(task.base), task.overrides, task.seed, task.name)
        known = scenario.hash
        return _simulated(scenario, task.observe)
    except BadInput as error:
        reasons = tuple(str(p) for p in error.problems)
        return Row("illegal", limits={"legality": 1.0}, reasons=reasons, scenario_hash=known)
    except Infeasible as error:  # a policy found out while it ran
        return _infeasible(error.reasons, error.over, (), known)
    except MemoryError:
        reason = "MemoryError: simulating this takes more memory than a worker can have"
        return Row("failed", reasons=(reason,), scenario_hash=known)
    except Exception as error:  # noqa: BLE001  a mistake of ours, or of a plugin's, ends a trial and not the search
        if os.environ.get("MOESIM_DEBUG"):
            traceback.print_exc()
        return Row("failed", reasons=(_one_line(error),), scenario_hash=known)


def _simulated(scenario: Scenario, watch: bool) -> Row:
    result = simulate(scenario)
    if not result.feasible:
        return _infeasible(result.reasons, result.over, result.warnings, scenario.hash)
    figures, warnings = figures_of(result), result.warnings
    if isinstance(result, RunResult) and result.outcome is not None:
        rejected = result.outcome.requests.target == REJECTED
        figures["rejected_share"] = float(rejected.mean())
        if rejected.any():
            told = f"{int(rejected.sum()):,} of {len(rejected):,} were rejected"
            warnings = (*warnings, f"requests: {told}: longer than max_model_len, or than the KV cache holds")
    return Row("done", figures, {}, (), warnings, scenario.hash, 0.0, observed(result) if watch else None)


def _infeasible(reasons: tuple[str, ...], over: float | None, warnings: tuple[str, ...], known: str) -> Row:
    """over: memory that is missing as a share of what is there; where no number says so, all of it."""
    return Row("infeasible", {}, {"memory": 1.0 if over is None else over}, reasons, warnings, known)


def _one_line(error: BaseException) -> str:
    """Type, message and place of a mistake, on one line."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:500]}{where}"
