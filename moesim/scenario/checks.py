"""What the parts of a scenario must agree on. Each message: the rule, the facts, the mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesim.communication_spec import CommunicationSpec
from moesim.dtypes import FLOAT_DTYPES
from moesim.engine_spec import EngineSpec
from moesim.errors import Problem
from moesim.hardware import Cluster
from moesim.model import MoEModel
from moesim.routing.capacity import CapacitySpec
from moesim.scenario.spec import ParallelSpec
from moesim.scenario.yamlio import YamlPath
from moesim.training_spec import TrainingSpec
from moesim.workload.routing import RoutingSpec

__all__ = ["communication_checks", "cross_checks", "overlap_checks", "serving_checks", "training_checks"]

_Where = Callable[[YamlPath], str]


def cross_checks(
    where: _Where,
    model: MoEModel,
    cluster: Cluster,
    parallel: ParallelSpec,
    engine: EngineSpec,
    placement: Any,
    routing: Any = None,
    capacity: Any = None,
) -> list[Problem]:
    """Every disagreement between model, cluster, parallel layout, engine limits, placement, router and capacity."""
    problems = _world(where, cluster, parallel)
    heads = model.attention.num_heads
    if heads % parallel.tp:
        problems.append(
            Problem(
                where(("parallel", "tp")),
                f"parallel.tp must divide the attention heads: tp={parallel.tp}, {model.name} has {heads}. "
                f"Use {_divisors(heads, cluster.num_ranks)}",
            )
        )
    problems += _experts(where, model, parallel, placement)
    columns = model.num_experts if routing is None else routing.score_columns(model.num_experts)
    if model.router_columns and model.router_columns != columns:
        problems.append(
            Problem(
                where(("model",)),
                f"model.router_columns must be the scores that the router asks for: {model.router_columns}, and this"
                f" one asks for {columns} of {model.num_experts} experts. Leave it out or name that number",
            )
        )
    if capacity is not None:
        beyond = sorted(layer for layer in capacity.layers if layer >= model.num_moe_passes)
        if beyond:
            problems.append(
                Problem(
                    where(("capacity", "layers")),
                    f"capacity.layers counts MoE layers from 0: {model.name} has {model.num_moe_passes}, got {beyond}",
                )
            )
    if engine.max_model_len is not None and engine.max_model_len > model.max_position_embeddings:
        problems.append(
            Problem(
                where(("engine", "max_model_len")),
                f"engine.max_model_len must not exceed the model's positions: {engine.max_model_len} > "
                f"{model.max_position_embeddings} of {model.name}. Lower it",
            )
        )
    return problems


def overlap_checks(
    where: _Where, model: MoEModel, cluster: Cluster, parallel: ParallelSpec, overlap: str, training: bool
) -> list[Problem]:
    """An overlap needs an exchange to hide, and FSMoE's the two levels of links that it runs beside each other."""
    if overlap == "none":
        return []
    at = where(("communication", "overlap"))
    if not model.is_moe or parallel.dp == 1:
        facts = f"parallel.dp={parallel.dp}" if model.is_moe else f"{model.name} is a dense model"
        return [
            Problem(
                at,
                f"communication.overlap hides the exchange of tokens between data-parallel ranks, and there is none: "
                f"{facts}. Set overlap to none{', or dp above 1' if model.is_moe else ''}",
            )
        ]
    if overlap == "two_batch" and training:
        mend = "Use pipeline or fsmoe"
        return [
            Problem(at, f"communication.overlap two_batch cuts the batches of a serving step, not of training. {mend}")
        ]
    ranks = parallel.tp * parallel.dp
    split = ranks // parallel.ep
    inside = split > 1 and cluster.gpus_per_node % split == 0
    if overlap == "fsmoe" and not (inside and ranks > cluster.gpus_per_node):
        legal = [s for s in _all_divisors(cluster.gpus_per_node) if s > 1 and ranks % s == 0]
        mend = f"Use ep {_listed([ranks // s for s in legal[::-1]])}, or pipeline" if legal else "Use pipeline"
        return [
            Problem(
                at,
                "communication.overlap fsmoe needs experts that are split over ranks of one node, and several nodes: "
                f"tp * dp / ep = {ranks} / {parallel.ep} = {split} ranks an expert, {cluster.gpus_per_node} GPUs a "
                f"node, {ranks} ranks. {mend}",
            )
        ]
    return []


