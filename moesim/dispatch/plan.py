"""Dispatch that looks at the whole batch: what a policy sees of it, the plan it makes, and tokens that follow a plan.

A policy that couples tokens plans from counts: how many pairs each slot serves. A rank may serve *guests*, experts that
none of its slots holds: weights sent for this batch alone, or a shared expert. Tokens follow the plan in an order
that their own numbers give, so that a plan is met to the token and nothing depends on the order they come in.

Legend: B batches, T tokens, L MoE layers, K choices a token, E experts, S slots, G ranks, N nodes, X guests a rank, W
slots with guests: G * (S / G + X), a rank's guests behind its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.dispatch import DispatchPolicy, assign_ragged, flat_expert, hash_TLK
from moesim.dispatch.random import Policy as Random
from moesim.placement import EMPTY, Placement
from moesim.spec import Spec

__all__ = [
    "Batches",
    "Coupled",
    "Plan",
    "Served",
    "count_pairs",
    "couples",
    "empty_guests",
    "own_slots",
    "plan_of",
    "serve",
    "serve_batches",
    "shares",
    "stack",
]

_CHOICES = 1 << 20
"""choices hashed together"""


class Batches(NamedTuple):
    """What a policy plans from. count_BLE: (token, choice) pairs by expert. tokens_BG: tokens by the rank they come
    from. reach_BLG, reach_BLN: tokens that have an expert on each rank and on each node, wherever they come from, None
    where nobody counted."""

    count_BLE: IntArray
    tokens_BG: FloatArray
    reach_BLG: FloatArray | None = None
    reach_BLN: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Who serves what in B batches.

    expert_BLW: expert in each slot, `EMPTY`, or `placement.num_experts` for the shared expert. count_BLW: pairs it
    serves. home_BLW: rank that sends a guest its weights, -1 where none are sent; None: nothing is sent at all.
    copies_BLG, copies_BLN: tokens that travel to a rank, and to a node, for the shared expert alone; None: none do.
    """

    placement: Placement
    expert_BLW: NDArray[np.int32]
    count_BLW: IntArray
    home_BLW: NDArray[np.int32] | None = None
    copies_BLG: FloatArray | None = None
    copies_BLN: FloatArray | None = None

    @property
    def num_slots(self) -> int:
        """W."""
        return int(self.count_BLW.shape[2])

    @property
    def slots_per_rank(self) -> int:
        """W / G."""
        return self.num_slots // self.placement.num_ranks

    @property
    def guests(self) -> int:
        """X."""
        return self.slots_per_rank - self.placement.slots_per_rank

    def own(self, value_BLW: AnyArray) -> AnyArray:
        """The values of the placement's own slots: [..., W] -> [..., S]."""
        by_rank = value_BLW.reshape(*value_BLW.shape[:-1], self.placement.num_ranks, self.slots_per_rank)
        return by_rank[..., : self.placement.slots_per_rank].reshape(*value_BLW.shape[:-1], self.placement.num_slots)

    def rows_BLG(self, shared: bool = True) -> FloatArray:
        """Pairs by rank, float64; shared: with those of the shared expert."""
        count = self.count_BLW if shared else np.where(self.expert_BLW < self.placement.num_experts, self.count_BLW, 0)
        by_rank = count.reshape(*count.shape[:2], self.placement.num_ranks, self.slots_per_rank)
        return np.asarray(by_rank.sum(axis=-1, dtype=np.float64))

    def count_BLE(self) -> IntArray:
        """Pairs by expert, int64."""
        batches, layers, _ = self.count_BLW.shape
        experts = self.placement.num_experts
        expert = np.where(self.expert_BLW == EMPTY, experts, self.expert_BLW)
        key = np.arange(batches * layers).reshape(batches, layers, 1) * (experts + 1) + expert
        count = np.bincount(key.ravel(), self.count_BLW.ravel(), batches * layers * (experts + 1))
        return count.reshape(batches, layers, experts + 1)[..., :experts].astype(np.int64)

    @cached_property
    def _table(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Slots with work, sorted by (batch, layer, expert): slots and inclusive sums of their pairs; and by (batch,
        layer, expert) the first of them and how many there are. An expert without work has its first slot."""
        batches, layers, _ = self.count_BLW.shape
        experts = self.placement.num_experts
        cell_BL1 = np.arange(batches * layers, dtype=np.int64).reshape(batches, layers, 1)
        served = (self.count_BLW > 0) & (self.expert_BLW >= 0) & (self.expert_BLW < experts)
        key = np.broadcast_to(cell_BL1 * experts + self.expert_BLW, served.shape)[served]
        slot = np.broadcast_to(np.arange(self.num_slots), served.shape)[served]
        count = self.count_BLW[served]
        idle = np.setdiff1d(np.arange(batches * layers * experts), key)
        first = own_slots(self.placement, self.guests)[self.placement.first_slot_LE].ravel()
        slot = np.concatenate([slot, first[idle % (layers * experts)]])
        key = np.concatenate([key, idle])
        order = np.argsort(key, kind="stable")
        number = np.bincount(key, minlength=batches * layers * experts)
        total = np.cumsum(np.concatenate([count, np.ones(len(idle), np.int64)])[order])
        return slot[order], total, np.cumsum(number) - number, number


class Served(NamedTuple):
    """Slots of tokens [T, L, K or more], `slots` where there is no expert; how many slots there are, and on each rank;
    the plan behind them, None where every token chose for itself."""

    slot_TLK: NDArray[np.int32]
    slots: int
    slots_per_rank: int
    plan: Plan | None = None


class Coupled(Spec, ABC):
    """Base of the policies that look at the batch: they plan from counts."""

    couples: ClassVar[bool] = True
    guests: ClassVar[bool] = False
    """ranks may serve experts that none of their slots holds"""
    shared: ClassVar[bool] = False
    """the model's shared expert is dispatched, too: an expert of every token, on every rank"""

    def stand_in(self) -> DispatchPolicy:
        """A policy that looks at single tokens and sends about as many copies of them."""
        return Random()

    @abstractmethod
    def plan(self, batches: Batches, placement: Placement, seed: int) -> Plan:
        """How many pairs each slot serves; every expert's pairs are kept. Pure; nothing in it is a clock or state."""

    def assign_batches(
        self,
        expert_TLK: AnyArray,
        source_rank_T: AnyArray,
        starts_B: IntArray,
        placement: Placement,
        seed: int,
        token_T: AnyArray | None = None,
        weight_T: FloatArray | None = None,
    ) -> Served:
        """Slots of the tokens of batches `starts_B[b] : starts_B[b + 1]` (the last runs to the end). Ids may be E,
        which is no expert. token_T: the tokens' own numbers, each once a batch, which key the order. weight_T: how many
        tokens each stands for (1); the plan is that of all of them."""
        batch_T = np.searchsorted(starts_B, np.arange(len(expert_TLK)), side="right") - 1
        seen = _count(expert_TLK, source_rank_T, batch_T, len(starts_B), placement, weight_T)
        plan = self.plan(seen, placement, seed)
        slot_TLK = serve(expert_TLK, batch_T, plan, seed, token_T)
        return Served(slot_TLK, plan.num_slots, plan.slots_per_rank, plan)

    def assign(
        self,
        expert_TLK: AnyArray,
        source_rank_T: AnyArray,
        placement: Placement,
        seed: int,
        token_T: AnyArray | None = None,
    ) -> NDArray[np.int32]:
        """See `moesim.dispatch.DispatchPolicy.assign`: all tokens are one batch, slots are those of its plan."""
        return self.assign_batches(expert_TLK, source_rank_T, np.zeros(1, np.int64), placement, seed, token_T).slot_TLK

    def split(self, count_LE: IntArray, placement: Placement) -> IntArray:
        """See `moesim.dispatch.DispatchPolicy.split`: one batch each, slots are those of the plan."""
        count = np.asarray(count_LE, np.int64)
        flat_BLE = count.reshape(-1, *count.shape[-2:])
        ranks = placement.num_ranks
        tokens_BG = np.repeat(flat_BLE.sum(axis=2).max(axis=1)[:, None] / ranks, ranks, axis=1)
        plan = self.plan(Batches(flat_BLE, tokens_BG), placement, 0)
        return plan.count_BLW.reshape(*count.shape[:-1], plan.num_slots)


def couples(policy: DispatchPolicy) -> bool:
    """Whether a token's slot depends on the others of its batch."""
    return bool(getattr(policy, "couples", False))


def shares(policy: DispatchPolicy) -> bool:
    """Whether the policy dispatches the model's shared expert, too."""
    return bool(getattr(policy, "shared", False))


def serve_batches(
    policy: DispatchPolicy,
    expert_TLK: AnyArray,
    source_rank_T: AnyArray,
    starts_B: IntArray,
    placement: Placement,
    seed: int,
    token_T: AnyArray | None = None,
    weight_T: FloatArray | None = None,
) -> Served:
    """Slots of tokens in batches (see `Coupled.assign_batches`) under a policy of either kind."""
    if isinstance(policy, Coupled):
        return policy.assign_batches(expert_TLK, source_rank_T, starts_B, placement, seed, token_T, weight_T)
    slot_TLK = assign_ragged(policy, expert_TLK, source_rank_T, placement, seed, token_T)
    return Served(slot_TLK, placement.num_slots, placement.slots_per_rank)


def own_slots(placement: Placement, guests: int) -> IntArray:
    """Number of each slot of the placement where every rank has `guests` more behind its own: int64 [S]."""
    each = placement.slots_per_rank
    slot_S = np.arange(placement.num_slots)
    return slot_S // each * (each + guests) + slot_S % each


def plan_of(placement: Placement, slot_BLS: IntArray) -> Plan:
    """The plan without guests."""
    expert_BLS = np.broadcast_to(placement.slot_to_expert_LS, slot_BLS.shape)
    return Plan(placement, expert_BLS, slot_BLS)


def stack(plans: Sequence[Plan]) -> Plan:
    """One plan of all batches; ranks have as many guests as the one that has most. None may say what its copies are."""
    guests = max(plan.guests for plan in plans)
    first = plans[0]
    expert, count = empty_guests(first.placement, sum(len(plan.count_BLW) for plan in plans), guests)
    home = np.full(count.shape, -1, np.int32)
    lo = 0
    for plan in plans:
        rows = slice(lo, lo + len(plan.count_BLW))
        at = np.arange(plan.num_slots)
        at = at // plan.slots_per_rank * (first.placement.slots_per_rank + guests) + at % plan.slots_per_rank
        expert[rows, :, at], count[rows, :, at] = plan.expert_BLW, plan.count_BLW
        if plan.home_BLW is not None:
            home[rows, :, at] = plan.home_BLW
        lo = rows.stop
    sends = any(plan.home_BLW is not None for plan in plans)
    return Plan(first.placement, expert, count, home if sends else None)


def _count(
    expert_TLK: AnyArray, source_rank_T: AnyArray, batch_T: IntArray, batches: int, placement: Placement,
    weight_T: FloatArray | None,
) -> Batches:  # fmt: skip
    """Counts of tokens in batches; id E, no expert, is not counted."""
    layers, experts, ranks = placement.num_layers, placement.num_experts, placement.num_ranks
    flat_expert(expert_TLK[:0], placement)  # refuses other layers
    count = count_pairs(expert_TLK, batch_T, (batches, layers, experts + 1), weight_T)[..., :experts]
    place = batch_T * ranks + np.asarray(source_rank_T, np.int64)
    tokens = np.bincount(place, weight_T, batches * ranks).reshape(batches, ranks).astype(np.float64)
    return Batches(count, tokens)


def count_pairs(
    index_TLK: AnyArray, batch_T: IntArray, shape: tuple[int, int, int], weight_T: FloatArray | None
) -> IntArray:
    """How often each index occurs in each batch and layer, `shape` [B, L, indices]; weighted and rounded."""
    _, layers, wide = shape
    key = (batch_T[:, None] * layers + np.arange(layers))[:, :, None] * wide + index_TLK
    weight = None if weight_T is None else np.broadcast_to(weight_T[:, None, None], key.shape).ravel()
    found = np.bincount(key.ravel(), weight, int(np.prod(shape))).reshape(shape)
    return found if weight is None else np.rint(found).astype(np.int64)


def serve(
    expert_TLK: AnyArray, batch_T: IntArray, plan: Plan, seed: int, token_T: AnyArray | None = None
) -> NDArray[np.int32]:
    """The slot of each (token, layer, choice) under a plan; W where the id is E, no expert: int32 [T, L, K].

    The pairs of an expert are ordered by a hash of their token's number and dealt to its slots in the plan's shares: to
    the pair, where the plan was made for just these tokens.
    """
    placement = plan.placement
    tokens, layers, choices = expert_TLK.shape
    experts = placement.num_experts
    slot_M, total_M, start_X, number_X = plan._table
    none_TLK = expert_TLK == experts
    cell_TL1 = (batch_T[:, None] * layers + np.arange(layers))[:, :, None]
    key = cell_TL1 * experts + np.where(none_TLK, 0, expert_TLK)
    slot_TLK: NDArray[np.int32] = slot_M[start_X[key]].astype(np.int32)
    slot_TLK[none_TLK] = plan.num_slots
    token = np.arange(tokens) if token_T is None else np.asarray(token_T)
    keys, orders, places = [], [], []
    step = max(1, _CHOICES // max(1, layers * choices))
    for lo in range(0, tokens, step):
        part = slice(lo, min(lo + step, tokens))
        where = np.nonzero((number_X[key[part]] > 1) & ~none_TLK[part])
        keys.append(key[part][where])
        orders.append(hash_TLK(seed, token[part], layers, choices)[where])
        places.append(np.ravel_multi_index((where[0] + lo, where[1], where[2]), slot_TLK.shape))
    if not keys:
        return slot_TLK
    key_N, bits_N, place_N = np.concatenate(keys), np.concatenate(orders), np.concatenate(places)
    order = np.lexsort((bits_N, key_N))
    key_N, place_N = key_N[order], place_N[order]
    new_N = np.diff(key_N, prepend=-1) != 0
    first_N = np.maximum.accumulate(np.where(new_N, np.arange(len(key_N)), 0))
    group_N = np.cumsum(new_N) - 1
    size_N = np.bincount(group_N)[group_N] if len(group_N) else group_N
    low_N = np.where(start_X[key_N] > 0, total_M[start_X[key_N] - 1], 0)
    all_N = total_M[start_X[key_N] + number_X[key_N] - 1] - low_N
    target_N = low_N + (np.arange(len(key_N)) - first_N + 0.5) / np.maximum(size_N, 1) * all_N
    slot_TLK.reshape(-1)[place_N] = slot_M[np.searchsorted(total_M, target_N, side="right")]
    return slot_TLK


def empty_guests(placement: Placement, batches: int, guests: int) -> tuple[NDArray[np.int32], IntArray]:
    """Experts and (no) pairs of the slots with room for `guests` on each rank: two [B, L, W]."""
    layers, ranks = placement.num_layers, placement.num_ranks
    wide = ranks * (placement.slots_per_rank + guests)
    expert = np.full((layers, wide), EMPTY, np.int32)
    expert[:, own_slots(placement, guests)] = placement.slot_to_expert_LS
    return np.tile(expert, (batches, 1, 1)), np.zeros((batches, layers, wide), np.int64)
