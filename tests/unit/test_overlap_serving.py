"""Overlap of exchange and compute in a serving deployment: what must hold whatever the prices are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cost.pricer import Batch, Chunk
from moesim.cost.split import Splitter, split_tokens
from moesim.cost.step import StepPricer
from moesim.errors import BadInput
from moesim.overlap.timeline import bounds, play
from moesim.overlap.two_batch import Halves, two_batch_program
from moesim.scenario.load import Scenario
from moesim.simulate import RunResult, simulate
from tests.build import scenario, tiny_model

WIDE: dict[str, Any] = {
    "hidden_size": 4096,
    "num_layers": 3,
    "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "dense_intermediate_size": 8192,
    "moe": {"num_experts": 64, "top_k": 6, "intermediate_size": 1024, "first_dense_layers": 1},
}
CLOSED = {
    "format": "closed_loop",
    "concurrency": 256,
    "num_requests": 400,
    "prompt_tokens": {"distribution": "lognormal", "mean": 900, "cv": 0.5, "max": 4000},
    "output_tokens": {"distribution": "geometric", "mean": 30, "max": 90},
}


def deployed(folder: Path, overlap: dict[str, Any] | None, **parts: Any) -> Scenario:
    parts = {"parallel": {"dp": 16, "ep": 16}, "requests": CLOSED, "routing": {"popularity_zipf": 0.4}, **parts}
    return scenario(folder, tiny_model(folder, **WIDE), communication=overlap, **parts)


def served(case: Scenario) -> RunResult:
    result = simulate(case)
    assert isinstance(result, RunResult)
    assert result.outcome is not None
    return result


def time_ns(result: RunResult) -> int:
    assert result.outcome is not None
    return int(result.outcome.steps.duration_ns.sum())


@pytest.mark.parametrize(
    ("overlap", "parallel", "fidelity"),
    [
        ({"overlap": "pipeline"}, {"dp": 16, "ep": 16}, "count"),
        ({"overlap": "pipeline", "degree": 3, "sms": 20}, {"dp": 16, "ep": 16}, "token"),
        ({"overlap": "fsmoe"}, {"dp": 16, "ep": 4}, "count"),
        ({"overlap": "two_batch"}, {"dp": 16, "ep": 16}, "count"),
        ({"overlap": "two_batch", "sms": 20}, {"dp": 16, "ep": 16}, "token"),
    ],
)
def test_the_parts_add_up_to_the_simulated_time(
    tmp_path: Path, overlap: dict[str, Any], parallel: dict[str, int], fidelity: str
) -> None:
    requests = {**CLOSED, "num_requests": 60, "concurrency": 40}
    case = deployed(tmp_path, overlap, parallel=parallel, requests=requests, routing={"fidelity": fidelity})
    result = served(case)
    assert result.explanation is not None
    assert sum(result.explanation.ns.values()) == time_ns(result)
    assert all(ns >= 0 for ns in result.explanation.ns.values())
    told = result.to_json()["summary"]["overlap"]
    assert told["kind"] == overlap["overlap"]
    assert 0 <= told["hidden_share"] < 1


@pytest.mark.parametrize("fidelity", ["count", "token"])
def test_one_chunk_is_no_overlap(tmp_path: Path, fidelity: str) -> None:
    requests = {**CLOSED, "num_requests": 40, "concurrency": 20}
    plain, one = (
        served(deployed(tmp_path, c, requests=requests, routing={"fidelity": fidelity}))
        for c in (None, {"overlap": "pipeline", "degree": 1})
    )
    assert plain.outcome is not None
    assert one.outcome is not None
    np.testing.assert_array_equal(plain.outcome.steps.duration_ns, one.outcome.steps.duration_ns)


def test_the_best_degree_is_no_slower_than_any_given_one(tmp_path: Path) -> None:
    """A layer's tokens at once, so that nothing else than the degree differs: 16 ranks of 2,048 prompt tokens each."""
    found = {}
    for degree in (None, 1, 2, 4, 7):
        case = deployed(tmp_path, {"overlap": "pipeline", "degree": degree})
        found[degree] = pricer_of(case).moe.mixed_ns(*one_prompt_each(2048), 2048)[0]
    assert found[None] == min(found.values())
    assert found[None] < found[1]  # and here it hides something


