"""What to start engines with: names as their sources have them."""

from __future__ import annotations

import json
import math
from typing import Any

from moesim.explain_offload.answer import Answer
from moesim.explain_offload.play import Played
from moesim.scenario.load import Scenario

__all__ = ["device_experts", "engine_flags"]


def device_experts(scenario: Scenario, summary: dict[str, Any]) -> int:
    """Experts of all layers that a replica has room for: fixed ones and the cache's. Ranks hold parts of all experts
    (what fits on one fits on all), or each its own."""
    if summary["cache"] is None:
        return scenario.model.num_experts * scenario.model.num_moe_layers
    slots = summary["cache"]["slots"]
    a_layer = float(slots["fixed_per_layer"]) + float(slots["cache_per_layer"])
    return math.floor(a_layer * scenario.model.num_moe_layers * scenario.parallel.ep + 1e-6)


def engine_flags(answer: Answer) -> dict[str, str]:
    """Engine -> flags of the best run that it could make. llama.cpp: common/arg.cpp; KTransformers: SGLang's
    `--kt-*` (kt-kernel's README and server_args.py); caches: MoE-Infinity's and Mixtral-offloading's own settings."""
    if answer.fits:
        return {}
    out: dict[str, str] = {}
    for played in answer.finals:
        if played.summary is None or not played.candidate.engine or played.candidate.engine in out:
            continue
        told = _FLAGS.get(played.candidate.kind)
        if told is not None:
            out[played.candidate.engine] = told(answer, played)
    return out


def _chunk(answer: Answer, played: Played) -> int:
    """Tokens of a step: the scenario's, or what the candidate changed it to."""
    for change in played.candidate.changes:
        key, _, value = change.partition("=")
        if key == "engine.max_num_batched_tokens":
            return int(value)
    return answer.scenario.engine.max_num_batched_tokens


def _llama_cpp(answer: Answer, played: Played) -> str:
    assert played.summary is not None
    model = answer.scenario.model
    layers = device_experts(answer.scenario, played.summary) // model.num_experts
    on_cpu = model.num_moe_layers - layers
    blocks = model.moe_layers[on_cpu - 1] + 1 if on_cpu else 0
    chunk = _chunk(answer, played)
    context = f"-c {answer.ask.kv_tokens} -np {answer.ask.concurrency}"  # all slots together share the context
    return f"-ngl 999 --n-cpu-moe {blocks} {context} -ub {chunk} -b {chunk}"


def _ktransformers(answer: Answer, played: Played) -> str:
    assert played.summary is not None
    ask, scenario = answer.ask, answer.scenario
    policy = next(
        json.loads(value)
        for key, _, value in (change.partition("=") for change in played.candidate.changes)
        if key == "policies.offload"
    )
    number = device_experts(scenario, played.summary) // scenario.model.num_moe_layers
    strategy = policy.get("strategy", "uniform")
    cpu = scenario.tiers.cpu if scenario.tiers is not None else None
    cores = scenario.cluster.node.cpu_cores if cpu is None or cpu.cores is None else cpu.cores
    flags = f"--kt-num-gpu-experts {number} --kt-cpuinfer {cores}"
    flags += f" --kt-threadpool-count {cpu.numa_domains if cpu is not None else 1}"
    if strategy == "uniform":
        flags += " --kt-expert-placement-strategy uniform"
    else:
        flags += " --kt-expert-placement-strategy frequency --init-expert-location FILE"
    if strategy == "dynamic":
        flags += (
            f" --kt-enable-dynamic-expert-update --kt-gpu-prefill-token-threshold {policy.get('update_tokens', 512)}"
        )
    if scenario.parallel.tp > 1:
        flags += f" --tensor-parallel-size {scenario.parallel.tp}"
    chunk = _chunk(answer, played)
    flags += f" --chunked-prefill-size {chunk} --max-running-requests {ask.concurrency}"
    return f"{flags} --max-total-tokens {ask.kv_tokens}"


def _cache(answer: Answer, played: Played) -> str:
    assert played.summary is not None
    scenario = answer.scenario
    held = device_experts(scenario, played.summary)
    slots = held // scenario.model.num_moe_layers
    offload = max(scenario.model.num_experts - slots, 0)
    memory = played.summary["memory"]["hbm"]
    share = (memory["by"].get("expert_weights", 0) + memory["by"].get("expert_cache", 0)) / memory["capacity"]
    share = math.floor(share * 100) / 100  # never more than there is
    return f"MoE-Infinity device_memory_ratio={share:.2f}; Mixtral-offloading offload_per_layer={offload}"


_FLAGS = {"llama_cpp": _llama_cpp, "ktransformers": _ktransformers, "cached": _cache}
