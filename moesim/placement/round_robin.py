"""Round-robin placement: expert e on rank e mod G (vLLM's `round_robin` strategy)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.placement import Placement, PlacementContext, check_weights, initial_map, slot_count
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """`num_redundant_experts`: slots beyond one an expert. The initial map (slot i holds expert i mod E) is
    dealt out one to each rank in turn instead of in blocks.
    """

    uses_traffic: ClassVar[bool] = False

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """Ignore the loads; see `moesim.placement.PlacementPolicy.place`."""
        layers, experts = check_weights(weight_LE).shape
        slots = slot_count(experts, self.num_redundant_experts, ctx.num_ranks)
        dealt = initial_map(experts, slots).reshape(-1, ctx.num_ranks).T.ravel()
        return ctx.placement(np.broadcast_to(dealt, (layers, slots)), experts)
