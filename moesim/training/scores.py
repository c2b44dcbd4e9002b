"""The scores that routers see while a model trains."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.cost.routed import scored_model
from moesim.scenario.load import Scenario
from moesim.training.routing import ScoreSource
from moesim.workload.routing import load_routing
from moesim.workload.scores import ScoreModel, score_model
from moesim.workload.scores_training import TrainingScores
from moesim.workload.synthetic import SyntheticSpec

__all__ = ["training_scores"]


def training_scores(scenario: Scenario, seed: int) -> ScoreSource:
    """Scores of the scenario's tokens: of a training run, whose popularity and temperature change with its progress
    (`routing.training_scores`), or those of a pool where the scenario names a trace, counts or a knob of the synthetic
    model.
    """
    routing = scenario.routing
    model = scored_model(scenario.model, scenario.policies.routing.score_columns(scenario.model.num_experts))
    if routing.path is None and not set(routing.model_fields_set) & set(SyntheticSpec.model_fields):
        spec = routing.training_scores
        return TrainingScores(spec, model.num_moe_layers, model.num_experts, model.top_k, seed)
    pool = load_routing(routing, model, scenario.base, seed, None)
    made = score_model(pool, routing.scores, seed, model.norm_topk_prob, model.scoring)
    return _Repeated(made, pool.num_tokens)


class _Repeated:
    """A pool's scores, taken over and over."""

    def __init__(self, scores: ScoreModel, tokens: int) -> None:
        self._scores, self._tokens = scores, tokens
        self.name, self.assumed = scores.name, scores.assumed

    def scores(self, rows_N: NDArray[np.int64], layer: int, progress: float = 1.0) -> NDArray[np.float32]:
        """See `ScoreSource`."""
        return self._scores.scores(rows_N % self._tokens, layer, progress)
