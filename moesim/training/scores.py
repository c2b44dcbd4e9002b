"""The scores that routers see while a model trains."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.scenario.load import Scenario
from moesim.training.routing import ScoreSource
from moesim.workload.routing import load_routing
from moesim.workload.scores import ScoreModel, score_model

__all__ = ["training_scores"]


def training_scores(scenario: Scenario, seed: int) -> ScoreSource:
    """Scores of the scenario's tokens."""
    model = scenario.model
    pool = load_routing(scenario.routing, model, scenario.base, seed, None)
    made = score_model(pool, scenario.routing.scores, seed, model.norm_topk_prob, model.scoring)
    return _Repeated(made, pool.num_tokens)


class _Repeated:
    """A pool's scores, taken over and over."""

    def __init__(self, scores: ScoreModel, tokens: int) -> None:
        self._scores, self._tokens = scores, tokens
        self.name, self.assumed = scores.name, scores.assumed

    def scores(self, rows_N: NDArray[np.int64], layer: int, progress: float = 1.0) -> NDArray[np.float32]:
        """See `ScoreSource`."""
        return self._scores.scores(rows_N % self._tokens, layer, progress)
