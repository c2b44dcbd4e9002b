"""EPLB: replicate the hottest experts, then pack replicas onto ranks so that their loads come out even.

Source of the method: DeepSeek's "Expert Parallelism Load Balancer" (github.com/deepseek-ai/EPLB, the
description in its README): *global* replicates over all slots and packs onto all ranks; *hierarchical* first
packs whole expert groups onto nodes, so that group-limited routing stays inside a node, then replicates and
packs inside each node. All layers (and all nodes of all layers) are worked on at once as rows of one array.

Legend: R rows (layers, or layers x nodes), I items, B bins; else as in `moesim.placement`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.errors import BadInput
from moesim.placement import Placement, PlacementContext, check_weights, slot_count
from moesim.spec import Spec

__all__ = ["Policy", "pack", "replicate"]


class Policy(Spec):
    """`num_redundant_experts`: slots beyond one an expert. `mode`: `hierarchical` keeps an expert group on
    one node, `global` does not, `auto` is hierarchical where nodes > 1 divide the groups (as EPLB chooses).
    """

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    mode: Literal["auto", "hierarchical", "global"] = "auto"

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. A layer without any load is placed as if uniform."""
        weight_LE = check_weights(weight_LE)
        experts = weight_LE.shape[1]
        slots = slot_count(experts, self.num_redundant_experts, ctx.num_ranks)
        idle_L = weight_LE.sum(axis=1) <= 0
        weight_LE = np.where(idle_L[:, None], 1.0, weight_LE)
        obstacle = _hierarchical_obstacle(experts, ctx)
        if self.mode == "hierarchical" and obstacle:
            raise BadInput(f"hierarchical placement is not possible: {obstacle}. Use mode: global or auto.")
        if self.mode == "global" or obstacle or (self.mode == "auto" and ctx.num_nodes == 1):
            table_LS = _pack_replicas(weight_LE, slots, ctx.num_ranks)
        else:
            table_LS = _hierarchical(weight_LE, slots, ctx)
        return ctx.placement(table_LS, experts)


def _hierarchical_obstacle(experts: int, ctx: PlacementContext) -> str:
    """Why groups cannot be packed onto nodes, or '' if they can."""
    if ctx.num_groups % ctx.num_nodes:
        return f"nodes must divide the expert groups: groups={ctx.num_groups}, nodes={ctx.num_nodes}"
    if experts % ctx.num_groups:
        return f"groups must divide the experts: experts={experts}, groups={ctx.num_groups}"
    if ctx.num_ranks % ctx.num_nodes:
        return f"nodes must divide the ranks: ranks={ctx.num_ranks}, nodes={ctx.num_nodes}"
    return ""


def _hierarchical(weight_LE: NDArray[np.float64], slots: int, ctx: PlacementContext) -> NDArray[np.int64]:
    """Groups to nodes, then replicas and packing inside each node. -> [L, S]"""
    layers, experts = weight_LE.shape
    nodes, per_group = ctx.num_nodes, experts // ctx.num_groups
    group_load = weight_LE.reshape(layers, ctx.num_groups, per_group).sum(axis=2)
    group_LNg = pack(group_load, nodes).reshape(layers, nodes, -1)
    member_LNE = (group_LNg[..., None] * per_group + np.arange(per_group)).reshape(layers, nodes, -1)
    weight_LNE = np.take_along_axis(weight_LE, member_LNE.reshape(layers, -1), axis=1)
    rows = weight_LNE.reshape(layers * nodes, -1)
    local = _pack_replicas(rows, slots // nodes, ctx.num_ranks // nodes)
    member = member_LNE.reshape(layers * nodes, -1)
    return np.asarray(np.take_along_axis(member, local, axis=1).reshape(layers, slots))


def _pack_replicas(weight_RE: NDArray[np.float64], slots: int, ranks: int) -> NDArray[np.int64]:
    """Replicate to `slots` and pack onto `ranks`: the expert in each slot, [R, slots]."""
    expert_RS, count_RE = replicate(weight_RE, slots)
    load_RS = np.take_along_axis(weight_RE / count_RE, expert_RS, axis=1)
    return np.asarray(np.take_along_axis(expert_RS, pack(load_RS, ranks), axis=1))


def replicate(weight_RE: NDArray[np.float64], slots: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give each spare slot to the expert with the largest load a replica (ties: lowest id).

    This greedy rule minimises the largest load a replica. Returns the expert of each replica [R, slots],
    first one of each expert in order and then the spare ones as given out, and the replica counts [R, E].
    """
    rows, experts = weight_RE.shape
    row_R = np.arange(rows)
    count_RE = np.ones((rows, experts), np.int64)
    expert_RS = np.empty((rows, slots), np.int64)
    expert_RS[:, :experts] = np.arange(experts)
    load_RE = weight_RE.copy()
    for slot in range(experts, slots):
        hottest_R = load_RE.argmax(axis=1)
        expert_RS[:, slot] = hottest_R
        count_RE[row_R, hottest_R] += 1
        load_RE[row_R, hottest_R] = weight_RE[row_R, hottest_R] / count_RE[row_R, hottest_R]
    return expert_RS, count_RE


def pack(weight_RI: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """Pack items into bins of equally many: heaviest first, each to the lightest bin with room, ties lowest.

    Returns the items bin after bin, within a bin in the order they came: int64 [R, I]; `bins` divides I.
    """
    rows, items = weight_RI.shape
    room = items // bins
    if room == 1 or bins == 1:
        return np.broadcast_to(np.arange(items), (rows, items))
    order_RI = np.argsort(-weight_RI, axis=1, kind="stable")
    sorted_RI = np.take_along_axis(weight_RI, order_RI, axis=1)
    row_R = np.arange(rows)
    load_RB = np.zeros((rows, bins))
    filled_RB = np.zeros((rows, bins), np.int64)
    place_RI = np.empty((rows, items), np.int64)
    for i in range(items):
        bin_R = load_RB.argmin(axis=1)
        filled_R = filled_RB[row_R, bin_R]
        place_RI[:, i] = bin_R * room + filled_R
        filled_RB[row_R, bin_R] = filled_R + 1
        load_RB[row_R, bin_R] += np.where(filled_R + 1 == room, np.inf, sorted_RI[:, i])
    packed_RI = np.empty((rows, items), np.int64)
    np.put_along_axis(packed_RI, place_RI, order_RI, axis=1)
    return packed_RI
