"""The tuner's figures, worked by hand from what a run says of itself; violations; names that are unknown."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moesim_tuner.figures import (
    figure,
    figure_problems,
    figures_of,
    known_figures,
    lacking,
    more_is_better,
    needs,
    observed,
    violation,
)

from moesim.compare import difference, interval_of
from moesim.errors import BadInput
from moesim.hardware import PowerSpec
from moesim.observe import FIGURES, observe
from moesim.run_result import RunResult
from moesim.scenario.load import Scenario, load_profile, load_scenario_text
from moesim.simulate import simulate
from moesim.training.result import TrainingResult
from tests.build import scenario, training_scenario

TUNE: dict[str, Any] = {"space": {"engine.max_num_seqs": {"choices": [8, 16]}}, "objectives": ["usd_per_mtok"]}
CLOSED = {"format": "closed_loop", "concurrency": 4, "num_requests": 12, "prompt_tokens": 100, "output_tokens": 10}
PARALLEL = {"dp": 4, "ep": 4, "replicas": 2}


def powered(made: Scenario, **power: Any) -> Scenario:
    """With a device that draws this."""
    profile = dataclasses.replace(made.cluster.profile, power=PowerSpec(source="made up", **power) if power else None)
    return dataclasses.replace(made, cluster=dataclasses.replace(made.cluster, profile=profile))


def served(folder: Path, power: dict[str, Any] | None = None, **parts: Any) -> RunResult:
    base = {"requests": CLOSED, "parallel": PARALLEL, "tune": {**TUNE, "gpu_hour_usd": 3.6}}
    result = simulate(powered(scenario(folder, **{**base, **parts}), **(power or {})))
    assert isinstance(result, RunResult)
    return result


def test_what_a_closed_loop_costs_by_hand(tmp_path: Path) -> None:
    """12 requests of 10 tokens on 8 devices at 3.6 USD an hour: 8 * 0.001 USD a second for 120 tokens."""
    result = served(tmp_path, {"busy_w": 500.0, "idle_w": 100.0})
    summary, found = result.to_json()["summary"], figures_of(result)
    seconds = summary["duration_s"]
    assert found["devices"] == 8
    assert found["tok_per_s_per_device"] == pytest.approx(120 / seconds / 8)
    assert found["usd_per_mtok"] == pytest.approx(8 * 0.001 * seconds / 120 * 1e6)
    assert found["usd_per_mtok_total"] == pytest.approx(8 * 0.001 * seconds / (120 + 1200) * 1e6)
    drawn = 100 + 400 * summary["busy_share"]
    assert 100 < drawn < 500  # six requests a replica: some groups end before the others
    assert found["joule_per_token"] == pytest.approx(drawn * 8 * seconds / 120)
    kv = result.kv
    assert kv is not None
    assert found["kv_tokens"] == kv.capacity // 4 * 16 * 8  # units of a block of 16 tokens of one of 4 layers, 8 ranks


def test_without_idle_power_a_device_counts_as_busy(tmp_path: Path) -> None:
    result = served(tmp_path, {"busy_w": 500.0})
    seconds = result.to_json()["summary"]["duration_s"]
    assert figures_of(result)["joule_per_token"] == pytest.approx(500 * 8 * seconds / 120)


def test_training_costs_and_draws_by_its_step(tmp_path: Path) -> None:
    made = training_scenario(
        tmp_path, tune={**TUNE, "space": {"capacity.factor": {"choices": [1, 2]}}, "gpu_hour_usd": 7.2}
    )
    result = simulate(powered(made, busy_w=300.0, idle_w=50.0))
    assert isinstance(result, TrainingResult)
    found, rate = figures_of(result), result.to_json()["summary"]["throughput"]["tok_per_s"]
    assert found["usd_per_mtok"] == found["usd_per_mtok_total"] == pytest.approx(8 * 0.002 / rate * 1e6)
    assert found["joule_per_token"] == pytest.approx(300 * 8 / rate)
    assert found["tok_per_s_per_device"] == pytest.approx(rate / 8)
    assert "kv_tokens" not in found


def test_derived_figures_tie_where_the_observed_one_does(tmp_path: Path) -> None:
    """Cost is a constant over throughput: its difference is the negative of throughput's, its interval as wide."""
    runs = [
        observed(served(tmp_path, {"busy_w": 500.0}, engine={"max_num_seqs": n, "max_num_batched_tokens": 256}))
        for n in (2, 4)
    ]
    rate = difference([runs[0]], [runs[1]], FIGURES["output_tok_per_s"], 0.9)
    assert rate.half > 0
    for name in ("usd_per_mtok", "joule_per_token"):
        cost = difference([runs[0]], [runs[1]], figure(name), 0.9)
        assert cost.centre == pytest.approx(-rate.centre)
        assert cost.half == pytest.approx(rate.half)
    each = difference([runs[0]], [runs[1]], figure("tok_per_s_per_device"), 0.9)
    assert (each.centre, each.half) == pytest.approx((rate.centre, rate.half))
    low, high = interval_of([runs[0]], figure("usd_per_mtok")) or (0, 0)
    slow, fast = interval_of([runs[0]], FIGURES["output_tok_per_s"]) or (0, 0)
    assert (low * fast, high * slow) == pytest.approx((8 * 0.001 * 1e6, 8 * 0.001 * 1e6))
    assert observed(served(tmp_path)).figures["devices"].slope == 0


