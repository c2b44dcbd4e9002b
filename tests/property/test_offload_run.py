"""Whatever the tiers and policies: parts add up, bytes are conserved, caches and stores stay whole, bounds hold, and
run-ahead changes nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.offloaded import COUNTERS, OffloadDetail, OffloadedPricer
from moesim.simulate import RunResult, simulate
from moesim.tiers.links import LANES, REASONS
from tests.build import scenario, tiny_model

EXPERT = 3 * 64 * 32 * 2
LAYERS, EXPERTS, TOP_K = 3, 16, 2
SMALL = {
    "hidden_size": 64,
    "vocab_size": 128,
    "dense_intermediate_size": 64,
    "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16},
    "moe": {"num_experts": EXPERTS, "top_k": TOP_K, "intermediate_size": 32, "first_dense_layers": 1},
}
OFFLOADS = [
    "cached",
    {"kind": "cached", "warm": False},
    "mixtral_offloading",
    "fiddler",
    {"kind": "ktransformers", "strategy": "dynamic", "update_tokens": 4, "deferred_experts": 1},
    "llama_cpp",
]


@st.composite
def deployments(draw: st.DrawFn) -> dict[str, Any]:
    number = draw(st.integers(1, 5))
    requests = {
        "format": "closed_loop",
        "concurrency": draw(st.integers(1, number)),
        "num_requests": number,
        "prompt_tokens": draw(st.integers(1, 20)),
        "output_tokens": draw(st.integers(1, 8)),
    }
    if draw(st.booleans()):
        requests = {**requests, "format": "poisson", "rate_per_s": draw(st.sampled_from([50.0, 3000.0]))}
        del requests["concurrency"]
    tiers = {
        "experts": draw(st.sampled_from([1, 4, 9, 16])) * LAYERS * EXPERT / 2**30,
        "home": draw(st.sampled_from(["dram", "nvme"])),
        "host_copies": draw(st.booleans()),
        "staging": draw(st.integers(1, 3)),
        "pooled": draw(st.booleans()),
        "miss": draw(st.sampled_from(["evict", "bypass"])),
        "cold": draw(st.sampled_from(["miss", "hit"])),
        "completion": draw(st.sampled_from(["raced", "logical"])),
        "chunk": draw(st.sampled_from([None, 4096])),
    }
    if tiers["home"] == "nvme":
        tiers["dram"] = draw(st.sampled_from([1, 10, 48])) * EXPERT / 2**30
    offload = draw(st.sampled_from(OFFLOADS))
    if tiers["pooled"] and offload == "mixtral_offloading":
        offload = "cached"
    return {
        "requests": requests,
        "tiers": tiers,
        "policies": {
            "offload": offload,
            "eviction": draw(st.sampled_from(["lru", "lfu"])),
            "prefetch": draw(st.sampled_from(["none", "markov", "next_layer", "previous_token"])),
            "rebatching": draw(st.sampled_from(["none", "expertflow", "expert_queues"])),
        },
        "parallel": draw(st.sampled_from([{}, {"tp": 2}, {"tp": 2, "ep": 2}, {"replicas": 2}])),
        "engine": {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 4},
        "routing": {"popularity_zipf": 0.5, "pool_tokens": 256, "sequence_tokens": 32},
    }


@settings(max_examples=15, deadline=None)
@given(deployments())
def test_runs_add_up_and_stay_within_bounds(parts: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder, **SMALL)
        result = simulate(scenario(folder, model, **parts))
        stepped = simulate(scenario(folder, model, **{**parts, "engine": {**parts["engine"], "run_ahead": False}}))
    assert isinstance(result, RunResult)
    assert isinstance(stepped, RunResult)
    assert result.feasible, result.reasons
    assert result.outcome is not None
    assert stepped.outcome is not None
    np.testing.assert_array_equal(result.outcome.steps.duration_ns, stepped.outcome.steps.duration_ns)
    assert result.to_json()["summary"] == stepped.to_json()["summary"]
    details = [run.detail for run in result.outcome.runs]
    found = dict.fromkeys(COUNTERS, 0)
    moved = np.zeros((len(LANES), len(REASONS)), np.int64)
    for one, run in zip(details, result.outcome.runs, strict=True):
        assert isinstance(one, OffloadDetail)
        assert int(one.part_ns.sum()) == int(run.cumulative_ns[-1])
        assert (one.part_ns >= 0).all()
        assert sum(now.decoding for now in one.passes) == run.key.total_decode
        for name_, number in zip(COUNTERS, one.counters.tolist(), strict=True):
            found[name_] += number
        moved += one.moved
    tokens = sum(run.key.total_decode + run.key.total_prefill for run in result.outcome.runs)
    rows = found["hit_rows"] + found["late_rows"] + found["miss_rows"] + found["cpu_rows"]
    assert rows == tokens * TOP_K * LAYERS
    assert result.offload is not None
    size = result.offload.expert_bytes
    to_device = dict(zip(REASONS, moved[0].tolist(), strict=True))
    assert to_device["demand"] == found["loads"] * size
    assert to_device["stream"] == found["streams"] * size
    assert to_device["prefetch"] <= (found["prefetched"] - found["cancelled"]) * size + _updates(parts) * size
    for pricer in result.pricers:
        assert isinstance(pricer, OffloadedPricer)
        for rank in pricer.ranks:
            rank.driver.cache._check()
            rank.device.store._check()
            rank.device.links._check()
    cache = result.to_json()["summary"]["cache"]
    bound = cache["bound"]
    if bound is not None:
        assert bound["min"] <= bound["min_bypass"] + 1e-12
        if not cache["prefetch"] and parts["tiers"]["cold"] == "miss":
            best = bound["min_bypass"] if parts["tiers"]["miss"] == "bypass" else bound["min"]
            assert found["hits"] <= best * bound["look_ups"] + 1e-6
        assert bound["time_over_bound"] >= 1.0 - 1e-9


def _updates(parts: dict[str, Any]) -> int:
    """Experts that KTransformers' dynamic update may fetch: all of them after every prompt step."""
    offload = parts["policies"]["offload"]
    return 10_000 if isinstance(offload, dict) and offload["kind"] == "ktransformers" else 0
