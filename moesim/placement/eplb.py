"""EPLB: replicate the hottest experts, then pack replicas onto ranks so that their loads come out even.

Source of the method: DeepSeek's "Expert Parallelism Load Balancer" (github.com/deepseek-ai/EPLB, the
description in its README): *global* replicates over all slots and packs onto all ranks; *hierarchical* first
packs whole expert groups onto nodes, so that group-limited routing stays inside a node, then replicates and
packs inside each node. All layers (and all nodes of all layers) are worked on at once as rows of one array.

Legend: R rows (layers, or layers x nodes), I items, B bins; else as in `moesim.placement`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.errors import BadInput
from moesim.placement import EMPTY, Placement, PlacementContext, check_weights, slot_count
from moesim.spec import Spec

__all__ = ["Mode", "Policy", "groups_on_nodes", "inside_nodes", "is_hierarchical", "members", "pack", "replicate"]

Mode = Literal["auto", "hierarchical", "global"]


class Policy(Spec):
    """`num_redundant_experts`: slots beyond one an expert. `mode`: `hierarchical` keeps an expert group on
    one node, `global` does not, `auto` is hierarchical where nodes > 1 divide the groups (as EPLB chooses).
    """

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    mode: Mode = "auto"

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. A layer without any load is placed as if uniform."""
        weight_LE = check_weights(weight_LE)
        experts = weight_LE.shape[1]
        slots = slot_count(experts, self.num_redundant_experts, ctx.num_ranks)
        idle_L = weight_LE.sum(axis=1) <= 0
        weight_LE = np.where(idle_L[:, None], 1.0, weight_LE)
        if is_hierarchical(self.mode, experts, slots, ctx):
            member_LNE = groups_on_nodes(weight_LE, ctx)
            table_LS = inside_nodes(
                weight_LE, member_LNE, slots, lambda w, s: _pack_replicas(w, s, ctx.num_ranks // ctx.num_nodes)
            )
        else:
            table_LS = _pack_replicas(weight_LE, slots, ctx.num_ranks)
        return ctx.placement(table_LS, experts)


def is_hierarchical(mode: Mode, experts: int, slots: int, ctx: PlacementContext) -> bool:
    """Whether groups are packed onto nodes first. Raises BadInput where `hierarchical` is asked for and impossible."""
    obstacle = _obstacle(experts, slots, ctx)
    if mode == "hierarchical" and obstacle:
        raise BadInput(f"hierarchical placement is not possible: {obstacle}. Use mode: global or auto.")
    return not (mode == "global" or obstacle or (mode == "auto" and ctx.num_nodes == 1))


def _obstacle(experts: int, slots: int, ctx: PlacementContext) -> str:
    """Why groups cannot be packed onto nodes, or '' if they can."""
    nodes = ctx.num_nodes
    if ctx.num_groups % nodes:
        return f"nodes must divide the expert groups: groups={ctx.num_groups}, nodes={nodes}"
    if experts % ctx.num_groups:
        return f"groups must divide the experts: experts={experts}, groups={ctx.num_groups}"
    if ctx.num_ranks % nodes:
        return f"nodes must divide the ranks: ranks={ctx.num_ranks}, nodes={nodes}"
    if slots % nodes:
        return f"nodes must divide the slots: slots={slots}, nodes={nodes}"
    return ""


def groups_on_nodes(weight_LE: NDArray[np.float64], ctx: PlacementContext) -> NDArray[np.int64]:
    """The experts of each node, whole groups packed onto nodes by their load: [L, N, E / N]."""
    layers, experts = weight_LE.shape
    load_Lg = weight_LE.reshape(layers, ctx.num_groups, -1).sum(axis=2)
    return members(pack(load_Lg, ctx.num_nodes), experts, ctx)


def members(group_Lg: NDArray[np.int64], experts: int, ctx: PlacementContext) -> NDArray[np.int64]:
    """The experts of groups that are listed node after node [L, groups]: [L, N, E / N]."""
    per_group = experts // ctx.num_groups
    member = group_Lg[..., None] * per_group + np.arange(per_group)
    return np.asarray(member.reshape(len(group_Lg), ctx.num_nodes, -1))


def inside_nodes(
    weight_LE: NDArray[np.float64],
    member_LNE: NDArray[np.int64],
    slots: int,
    place: Callable[[NDArray[np.float64], int], NDArray[np.int64]],
) -> NDArray[np.int64]:
    """The map that `place(loads [L * N, E / N], slots of a node)` makes inside each node, [L, S]; EMPTY stays EMPTY."""
    layers, nodes, _ = member_LNE.shape
    member_RE = member_LNE.reshape(layers * nodes, -1)
    weight_RE = np.take_along_axis(weight_LE, member_LNE.reshape(layers, -1), axis=1).reshape(member_RE.shape)
    local_RS = place(weight_RE, slots // nodes)
    table_RS = np.take_along_axis(member_RE, np.maximum(local_RS, 0), axis=1)
    return np.asarray(np.where(local_RS == EMPTY, EMPTY, table_RS).reshape(layers, -1))


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
