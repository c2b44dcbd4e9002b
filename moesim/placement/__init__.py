"""Placement: which slot of which rank holds which expert.

Slot s of a layer lives on rank `s // slots_per_rank`. An expert may hold several slots (replicas); every
expert holds at least one. Where slots do not divide by ranks, some slots are `EMPTY`. A policy of this family
is a pure function from expected loads, and what its context tells besides, to a `Placement`.

Legend: L MoE layers, E experts, S slots, G ranks, N nodes, X the most replicas an expert has, T tokens, K experts
a token.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.errors import BadInput

__all__ = [
    "EMPTY",
    "Placement",
    "PlacementContext",
    "PlacementCosts",
    "PlacementPolicy",
    "TokenSample",
    "check_weights",
    "initial_map",
    "slot_count",
]

EMPTY = -1
"""in place of an expert: the slot holds none"""
MAX_TABLE_ENTRIES = 1 << 28
_SAMPLE_PAIRS = 1 << 24
"""(token, layer, choice, next choice) looked at for transitions"""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSample:
    """Tokens of the traffic that a placement is made for, for policies that look at whole tokens.

    expert_TLK: expert ids, `num_experts` where a token takes fewer. sequence_T: which sequence each token is of, not
    decreasing, consecutive tokens of one sequence next to each other. token_T: vocabulary ids, None where nobody
    recorded them.
    """

    expert_TLK: AnyArray
    sequence_T: IntArray
    num_experts: int
    token_T: IntArray | None = None


@dataclass(frozen=True, slots=True)
class PlacementCosts:
    """What a placement costs and saves, in the units of the simulator, for policies that weigh one against another.

    tokens: (token, expert) pairs of one layer and step, all ranks together. row_ns: a further pair on a rank.
    expert_ns: a further expert in use on a rank (its weights are read). token_bytes: one copy of a token there and
    back. near_bytes_per_ns, far_bytes_per_ns: one direction of a rank's link inside a node and between nodes.
    expert_bytes: one expert slot of one layer on one rank. own_ns: the rest of a step. kv_bytes: the KV cache of a rank
    without redundant experts. request_kv_bytes: KV of one request at its mean length. requests: running on a rank at
    most, whatever memory there is.
    """

    tokens: float
    row_ns: float
    expert_ns: float
    token_bytes: float
    near_bytes_per_ns: float
    far_bytes_per_ns: float
    expert_bytes: int
    own_ns: float = 0.0
    kv_bytes: int = 0
    request_kv_bytes: float = 0.0
    requests: int = 0


@dataclass(frozen=True)
class PlacementContext:
    """What a placement may know besides the loads.

    num_ranks: ranks the experts are spread over (EP degree). num_nodes: nodes these ranks fill evenly.
    num_groups: expert groups of the model's router (1: none); hierarchical placement keeps a group on one
    node. rank_to_node: node of each rank, not decreasing, where the ranks do not fill the nodes evenly. sample: whole
    tokens, None where only loads are known. costs: None where nobody priced them. seed: of whatever is drawn.
    """

    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    rank_to_node: tuple[int, ...] = ()
    sample: TokenSample | None = None
    costs: PlacementCosts | None = None
    seed: int = 0

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

    @cached_property
    def transition_LEE(self) -> FloatArray | None:
        """(token, choice, next choice) triples by expert of a layer and expert of the next: float64 [L - 1, E, E], from
        evenly spaced tokens of the sample; None without one."""
        if self.sample is None:
            return None
        experts, ids = self.sample.num_experts, self.sample.expert_TLK
        tokens, layers, choices = ids.shape
        step = max(1, -(-tokens * max(layers - 1, 0) * choices * choices // _SAMPLE_PAIRS))
        out = np.zeros((max(layers - 1, 0), experts, experts))
        for layer in range(layers - 1):
            here, there = (ids[::step, at].astype(np.int64) for at in (layer, layer + 1))
            pair = here[:, :, None] * (experts + 1) + there[:, None, :]
            count = np.bincount(pair.ravel(), minlength=(experts + 1) ** 2).reshape(experts + 1, experts + 1)
            out[layer] = count[:experts, :experts]
        return out


@dataclass(frozen=True, eq=False)
class Placement:
    """The expert in each slot, with the tables that dispatch and pricing look up.

    slot_to_expert_LS: int32 [L, S], `EMPTY` where a slot holds no expert. rank_to_node: node of each rank, not
    decreasing (default: one node).
    Raises BadInput unless S is a multiple of `num_ranks`, all ids lie in [0, num_experts) or are EMPTY and every expert
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
        if layers and (given.min() < EMPTY or given.max() >= self.num_experts):
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
    def held_LS(self) -> NDArray[np.bool_]:
        """Whether a slot holds an expert: bool [L, S]."""
        return np.asarray(self.slot_to_expert_LS != EMPTY)

    @cached_property
    def expert_LS(self) -> NDArray[np.int64]:
        """`slot_to_expert_LS` for look-ups: int64 [L, S], expert 0 where a slot is empty (see `held_LS`)."""
        return np.where(self.held_LS, self.slot_to_expert_LS, 0).astype(np.int64)

    def of_slots(self, value_LE: AnyArray) -> AnyArray:
        """Each slot's expert's value, 0 in empty slots: [..., L, E] -> [..., L, S]."""
        here = np.take_along_axis(value_LE, np.broadcast_to(self.expert_LS, (*value_LE.shape[:-1], self.num_slots)), -1)
        return here if self.held_LS.all() else np.where(self.held_LS, here, np.zeros((), here.dtype))

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
        count = np.bincount(flat[self.held_LS], minlength=self.num_layers * self.num_experts)
        return count.reshape(self.num_layers, self.num_experts).astype(np.int32)

    @cached_property
    def max_replicas(self) -> int:
        """X: the most slots one expert holds in one layer."""
        return int(self.replica_count_LE.max(initial=1))

    @cached_property
    def replica_index_LS(self) -> NDArray[np.int32]:
        """How many earlier slots of the layer hold the same expert (or are empty, too): int32 [L, S]."""
        layers, slots = self.slot_to_expert_LS.shape
        order_LS = np.argsort(self.slot_to_expert_LS, axis=1, kind="stable")
        empty_L1 = slots - self.held_LS.sum(axis=1, keepdims=True)
        first_LE = np.cumsum(self.replica_count_LE, axis=1) - self.replica_count_LE + empty_L1
        expert_LS = np.take_along_axis(self.slot_to_expert_LS, order_LS, axis=1)
        start_LS = np.where(expert_LS == EMPTY, 0, np.take_along_axis(first_LE, np.maximum(expert_LS, 0), axis=1))
        within_LS = np.arange(slots) - start_LS
        index_LS = np.empty((layers, slots), np.int32)
        np.put_along_axis(index_LS, order_LS, within_LS.astype(np.int32), axis=1)
        return index_LS

    @cached_property
    def expert_to_slots_LEX(self) -> NDArray[np.int32]:
        """The slots of each expert in increasing order (so by rank), padded with -1: int32 [L, E, X]."""
        table = np.full((self.num_layers, self.num_experts, self.max_replicas), -1, np.int32)
        layer, slot = np.nonzero(self.held_LS)
        table[layer, self.slot_to_expert_LS[layer, slot], self.replica_index_LS[layer, slot]] = slot
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
        layer, slot = np.nonzero(self.held_LS)
        expert = self.slot_to_expert_LS[layer, slot]
        np.add.at(count, (layer, expert, self.slot_to_rank_S[slot] + 1), np.uint16(1))
        return np.cumsum(count, axis=2, dtype=np.uint16)

    def rank_load(self, slot_load_LS: ArrayLike) -> NDArray[np.float64]:
        """Sum the loads of each rank's slots: [..., L, S] -> float64 [..., L, G]."""
        load = np.asarray(slot_load_LS, dtype=np.float64)
        return np.asarray(load.reshape(*load.shape[:-1], self.num_ranks, self.slots_per_rank).sum(axis=-1))

    def planned_load(self, weight_LE: ArrayLike) -> NDArray[np.float64]:
        """Load of each rank if every expert's load is shared evenly by its replicas: float64 [L, G]."""
        share_LE = np.asarray(weight_LE, dtype=np.float64) / self.replica_count_LE
        return self.rank_load(self.of_slots(share_LE))

    def balance(self, weight_LE: ArrayLike) -> NDArray[np.float64]:
        """Largest over mean planned rank load of each layer (1 is perfect, and where there is no load):
        [L]."""
        load_LG = self.planned_load(weight_LE)
        mean_L = load_LG.mean(axis=1)
        balance_L: NDArray[np.float64] = np.ones_like(mean_L)
        np.divide(load_LG.max(axis=1), mean_L, out=balance_L, where=mean_L > 0)
        return balance_L


class PlacementPolicy(Protocol):
    """One file of this folder defines `class Policy(Spec)` with this method.

    Class variables: `uses_traffic = False` says that the placement depends on neither loads nor tokens, `draws = True`
    that it depends on the context's seed, `uses_sample = True` that it is made for whole tokens. `exact = True`
    promises the least value of its own objective. `chooses_slots = True`: the policy itself finds how many slots a rank
    has, so that only the Placement knows; so does a field `uneven` that is true, where ranks need not divide the slots.
    A method `objective(placement, weight_LE, ctx) -> [L] or a number` says what the policy makes small (without it:
    `Placement.balance`).
    """

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
        f" Use num_redundant_experts = {legal[0]}, {legal[1]} or {legal[2]}, or kind: eplb_swap with uneven: true.",
        where,
    )


def initial_map(num_experts: int, num_slots: int) -> NDArray[np.int32]:
    """Expert of each slot before anything is known: slot i holds expert i mod E (vLLM's initial map). [S]"""
    return (np.arange(num_slots) % num_experts).astype(np.int32)
