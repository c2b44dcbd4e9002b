"""Run-ahead gives the step-by-step engine's times to the nanosecond, whatever cuts the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.simulate import RunResult, simulate
from tests.build import scenario, tiny_model

WINDOW = {"attention": {"window": 48, "layer_pattern": ["full", "window"]}}
DENSE: dict[str, Any] = {"moe": None}


def both(folder: Path, **parts: Any) -> tuple[RunResult, RunResult]:
    engine = parts.pop("engine", {})
    return tuple(  # type: ignore[return-value]
        simulate(scenario(folder, engine={**engine, "run_ahead": ahead}, **parts)) for ahead in (True, False)
    )


def assert_equal(ahead: RunResult, single: RunResult) -> None:
    assert ahead.outcome is not None
    assert single.outcome is not None
    a, b = ahead.outcome, single.outcome
    assert b.steps.run_steps.max() == 1
    for name in ("arrival_ns", "first_token_ns", "finish_ns", "target", "preemptions"):
        np.testing.assert_array_equal(getattr(a.requests, name), getattr(b.requests, name), err_msg=name)
    assert a.steps.steps == b.steps.steps
    assert sorted(a.steps.stall_ns) == sorted(b.steps.stall_ns)
    order = [np.lexsort((s.per_step(s.run_group), s.start_ns())) for s in (a.steps, b.steps)]
    for column in ("run_group", "run_decoding"):
        pair = [s.per_step(getattr(s, column))[o] for s, o in zip((a.steps, b.steps), order, strict=True)]
        np.testing.assert_array_equal(*pair, err_msg=column)
    np.testing.assert_array_equal(a.steps.duration_ns[order[0]], b.steps.duration_ns[order[1]])
    assert ahead.explanation is not None
    assert single.explanation is not None
    assert sum(ahead.explanation.ns.values()) == sum(single.explanation.ns.values())
    assert ahead.to_json()["summary"]["rebalance"] == single.to_json()["summary"]["rebalance"]


CASES: dict[str, dict[str, Any]] = {
    "dense": {"model": DENSE},
    "window": {"model": WINDOW},
    "ep8": {"parallel": {"dp": 8, "ep": 8}},
    "ep64": {"parallel": {"dp": 64, "ep": 64}},
    "tp2dp4": {"parallel": {"tp": 2, "dp": 4, "ep": 8}},
    "experts_split": {"parallel": {"dp": 4, "ep": 2}},
    "tensor_parallel": {"parallel": {"tp": 4, "ep": 1}},
    "sglang": {"policies": {"batching": "sglang"}, "parallel": {"dp": 4, "ep": 4}},
    "replicas": {"parallel": {"dp": 2, "ep": 2, "replicas": 3}, "policies": {"balancer": "least_loaded"}},
    "token": {"parallel": {"dp": 4, "ep": 4}, "routing": {"fidelity": "token"}},
    "token_replicas": {
        "parallel": {"dp": 4, "ep": 4},
        "routing": {"fidelity": "token"},
        "policies": {"placement": {"kind": "eplb", "num_redundant_experts": 16}},
    },
    "token_tp": {"parallel": {"tp": 2, "dp": 4, "ep": 8}, "routing": {"fidelity": "token"}},
    "eplb": {"parallel": {"dp": 8, "ep": 8}, "policies": {"placement": {"kind": "eplb", "num_redundant_experts": 8}}},
}
EPLB = {"policies": {"placement": {"kind": "eplb", "num_redundant_experts": 8}}, "parallel": {"dp": 8, "ep": 8}}
SOON = {"interval_steps": 23, "window_steps": 17, "first_after_steps": 5, "host_ms": 3.0}
CASES |= {
    "rebalance": {**EPLB, "rebalance": SOON},
    "rebalance_chunks": {**EPLB, "rebalance": {**SOON, "layers_per_chunk": 1}, "routing": {"fidelity": "token"}},
    "rebalance_async": {**EPLB, "rebalance": {**SOON, "asynchronous": True, "layer_ms": 4.0}},
    "rebalance_async_token": {
        **EPLB,
        "rebalance": {**SOON, "asynchronous": True, "layer_ms": 4.0, "relabel_ranks": True},
        "routing": {"fidelity": "token", "drift": 0.5},
    },
    "rebalance_threshold": {**EPLB, "rebalance": {**SOON, "threshold": 0.7}, "routing": {"fidelity": "token"}},
}
SMALL_KV = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "block_size": 4}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_stepping(tmp_path: Path, case: str, seed: int) -> None:
    parts = dict(CASES[case])
    model = tiny_model(tmp_path, **parts.pop("model", {}))
    assert_equal(*both(tmp_path, model=model, seed=seed, **parts))


@pytest.mark.parametrize("batching", ["vllm_v1", {"kind": "sglang", "new_token_ratio": 0.0}], ids=["vllm", "sglang"])
@pytest.mark.parametrize("balancer", ["round_robin", "least_loaded"])
def test_equal_when_blocks_run_out(tmp_path: Path, batching: Any, balancer: str) -> None:
    """Little memory: prompts in chunks, preemptions and recomputation; a closed loop over replicas."""
    # SGLang's estimate counts every layer as full, so only without windows can it run out
    model = tiny_model(tmp_path, **(WINDOW if batching == "vllm_v1" else {}))
    found = 0
    for seed in range(3):
        parts = {
            "model": model,
            "seed": seed,
            "parallel": {"dp": 2, "ep": 2, "replicas": 2},
            "policies": {"batching": batching, "balancer": balancer},
            "requests": {
                "format": "closed_loop",
                "concurrency": 48,
                "num_requests": 120,
                "prompt_tokens": {"distribution": "lognormal", "mean": 120, "cv": 0.8, "max": 500},
                "output_tokens": {"distribution": "geometric", "mean": 60, "max": 300},
            },
            "engine": {**SMALL_KV, "gpu_memory_utilization": utilization(tmp_path, model, 900)},
        }
        ahead, single = both(tmp_path, **parts)
        assert_equal(ahead, single)
        assert ahead.outcome is not None
        found += int(ahead.outcome.requests.preemptions.sum())
    assert found > 0, "the case must preempt to test preemption"


def utilization(folder: Path, model: str, tokens: int) -> float:
    """A gpu_memory_utilization that leaves a KV cache of about `tokens` tokens."""
    result = simulate(scenario(folder, model, parallel={"dp": 2, "ep": 2}, engine=SMALL_KV))
    assert result.memory is not None
    m = result.memory
    kv = tokens // SMALL_KV["block_size"] * 4 * m.kv_unit
    return (m.fixed + kv) / m.capacity
