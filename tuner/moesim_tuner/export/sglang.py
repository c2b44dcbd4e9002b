"""SGLang: options of `sglang.launch_server` (names: `options`).

--tp-size counts all ranks of a server; with --enable-dp-attention their attention is dp-way data parallel.
--max-running-requests and --chunked-prefill-size are of the whole server: it divides both by dp
(managers/scheduler, `_handle_dp_attention` of server_args.py), so a scenario's limits, of one rank, are multiplied.
"""

from __future__ import annotations

from moesim.scenario.load import Scenario
from moesim_tuner.export.common import add_map, finish, memory_share
from moesim_tuner.export.sheet import Settings, Sheet, Winner

__all__ = ["misfit", "settings"]

_DISPATCH = {"local_first": "static", "static": "static", "random": "dynamic", "lp": "lp"}


def misfit(scenario: Scenario) -> str:
    """Why SGLang cannot run this; "" if it can."""
    if scenario.requests is None:
        return "SGLang does not train"
    return "" if scenario.tiers is None else "SGLang alone keeps no experts in other memories (see ktransformers)"


def settings(winner: Winner) -> Settings:
    """The command, the map that it loads, and what it leaves unsaid."""
    s, p = winner.scenario, winner.scenario.parallel
    sheet = Sheet("sglang", winner, "python", "-m", "sglang.launch_server")
    sheet.option("--model-path", s.model.name)
    sheet.option("--tp-size", winner.ranks if s.model.is_moe else p.tp, "parallel.tp")
    if winner.nodes > 1:
        sheet.option("--nnodes", winner.nodes)
    if p.dp > 1:
        sheet.option("--dp-size", p.dp)
        if s.model.is_moe:
            sheet.option("--enable-dp-attention")
    sheet.carries("parallel.dp", "parallel.ep")
    if p.ep > 1:
        sheet.option("--ep-size", p.ep)
    _exchange(sheet, winner)
    _limits(sheet, winner)
    _placement(sheet, winner)
    balancer = s.policies.kinds["balancer"]
    names = {"round_robin": "round_robin", "least_loaded": "total_requests"}
    if p.dp > 1 and balancer in names:
        sheet.option("--load-balance-method", names[balancer], "policies.balancer")
    return finish(sheet, winner)


def _exchange(sheet: Sheet, winner: Winner) -> None:
    p, how = winner.scenario.parallel, winner.scenario.communication
    if p.dp > 1 and p.ep == winner.ranks:
        modes = {"auto": "auto", "deepep_normal": "normal", "deepep_low_latency": "low_latency"}
        if how.all_to_all in modes:
            sheet.option("--moe-a2a-backend", "deepep", "communication.all_to_all")
            sheet.option("--deepep-mode", modes[how.all_to_all])
        elif how.all_to_all == "deepep_v2":
            sheet.option("--moe-a2a-backend", "deepep_v2", "communication.all_to_all")
        elif how.all_to_all == "allgather_reducescatter":
            sheet.option("--moe-a2a-backend", "none", "communication.all_to_all")
        else:
            sheet.cannot("communication.all_to_all", how.all_to_all, "no --moe-a2a-backend of SGLang is this one")
    else:
        sheet.carries("communication.all_to_all")
    if how.overlap == "two_batch":
        sheet.option("--enable-two-batch-overlap", None, "communication.overlap")
    elif how.overlap == "none":
        sheet.carries("communication.overlap")
    else:
        sheet.cannot("communication.overlap", how.overlap, "SGLang overlaps two batches or nothing")


def _limits(sheet: Sheet, winner: Winner) -> None:
    s, engine, dp = winner.scenario, winner.scenario.engine, winner.scenario.parallel.dp
    sheet.option("--max-running-requests", engine.max_num_seqs * dp, "engine.max_num_seqs")
    tokens = engine.max_num_batched_tokens
    batching = s.policies.kinds["batching"]
    if batching == "sglang":
        tokens = min(tokens, int(getattr(s.policies.batching, "chunked_prefill_size", tokens)))
        ratio = float(getattr(s.policies.batching, "new_token_ratio", 0.4))
        sheet.carries("policies.batching", "policies.batching.chunked_prefill_size")
        sheet.cannot(
            "policies.batching.new_token_ratio", ratio,
            "SGLang lets it decay from 0.7 times --schedule-conservativeness while it decodes",
        )  # fmt: skip
    elif batching == "vllm_v1":
        sheet.option("--enable-mixed-chunk", None, "policies.batching")
        threshold = int(getattr(s.policies.batching, "long_prefill_token_threshold", 0))
        if threshold:
            sheet.cannot(
                "policies.batching.long_prefill_token_threshold", threshold, "SGLang limits a step, not one prompt"
            )
        sheet.carries("policies.batching.long_prefill_token_threshold")
    sheet.option("--chunked-prefill-size", tokens * dp, "engine.max_num_batched_tokens")
    sheet.option("--max-prefill-tokens", tokens)
    if engine.max_model_len is not None:
        sheet.option("--context-length", engine.max_model_len, "engine.max_model_len")
    if engine.block_size != 16:
        sheet.option("--page-size", engine.block_size, "engine.block_size")
    if not engine.cuda_graph:
        sheet.option("--disable-decode-cuda-graph", None, "engine.cuda_graph")
    memory_share(sheet, winner, "SGLang's --mem-fraction-static counts weights and KV cache alone")


def _placement(sheet: Sheet, winner: Winner) -> None:
    s, moves = winner.scenario, winner.scenario.rebalance
    experts = getattr(winner.result, "experts", None)
    if experts is None:
        return
    kind = s.policies.kinds["placement"]
    redundant = experts.placement.num_slots - experts.placement.num_experts
    if redundant:
        sheet.option("--ep-num-redundant-experts", redundant, "policies.placement.num_redundant_experts")
    sheet.carries("policies.placement.num_redundant_experts")
    path = add_map(sheet, winner, "sglang")
    if path is not None:
        sheet.option("--init-expert-location", path)
    if path is not None or kind == "contiguous" or (moves is not None and kind == "eplb"):
        sheet.carries("policies.placement")
    else:
        sheet.cannot("policies.placement", kind, "SGLang places experts anew by EPLB's own rules (--eplb-algorithm)")
    if path is not None or redundant or moves is not None:
        dispatch = s.policies.kinds["dispatch"]
        if dispatch in _DISPATCH:
            sheet.option("--ep-dispatch-algorithm", _DISPATCH[dispatch], "policies.dispatch")
        else:
            sheet.cannot("policies.dispatch", dispatch, "no --ep-dispatch-algorithm of SGLang is this one")
    else:
        sheet.carries("policies.dispatch")
    if moves is None:
        return
    sheet.option("--enable-eplb")
    sheet.option("--eplb-rebalance-num-iterations", moves.interval_steps, "rebalance.interval_steps")
    sheet.option("--expert-distribution-recorder-buffer-size", moves.window_steps, "rebalance.window_steps")
    if moves.threshold < 1:
        sheet.option("--eplb-min-rebalancing-utilization-threshold", moves.threshold)
    if moves.layers_per_chunk is not None or moves.asynchronous:
        sheet.option("--eplb-rebalance-layers-per-chunk", moves.layers_per_chunk or 1)
    if moves.asynchronous:
        why = "SGLang's steps wait for moves; one layer a pass is the nearest it has"
        sheet.cannot("rebalance.asynchronous", True, why)
    sheet.carries("rebalance.threshold", "rebalance.layers_per_chunk", "rebalance.asynchronous", "rebalance.start")