def pricer_of(case: Scenario) -> StepPricer:
    """The pricer of a deployment that has served next to nothing."""
    assert case.requests is not None
    few = case.requests.model_copy(update={"num_requests": 1, "concurrency": 1})
    return served(dataclasses.replace(case, requests=few)).pricers[0]


def one_prompt_each(tokens: int) -> tuple[Batch, list[Chunk], list[int]]:
    none = np.zeros(0, np.int64)
    batch = Batch.idle(16, lambda: (none, none, none))
    return batch, [Chunk(d, d, 0, tokens, True) for d in range(16)], []


def decoding(number_D: np.ndarray, context: int) -> Batch:
    none = np.zeros(0, np.int64)
    batch = Batch.idle(len(number_D), lambda: (none, none, none))
    for d, number in enumerate(number_D.tolist()):
        batch.set(d, number, number * context, 0, 0)
    return batch


@pytest.mark.parametrize("sms", [0, 33])
def test_two_halves_are_the_program_played_rank_by_rank(tmp_path: Path, sms: int) -> None:
    """With 33 of 132 multiprocessors held by the exchange, everything that computes takes 4/3 as long."""
    pricer = pricer_of(deployed(tmp_path, {"overlap": "two_batch", "sms": sms}))
    assert isinstance(pricer.splitter, Splitter)
    slower = 1.0 / (1.0 - sms / 132)
    host = int(pricer.dense.blocks["first"][0].ns_N[0])
    number_D = np.array([96, 40, 64, 64, 7, 2, 64, 64, 64, 64, 64, 64, 64, 64, 64, 0])
    for number in set(number_D.tolist()):
        pricer.prepare(number)
    batch = decoding(number_D, 1500)
    run = pricer.decode(batch, 8)
    tokens_2D = split_tokens(number_D)
    assert tokens_2D is not None
    layers = pricer.moe.halves(batch, [], [], tokens_2D, "decode", 8)
    own: list[np.ndarray] = []
    for index, stage in enumerate(pricer.dense.program):
        table = next(t for t in pricer.dense.stages if t.stage == stage)
        both = []
        for half, part_D in enumerate(tokens_2D):
            padded = pricer.dense.pad[int(part_D.max())]
            assert pricer.full is not None
            steps = []
            for step in range(8):
                context_D = (batch.context_D + number_D * step) * part_D // np.maximum(number_D, 1)
                attention_D = pricer.full.decode_BC[part_D, context_D >> pricer.full.shift]
                steps.append(int((table.ns_N[padded] + stage.full * attention_D).max()))
            computed = np.rint((np.array(steps) - host * (index == 0)) * slower).astype(np.int64)
            both.append(computed + host * (index == 0 and half == 0))
        own.append(np.stack(both))
    experts = np.rint(layers.experts * slower).astype(np.int64)
    halves = Halves(own, list(layers.dispatch), list(experts), list(layers.combine))
    program = two_batch_program(halves, "shifted")
    played = play(program).makespan + int(pricer.dense.head_N[int(number_D.max())])
    np.testing.assert_array_equal(np.diff(run.cumulative_ns, prepend=0), played)
    assert (np.diff(run.cumulative_ns, prepend=0) >= np.maximum(*bounds(program))).all()


