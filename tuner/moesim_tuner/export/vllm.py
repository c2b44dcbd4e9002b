"""vLLM: options of `vllm serve` (names: `options`).

Limits are those of one data-parallel rank, as a scenario's are. With --enable-expert-parallel the experts are spread
whole over all tp * dp ranks; without, each is split over them. vLLM loads no map: `--eplb-config` says how many
redundant experts there are and when it places them anew (moesim.exports.vllm).
"""

from __future__ import annotations

import json

from moesim.exports.vllm import EplbConfig, render
from moesim.scenario.load import Scenario
from moesim_tuner.export.common import finish
from moesim_tuner.export.sheet import Settings, Sheet, Winner

__all__ = ["misfit", "settings"]

_BACK_ENDS = {
    "deepep_normal": "deepep_high_throughput",
    "deepep_low_latency": "deepep_low_latency",
    "allgather_reducescatter": "allgather_reducescatter",
}


def misfit(scenario: Scenario) -> str:
    """Why vLLM cannot run this; "" if it can."""
    if scenario.requests is None:
        return "vLLM does not train"
    return "" if scenario.tiers is None else "vLLM keeps no experts in other memories"


def settings(winner: Winner) -> Settings:
    """The command and what it leaves unsaid."""
    s, p = winner.scenario, winner.scenario.parallel
    sheet = Sheet("vllm", winner, "vllm", "serve", s.model.name)
    sheet.option("--tensor-parallel-size", p.tp, "parallel.tp")
    sheet.option("--data-parallel-size", p.dp, "parallel.dp")
    if winner.nodes > 1 and p.dp > 1:
        sheet.option("--data-parallel-size-local", max(1, s.cluster.gpus_per_node // p.tp))
    if p.ep == winner.ranks and p.ep > 1:
        sheet.option("--enable-expert-parallel", None, "parallel.ep")
    elif p.ep == 1:
        sheet.carries("parallel.ep")
    else:
        sheet.cannot("parallel.ep", p.ep, f"vLLM spreads whole experts over all {winner.ranks} ranks, or splits each")
    _exchange(sheet, winner)
    _limits(sheet, winner)
    _eplb(sheet, winner)
    dispatch = s.policies.kinds.get("dispatch")
    if dispatch is not None:
        sheet.cannot("policies.dispatch", dispatch, "vLLM draws a replica by the token's place in the batch")
    if p.dp > 1:
        sheet.cannot(
            "policies.balancer", s.policies.kinds["balancer"], "vLLM's front end picks the rank with the shortest queue"
        )
    return finish(sheet, winner)


def _exchange(sheet: Sheet, winner: Winner) -> None:
    how = winner.scenario.communication
    if how.all_to_all in _BACK_ENDS:
        sheet.option("--all2all-backend", _BACK_ENDS[how.all_to_all], "communication.all_to_all")
    elif how.all_to_all == "auto":
        if winner.scenario.parallel.dp > 1:
            sheet.cannot("communication.all_to_all", "auto", "vLLM takes one --all2all-backend for every batch")
    else:
        sheet.cannot("communication.all_to_all", how.all_to_all, "no --all2all-backend of vLLM is this one")
    if how.overlap == "two_batch":
        sheet.option("--enable-dbo", None, "communication.overlap")
    elif how.overlap == "none":
        sheet.carries("communication.overlap")
    else:
        sheet.cannot("communication.overlap", how.overlap, "vLLM overlaps two batches (--enable-dbo) or nothing")


def _limits(sheet: Sheet, winner: Winner) -> None:
    s, engine = winner.scenario, winner.scenario.engine
    sheet.option("--max-num-seqs", engine.max_num_seqs, "engine.max_num_seqs")
    sheet.option("--max-num-batched-tokens", engine.max_num_batched_tokens, "engine.max_num_batched_tokens")
    if engine.max_model_len is not None:
        sheet.option("--max-model-len", engine.max_model_len, "engine.max_model_len")
    sheet.option("--gpu-memory-utilization", engine.gpu_memory_utilization, "engine.gpu_memory_utilization")
    if engine.block_size != 16:
        sheet.option("--block-size", engine.block_size, "engine.block_size")
    sheet.carries("engine.block_size", "engine.cuda_graph")
    if not engine.cuda_graph:
        sheet.option("--enforce-eager")
    if s.model.kv_dtype == "fp8":
        sheet.option("--kv-cache-dtype", "fp8", "model.kv_dtype")
    batching = s.policies.kinds["batching"]
    if batching != "vllm_v1":
        sheet.cannot("policies.batching", batching, "vLLM batches as vllm_v1 does")
        return
    sheet.carries("policies.batching")
    threshold = int(getattr(s.policies.batching, "long_prefill_token_threshold", 0))
    if threshold:
        sheet.option("--long-prefill-token-threshold", threshold)
    sheet.carries("policies.batching.long_prefill_token_threshold")


def _eplb(sheet: Sheet, winner: Winner) -> None:
    s, moves = winner.scenario, winner.scenario.rebalance
    kind = s.policies.kinds.get("placement", "contiguous")
    redundant = getattr(winner.result, "experts", None)
    extra = 0 if redundant is None else redundant.placement.num_slots - redundant.placement.num_experts
    if moves is None and kind == "contiguous":
        sheet.carries("policies.placement")
        return
    if s.parallel.ep != winner.ranks or winner.ranks < 2:
        sheet.cannot("policies.placement", kind, "vLLM places experts under --enable-expert-parallel alone")
        return
    config = EplbConfig(extra)
    if moves is not None:
        config = EplbConfig(extra, moves.window_steps, moves.interval_steps, moves.asynchronous)
    sheet.option("--enable-eplb")
    sheet.option("--eplb-config", json.dumps(json.loads(render(config))), "policies.placement.num_redundant_experts")
    if kind in ("eplb", "contiguous"):
        sheet.carries("policies.placement")
    else:
        sheet.cannot("policies.placement", kind, "vLLM rearranges by EPLB's own rule")
    if moves is None:
        sheet.notes.append("vLLM loads no map: it starts from its own and rearranges by its own counts")
        return
    sheet.carries("rebalance.interval_steps", "rebalance.window_steps", "rebalance.asynchronous")
    if moves.threshold < 1:
        sheet.cannot("rebalance.threshold", moves.threshold, "vLLM rearranges at every interval")
    if moves.layers_per_chunk is not None:
        why = "vLLM moves a layer at a time or all at once"
        sheet.cannot("rebalance.layers_per_chunk", moves.layers_per_chunk, why)
    if moves.start == "fitted":
        sheet.cannot("rebalance.start", "fitted", "vLLM starts from its own map")
    sheet.carries("rebalance.threshold", "rebalance.layers_per_chunk", "rebalance.start")
