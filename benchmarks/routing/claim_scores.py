"""Scores that claims are checked on, and a batch of them through a router.

Legend: T tokens, L layers, E experts, K experts a token, W places a token has in an assignment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from claim_page import DATA, ROOT
from numpy.typing import NDArray

from moesim.routing import NONE, Routed, Router, RoutingContext
from moesim.traces.routing_npz import read
from moesim.workload.pool import RoutingSource
from moesim.workload.scores import ScoreModel, ScoreSpec, score_model
from moesim.workload.synthetic import SyntheticSpec, generate, popularity_weights

SEED = 1
Scores = NDArray[np.float32]


@functools.cache
def esft(name: str) -> RoutingSource | None:
    """A recorded trace, `intent` or `summary`; None where the data is not there."""
    path = DATA / "routing" / f"esft_dsv2lite_{name}.npz"
    return read(path) if path.is_file() else None


@functools.cache
def esft_scores(name: str, tail: str = "gumbel") -> ScoreModel | None:
    """Scores of a recorded trace: recorded for the six that were chosen, drawn below them."""
    source = esft(name)
    return None if source is None else score_model(source, ScoreSpec.model_validate({"model": tail}), SEED, False)


def esft_layer(name: str, layer: int, tail: str = "gumbel") -> Scores | None:
    """All tokens of one layer, [T, 64]."""
    model, source = esft_scores(name, tail), esft(name)
    return None if model is None or source is None else model.scores(np.arange(source.num_tokens), layer)


@functools.cache
def own_layers(name: str = "auxiliary_loss") -> tuple[Scores, ...]:
    """Scores of this project's own small model, every layer [T, 16], recorded whole (workloads/routing/README.md)."""
    source = read(ROOT / "workloads" / "routing" / f"stdlib_moe_{name}.npz")
    model = score_model(source, ScoreSpec(), SEED, True)
    return tuple(model.scores(np.arange(source.num_tokens), layer) for layer in range(source.num_layers))


def drawn(experts: int, top_k: int, layers: int = 1, tail: str = "gumbel", temperature: float | None = None,
          knobs: SyntheticSpec | None = None, seed: int = SEED) -> tuple[RoutingSource, ScoreModel]:  # fmt: skip
    """A synthetic pool and its scores; `knobs` none: 8,192 independent tokens, all experts alike."""
    spec = SyntheticSpec() if knobs is None else knobs
    pool = generate(spec, popularity_weights(spec, layers, experts, seed), top_k, seed)
    asked = ScoreSpec.model_validate({"model": tail, "temperature": temperature})
    return pool, score_model(pool, asked, seed, True)


def routed(policy: Router, score_TE: Scores, top_k: int, **facts: object) -> Routed:
    """One batch through a router."""
    return policy.route(score_TE, RoutingContext(top_k, seed=SEED, **facts))  # type: ignore[arg-type]


def experts_per_token(found: Routed) -> float:
    """Mean number of experts."""
    return float((found.expert_TK != NONE).sum() / len(found.expert_TK))


def load_E(found: Routed, experts: int) -> NDArray[np.int64]:
    """Tokens of each expert."""
    return np.bincount(found.expert_TK[found.expert_TK != NONE], minlength=experts)


def maxvio(load: NDArray[np.int64]) -> float:
    """Busiest expert over the mean, less 1 (Wang et al., arXiv:2408.15664, section 4.1)."""
    return float(load.max() / load.mean() - 1)


def bisect(value: Callable[[float], float], goal: float, low: float, high: float, steps: int = 40) -> float:
    """Where a falling function meets `goal`."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) > goal else (low, middle)
    return (low + high) / 2
