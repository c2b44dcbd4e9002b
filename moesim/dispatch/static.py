"""Every rank has one replica of each expert that it sends to: its own if it has one, else one of a seeded fair choice.

SGLang's `--ep-dispatch-algorithm static`, compute_logical_to_rank_dispatch_physical_map of eplb/expert_location.py, as
of sgl-project/sglang commit 01fec5c2. Versions differ: since pull request 9849 a replica on the rank's node comes
between the own one and the draw, later only where it narrows the choice: `prefer_node`. Which ranks draw which replica
is ours (another generator).

All tokens of a rank go the same way, so what a busy rank sends is not spread. The ranks without an own replica
are dealt to the replicas so that each gets as many as the others or one more; own replicas are not counted against
that.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import AnyArray, IntArray
from moesim.dispatch import flat_expert, split
from moesim.errors import BadInput
from moesim.placement import MAX_TABLE_ENTRIES, Placement
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Policy", "rank_slots"]


class Policy(Spec):
    """prefer_node: a rank without an own replica takes the first one on its node, if there is one there and another
    elsewhere; the others draw. All ranks of a node so take the same one."""

    prefer_node: bool = False

    def assign(
        self,
        expert_TLK: AnyArray,
        source_rank_T: AnyArray,
        placement: Placement,
        seed: int,
        token_T: AnyArray | None = None,
    ) -> NDArray[np.int32]:
        """See `moesim.dispatch.DispatchPolicy.assign`; the draw is the ranks', not the tokens'."""
        flat = flat_expert(expert_TLK, placement)
        if placement.max_replicas == 1:
            return placement.first_slot_LE.ravel()[flat]
        slot_GX = rank_slots(placement, seed, self.prefer_node).reshape(placement.num_ranks, -1)
        return slot_GX[np.asarray(source_rank_T, np.int64)[:, None, None], flat]

    def split(self, count_LE: IntArray, placement: Placement) -> IntArray:
        """See `moesim.dispatch.DispatchPolicy.split`: without source ranks the split is even."""
        return split(count_LE, placement, "uniform")


@lru_cache(maxsize=8)
def rank_slots(placement: Placement, seed: int, prefer_node: bool = False) -> NDArray[np.int32]:
    """The slot that each rank sends an expert's tokens to: int32 [G, L, E]."""
    ranks, layers, experts = placement.num_ranks, placement.num_layers, placement.num_experts
    if ranks * layers * experts > MAX_TABLE_ENTRIES:
        raise BadInput(
            f"the table of replicas by rank would need {ranks} x {layers} x {experts} entries, more than"
            f" {MAX_TABLE_ENTRIES}. Use dispatch random or first."
        )
    slot_GLE = np.broadcast_to(placement.first_slot_LE, (ranks, layers, experts)).copy()
    layer_R, expert_R = np.nonzero(placement.replica_count_LE > 1)
    number_R = placement.replica_count_LE[layer_R, expert_R].astype(np.int64)
    slot_RX = placement.expert_to_slots_LEX[layer_R, expert_R]
    rng = generator(seed, "dispatch/static")
    # each expert's replicas in an order of its own; ranks, in an order of their own, take them in turn
    turn_RX = np.argsort(np.where(slot_RX >= 0, rng.random(slot_RX.shape), 2.0), axis=1, kind="stable")
    own_RG = np.full((len(layer_R), ranks), -1, np.int32)
    for replica in range(slot_RX.shape[1] - 1, -1, -1):  # the lowest of a rank's own ones stays
        some = np.flatnonzero(slot_RX[:, replica] >= 0)
        own_RG[some, slot_RX[some, replica] // placement.slots_per_rank] = slot_RX[some, replica]
    if prefer_node:
        own_RG = np.where(own_RG < 0, _near_slots(slot_RX, placement), own_RG)
    order_RG = np.argsort(np.where(own_RG < 0, rng.random(own_RG.shape), 2.0), axis=1, kind="stable")
    place_RG = np.empty_like(order_RG)
    np.put_along_axis(place_RG, order_RG, np.broadcast_to(np.arange(ranks), own_RG.shape), axis=1)
    drawn_RG = np.take_along_axis(slot_RX, np.take_along_axis(turn_RX, place_RG % number_R[:, None], axis=1), axis=1)
    slot_GLE[:, layer_R, expert_R] = np.where(own_RG >= 0, own_RG, drawn_RG).T
    return slot_GLE


def _near_slots(slot_RX: AnyArray, placement: Placement) -> AnyArray:
    """The first of an expert's replicas on each rank's node, -1 where there is none, or none elsewhere: [R, G]."""
    node_G = np.array(placement.rank_to_node)
    node_RX = np.where(slot_RX >= 0, node_G[np.maximum(slot_RX, 0) // placement.slots_per_rank], -1)
    near_RXG = node_RX[:, :, None] == node_G
    some_RG = near_RXG.any(axis=1) & ((slot_RX >= 0)[:, :, None] & ~near_RXG).any(axis=1)
    first_RG = np.take_along_axis(slot_RX, near_RXG.argmax(axis=1), axis=1)
    return np.asarray(np.where(some_RG, first_RG, -1))
