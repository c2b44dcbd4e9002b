"""Alternating affinity: experts that follow each other from layer to layer stand on one rank, loads kept even.

Layer after layer the assignment that keeps most transitions on their rank (and node), given its neighbours, is a
transportation problem; sweeps go forward and backward until none gains. Exact for one layer at a time, not for all
together: `viterbi` is the exact method where the number of assignments allows it, and the tests' oracle of this one.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.placement import Placement, PlacementContext, check_weights
from moesim.placement.crossings import (
    FAR_COST,
    NEAR_COST,
    alternate,
    check_sizes,
    crossing_cost,
    distance,
    load_shares,
    placement_of,
    rank_of,
    spread,
    transitions,
)
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """No expert is replicated.

    balance_weight: how many crossings (as a share of all transitions) a unit of load variance is worth, that is the
    mean over layers of (standard deviation of rank loads / mean)^2; 0 looks at crossings alone. The default keeps
    max/mean load about where contiguous has it on recorded routing and below. near_cost, far_cost: of a crossing inside
    a node and between nodes. starts: drawn ones besides contiguous, the same whatever the
    scenario's seed. uneven: where ranks do not divide the experts, some have an empty slot; false refuses that.
    """

    uses_sample: ClassVar[bool] = True

    balance_weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    near_cost: Annotated[float, Field(gt=0, le=1e6)] = NEAR_COST
    far_cost: Annotated[float, Field(gt=0, le=1e6)] = FAR_COST
    starts: Annotated[int, Field(ge=0, le=1000)] = 16
    uneven: bool = True

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. Without a sample of tokens, layers count as independent."""
        weight_LE = check_weights(weight_LE)
        check_sizes(weight_LE.shape[1], ctx, self.uneven)
        cost_GG = distance(ctx, self.near_cost, self.far_cost)
        share_LEE, share_LE = transitions(weight_LE, ctx), load_shares(weight_LE)
        return placement_of(alternate(share_LEE, share_LE, cost_GG, self.balance_weight, self.starts), ctx)

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> float:
        """What `place` minimises: mean cost of a transition + balance_weight * variance of the loads."""
        weight_LE = check_weights(weight_LE)
        rank_LE = rank_of(placement)
        crossing = crossing_cost(transitions(weight_LE, ctx), rank_LE, distance(ctx, self.near_cost, self.far_cost))
        return crossing + self.balance_weight * spread(load_shares(weight_LE), rank_LE, ctx.num_ranks)
