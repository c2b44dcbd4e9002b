"""Percentiles, goodput and intervals against values worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.metrics import Z90, Errors, distribution, interval, latencies, throughput
from moesim.record import RequestRecords, StepRecords
from moesim.scenario.spec import SloSpec
from moesim.simulate import simulate
from tests.build import scenario

MS = 1_000_000
EXACT = Errors(0.0, 0.0)


def column(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def two_requests() -> tuple[RequestRecords, StepRecords]:
    """At 0: first token at 10 ms, 3 by 30 ms. At 5 ms: first at 20, 2 by 30. At 6 ms: one refused."""
    requests = RequestRecords(
        arrival_ns=column(0, 5 * MS, 6 * MS),
        first_token_ns=column(10 * MS, 20 * MS, -1),
        finish_ns=column(30 * MS, 30 * MS, -1),
        prompt_tokens=column(7, 9, 1000),
        output_tokens=column(3, 2, 5),
        target=column(0, 0, -1),
        preemptions=column(0, 0, 0),
    )
    steps = StepRecords(
        run_group=column(0, 0),
        run_start_ns=column(0, 10 * MS),
        run_steps=column(1, 2),
        run_decoding=column(0, 1),
        run_waiting=column(0, 1),
        run_preempted=column(0, 0),
        duration_ns=column(10 * MS, 10 * MS, 10 * MS),
        stall_ns=column(),
    )
    return requests, steps


def test_latencies_by_hand() -> None:
    requests, steps = two_requests()
    got = latencies(requests, steps, EXACT)
    assert got["ttft_ms"]["mean"] == pytest.approx(12.5)
    assert got["ttft_ms"]["p50"] == 10.0
    assert got["ttft_ms"]["p99"] == 15.0
    assert got["tpot_ms"]["mean"] == pytest.approx(10.0)
    assert got["e2e_ms"]["p90"] == 30.0
    assert got["itl_ms"]["p50"] == 10.0
    assert steps.start_ns().tolist() == [0, 10 * MS, 20 * MS]


def test_throughput_by_hand() -> None:
    requests, _ = two_requests()
    got = throughput(requests, True, 2, SloSpec(ttft_ms=12.0), EXACT)
    assert got["duration_s"] == pytest.approx(0.030)
    assert got["throughput"]["output_tok_per_s"] == pytest.approx(5 / 0.030)
    assert got["throughput"]["total_tok_per_s"] == pytest.approx(21 / 0.030)
    assert got["throughput"]["output_tok_per_s_per_device"] == pytest.approx(2.5 / 0.030)
    assert got["goodput_req_per_s"] == pytest.approx(1 / 0.030)


def test_goodput_interval_counts_requests_again() -> None:
    requests, _ = two_requests()
    got = throughput(requests, True, 1, SloSpec(ttft_ms=12.0), Errors(0.2, 0.0))
    low, high = got["interval90"]["goodput_req_per_s"]
    # 39 % slower neither meets 12 ms; 28 % faster both do (10.8 ms)
    assert low == 0.0
    assert high == pytest.approx(2 / 0.030)


def test_open_loop_rate_is_paced_by_arrivals() -> None:
    requests, _ = two_requests()
    closed = throughput(requests, True, 1, None, Errors(0.1, 0.0))["throughput"]["interval90"]["req_per_s"]
    opened = throughput(requests, False, 1, None, Errors(0.1, 0.0))["throughput"]["interval90"]["req_per_s"]
    assert math.log(closed[1] / closed[0]) == pytest.approx(2 * Z90 * 0.1)
    assert math.log(opened[1] / opened[0]) == pytest.approx(2 * Z90 * 0.1 * 25 / 30)


def test_weighted_percentiles_equal_repeated_values() -> None:
    rng = np.random.default_rng(3)
    values, weights = rng.random(200), rng.integers(0, 5, 200)
    weights[0] = 1
    a = distribution(values[weights > 0], weights[weights > 0], EXACT)
    b = distribution(np.repeat(values, weights), None, EXACT)
    assert a is not None
    assert b is not None
    for name in ("mean", "p50", "p90", "p95", "p99"):
        assert a[name] == pytest.approx(b[name])


def test_interval_holds_the_value_and_widens() -> None:
    assert interval(5.0, 0.0) == [5.0, 5.0]
    low, high = interval(5.0, 0.3)
    assert low < 5.0 < high
    assert low * high == pytest.approx(25.0)


def test_sampling_error_covers_the_mean() -> None:
    """Batch means: over 200 independent samples of an exponential, the 90 % interval holds the true mean about 90 %."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        got = distribution(rng.exponential(1.0, 800), None, EXACT)
        assert got is not None
        low, high = got["interval90"]["mean"]
        hits += low <= 1.0 <= high
    # binomial(200, 0.9): 99.9 % of the mass lies in 165..193
    assert 165 <= hits <= 193


def test_nothing_completed() -> None:
    requests, _ = two_requests()
    none = RequestRecords(*(getattr(requests, f)[2:] for f in requests.__dataclass_fields__))
    got = throughput(none, False, 1, None, EXACT)
    assert got["duration_s"] == 0.0
    assert got["throughput"]["req_per_s"] is None
    assert distribution(np.zeros(0), None, EXACT) is None


def test_the_devices_own_speed_moves_all_its_operators_together(tmp_path: Path) -> None:
    plain = scenario(tmp_path)
    profile = replace(plain.cluster.profile, speed_error=0.1)
    before, after = simulate(plain), simulate(replace(plain, cluster=replace(plain.cluster, profile=profile)))
    device = 1.0 - before.to_json()["summary"]["time_share"].get("host", 0.0)
    assert after.errors.step == pytest.approx(math.hypot(before.errors.step, 0.1 * device), rel=1e-3)
