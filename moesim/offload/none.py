"""No offloading: every expert slot stays in device memory, and nothing is ever fetched."""

from __future__ import annotations

import numpy as np

from moesim.arrays import IntArray
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No parameters."""

    def resident_slots(self, slots_per_rank: int, num_layers: int) -> IntArray:
        """See `moesim.offload.OffloadPolicy.resident_slots`."""
        return np.full(num_layers, slots_per_rank, np.int64)
