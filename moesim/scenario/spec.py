"""What a scenario file may say, as typed values. `load` turns it into a `Scenario`.

A key that is not here is an error; keys of what is not built yet are refused with one sentence each.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from moesim.communication_spec import CommunicationSpec
from moesim.engine_spec import EngineSpec
from moesim.hardware import ClusterSpec
from moesim.model import Dtype
from moesim.model_changes import ModelChanges
from moesim.rebalance_spec import RebalanceSpec
from moesim.routing.capacity import CapacitySpec
from moesim.spec import Spec
from moesim.tiers_spec import TiersSpec
from moesim.training_spec import TrainingSpec
from moesim.tune_spec import TuneSpec
from moesim.units import Ms
from moesim.workload.requests import RequestsSpec
from moesim.workload.routing import RoutingSpec

__all__ = [
    "NOT_YET",
    "ONLY_SERVING",
    "SERVING_POLICIES",
    "EngineSpec",
    "ModelRef",
    "ParallelSpec",
    "PlacementFromSpec",
    "PoliciesSpec",
    "ScenarioSpec",
    "SloSpec",
    "TrainingSpec",
]

_MAX_RANKS = 1 << 20
_Degree = Annotated[int, Field(ge=1, le=_MAX_RANKS)]

NOT_YET = {
    "prefix_caching": "prefix caching",
    "enable_prefix_caching": "prefix caching",
    "prefix_cache": "prefix caching",
    "speculative": "speculative decoding",
    "speculative_config": "speculative decoding",
    "speculative_tokens": "speculative decoding",
    "num_speculative_tokens": "speculative decoding",
    "mtp": "speculative decoding with MTP heads",
    "pp": "pipeline parallelism",
    "pipeline_parallel_size": "pipeline parallelism",
    "disaggregation": "prefill/decode disaggregation",
    "disaggregated": "prefill/decode disaggregation",
    "prefill": "prefill/decode disaggregation",
    "decode": "prefill/decode disaggregation",
}
"""Keys of `parallel`, `engine` and the top level that ask for what is not simulated; off is allowed."""

ONLY_SERVING = {
    "requests": "nothing is asked for while a model trains; the batch stands under training",
    "engine": "what a serving engine is told; host overhead, CUDA graphs and memory limits stand under training",
    "slo": "requests have latencies, training steps have none to promise",
    "rebalance": "experts move while a deployment serves",
    "placement_from": "nothing is known of the loads before training",
    "tiers": "in training every expert stays on its device",
}
"""Top-level keys that `mode: training` has no use for -> why."""

SERVING_POLICIES = (
    "dispatch", "offload", "eviction", "prefetch", "precision", "rebatching", "rerouting",
    "batching", "balancer",
)  # fmt: skip
"""Keys of `policies` that only serving has."""


class ModelRef(ModelChanges):
    """`model: NAME`, or a mapping with dtypes and dimensions to change. NAME: a file of workloads/models or a path."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    weight_dtype: Dtype | None = None
    kv_dtype: Dtype | None = None
    activation_dtype: Dtype | None = None


def _plain_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ValueError(f"at most 100 letters, digits, '.', '_' and '-', the first no sign; got {value!r:.60}")
    return value


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class ParallelSpec(Spec):
    """One replica has tp * dp ranks. Attention: `tp`-way tensor parallel, `dp`-way data parallel. Experts:
    in `ep` parts, each split over tp * dp / ep ranks. `replicas` of the whole, side by side. `pp`: only 1.
    """

    tp: _Degree = 1
    dp: _Degree = 1
    ep: _Degree = 1
    replicas: _Degree = 1
    pp: Literal[1] = 1


class PlacementFromSpec(Spec):
    """The traffic that the placement is made for, where it is not the traffic that it serves.

    routing: another trace, counts, or synthetic routing. share: the placement sees this share of the pool's sequences,
    the first ones, and requests take the others, so that what is reported is no in-sample figure. Give one of the two.
    """

    routing: RoutingSpec | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> PlacementFromSpec:
        if (self.routing is None) == (self.share is None):
            raise ValueError("placement_from needs either routing (another trace) or share (of this one)")
        return self


class SloSpec(Spec):
    """A request is good when it meets every limit given; goodput counts good requests a second."""

    ttft_ms: Annotated[Ms, Field(gt=0)] | None = None
    tpot_ms: Annotated[Ms, Field(gt=0)] | None = None
    e2e_ms: Annotated[Ms, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> SloSpec:
        if not self.model_fields_set:
            raise ValueError("an SLO needs at least one of ttft_ms, tpot_ms, e2e_ms")
        return self


def _kind_or_mapping(value: Any) -> Any:
    if value is None or isinstance(value, str | dict):
        return value
    raise ValueError(f"a policy is a name or a mapping with `kind`, got {value!r:.60}")


_Policy = Annotated[Any, BeforeValidator(_kind_or_mapping)]


class PoliciesSpec(Spec):
    """Each a kind (`eplb`) or a mapping with `kind` and its parameters. `routing` None: the model's own."""

    routing: _Policy = None
    placement: _Policy = "contiguous"
    dispatch: _Policy = "local_first"
    offload: _Policy = "none"
    eviction: _Policy = "lru"
    prefetch: _Policy = "none"
    precision: _Policy = "none"
    rebatching: _Policy = "none"
    rerouting: _Policy = "none"
    batching: _Policy = "vllm_v1"
    balancer: _Policy = "round_robin"


class ScenarioSpec(Spec):
    """A deployment, its traffic (or, in `mode: training`, its steps), its routing, and the policies that run it."""

    mode: Literal["serving", "training"] = "serving"
    name: Annotated[str, AfterValidator(_plain_name), Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    model: Annotated[ModelRef, BeforeValidator(_by_name, json_schema_input_type=str | ModelRef)]
    cluster: ClusterSpec
    parallel: ParallelSpec = Field(default_factory=ParallelSpec)
    requests: RequestsSpec | None = None
    training: TrainingSpec | None = None
    routing: RoutingSpec = Field(default_factory=RoutingSpec)
    policies: PoliciesSpec = Field(default_factory=PoliciesSpec)
    capacity: CapacitySpec | None = None
    placement_from: PlacementFromSpec | None = None
    communication: CommunicationSpec | None = None
    rebalance: RebalanceSpec | None = None
    tiers: TiersSpec | None = None
    engine: EngineSpec = Field(default_factory=EngineSpec)
    slo: SloSpec | None = None
    tune: TuneSpec | None = None
