"""Options that engines have, as their sources spell them: what an exported command is held to.

Only options that an export may use. Kinds of value: int, float, str, json, flag (none), or the values there are.
Checked by `check`; written from the sources named, not from the writers.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

__all__ = ["OPTIONS", "SOURCES", "TRTLLM_KEYS", "check", "check_keys"]

Kind = str | tuple[str, ...]

SOURCES: Mapping[str, str] = {
    "vllm": "vllm-project/vllm vllm/engine/arg_utils.py (EngineArgs.add_cli_args), vllm/config/parallel.py",
    "sglang": "sgl-project/sglang python/sglang/srt/server_args.py (ServerArgs: a field a flag)",
    "ktransformers": "sgl-project/sglang python/sglang/srt/server_args.py (kt_*), kvcache-ai/ktransformers kt-kernel",
    "llama_cpp": "ggml-org/llama.cpp common/arg.cpp",
    "trtllm": "NVIDIA/TensorRT-LLM tensorrt_llm/commands/serve.py, tensorrt_llm/llmapi/llm_args.py",
    "megatron": (
        "NVIDIA/Megatron-LM megatron/training/arguments.py, megatron/core/transformer/transformer_config.py,"
        " megatron/core/model_parallel_config.py, megatron/core/distributed/distributed_data_parallel_config.py"
        " (a field a flag)"
    ),
}
"""Engine -> repository and files that its options were read in."""

_SGLANG: dict[str, Kind] = {
    "--model-path": "str",
    "--tp-size": "int",
    "--dp-size": "int",
    "--ep-size": "int",
    "--nnodes": "int",
    "--enable-dp-attention": "flag",
    "--moe-a2a-backend": ("none", "deepep", "mooncake", "nixl", "mori", "flashinfer", "deepep_v2", "pplx"),
    "--deepep-mode": ("auto", "normal", "low_latency"),
    "--enable-two-batch-overlap": "flag",
    "--max-running-requests": "int",
    "--max-prefill-tokens": "int",
    "--chunked-prefill-size": "int",
    "--max-total-tokens": "int",
    "--enable-mixed-chunk": "flag",
    "--context-length": "int",
    "--page-size": "int",
    "--load-balance-method": ("auto", "round_robin", "follow_bootstrap_room", "total_requests", "total_tokens"),
    "--enable-eplb": "flag",
    "--eplb-rebalance-num-iterations": "int",
    "--eplb-rebalance-layers-per-chunk": "int",
    "--eplb-min-rebalancing-utilization-threshold": "float",
    "--expert-distribution-recorder-buffer-size": "int",
    "--ep-num-redundant-experts": "int",
    "--ep-dispatch-algorithm": ("static", "dynamic", "fake", "lp"),
    "--init-expert-location": "str",
    "--disable-decode-cuda-graph": "flag",
}

OPTIONS: Mapping[str, Mapping[str, Kind]] = {
    "vllm": {
        "--tensor-parallel-size": "int",
        "--data-parallel-size": "int",
        "--data-parallel-size-local": "int",
        "--enable-expert-parallel": "flag",
        "--all2all-backend": (
            "naive", "pplx", "deepep_high_throughput", "deepep_low_latency", "mori", "allgather_reducescatter",
            "flashinfer_all2allv",
        ),
        "--enable-dbo": "flag",
        "--enable-eplb": "flag",
        "--eplb-config": "json",
        "--max-num-seqs": "int",
        "--max-num-batched-tokens": "int",
        "--long-prefill-token-threshold": "int",
        "--max-model-len": "int",
        "--block-size": "int",
        "--gpu-memory-utilization": "float",
        "--kv-cache-dtype": "str",
        "--enforce-eager": "flag",
    },
    "sglang": _SGLANG,
    "ktransformers": {
        **_SGLANG,
        "--kt-weight-path": "str",
        "--kt-method": "str",
        "--kt-num-gpu-experts": "int",
        "--kt-cpuinfer": "int",
        "--kt-threadpool-count": "int",
        "--kt-max-deferred-experts-per-token": "int",
        "--kt-expert-placement-strategy": ("uniform", "frequency", "front-loading", "random"),
        "--kt-enable-dynamic-expert-update": "flag",
        "--kt-gpu-prefill-token-threshold": "int",
    },
    "llama_cpp": {
        "--model": "str",
        "--n-gpu-layers": "int",
        "--n-cpu-moe": "int",
        "--cpu-moe": "flag",
        "--override-tensor": "str",
        "--ctx-size": "int",
        "--parallel": "int",
        "--batch-size": "int",
        "--ubatch-size": "int",
        "--threads": "int",
    },
    "trtllm": {
        "--tp_size": "int",
        "--ep_size": "int",
        "--gpus_per_node": "int",
        "--max_batch_size": "int",
        "--max_num_tokens": "int",
        "--max_seq_len": "int",
        "--extra_llm_api_options": "str",
    },
    "megatron": {
        "--nnodes": "int",
        "--nproc-per-node": "int",
        "--tensor-model-parallel-size": "int",
        "--expert-model-parallel-size": "int",
        "--expert-tensor-parallel-size": "int",
        "--num-experts": "int",
        "--moe-router-topk": "int",
        "--moe-router-load-balancing-type": (
            "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing", "none",
        ),
        "--moe-aux-loss-coeff": "float",
        "--moe-router-enable-expert-bias": "flag",
        "--moe-router-bias-update-rate": "float",
        "--moe-token-dispatcher-type": ("allgather", "alltoall", "flex"),
        "--moe-expert-capacity-factor": "float",
        "--moe-pad-expert-input-to-capacity": "flag",
        "--moe-token-drop-policy": ("probs", "position"),
        "--overlap-moe-expert-parallel-comm": "flag",
        "--seq-length": "int",
        "--micro-batch-size": "int",
        "--global-batch-size": "int",
        "--recompute-granularity": ("full", "selective"),
        "--recompute-method": ("uniform", "block"),
        "--recompute-num-layers": "int",
        "--recompute-modules": "strs",
        "--use-distributed-optimizer": "flag",
        "--use-megatron-fsdp": "flag",
        "--data-parallel-sharding-strategy": ("no_shard", "optim", "optim_grads", "optim_grads_params"),
        "--ckpt-format": ("torch", "torch_dist", "torch_dcp", "fsdp_dtensor"),
        "--overlap-grad-reduce": "flag",
        "--overlap-param-gather": "flag",
        "--accumulate-allreduce-grads-in-fp32": "flag",
        "--bf16": "flag",
    },
}  # fmt: skip
"""Engine -> option -> the value it takes. torchrun's own two stand with Megatron-LM's."""

TRTLLM_KEYS: Mapping[str, Kind] = {
    "enable_attention_dp": "bool",
    "enable_chunked_prefill": "bool",
    "moe_tensor_parallel_size": "int",
    "kv_cache_config": "mapping",
    "kv_cache_config.free_gpu_memory_fraction": "float",
    "kv_cache_config.tokens_per_block": "int",
    "moe_config": "mapping",
    "moe_config.backend": (
        "AUTO", "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON",
    ),
    "moe_config.load_balancer": "str",
}  # fmt: skip
"""Keys of the YAML of --extra_llm_api_options that an export may use (LlmArgs, KvCacheConfig, MoeConfig: no others are
permitted there)."""


def check(engine: str, words: Sequence[str]) -> list[str]:
    """What an engine's parser would refuse in a command, [] if nothing. Words before the first option are the program
    and what it takes by place."""
    known = OPTIONS[engine]
    problems: list[str] = []
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    rest = list(words[first:])
    seen: set[str] = set()
    while rest:
        option = rest.pop(0)
        if option.endswith(".py") and engine == "megatron":  # torchrun's program, after torchrun's own options
            continue
        if option not in known:
            problems.append(f"{engine} has no option {option!r}")
            while rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        if option in seen:
            problems.append(f"{option} stands twice")
        seen.add(option)
        kind = known[option]
        if kind == "flag":
            continue
        if not rest or rest[0].startswith("--"):
            problems.append(f"{option} needs a value")
            continue
        problems += _value(option, kind, rest.pop(0))
        while kind == "strs" and rest and not rest[0].startswith("--"):
            rest.pop(0)
    return problems


def _value(option: str, kind: Kind, text: str) -> list[str]:
    if isinstance(kind, tuple):
        return [] if text in kind else [f"{option}: one of {', '.join(kind)} is needed, got {text!r}"]
    try:
        if kind == "int":
            int(text)
        elif kind == "float":
            float(text)
        elif kind == "json":
            json.loads(text)
        elif not text:
            raise ValueError
    except ValueError:
        return [f"{option}: {kind} is needed, got {shlex.quote(text)[:80]}"]
    return []


def check_keys(data: Mapping[str, object], prefix: str = "") -> list[str]:
    """What TensorRT-LLM's strict model would refuse in the YAML of --extra_llm_api_options, [] if nothing."""
    problems: list[str] = []
    types: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}
    for key, value in data.items():
        path = f"{prefix}{key}"
        kind = TRTLLM_KEYS.get(path)
        if kind is None:
            problems.append(f"the key {path!r} is not permitted")
        elif kind == "mapping":
            if isinstance(value, Mapping):
                problems += check_keys(value, f"{path}.")
            else:
                problems.append(f"{path}: a mapping is needed")
        elif isinstance(kind, tuple):
            if value not in kind:
                problems.append(f"{path}: one of {', '.join(kind)} is needed, got {value!r}")
        elif not isinstance(value, types[kind]) or (kind != "bool" and isinstance(value, bool)):
            problems.append(f"{path}: {kind} is needed, got {value!r}")
    return problems
