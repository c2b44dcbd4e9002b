"""simulate_training(scenario) -> TrainingResult: routes and prices every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from moesim.cost.backward import ExpertPasses, Passes
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.dtypes import dtype_bytes
from moesim.errors import Infeasible
from moesim.layout import Layout
from moesim.placement import Placement, PlacementContext
from moesim.scenario.load import Scenario
from moesim.training.memory import balanced_rows, require_fit
from moesim.training.reduce import Buckets, LinkBytes, gather_bytes, optimizer_ops, sharded_bytes
from moesim.training.result import Loads, TrainingResult
from moesim.training.routing import ScoreSource, StepRouter
from moesim.training.scores import training_scores
from moesim.training.step import StepClock

__all__ = ["simulate_training"]


def simulate_training(
    scenario: Scenario, seed: int | None = None, *, progress: Callable[[float], None] | None = None
) -> TrainingResult:
    """Run the steps of a scenario in `mode: training`. `progress` is told the share of steps that are done.

    Returns a result that is not feasible, with reasons, where a rank's memory does not hold what it keeps. Raises
    BadInput for routing that cannot be used.
    """
    training, model, parallel = scenario.training, scenario.model, scenario.parallel
    assert training is not None
    seed = scenario.seed if seed is None else seed
    degrees = (parallel.tp, parallel.dp, parallel.ep)
    layout = Layout.of(model, scenario.cluster, *degrees, scenario.communication)
    result = TrainingResult(scenario, seed, layout, warnings=scenario.warnings)
    ops = Operators(scenario.cluster.profile, training.cuda_graph)
    replicas = parallel.replicas
    began = time.perf_counter()
    try:
        tokens = training.micro_batch_sequences * training.sequence_tokens
        place = (model, scenario.cluster, layout, training, replicas)
        result.memory = require_fit(*place, balanced_rows(model, layout, tokens), "with experts loaded alike")
        router, experts = None, None
        if model.is_moe:
            scores = training_scores(scenario, seed)
            router = _router(scenario, layout, scores, seed)
            result.routing, result.assumed, result.sampling = scores.name, scores.assumed, router.sampling
            prices = ExpertPrices(model, layout, ops, model.num_experts // layout.ep)
            act = dtype_bytes(model.activation_dtype)
            experts = ExpertPasses(prices, ops, training.recompute, act)
            times = 3 if training.recompute == "full" else 2
            result.exchange_bytes = times * (prices.dispatch_bytes + prices.combine_bytes)
            sent = gather_bytes(layout, prices.combine_bytes * tokens)
            if prices.chunks.sharded:
                sent = sharded_bytes(layout, prices.combine_bytes * tokens, model.top_k)
            calls = 2 * times * router.micro_batches * replicas * model.num_moe_layers
            result.gather_bytes = LinkBytes(*(calls * b for b in sent))
            result.warnings = (*result.warnings, *_warnings(scenario, layout, router, scores))
        buckets = Buckets(model, layout, ops, training, replicas)
        result.micro_batches = training.global_batch_sequences // (
            training.micro_batch_sequences * layout.dp * replicas
        )
        clock = StepClock(
            model,
            training,
            Passes(model, layout, ops, training),
            experts,
            buckets,
            optimizer_ops(model, layout, ops, training, replicas),
            result.micro_batches,
            replicas,
            gathers=layout.meets and not layout.exchanges and scenario.communication.overlap != "fsmoe",
        )
        result.reduce_bytes = _bytes_summed(buckets, training.zero_stage, result.micro_batches)
        _steps(result, router, clock, progress)
        if result.loads:
            most = max((load.most_rows_L for load in result.loads), key=lambda rows_L: float(rows_L.sum()))
            result.memory = require_fit(*place, most, "on the rank whose experts got most tokens")
    except Infeasible as error:
        result.reasons, result.over = error.reasons, error.over
        result.times = []
    result.elapsed_s = time.perf_counter() - began
    return result


def _steps(
    result: TrainingResult,
    router: StepRouter | None,
    clock: StepClock,
    progress: Callable[[float], None] | None,
) -> None:
    training = result.scenario.training
    assert training is not None
    for step in range(training.steps):
        measured = step >= training.measured_from_step
        routing = None if router is None else router.route(step)
        result.times.append(clock.step(routing, result.ledger if measured else None))
        if routing is not None:
            result.loads.append(Loads.of(routing, result.layout.ep))
            if measured:
                result.wanted_N += routing.wanted_N
                result.dropped_N += routing.dropped_N
        if progress is not None:
            progress((step + 1) / training.steps)
    clock.book_constants(result.ledger, training.steps - training.measured_from_step)


def _router(scenario: Scenario, layout: Layout, scores: ScoreSource, seed: int) -> StepRouter:
    training = scenario.training
    assert training is not None
    return StepRouter(
        scenario.model,
        layout,
        training,
        scenario.policies.routing,
        _placement(scenario, layout),
        scenario.capacity,
        scores,
        scenario.parallel.replicas,
        seed,
    )


def _placement(scenario: Scenario, layout: Layout) -> Placement:
    """Where experts sit from the first step on: nothing is known of their loads then."""
    model = scenario.model
    context = PlacementContext(
        num_ranks=layout.ep,
        num_nodes=max(1, min(layout.nodes, layout.ep)),
        num_groups=model.num_expert_groups,
        rank_to_node=layout.node_of_part,
    )
    return scenario.policies.placement.place(np.ones((model.num_moe_layers, model.num_experts)), context)


def _bytes_summed(buckets: Buckets, stage: int, micro_batches: int) -> LinkBytes:
    """Sums of gradients and gathers of weights in one step: ZeRO 2 sums after every micro-batch, ZeRO 3 gathers for
    every pass."""
    sums = micro_batches if stage >= 2 else 1
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[stage]
    reduced, gathered = buckets.reduce_bytes, buckets.gather_bytes
    return LinkBytes(*(sums * r + gathers * g for r, g in zip(reduced, gathered, strict=True)))


def _warnings(scenario: Scenario, layout: Layout, router: StepRouter, scores: ScoreSource) -> list[str]:
    out = [f"routing: {scores.assumed}"] if scores.assumed else []
    replicas = scenario.parallel.replicas
    if sampled := _sampled(router, scenario):
        out.append(f"routing: {sampled}; training.routing_tokens sets how many")
    if layout.meets and layout.expert_tp > 1 and scenario.communication.overlap != "fsmoe":
        out.append(
            f"parallel: each expert is split over {layout.expert_tp} ranks, which gather all tokens; for whole copies "
            f"of the experts use dp={max(1, layout.ep // layout.tp)}, replicas={replicas * layout.expert_tp}"
        )
    return out


_SCOPES = {"sequence": "sequence", "rank": "micro-batch of a rank", "all": "micro-batch of a replica"}
_FEW = 4.0
"""choices of an expert in what a router sees, below which rounding decides what it does"""


def _sampled(router: StepRouter, scenario: Scenario) -> str:
    """What a sample of the tokens is and does to the figures; "" where all are routed."""
    s, model = router.sampling, scenario.model
    if s.kind == "all":
        return ""
    if s.kind == "tokens":
        return (
            f"of each rank's {s.real:,} tokens a micro-batch {s.routed:,} are routed and stand for all, which makes "
            "loads more uneven than all would"
        )
    assert s.scope is not None
    where = f"{s.micro_batches} of {s.shape.micro_batches} micro-batches, {s.replicas} of {s.shape.replicas} replicas"
    where += f" and {s.ranks} of each one's {s.shape.ranks} data-parallel ranks"
    if s.kind == "scopes":
        uneven = "of a micro-batch and of a step" if s.ranks < s.shape.ranks or s.routed < s.real else "of a step"
        whole = _SCOPES[s.scope].replace("sequence", "sequences").replace("micro-batch", "micro-batches")
        return (
            f"whole {whole} are routed, {s.routed:,} tokens of each rank, and stand for the others: {where}; what a "
            f"router and a capacity do within one is what they would do, the loads {uneven} are more uneven, and what "
            "stands for each other takes equally long"
        )
    part = s.ranks * s.routed
    scope_tokens = s.shape.ranks * s.real if s.scope == "all" else s.real
    if s.scope == "sequence" and scenario.training is not None:
        scope_tokens = scenario.training.sequence_tokens
    each = part * model.top_k / model.num_experts
    does = ["loads are more uneven than all would make them"]
    if scenario.capacity is not None:
        of_part, of_all = (_dropped_by_chance(n * model.top_k / model.num_experts) for n in (part, scope_tokens))
        does.append(
            "room for an expert is as large a part of the capacity, rounded at random, which drops more than all would "
            f"(at factor 1, where experts are alike, some {of_part:.0%} in place of {of_all:.0%})"
        )
    if scenario.policies.routing.couples:
        each = part * model.top_k / model.num_experts
        does.append("the router balances fewer tokens than it would")
        if each < _FEW:
            does[-1] += f", only {each:.2g} choices an expert, so that rounding decides what it does"
    return (
        f"a {_SCOPES[s.scope]} has {scope_tokens:,} tokens, more than are routed at once, so {part:,} of one stand for "
        f"it, in {where}: {'; '.join(does)}"
    )


def _dropped_by_chance(mean: float) -> float:
    """Share of choices beyond a room of `mean` where a Poisson number of that mean wants in (normal approximation of
    the mean absolute deviation, half of which lies above)."""
    return min(1.0, 1.0 / math.sqrt(2.0 * math.pi * mean))
