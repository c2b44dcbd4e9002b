"""simulate(scenario) -> RunResult: the first of the four jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moesim.arrays import FloatArray
from moesim.balancing import NearPolicy
from moesim.cost.attention import AttentionTables
from moesim.cost.dense import DenseTables, attention_shape
from moesim.cost.deployed import (
    Experts,
    check_dispatch,
    exchange_copies,
    experts_of,
    moe_cost,
    place_passes,
    routing_warnings,
)
from moesim.cost.explain import Explanation, explain
from moesim.cost.locality import nearness
from moesim.cost.offload_explain import explain_offloaded
from moesim.cost.offload_setup import Offload, offload_of, offload_warnings, offloaded_pricer
from moesim.cost.offloaded import OffloadedPricer
from moesim.cost.operators import Operators
from moesim.cost.pricer import Pricer, Run
from moesim.cost.rebalancing import MoveCosts, RebalancingPricer
from moesim.cost.split import Splitter
from moesim.cost.step import StepPricer
from moesim.dispatch.plan import shares
from moesim.engine.core import Deployment, Outcome, run
from moesim.engine.load import load_weights_ns
from moesim.engine.rank import KvShape
from moesim.errors import BadInput, Infeasible, Problem
from moesim.layout import Layout
from moesim.memory import RankMemory, require_fit
from moesim.record import REJECTED
from moesim.run_result import SCHEMA_VERSION, RunResult
from moesim.scenario.load import Scenario
from moesim.training.result import TrainingResult
from moesim.training.run import simulate_training
from moesim.units import s_to_ns
from moesim.workload.requests import RequestsSpec, RequestStream, build_requests

__all__ = ["SCHEMA_VERSION", "Prepared", "RunResult", "found", "prepare", "simulate"]


def simulate(
    scenario: Scenario, seed: int | None = None, *, progress: Callable[[float], None] | None = None
) -> RunResult | TrainingResult:
    """Run a scenario: requests that are served, or steps of training. `progress` is told the share that is done.

    Returns a result that is not feasible, with reasons, where the deployment does not fit. Raises BadInput for
    traffic or routing that cannot be used.
    """
    if scenario.requests is None:
        return simulate_training(scenario, seed, progress=progress)
    return _serve(scenario, scenario.requests, scenario.seed if seed is None else seed, progress)


def _serve(
    scenario: Scenario, requests: RequestsSpec, seed: int, progress: Callable[[float], None] | None
) -> RunResult:
    prepared = prepare(scenario, requests, seed)
    result = prepared.result
    if prepared.deployment is None:
        return result
    began = time.perf_counter()
    outcome = run(prepared.stream, prepared.deployment, progress)
    result.loop_s = time.perf_counter() - began
    return found(prepared, outcome)


@dataclass(slots=True)
class Prepared:
    """A deployment that has been laid out, placed, checked for memory and priced, and has not run yet. deployment: what
    the event loop is given; None where it does not fit, and `result` says why. result: without what a run finds."""

    result: RunResult
    stream: RequestStream
    layout: Layout
    ops: Operators
    deployment: Deployment | None


def prepare(scenario: Scenario, requests: RequestsSpec, seed: int) -> Prepared:
    """Everything of a serving run but the run. Raises BadInput for traffic or routing that cannot be used."""
    degrees = (scenario.parallel.tp, scenario.parallel.dp, scenario.parallel.ep)
    layout = Layout.of(scenario.model, scenario.cluster, *degrees, scenario.communication)
    result = RunResult(scenario, seed, layout=layout)
    stream = build_requests(requests, scenario.base, seed)
    result.stream = stream
    ops = Operators(scenario.cluster.profile, scenario.engine.cuda_graph)
    check_dispatch(scenario, layout)
    prepared = Prepared(result, stream, layout, ops, None)
    try:
        experts = experts_of(scenario, layout, ops, stream, seed) if scenario.model.is_moe else None
        slots = experts.slot_size if experts is not None else 0
        copies = exchange_copies(scenario, layout, experts.figures if experts is not None else None)
        offload = None
        if scenario.tiers is not None:
            assert experts is not None
            offload = offload_of(scenario, layout, ops, experts, stream, seed)
            memory = offload.memory
        else:
            memory = require_fit(
                scenario.model, scenario.cluster, layout, scenario.engine, slots, copies, scenario.rebalance is not None
            )
    except Infeasible as error:
        result.reasons, result.over = error.reasons, error.over
        return prepared
    result.memory, result.experts, result.offload = memory, experts, offload
    result.warnings = (
        *scenario.warnings,
        *stream.warnings,
        *(routing_warnings(experts) if experts is not None else ()),
        *(offload_warnings(scenario, offload, experts, seed) if offload is not None and experts is not None else ()),
    )
    kv = result.kv = _kv_shape(scenario, layout, memory)
    shared = _tables(scenario, layout, ops, kv)
    groups = scenario.parallel.replicas * (1 if layout.meets else layout.dp)
    pricers = _pricers(scenario, layout, experts, shared, seed, groups)
    if offload is not None:
        assert experts is not None
        pricers = [offloaded_pricer(scenario, offload, experts, ops, shared, seed) for _ in range(groups)]
    result.pricers, result.groups = pricers, groups
    result.ready_ns = load_weights_ns(
        scenario.engine.weights_from, scenario.cluster, layout, memory, scenario.parallel.replicas
    )
    prepared.deployment = Deployment(
        pricers=_one_each(pricers, groups),
        ranks_per_group=layout.dp if layout.meets else 1,
        kv=kv,
        batching=scenario.policies.batching,
        balancer=scenario.policies.balancer,
        max_num_seqs=scenario.engine.max_num_seqs,
        max_num_batched_tokens=scenario.engine.max_num_batched_tokens,
        max_model_len=scenario.engine.max_model_len or scenario.model.max_position_embeddings,
        run_ahead=scenario.engine.run_ahead,
        ready_ns=result.ready_ns,
        until_ns=None if scenario.engine.max_duration_s is None else s_to_ns(scenario.engine.max_duration_s),
        near=_near(scenario, layout, experts),
    )
    return prepared


def found(prepared: Prepared, outcome: Outcome, priced: bool = True) -> RunResult:
    """The result of a run of what was prepared: records, wherever its step times came from. priced: the deployment's
    pricers made them, and explain them. Raises BadInput where max_model_len let no request in."""
    result, deployment = prepared.result, prepared.deployment
    assert deployment is not None
    assert result.memory is not None
    if (outcome.requests.target == REJECTED).all():
        why = _none_served(prepared.stream, deployment, result.memory)
        result.reasons, result.over = why.reasons, why.over
        return result
    result.outcome = outcome
    result.peak_kv_units = outcome.peak_kv_units
    if priced:
        result.explanation = _explain(outcome, deployment.pricers, result.offload)
    return result


def _none_served(stream: RequestStream, deployment: Deployment, memory: RankMemory) -> Infeasible:
    """Why no request could be served: the KV cache is too small for any. Raises BadInput where max_model_len is."""
    kv, shortest = deployment.kv, int((stream.prompt_tokens + stream.output_tokens).min())
    told = (
        "every request is longer than max_model_len or than the KV cache holds, so none is served: the "
        f"shortest has {shortest:,} tokens, max_model_len is {deployment.max_model_len:,} and the KV cache holds "
        f"{kv.token_capacity:,}; shorten them or raise the limit that binds"
    )
    if shortest > deployment.max_model_len:
        raise BadInput(Problem("requests", told))
    short_bytes = (kv.units(shortest) - kv.capacity) * memory.kv_unit * memory.kv_copies
    return Infeasible([f"requests: {told}"], short_bytes / max(memory.usable, 1))


def _splitter(
    scenario: Scenario,
    shared: tuple[DenseTables, AttentionTables | None, AttentionTables | None],
    experts: Experts | None,
) -> Splitter | None:
    """What prices steps of two micro-batches, where the scenario asks for them."""
    if scenario.communication.overlap != "two_batch" or experts is None:
        return None
    return Splitter(*shared, experts.prices.exchange.compute_scale)


def _pricers(
    scenario: Scenario,
    layout: Layout,
    experts: Experts | None,
    shared: tuple[DenseTables, AttentionTables | None, AttentionTables | None],
    seed: int,
    groups: int,
) -> list[StepPricer]:
    """One a group, or one for all where a group's pricing keeps no state."""
    splitter = _splitter(scenario, shared, experts)
    if experts is None or scenario.rebalance is None:
        number = 1 if experts is None or experts.replay is None else groups
        return [StepPricer(*shared, moe_cost(scenario, layout, experts, seed), splitter) for _ in range(number)]
    assert experts.context is not None
    model, context = scenario.model, replace(experts.context, sample=None)  # an engine keeps no tokens
    return [
        RebalancingPricer(
            *shared,
            experts.placement,
            lambda placement, before: moe_cost(scenario, layout, experts, seed, placement, before),
            lambda load_LE: place_passes(scenario.policies.placement, load_LE, model, context),
            scenario.rebalance,
            MoveCosts.of(scenario.cluster.profile, int(model.expert_bytes()) // layout.expert_tp),
            splitter,
        )
        for _ in range(groups)
    ]


def _near(scenario: Scenario, layout: Layout, experts: Experts | None) -> tuple[NearPolicy, FloatArray] | None:
    """A balancer that is told where requests' experts are, and what it is told; every replica of the deployment holds
    the same."""
    balancer = scenario.policies.balancer
    if not getattr(balancer, "uses_affinity", False) or experts is None or layout.dp == 1:
        return None
    if experts.replay is None:
        message = (
            "this balancer sends requests to their experts, and at count fidelity a batch's tokens come from all ranks"
            " alike, so that nothing would change. Set routing.fidelity to token, or choose another balancer"
        )
        raise BadInput(Problem("policies.balancer", message))
    near_RD = nearness(balancer.predict, experts.replay, experts.context, experts.placement, layout)
    return balancer, np.tile(near_RD, scenario.parallel.replicas)


def _one_each(pricers: list[StepPricer], groups: int) -> list[Pricer]:
    """One pricer a group; groups share one where pricing keeps no state of a group."""
    return [pricers[g % len(pricers)] for g in range(groups)]


def _explain(outcome: Outcome, pricers: list[Pricer], offload: Offload | None) -> Explanation | None:
    by_pricer: dict[int, list[Run]] = {}
    priced: dict[int, StepPricer] = {}
    for group, row in zip(outcome.steps.run_group.tolist(), outcome.runs, strict=True):
        pricer = pricers[group]
        assert isinstance(pricer, StepPricer)
        by_pricer.setdefault(id(pricer), []).append(row)
        priced[id(pricer)] = pricer
    out: Explanation | None = None
    for key, runs in by_pricer.items():
        pricer = priced[key]
        if isinstance(pricer, OffloadedPricer):
            assert offload is not None
            one = explain_offloaded(runs, pricer, int(offload.fetch.grade), offload.cpu.grade)
        else:
            one = explain(runs, pricer)
        if out is None:
            out = one
        else:
            out.add(one)
    return out


def _kv_shape(scenario: Scenario, layout: Layout, memory: RankMemory) -> KvShape:
    model = scenario.model
    window_layers = sum(kind != "full" for kind in model.attention_kind_of_layer)
    return KvShape(
        full_layers=model.num_layers - window_layers,
        window_layers=window_layers,
        window=max(model.window_of_layer, default=0),
        block_size=scenario.engine.block_size,
        capacity=memory.kv_units,
    )


def _tables(
    scenario: Scenario, layout: Layout, ops: Operators, kv: KvShape
) -> tuple[DenseTables, AttentionTables | None, AttentionTables | None]:
    model, engine = scenario.model, scenario.engine
    dense = DenseTables(model, layout, engine, ops, layout.meets, shared=not shares(scenario.policies.dispatch))
    most = min(kv.token_capacity, engine.max_num_seqs * (engine.max_model_len or model.max_position_embeddings))
    if kv.window_layers and kv.full_layers:
        most = min(kv.capacity // kv.full_layers * kv.block_size, engine.max_num_seqs * model.max_position_embeddings)
    full = window = None
    size = (engine.max_num_seqs, most + engine.max_num_seqs, engine.max_num_batched_tokens)
    if dense.full_layers:
        full = AttentionTables(ops, attention_shape(model, layout.tp, False), *size)
    if dense.window_layers:
        inside = min(most, engine.max_num_seqs * kv.window) + engine.max_num_seqs
        window = AttentionTables(ops, attention_shape(model, layout.tp, True), size[0], inside, size[2])
    return dense, full, window
