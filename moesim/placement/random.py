"""Random placement: a reference that knows nothing; every expert once, then redundant ones, dealt out by a draw.

Every layer is drawn apart. Redundant experts are drawn without replacement (again and again where there are more of
them than experts). Slots are dealt so that two replicas of an expert meet on a rank only where it has more replicas
than ranks.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.placement import Placement, PlacementContext, check_weights, slot_count
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """`num_redundant_experts`: slots beyond one an expert. `seed`: another map for the same seed of the scenario."""

    uses_traffic: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    seed: Annotated[int, Field(ge=0, le=1 << 62)] = 0

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """Ignore the loads; see `moesim.placement.PlacementPolicy.place`."""
        layers, experts = check_weights(weight_LE).shape
        slots = slot_count(experts, self.num_redundant_experts, ctx.num_ranks)
        table_LS = np.empty((layers, slots), np.int64)
        for layer in range(layers):
            rng = generator(ctx.seed, "placement.random", self.seed, layer)
            rounds = [rng.permutation(experts) for _ in range(-(-slots // experts))]
            count_E = np.bincount(np.concatenate(rounds)[:slots], minlength=experts)
            # replicas of one expert stand next to each other and are dealt to the ranks in turn: they part
            dealt_S = np.repeat(rounds[0], count_E[rounds[0]])
            table_LS[layer] = dealt_S.reshape(-1, ctx.num_ranks).T.ravel()
        return ctx.placement(table_LS, experts)