def test_energy_moves_with_step_time_as_a_closer_look_says(tmp_path: Path) -> None:
    """Its slope against runs on devices 2 % faster and slower; an open loop, in which devices wait most of the time."""
    poisson = {**CLOSED, "format": "poisson", "rate_per_s": 20.0, "num_requests": 40}
    del poisson["concurrency"]
    made = powered(scenario(tmp_path, requests=poisson, parallel={"dp": 4, "ep": 4}), busy_w=500.0, idle_w=100.0)
    runs = {}
    for speed in (1 / 1.02, 1.0, 1.02):
        # the engine's own time between steps is no device's
        engine = made.engine.model_copy(update={"host_overhead_us": made.engine.host_overhead_us / speed})
        result = simulate(dataclasses.replace(made, cluster=made.cluster.scaled(speed), engine=engine))
        runs[speed] = observed(result).figures["joule_per_token"]
    slope = (math.log(runs[1 / 1.02].value) - math.log(runs[1.02].value)) / (2 * math.log(1.02))
    assert runs[1.0].slope == pytest.approx(slope, rel=0.05)
    assert 0 < slope < 0.9


# ---- the SLO's figures, which moesim.observe has


def test_the_share_within_the_slo_counts_who_was_refused(tmp_path: Path) -> None:
    """Ten requests, of which the KV cache and max_model_len refuse those of 3,000 tokens."""
    rows = "".join(f"{i * 0.5},{3000 if i % 5 == 0 else 50},5\n" for i in range(10))
    (tmp_path / "r.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    parts = {"requests": {"format": "csv", "path": "r.csv"}, "engine": {"max_model_len": 512}}
    easy = figures_of(served(tmp_path, slo={"ttft_ms": 1e6}, **parts))
    assert easy["slo_met_share"] == pytest.approx(0.8)
    assert easy["goodput_req_per_s"] == pytest.approx(easy["req_per_s"])
    hard = figures_of(served(tmp_path, slo={"ttft_ms": 1e-3}, **parts))
    assert (hard["slo_met_share"], hard["goodput_req_per_s"]) == (0, 0)
    assert "slo_met_share" not in figures_of(served(tmp_path, **parts))


def test_leaving_out_parts_of_a_run_leaves_its_requests_out(tmp_path: Path) -> None:
    poisson = {**CLOSED, "format": "poisson", "rate_per_s": 300.0, "num_requests": 60}
    del poisson["concurrency"]
    result = served(tmp_path, slo={"ttft_ms": 0.7}, requests=poisson, parallel={"dp": 4, "ep": 4})
    assert result.outcome is not None
    r = result.outcome.requests
    good = (r.first_token_ns - r.arrival_ns) / 1e6 <= 0.7
    assert 0.1 < good.mean() < 0.9
    seen = observe(result).figures["slo_met_share"]
    part = np.arange(60) * 20 // 60
    assert seen.without_G is not None
    np.testing.assert_allclose(seen.without_G, [good[part != g].mean() for g in range(20)])
    assert seen.value == pytest.approx(good.mean())
    # if all latencies were 5 % longer, and shorter
    waits = (r.first_token_ns - r.arrival_ns) / 1e6
    by_hand = ((waits * 1.05 <= 0.7).mean() - (waits / 1.05 <= 0.7).mean()) / (2 * math.log(1.05))
    assert seen.slope == pytest.approx(by_hand)


# ---- limits, names


def test_violations_are_shares_of_the_limit() -> None:
    at = {"tpot_p99_ms": 55.0, "hit_rate": 0.9, "dropped_share": 0.02}
    assert violation(at, "tpot_p99_ms", None, 50.0) == pytest.approx(0.1)
    assert violation(at, "tpot_p99_ms", None, 110.0) == pytest.approx(-0.5)
    assert violation(at, "hit_rate", 0.95, None) == pytest.approx(0.05 / 0.95)
    assert violation(at, "tpot_p99_ms", 60.0, 100.0) == pytest.approx(5 / 60)
    assert violation(at, "tpot_p99_ms", 50.0, 60.0) == pytest.approx(-5 / 60)
    assert violation(at, "dropped_share", None, 0.0) == pytest.approx(0.02)
    assert violation(at, "ttft_p99_ms", None, 1.0) == 1.0
    assert violation({"dropped_share": 0.0}, "dropped_share", None, 0.0) == 0.0


def test_every_figure_has_a_direction_and_a_run_that_has_it(tmp_path: Path) -> None:
    more = {name for name in known_figures() if more_is_better(name)}
    assert {"goodput_req_per_s", "slo_met_share", "tok_per_s_per_device", "kv_tokens", "mfu", "hit_rate"} <= more
    assert not more & {"usd_per_mtok", "joule_per_token", "devices", "ttft_p99_ms", "hbm_used_bytes", "maxvio"}
    result = served(tmp_path, {"busy_w": 500.0}, slo={"ttft_ms": 1e6}, capacity={"factor": 2.0},
                    cluster={"device": "h100_sxm_datasheet", "nodes": 2, "gpus_per_node": 2},
                    parallel={"dp": 4, "ep": 4})  # fmt: skip
    trained = simulate(training_scenario(tmp_path, training={"steps": 2, "routing_tokens": 64}))
    assert set(known_figures()) - set(figures_of(result)) - set(figures_of(trained)) == {"hit_rate"}
    assert "tune.gpu_hour_usd" in needs("usd_per_mtok")


def test_an_unknown_figure_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"unknown figure 'usd_per_mtk'. Did you mean usd_per_mtok\?.*joule_per_token"):
        figure("usd_per_mtk")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("usd_per_mtok", r"set tune\.gpu_hour_usd"),
        ("goodput_req_per_s", "has no slo"),
        ("hit_rate", "has no tiers"),
        ("mfu", "of training steps alone"),
        ("joule_per_token", "add power"),
        ("output_tok_per_s", ""),
        ("devices", ""),
    ],
)
def test_what_a_scenario_lacks_for_a_figure(tmp_path: Path, name: str, told: str) -> None:
    plain = powered(scenario(tmp_path))
    assert (told in lacking(plain, name).replace(".", r"\.")) if told else lacking(plain, name) == ""
    assert lacking(plain, name) != "" or name in figures_of(simulate(plain))


