"""Where tokens' experts come from: a recorded trace, per-layer counts or a synthetic model, as one pool of
whole tokens.

`load_routing` reads what a scenario's `routing:` says and checks it against the model. Legend: T tokens, L
MoE layers, E experts, K experts a token.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from moesim.errors import BadInput, Problem
from moesim.model import MoEModel
from moesim.reuse import file_key, reused
from moesim.workload.pool import Ids, RoutingSource, count_ids, count_steps, ideal_counts
from moesim.workload.replay import Replay, Shares
from moesim.workload.scores import ScoreSpec
from moesim.workload.scores_training import TrainingScoresSpec
from moesim.workload.synthetic import Groups, SyntheticSpec, generate, popularity_weights

__all__ = [
    "PoolPolicy", "Replay", "RoutingSource", "RoutingSpec", "Shares", "count_ids", "count_steps",
    "ideal_counts", "load_routing",
]  # fmt: skip

_POPULARITY = ("popularity_zipf", "popularity_lognormal_sigma")
_FILL_LIMIT_BYTES = 4 << 30
_SIZE_LIMIT_IDS = 1 << 32
_READERS = {"trace": "moesim.traces.routing_npz", "counts": "moesim.traces.routing_counts"}
"""Readers are found by name, because they stand above this module and make its types (DESIGN.md, the import
order)."""


_Share = Annotated[float, Field(ge=0, le=1)]


class RoutingSpec(SyntheticSpec):
    """`routing:` of a scenario.

    path: a trace (.npz or a converted folder) or per-layer counts (.csv, .json); none: the synthetic model alone.
    scores: where the scores come from that routers need and no trace holds. training_scores: how those of a training
    run change (`mode: training`), where neither a path nor a knob of the synthetic model is given. fidelity: `token`
    follows every token's ids, `count` the tokens per expert, `auto` lets the engine choose. sequences: [from, to],
    shares of the pool's sequences; only those between them exist for the run (what a search may see, and what is held
    out for judging it). Counts have no sequences: those of the pool that is drawn from them are meant. The other keys
    are the synthetic model's knobs; with counts, the file gives the popularity.
    """

    path: str | None = Field(default=None, min_length=1)
    scores: ScoreSpec = Field(default_factory=ScoreSpec)
    training_scores: TrainingScoresSpec = Field(default_factory=TrainingScoresSpec)
    fidelity: Literal["auto", "token", "count"] = "auto"
    sequences: Annotated[tuple[_Share, _Share], Field(strict=False)] | None = None

    @field_validator("sequences")
    @classmethod
    def _is_a_part(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"a part is [from, to], shares of the pool, from < to: {list(value)}; [0, 1] is all of it")
        return value

    @property
    def names_pool(self) -> bool:
        """A trace, counts or a knob of the synthetic model is given."""
        return self.path is not None or bool(self.model_fields_set & set(SyntheticSpec.model_fields))


class PoolPolicy(Protocol):
    """What loading needs of a routing policy (moesim/routing/)."""

    replaces_ids: ClassVar[bool]
    """takes the place of recorded ids (else recorded ids stand for what the policy would do)"""
    ideal: ClassVar[bool]
    """loads count as equal in every step"""

    def groups(self, num_groups: int, top_groups: int) -> Groups:
        """The groups it limits tokens to, given the model's."""
        ...

    def draw(self, weight_LE: NDArray[np.float64], tokens: int, top_k: int, groups: Groups, seed: int) -> Ids:
        """Experts [T, L, K] of `tokens` independent tokens, popularity `weight_LE` where the policy heeds
        it."""
        ...


