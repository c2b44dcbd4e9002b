"""Studies of made-up trials, for reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesim_tuner.definition import Definition
from moesim_tuner.records import Trial, TrialState

from moesim.tune_spec import RungSpec, TuneSpec

SPEC = {
    "space": {"engine.max_num_seqs": {"choices": [16, 32, 64]}, "parallel.ep": {"range": [1, 99]}},
    "objectives": ["ttft_p99_ms", "output_tok_per_s"],
    "constraints": {"tpot_p99_ms": {"max": 100}},
    "trials": 40,
}


def definition(objectives: int = 2, asynchronous: bool = False) -> Definition:
    spec = TuneSpec.model_validate({**SPEC, "objectives": SPEC["objectives"][:objectives]})  # type: ignore[index]
    return Definition("", "world", ".", spec, "tpe", (RungSpec(),), asynchronous=asynchronous)


def trial(
    number: int, ttft: float, rate: float, tpot: float = 50, state: TrialState = "complete", **more: Any
) -> Trial:
    done = state in ("complete", "pruned")
    point = {"engine.max_num_seqs": 16, "parallel.ep": number + 1}
    limits = {"tpot_p99_ms": (tpot - 100) / 100} if done else {"memory": 0.5}
    figures = {"ttft_p99_ms": ttft, "output_tok_per_s": rate, "tpot_p99_ms": tpot}
    return Trial(
        number, point, more.pop("origin", "tpe"), state, (ttft, rate) if done else (), limits,
        (figures,) if done else (), () if done else ("too large",), ended_s=more.pop("ended_s", 0.0),
    )  # fmt: skip


@dataclass
class Found:
    """A finding."""

    definition: Definition
    trials: list[Trial]
    name: str = "world"
    judgement: Mapping[str, Any] | None = None
    why: Mapping[str, Any] | None = None
