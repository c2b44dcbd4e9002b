"""The most popular experts of a layer, whoever the tokens are."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from moesim.errors import BadInput
from moesim.offload import OffloadContext, StepRoutes
from moesim.offload.prefetch.naming import Ahead, Limited, Named, best

__all__ = ["Policy"]


class Policy(Limited):
    """ahead: layers looked ahead. names: experts named for a layer; None: as many as a token takes. count: `fit`
    counts the activations that are known beforehand (`context.popularity_LE`), `served` those of the steps served so
    far, `both` adds them up.
    """

    ahead: Annotated[int, Field(ge=1, le=512)] = 1
    names: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    count: Literal["fit", "served", "both"] = "fit"

    def start(self, context: OffloadContext) -> _Frequency:
        """See `moesim.offload.PrefetchPolicy.start`. Raises BadInput where popularity is asked for and none known."""
        if self.count == "fit" and context.fit is None and np.ptp(context.popularity_LE) == 0:
            raise BadInput(
                "prefetch policy 'frequency' fetches the most popular experts, and all are equally popular here: no"
                " recorded routes were given to count. Give a routing trace with tokens left to fit on, or set count:"
                " served."
            )
        return _Frequency(context, self)


class _Frequency(Ahead):
    repeats: ClassVar[bool] = False

    def __init__(self, context: OffloadContext, policy: Policy) -> None:
        super().__init__(context, policy.ahead, policy)
        self._names = policy.names or context.top_k
        self._learns = policy.count != "fit"
        known_LE = np.asarray(context.popularity_LE, np.float64)
        self._count_LE = np.zeros_like(known_LE) if policy.count == "served" else known_LE.copy()

    def begin(self, step: StepRoutes) -> None:
        """See Prefetch. The step before has run: its routes may be counted now."""
        if self._learns:
            for layer in range(self.context.num_layers):
                ids = np.asarray(self.step.expert_TLK[:, layer]).ravel()
                self._count_LE[layer] += np.bincount(
                    ids[ids < self.context.num_experts], minlength=self.context.num_experts
                )
        super().begin(step)

    def named(self, layer: int, target: int) -> Named:
        """See Ahead."""
        if not len(self.step.expert_TLK):
            return []
        count_E = self._count_LE[target]
        return best(count_E / max(float(count_E.sum()), 1.0), self._names)
