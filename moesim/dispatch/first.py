"""Every token goes to the first replica of its expert; the others stay idle. A baseline."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, IntArray
from moesim.dispatch import flat_expert, split
from moesim.placement import Placement
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    def assign(
        self,
        expert_TLK: AnyArray,
        source_rank_T: AnyArray,
        placement: Placement,
        seed: int,
        token_T: AnyArray | None = None,
    ) -> NDArray[np.int32]:
        """See `moesim.dispatch.DispatchPolicy.assign`; nothing is drawn."""
        return placement.first_slot_LE.ravel()[flat_expert(expert_TLK, placement)]

    def split(self, count_LE: IntArray, placement: Placement) -> IntArray:
        """See `moesim.dispatch.DispatchPolicy.split`."""
        return split(count_LE, placement, "first")
