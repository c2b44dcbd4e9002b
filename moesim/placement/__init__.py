"""Placement: which slot of which rank holds which expert.

Slot s of a layer lives on rank `s // slots_per_rank`. An expert may hold several slots (replicas); every
expert holds at least one. A policy of this family is a pure function from expected loads to a `Placement`.

Legend: L MoE layers, E experts, S slots, G ranks, N nodes, X the most replicas an expert has.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.arrays import AnyArray
from moesim.errors import BadInput

__all__ = ["Placement", "PlacementContext", "PlacementPolicy", "check_weights", "initial_map", "slot_count"]

MAX_TABLE_ENTRIES = 1 << 28


@dataclass(frozen=True, slots=True)
class PlacementContext:
    """What a placement may know besides the loads.

    num_ranks: ranks the experts are spread over (EP degree). num_nodes: nodes these ranks fill evenly.
    num_groups: expert groups of the model's router (1: none); hierarchical placement keeps a group on one
    node. rank_to_node: node of each rank, not decreasing, where the ranks do not fill the nodes evenly.
    """

    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    rank_to_node: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "num_groups"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_nodes > self.num_ranks:
            raise BadInput(f"every node needs a rank: nodes={self.num_nodes}, ranks={self.num_ranks}")
        if not self.rank_to_node:
            even = tuple(rank * self.num_nodes // self.num_ranks for rank in range(self.num_ranks))
            object.__setattr__(self, "rank_to_node", even)

    def placement(self, slot_to_expert_LS: AnyArray, num_experts: int) -> Placement:
        """The Placement of a map onto these ranks."""
        return Placement(slot_to_expert_LS, num_experts, self.num_ranks, self.rank_to_node)


@dataclass(frozen=True, eq=False)
class Placement:
    """The expert in each slot, with the tables that dispatch and pricing look up.

    slot_to_expert_LS: int32 [L, S]. rank_to_node: node of each rank, not decreasing (default: one node).
    Raises BadInput unless S is a multiple of `num_ranks`, all ids lie in [0, num_experts) and every expert
    has a slot in each layer. The array is copied and made read-only.
    """

    slot_to_expert_LS: NDArray[np.int32]
    num_experts: int
    num_ranks: int
    rank_to_node: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = np.asarray(self.slot_to_expert_LS)
        if given.ndim != 2 or not np.issubdtype(given.dtype, np.integer):
            raise BadInput(f"a placement is an integer array [layers, slots], got {given.dtype} of shape {given.shape}")
        layers, slots = given.shape
        if self.num_ranks < 1 or slots < 1 or slots % self.num_ranks:
            raise BadInput(
                f"the number of slots must be a positive multiple of the ranks: slots={slots}, ranks={self.num_ranks}"
            )
        if layers and (given.min() < 0 or given.max() >= self.num_experts):
            raise BadInput(
                f"expert ids of a placement must lie in [0, {self.num_experts}),"
                f" found {int(given.min())}..{int(given.max())}"
            )
        nodes = self.rank_to_node or (0,) * self.num_ranks
        if len(nodes) != self.num_ranks or nodes[0] < 0 or any(a > b for a, b in itertools.pairwise(nodes)):
            raise BadInput(
                f"rank_to_node must name a node for each of {self.num_ranks} ranks in increasing order, got {nodes}"
            )
        object.__setattr__(self, "rank_to_node", tuple(int(n) for n in nodes))
        table_LS = np.array(given, dtype=np.int32, order="C")
        table_LS.flags.writeable = False
        object.__setattr__(self, "slot_to_expert_LS", table_LS)
        if (self.replica_count_LE == 0).any():
            layer, expert = (int(i) for i in np.argwhere(self.replica_count_LE == 0)[0])
            missing = int((self.replica_count_LE == 0).sum())
            raise BadInput(
                f"every expert needs a slot in each layer: expert {expert} has none in layer {layer}"
                f" ({missing} such cases; slots={slots}, experts={self.num_experts})"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.slot_to_expert_LS.shape[0])

    @property
    def num_slots(self) -> int:
        """S."""
        return int(self.slot_to_expert_LS.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """S / G: expert weights each rank keeps per layer."""
        return self.num_slots // self.num_ranks

    @cached_property
    def slot_to_rank_S(self) -> NDArray[np.int32]:
        """Rank of each slot: int32 [S]."""
        return (np.arange(self.num_slots) // self.slots_per_rank).astype(np.int32)

    @cached_property
    def node_of_rank_G(self) -> NDArray[np.int64]:
        """Node of each rank: int64 [G], not decreasing."""
        return np.array(self.rank_to_node, np.int64)

    @cached_property
    def node_range_G(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First rank on the node of each rank, and one past its last: two int64 [G]."""
        node_G = self.node_of_rank_G
        return np.searchsorted(node_G, node_G, "left"), np.searchsorted(node_G, node_G, "right")

    @cached_property
    def replica_count_LE(self) -> NDArray[np.int32]:
        """Slots each expert holds: int32 [L, E], at least 1 everywhere."""
        flat = np.arange(self.num_layers)[:, None] * self.num_experts + self.slot_to_expert_LS
        count = np.bincount(flat.ravel(), minlength=self.num_layers * self.num_experts)
        return count.reshape(self.num_layers, self.num_experts).astype(np.int32)

    @cached_property
    def max_replicas(self) -> int:
        """X: the most slots one expert holds in one layer."""
        return int(self.replica_count_LE.max(initial=1))

    @cached_property
    def replica_index_LS(self) -> NDArray[np.int32]:
        """How many earlier slots of the layer hold the same expert: int32 [L, S]."""
        layers, slots = self.slot_to_expert_LS.shape
        order_LS = np.argsort(self.slot_to_expert_LS, axis=1, kind="stable")
        first_LE = np.cumsum(self.replica_count_LE, axis=1) - self.replica_count_LE
        expert_LS = np.take_along_axis(self.slot_to_expert_LS, order_LS, axis=1)
        within_LS = np.arange(slots) - np.take_along_axis(first_LE, expert_LS, axis=1)
        index_LS = np.empty((layers, slots), np.int32)
        np.put_along_axis(index_LS, order_LS, within_LS.astype(np.int32), axis=1)
        return index_LS

    @cached_property
    def expert_to_slots_LEX(self) -> NDArray[np.int32]:
        """The slots of each expert in increasing order (so by rank), padded with -1: int32 [L, E, X]."""
        table = np.full((self.num_layers, self.num_experts, self.max_replicas), -1, np.int32)
        layer_L1 = np.arange(self.num_layers)[:, None]
        table[layer_L1, self.slot_to_expert_LS, self.replica_index_LS] = np.arange(self.num_slots, dtype=np.int32)
        return table

    @cached_property
    def first_slot_LE(self) -> NDArray[np.int32]:
        """The lowest slot of each expert: int32 [L, E]."""
        return np.ascontiguousarray(self.expert_to_slots_LEX[:, :, 0])

    @cached_property
    def replicas_before_rank_LEG(self) -> NDArray[np.uint16]:
        """Slots of each expert on ranks below g, for g in 0..G: [L, E, G + 1].

        So the replicas on rank g are numbers `[.., g]` up to `[.., g + 1]` of `expert_to_slots_LEX`.
        """
        shape = (self.num_layers, self.num_experts, self.num_ranks + 1)
        if np.prod(shape, dtype=np.int64) > MAX_TABLE_ENTRIES or self.max_replicas > np.iinfo(np.uint16).max:
            raise BadInput(
                f"the table of replicas by rank would need {shape[0]} x {shape[1]} x {shape[2]} entries,"
                f" more than {MAX_TABLE_ENTRIES}. Use dispatch random or first."
            )
        count = np.zeros(shape, np.uint16)
        layer_LS = np.broadcast_to(np.arange(self.num_layers)[:, None], self.slot_to_expert_LS.shape)
        rank_LS = np.broadcast_to(self.slot_to_rank_S, self.slot_to_expert_LS.shape)
        np.add.at(count, (layer_LS, self.slot_to_expert_LS, rank_LS + 1), np.uint16(1))
        return np.cumsum(count, axis=2, dtype=np.uint16)

    def rank_load(self, slot_load_LS: ArrayLike) -> NDArray[np.float64]:
        """Sum the loads of each rank's slots: [..., L, S] -> float64 [..., L, G]."""
        load = np.asarray(slot_load_LS, dtype=np.float64)
        return np.asarray(load.reshape(*load.shape[:-1], self.num_ranks, self.slots_per_rank).sum(axis=-1))

    def planned_load(self, weight_LE: ArrayLike) -> NDArray[np.float64]:
        """Load of each rank if every expert's load is shared evenly by its replicas: float64 [L, G]."""
        share_LE = np.asarray(weight_LE, dtype=np.float64) / self.replica_count_LE
        return self.rank_load(np.take_along_axis(share_LE, self.slot_to_expert_LS.astype(np.int64), axis=1))

    def balance(self, weight_LE: ArrayLike) -> NDArray[np.float64]:
        """Largest over mean planned rank load of each layer (1 is perfect, and where there is no load):
        [L]."""
        load_LG = self.planned_load(weight_LE)
        mean_L = load_LG.mean(axis=1)
        balance_L: NDArray[np.float64] = np.ones_like(mean_L)
        np.divide(load_LG.max(axis=1), mean_L, out=balance_L, where=mean_L > 0)
        return balance_L


