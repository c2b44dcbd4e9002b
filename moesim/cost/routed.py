"""From a scenario's routing to a pool whose tokens have experts, and the router that chose them.

A policy that needs scores gets them from a score model over the pool; what no trace holds is drawn, and then a second
model says how much rests on it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moesim.dispatch import split
from moesim.errors import BadInput, Problem
from moesim.model import MoEModel
from moesim.placement import Placement
from moesim.rng import generator
from moesim.routing.batch import BatchRouter, ModelFacts
from moesim.scenario.load import Scenario
from moesim.workload.pool import RoutingSource
from moesim.workload.routing import load_routing
from moesim.workload.scores import ScoreModel, score_model

__all__ = ["figures", "fitted_generator", "pool_source", "route_source", "scored_model"]

_SAMPLE = 2048
_GENERATED = 8192


def route_source(scenario: Scenario, seed: int) -> tuple[RoutingSource, BatchRouter | None, BatchRouter | None]:
    """The pool with the experts that the scenario's policy takes; the router, where it routes from scores (under a
    capacity every policy does); and where scores are assumed the same router on another model of them.
    """
    model, policy = scenario.model, scenario.policies.routing
    base = pool_source(scenario, seed)
    if not _needs_scores(scenario):
        return base, None, None
    facts = ModelFacts(
        model.top_k,
        model.num_experts,
        model.num_moe_passes,
        model.num_expert_groups,
        model.top_groups,
        model.scoring,
        model.norm_topk_prob,
    )
    spec = scenario.routing.scores

    def router(kind: str) -> tuple[BatchRouter, RoutingSource]:
        pool: RoutingSource
        scores: ScoreModel
        if kind == "generator":
            scores, pool = fitted_generator(base, seed)
        else:
            chosen = spec.model_copy(update={"model": kind})
            scores, pool = score_model(base, chosen, seed, model.norm_topk_prob, model.scoring), base
        return BatchRouter(policy, scores, pool, facts, scenario.capacity, seed), pool

    first, pool = router(spec.model)
    other = router("gumbel" if spec.model != "gumbel" else "spaced")[0] if first.scores.assumed else None
    source = first.route_pool()
    if not policy.from_scores and pool.recorded:
        source = replace(source, recorded=True, source=base.source)
    return replace(source, warnings=base.warnings), first, other


def pool_source(scenario: Scenario, seed: int) -> RoutingSource:
    """The pool before any router has run: what the trace or the synthetic model says. Raises BadInput."""
    model, policy = scenario.model, scenario.policies.routing
    seen = scored_model(model, policy.score_columns(model.num_experts)) if _needs_scores(scenario) else model
    own = None if policy.from_scores else policy
    return load_routing(scenario.routing, seen, scenario.base, seed, own, any_top_k=_needs_scores(scenario))


def fitted_generator(trace: RoutingSource, seed: int) -> tuple[ScoreModel, RoutingSource]:
    """A generator of scores fitted to `trace`, and a pool of its tokens."""
    from moesim.workload.scores_synthetic import SyntheticScores, fit

    if not trace.recorded or trace.weight_TLK is None:
        message = (
            f"a generator is fitted to a trace with gate weights, and {trace.source} is none. Give routing.path one"
        )
        raise BadInput(Problem("routing.scores.model", message))
    made = SyntheticScores(fit(trace), _GENERATED, seed)
    return made, replace(made.pool(), layer_index=trace.layer_index, warnings=trace.warnings)


def _needs_scores(scenario: Scenario) -> bool:
    made = scenario.routing.scores.model == "generator"
    return bool(scenario.policies.routing.from_scores or scenario.capacity is not None or made)


def scored_model(model: MoEModel, columns: int) -> MoEModel:
    """The model as its scores see it: one expert for each column of them."""
    if columns == model.num_experts:
        return model
    return replace(
        model, num_experts=columns, top_k=min(model.top_k, columns // 2), router_columns=0, num_expert_groups=1,
        top_groups=1, expert_widths=(),
    )  # fmt: skip


def figures(router: BatchRouter, placement: Placement) -> dict[str, Any]:
    """A sample of at most 2,048 tokens of the pool, routed as one batch: experts a token, share dropped, busiest expert
    and busiest rank over the mean (means over layers)."""
    tokens = router.pool_tokens
    rows = np.sort(generator(0, "routing/figures").permutation(tokens)[:_SAMPLE])
    # where a choice goes with the step of denoising, the sample is cut into one batch for each of sixteen
    parts = np.array_split(rows, 16 if router.policy.denoises and len(rows) >= 16 else 1)
    none, wanted, dropped = router.facts.experts, 0, 0
    count_LE = np.zeros((router.facts.layers, none), np.int64)
    for step, part in enumerate(parts):
        batch = router.route(part, "prefill", step)
        ids_LX = np.moveaxis(batch.expert_NLW, 1, 0).reshape(router.facts.layers, -1)
        count_LE += np.stack([np.bincount(ids, minlength=none + 1) for ids in ids_LX])[:, :none]
        wanted, dropped = wanted + int(batch.wanted_NL.sum()), dropped + int(batch.dropped_NL.sum())
    load_LP = placement.rank_load(split(count_LE, placement).astype(np.float64))
    kept = int(count_LE.sum())
    return {
        "score_model": router.scores.name,
        "experts_per_token": kept / (len(rows) * router.facts.layers),
        "dropped_share": dropped / max(wanted, 1),
        "max_over_mean_expert": _peak(count_LE),
        "max_over_mean_rank": _peak(load_LP),
    }


def _peak(load_LX: Any) -> float:
    return float((load_LX.max(axis=1) / np.maximum(load_LX.mean(axis=1), 1e-300)).mean())
