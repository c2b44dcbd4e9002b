"""A served run beside a simulated one, by hand and against the house's own metrics."""

from __future__ import annotations

import numpy as np
import pytest
from moesim_kernels.validate.served import in_system, judge_served, served_figures

from moesim.scenario.load import load_scenario
from moesim.simulate import simulate

BY_HAND = {
    "arrival_ns": [0, 10_000_000, 20_000_000],
    "first_token_ns": [5_000_000, 30_000_000, 25_000_000],
    "finish_ns": [15_000_000, 50_000_000, 25_000_000],
    "output_tokens": [3, 5, 1],
}


def test_by_hand() -> None:
    found = served_figures(BY_HAND)
    assert found["ttft_p50_ms"] == 5.0
    assert found["ttft_mean_ms"] == pytest.approx(10.0)
    assert found["tpot_mean_ms"] == pytest.approx(5.0)  # 10 ms / 2 and 20 ms / 4
    assert found["makespan_s"] == 0.05
    assert found["in_system_mean"] == pytest.approx((15 + 40 + 5) / 50)
    at = np.array([-1, 0, 12_000_000, 22_000_000, 49_999_999, 50_000_000])
    assert in_system(BY_HAND, at).tolist() == [0, 1, 2, 2, 1, 0]


def test_requests_that_did_not_end_do_not_count() -> None:
    more = {name: [*column, -1] for name, column in BY_HAND.items()} | {"arrival_ns": [0, 10_000_000, 20_000_000, 5]}
    assert served_figures(more) == served_figures(BY_HAND)


def test_the_houses_own_figures() -> None:
    result = simulate(load_scenario("workloads/validate_cpu.yaml"))
    requests = result.outcome.requests  # type: ignore[union-attr]
    found = served_figures({n: getattr(requests, n) for n in BY_HAND})
    summary = result.to_json()["summary"]
    assert found["ttft_mean_ms"] == pytest.approx(summary["ttft_ms"]["mean"])
    assert found["tpot_mean_ms"] == pytest.approx(summary["tpot_ms"]["mean"])


def test_judged() -> None:
    slower = {n: (np.asarray(c) * 1.25).astype(np.int64) if n.endswith("_ns") else c for n, c in BY_HAND.items()}
    same = judge_served(BY_HAND, [BY_HAND, BY_HAND])
    assert same.missed == []
    assert same.queue_error == 0.0
    assert all(e == 0.0 for e in same.error.values())
    off = judge_served(BY_HAND, [slower, slower])
    assert off.error["makespan_s"] == pytest.approx(1 / 1.25 - 1)
    assert set(off.missed) == {"tpot_mean_ms", "makespan_s", "ttft_p50_ms"}
    assert off.queue_error > 0
    assert judge_served(BY_HAND, [BY_HAND, slower]).missed == []  # the runs differ more than the bound: nothing binds
    assert off.to_json()["figures"]["makespan_s"]["bound"] == 0.08
