"""Where a scenario stands in its space: written in short or long, with units, or left to a default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from moesim_tuner.space import Space

from moesim.scenario.load import Scenario, scenario_from_dict
from tests import build


def tuned(folder: Path, space: dict[str, Any], **parts: Any) -> Scenario:
    return build.scenario(folder, tune={"space": space, "objectives": ["output_tok_per_s"]}, **parts)


def standing(scenario: Scenario) -> dict[str, Any]:
    assert scenario.tune is not None
    return Space(scenario.tune.space).point_of(scenario.raw, scenario.resolved)


PLACEMENTS = ["contiguous", "eplb", {"kind": "eplb", "num_redundant_experts": 8}]
REDUNDANT = {"range": [0, 16], "step": 8, "when": {"policies.placement": "eplb"}}


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (None, "contiguous"),
        ("eplb", "eplb"),
        ({"kind": "eplb"}, "eplb"),
        ({"kind": "eplb", "mode": "auto", "num_redundant_experts": 0}, "eplb"),
        ({"kind": "eplb", "num_redundant_experts": 8}, "eplb(num_redundant_experts=8)"),
        ({"kind": "eplb", "num_redundant_experts": 16}, None),
        ({"kind": "eplb", "mode": "global"}, None),
        ("random", None),
    ],
)
def test_policies(tmp_path: Path, written: Any, found: str | None) -> None:
    policies = {} if written is None else {"policies": {"placement": written}}
    scenario = tuned(tmp_path, {"policies.placement": {"choices": PLACEMENTS}}, parallel={"dp": 8, "ep": 8}, **policies)
    assert standing(scenario) == ({} if found is None else {"policies.placement": found})


def test_a_policys_parameter_that_is_searched_apart(tmp_path: Path) -> None:
    space = {
        "policies.placement": {"choices": ["contiguous", "eplb"]},
        "policies.placement.num_redundant_experts": REDUNDANT,
    }
    written = {"placement": {"kind": "eplb", "num_redundant_experts": 8}}
    scenario = tuned(tmp_path, space, parallel={"dp": 8, "ep": 8}, policies=written)
    point = {"policies.placement": "eplb", "policies.placement.num_redundant_experts": 8}
    assert standing(scenario) == point
    assert standing(tuned(tmp_path, space, parallel={"dp": 8, "ep": 8}, policies={"placement": "eplb"})) == {
        **point, "policies.placement.num_redundant_experts": 0
    }  # fmt: skip


def test_units_defaults_blocks_and_labels(tmp_path: Path) -> None:
    space = {
        "engine.host_overhead_us": {"choices": ["0.1 ms", "250 us"]},
        "engine.runtime_memory_gib": {"choices": ["512 MiB", "1024 MiB"]},
        "engine.gpu_memory_utilization": {"range": [0.8, 0.95]},
        "engine.cuda_graph": {"choices": [False, True]},
        "slo.ttft_ms": {"choices": [1000, "2 s"]},
        "moving": {"choices": {"never": {"rebalance": None}, "often": {"rebalance": {"interval_steps": 100}}}},
        "layout": {"choices": {"a": {"parallel.dp": 8, "parallel.ep": 4}, "b": {"parallel.dp": 8, "parallel.ep": 8}}},
        "model": {"choices": ["mixtral-8x7b", build.tiny_model(tmp_path)]},
        "requests.prompt_tokens.mean": {"choices": [40, 80.0]},
    }
    scenario = tuned(tmp_path, space, parallel={"dp": 8, "ep": 8}, slo={"ttft_ms": 2000})
    assert standing(scenario) == {
        "engine.host_overhead_us": "250 us",
        "engine.runtime_memory_gib": "1024 MiB",
        "engine.gpu_memory_utilization": 0.9,
        "engine.cuda_graph": True,
        "slo.ttft_ms": "2 s",
        "moving": "never",
        "layout": "b",
        "model": build.tiny_model(tmp_path),
        "requests.prompt_tokens.mean": 80.0,
    }


def test_the_scenario_at_its_own_point_is_the_scenario(tmp_path: Path) -> None:
    """The overrides of where it stands change nothing that the hash heeds; those of any other point do."""
    space = {
        "policies.placement": {"choices": ["contiguous", "eplb"]},
        "policies.placement.num_redundant_experts": REDUNDANT,
        "engine.max_num_seqs": {"log_range": [64, 256], "factor": 2},
        "parallel.ep": {"choices": [4, 8]},
    }
    scenario = tuned(tmp_path, space, parallel={"dp": 8, "ep": 8}, policies={"placement": "eplb"})
    assert scenario.tune is not None
    of = Space(scenario.tune.space)
    here = standing(scenario)
    hashes = {}
    for point in of.points():
        loaded = scenario_from_dict(scenario.raw, tmp_path, of.overrides(point))
        hashes[of.key(point)] = loaded.hash
        assert Space(scenario.tune.space).point_of(loaded.raw, loaded.resolved) == point
    assert len(set(hashes.values())) == len(hashes) == of.size == 24
    assert hashes[of.key(here)] == scenario.hash
