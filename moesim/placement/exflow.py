"""ExFlow's placement (Yao et al., "Exploiting Inter-Layer Expert Affinity", arXiv:2401.08383) by alternating
transportation problems.

The paper's integer programme minimises the transitions whose experts stand apart, with equally many experts of a layer
in each place, nodes first and then the ranks of every node. Tokens are aggregated by (layer, expert, next expert),
which changes neither. Here each stage is solved layer by layer in turn, not exactly; `exflow_ip` of the tuner solves
the programme. Loads play no part. The heuristic in place of the solver is ours.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.arrays import FloatArray, IntArray
from moesim.placement import Placement, PlacementContext, check_weights
from moesim.placement.crossings import (
    FAR_COST,
    NEAR_COST,
    alternate,
    check_sizes,
    contiguous_ranks,
    crossing_cost,
    distance,
    load_shares,
    placement_of,
    rank_of,
    transitions,
)
from moesim.spec import Spec

__all__ = ["Policy", "inside", "staged"]


class Policy(Spec):
    """stages: `nodes_first` as in the paper, `together` minimises both kinds of crossings at once. starts: drawn ones
    of each stage. uneven: where ranks do not divide the experts, some have an empty slot; false refuses
    that. No expert is replicated."""

    uses_sample: ClassVar[bool] = True

    stages: Literal["nodes_first", "together"] = "nodes_first"
    starts: Annotated[int, Field(ge=0, le=1000)] = 16
    uneven: bool = True

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. Without a sample of tokens, layers count as independent.

        Stages need equally many ranks a node and experts a rank; else both kinds are minimised together.
        """
        weight_LE = check_weights(weight_LE)
        share_LEE, load_LE = transitions(weight_LE, ctx), load_shares(weight_LE)
        cost_GG = distance(ctx)
        layers, experts = weight_LE.shape
        check_sizes(experts, ctx, self.uneven)
        if layers and self.stages == "nodes_first" and staged(experts, ctx):
            found = self._by_stages(share_LEE, load_LE, ctx)
        else:
            found = alternate(share_LEE, load_LE, cost_GG, 0.0, self.starts)
        plain = contiguous_ranks(layers, experts, ctx.num_ranks)
        best = min((found, plain), key=lambda rank_LE: crossing_cost(share_LEE, rank_LE, cost_GG))
        return placement_of(best, ctx)

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> float:
        """Mean cost of a transition as ExFlow's evaluation counts it: 0 on a rank, 1 on a node, 2 beyond."""
        share_LEE = transitions(check_weights(weight_LE), ctx)
        return crossing_cost(share_LEE, rank_of(placement), distance(ctx, NEAR_COST, FAR_COST))

    def _by_stages(self, share_LEE: FloatArray, load_LE: FloatArray, ctx: PlacementContext) -> IntArray:
        """Nodes, then the ranks of each node for the experts that it got."""
        nodes = ctx.rank_to_node[-1] + 1
        each = ctx.num_ranks // nodes
        node_LE = alternate(share_LEE, load_LE, _apart(nodes), 0.0, self.starts)
        rank_LE = np.empty_like(node_LE)
        for node in range(nodes):
            mine_LM, sub_LMM = inside(share_LEE, node_LE, node)
            load_LM = np.take_along_axis(load_LE, mine_LM, axis=1)
            found_LM = alternate(sub_LMM, load_LM, _apart(each), 0.0, self.starts, 1 + node)
            np.put_along_axis(rank_LE, mine_LM, found_LM + node * each, axis=1)
        return rank_LE


def staged(experts: int, ctx: PlacementContext) -> bool:
    """Whether there are several nodes, with equally many ranks and experts each."""
    node_G = np.array(ctx.rank_to_node)
    ranks_N = np.bincount(node_G)
    return len(ranks_N) > 1 and len(set(ranks_N.tolist())) == 1 and experts % ctx.num_ranks == 0


def inside(share_LEE: FloatArray, node_LE: IntArray, node: int) -> tuple[IntArray, FloatArray]:
    """The experts of a node in every layer, [L, M], and the transitions between them, [L - 1, M, M]."""
    mine_LM = np.stack([np.flatnonzero(row == node) for row in node_LE])
    sub = [share[np.ix_(a, b)] for share, a, b in zip(share_LEE, mine_LM[:-1], mine_LM[1:], strict=True)]
    members = mine_LM.shape[1]
    return mine_LM, np.array(sub).reshape(len(sub), members, members)


def _apart(bins: int) -> FloatArray:
    """Cost 1 between different bins."""
    return 1.0 - np.eye(bins)
