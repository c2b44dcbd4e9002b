"""The routed experts of a deployment: where they sit, who routes to them, at which fidelity, and their price.

What a scenario says of routing, placement, dispatch and capacity becomes an `Experts`, and that the `MoECost` which
step prices ask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.arrays import FloatArray
from moesim.cost.bank import CountExperts
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.cost.placing import placement_context
from moesim.cost.routed import figures, route_source
from moesim.cost.routed_bank import RoutedBank
from moesim.cost.step import MoECost, NoExperts
from moesim.cost.tokens import TokenExperts
from moesim.dispatch.plan import shares
from moesim.errors import BadInput, Problem
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.placement import Placement, PlacementContext, PlacementPolicy, initial_map
from moesim.placement.bound import balance_bound
from moesim.reuse import reused
from moesim.routing.batch import BatchRouter
from moesim.routing.capacity import capacity_of
from moesim.scenario.load import Scenario
from moesim.workload.pool import RoutingSource
from moesim.workload.replay import Replay
from moesim.workload.requests import RequestStream

__all__ = ["Experts", "check_dispatch", "exchange_copies", "experts_of", "moe_cost", "routing_warnings"]

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
    context: PlacementContext | None = None
    """what the placement was told"""
    placed_for: str = ""
    """the traffic that the placement was made for, where it is not the traffic that is served"""
    planned: float = 1.0
    """busiest over mean rank load that the map promises on the traffic it was made for, mean over layers"""
    bound: float = 1.0
    """no map with as many slots has a smaller one: proven (`moesim.placement.bound`), mean over layers"""
    fit: RoutingSource | None = None
    """the traffic that placements and the policies of tiers may learn from; None: they know nothing"""

    @property
    def batches(self) -> BatchRouter | None:
        """The router, where every batch is routed by it."""
        return self.router if self.router is not None and self.router.couples else None


def experts_of(scenario: Scenario, layout: Layout, ops: Operators, stream: RequestStream, seed: int) -> Experts:
    model, policies = scenario.model, scenario.policies
    source, router, other = route_source(scenario, seed)
    fit, source, placed_for = _placement_source(scenario, source, router, seed)
    context = placement_context(
        model,
        scenario.cluster,
        layout,
        scenario.engine,
        ops,
        fit,
        (float(stream.prompt_tokens.mean()), float(stream.output_tokens.mean())),
        seed,
    )
    start = scenario.rebalance is not None and scenario.rebalance.start == "initial"
    if start:
        placement = _initial(policies.placement, model, context)
    else:
        placement = place_passes(policies.placement, _loads(fit), model, context)
    uses_traffic = getattr(policies.placement, "uses_traffic", True) and not start
    fitted = uses_traffic and not placed_for and not source.ideal
    prices = ExpertPrices(model, layout, ops, placement.slots_per_rank, placement.slot_to_expert_LS)
    coupled = router is not None and router.couples
    follow = _follow_tokens(scenario, source, stream, coupled)
    tokens = Replay(source, stream.prompt_tokens, stream.output_tokens, seed) if follow or coupled else None
    sizes = model.expert_size_E
    slot_size: float = placement.slots_per_rank
    uneven = 1.0
    if sizes:
        size_LS = placement.of_slots(np.tile(sizes, (placement.num_layers, 1)))
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
        context,
        placed_for,
        *_promise(placement, fit),
        fit if placed_for else None,
    )


def _loads(source: RoutingSource) -> FloatArray:
    """Pairs per expert over the whole pool, float64 [L, E]."""
    key = (source.expert_TLK, source.num_experts, source.ragged)
    return reused("loads of a pool", lambda: key, lambda: source.count_LE().astype(np.float64))


def _promise(placement: Placement, fit: RoutingSource) -> tuple[float, float]:
    """Planned balance and its bound, means over layers."""
    if fit.ideal:
        return 1.0, 1.0
    weight_LE = _loads(fit)
    slots = int(placement.held_LS.sum(axis=1).max())
    ranks = placement.num_ranks
    bound_L = reused("bound", lambda: (weight_LE, slots, ranks), lambda: balance_bound(weight_LE, slots, ranks))
    return float(placement.balance(weight_LE).mean()), float(bound_L.mean())


def _placement_source(
    scenario: Scenario, source: RoutingSource, router: BatchRouter | None, seed: int
) -> tuple[RoutingSource, RoutingSource, str]:
    """The traffic that the placement is made for, the traffic that is served, and what the former is, where they
    differ."""
    asked = scenario.placement_from
    if asked is None and scenario.tiers is not None:
        return _halves(source, scenario.tiers.fit_share)
    if asked is None:
        return source, source, ""
    if asked.routing is not None:
        other = route_source(replace(scenario, routing=asked.routing), seed)[0]
        return other, source, other.source
    assert asked.share is not None
    if router is not None and router.couples:
        message = (
            "placement_from.share cuts the pool in two, and this router (or capacity) routes batches of the whole pool."
            " Give placement_from.routing another trace, or remove placement_from"
        )
        raise BadInput(Problem("placement_from.share", message))
    return _halves(source, asked.share, "placement_from.share")


def _halves(
    source: RoutingSource, share: float, where: str = "tiers.fit_share"
) -> tuple[RoutingSource, RoutingSource, str]:
    """The first sequences of a pool, the others, and what the first ones are; share 0: nothing is known of those that
    are served."""
    if not share:
        return source, source, ""
    first = round(share * source.num_sequences)
    if not 0 < first < source.num_sequences:
        nothing = ", 0 (policies know nothing)" if where == "tiers.fit_share" else ""
        message = (
            f"both parts need a sequence: share={share} of {source.num_sequences} sequences is {first}. "
            f"Use a share nearer to one half{nothing}, or a trace of more sequences"
        )
        raise BadInput(Problem(where, message))
    fit, served = (source.take_sequences(part) for part in np.split(np.arange(source.num_sequences), [first]))
    return fit, served, f"the first {first} of {source.num_sequences} sequences"


def _initial(policy: PlacementPolicy, model: MoEModel, context: PlacementContext) -> Placement:
    """What an engine starts with: slot i of a layer holds expert i mod E, in as many slots as the policy uses. Where
    these are uneven over the ranks, the policy's own map for equal loads."""
    blind = place_passes(policy, np.ones((model.num_moe_passes, model.num_experts)), model, context)
    if not blind.held_LS.all():
        return blind
    return context.placement(
        np.broadcast_to(initial_map(model.num_experts, blind.num_slots), blind.slot_to_expert_LS.shape),
        model.num_experts,
    )


