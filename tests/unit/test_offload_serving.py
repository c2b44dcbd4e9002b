"""Runs with memory tiers: what they must equal, what they must add up to, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cost.offload_times import CpuPrices
from moesim.cost.offloaded import COUNTERS, OffloadDetail, OffloadedPricer
from moesim.errors import BadInput
from moesim.scenario.load import Scenario, scenario_from_dict
from moesim.simulate import RunResult, simulate
from moesim.tiers.links import LANES, REASONS
from moesim.tiers.records import PARTS
from moesim.tiers_spec import CpuSpec
from tests.build import scenario, tiny_model

EXPERT = 3 * 256 * 128 * 2
LAYERS, EXPERTS, TOP_K = 3, 64, 4
CLOSED = {"format": "closed_loop", "concurrency": 3, "num_requests": 6, "prompt_tokens": 12, "output_tokens": 8}
ALONE = {**CLOSED, "concurrency": 1, "num_requests": 1}
ROUTING = {"popularity_zipf": 0.5, "fidelity": "token"}


def tiered(folder: Path, slots: float = 16, requests: dict[str, Any] | None = None, **parts: Any) -> Scenario:
    """So many experts of each layer fit on the device."""
    tiers = {"experts": slots * LAYERS * EXPERT / 2**30, **parts.pop("tiers", {})}
    policies = {"offload": "cached", **parts.pop("policies", {})}
    more = {"routing": ROUTING, "engine": {"max_num_batched_tokens": 64, "max_num_seqs": 8}, **parts}
    return scenario(folder, requests=requests or CLOSED, tiers=tiers, policies=policies, **more)


def run(s: Scenario) -> RunResult:
    result = simulate(s)
    assert isinstance(result, RunResult)
    assert result.feasible, result.reasons
    return result


def details(result: RunResult) -> list[OffloadDetail]:
    assert result.outcome is not None
    out = [run.detail for run in result.outcome.runs]
    assert all(isinstance(d, OffloadDetail) for d in out)
    return out  # type: ignore[return-value]


def counted(result: RunResult) -> dict[str, int]:
    return dict(zip(COUNTERS, np.sum([d.counters for d in details(result)], axis=0).tolist(), strict=True))


def moved(result: RunResult, lane: str, *reasons: str) -> int:
    total = np.sum([d.moved for d in details(result)], axis=0)
    return int(sum(total[LANES.index(lane), REASONS.index(r)] for r in reasons))


def events(result: RunResult) -> list[Any]:
    return [log.table.tolist() for p in result.pricers if isinstance(p, OffloadedPricer) for log in p.logs]


# ---- what it must equal


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, {}),
        ({}, {"parallel": {"tp": 2}}),
        ({}, {"parallel": {"tp": 4, "ep": 4}}),
        ({"moe": {"first_dense_layers": 0, "layer_step": 2, "shared_intermediate_size": 128}}, {}),
        ({"attention": {"layer_pattern": ["window", "full"], "window": 16}}, {}),
        pytest.param({}, {"cluster": {"device": "h100_sxm", "nodes": 1, "gpus_per_node": 8}}, marks=pytest.mark.slow),
    ],
)
def test_with_all_experts_there_steps_take_what_they_take_without_tiers(
    tmp_path: Path, changes: dict[str, Any], parts: dict[str, Any]
) -> None:
    model = tiny_model(tmp_path, **changes)
    poisson = {"format": "poisson", "rate_per_s": 300.0, "num_requests": 8, "prompt_tokens": 60, "output_tokens": 12}
    common = {"requests": poisson, "routing": ROUTING, **parts}
    plain = run(scenario(tmp_path, model, **common))
    tiers = {"kv_tokens": 100_000, "fit_share": 0.0}
    both = run(scenario(tmp_path, model, tiers=tiers, policies={"offload": "cached"}, **common))
    assert plain.outcome is not None
    assert both.outcome is not None
    np.testing.assert_array_equal(plain.outcome.steps.duration_ns, both.outcome.steps.duration_ns)
    np.testing.assert_array_equal(plain.outcome.requests.finish_ns, both.outcome.requests.finish_ns)
    assert plain.explanation is not None
    assert both.explanation is not None
    found = dict(both.explanation.ns)
    found["experts"] += found.pop("rank_wait", 0)
    assert found == plain.explanation.ns
    assert counted(both)["hits"] == sum(counted(both)[k] for k in ("hits", "late", "loads", "streams", "on_cpu"))


@pytest.mark.parametrize("key", ["offload", "rebatching"])
def test_steps_are_the_same_with_and_without_run_ahead(tmp_path: Path, key: str) -> None:
    kinds: dict[str, Any] = {"prefetch": "markov", "offload": {"kind": "ktransformers"}, "rebatching": "expertflow"}
    parts: dict[str, Any] = {"policies": {key: kinds[key]}}
    ahead = run(tiered(tmp_path, **parts))
    engine = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "run_ahead": False}
    stepped = run(tiered(tmp_path, **parts, engine=engine))
    assert ahead.outcome is not None
    assert stepped.outcome is not None
    np.testing.assert_array_equal(ahead.outcome.steps.duration_ns, stepped.outcome.steps.duration_ns)
    assert events(ahead) == events(stepped)


def test_logical_completion_decides_alike_on_any_link(tmp_path: Path) -> None:
    times, stalls, seen = [], [], []
    for rate in (1, 8, 64):
        cluster = {"device": "h100_sxm_datasheet", "nodes": 1, "gpus_per_node": 8, "pcie_gb_per_s": rate}
        result = run(
            tiered(tmp_path, cluster=cluster, tiers={"completion": "logical"}, policies={"prefetch": "markov"})
        )
        seen.append(events(result))
        parts = np.sum([d.part_ns for d in details(result)], axis=0)
        times.append(int(parts.sum()))
        stalls.append(int(parts[PARTS.index("stall")]))
    assert len({ns - stall for ns, stall in zip(times, stalls, strict=True)}) == 1
    assert seen[0] == seen[1] == seen[2]
    assert times[0] > times[1] > times[2]


def test_experts_on_the_cpu_take_what_reading_them_takes(tmp_path: Path) -> None:
    cpu = {"gb_per_s": 10, "sync_us": 7, "tflops": 1000}
    kind = {"kind": "ktransformers", "num_gpu_experts": 0}
    result = run(tiered(tmp_path, requests=ALONE, tiers={"cpu": cpu}, policies={"offload": kind}))
    decode = [d for d in details(result) if d.passes[0].decoding]
    assert len(decode) == 7
    for one in decode:
        parts = dict(zip(PARTS, one.part_ns.tolist(), strict=True))
        assert parts["experts"] == parts["stall"] == parts["meet"] == 0
        assert parts["sync"] == LAYERS * 7_000
        assert parts["cpu"] == LAYERS * round(TOP_K * EXPERT / 10)
    found = counted(result)
    assert found["cpu_rows"] == (12 + 7) * TOP_K * LAYERS
    assert moved(result, "to_device", *REASONS) == 0


def test_domains_of_the_cpu_share_experts_or_their_weights() -> None:
    node = scenario_node()
    whole = cpu_prices(CpuSpec(gb_per_s=100, numa_domains=2))
    apart = cpu_prices(CpuSpec(gb_per_s=100, numa_domains=2, numa_split=False))
    assert whole.ns([1]) == round(EXPERT / 100)
    assert apart.ns([1]) == round(EXPERT / 50)  # one domain reads, the other idles
    assert apart.ns([1, 1]) == round(EXPERT / 50)
    assert apart.ns([1, 1, 1]) == round(2 * EXPERT / 50)
    assert whole.ns([1, 1, 1]) == round(3 * EXPERT / 100)
    half = cpu_prices(CpuSpec(gb_per_s=100, cores=node.cpu_cores // 2))
    assert half.ns([1]) == round(EXPERT / 50)
    slow = cpu_prices(CpuSpec(gb_per_s=100, tflops=0.001))
    assert slow.ns([5]) == round(5 * EXPERT / 1.0)  # 2 FLOP a weight, bf16: as many FLOP as bytes; 1 GFLOP/s


def scenario_node() -> Any:
    from moesim.scenario.files import home
    from moesim.scenario.load import load_profile

    return load_profile(home() / "hw_profiles" / "h100_sxm_datasheet.yaml").node


def cpu_prices(spec: CpuSpec) -> CpuPrices:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model = scenario(Path(folder)).model
    return CpuPrices(spec, scenario_node(), model, EXPERT, None)


# ---- what it must add up to


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"tiers": {"pooled": True, "miss": "bypass"}},
        {"policies": {"offload": "mixtral_offloading", "prefetch": "next_layer"}},
        {"policies": {"offload": "moe_lightning"}, "slots": 44},
        {"parallel": {"tp": 2, "ep": 2}},
        {"parallel": {"tp": 2}, "tiers": {"numa_domains": 2, "host_copies": False}},
    ],
)
def test_parts_rows_and_bytes_add_up(tmp_path: Path, parts: dict[str, Any]) -> None:
    result = run(tiered(tmp_path, **parts))
    found, told = counted(result), details(result)
    assert result.outcome is not None
    for one, step in zip(told, result.outcome.steps.duration_ns.tolist(), strict=True):
        assert int(one.part_ns.sum()) == step
        assert (one.part_ns >= 0).all()
    summary = result.to_json()["summary"]
    assert sum(summary["time_share"].values()) == pytest.approx(1.0, abs=1e-12)
    assert sum(result.to_json()["provenance"]["shares"].values()) == pytest.approx(1.0, abs=1e-12)
    tokens = 6 * (12 + 7)
    paged = summary["cache"]["policies"]["offload"] == "moe_lightning"
    rows = found["hit_rows"] + found["late_rows"] + found["miss_rows"] + found["cpu_rows"]
    assert rows == (0 if paged else tokens * TOP_K * LAYERS)
    size = result.offload.expert_bytes if result.offload else 0
    assert moved(result, "to_device", "demand") == found["loads"] * size
    assert moved(result, "to_device", "stream") == found["streams"] * size
    assert sum(now.tokens >= now.decoding for d in told for now in d.passes) == sum(len(d.passes) for d in told)
    for pricer in result.pricers:
        assert isinstance(pricer, OffloadedPricer)
        for rank in pricer.ranks:
            rank.driver.cache._check()
            rank.device.store._check()
            rank.device.links._check()


def test_micro_batches_share_out_the_tokens_and_their_contexts(tmp_path: Path) -> None:
    result = run(tiered(tmp_path, policies={"rebatching": {"kind": "expert_queues", "pool": 3}}))
    assert result.outcome is not None
    several = 0
    for one, step in zip(details(result), result.outcome.runs, strict=True):
        assert sum(now.decoding for now in one.passes) == step.key.decoding
        assert sum(now.context for now in one.passes) == step.key.context or step.key.total_prefill
        assert [now.host for now in one.passes] == [True] + [False] * (len(one.passes) - 1)
        several += len(one.passes) > 1
    assert several


def test_a_run_is_no_better_than_its_bounds(tmp_path: Path) -> None:
    for tiers in ({"pooled": True}, {"miss": "bypass"}):
        cache = run(tiered(tmp_path, 8, tiers=tiers)).to_json()["summary"]["cache"]
        best = cache["bound"]["min_bypass"] if tiers.get("miss") else cache["bound"]["min"]
        assert cache["hit_rate"] <= best <= cache["bound"]["min_bypass"]
        assert cache["bound"]["time_over_bound"] >= 1.0


def test_a_larger_cache_stalls_less_and_the_whole_one_never(tmp_path: Path) -> None:
    stalls = []
    for slots in (8, 32, 64):
        stalls.append(run(tiered(tmp_path, slots)).to_json()["summary"]["cache"]["stall_ms_per_step"])
    assert stalls[0] > stalls[1] > stalls[2] == 0.0


# ---- homes


def test_host_memory_in_front_of_the_drives_is_read_first(tmp_path: Path) -> None:
    cold = run(tiered(tmp_path, tiers={"home": "nvme", "dram": 1 * EXPERT / 2**30}))
    warm = run(tiered(tmp_path, tiers={"home": "nvme"}))
    home = run(tiered(tmp_path))
    read = [moved(r, "nvme", "demand", "stream") for r in (home, warm, cold)]
    assert read[0] == 0
    # all that was not on the device is in host memory: what was has to be read once, after it has left
    assert 0 < read[1] <= 16 * LAYERS * EXPERT
    assert read[2] > moved(cold, "to_device", "demand", "stream") * 0.9
    tiers = cold.to_json()["summary"]["memory"]
    assert tiers["nvme"]["used"] == LAYERS * EXPERTS * EXPERT
    assert tiers["dram"]["used"] == EXPERT


def test_pageable_memory_halves_the_rate_and_pinned_is_the_profiles(tmp_path: Path) -> None:
    pinned, pageable = run(tiered(tmp_path)).offload, run(tiered(tmp_path, tiers={"pinned": False})).offload
    assert pinned is not None
    assert pageable is not None
    assert pageable.rates.to_device == pytest.approx(pinned.rates.to_device / 2)
    assert pinned.rates.to_device == pytest.approx(0.85 * 64.0)  # datasheet PCIe of the profile, typical efficiency


# ---- what is said


def test_policies_learn_from_one_part_of_the_pool_and_serve_the_other(tmp_path: Path) -> None:
    result = run(tiered(tmp_path, routing={**ROUTING, "sequence_tokens": 64, "pool_tokens": 640}))
    assert result.experts is not None
    assert result.experts.fit is not None
    assert (result.experts.fit.num_sequences, result.experts.source.num_sequences) == (5, 5)
    assert any("policies learned from the first 5 of 10 sequences" in text for text in result.warnings)
    blind = run(tiered(tmp_path, tiers={"fit_share": 0.0}))
    assert blind.experts is not None
    assert blind.experts.fit is None
    assert blind.offload is not None
    assert len(np.unique(blind.offload.ranks[0].context.popularity_LE)) == 1
    assert any("policies know nothing" in text for text in blind.warnings)


def test_what_does_not_fit_is_told_and_is_no_error(tmp_path: Path) -> None:
    result = simulate(tiered(tmp_path, tiers={"vram": 1.01}))
    assert isinstance(result, RunResult)
    assert not result.feasible
    assert "bytes are missing" in result.reasons[0]
    kind = {"kind": "ktransformers", "num_gpu_experts": 40}
    over = simulate(tiered(tmp_path, policies={"offload": kind}))
    assert isinstance(over, RunResult)
    assert not over.feasible
    assert "num_gpu_experts" in " ".join(over.reasons)


def test_the_same_scenario_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    s = tiered(tmp_path, policies={"prefetch": "markov", "rebatching": "expertflow"})
    file = tmp_path / "s.yaml"
    file.write_text(json.dumps(s.raw))
    command = [sys.executable, "-m", "moesim.cli", "simulate", str(file), "--json"]
    env = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True, text=True)
    assert json.dumps(json.loads(done.stdout)["summary"]) == json.dumps(run(s).to_json()["summary"])
    assert json.dumps(run(s).to_json()["summary"]) == json.dumps(run(s).to_json()["summary"])


def test_counters_are_those_of_the_steps_that_ran(tmp_path: Path) -> None:
    s = tiered(tmp_path)
    whole = run(s)
    assert whole.outcome is not None
    half_s = int(whole.outcome.steps.start_ns()[len(details(whole)) // 2]) / 1e9
    engine = s.engine.model_copy(update={"max_duration_s": half_s})
    cut = simulate(dataclasses.replace(s, engine=engine))
    assert isinstance(cut, RunResult)
    known = [d.counters for d in details(whole)]
    np.testing.assert_array_equal([d.counters for d in details(cut)], known[: len(details(cut))])
    assert len(details(cut)) < len(known)


# ---- what compressed experts count for


def traced(kind: str, **parts: Any) -> Scenario:
    """The small model with its recorded routing, whose gate weights are known; half of its experts fit."""
    root = Path(__file__).resolve().parents[2]
    data: dict[str, Any] = {
        "model": "stdlib-moe-16e",
        "cluster": {"device": "rtx_4090", "gpus_per_node": 1},
        "requests": {**CLOSED, "concurrency": 1, "num_requests": 2},
        "routing": {"path": str(root / "workloads" / "routing" / "stdlib_moe_loss_free.npz")},
        "engine": {"max_num_batched_tokens": 64, "max_num_seqs": 1},
        "tiers": {"experts": 32 * 3 * 128 * 128 * 4 / 2**30, **parts.pop("tiers", {})},
        "policies": {"offload": "cached", "precision": kind, **parts},
    }
    return scenario_from_dict(data, root)


def test_pruned_and_merged_experts_take_no_place(tmp_path: Path) -> None:
    """8 of 64 are left, and room for 16: all are there, in 8 places and not in 64."""
    for offload in ("cached", "fiddler"):
        precision = {"kind": "premoe", "kept": 8}
        result = run(tiered(tmp_path, 16, policies={"offload": offload, "precision": precision}))
        slots = result.to_json()["summary"]["cache"]["slots"]
        assert slots["experts_per_layer"] == 8.0
        assert slots["fixed_per_layer"] + slots["cache_per_layer"] == pytest.approx(8.0, rel=1e-3)


@pytest.mark.parametrize("precision", ["none", {"kind": "edgemoe", "average": 12, "widths": [16, 8]}])
def test_no_run_beats_its_bounds_where_first_touches_are_hits(tmp_path: Path, precision: Any) -> None:
    policies = {"offload": {"kind": "cached", "warm": False}, "precision": precision}
    colds = [run(tiered(tmp_path, 32, policies=policies, tiers={"cold": cold})) for cold in ("miss", "hit")]
    miss, hit = (one.to_json()["summary"]["cache"] for one in colds)
    assert hit["cold"] > 0
    assert hit["hit_rate"] <= hit["bound"]["min"] <= hit["bound"]["min_bypass"]
    assert hit["hit_rate"] - miss["hit_rate"] == pytest.approx(hit["cold"] / hit["look_ups"])
    assert hit["bound"]["bytes"] == miss["bound"]["bytes"]  # a first touch travels, whatever it is called


def test_copies_of_fewer_bits_keep_the_bound_a_bound() -> None:
    cache = run(traced("hobbit")).to_json()["summary"]["cache"]
    moved_bytes = sum(cache["bytes"]["to_device"].values())
    assert cache["bound"]["bytes"] <= moved_bytes
    assert moved_bytes < (cache["found"]["load"] + cache["found"]["stream"]) * 3 * 128 * 128 * 4


def test_copies_of_fewer_bits_need_gate_weights_and_host_copies(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gate weights, which .* lacks"):
        simulate(tiered(tmp_path, policies={"precision": "hobbit"}))
    with pytest.raises(BadInput, match=r"tiers\.host_copies"):
        simulate(traced("hobbit", tiers={"host_copies": False}))


def test_what_policies_learn_from_keeps_its_gate_weights_when_it_is_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long traces are sampled; weights are those of the tokens taken."""
    monkeypatch.setattr("moesim.cost.placing._SAMPLE_IDS", 2000)
    result = run(traced("none"))
    assert result.experts is not None
    assert result.experts.fit is not None
    assert result.offload is not None
    sample, fit = result.offload.ranks[0].context.fit, result.experts.fit
    assert sample is not None
    assert 0 < len(sample.expert_TLK) < fit.num_tokens
    assert sample.weight_TLK is not None
    assert fit.weight_TLK is not None
    assert sample.weight_TLK.shape == sample.expert_TLK.shape
    first = fit.sequence_start[1:3] - fit.sequence_start[:2]
    assert first.min() > 0
    np.testing.assert_array_equal(sample.weight_TLK[0], fit.weight_TLK[0])
    last = np.flatnonzero((fit.expert_TLK == sample.expert_TLK[-1]).all(axis=(1, 2)))
    assert any((fit.weight_TLK[row] == sample.weight_TLK[-1]).all() for row in last)


