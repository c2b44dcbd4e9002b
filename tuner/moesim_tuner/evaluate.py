"""A task becomes a row: the only thing that workers do. Pure: equal tasks give equal rows (but for elapsed_s), whatever
the process ran before. What tasks have in common is computed once a process (`moesim.reuse`)."""

from __future__ import annotations

import time
from pathlib import Path

from moesim.errors import BadInput, MoesimError
from moesim.observe import observe
from moesim.policy import load_plugin
from moesim.reuse import Reuse, reusing
from moesim.scenario.load import load_scenario_text
from moesim.simulate import simulate
from moesim_tuner.figures import figures_of
from moesim_tuner.records import Row, Task

__all__ = ["debug_traceback", "evaluate"]

_REUSE = Reuse(limit_bytes=1 << 30)


def evaluate(task: Task) -> Row:
    """Simulate. A scenario that cannot be is an `illegal` row, one that does not fit `infeasible`, one that hits a
    mistake of ours or needs more memory than there is `failed`; never an exception for what the task says."""
    began = time.perf_counter()
    row = _guarded(task)
    return _timed(row, time.perf_counter() - began)


def _timed(row: Row, elapsed_s: float) -> Row:
    return Row(
        row.state, row.figures, row.limits, row.reasons, row.warnings, row.scenario_hash, elapsed_s, row.observation
    )


def _guarded(task: Task) -> Row:
    try:
        with reusing(_REUSE):
            return _simulated(task)
    except BadInput as error:
        return Row("illegal", limits={"legality": 1.0}, reasons=tuple(str(p) for p in error.problems))
    except MoesimError as error:
        return Row("failed", reasons=(one_line(error),))
    except MemoryError:
        return Row("failed", reasons=("the simulation needs more memory than this machine has",))
    except Exception as error:  # noqa: BLE001  a mistake of ours, or of a plugin's, ends a trial and not the search
        debug_traceback()
        return Row("failed", reasons=(one_line(error),))


def one_line(error: BaseException) -> str:
    """Type and message of an error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def _simulated(task: Task) -> Row:
    for module in task.plugins:
        load_plugin(module)
    scenario = load_scenario_text(task.text, Path(task.base), task.overrides, task.seed, task.name)
    result = simulate(scenario)
    if not result.feasible:
        return Row(
            "infeasible", limits={"memory": 1.0}, reasons=result.reasons, warnings=result.warnings,
            scenario_hash=scenario.hash,
        )  # fmt: skip
    return Row(
        "done", figures_of(result), {}, (), result.warnings, scenario.hash, 0.0,
        observe(result) if task.observe else None,
    )  # fmt: skip


def debug_traceback() -> None:
    """The traceback of the error that is being handled on stderr, where MOESIM_DEBUG is set (`--debug` sets it)."""
    import os
    import traceback

    if os.environ.get("MOESIM_DEBUG"):
        traceback.print_exc()