def training_checks(
    where: _Where,
    model: MoEModel,
    parallel: ParallelSpec,
    training: TrainingSpec,
    placement: Any,
    capacity: CapacitySpec | None,
    routing: RoutingSpec,
) -> list[Problem]:
    """What a training run needs besides: a batch that divides, sequences within the model's positions, weights in a
    format that is trained here, one place for each expert."""
    problems = []

    def refuse(path: YamlPath, message: str) -> None:
        problems.append(Problem(where(path), message))

    at_once = training.micro_batch_sequences * parallel.dp * parallel.replicas
    batch = training.global_batch_sequences
    if batch % at_once:
        less, more = batch // at_once * at_once, (batch // at_once + 1) * at_once
        refuse(
            ("training", "global_batch_sequences"),
            "training.global_batch_sequences must be a multiple of micro_batch_sequences * dp * replicas: "
            f"{batch}, {training.micro_batch_sequences} * {parallel.dp} * {parallel.replicas} = {at_once}. "
            f"Use {f'{less} or ' if less else ''}{more}",
        )
    if training.sequence_tokens > model.max_position_embeddings:
        refuse(
            ("training", "sequence_tokens"),
            f"training.sequence_tokens must not exceed the model's positions: {training.sequence_tokens} > "
            f"{model.max_position_embeddings} of {model.name}. Lower it",
        )
    for key in ("weight_dtype", "expert_dtype") if model.is_moe else ("weight_dtype",):
        dtype = getattr(model, key)
        if dtype not in FLOAT_DTYPES:
            refuse(
                ("model",),
                f"training in {dtype} is not simulated yet: model.{key} must be one of {', '.join(FLOAT_DTYPES)}. "
                f"Set model.{key} to bf16",
            )
    reshaped = {
        "iterations": model.moe_iterations > 1,
        "pool_layers": model.pool_layers > 1,
        "expert_widths": bool(model.expert_widths),
    }
    for key in [key for key, asked in reshaped.items() if asked]:
        refuse(("model",), f"model.{key}: training with it is not simulated yet; remove model.{key} or choose a router "
               "that needs none")  # fmt: skip
    if "fidelity" in routing.model_fields_set:
        refuse(("routing", "fidelity"), "routing.fidelity: training routes tokens; remove routing.fidelity")
    if routing.names_pool and "training_scores" in routing.model_fields_set:
        refuse(
            ("routing", "training_scores"),
            "routing.training_scores draws the scores of a training run, but routing gives a pool whose scores are "
            "used over and over; remove one",
        )
    if routing.sequences is not None and not routing.names_pool:
        refuse(
            ("routing", "sequences"),
            "routing.sequences is a part of a pool, and here the scores of every step are drawn anew; remove it, or "
            "give routing.path",
        )
    for phase in ("prefill", "decode"):
        if getattr(capacity, phase, None) is not None:
            refuse(("capacity", phase), f"capacity.{phase}: training has no {phase}; set capacity.factor")
    if capacity is not None and not model.is_moe:
        refuse(("capacity",), f"capacity: {model.name} is a dense model and has no experts to limit; remove capacity")
    redundant = getattr(placement, "num_redundant_experts", 0)
    if redundant:
        refuse(
            ("policies", "placement"),
            f"in training every expert has one place, got num_redundant_experts={redundant}. Set it to 0; whole "
            "copies of the experts are parallel.replicas",
        )
    if getattr(placement, "chooses_slots", False):
        refuse(
            ("policies", "placement"),
            "in training every expert has one place, and this placement gives experts as many as it finds good. "
            "Choose another kind; whole copies of the experts are parallel.replicas",
        )
    return problems