def load_routing(
    spec: RoutingSpec,
    model: MoEModel,
    base: Path,
    seed: int,
    routing_policy: PoolPolicy | None = None,
    where: str = "routing",
    any_top_k: bool = False,
) -> RoutingSource:
    """The pool that the tokens of a run take their routing from, one row a token, L = the model's MoE layers. Runs may
    share it (`moesim.reuse`).

    `base`: the folder that `spec.path` is relative to. `routing_policy` None: the model's own groups,
    recorded ids as recorded. A policy that replaces ids (`random`, `balanced`) keeps a trace's sequences and
    takes its own experts. Where `spec.sequences` is given, that part of the pool. Raises BadInput for a file
    that cannot be used or does not agree with the model; `where` names the YAML place. any_top_k: a trace's
    K may differ from the model's, because a router chooses anew.
    """
    if not model.moe_layers:
        raise BadInput(Problem(where, f"{model.name} is dense: no expert is routed. Leave `routing` out."))

    def key() -> tuple[Any, ...] | None:
        """Everything that `_load` looks at."""
        file = () if spec.path is None else file_key(base / spec.path)
        knobs = tuple((name, getattr(spec, name)) for name in SyntheticSpec.model_fields)
        given = sorted(spec.model_fields_set & set(SyntheticSpec.model_fields))
        facts = (
            model.name, model.moe_layers, model.moe_passes, model.num_moe_passes, model.num_experts, model.top_k,
            model.num_expert_groups, model.top_groups,
        )  # fmt: skip
        return None if file is None else (file, spec.path, knobs, given, facts, seed, routing_policy, any_top_k)

    whole = reused("pool", key, lambda: _load(spec, model, base, seed, routing_policy, where, any_top_k))
    part = spec.sequences
    if part is None:
        return whole
    # last, so that the parts of a pool are parts of one draw
    return reused("part of a pool", lambda: (whole, part), lambda: whole.part(part, f"{where}.sequences"))


def _load(
    spec: RoutingSpec, model: MoEModel, base: Path, seed: int, routing_policy: PoolPolicy | None, where: str,
    any_top_k: bool,
) -> RoutingSource:  # fmt: skip
    groups = Groups(model.num_expert_groups, model.top_groups)
    if routing_policy is not None:
        groups = routing_policy.groups(groups.number, groups.kept)
    path = None if spec.path is None else base / spec.path
    if path is not None and (path.is_dir() or path.suffix.lower() not in (".csv", ".json")):
        source = _from_trace(spec, model, path, where, any_top_k)
    else:
        source = _from_model(spec, model, path, seed, groups, where)
    if routing_policy is not None and routing_policy.replaces_ids:
        weight_LE = source.count_LE().astype(np.float64)
        ids = routing_policy.draw(weight_LE, source.num_tokens, source.top_k, groups, seed)
        name = type(routing_policy).__module__.rpartition(".")[2]
        source = source.with_ids(ids, f"{name} in place of {source.source}", ideal=routing_policy.ideal)
    return source


# ----------------------------------------------------------------------------------------------------- traces


def _from_trace(spec: RoutingSpec, model: MoEModel, path: Path, where: str, any_top_k: bool) -> RoutingSource:
    knobs = sorted(set(spec.model_fields_set) & set(SyntheticSpec.model_fields))
    if knobs:
        raise BadInput(
            Problem(
                where,
                f"a recorded trace is replayed as it is, but the synthetic model's {', '.join(knobs)}"
                " stand beside"
                f" path: {path.name}. Leave them out, or give per-layer counts (.csv, .json) or no path.",
            )
        )
    reader: Any = importlib.import_module(_READERS["trace"])
    source: RoutingSource = reader.read(path, model.num_experts)
    problems = []
    if source.num_experts != model.num_experts:
        problems.append(f"{source.num_experts} experts, {model.name} here {model.num_experts}")
    if source.top_k != model.top_k and not any_top_k:
        problems.append(f"top_k {source.top_k}, {model.name} here {model.top_k}")
    if source.num_layers > model.num_moe_passes:
        problems.append(f"{source.num_layers} MoE layers, {model.name} {model.num_moe_passes}")
    if problems:
        raise BadInput(
            Problem(
                where, f"a trace must come from the model's own shape, but {path} has {'; '.join(problems)}."
                " Name the model it was recorded on, with the dimensions it had (a router's preset or model: may change"
                " them), or another trace.",
            )
        )  # fmt: skip
    return _fill_layers(source, model, path, where)


