"""What rerouting policies share: ranks of all experts by their scores, and gates of the ones taken."""

from __future__ import annotations

import numpy as np

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim.errors import BadInput
from moesim.offload import OffloadContext, StepRoutes

__all__ = ["ScoredReroute"]


class ScoredReroute:
    """`moesim.offload.Reroute` where `order` ranks a layer's experts; the first K are taken."""

    def __init__(self, context: OffloadContext, gone_LE: BoolArray | None) -> None:
        """gone_LE: experts that must not be taken. Raises BadInput where a layer has fewer than K left."""
        self.context = context
        self.gone_LE = gone_LE
        if (
            gone_LE is not None
            and (left := int((~gone_LE).sum(axis=1).min(initial=context.num_experts))) < context.top_k
        ):
            raise BadInput(
                f"every token takes {context.top_k} experts, but a layer has only {left} left."
                " Keep more experts of each layer, or lower the model's top_k."
            )

    def begin(self, step: StepRoutes) -> None:
        """See Reroute."""
        if step.score_TLE is None:
            raise BadInput(
                "rerouting ranks all experts of a layer, but the routes hold the top K alone. Use a trace with `scores`"
                " or a model of them (routing.scores), or rerouting: none."
            )

    def order(self, score_TE: FloatArray, resident_E: BoolArray, layer: int) -> IntArray:
        """Experts in the order in which each token wants them: [T, E]."""
        raise NotImplementedError

    def routes(self, step: StepRoutes, layer: int, resident_E: BoolArray) -> tuple[IntArray, FloatArray | None]:
        """See Reroute. The new choices' gates are softmax of their scores over the K taken, scaled so that the token's
        gates add up to what they did: the router's own weights under softmax gates that add up to 1 (ranks alone are
        changed: arXiv 2412.00099), the same shape under others."""
        assert step.score_TLE is not None
        score_TE = np.array(step.score_TLE[:, layer], np.float64)
        if self.gone_LE is not None:
            score_TE[:, self.gone_LE[layer]] = -np.inf
        ids_TK = self.order(score_TE, resident_E, layer)[:, : step.expert_TLK.shape[2]]
        # most wanted by the router first, whoever brought them here
        taken_TK = np.take_along_axis(score_TE, ids_TK, axis=1)
        turn_TK = np.lexsort((ids_TK, -taken_TK), axis=1)
        ids_TK = np.take_along_axis(ids_TK, turn_TK, axis=1)
        taken_TK = np.take_along_axis(taken_TK, turn_TK, axis=1)
        if step.weight_TLK is None:
            return ids_TK, None
        gate_TK = np.exp(taken_TK - taken_TK[:, :1])
        total_T = np.asarray(step.weight_TLK[:, layer], np.float64).sum(axis=1, keepdims=True)
        return ids_TK, gate_TK / gate_TK.sum(axis=1, keepdims=True) * total_T


def ranked(score_TE: AnyArray) -> IntArray:
    """Experts by score, highest first; of equals the lower id: [T, E]."""
    return np.argsort(-score_TE, axis=1, kind="stable")
