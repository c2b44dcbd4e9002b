"""The engine over time: how long, how much memory, and what came out, for five deployments.

Deployments are written here and use datasheet profiles, so that a figure moves only when the code does. The dense one
reads the 2,000 recorded requests on which other simulators were measured where `../shared/data` is there, else it
draws as many with the same mean lengths and rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesim.scenario.load import Scenario, scenario_from_dict
from moesim.simulate import RunResult, simulate

_ROOT = Path(__file__).resolve().parents[1]
_RECORDED = _ROOT.parent / "shared" / "data" / "requests" / "splitwise_conv_q2_2000.csv"
_LIKE_RECORDED = {
    "format": "poisson",
    "rate_per_s": 2,
    "num_requests": 2000,
    "prompt_tokens": {"distribution": "lognormal", "mean": 1165, "cv": 1.0, "max": 4096},
    "output_tokens": {"distribution": "lognormal", "mean": 215, "cv": 0.8, "max": 4096},
}
# long prompts, short answers, bursts: the shape of a coding service's traffic
_BURSTS = {
    "format": "gamma",
    "rate_per_s": 40,
    "cv": 8,
    "num_requests": 2000,
    "prompt_tokens": {"distribution": "lognormal", "mean": 2048, "cv": 1.0, "max": 8000},
    "output_tokens": {"distribution": "lognormal", "mean": 28, "cv": 1.5, "max": 2000},
}


def _v3(nodes: int, redundant: int) -> dict[str, Any]:
    return {
        "model": "deepseek-v3",
        "cluster": {"device": "h100_sxm_datasheet", "nodes": nodes, "gpus_per_node": 8},
        "parallel": {"dp": 8 * nodes, "ep": 8 * nodes},
        "requests": _BURSTS,
        "routing": {"popularity_zipf": 0.8, "fidelity": "count"},
        "policies": {"placement": {"kind": "eplb", "num_redundant_experts": redundant}, "balancer": "least_loaded"},
        "engine": {"max_num_batched_tokens": 4096},
    }


DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "dense_8b_2000": {
        "model": "llama-3.1-8b",
        "cluster": {"device": "a100_sxm_80gb", "gpus_per_node": 1},
        "requests": {"format": "csv", "path": str(_RECORDED)} if _RECORDED.is_file() else _LIKE_RECORDED,
    },
    "dsv3_ep32_count": _v3(4, 32),
    "dsv3_ep256_count": _v3(32, 256),
    "qwen3_235b_ep8_closed64": {
        "model": {"name": "qwen3-235b-a22b", "weight_dtype": "fp8_block", "expert_dtype": "fp8_block"},
        "cluster": {"device": "h200_sxm", "gpus_per_node": 8},
        "parallel": {"dp": 8, "ep": 8},
        "requests": {
            "format": "closed_loop",
            "concurrency": 64,
            "num_requests": 2000,
            "prompt_tokens": 1024,
            "output_tokens": 256,
        },
        "routing": {"popularity_zipf": 0.6, "fidelity": "count"},
    },
    "dsv2lite_ep8_token": {
        "model": "deepseek-v2-lite",
        "cluster": {"device": "h100_sxm_datasheet", "gpus_per_node": 8},
        "parallel": {"dp": 8, "ep": 8},
        "requests": {
            "format": "poisson",
            "rate_per_s": 60,
            "num_requests": 150,
            "prompt_tokens": {"distribution": "lognormal", "mean": 500, "cv": 0.8, "max": 4096},
            "output_tokens": {"distribution": "lognormal", "mean": 100, "cv": 0.8, "max": 1024},
        },
        "routing": {"popularity_zipf": 0.6, "repeat": 0.2, "fidelity": "token"},
    },
}


def deployment(name: str) -> Scenario:
    """One of DEPLOYMENTS, seed 1."""
    return scenario_from_dict({"name": name, "seed": 1, **DEPLOYMENTS[name]}, _ROOT)


class Simulate:
    """`simulate()` as a whole: traffic, routing, placement, tables, event loop and explanation."""

    params = (list(DEPLOYMENTS),)
    param_names = ("deployment",)
    timeout = 300
    number = 1
    repeat = (2, 5, 20.0)
    warmup_time = 0.0

    def setup(self, name: str) -> None:
        self.scenario = deployment(name)

    def time_simulate(self, name: str) -> None:
        simulate(self.scenario)

    def peakmem_simulate(self, name: str) -> None:
        simulate(self.scenario)


class Outcome:
    """What a run says about itself. A change of `events` or of a simulated figure is a change of the engine."""

    params = (list(DEPLOYMENTS),)
    param_names = ("deployment",)
    timeout = 300

    def setup(self, name: str) -> None:
        self.result: RunResult = simulate(deployment(name))
        self.summary: dict[str, Any] = self.result.to_json()["summary"]

    def track_event_loop_s(self, name: str) -> float:
        return self.result.loop_s

    track_event_loop_s.unit = "s"  # type: ignore[attr-defined]

    def track_events(self, name: str) -> int:
        assert self.result.outcome is not None
        return self.result.outcome.events

    track_events.unit = "SimPy events"  # type: ignore[attr-defined]

    def track_steps(self, name: str) -> int:
        return int(self.summary["steps"])

    track_steps.unit = "steps"  # type: ignore[attr-defined]

    def track_ttft_p99_ms(self, name: str) -> float:
        return float(self.summary["ttft_ms"]["p99"])

    track_ttft_p99_ms.unit = "simulated ms"  # type: ignore[attr-defined]

    def track_e2e_p99_ms(self, name: str) -> float:
        return float(self.summary["e2e_ms"]["p99"])

    track_e2e_p99_ms.unit = "simulated ms"  # type: ignore[attr-defined]
