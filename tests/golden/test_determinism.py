"""The same scenario and seed give the same bytes in another process, whatever its hash seed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.build import tiny_model

ROOT = Path(__file__).parents[2]
HASH_SEEDS = ("0", "1", "random")
CASES: dict[str, dict[str, Any]] = {
    "count": {
        "parallel": {"dp": 8, "ep": 8, "replicas": 2},
        "routing": {"popularity_zipf": 1.0, "repeat": 0.3, "domains": 3},
        "policies": {"placement": {"kind": "eplb", "num_redundant_experts": 8}, "balancer": "least_loaded"},
    },
    "token": {
        "parallel": {"tp": 2, "dp": 2, "ep": 4},
        "routing": {"fidelity": "token", "drift": 0.5},
        "policies": {"dispatch": "random", "batching": "sglang", "balancer": "session"},
        "engine": {"weights_from": "nvme"},
    },
    "training": {
        "mode": "training",
        "parallel": {"dp": 4, "ep": 4, "replicas": 2},
        "policies": {"routing": "loss_free"},
        "capacity": {"factor": 1.0, "drop": "reroute"},
        "training": {"sequence_tokens": 128, "global_batch_sequences": 16, "steps": 4, "zero_stage": 1},
    },
    "dense": {"model": {"moe": None}, "engine": {"max_num_seqs": 4, "max_num_batched_tokens": 64}},
}
REQUESTS = {
    "format": "gamma", "rate_per_s": 500.0, "cv": 2.0, "num_requests": 60,
    "prompt_tokens": {"distribution": "lognormal", "mean": 80, "cv": 1.0, "max": 2000},
    "output_tokens": {"distribution": "geometric", "mean": 20, "max": 100},
}  # fmt: skip

RUN = """
import hashlib, json, sys
from pathlib import Path
from moesim.simulate import simulate
from tests.build import scenario

folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
out = {}
for name, parts in cases.items():
    result = simulate(scenario(folder, **parts))
    told = result.to_json()
    host, elapsed = told["provenance"].pop("host"), told["provenance"].pop("elapsed")
    assert host and elapsed
    tables = {}
    for table in result.tables().values():
        for column, values in table.items():
            tables[column] = [str(values.dtype), hashlib.blake2b(values.tobytes()).hexdigest()]
    out[name] = [json.dumps(told), tables]
print(json.dumps(out))
"""


def run(folder: Path, cases: dict[str, Any], hash_seed: str) -> dict[str, Any]:
    """Simulate `cases` in a process of its own; result (as text, without host and clock) and tables' hashes by name."""
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), json.dumps(cases)],
        env=env, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ...]:
    """Every case with every hash seed, each case once more with another seed."""
    folder = tmp_path_factory.mktemp("determinism")
    cases: dict[str, Any] = {}
    for name, given in CASES.items():
        parts = copy.deepcopy(given)
        parts["model"] = tiny_model(folder, **parts.pop("model", {}))
        parts["requests"] = None if "training" in parts else REQUESTS
        cases[name] = parts
        cases[f"{name}, other seed"] = {**parts, "seed": 2}
    return tuple(run(folder, cases, hash_seed) for hash_seed in HASH_SEEDS)


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_same_bytes_in_three_processes(results: tuple[dict[str, Any], ...], case: str) -> None:
    text, tables = results[0][case]
    if case == "training":
        assert {"step_ns", "maxvio"} <= set(tables)
    else:
        assert json.loads(text)["summary"]["requests"]["completed"] == REQUESTS["num_requests"]
        assert {"finish_ns", "start_ns", "duration_ns"} <= set(tables)
    for other in results[1:]:
        assert digest(other[case][0]) == digest(text)
        assert other[case][1] == tables


@pytest.mark.parametrize("case", sorted(CASES))
def test_another_seed_is_another_run(results: tuple[dict[str, Any], ...], case: str) -> None:
    (text, tables), (other_text, other_tables) = results[0][case], results[0][f"{case}, other seed"]
    assert json.loads(text)["summary"] != json.loads(other_text)["summary"]
    columns = ("arrival_ns", "finish_ns", "prompt_tokens", "duration_ns")
    for column in columns if case != "training" else ("step_ns", "maxvio", "dropped_share"):
        assert tables[column] != other_tables[column], column


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode()).hexdigest()
