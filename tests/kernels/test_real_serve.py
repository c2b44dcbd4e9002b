"""The server's loop against the simulator's: with steps that take what the simulator says, it finds the same run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from moesim_kernels.real.serve import CpuClock, Served, WallClock, serve
from moesim_kernels.real.work import Setting, StepWork, prepare_real, price

from moesim.errors import BadInput
from moesim.scenario.load import load_scenario
from moesim.simulate import Prepared, found, simulate

FILE = Path("workloads/validate_cpu.yaml")


class _Clock:
    """Stands still until somebody takes time."""

    def __init__(self) -> None:
        self.at = 0

    def start(self) -> None:
        self.at = 0

    def now_ns(self) -> int:
        return self.at

    def wait_until(self, when_ns: int) -> None:
        self.at = max(self.at, when_ns)


class _AsPriced:
    """Takes what the simulator says of a step."""

    def __init__(self, prepared: Prepared, clock: _Clock) -> None:
        self.prepared, self.clock = prepared, clock
        self.forgotten: list[int] = []
        self.rows = 0

    def load(self, work: StepWork) -> Setting:
        self.rows += int(work.rows_LS().sum())
        first = zip(work.request_N.tolist(), work.position_N.tolist(), work.rank_N.tolist(), strict=True)
        chunks = tuple((c.request, c.start, c.tokens, c.rank, int(c.last)) for c in work.chunks)
        return Setting("step", (), tuple(first)[: work.decode], chunks)

    def run(self, loaded: Setting) -> SimpleNamespace:
        ns = price(self.prepared, loaded).ns
        self.clock.at += ns
        return SimpleNamespace(wall_ns=ns)

    def forget(self, request: int) -> None:
        self.forgotten.append(request)


def _both(*overrides: str) -> tuple[Served, Any, _AsPriced]:
    scenario = load_scenario(FILE, overrides)
    prepared, clock = prepare_real(scenario), _Clock()
    executor = _AsPriced(prepared, clock)
    return serve(prepared, executor, clock), simulate(scenario), executor


CLOSED = "requests={format: closed_loop, concurrency: 5, num_requests: 20, prompt_tokens: 40, output_tokens: 9}"


@pytest.mark.parametrize(
    "overrides",
    [
        ("requests.num_requests=24",),
        ("requests.num_requests=24", "requests.rate_per_s=40", "engine.max_num_batched_tokens=32"),
        ("requests.num_requests=24", "requests.rate_per_s=40", "capacity.factor=1.0"),
        ("requests.num_requests=24", "policies.batching=sglang"),
        (CLOSED,),
    ],
)
def test_the_same_run_as_the_simulator(overrides: tuple[str, ...]) -> None:
    served, result, executor = _both(*overrides)
    real, simulated = served.outcome, result.outcome
    for name in ("arrival_ns", "first_token_ns", "finish_ns", "target", "preemptions"):
        assert np.array_equal(getattr(real.requests, name), getattr(simulated.requests, name)), name
    assert np.array_equal(real.steps.duration_ns, simulated.steps.duration_ns)
    assert np.array_equal(real.steps.start_ns(), simulated.steps.start_ns())
    assert real.end_ns == simulated.end_ns
    assert real.peak_kv_units == simulated.peak_kv_units
    assert set(executor.forgotten) == set(range(len(real.requests.arrival_ns)))
    if not any("capacity" in o for o in overrides):  # every token but the last goes through top-4 experts of 6 layers
        tokens = (real.requests.prompt_tokens + real.requests.output_tokens - 1).sum()
        assert executor.rows == tokens * 6 * 4


def test_pauses_are_told(tmp_path: Path) -> None:
    """Once a pause that is long enough, and never while somebody waits."""
    from moesim_kernels.real.serve import IDLE_NS

    scenario = load_scenario(FILE, ["requests.num_requests=12", "requests.rate_per_s=0.5"])
    prepared, clock = prepare_real(scenario), _Clock()
    executor, seen = _AsPriced(prepared, clock), []
    served = serve(prepared, executor, clock, idle=lambda: seen.append(clock.at))
    requests = served.outcome.requests
    gaps = 0
    for i in range(1, 12):
        ended = max(int(requests.finish_ns[:i].max()), 0)
        gaps += int(requests.arrival_ns[i]) - ended > IDLE_NS
    assert len(seen) == gaps > 3
    for at in seen:
        assert not ((requests.arrival_ns <= at) & (requests.finish_ns > at)).any()


def test_preempted_requests_are_computed_again() -> None:
    """A KV cache of a few blocks: who is preempted gives its rows back, and all end."""
    scenario = load_scenario(FILE, ["requests.num_requests=24", "requests.rate_per_s=40"])
    prepared, clock = prepare_real(scenario), _Clock()
    deployment = prepared.deployment
    assert deployment is not None
    from dataclasses import replace

    layers = scenario.model.num_layers
    prepared.deployment = replace(deployment, kv=replace(deployment.kv, capacity=20 * layers))
    executor = _AsPriced(prepared, clock)
    served = serve(prepared, executor, clock)
    requests = served.outcome.requests
    assert requests.completed.all()
    assert requests.preemptions.sum() > 0
    assert len(executor.forgotten) == len(requests.preemptions) + requests.preemptions.sum()


def test_what_was_served_becomes_a_result() -> None:
    scenario = load_scenario(FILE, ["requests.num_requests=12"])
    prepared, clock = prepare_real(scenario), _Clock()
    served = serve(prepared, _AsPriced(prepared, clock), clock)
    summary = found(prepared, served.outcome, priced=False).to_json()["summary"]
    wanted = simulate(scenario).to_json()["summary"]
    assert summary["ttft_ms"]["p50"] == wanted["ttft_ms"]["p50"]
    assert summary["tpot_ms"]["mean"] == wanted["tpot_ms"]["mean"]
    assert summary["time_share"] == {}


def test_clocks() -> None:
    for clock in (WallClock(), CpuClock()):
        clock.start()
        before = clock.now_ns()
        clock.wait_until(before + 2_000_000)
        assert clock.now_ns() >= before + 2_000_000


def test_one_rank_is_served() -> None:
    overrides = ["cluster.gpus_per_node=2", "parallel.dp=2", "parallel.ep=2"]
    prepared = prepare_real(load_scenario(FILE, overrides))
    with pytest.raises(BadInput, match="one rank"):
        serve(prepared, _AsPriced(prepared, _Clock()), _Clock())


def test_a_process_of_its_own_writes_what_it_served(tmp_path: Path) -> None:
    """The real thing: ten requests on a real rank, by CPU time; everything ends, in order."""
    import json

    from moesim_kernels.real.served import main

    out = tmp_path / "served.json"
    arguments = [str(FILE), "--out", str(out), "--requests", "6", "--clock", "cpu", "--seal", "abc", "--seed", "9"]
    assert main([*arguments, "--set", "requests.output_tokens.max=8", "--set", "model=stdlib-moe-16e"]) == 0
    found = json.loads(out.read_text())
    assert found["seal"] == "abc"
    requests, steps = found["requests"], found["steps"]
    assert len(requests["finish_ns"]) == 6
    arrival, first, finish = (np.array(requests[n]) for n in ("arrival_ns", "first_token_ns", "finish_ns"))
    assert (arrival < first).all()
    assert (first <= finish).all()
    tokens = sum(requests["output_tokens"])
    assert sum(steps["decoding"]) == tokens - 6  # the first token of each comes of its prompt
    assert len(steps["duration_ns"]) == len(steps["wall_ns"]) == len(steps["host_ns"])
    assert all(0 <= h < d for h, d in zip(steps["host_ns"], steps["duration_ns"], strict=True))
    assert found["host_us_median"] > 0
    assert all(ns > 0 for ns in found["reference_ns"])
    assert not list(tmp_path.glob(".*"))
