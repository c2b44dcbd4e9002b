"""Twice the speed, half the time: every rate doubled and every latency, overhead and arrival time halved.

Operations are exactly twice as fast before they are rounded. Each is then rounded to a nanosecond, so twice a fast
operation differs from the slow one by at most 2 * 0.5 + 0.5 ns, and a run by that times the operations on its longest
path (`bound`). For rounding never to move an arrival across a step's end, both runs start from a device 4,096 times
as slow, whose steps last a second; then the schedules must be the same, step for step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.cost.operators import AttentionShape, MoEShape, Operators
from moesim.scenario.load import Scenario, load_profile
from moesim.simulate import RunResult, simulate
from tests.build import scenario, tiny_model

SLOW = 2.0**-12
PROFILES = sorted((Path(__file__).parents[2] / "hw_profiles").glob("*.yaml"))


def at_speed(scenario: Scenario, speed: float) -> Scenario:
    """Rates of the cluster and of arrivals times `speed`; latencies and the host's overhead divided by it."""
    requests, engine = scenario.requests, scenario.engine
    if requests.rate_per_s is not None:
        requests = requests.model_copy(update={"rate_per_s": requests.rate_per_s * speed})
    engine = engine.model_copy(update={"host_overhead_us": engine.host_overhead_us / speed})
    return dataclasses.replace(scenario, cluster=scenario.cluster.scaled(speed), requests=requests, engine=engine)


def bound(result: RunResult) -> NDArray[np.int64]:
    """ns that rounding may add up to by the end of each step: 1.5 an operation, at most 64 operations a layer (GEMMs,
    passes, collectives, kernels and chunks, at both sizes that a bank interpolates) and 64 outside the layers."""
    assert result.outcome is not None
    operations = 64 * (result.scenario.model.num_layers + 1)
    return (1.5 * operations * np.arange(1, result.outcome.steps.steps + 1)).astype(np.int64)


