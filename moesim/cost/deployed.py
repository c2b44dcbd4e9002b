"""The routed experts of a deployment: where they sit, who routes to them, at which fidelity, and their price.

What a scenario says of routing, placement, dispatch and capacity becomes an `Experts`, and that the `MoECost` which
step prices ask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.cost.bank import CountExperts
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.cost.placing import placement_context
from moesim.cost.routed import figures, route_source
from moesim.cost.routed_bank import RoutedBank
from moesim.cost.step import MoECost, NoExperts
from moesim.cost.tokens import TokenExperts
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.placement import Placement, PlacementContext, PlacementPolicy
from moesim.routing.batch import BatchRouter
from moesim.routing.capacity import capacity_of
from moesim.scenario.load import Scenario
from moesim.workload.pool import RoutingSource
from moesim.workload.replay import Replay
from moesim.workload.requests import RequestStream

__all__ = ["Experts", "exchange_copies", "experts_of", "moe_cost", "routing_warnings"]

_TOKEN_FIDELITY_IDS = 1 << 28
"""expert ids above which `fidelity: auto` counts instead of following every token"""


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a MoE deployment: where they sit, who routes to them, at which fidelity."""

    source: RoutingSource
    placement: Placement
    prices: ExpertPrices
    replay: Replay | None
    fitted: bool
    """the placement depends on the loads it was given, which are those it is judged on"""
    router: BatchRouter | None = None
    """routes from scores; None: the source's ids stand"""
    figures: dict[str, Any] | None = None
    """of a sample of the pool routed as one batch (`moesim.cost.routed.figures`)"""
    other_figures: dict[str, Any] | None = None
    """the same on another model of the scores that are assumed"""
    drawn_from: Replay | None = None
    """the requests' tokens that batches are made of, where they are routed together at count fidelity"""
    uneven: float = 1.0
    """expert weights of the fullest part over the mean part's"""
    slot_size: float = 0.0
    """the fullest part's expert slots in one set of experts, in experts of relative size 1"""

    @property
    def batches(self) -> BatchRouter | None:
        """The router, where every batch is routed by it."""
        return self.router if self.router is not None and self.router.couples else None


def experts_of(scenario: Scenario, layout: Layout, ops: Operators, stream: RequestStream, seed: int) -> Experts:
    model, policies = scenario.model, scenario.policies
    source, router, other = route_source(scenario, seed)
    context = placement_context(
        model,
        scenario.cluster,
        layout,
        scenario.engine,
        ops,
        source,
        (float(stream.prompt_tokens.mean()), float(stream.output_tokens.mean())),
        seed,
    )
    placement, fitted = _place(policies.placement, source, model, context)
    prices = ExpertPrices(model, layout, ops, placement.slots_per_rank, placement.slot_to_expert_LS)
    coupled = router is not None and router.couples
    follow = _follow_tokens(scenario, source, stream, coupled)
    tokens = Replay(source, stream.prompt_tokens, stream.output_tokens, seed) if follow or coupled else None
    sizes = model.expert_size_E
    slot_size: float = placement.slots_per_rank
    uneven = 1.0
    if sizes:
        size_LS = np.asarray(sizes)[placement.slot_to_expert_LS]
        part_LP = size_LS.reshape(len(size_LS), layout.ep, -1).sum(axis=2)
        slot_size, uneven = float(part_LP.max()), float(part_LP.max() / part_LP.mean())
    return Experts(
        source,
        placement,
        prices,
        tokens if follow else None,
        fitted,
        router,
        None if router is None else figures(router, placement),
        None if other is None else figures(other, placement),
        None if follow else tokens,
        uneven,
        slot_size,
    )