def check_dispatch(scenario: Scenario, layout: Layout) -> None:
    """Raises BadInput where the policy of dispatch needs what the deployment has not."""
    model, policy = scenario.model, scenario.policies.dispatch
    told = ""
    if shares(policy) and (not model.is_moe or not model.shared_intermediate_size):
        told = f"waterfill dispatches the shared expert, and {model.name} has none. Use static, random or lp"
    elif shares(policy) and (not layout.exchanges or layout.tp > 1):
        told = (
            f"waterfill needs ranks that hold whole experts and exchange tokens: tp={layout.tp}, dp={layout.dp},"
            f" ep={layout.ep}. Use tp 1, and ep = dp above 1"
        )
    elif shares(policy) and layout.copies != "distinct":
        told = (
            "waterfill is DeepEP's: the shared expert costs no copy where the token goes anyway. Use"
            " communication.all_to_all auto, deepep_normal or deepep_v2, without coherent"
        )
    elif shares(policy) and model.weight_dtype != model.expert_dtype:
        told = (
            "waterfill computes the shared expert among the routed ones, in one number format: weights are"
            f" {model.weight_dtype}, experts {model.expert_dtype}. Use static, random or lp"
        )
    elif getattr(policy, "guests", False) and scenario.capacity is not None and scenario.capacity.pad:
        told = "capacity.pad gives every slot its rows, and this dispatch lets ranks serve others. Set pad to false"
    if told:
        raise BadInput(Problem("policies.dispatch", told))


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


def place_passes(
    policy: PlacementPolicy, weight_LE: FloatArray, model: MoEModel, context: PlacementContext
) -> Placement:
    """The placement of every pass. Passes of one set of experts share a map. weight_LE: loads of the passes."""
    return reused(
        "placement",
        lambda: (policy, weight_LE, model.set_of_pass, model.num_expert_sets, context),
        lambda: _placed(policy, weight_LE, model, context),
    )


def _placed(policy: PlacementPolicy, weight_LE: FloatArray, model: MoEModel, context: PlacementContext) -> Placement:
    set_L = np.array(model.set_of_pass)
    weight_ZE = np.zeros((model.num_expert_sets, weight_LE.shape[1]))
    np.add.at(weight_ZE, set_L, weight_LE)
    placement = policy.place(weight_ZE, context)
    if model.num_expert_sets < len(set_L):
        placement = context.placement(placement.slot_to_expert_LS[set_L], placement.num_experts)
    return placement


def _follow_tokens(scenario: Scenario, source: RoutingSource, stream: RequestStream, coupled: bool) -> bool:
    """Token fidelity, where asked for or where a cache has to know; `auto` follows tokens of a recorded trace while
    that stays quick (routing every batch anew costs some forty times as much as looking ids up)."""
    if scenario.tiers is not None:
        return True
    if scenario.routing.fidelity != "auto":
        return scenario.routing.fidelity == "token"
    ids = int(stream.prompt_tokens.sum() + stream.output_tokens.sum()) * source.num_layers * source.top_k
    return source.recorded and ids * (40 if coupled else 1) <= _TOKEN_FIDELITY_IDS


def moe_cost(
    scenario: Scenario,
    layout: Layout,
    experts: Experts | None,
    seed: int,
    placement: Placement | None = None,
    before: MoECost | None = None,
) -> MoECost:
    """placement: another one than that of `experts`, with as many slots. before: the cost under the placement that it
    replaces."""
    if experts is None:
        return NoExperts()
    dispatch = scenario.policies.dispatch
    placed = placement or experts.placement
    if experts.replay is not None:
        return TokenExperts(
            experts.source, experts.replay, placed, dispatch, layout, experts.prices, seed, experts.batches
        )
    routed = None
    if experts.batches is not None and experts.drawn_from is not None:
        routed = RoutedBank(experts.batches, experts.drawn_from, dispatch, layout, placed, seed)
    return CountExperts(
        experts.source,
        placed,
        dispatch,
        layout,
        experts.prices,
        scenario.engine.bank_entries,
        seed,
        routed,
        before if isinstance(before, CountExperts) else None,
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
    if experts.placed_for and experts.context is not None and experts.context.num_ranks > 1:
        out.append(f"placement: made for {experts.placed_for}, and judged on {source.source} without it")
    return tuple(out)
