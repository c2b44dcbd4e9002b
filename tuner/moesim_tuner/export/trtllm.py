"""TensorRT-LLM: `trtllm-serve` and the YAML of --extra_llm_api_options (names and keys: `options`).

Attention is either tensor parallel over all ranks, or data parallel over all (enable_attention_dp): nothing between.
Limits are those of one rank. A map goes into moe_config.load_balancer and needs the back end WIDEEP.
"""

from __future__ import annotations

from typing import Any

from moesim.scenario.load import Scenario
from moesim.scenario.yamlio import dump_yaml
from moesim_tuner.export.common import add_map, finish
from moesim_tuner.export.options import check_keys
from moesim_tuner.export.sheet import Settings, Sheet, Winner

__all__ = ["FILE", "misfit", "settings"]

FILE = "trtllm_options.yaml"


def misfit(scenario: Scenario) -> str:
    """Why TensorRT-LLM cannot run this; "" if it can."""
    if scenario.requests is None:
        return "TensorRT-LLM does not train"
    return "" if scenario.tiers is None else "TensorRT-LLM keeps no experts in other memories"


def settings(winner: Winner) -> Settings:
    """The command, its options' file, the map that this names, and what they leave unsaid."""
    s, p, engine = winner.scenario, winner.scenario.parallel, winner.scenario.engine
    sheet = Sheet("trtllm", winner, "trtllm-serve", s.model.name)
    sheet.option("--tp_size", winner.ranks)
    if s.model.is_moe:
        sheet.option("--ep_size", p.ep, "parallel.ep")
    sheet.option("--gpus_per_node", min(winner.ranks, s.cluster.gpus_per_node))
    sheet.option("--max_batch_size", engine.max_num_seqs, "engine.max_num_seqs")
    sheet.option("--max_num_tokens", engine.max_num_batched_tokens, "engine.max_num_batched_tokens")
    if engine.max_model_len is not None:
        sheet.option("--max_seq_len", engine.max_model_len, "engine.max_model_len")
    sheet.option("--extra_llm_api_options", f"{winner.folder}/{FILE}")
    data: dict[str, Any] = {"enable_attention_dp": p.tp == 1 and p.dp > 1, "enable_chunked_prefill": True}
    if p.tp > 1 and p.dp > 1:
        why = f"attention is tensor parallel over all {winner.ranks} ranks or data parallel over all"
        sheet.cannot("parallel.tp", p.tp, why)
        sheet.cannot("parallel.dp", p.dp, why)
    sheet.carries("parallel.tp", "parallel.dp")
    if s.model.is_moe and p.ep < winner.ranks:
        data["moe_tensor_parallel_size"] = winner.ranks // p.ep
    if engine.block_size != 16:
        data["kv_cache_config"] = {"tokens_per_block": engine.block_size}
    sheet.carries("engine.block_size")
    if engine.gpu_memory_utilization != 0.9:
        why = "TensorRT-LLM's share is of the memory that weights and buffers leave"
        sheet.cannot("engine.gpu_memory_utilization", engine.gpu_memory_utilization, why)
    _batching(sheet, winner)
    _placement(sheet, winner, data)
    problems = check_keys(data)
    assert not problems, problems
    sheet.files[FILE] = dump_yaml(data)
    return finish(sheet, winner)


def _batching(sheet: Sheet, winner: Winner) -> None:
    s = winner.scenario
    kind = s.policies.kinds["batching"]
    threshold = int(getattr(s.policies.batching, "long_prefill_token_threshold", 0))
    if kind == "vllm_v1":
        sheet.carries("policies.batching", "policies.batching.long_prefill_token_threshold")
        if threshold:
            why = "TensorRT-LLM limits a step, not one prompt"
            sheet.cannot("policies.batching.long_prefill_token_threshold", threshold, why)
    else:
        sheet.cannot("policies.batching", kind, "TensorRT-LLM mixes chunks of prompts with decodes")
    how = s.communication
    if how.all_to_all != "auto":
        sheet.cannot("communication.all_to_all", how.all_to_all, "TensorRT-LLM chooses by itself")
    if how.overlap != "none":
        sheet.cannot("communication.overlap", how.overlap, "TensorRT-LLM has no option for it")
    sheet.carries("communication.all_to_all", "communication.overlap")
    if s.parallel.dp > 1:
        why = "TensorRT-LLM deals requests out by itself (attention_dp_config)"
        sheet.cannot("policies.balancer", s.policies.kinds["balancer"], why)


def _placement(sheet: Sheet, winner: Winner, data: dict[str, Any]) -> None:
    s, moves = winner.scenario, winner.scenario.rebalance
    if not s.model.is_moe:
        return
    sheet.cannot("policies.dispatch", s.policies.kinds["dispatch"], "TensorRT-LLM draws replicas by itself")
    sheet.carries("policies.placement.num_redundant_experts")
    path = add_map(sheet, winner, "trtllm") if s.parallel.ep > 1 else None
    if path is not None:
        data["moe_config"] = {"backend": "WIDEEP", "load_balancer": path}
    if path is not None or s.policies.kinds["placement"] == "contiguous":
        sheet.carries("policies.placement")
    else:
        sheet.cannot(
            "policies.placement", s.policies.kinds["placement"], "TensorRT-LLM places experts by its own rules"
        )
    if moves is not None:
        why = "TensorRT-LLM moves layer_updates_per_iter layers a step, all the time"
        for key, value in moves.model_dump(mode="json", exclude_unset=True).items():
            sheet.cannot(f"rebalance.{key}", value, why)
