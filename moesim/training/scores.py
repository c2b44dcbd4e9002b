"""The scores that routers see while a model trains: drawn for the whole run, or a pool's taken over and over."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.cost.routed import fitted_generator, scored_model
from moesim.scenario.load import Scenario
from moesim.training.routing import ScoreSource
from moesim.workload.routing import load_routing
from moesim.workload.scores import ScoreModel, score_model
from moesim.workload.scores_training import TrainingScores

__all__ = ["training_scores"]


def training_scores(scenario: Scenario, seed: int) -> ScoreSource:
    """Scores of the scenario's tokens: of a training run, whose popularity and temperature change with its progress
    (`routing.training_scores`), or those of a pool where the scenario names a trace, counts or a knob of the synthetic
    model. Raises BadInput for a file that cannot be used.
    """
    routing, training = scenario.routing, scenario.training
    assert training is not None
    model = scored_model(scenario.model, scenario.policies.routing.score_columns(scenario.model.num_experts))
    if routing.names_pool:
        pool = load_routing(routing, model, scenario.base, seed, None)
        if routing.scores.model == "generator":
            drawn, pool = fitted_generator(pool, seed)
            return _Repeated(drawn, pool.num_tokens)
        made = score_model(pool, routing.scores, seed, model.norm_topk_prob, model.scoring)
        return _Repeated(made, pool.num_tokens)
    spec = routing.training_scores
    if "sequence_tokens" not in spec.model_fields_set:
        spec = spec.model_copy(update={"sequence_tokens": training.sequence_tokens})
    return TrainingScores(spec, model.num_moe_layers, model.num_experts, model.top_k, seed)


class _Repeated:
    """A pool's scores, taken over and over."""

    def __init__(self, scores: ScoreModel, tokens: int) -> None:
        self._scores, self._tokens = scores, tokens
        self.name, self.assumed = scores.name, scores.assumed

    def scores(self, rows_N: NDArray[np.int64], layer: int, progress: float = 1.0) -> NDArray[np.float32]:
        """See `ScoreSource`."""
        return self._scores.scores(rows_N % self._tokens, layer, progress)
