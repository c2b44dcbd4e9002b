"""Changes of a model's dimensions that papers make to its MoE layers: more, smaller, shared or reused experts.

`ModelChanges` is written under `model:` of a scenario, or under `model:` of a row of `routing/presets.yaml`. Sizes are
changed in the order of the fields: first what is replaced, then what multiplies.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from moesim.architecture import MoEModel
from moesim.dtypes import Dtype
from moesim.errors import BadInput, Problem
from moesim.model_rules import MAX_DIMENSION, MAX_EXPERTS
from moesim.spec import Spec

__all__ = ["ModelChanges", "change_model"]

_Factor = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
_Size = Annotated[int, Field(ge=1, le=MAX_DIMENSION)]


class ModelChanges(Spec):
    """num_experts, top_k, intermediate_size: replaced. upcycle: experts copied so many times, as many a token as before
    (Expert Upcycling). split: every expert cut into so many smaller ones, of which a token takes as many times more
    (DeepSeekMoE's fine-grained experts). shared: shared experts of a routed expert's size (before intermediate_size
    replaces it), added. gated_experts: false makes routed experts of two matrices. latent_rank: experts
    work at this width, behind projections that a layer's experts share (MoLE). iterations: passes through a layer's
    experts, each with a router of its own (Chain-of-Experts). pool_layers: consecutive MoE layers whose experts form
    one pool (ReXMoE; 0: all layers, UniPool), of which pool_share exists, to the next multiple of 8. expert_widths:
    relative sizes of equal blocks of experts. expert_dtype: number format of routed experts. router_columns: scores a
    router computes. execution: weights read once for each expert in use, or for each (token, expert) pair.
    """

    num_experts: _Factor | None = None
    top_k: _Factor | None = None
    intermediate_size: _Size | None = None
    upcycle: _Factor | None = None
    split: _Factor | None = None
    shared: Annotated[int, Field(ge=0, le=1024)] | None = None
    gated_experts: bool | None = None
    latent_rank: _Size | None = None
    iterations: Annotated[int, Field(ge=1, le=64)] | None = None
    pool_layers: Annotated[int, Field(ge=0, le=4096)] | None = None
    pool_share: Annotated[float, Field(gt=0, le=1)] | None = None
    expert_widths: (
        Annotated[tuple[Annotated[float, Field(gt=0, le=1024)], ...], Field(strict=False, min_length=1)] | None
    ) = None
    expert_dtype: Dtype | None = None
    router_columns: _Size | None = None
    execution: Literal["expert_centric", "token_centric"] | None = None


def change_model(model: MoEModel, changes: ModelChanges) -> MoEModel:
    """`model` with `changes`. Raises BadInput where they do not go together or the model is dense."""
    if not changes.model_fields_set or not any(v is not None for v in changes.model_dump().values()):
        return model
    if not model.is_moe:
        raise BadInput(f"{model.name} is a dense model and has no experts to change")
    experts, top_k = changes.num_experts or model.num_experts, changes.top_k or model.top_k
    size = changes.intermediate_size or model.moe_intermediate_size
    experts *= changes.upcycle or 1
    if changes.split is not None:
        if size % changes.split:
            raise BadInput(
                f"split must divide the experts' intermediate size: split={changes.split}, {model.name} has {size}"
            )
        experts, top_k, size = experts * changes.split, top_k * changes.split, size // changes.split
    pool_layers = model.num_moe_layers if changes.pool_layers == 0 else (changes.pool_layers or model.pool_layers)
    if pool_layers > model.num_moe_layers:
        raise BadInput(f"pool_layers: {pool_layers} layers cannot share a pool in {model.num_moe_layers} MoE layers")
    if changes.pool_layers is not None:
        block = math.gcd(experts, 8)  # a pool of a size that ranks can share as they share a layer's experts
        experts = max(top_k, round(experts * pool_layers * (changes.pool_share or 1.0) / block) * block)
    elif changes.pool_share is not None:
        raise BadInput("pool_share says how much of a pool exists: give pool_layers too")
    more: dict[str, Any] = {}
    if model.num_experts != experts and model.num_expert_groups > 1:
        # groups keep their number where they still divide the experts
        groups = model.num_expert_groups if experts % model.num_expert_groups == 0 else math.gcd(experts, 8)
        more["num_expert_groups"] = groups
        more["top_groups"] = min(groups, max(1, math.ceil(model.top_groups * groups / model.num_expert_groups)))
    try:
        return replace(
            model,
            num_experts=experts,
            top_k=top_k,
            moe_intermediate_size=size,
            shared_intermediate_size=model.shared_intermediate_size
            + (changes.shared or 0) * (model.moe_intermediate_size // (changes.split or 1)),
            ungated_experts=model.ungated_experts if changes.gated_experts is None else not changes.gated_experts,
            expert_hidden_size=changes.latent_rank or model.expert_hidden_size,
            moe_iterations=changes.iterations or model.moe_iterations,
            pool_layers=pool_layers,
            expert_widths=changes.expert_widths or model.expert_widths,
            expert_dtype=changes.expert_dtype or model.expert_dtype,
            router_columns=changes.router_columns or model.router_columns,
            expert_execution=changes.execution or model.expert_execution,
            **more,
        )
    except BadInput as error:
        raise BadInput([Problem("", p.message) for p in error.problems]) from None
