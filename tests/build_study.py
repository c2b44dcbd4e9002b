"""Small studies for tests of what keeps them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

from moesim_tuner.definition import Definition
from moesim_tuner.records import Candidate, Trial

from moesim.tune_spec import RungSpec, TuneSpec

TUNE: dict[str, Any] = {
    "space": {
        "parallel.ep": {"range": [8, 64], "step": 8},
        "policies.placement": {"choices": ["contiguous", "eplb"]},
        "engine.max_num_seqs": {"log_range": [16, 1024], "factor": 2},
        "routing.popularity_zipf": {"range": [0.0, 1.5]},
        "layout": {"choices": {"a": {"parallel.tp": 1}, "b": {"parallel.tp": 2}}},
        "policies.placement.num_redundant_experts": {"choices": [0, 32], "when": {"policies.placement": "eplb"}},
    },
    "objectives": ["output_tok_per_s"],
    "constraints": {"ttft_p99_ms": {"max": 60}},
    "trials": 40,
    "batch": 4,
}


def definition(text: str = "seed: 1\n", base: str = ".", **tune: Any) -> Definition:
    """Of a study that nobody simulates."""
    spec = TuneSpec.model_validate({**TUNE, **tune})
    return Definition(text, "world", base, spec, "tpe", (RungSpec(set={"requests.num_requests": 10}), RungSpec()))


def candidate(number: int) -> Candidate:
    """The point that is tried as trial `number`."""
    point: dict[str, Any] = {
        "parallel.ep": 8 + 8 * (number % 8),
        "policies.placement": "eplb" if number % 2 else "contiguous",
        "engine.max_num_seqs": 16 << (number % 7),
        "routing.popularity_zipf": (number * 37 % 150) / 100,
        "layout": "ab"[number % 3 % 2],
    }
    if number % 2:
        point["policies.placement.num_redundant_experts"] = 32
    return Candidate(point, "default" if number == 0 else "tpe")


def trial(number: int, changes: float = 0.0, objectives: int = 1, clock_s: float = 1.7e9) -> Trial:
    """What it comes to: mostly complete, some pruned, infeasible, illegal, failed."""
    state = ("complete", "complete", "pruned", "complete", "infeasible", "complete", "illegal", "complete", "failed")[
        number % 9
    ]
    point, origin = candidate(number).point, candidate(number).origin
    clocks = (clock_s + number, clock_s + number + 0.5)
    value = 100.0 / 3 * (number + 1) + changes
    if state in ("complete", "pruned"):
        figures = {"output_tok_per_s": value, "tpot_mean_ms": 1e-7 * value, "ttft_p99_ms": 60.0 + number - 5}
        rungs = (figures,) if state == "pruned" else ({**figures, "output_tok_per_s": value / 2}, figures)
        values = (value, value / 7)[:objectives]
        broken = {"ttft_p99_ms": (number - 5) / 60}
        return Trial(number, point, origin, state, values, broken, rungs, (), "5" * 16, *clocks)  # type: ignore[arg-type]
    limits = {"infeasible": {"memory": 0.25}, "illegal": {"legality": 1.0}, "failed": {}}[state]
    reasons = (f"line 1 of “{state}”,\nline 2",)
    return Trial(number, point, origin, state, (), limits, (), reasons, "", *clocks)  # type: ignore[arg-type]


def fill(store: Any, first: int, last: int, batch: int = 4, **how: Any) -> None:
    """Propose and append trials `first` to `last`, the first of a batch to before the first of another."""
    for start in range(first, last, batch):
        store.propose(start, [candidate(n) for n in range(start, start + batch)])
        for n in range(start, start + batch):
            store.append([trial(n, **how)])


def in_child(what: Callable[[], None]) -> None:
    """Run `what` in a fork of this process; it must not raise."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            what()
            code = 0
        except BaseException:  # noqa: BLE001 the child must not go on into pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