def exchange_copies(scenario: Scenario, layout: Layout, figures: dict[str, Any] | None) -> float:
    """Copies of a token that the exchange's buffers hold: one for each expert that a router chooses, at most one a
    rank; where kernels are padded to a capacity, the room of all experts over the tokens of a rank."""
    drawn = 0.0 if figures is None else math.ceil(figures["experts_per_token"] - 1e-9)
    copies = float(min(max(scenario.model.top_k, drawn), layout.ep))
    capacity, model = scenario.capacity, scenario.model
    if capacity is None or not capacity.pad or not model.is_moe:
        return copies
    tokens = scenario.engine.max_num_batched_tokens
    factors = [capacity.factor_of(layer, p) for layer in range(model.num_moe_passes) for p in ("prefill", "decode")]
    rooms = [
        capacity_of(tokens, model.top_k, model.num_experts, factor, capacity.min_capacity)
        for factor in {f for f in factors if f is not None}
    ]
    return max([copies, *(room * model.num_experts / tokens for room in rooms)])


def _place(
    policy: PlacementPolicy, source: RoutingSource, model: MoEModel, context: PlacementContext
) -> tuple[Placement, bool]:
    """The placement of every pass, and whether it depends on the loads. Passes of one set of experts share a map."""
    weight_LE = source.count_LE().astype(np.float64)
    set_L = np.array(model.set_of_pass)
    weight_ZE = np.zeros((model.num_expert_sets, weight_LE.shape[1]))
    np.add.at(weight_ZE, set_L, weight_LE)
    placement = policy.place(weight_ZE, context)
    fitted = getattr(policy, "uses_traffic", True) and not source.ideal
    if model.num_expert_sets < len(set_L):
        placement = context.placement(placement.slot_to_expert_LS[set_L], placement.num_experts)
    return placement, fitted


def _follow_tokens(scenario: Scenario, source: RoutingSource, stream: RequestStream, coupled: bool) -> bool:
    """Token fidelity, where asked for; `auto` follows tokens of a recorded trace while that stays quick (routing every
    batch anew costs some forty times as much as looking ids up)."""
    if scenario.routing.fidelity != "auto":
        return scenario.routing.fidelity == "token"
    ids = int(stream.prompt_tokens.sum() + stream.output_tokens.sum()) * source.num_layers * source.top_k
    return source.recorded and ids * (40 if coupled else 1) <= _TOKEN_FIDELITY_IDS


def moe_cost(scenario: Scenario, layout: Layout, experts: Experts | None, seed: int, group: int) -> MoECost:
    if experts is None:
        return NoExperts()
    dispatch = scenario.policies.dispatch
    if experts.replay is not None:
        return TokenExperts(
            experts.source, experts.replay, experts.placement, dispatch, layout, experts.prices, seed, experts.batches
        )
    routed = None
    if experts.batches is not None and experts.drawn_from is not None:
        routed = RoutedBank(experts.batches, experts.drawn_from, dispatch, layout, experts.placement, seed)
    return CountExperts(
        experts.source,
        experts.placement,
        dispatch,
        layout,
        experts.prices,
        scenario.engine.bank_entries,
        seed,
        routed,
    )


def routing_warnings(experts: Experts) -> tuple[str, ...]:
    """The source's own warnings, what count fidelity makes of domains and drift, and what a placement was fitted on."""
    source, out = experts.source, list(experts.source.warnings)
    if experts.uneven > 1.05:
        told = (
            f"experts differ in size, and the fullest rank holds {experts.uneven:.2f} times the mean of their weights"
        )
        out.append(f"placement: {told}; round_robin deals large and small ones out")
    if experts.router is not None:
        out += [f"routing: {text}" for text in (*experts.router.warnings, experts.router.scores.assumed) if text]
    if experts.replay is None and (source.domain_Q is not None or source.window_Q is not None):
        told = "at count fidelity batches are drawn from the whole pool: domains and drift are averaged, not followed"
        out.append(f"routing: {told}; use routing.fidelity token to follow them")
    if experts.fitted:
        out.append("placement: fitted on the same routing that it is judged on, so its balance is a best case")
    return tuple(out)