def test_a_search_may_bring_what_the_scenario_lacks(tmp_path: Path) -> None:
    assert lacking(scenario(tmp_path), "goodput_req_per_s", ["slo.ttft_ms"]) == ""
    assert "serve no requests" in lacking(training_scenario(tmp_path), "ttft_p99_ms")


def test_objectives_and_constraints_are_named_with_their_places(tmp_path: Path) -> None:
    tune = {**TUNE, "objectives": ["output_tok_per_s", "tpot_p9_ms"], "constraints": {"hit_rate": {"min": 0.9}}}
    made = scenario(tmp_path, tune=tune)
    assert made.tune is not None
    found = figure_problems(made, made.tune)
    assert [place for place, _ in found] == [("tune", "objectives", 1), ("tune", "constraints", "hit_rate")]
    assert "tpot_p90_ms" in found[0][1] or "tpot_p95_ms" in found[0][1] or "tpot_p99_ms" in found[0][1]


# ---- what a device draws


def test_shipped_profiles_say_what_the_board_may_draw() -> None:
    drawn = {path.stem: load_profile(path).power for path in sorted(Path("hw_profiles").glob("*.yaml"))}
    assert {name for name, power in drawn.items() if power is None} == {"cpu_2core", "cpu_epyc_1thread"}
    assert drawn["h100_sxm"] is not None
    assert drawn["h100_sxm"].busy_w == 700
    assert all(power is None or (power.idle_w is None and power.source) for power in drawn.values())


def test_power_decides_no_time_and_is_in_no_hash(tmp_path: Path) -> None:
    text = Path("hw_profiles/l40s.yaml").read_text()
    hashes = set()
    for power in (
        "power: {busy_w: 350, source: x}\n", "power:\n  busy_w: 300\n  idle_w: 30\n  source: y\n", "",
    ):  # fmt: skip
        start = text.index("power:")
        (tmp_path / "own.yaml").write_text(text[:start] + power + text[text.index("\n", start) + 1 :])
        made = scenario(tmp_path, cluster={"device": "own.yaml"}, parallel={"dp": 4, "ep": 4})
        hashes.add(made.hash)
        assert (made.cluster.profile.power is None) == (power == "")
    assert len(hashes) == 1


def test_power_that_cannot_be_is_refused_with_its_place(tmp_path: Path) -> None:
    text = Path("hw_profiles/l40s.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("busy_w: 350", "busy_w: 350, idle_w: 351"))
    yaml = "model: llama-3.1-8b\ncluster: {device: own.yaml}\nrequests: {format: closed_loop, concurrency: 1, "
    yaml += "num_requests: 1, prompt_tokens: 1, output_tokens: 1}\n"
    with pytest.raises(BadInput, match=r"own.yaml:\d+:\d+: power.*idle_w must not exceed busy_w"):
        load_scenario_text(yaml, tmp_path)


def test_a_hit_rate_has_no_error_of_step_times(tmp_path: Path) -> None:
    """Which experts are found there is counted: a slower device finds the same ones."""
    few = {**CLOSED, "num_requests": 2, "concurrency": 1}
    result = served(
        tmp_path, requests=few, parallel={"dp": 1}, tiers={"experts": 0.01}, policies={"offload": "cached"}
    )  # fmt: skip
    found = observed(result).figures["hit_rate"]
    assert 0 < found.value < 1
    assert found.slope == 0
    assert lacking(result.scenario, "hit_rate") == ""
