"""EPLB's greedy map, then local search: swaps of slots, and moves of replicas from one expert to another.

The start is EPLB's own map (`moesim.placement.eplb`), and a layer's fullest rank never gets fuller than there (nor,
globally, than in contiguous order). In
hierarchical mode groups trade nodes too, as long as nodes hold equally many. What is searched and how is told in
`moesim.placement.search`; ours, no paper's. The search ends at the proven bound (`moesim.placement.bound`) or when
its kicks are used up: a budget in work, not in seconds, so a map is the same on any machine.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.placement import EMPTY, Placement, PlacementContext, check_weights, initial_map, slot_count
from moesim.placement.bound import balance_bound
from moesim.placement.eplb import Mode, groups_on_nodes, inside_nodes, is_hierarchical, members, pack, replicate
from moesim.placement.search import better_of, improve, pack_uneven
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """`num_redundant_experts`, `mode`: as of eplb. `effort`: kicks out of a local optimum for each layer; 0 is swap
    descent alone.

    `uneven`: slots need not divide by ranks. Ranks then hold S // G experts or one more, the Placement has the larger
    number of slots a rank and EMPTY in one slot of the others. moesim simulates such maps, engines refuse them: EPLB
    asserts that its replicas divide by the GPUs, and SGLang, vLLM and TensorRT-LLM want equally many slots on every
    rank. So exporters refuse them too.
    """

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    mode: Mode = "auto"
    uneven: bool = False
    effort: Annotated[int, Field(ge=0, le=10_000)] = 20

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. A layer without any load is placed as if uniform."""
        weight_LE = check_weights(weight_LE)
        experts = weight_LE.shape[1]
        slots = experts + self.num_redundant_experts
        if not self.uneven:
            slots = slot_count(experts, self.num_redundant_experts, ctx.num_ranks)
        idle_L = weight_LE.max(axis=1, initial=0.0) <= 0
        weight_LE = np.where(idle_L[:, None], 1.0, weight_LE)
        scale_L = -np.frexp(weight_LE.max(axis=1, initial=0.0))[1]
        weight_LE = np.ldexp(weight_LE, scale_L[:, None])  # by powers of two, so exact, and sums stay finite
        if is_hierarchical(self.mode, experts, slots, ctx):
            table_LS = self._by_node(weight_LE, slots, ctx)
        else:
            table_LS = _search(weight_LE, slots, ctx.num_ranks, self.effort)
            if slots % ctx.num_ranks == 0:
                plain_LS = np.tile(initial_map(experts, slots).astype(np.int64), (len(table_LS), 1))
                table_LS = better_of(table_LS, plain_LS, weight_LE, ctx)
        return ctx.placement(table_LS, experts)

    def _by_node(self, weight_LE: NDArray[np.float64], slots: int, ctx: PlacementContext) -> NDArray[np.int64]:
        """Groups to nodes by greedy and swaps, then a search inside each node; EPLB's own map where that is better."""
        layers, experts = weight_LE.shape
        ranks = ctx.num_ranks // ctx.num_nodes
        group_Lg = weight_LE.reshape(layers, ctx.num_groups, -1).sum(axis=2)
        group_map_Lg = improve(group_Lg, pack(group_Lg, ctx.num_nodes), ctx.num_nodes, 0)
        member_LNE = members(group_map_Lg, experts, ctx)
        plain_LNE = groups_on_nodes(weight_LE, ctx)
        found_LS = inside_nodes(weight_LE, member_LNE, slots, lambda w, s: _search(w, s, ranks, self.effort))
        moved_L = (member_LNE != plain_LNE).any(axis=(1, 2))
        if moved_L.any():
            plain_LS = inside_nodes(weight_LE[moved_L], plain_LNE[moved_L], slots, lambda w, s: _greedy(w, s, ranks))
            found_LS[moved_L] = better_of(found_LS[moved_L], plain_LS, weight_LE[moved_L], ctx)
        return found_LS


def _greedy(weight_RE: NDArray[np.float64], slots: int, ranks: int) -> NDArray[np.int64]:
    """EPLB's replicas and packing: the expert of each slot, [R, G * ceil(slots / G)], EMPTY where there is none."""
    expert_RS, count_RE = replicate(weight_RE, slots)
    load_RS = np.take_along_axis(weight_RE / count_RE, expert_RS, axis=1)
    item_RS = pack_uneven(load_RS, ranks) if slots % ranks else pack(load_RS, ranks)
    return np.where(item_RS == EMPTY, EMPTY, np.take_along_axis(expert_RS, np.maximum(item_RS, 0), axis=1))


def _search(weight_RE: NDArray[np.float64], slots: int, ranks: int, effort: int) -> NDArray[np.int64]:
    """The greedy map, improved; shapes as of `_greedy`. Rows without load are placed as if uniform."""
    idle_R = weight_RE.max(axis=1, initial=0.0) <= 0
    weight_RE = np.where(idle_R[:, None], 1.0, weight_RE)
    goal_R = balance_bound(weight_RE, slots, ranks) if effort else None
    return improve(weight_RE, _greedy(weight_RE, slots, ranks), ranks, effort, goal_R)
