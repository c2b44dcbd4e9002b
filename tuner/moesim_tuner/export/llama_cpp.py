"""llama.cpp: options of llama-server (names: `options`). --n-cpu-moe counts blocks from the first, dense ones too."""

from __future__ import annotations

from moesim.explain_offload.flags import device_experts
from moesim.offload.llama_cpp import Policy
from moesim.scenario.load import Scenario
from moesim_tuner.export.sheet import Settings, Sheet, Winner

__all__ = ["misfit", "settings"]


def misfit(scenario: Scenario) -> str:
    """Why llama.cpp cannot run this; "" if it can."""
    if scenario.tiers is None:
        return "llama.cpp is exported for experts in host memory alone"
    kind = scenario.policies.kinds["offload"]
    return "" if kind == "llama_cpp" else f"llama.cpp does not offload as {kind} does"


def settings(winner: Winner) -> Settings:
    """The command and what it leaves unsaid."""
    s, tiers, model = winner.scenario, winner.scenario.tiers, winner.scenario.model
    policy = s.policies.offload
    assert tiers is not None
    assert isinstance(policy, Policy)
    sheet = Sheet("llama_cpp", winner, "llama-server")
    sheet.option("--model", f"{model.name}.gguf")
    sheet.option("--n-gpu-layers", 999)
    if policy.override_tensor:
        sheet.option("--override-tensor", ",".join(policy.override_tensor), "policies.offload.override_tensor")
    elif policy.cpu_moe:
        sheet.option("--cpu-moe", None, "policies.offload.cpu_moe")
    else:
        layers = device_experts(s, winner.result.to_json()["summary"]) // model.num_experts
        on_cpu = model.num_moe_layers - layers
        sheet.option("--n-cpu-moe", model.moe_layers[on_cpu - 1] + 1 if on_cpu else 0)
    sheet.carries("policies.offload", "policies.offload.n_cpu_moe", "tiers.vram", "tiers.experts", "tiers.staging")
    if tiers.kv_tokens is not None:
        sheet.option("--ctx-size", tiers.kv_tokens, "tiers.kv_tokens")
        sheet.notes.append("--ctx-size is of all slots together")
    sheet.option("--parallel", s.engine.max_num_seqs, "engine.max_num_seqs")
    sheet.option("--batch-size", s.engine.max_num_batched_tokens, "engine.max_num_batched_tokens")
    sheet.option("--ubatch-size", s.engine.max_num_batched_tokens)
    if tiers.cpu.cores is not None:
        sheet.option("--threads", tiers.cpu.cores, "tiers.cpu.cores")
    formats = "/".join(dict.fromkeys((model.weight_dtype, model.expert_dtype)))
    sheet.notes.append(f"simulated with weights in {formats}: take a file of that format")
    return sheet.settings()
