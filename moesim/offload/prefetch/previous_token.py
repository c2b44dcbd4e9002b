"""What the previous token of the same sequence used in that layer (the guess that caches of recent experts make, too).

All tokens of a step run together, so the previous token is the last one of the sequence in an earlier step.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moesim.arrays import AnyArray
from moesim.offload import OffloadContext, StepRoutes
from moesim.offload.prefetch.naming import Ahead, Limited, Named, votes

__all__ = ["Policy"]


class Policy(Limited):
    """ahead: layers looked ahead; all that it knows is known before the step, so a larger one only fetches earlier.
    memory: sequences remembered; the one served longest ago is forgotten.
    """

    ahead: Annotated[int, Field(ge=1, le=512)] = 1
    memory: Annotated[int, Field(ge=1, le=1 << 20)] = 4096

    def start(self, context: OffloadContext) -> _Previous:
        """See `moesim.offload.PrefetchPolicy.start`."""
        return _Previous(context, self)


class _Previous(Ahead):
    repeats: ClassVar[bool] = False

    def __init__(self, context: OffloadContext, policy: Policy) -> None:
        super().__init__(context, policy.ahead, policy)
        self._memory = policy.memory
        self._last: dict[int, AnyArray] = {}
        self._known: list[AnyArray] = []

    def begin(self, step: StepRoutes) -> None:
        """See Prefetch. The step before has run: its routes may be remembered now."""
        for row, sequence in enumerate(self.step.sequence_T.tolist()):
            self._last.pop(sequence, None)
            self._last[sequence] = self.step.expert_TLK[row]
        for sequence in list(self._last)[: max(0, len(self._last) - self._memory)]:
            del self._last[sequence]
        # one vote for each token: a sequence with more tokens in the step has more of them
        self._known = [self._last[s] for s in step.sequence_T.tolist() if s in self._last]
        super().begin(step)

    def named(self, layer: int, target: int) -> Named:
        """See Ahead."""
        if not self._known:
            return []
        return votes(np.stack([row_LK[target] for row_LK in self._known]), self.context.num_experts)
