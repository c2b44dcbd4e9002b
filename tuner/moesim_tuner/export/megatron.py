"""Megatron-LM: options of pretrain_gpt.py under torchrun (names: `options`).

Expert, expert-tensor and expert-data parallel degrees are ep, tp * dp / ep and replicas. Selective recomputation is of
norms and activation functions (`--recompute-modules layernorm moe_act`); ZeRO 1 is the distributed optimizer, 2 and 3
Megatron-FSDP's optim_grads and optim_grads_params.
"""

from __future__ import annotations

from moesim.scenario.load import Scenario
from moesim_tuner.export.sheet import Settings, Sheet, Winner

__all__ = ["misfit", "settings"]

_DROPS = {"score": "probs", "position": "position"}


def misfit(scenario: Scenario) -> str:
    """Why Megatron-LM cannot run this; "" if it can."""
    return "" if scenario.training is not None else "Megatron-LM trains, and this is a serving scenario"


def settings(winner: Winner) -> Settings:
    """The command and what it leaves unsaid. It holds what the scenario says; data, lengths of the model and the rest
    of a run are the user's."""
    s, p, model, t = winner.scenario, winner.scenario.parallel, winner.scenario.model, winner.scenario.training
    assert t is not None
    ranks = winner.ranks * p.replicas
    sheet = Sheet("megatron", winner, "torchrun")
    sheet.option("--nnodes", -(-ranks // s.cluster.gpus_per_node))
    sheet.option("--nproc-per-node", min(ranks, s.cluster.gpus_per_node))
    sheet.words.append("pretrain_gpt.py")
    sheet.option("--bf16")
    sheet.option("--tensor-model-parallel-size", p.tp, "parallel.tp")
    sheet.carries("parallel.dp", "parallel.replicas")
    if model.is_moe:
        sheet.option("--expert-model-parallel-size", p.ep, "parallel.ep")
        sheet.option("--expert-tensor-parallel-size", winner.ranks // p.ep)
        sheet.option("--num-experts", model.num_experts)
        sheet.option("--moe-router-topk", model.top_k)
        sheet.option("--moe-token-dispatcher-type", "alltoall")
        _router(sheet, winner)
        _capacity(sheet, winner)
    sheet.option("--seq-length", t.sequence_tokens, "training.sequence_tokens")
    sheet.option("--micro-batch-size", t.micro_batch_sequences, "training.micro_batch_sequences")
    sheet.option("--global-batch-size", t.global_batch_sequences, "training.global_batch_sequences")
    _memory(sheet, winner)
    how = s.communication
    if how.overlap == "two_batch":
        sheet.option("--overlap-moe-expert-parallel-comm", None, "communication.overlap")
    elif how.overlap != "none":
        sheet.cannot("communication.overlap", how.overlap, "Megatron-LM overlaps a forward with a backward pass")
    sheet.notes.append("dimensions of the model, data and learning rate are not in a scenario: add them")
    return sheet.settings()


def _router(sheet: Sheet, winner: Winner) -> None:
    policy, kind = winner.scenario.policies.routing, winner.scenario.policies.kinds["routing"]
    if kind in ("topk", "grouped_topk"):
        sheet.option("--moe-router-load-balancing-type", "none", "policies.routing")
    elif kind == "auxiliary_loss":
        sheet.option("--moe-router-load-balancing-type", "aux_loss", "policies.routing")
        sheet.option("--moe-aux-loss-coeff", policy.alpha, "policies.routing.alpha")
    elif kind == "loss_free":
        sheet.option("--moe-router-load-balancing-type", "none", "policies.routing")
        sheet.option("--moe-router-enable-expert-bias")
        sheet.option("--moe-router-bias-update-rate", policy.rate, "policies.routing.rate")
    else:
        sheet.cannot("policies.routing", kind, "no router of Megatron-LM is this one")


def _capacity(sheet: Sheet, winner: Winner) -> None:
    limit = winner.scenario.capacity
    if limit is None or limit.factor is None:
        return
    sheet.option("--moe-expert-capacity-factor", limit.factor, "capacity.factor")
    sheet.carries("capacity.pad", "capacity.drop", "capacity.scope")
    if limit.pad:
        sheet.option("--moe-pad-expert-input-to-capacity")
    if limit.drop in _DROPS:
        sheet.option("--moe-token-drop-policy", _DROPS[limit.drop])
    else:
        sheet.cannot("capacity.drop", limit.drop, "Megatron-LM drops choices and sends none elsewhere")
    if limit.scope != "rank":
        sheet.cannot("capacity.scope", limit.scope, "Megatron-LM's capacity is of a rank's micro-batch")
    if limit.layers:
        sheet.cannot("capacity.layers", {str(k): v for k, v in limit.layers.items()}, "one factor holds for all layers")


def _memory(sheet: Sheet, winner: Winner) -> None:
    t = winner.scenario.training
    assert t is not None
    sheet.carries("training.recompute", "training.zero_stage")
    if t.recompute == "full":
        sheet.option("--recompute-granularity", "full")
        sheet.option("--recompute-method", "uniform")
        sheet.option("--recompute-num-layers", 1)
    elif t.recompute == "selective":
        sheet.option("--recompute-granularity", "selective")
        sheet.option("--recompute-modules", "layernorm")
        sheet.words.append("moe_act")
    if t.zero_stage:
        sheet.option("--use-distributed-optimizer")
    if t.zero_stage > 1:
        sheet.option("--use-megatron-fsdp")
        sheet.option("--data-parallel-sharding-strategy", "optim_grads" if t.zero_stage == 2 else "optim_grads_params")
        sheet.option("--ckpt-format", "fsdp_dtensor")
        sheet.notes.append("Megatron-FSDP asks for CUDA_DEVICE_MAX_CONNECTIONS to be unset or above 1")
    if t.grad_dtype == "fp32":
        sheet.option("--accumulate-allreduce-grads-in-fp32", None, "training.grad_dtype")
    if t.overlap_grad_reduce:
        sheet.option("--overlap-grad-reduce")
    if t.overlap_param_gather and t.zero_stage:
        sheet.option("--overlap-param-gather")
    sheet.carries("training.overlap_grad_reduce", "training.overlap_param_gather")
