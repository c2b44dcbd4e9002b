"""Starts: the scenario as written, the user's, engines' defaults and rules of the literature, as points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from moesim_tuner.heuristics import ROWS, starts
from moesim_tuner.records import Candidate
from moesim_tuner.space import Space

from moesim.scenario.load import Scenario, load_scenario_text
from tests import build


def tuned(folder: Path, space: dict[str, Any], start: list[dict[str, Any]] | None = None, **parts: Any) -> Scenario:
    parts = {"parallel": {"tp": 1, "dp": 8, "ep": 8}, **parts}
    block = {"space": space, "objectives": ["output_tok_per_s"], "start": start or []}
    return build.scenario(folder, tune=block, **parts)


def found(scenario: Scenario) -> dict[str, Candidate]:
    assert scenario.tune is not None
    candidates = starts(scenario, Space(scenario.tune.space), scenario.tune)
    return {c.origin: c for c in reversed(candidates)}


def test_default_first_then_the_users_then_rows_each_once_and_in_the_space(tmp_path: Path) -> None:
    space = {
        "engine.max_num_seqs": {"log_range": [16, 2048], "factor": 2},
        "engine.max_num_batched_tokens": {"choices": [512, 2048, 8192]},
        "policies.placement": {"choices": ["contiguous", "eplb"]},
        "policies.placement.num_redundant_experts": {
            "range": [0, 32],
            "step": 8,
            "when": {"policies.placement": "eplb"},
        },
    }
    scenario = tuned(tmp_path, space, [{"engine.max_num_seqs": 64}, {"policies.placement": "eplb"}])
    assert scenario.tune is not None
    of = Space(scenario.tune.space)
    candidates = starts(scenario, of, scenario.tune)
    assert [c.origin for c in candidates[:3]] == ["default", "start", "start"]
    assert candidates[0].point == {
        "engine.max_num_seqs": 256, "engine.max_num_batched_tokens": 8192, "policies.placement": "contiguous"
    }  # fmt: skip
    assert candidates[1].point == {**candidates[0].point, "engine.max_num_seqs": 64}
    assert candidates[2].point["policies.placement.num_redundant_experts"] == 0
    assert all(c.point in of for c in candidates)
    assert len({of.key(c.point) for c in candidates}) == len(candidates)
    assert all(c.origin.startswith("heuristic: ") for c in candidates[3:])


def test_vllm_defaults_depend_on_the_device(tmp_path: Path) -> None:
    """vllm/engine/arg_utils.py get_batch_defaults: 1024 and 8192 from 70 GiB on, else 256 and 2048."""
    space = {
        "engine.max_num_seqs": {"choices": [128, 256, 1024]},
        "engine.max_num_batched_tokens": {"choices": [1024, 2048, 8192]},
    }
    large = found(tuned(tmp_path, space, engine={"max_num_seqs": 128, "max_num_batched_tokens": 1024}))
    assert large["heuristic: vllm defaults"].point == {
        "engine.max_num_seqs": 1024, "engine.max_num_batched_tokens": 8192
    }  # fmt: skip
    cluster = {"device": "rtx_4090", "nodes": 1, "gpus_per_node": 8}
    small = found(tuned(tmp_path, space, cluster=cluster, engine={"max_num_seqs": 128, "max_num_batched_tokens": 1024}))
    assert small["heuristic: vllm defaults"].point == {
        "engine.max_num_seqs": 256, "engine.max_num_batched_tokens": 2048
    }  # fmt: skip


def test_one_redundant_expert_a_rank_as_deepseek_v3_has_it(tmp_path: Path) -> None:
    """32 ranks of 8 of 256 experts get one more each: 32."""
    model = build.tiny_model(tmp_path, moe={"num_experts": 256})
    choices = ["contiguous", *({"kind": "eplb", "num_redundant_experts": n} for n in (0, 16, 32, 64))]
    scenario = tuned(
        tmp_path, {"policies.placement": {"choices": choices}}, model=model, parallel={"tp": 1, "dp": 32, "ep": 32}
    )
    by_name = found(scenario)
    one = by_name["heuristic: eplb, one redundant expert a rank"]
    assert one.point == {"policies.placement": "eplb(num_redundant_experts=32)"}
    assert by_name["heuristic: eplb"].point == {"policies.placement": "eplb(num_redundant_experts=0)"}
    assert by_name["default"].point == {"policies.placement": "contiguous"}


def test_labelled_layouts_are_chosen_by_what_they_set(tmp_path: Path) -> None:
    layouts = {
        "tp8": {"parallel.tp": 8, "parallel.dp": 1, "parallel.ep": 8},
        "split": {"parallel.tp": 1, "parallel.dp": 8, "parallel.ep": 1},
        "ep8": {"parallel.tp": 1, "parallel.dp": 8, "parallel.ep": 8},
    }
    cluster = {"device": "h100_sxm_datasheet", "nodes": 1, "gpus_per_node": 8}
    scenario = tuned(tmp_path, {"layout": {"choices": layouts}}, cluster=cluster, parallel={"tp": 1, "dp": 8, "ep": 1})
    by_name = found(scenario)
    assert by_name["default"].point == {"layout": "split"}
    assert by_name["heuristic: ep over all ranks"].point == {"layout": "ep8"}  # dp attention is the same point
    assert "heuristic: dp attention, ep over all" not in by_name
    assert by_name["heuristic: tp inside the node"].point == {"layout": "tp8"}


def test_a_scenario_outside_the_space_is_tried_as_written(tmp_path: Path) -> None:
    space = {"engine.max_num_seqs": {"choices": [32, 64]}, "engine.block_size": {"choices": [16, 32]}}
    scenario = tuned(tmp_path, space, [{"engine.block_size": 32}], engine={"max_num_seqs": 100})
    assert scenario.tune is not None
    of = Space(scenario.tune.space)
    first, second, *_ = starts(scenario, of, scenario.tune)
    assert first == Candidate({"engine.block_size": 16}, "default")
    assert of.outside(first.point) == ("engine.max_num_seqs",)
    assert of.overrides(first.point) == ("engine.block_size=16",)
    assert second == Candidate({"engine.max_num_seqs": 64, "engine.block_size": 32}, "start")


def test_capacity_of_a_training_run() -> None:
    text = Path("workloads/train_mixtral_ep8.yaml").read_text()
    text += "tune: {space: {capacity.factor: {range: [1.0, 2.0], step: 0.25}}, objectives: [tok_per_s]}\n"
    by_name = found(load_scenario_text(text, Path("workloads")))
    assert by_name["default"].point == {"capacity.factor": 1.25}
    assert by_name["heuristic: capacity 2.0"].point == {"capacity.factor": 2.0}
    assert "heuristic: vllm defaults" not in by_name


def test_experts_between_memories() -> None:
    """The cache is as large as the space allows; Fiddler is tried without it."""
    text = Path("workloads/offload_mixtral_4090.yaml").read_text().replace("kv_tokens: 4096", "experts: 10")
    text += """
tune:
  objectives: [output_tok_per_s]
  space:
    policies.offload: {choices: [fiddler, cached]}
    policies.eviction: {choices: [lru, lfu], when: {policies.offload: cached}}
    policies.prefetch: {choices: [none, next_layer], when: {policies.offload: cached}}
    tiers.experts: {choices: [4, 8, 16 GiB, 12]}
"""
    scenario = load_scenario_text(text, Path("workloads"))
    by_name = found(scenario)
    assert by_name["heuristic: lru cache, next layer fetched"].point["policies.prefetch"] == "next_layer"
    assert by_name["heuristic: lru cache, next layer fetched"].point["tiers.experts"] == "16 GiB"
    assert by_name["heuristic: lfu cache"].point["policies.eviction"] == "lfu"
    assert by_name["default"].point == {"policies.offload": "fiddler"}  # 10 GiB is no choice


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_rows_name_fields_that_there_are_and_a_source(row: Any) -> None:
    from moesim.policy import policy_kinds
    from moesim.scenario.fields import FAMILY_KEYS, field_problem

    kinds = {key: policy_kinds(family) for family, key in FAMILY_KEYS.items()}
    assert [field_problem(path, kinds) for path in row.fields] == [None] * len(row.fields)
    assert len(row.source) > 10