class PlacementPolicy(Protocol):
    """One file of this folder defines `class Policy(Spec)` with this method."""

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """Place the experts. weight_LE: expected load, finite and >= 0, float64 [L, E].

        Raises BadInput when the slots cannot be dealt out evenly or the loads are not loads.
        """
        ...


def check_weights(weight_LE: ArrayLike) -> NDArray[np.float64]:
    """`weight_LE` as float64 [L, E]. Raises BadInput unless 2-D, with an expert, finite and not negative."""
    weight = np.asarray(weight_LE, dtype=np.float64)
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise BadInput(f"expert loads are an array [layers, experts], got shape {weight.shape}")
    bad = ~(np.isfinite(weight) & (weight >= 0))
    if bad.any():
        layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise BadInput(
            f"expert loads must be finite and not negative: expert {expert} of layer {layer}"
            f" has {weight[layer, expert]} ({int(bad.sum())} such values)"
        )
    return weight


def slot_count(num_experts: int, num_redundant_experts: int, num_ranks: int, where: str = "") -> int:
    """S = experts + redundant ones. Raises BadInput with the nearest legal counts if ranks do not divide
    it."""
    slots = num_experts + num_redundant_experts
    if slots % num_ranks == 0:
        return slots
    low = -num_experts % num_ranks
    middle = low + num_ranks * max(round((num_redundant_experts - low) / num_ranks), 1)
    legal = [middle - num_ranks, middle, middle + num_ranks]
    raise BadInput(
        f"the ranks must divide the expert slots: experts={num_experts} + num_redundant_experts="
        f"{num_redundant_experts} = {slots} slots, ranks={num_ranks} (remainder {slots % num_ranks})."
        f" Use num_redundant_experts = {legal[0]}, {legal[1]} or {legal[2]}.",
        where,
    )


def initial_map(num_experts: int, num_slots: int) -> NDArray[np.int32]:
    """Expert of each slot before anything is known: slot i holds expert i mod E (vLLM's initial map). [S]"""
    return (np.arange(num_slots) % num_experts).astype(np.int32)
