"""Queueing theory through `simulate()`: with a batch limit of 1 a deployment is a single-server queue.

M/D/1 (every request one output token) and M/Geo/1 (geometric outputs) against Pollaczek and Khinchine's mean wait
W = lambda E[S^2] / (2 (1 - rho)) (Kleinrock, Queueing Systems I, eq. 5.71), every wait against Lindley's recursion, and
Little's law on the engine's own queue lengths. The service law is measured apart: each output length alone, no queue.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.engine.group import Group
from moesim.simulate import RunResult, simulate
from tests.build import scenario, tiny_model

SEEDS = range(20)
REQUESTS, WARM_UP = 2500, 100
PROMPT, LONGEST = 10, 120
GEOMETRIC = {"distribution": "geometric", "mean": 5, "max": LONGEST}
T_99_19 = 2.8609346064649799
"""99 % two-sided quantile of Student's t with 19 degrees of freedom (20 seeds)"""
ONE_AT_A_TIME: dict[str, Any] = {
    "max_num_seqs": 1, "max_num_batched_tokens": 64, "graph_batch_sizes": [1, 2, 4, 8], "max_model_len": 256,
}  # fmt: skip


def dense(folder: Path) -> str:
    return tiny_model(folder, moe=None, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def service_ns(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.int64]:
    """ns that a request of o output tokens takes alone, by o (0 unused): one every 10 seconds, so none waits."""
    folder = tmp_path_factory.mktemp("service")
    rows = "".join(f"{10 * o},{PROMPT},{o}\n" for o in range(1, LONGEST + 1))
    (folder / "alone.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    requests = {"format": "csv", "path": "alone.csv"}
    result = simulate(scenario(folder, dense(folder), requests=requests, engine=ONE_AT_A_TIME))
    assert result.outcome is not None
    table = result.outcome.requests
    taken = table.finish_ns - table.arrival_ns
    assert (taken > 0).all()
    assert taken.max() < 10**10
    assert (np.diff(taken) > 0).all(), "every further token takes time"
    return np.concatenate([[0], taken])


def law(output: dict[str, Any] | int) -> NDArray[np.float64]:
    """P(o) for o = 0..LONGEST of the generator's lengths: geometric on 1, 2, ..., what is above `max` set to it."""
    pmf = np.zeros(LONGEST + 1)
    if isinstance(output, int):
        pmf[output] = 1.0
        return pmf
    assert output["max"] == LONGEST
    stay = 1 - 1 / output["mean"]
    o = np.arange(1, LONGEST)
    pmf[1:-1] = stay ** (o - 1) / output["mean"]
    pmf[-1] = stay ** (LONGEST - 1)
    assert pmf.sum() == pytest.approx(1, abs=1e-12)
    return pmf


def poisson(folder: Path, model: str, rate_per_s: float, output: Any, seed: int, **parts: Any) -> RunResult:
    requests = {
        "format": "poisson", "rate_per_s": rate_per_s, "num_requests": REQUESTS, "prompt_tokens": PROMPT,
        "output_tokens": output,
    }  # fmt: skip
    return simulate(scenario(folder, model, **{"requests": requests, "engine": ONE_AT_A_TIME, "seed": seed, **parts}))


@pytest.mark.parametrize(("output", "rho"), [(1, 0.75), (GEOMETRIC, 0.6)], ids=["MD1", "MGeo1"])
def test_mean_wait_is_pollaczek_khinchine(
    tmp_path: Path, service_ns: NDArray[np.int64], output: Any, rho: float
) -> None:
    pmf, service = law(output), service_ns.astype(np.float64)
    mean, square = float(pmf @ service), float(pmf @ service**2)
    rate_per_ns = rho / mean
    expected = rate_per_ns * square / (2 * (1 - rho))
    model = dense(tmp_path)
    waits = []
    for seed in SEEDS:
        result = poisson(tmp_path, model, rate_per_ns * 1e9, output, seed)
        assert result.outcome is not None
        table = result.outcome.requests
        wait = table.finish_ns - table.arrival_ns - service_ns[table.output_tokens]
        finish = lindley(table.arrival_ns, service_ns[table.output_tokens])
        np.testing.assert_array_equal(table.finish_ns, finish, err_msg="Lindley's recursion, to the nanosecond")
        waits.append(float(wait[WARM_UP:].mean()))
    middle = float(np.mean(waits))
    half = T_99_19 * float(np.std(waits, ddof=1)) / math.sqrt(len(waits))
    assert abs(middle - expected) <= half, (middle / expected, half / expected)
    assert half < 0.12 * expected, "the interval must be narrow enough to tell a wrong law"


def lindley(arrival_ns: NDArray[np.int64], service_ns: NDArray[np.int64]) -> list[int]:
    """Ends of service of a first-come first-served single server (Lindley 1952)."""
    ends, free = [], 0
    for arrival, service in zip(arrival_ns.tolist(), service_ns.tolist(), strict=True):
        free = max(free, arrival) + service
        ends.append(free)
    return ends


LITTLE: dict[str, dict[str, Any]] = {
    "one": {"engine": ONE_AT_A_TIME, "requests": {"rate_per_s": 300.0}},
    "batch64": {"engine": {"max_num_seqs": 64}, "requests": {"rate_per_s": 3000.0}},
    "dp4": {"engine": {"max_num_seqs": 16}, "requests": {"rate_per_s": 3000.0}, "parallel": {"dp": 4, "ep": 4}},
    "dense": {"engine": {"max_num_seqs": 2}, "requests": {"rate_per_s": 1500.0}, "parallel": {"dp": 4}, "moe": None},
    "closed": {"engine": {"max_num_seqs": 8}, "requests": {"format": "closed_loop", "concurrency": 24}},
}


@pytest.mark.parametrize("case", sorted(LITTLE))
def test_littles_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """L = lambda W over a run that starts and ends empty, exactly: the requests on the engine's own ranks, integrated
    over time, are the sum of the requests' own times in the system."""
    parts = dict(LITTLE[case])
    parts["engine"] = {**ONE_AT_A_TIME, **parts["engine"]}
    parts["requests"] = {
        "format": "poisson", "num_requests": 300, "prompt_tokens": {"distribution": "uniform", "min": 1, "max": 90},
        "output_tokens": {"distribution": "geometric", "mean": 8, "max": 60}, **parts["requests"],
    }  # fmt: skip
    model = dense(tmp_path) if "moe" in parts and parts.pop("moe") is None else tiny_model(tmp_path)
    seen: list[tuple[int, int, int]] = []
    tell, plan, end = Group._tell_load, Group._plan, Group._end
    time = [0]  # a lone group runs ahead of SimPy's clock

    def spy(group: Group, d: int) -> None:
        tell(group, d)
        rank = group.ranks[d]
        time[0] = max(time[0], int(group.env.now))
        seen.append((time[0], group.first_target + d, len(rank.waiting) + rank.running))

    def at(method: Any) -> Any:
        def told(group: Group, now: int) -> Any:
            assert now >= time[0]
            time[0] = now
            return method(group, now)

        return told

    monkeypatch.setattr(Group, "_tell_load", spy)
    monkeypatch.setattr(Group, "_plan", at(plan))
    monkeypatch.setattr(Group, "_end", at(end))
    result = simulate(scenario(tmp_path, model, **parts))
    assert result.outcome is not None
    table = result.outcome.requests
    area = clock = 0
    here: dict[int, int] = {}
    most = 0
    for now, target, number in seen:
        area += (now - clock) * sum(here.values())
        clock = now
        here[target] = number
        most = max(most, sum(here.values()))
    assert not any(here.values()), "the run must end empty"
    assert most > 3, "the case must queue"
    assert len(here) == max(1, parts.get("parallel", {}).get("dp", 1))
    sojourn = table.finish_ns - table.arrival_ns
    assert area == int(sojourn.sum())
    length, rate, mean = area / clock, len(sojourn) / clock, float(sojourn.mean())
    assert length == pytest.approx(rate * mean, rel=1e-12)
