"""KTransformers: SGLang's `--kt-*` (names: `options`)."""

from __future__ import annotations

from moesim.explain_offload.flags import device_experts
from moesim.offload.ktransformers import Policy
from moesim.scenario.load import Scenario
from moesim_tuner.export.sheet import Settings, Sheet, Winner

__all__ = ["misfit", "settings"]

_STRATEGIES = {"uniform": "uniform", "frequency": "frequency", "front_loading": "front-loading", "random": "random"}


def misfit(scenario: Scenario) -> str:
    """Why KTransformers cannot run this; "" if it can."""
    if scenario.tiers is None:
        return "KTransformers is for experts in host memory"
    kind = scenario.policies.kinds["offload"]
    return "" if kind == "ktransformers" else f"KTransformers does not offload as {kind} does"


def settings(winner: Winner) -> Settings:
    """The command and what it leaves unsaid. A number of experts is of a layer, on average."""
    s, tiers = winner.scenario, winner.scenario.tiers
    policy = s.policies.offload
    assert tiers is not None
    assert isinstance(policy, Policy)
    sheet = Sheet("ktransformers", winner, "python", "-m", "sglang.launch_server")
    sheet.option("--model-path", s.model.name)
    sheet.option("--kt-weight-path", "WEIGHTS")
    held = device_experts(s, winner.result.to_json()["summary"]) // s.model.num_moe_layers
    sheet.option("--kt-num-gpu-experts", held, "policies.offload", "policies.offload.num_gpu_experts")
    sheet.carries("policies.offload.gpu_experts_ratio", "tiers.vram", "tiers.experts", "tiers.staging")
    cores = s.cluster.node.cpu_cores if tiers.cpu.cores is None else tiers.cpu.cores
    sheet.option("--kt-cpuinfer", cores, "tiers.cpu.cores")
    sheet.option("--kt-threadpool-count", tiers.cpu.numa_domains, "tiers.cpu.numa_domains")
    if policy.strategy == "dynamic":
        sheet.option("--kt-enable-dynamic-expert-update", None, "policies.offload.strategy")
        sheet.option("--kt-gpu-prefill-token-threshold", policy.update_tokens, "policies.offload.update_tokens")
    strategy = _STRATEGIES.get(policy.strategy, "frequency")
    sheet.option("--kt-expert-placement-strategy", strategy, "policies.offload.strategy")
    if strategy == "frequency":
        sheet.option("--init-expert-location", "RECORDING")
        sheet.notes.append("RECORDING: a file of SGLang's expert distribution recorder, made from your traffic")
    if policy.deferred_experts:
        sheet.option("--kt-max-deferred-experts-per-token", policy.deferred_experts)
    sheet.carries("policies.offload.deferred_experts")
    if s.parallel.tp > 1:
        sheet.option("--tp-size", s.parallel.tp, "parallel.tp")
    sheet.option("--chunked-prefill-size", s.engine.max_num_batched_tokens, "engine.max_num_batched_tokens")
    sheet.option("--max-running-requests", s.engine.max_num_seqs, "engine.max_num_seqs")
    if tiers.kv_tokens is not None:
        sheet.option("--max-total-tokens", tiers.kv_tokens, "tiers.kv_tokens")
    sheet.notes.append("WEIGHTS: the experts' weights as kt-kernel reads them (--kt-method says in which format)")
    return sheet.settings()