def serving_checks(
    where: _Where, model: MoEModel, spec: Any, placement: Any = None, balancer: Any = None
) -> list[Problem]:
    """Disagreements of `placement_from` and `rebalance` with the model. spec: the whole `ScenarioSpec`."""
    problems = []
    for key in ("placement_from", "rebalance"):
        if getattr(spec, key) is not None and not model.is_moe:
            told = f"{key}: {model.name} is a dense model and has no experts to move; remove {key}"
            problems.append(Problem(where((key,)), told))
    if spec.rebalance is not None and model.expert_widths:
        told = "rebalance: experts of other sizes do not fit into each other's slots; remove model.expert_widths"
        problems.append(Problem(where(("rebalance",)), told))
    if spec.rebalance is not None and model.is_moe:
        problems += [Problem(where(("rebalance",)), text) for text in _cannot_move(model, placement, balancer)]
    return problems


def _cannot_move(model: MoEModel, placement: Any, balancer: Any) -> list[str]:
    """Why experts of this model under these policies cannot be moved while serving."""
    out = []
    if model.num_expert_sets != model.num_moe_passes:
        out.append("layers that share experts are not moved yet; remove rebalance, or what makes layers share them")
    if not getattr(placement, "uses_traffic", True):
        out.append("this placement heeds no loads, so there is nothing to ask it again; use eplb or eplb_swap")
    if getattr(placement, "uses_sample", False):
        out.append("this placement looks at whole tokens, of which a running engine keeps none; use eplb or eplb_swap")
    if getattr(placement, "chooses_slots", False):
        out.append("this placement chooses its number of slots, which cannot change while serving; use eplb_swap")
    if getattr(balancer, "uses_affinity", False):
        out.append("this balancer knows where experts were at the start; use another one")
    return [f"rebalance: {text}" for text in out]