CLOSED: dict[str, Any] = {
    "format": "closed_loop", "concurrency": 12, "num_requests": 40,
    "prompt_tokens": {"distribution": "lognormal", "mean": 80, "cv": 1.0, "max": 900},
    "output_tokens": {"distribution": "geometric", "mean": 15, "max": 100},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "dense": {"model": {"moe": None}},
    "ep8": {"parallel": {"dp": 8, "ep": 8}, "policies": {"balancer": "least_loaded"}},
    "tp2": {"parallel": {"tp": 2}},
    "tp16_two_nodes": {
        "parallel": {"tp": 16},
        "model": {"attention": {"num_heads": 16}, "dense_intermediate_size": 512},
    },
    "ep16_two_nodes": {"parallel": {"dp": 16, "ep": 16}},
    "experts_split": {"parallel": {"dp": 4, "ep": 2}},
    "window": {"model": {"attention": {"window": 48, "layer_pattern": ["full", "window"]}}},
    "token": {"parallel": {"dp": 4, "ep": 4}, "routing": {"fidelity": "token"}},
    "closed": {"parallel": {"dp": 4, "ep": 4}, "requests": CLOSED},
    "eager": {"engine": {"cuda_graph": False, "host_overhead_us": 700.0}},
    "weights": {"parallel": {"dp": 4, "ep": 4}, "engine": {"weights_from": "nvme"}},
    "sglang": {"policies": {"batching": "sglang"}, "requests": CLOSED},
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_twice_the_speed_is_half_the_time(tmp_path: Path, case: str) -> None:
    parts = dict(CASES[case])
    model = tiny_model(tmp_path, **parts.pop("model", {}))
    base = scenario(tmp_path, model, **parts)
    slow, fast = simulate(at_speed(base, SLOW)), simulate(at_speed(base, 2 * SLOW))
    assert slow.outcome is not None
    assert fast.outcome is not None
    a, b = slow.outcome, fast.outcome
    assert int(a.steps.duration_ns.min()) > 10**9, "steps so long that a nanosecond changes no order"
    for column in ("run_group", "run_steps", "run_decoding", "run_waiting", "run_preempted"):
        np.testing.assert_array_equal(getattr(a.steps, column), getattr(b.steps, column), err_msg=column)
    limit = bound(slow)
    assert (np.abs(2 * b.steps.duration_ns - a.steps.duration_ns) <= limit[0]).all()
    for column in ("arrival_ns", "first_token_ns", "finish_ns"):
        here, there = getattr(a.requests, column), getattr(b.requests, column)
        assert here.max() > 0 or column == "arrival_ns"
        assert (np.abs(2 * there - here) <= limit[-1]).all(), column
    assert abs(2 * fast.ready_ns - slow.ready_ns) <= 2
    assert (slow.ready_ns > 0) == (case == "weights")
    compare_summaries(slow.to_json()["summary"], fast.to_json()["summary"])


def compare_summaries(slow: dict[str, Any], fast: dict[str, Any]) -> None:
    """Rates double, latencies halve, shares, balance, bytes and memory stay."""
    near = 1e-6
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        for figure in ("mean", "p50", "p90", "p99"):
            assert 2 * fast[name][figure] == pytest.approx(slow[name][figure], rel=near), (name, figure)
    for name, value in slow["throughput"].items():
        if name != "interval90":
            assert fast["throughput"][name] == pytest.approx(2 * value, rel=near), name
    assert fast["time_share"] == pytest.approx(slow["time_share"], abs=near)
    assert fast["memory"] == slow["memory"]
    assert fast["requests"] == slow["requests"]
    assert fast["tokens"] == slow["tokens"]
    if slow["balance"] is not None:
        assert fast["balance"]["max_over_mean_load"] == slow["balance"]["max_over_mean_load"]
        assert fast["balance"]["expert_idle_share"] == pytest.approx(slow["balance"]["expert_idle_share"], abs=near)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_operator_takes_half_the_time(path: Path, graph: bool) -> None:
    """Of every profile there is, before rounding: to 1e-12, and with the same grades."""
    profile = load_profile(path)
    slow, fast = Operators(profile, graph), Operators(profile.scaled(2.0), graph)
    n = np.unique(np.geomspace(1, 40_000, 60).astype(np.int64))
    size = n * 4096.0
    dtype = "bf16" if "bf16" in profile.flop_per_s else "fp32"
    gqa = AttentionShape("gqa", 32, 8, 128, 128, 0, dtype, "bf16")
    mla = AttentionShape("mla", 16, 16, 192, 128, 576, dtype, "bf16")
    window = dataclasses.replace(gqa, window=128)
    experts = MoEShape(4096, 1536, 16, 8, dtype)
    for name, call in {
        "gemm": lambda o: o.gemm(n, 4096, 4096, dtype),
        "moe": lambda o: o.moe(n, np.minimum(n, 16), -(-n // 16) * 16, n // 2, experts),
        "prefill": lambda o: o.attention_prefill(n, n + 100, gqa),
        "prefill_mla": lambda o: o.attention_prefill(n, n, mla),
        "decode": lambda o: o.attention_decode(np.minimum(n, 256), n * 50, gqa),
        "decode_mla": lambda o: o.attention_decode(np.minimum(n, 256), n * 50, mla),
        "decode_window": lambda o: o.attention_decode(np.minimum(n, 256), n * 50, window),
        "elementwise": lambda o: o.elementwise(size),
        "all_reduce": lambda o: o.all_reduce(size, 8, False),
        "all_gather": lambda o: o.all_gather(size, 16, True),
        "reduce_scatter": lambda o: o.reduce_scatter(size, 16, True),
        "all_to_all": lambda o: o.all_to_all(size, size / 8, 16, 2),
    }.items():
        a, b = call(slow), call(fast)
        assert (a.ns > 0).all(), name
        np.testing.assert_allclose(2 * b.ns, a.ns, rtol=1e-12, err_msg=name)
        np.testing.assert_array_equal(a.grade, b.grade, err_msg=name)
