"""Small deployments for tests: a tiny model, and scenarios around it."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from pathlib import Path
from typing import Any

import yaml

from moesim.layout import Layout
from moesim.memory import rank_memory
from moesim.scenario.load import Scenario, scenario_from_dict

TINY: dict[str, Any] = {
    "name": "tiny-moe",
    "source": "made up for tests",
    "num_layers": 4,
    "hidden_size": 256,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "max_position_embeddings": 65536,
    "dense_intermediate_size": 512,
    "attention": {"kind": "gqa", "num_heads": 8, "num_kv_heads": 8, "head_dim": 32},
    "moe": {"num_experts": 64, "top_k": 4, "intermediate_size": 128, "first_dense_layers": 1},
}


def tiny_model(folder: Path, **changes: Any) -> str:
    """Write the tiny model with `changes` (keys of the file; None removes one); returns its file name."""
    data = copy.deepcopy(TINY)
    for key, value in changes.items():
        if value is None:
            data.pop(key)
        elif isinstance(value, dict):
            data[key] = {**data.get(key, {}), **value}
        else:
            data[key] = value
    name = f"model{zlib.crc32(repr(sorted(changes.items())).encode())}.yaml"
    (folder / name).write_text(yaml.safe_dump(data))
    return name


def scenario(folder: Path, model: str | None = None, **parts: Any) -> Scenario:
    """A scenario of the tiny model on one node of datasheet H100s; `parts` replace its top-level keys."""
    data: dict[str, Any] = {
        "name": "test",
        "seed": 1,
        "model": model or tiny_model(folder),
        "cluster": {"device": "h100_sxm_datasheet", "nodes": 8, "gpus_per_node": 8},
        "requests": {
            "format": "poisson",
            "rate_per_s": 200.0,
            "num_requests": 60,
            "prompt_tokens": {"distribution": "lognormal", "mean": 80, "cv": 1.0, "max": 4000},
            "output_tokens": {"distribution": "geometric", "mean": 20, "max": 400},
        },
    }
    data.update(parts)
    return scenario_from_dict({k: v for k, v in data.items() if v is not None}, folder)


def training_scenario(folder: Path, model: str | dict[str, Any] | None = None, **parts: Any) -> Scenario:
    """A training scenario of the tiny model on 8 ranks of datasheet H100s, steps of 32 sequences of 128 tokens in the
    middle of a run; keys of `training` are added to these, other `parts` replace top-level keys."""
    data: dict[str, Any] = {
        "name": "test",
        "mode": "training",
        "seed": 1,
        "model": model or tiny_model(folder),
        "cluster": {"device": "h100_sxm_datasheet", "nodes": 8, "gpus_per_node": 8},
        "parallel": {"dp": 8, "ep": 8},
    }
    data.update(parts)
    data["training"] = {
        "sequence_tokens": 128,
        "global_batch_sequences": 32,
        "micro_batch_sequences": 1,
        "steps": 3,
        "progress_start": 0.5,
        "progress_end": 0.5,
        **parts.get("training", {}),
    }
    return scenario_from_dict({k: v for k, v in data.items() if v is not None}, folder)


def with_kv_tokens(scenario: Scenario, tokens: int) -> Scenario:
    """The scenario with a gpu_memory_utilization that leaves each rank a KV cache of `tokens` tokens, in whole blocks
    of every layer."""
    model, engine, p = scenario.model, scenario.engine, scenario.parallel
    layout = Layout.of(model, scenario.cluster, p.tp, p.dp, p.ep)
    redundant = getattr(scenario.policies.placement, "num_redundant_experts", 0)
    memory = rank_memory(model, scenario.cluster, layout, engine, (model.num_experts + redundant) // p.ep)
    units = -(-tokens // engine.block_size) * model.num_layers
    utilization = (memory.fixed + (units + 0.5) * memory.kv_unit) / memory.capacity
    engine = engine.model_copy(update={"gpu_memory_utilization": utilization})
    return dataclasses.replace(scenario, engine=engine)