def test_an_experts_way_from_the_drives_is_weighed(tmp_path: Path) -> None:
    """As long as host memory has room for all they cost nothing; with a quarter of it, three reads in four are."""
    whole_gib = LAYERS * EXPERTS * EXPERT / 2**30
    at_home, roomy, tight = (
        run(tiered(tmp_path, tiers=tiers)).offload
        for tiers in ({}, {"home": "nvme"}, {"home": "nvme", "dram": whole_gib / 4})
    )
    assert at_home is not None
    assert roomy is not None
    assert tight is not None
    home, room, few = (one.ranks[0].context.costs for one in (at_home, roomy, tight))
    assert home.transfer_ns == room.transfer_ns == float(roomy.fetch.ns)
    read_ns = 0.75 * (tight.rates.nvme_latency_ns + EXPERT / tight.rates.nvme)
    assert few.transfer_ns - home.transfer_ns == pytest.approx(read_ns)
    assert few.cpu_ns(3) - home.cpu_ns(3) == pytest.approx(read_ns)
    assert float(tight.fetch.ns) == few.transfer_ns


@pytest.mark.parametrize("rerouting", ["kept", {"kind": "cache_conditional", "bias": 0.0}])
def test_recorded_scores_without_their_routers_bias_reroute_nobody(rerouting: Any) -> None:
    """The trace's router was balanced by a bias, which its scores lack; with nobody gone and no bonus for what is in
    the cache every token takes what it took."""
    result = run(traced("none", rerouting=rerouting))
    cache, plain = (one.to_json()["summary"]["cache"] for one in (result, run(traced("none"))))
    assert cache["rerouted"] == 0
    assert cache["found"] == plain["found"]
    assert any("chose by more than its recorded scores" in text for text in result.warnings)
