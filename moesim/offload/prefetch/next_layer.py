"""The next layer's gate, applied to this layer's hidden state (Mixtral-offloading, arXiv 2312.17238, section 3.2;
HOBBIT, arXiv 2411.01433; FATE, arXiv 2502.12224).

A trace holds no hidden states, so what the stale gate names is drawn: each true expert with the recall stated for the
distance, the other names by popularity. Nothing is known of the first layer, which has none before it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moesim.offload import OffloadContext
from moesim.offload.prefetch.naming import Ahead, Limited, Named, draw_named, others, votes

__all__ = ["Policy"]

_Share = Annotated[float, Field(ge=0, le=1)]
_Shares = Annotated[tuple[_Share, ...], Field(strict=False, min_length=1, max_length=512)]


class Policy(Limited):
    """recall: share of a token's true experts that the gate names, by look-ahead distance, nearest first; as many
    distances as layers are looked ahead (`ahead`: only so many of them). The default is measured: a gate on the hidden
    state of one layer before names about 85 % of the routed experts, and each further layer costs 3.5 to 4 points
    (BigMoeOnEdge, docs/route-ahead.md: Qwen3-30B-A3B 88.6 %, Qwen3.6-35B-A3B 80.7 %; FATE reports 78.8 % on
    DeepSeek-V2-Lite). ahead: layers, 1 as in Mixtral-offloading. names: experts a token named for; None: as many as it
    takes. wrong: how the wrong ones are drawn: a stale gate errs towards experts that are often near the top, so by
    popularity.
    """

    oracle: ClassVar[bool] = True

    recall: _Shares = (0.85, 0.81, 0.775, 0.735)
    ahead: Annotated[int, Field(ge=1, le=512)] = 1
    names: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    wrong: Literal["popularity", "uniform"] = "popularity"

    @model_validator(mode="after")
    def _stated(self) -> Self:
        if self.ahead > len(self.recall):
            raise ValueError(
                f"recall must be stated for every distance looked ahead: ahead is {self.ahead}, recall has"
                f" {len(self.recall)} figures. Give more figures, or a smaller ahead."
            )
        if any(far > near for near, far in zip(self.recall, self.recall[1:], strict=False)):
            raise ValueError("recall must not rise with the distance; sort the figures, nearest layer first")
        return self

    def start(self, context: OffloadContext) -> _StaleGate:
        """See `moesim.offload.PrefetchPolicy.start`."""
        return _StaleGate(context, self)


class _StaleGate(Ahead):
    def __init__(self, context: OffloadContext, policy: Policy) -> None:
        super().__init__(context, policy.ahead, policy)
        self.furthest = len(policy.recall)
        self._policy = policy
        self._names = policy.names or context.top_k

    def named(self, layer: int, target: int) -> Named:
        """See Ahead. Looks at the routes of `target` through the stated recall alone."""
        if layer < 0:
            return []
        recall = self._policy.recall[target - layer - 1]
        chance_E = others(self.context, target, self._policy.wrong)
        seed = self.context.seed
        names = draw_named(self.step, target, recall, self._names, chance_E, seed, "prefetch/next_layer")
        return votes(names, self.context.num_experts)