def _world(where: _Where, cluster: Cluster, parallel: ParallelSpec) -> list[Problem]:
    ranks = parallel.tp * parallel.dp
    world = ranks * parallel.replicas
    if world <= cluster.num_ranks:
        return []
    nodes = -(-world // cluster.gpus_per_node)
    return [
        Problem(
            where(("parallel",)),
            f"the deployment needs replicas * tp * dp = {parallel.replicas} * {parallel.tp} * {parallel.dp}"
            f" = {world} devices, and the cluster has nodes * gpus_per_node = {cluster.nodes} * "
            f"{cluster.gpus_per_node} = {cluster.num_ranks}. Lower one or set cluster.nodes to {nodes}",
        )
    ]


def _experts(where: _Where, model: MoEModel, parallel: ParallelSpec, placement: Any) -> list[Problem]:
    ranks, ep = parallel.tp * parallel.dp, parallel.ep
    at = where(("parallel", "ep"))
    if not model.is_moe:
        message = f"{model.name} is a dense model and has no experts to spread: ep={ep}. Set parallel.ep to 1"
        return [Problem(at, message)] if ep > 1 else []
    if ranks % ep:
        message = f"parallel.ep must divide tp * dp: ep={ep}, tp * dp = {ranks}. Use {_divisors(ranks, ranks)}"
        return [Problem(at, message)]
    problems = []
    redundant = getattr(placement, "num_redundant_experts", 0)
    slots = model.num_experts + redundant
    own = getattr(placement, "chooses_slots", False) or getattr(placement, "uneven", False)
    if slots % ep and not own:
        more = -slots % ep
        legal = _divisors(slots, ranks, ranks)
        facts = f"{model.num_experts} experts + {redundant} redundant = {slots} slots"
        problems.append(
            Problem(
                at,
                f"parallel.ep must divide the expert slots: ep={ep}, {facts}. Use ep {legal}, or "
                f"num_redundant_experts {redundant + more} with a placement that has replicas (eplb), or uneven: true "
                "with kind: eplb_swap",
            )
        )
    expert_tp = ranks // ep
    if model.moe_intermediate_size % expert_tp:
        legal_ep = [
            e
            for e in _all_divisors(ranks)
            if (own or slots % e == 0) and model.moe_intermediate_size % (ranks // e) == 0
        ]
        mend = f"Use ep {_listed(legal_ep)}" if legal_ep else f"No ep does for {ranks} ranks: change tp or dp"
        problems.append(
            Problem(
                at,
                f"each expert is split over tp * dp / ep = {ranks} / {ep} = {expert_tp} ranks, which must "
                f"divide its intermediate size {model.moe_intermediate_size}. {mend}",
            )
        )
    return problems


def _all_divisors(number: int) -> list[int]:
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def _divisors(number: int, most: int, also: int | None = None) -> str:
    """Divisors of `number` up to `most` (that divide `also`, if given), listed."""
    return _listed([d for d in _all_divisors(number) if d <= most and (also is None or also % d == 0)])


def _listed(numbers: list[int]) -> str:
    shown = numbers if len(numbers) <= 8 else [*numbers[:4], *numbers[-4:]]
    text = [str(n) for n in shown]
    if len(numbers) > 8:
        text.insert(4, "...")
    return " or ".join([", ".join(text[:-1]), text[-1]]) if len(text) > 1 else text[0]


def communication_checks(
    where: _Where,
    model: MoEModel,
    cluster: Cluster,
    parallel: ParallelSpec,
    communication: CommunicationSpec,
    mode: str,
) -> list[Problem]:
    """What a back end of the exchange needs of model, layout and cluster."""
    problems = []

    def refuse(key: str, message: str) -> None:
        problems.append(Problem(where(("communication", key)), message))

    how, ranks, node = communication.all_to_all, parallel.tp * parallel.dp, cluster.gpus_per_node
    facts = f"dp={parallel.dp}, ep={parallel.ep}, tp * dp={ranks}"
    exchanges = model.is_moe and parallel.dp > 1 and parallel.ep == ranks
    gathers = how == "allgather_reducescatter" and model.is_moe and parallel.dp > 1
    if not exchanges and not gathers and how != "auto":
        refuse(
            "all_to_all",
            "communication.all_to_all is for tokens that travel between data-parallel ranks of whole experts, which "
            f"needs a MoE model, dp > 1 and ep = tp * dp: {facts}. Remove it or set parallel.ep to tp * dp",
        )
        return problems
    if how in ("deepep_normal", "deepep_low_latency", "hierarchical") and ranks > node and ranks % node:
        refuse(
            "all_to_all",
            f"{how} across nodes needs whole nodes, because a rank talks to its own number in other nodes: tp * dp="
            f"{ranks}, gpus_per_node={node}. Use {ranks // node * node} or {-(-ranks // node) * node} ranks",
        )
    if communication.sms is not None and communication.sms >= cluster.profile.num_sms:
        refuse(
            "sms",
            f"communication.sms must leave multiprocessors to compute on: sms={communication.sms}, "
            f"{cluster.profile.name} has {cluster.profile.num_sms}. Lower it to 20 or 24",
        )
    if communication.coherent:
        problems += _coherent_checks(where, model, exchanges, communication, facts, mode)
    return problems


def _coherent_checks(
    where: _Where, model: MoEModel, exchanges: bool, communication: CommunicationSpec, facts: str, mode: str
) -> list[Problem]:
    rules = {
        f"is for serving and mode is {mode}: in training a token's activations have to come back for the backward "
        "pass. Remove it": mode != "serving",
        f"needs tokens that travel between ranks, which a MoE model with dp > 1 and ep = tp * dp has: {facts}. Remove "
        "it or set parallel.ep to tp * dp": not exchanges,
        f"leaves a token where its expert was, which takes one expert a token: {model.name} has top_k={model.top_k}. "
        "Remove it or use a top-1 model": model.top_k != 1,
        f"counts a token once a rank, as auto, deepep_normal and deepep_v2 do: all_to_all={communication.all_to_all}. "
        "Use one of these": communication.all_to_all not in ("auto", "deepep_normal", "deepep_v2"),
    }
    at = where(("communication", "coherent"))
    return [Problem(at, f"communication.coherent {rule}") for rule, broken in rules.items() if broken]