def test_a_rank_with_one_request_is_not_cut(tmp_path: Path) -> None:
    assert split_tokens(np.array([5, 1, 4])) is None
    assert split_tokens(np.array([0, 0])) is None
    found = split_tokens(np.array([5, 0, 4]))
    assert found is not None
    assert found.tolist() == [[3, 0, 2], [2, 0, 2]]
    cut, plain = (pricer_of(deployed(tmp_path, c)) for c in ({"overlap": "two_batch"}, None))
    number_D = np.array([40] * 15 + [1])
    for pricer in (cut, plain):
        pricer.prepare(40)
        pricer.prepare(1)
    runs = [p.decode(decoding(number_D, 900), 4).cumulative_ns for p in (cut, plain)]
    np.testing.assert_array_equal(*runs)


def test_two_batches_hide_the_exchange_of_prompts(tmp_path: Path) -> None:
    cut, plain = (pricer_of(deployed(tmp_path, c)) for c in ({"overlap": "two_batch"}, None))
    step = one_prompt_each(4096)
    run = cut.mixed(*step)
    assert run.key.halves == 2
    assert int(run.cumulative_ns[0]) < int(plain.mixed(*step).cumulative_ns[0])


@pytest.mark.parametrize("fidelity", ["count", "token"])
@pytest.mark.parametrize("overlap", ["two_batch", "pipeline"])
def test_running_ahead_changes_nothing(tmp_path: Path, fidelity: str, overlap: str) -> None:
    requests = {**CLOSED, "num_requests": 50, "concurrency": 36}
    parts: dict[str, Any] = {"requests": requests, "routing": {"fidelity": fidelity}}
    ahead, stepwise = (
        served(deployed(tmp_path, {"overlap": overlap}, engine={"run_ahead": run_ahead}, **parts))
        for run_ahead in (True, False)
    )
    assert ahead.outcome is not None
    assert stepwise.outcome is not None
    np.testing.assert_array_equal(ahead.outcome.steps.duration_ns, stepwise.outcome.steps.duration_ns)
    assert ahead.explanation is not None
    assert stepwise.explanation is not None
    np.testing.assert_allclose(ahead.explanation.stats, stepwise.explanation.stats)


@pytest.mark.parametrize("fidelity", ["count", "token"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_experts_move_between_steps_of_two_halves(tmp_path: Path, fidelity: str, asynchronous: bool) -> None:
    """Loads are those of both halves, and runs may be cut anywhere."""
    parts: dict[str, Any] = {
        "requests": {**CLOSED, "num_requests": 60, "concurrency": 40},
        "routing": {"fidelity": fidelity, "popularity_zipf": 1.0},
        "policies": {"placement": {"kind": "eplb", "num_redundant_experts": 16}},
        "rebalance": {"interval_steps": 20, "window_steps": 20, "asynchronous": asynchronous, "host_ms": 0.0},
    }
    ahead, stepwise = (
        served(deployed(tmp_path, {"overlap": "two_batch"}, engine={"run_ahead": run_ahead}, **parts))
        for run_ahead in (True, False)
    )
    assert ahead.outcome is not None
    assert stepwise.outcome is not None
    np.testing.assert_array_equal(ahead.outcome.steps.duration_ns, stepwise.outcome.steps.duration_ns)
    assert ahead.explanation is not None
    assert sum(ahead.explanation.ns.values()) == time_ns(ahead)
    assert ahead.to_json()["summary"]["rebalance"]["moved"] > 0
    assert any(run.key.halves == 2 for run in ahead.outcome.runs)


def test_what_cannot_overlap_is_refused(tmp_path: Path) -> None:
    refusals = {
        "there is none: parallel.dp=1": ({"dp": 1}, "pipeline"),
        r"16 / 16 = 1 ranks an expert, 8 GPUs a node, 16 ranks. Use ep 2, 4 or 8, or pipeline": (
            {"dp": 16, "ep": 16},
            "fsmoe",
        ),
        "split over ranks of one node, and several nodes": ({"dp": 8, "ep": 4}, "fsmoe"),
    }
    for told, (parallel, overlap) in refusals.items():
        with pytest.raises(BadInput, match=told):
            deployed(tmp_path, {"overlap": overlap}, parallel=parallel)
