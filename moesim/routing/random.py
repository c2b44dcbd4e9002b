"""K distinct experts at random, all alike: what routing costs when it follows nothing.

Source: Zuo et al. 2021, THOR (arXiv:2110.04260): one random expert for a whole batch in training, for each token or
each sentence in inference, in every other layer. There the other layers are dense; where a model has experts in all of
them, ours take the K best of the scores (a reconstruction). A training step there runs two forward passes with experts
of their own and adds the KL divergence of their outputs to the loss; here it is one pass.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.rng import generator
from moesim.routing import Floats, Routed, Router, RoutingContext, top_ids
from moesim.routing.gating import known, plain
from moesim.workload.pool import Ids
from moesim.workload.synthetic import Groups, SyntheticSpec, generate, uniform_weights

__all__ = ["Policy"]


class Policy(Router):
    """per: who draws: each token, each sequence (the same in every step), or the batch as one. every: layers 0,
    every, 2 * every, ... draw; the others take the K best scores. Else scores count only for which experts may be
    taken (those above -inf)."""

    replaces_ids: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False

    per: Literal["token", "sequence", "batch"] = "token"
    every: int = Field(default=1, ge=1)

    @property
    def from_scores(self) -> bool:  # type: ignore[override]  # `draw` knows neither sequences nor batches
        """Independent tokens can be drawn as a pool; the rest must see the tokens."""
        return self.per != "token" or self.every > 1

    @property
    def couples(self) -> bool:  # type: ignore[override]  # a pool routed once would know few batches
        """All tokens of a batch, and of no other, take the same experts."""
        return self.per == "batch"

    @property
    def normalised(self) -> bool:  # type: ignore[override]  # the layers between follow the model
        """Random experts weigh 1 / K each."""
        return self.every == 1

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Uniform over the sets of K experts; gates 1 / K."""
        if context.layer % self.every:
            return plain(score_TE, context)
        draw_TE = np.where(
            np.isneginf(score_TE), np.float32(-np.inf), self._draws(len(score_TE), score_TE.shape[1], context)
        )
        expert_TK = top_ids(draw_TE, context.top_k)
        return Routed(expert_TK, np.full(expert_TK.shape, 1 / context.top_k, score_TE.dtype))

    def _draws(self, tokens: int, experts: int, context: RoutingContext) -> NDArray[np.float32]:
        if self.per == "token":
            return context.generator("routing/random").random((tokens, experts), np.float32)
        if self.per == "batch":
            return context.generator("routing/random/batch").random((1, experts), np.float32)
        sequence_T = known(context.sequence_T, tokens, "random routing per sequence", "the sequence")
        number_Q, place_T = np.unique(sequence_T, return_inverse=True)
        draw_QE = np.empty((len(number_Q), experts), np.float32)
        for i, sequence in enumerate(number_Q.tolist()):
            rng = generator(context.seed, "routing/random/sequence", context.layer, sequence)
            draw_QE[i] = rng.random(experts, np.float32)
        return draw_QE[place_T]

    def draw(self, weight_LE: NDArray[np.float64], tokens: int, top_k: int, groups: Groups, seed: int) -> Ids:
        """Independent tokens, every expert with chance K / E; `weight_LE` gives the shape only."""
        uniform = uniform_weights(*weight_LE.shape)
        return generate(SyntheticSpec(pool_tokens=tokens), uniform, top_k, seed, groups).expert_TLK
