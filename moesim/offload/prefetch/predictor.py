"""A predictor with a stated accuracy and reach: whatever it is made of, this is what it is worth.

ExpertFlow (arXiv 2410.17954) predicts the paths of all tokens through all layers before the step: `ahead: null`,
`before_step: true`. ProMoE (arXiv 2410.22134) has a small network a layer that names the experts of the layer one
stride later: `ahead: 2`, `stride: true`, `accuracy: 0.847`. In Pre-gated MoE (arXiv 2308.12066) the gate of a layer
chooses the experts of the next one, so it is never wrong: `ahead: 1`, `accuracy: 1.0`. Read-ME (arXiv 2410.19123) knows
the routes of all queued tokens: `accuracy: 1.0`, `before_step: true`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moesim.offload import OffloadContext, Wanted
from moesim.offload.prefetch.naming import Ahead, Limited, Named, draw_named, others, votes

__all__ = ["Policy"]


class Policy(Limited):
    """accuracy: share of a token's true experts that it names; the default is ProMoE's, the only one published with a
    definition. ahead: layers it sees; None: all. before_step: it works on tokens, so that the first layers are known
    before the step; else on what a layer computed, and the first layer is never named. stride: only the layer exactly
    `ahead` further on is named, not those between. names: experts named for a token (more than it takes: over-fetch,
    which adds wrong names, since accuracy says what share of the true ones is among them); None: as many as it takes.
    wrong: how the wrong ones are drawn: by popularity as a trained network errs, or uniformly.
    """

    oracle: ClassVar[bool] = True

    accuracy: Annotated[float, Field(ge=0, le=1)] = 0.847
    ahead: Annotated[int, Field(ge=1, le=512)] | None = 1
    before_step: bool = False
    stride: bool = False
    names: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    wrong: Literal["popularity", "uniform"] = "popularity"

    def start(self, context: OffloadContext) -> _Predictor:
        """See `moesim.offload.PrefetchPolicy.start`."""
        return _Predictor(context, self)


class _Predictor(Ahead):
    repeats: ClassVar[bool] = False

    def __init__(self, context: OffloadContext, policy: Policy) -> None:
        super().__init__(context, policy.ahead or context.num_layers, policy)
        self._policy = policy
        self._names = policy.names or context.top_k

    def named(self, layer: int, target: int) -> Named:
        """See Ahead. Looks at the routes of `target` through the stated accuracy alone."""
        policy, context = self._policy, self.context
        if policy.stride and target != layer + self.ahead:
            return []
        chance_E = others(context, target, policy.wrong)
        names = draw_named(
            self.step, target, policy.accuracy, self._names, chance_E, context.seed, "prefetch/predictor"
        )
        return votes(names, context.num_experts)

    def wanted(self, layer: int) -> list[Wanted]:
        """See Prefetch."""
        if layer < 0 and not self._policy.before_step:
            return []
        return super().wanted(layer)
