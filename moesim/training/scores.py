"""The scores that routers see while a model trains: drawn for the whole run, or a pool's taken over and over."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.cost.routed import pool_source
from moesim.errors import BadInput, Problem
from moesim.scenario.load import Scenario
from moesim.training.routing import ScoreSource
from moesim.workload.scores import ScoreModel, score_model
from moesim.workload.scores_training import TrainingScores

__all__ = ["training_scores"]


def training_scores(scenario: Scenario, seed: int) -> ScoreSource:
    """Scores of the scenario's tokens: of its `routing` where it says anything of one (popularity then stays as it is),
    else a training run's, whose popularity and temperature change with progress. Raises BadInput for a file that
    cannot be used.
    """
    model, training = scenario.model, scenario.training
    assert training is not None
    if scenario.routing.model_fields_set:
        pool = pool_source(scenario, seed)
        made = score_model(pool, scenario.routing.scores, seed, model.norm_topk_prob, model.scoring)
        return _Repeated(made, pool.num_tokens)
    spec = training.scores
    if "sequence_tokens" not in spec.model_fields_set:
        spec = spec.model_copy(update={"sequence_tokens": training.sequence_tokens})
    columns = scenario.policies.routing.score_columns(model.num_experts)
    if model.top_k > columns:
        message = f"this router scores {columns} columns, fewer than the {model.top_k} experts a token of {model.name}"
        raise BadInput(Problem("policies.routing", message))
    return TrainingScores(spec, model.num_moe_layers, columns, model.top_k, seed)


class _Repeated:
    """A pool's scores, taken over and over."""

    def __init__(self, scores: ScoreModel, tokens: int) -> None:
        self._scores, self._tokens = scores, tokens
        self.name, self.assumed = scores.name, scores.assumed

    def scores(self, rows_N: NDArray[np.int64], layer: int, progress: float = 1.0) -> NDArray[np.float32]:
        """See `ScoreSource`."""
        return self._scores.scores(rows_N % self._tokens, layer, progress)
