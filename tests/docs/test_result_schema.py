"""docs/result-schema.md names every key that results have, and no other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesim.simulate import simulate
from tests.build import scenario, tiny_model, training_scenario

PAGE = Path(__file__).parents[2] / "docs" / "result-schema.md"
CLOSED = {
    "format": "closed_loop", "concurrency": 2, "num_requests": 4, "prompt_tokens": 8, "output_tokens": 8
}  # fmt: skip
FIGURES = ("mean", "p50", "p90", "p95", "p99")


def expand(key: str) -> Iterator[str]:
    """`a.{b,c}` -> a.b, a.c"""
    parts = [part.split(",") for part in re.split(r"[{}]", key)]
    # odd parts stood in braces; a comma elsewhere would be a mistake of the page
    assert all(len(part) == 1 for part in parts[::2]), key
    return ("".join(chosen) for chosen in itertools.product(*parts))


def documented() -> set[str]:
    keys = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
    names = [name for key in keys for name in expand(key)]
    assert len(names) == len(set(names)), "a key is documented twice"
    return set(names)


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix


def parents(keys: set[str]) -> set[str]:
    """`a.b.c` -> a, a.b: what may be null, and is a leaf then."""
    return {key[: m.start()] for key in keys for m in re.finditer(r"\.", key)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("schema")
    shared = {"shared_intermediate_size": 128}
    model = tiny_model(folder, moe=shared)
    cases: dict[str, dict[str, Any]] = {
        "exchange": {
            "model": model,
            "cluster": {"device": "h100_sxm_datasheet", "nodes": 2, "gpus_per_node": 4},
            "parallel": {"dp": 8, "ep": 8},
            "slo": {"ttft_ms": 1000},
        },
        "token": {"model": model, "parallel": {"tp": 2, "dp": 2, "ep": 4}, "routing": {"fidelity": "token"}},
        "dense": {"model": tiny_model(folder, moe=None), "parallel": {"tp": 2}},
        "routed": {
            "model": {"name": model, "latent_rank": 64},
            "parallel": {"dp": 4, "ep": 4},
            "policies": {"routing": "bip"},
            "capacity": {"factor": 1.0},
            "routing": {"pool_tokens": 512, "sequence_tokens": 64},
        },
        "rebalance": {
            "model": model,
            "parallel": {"dp": 4, "ep": 4},
            "policies": {"placement": "eplb"},
            "rebalance": {"interval_steps": 20},
            "communication": {"overlap": "pipeline"},
        },
        "guests": {
            "model": model,
            "parallel": {"dp": 4, "ep": 4},
            "policies": {"dispatch": {"kind": "llep", "threshold": 1.0, "min_tokens": 1}},
        },
        "tiers": {
            "model": model,
            "parallel": {"tp": 2, "ep": 2},
            "requests": CLOSED,
            "tiers": {"experts": 0.005, "home": "nvme"},
            "policies": {"offload": "cached", "prefetch": "next_layer"},
        },
        "tiers_cpu": {
            "model": model,
            "requests": CLOSED,
            "tiers": {"experts": 0.01, "cpu": {"gb_per_s": 1}},
            "policies": {"offload": "ktransformers", "precision": "mole"},
        },
        "tiers_proven": {
            "model": model,
            "requests": CLOSED,
            "tiers": {"experts": 0.005},
            "policies": {"offload": "split_ilp", "precision": "bits_ilp"},
        },
        "does_not_fit": {"model": model, "engine": {"runtime_memory_gib": 100}},
    }
    out = {name: simulate(scenario(folder, **parts)).to_json() for name, parts in cases.items()}
    train: dict[str, dict[str, Any]] = {
        "train": {
            "cluster": cases["exchange"]["cluster"],
            "parallel": {"dp": 4, "ep": 4, "replicas": 2},
            "capacity": {"factor": 1.0},
            "training": {"zero_stage": 3, "overlap_grad_reduce": False, "recompute": "full"},
        },
        "train_tp": {"parallel": {"tp": 2, "dp": 1, "ep": 1}},
        "train_dense": {"model": tiny_model(folder, moe=None), "parallel": {"dp": 2}},
        "train_does_not_fit": {"training": {"runtime_memory_gib": 100}},
    }
    for name, parts in train.items():
        out[name] = simulate(training_scenario(folder, **{"model": model, **parts})).to_json()
    return out


def test_every_key_of_a_result_is_documented(reports: dict[str, dict[str, Any]]) -> None:
    known = documented()
    for name, report in reports.items():
        unknown = set(leaves(report)) - known - parents(known)
        assert not unknown, f"{name}: not in docs/result-schema.md: {sorted(unknown)}"


def test_every_documented_key_occurs(reports: dict[str, dict[str, Any]]) -> None:
    seen = {key for report in reports.values() for key in leaves(report)}
    assert not documented() - seen, f"documented, but in no result: {sorted(documented() - seen)}"


def test_results_have_the_promised_schema(reports: dict[str, dict[str, Any]]) -> None:
    """The keys that stay stable, as they were promised."""
    report = reports["exchange"]
    summary, provenance = report["summary"], report["provenance"]
    assert {"schema_version", "name", "seed", "feasible", "reasons", "summary", "provenance"} <= set(report)
    assert {"completed", "rejected", "preempted"} <= set(summary["requests"])
    assert set(summary["tokens"]) == {"prompt", "output"}
    rates = {"output_tok_per_s", "total_tok_per_s", "req_per_s", "output_tok_per_s_per_device"}
    assert rates | {"interval90"} <= set(summary["throughput"])
    assert set(summary["throughput"]["interval90"]) == rates
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert set(FIGURES) <= set(summary[name])
        for figure in FIGURES:
            low, high = summary[name]["interval90"][figure]
            assert low <= summary[name][figure] <= high
    assert {"goodput_req_per_s", "steps", "duration_s", "time_share", "links", "memory"} <= set(summary)
    assert {"max_over_mean_load", "lockstep"} <= set(summary["balance"])
    assert all({"used", "capacity", "by"} <= set(tier) for tier in summary["memory"].values())
    assert {"drops", "cache", "replay"} <= set(summary)
    assert set(reports["token"]["summary"]["replay"]) == {"replayed", "reused", "resampled"}
    assert {"profile", "shares", "versions", "scenario_hash"} <= set(provenance)
    assert {"measured", "interpolated", "extrapolated", "assumed"} <= set(provenance["shares"])
    assert sum(provenance["shares"].values()) == pytest.approx(1.0)
    assert sum(summary["time_share"].values()) == pytest.approx(1.0)


def test_no_summary_where_it_does_not_fit(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["does_not_fit"]
    assert report["feasible"] is False
    assert report["summary"] is None
    assert report["reasons"]