def _layer_source(given: tuple[int, ...] | None, count: int, model: MoEModel) -> tuple[NDArray[np.int64], str]:
    """For each MoE layer of the model the given layer that stands for it, and a warning ("" when none is
    repeated).

    Layers keep their place where their numbers are the model's; the others repeat the given ones cyclically.
    """
    if count == model.num_moe_passes:
        return np.arange(count), ""
    if given is None or not set(given) <= set(model.moe_layers):
        given = model.moe_passes[:count]
    place = {layer: i for i, layer in enumerate(given)}
    out, turn = [], 0
    for layer in model.moe_passes:
        if layer in place:
            out.append(place[layer])
        else:
            out.append(turn % count)
            turn += 1
    missing = model.num_moe_passes - count
    return np.array(out, np.int64), (
        f"holds {count} of the {model.num_moe_passes} MoE layers of {model.name}; the other {missing} repeat them."
    )


def _in_order(expert_TLK: Ids, order: NDArray[np.int64]) -> Ids:
    filled: Ids = np.ascontiguousarray(expert_TLK[:, order])  # type: ignore[assignment]
    return filled


def _fill_layers(source: RoutingSource, model: MoEModel, path: Path, where: str) -> RoutingSource:
    order, warning = _layer_source(source.layer_index, source.num_layers, model)
    if not warning:
        return replace(source, layer_index=model.moe_passes)
    size = source.num_tokens * model.num_moe_passes * source.top_k * source.expert_TLK.itemsize
    if size > _FILL_LIMIT_BYTES:
        raise BadInput(
            Problem(where, f"{path} {warning} Filled: {size} bytes, over {_FILL_LIMIT_BYTES}. Cut it.")
        )  # fmt: skip
    return replace(
        source,
        expert_TLK=_in_order(source.expert_TLK, order),
        weight_TLK=None if source.weight_TLK is None else source.weight_TLK[:, order],
        score_TLE=None if source.score_TLE is None else source.score_TLE[:, order],
        layer_index=model.moe_passes,
        warnings=(*source.warnings, f"{path.name} {warning}"),
    )


# -------------------------------------------------------------------------------------------------- synthetic


def _from_model(
    spec: RoutingSpec, model: MoEModel, path: Path | None, seed: int, groups: Groups, where: str
) -> RoutingSource:
    size = spec.pool_tokens * model.num_moe_passes * model.top_k
    if size > _SIZE_LIMIT_IDS:
        raise BadInput(
            Problem(where, f"pool_tokens {spec.pool_tokens}: {size} ids, over {_SIZE_LIMIT_IDS}. Lower it.")
        )  # fmt: skip
    if groups.limited and (
        model.num_experts % groups.number or model.top_k * groups.number > model.num_experts * groups.kept
    ):
        raise BadInput(
            Problem(
                where,
                f"{groups.kept} of {groups.number} groups of {model.num_experts} experts cannot serve"
                f" {model.top_k} experts a token. Groups must divide the experts, and the kept ones hold"
                " top_k.",
            )
        )
    warnings: tuple[str, ...] = ()
    if path is None:
        weight_LE = popularity_weights(spec, model.num_moe_passes, model.num_experts, seed)
        name = "synthetic"
    else:
        weight_LE, warnings = _count_weights(spec, model, path, where)
        name = f"synthetic, popularity of {path.name}"
    source = generate(spec, weight_LE, model.top_k, seed, groups, name)
    return replace(source, layer_index=model.moe_passes, warnings=warnings)


def _count_weights(
    spec: RoutingSpec, model: MoEModel, path: Path, where: str
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    both = sorted(set(spec.model_fields_set) & set(_POPULARITY))
    if both:
        raise BadInput(Problem(where, f"{path.name} gives the popularity and so does {both[0]}. Leave one out."))
    reader: Any = importlib.import_module(_READERS["counts"])
    counts = reader.read(path)
    layers, experts = counts.count_LE.shape
    if experts != model.num_experts or layers > model.num_moe_passes:
        raise BadInput(
            Problem(
                where,
                f"counts must have the model's shape, but {path} has {layers} layers of {experts} experts and"
                f" {model.name} {model.num_moe_passes} of {model.num_experts}. Name the model they were"
                " counted on.",
            )
        )
    order, warning = _layer_source(counts.layer_index if counts.numbered else None, layers, model)
    return counts.count_LE[order], (f"{path.name} {warning}",) if warning else ()
