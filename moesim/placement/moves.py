"""From one map to the next: which slots change, where their weights come from, and what that asks of each link.

A new map says which experts a rank holds, not in which of its slots; `settle` keeps those that stay where they are
(vLLM's `preserve_intragpu_slots`), and may hand whole ranks' sets to other ranks of the same node, which changes no
balance. `moves` then finds a source for every slot that changes, as SGLang's
`update_expert_location` does: nothing to do, a copy on the same GPU, a second copy of what the GPU receives anyway
("free rider"), from a GPU of the same node, from another node. Among equal sources the one that has sent least.

Legend: L layers, S slots, G ranks, N nodes, C slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import IntArray
from moesim.placement import EMPTY, Placement

__all__ = ["MOVE_CLASSES", "Moves", "moves", "settle"]

MOVE_CLASSES = ("unchanged", "same_rank", "free_rider", "same_node", "across")


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Expert slots by where their new weights come from, by layer [L], and what each rank sends and receives [L, G].

    copies_LG: copies inside a rank (free riders are copied from the slot that receives).
    """

    unchanged_L: IntArray
    same_rank_L: IntArray
    free_rider_L: IntArray
    same_node_L: IntArray
    across_L: IntArray
    near_out_LG: IntArray
    near_in_LG: IntArray
    far_out_LG: IntArray
    far_in_LG: IntArray
    copies_LG: IntArray

    @property
    def moved_L(self) -> IntArray:
        """Slots that change, [L]."""
        return self.same_rank_L + self.free_rider_L + self.same_node_L + self.across_L

    def counts(self) -> dict[str, int]:
        """Slots of all layers by class."""
        return {name: int(getattr(self, f"{name}_L").sum()) for name in MOVE_CLASSES}


def settle(old: Placement, new: Placement, relabel_ranks: bool = False) -> Placement:
    """`new` with the same experts on each rank, in slots of `old` wherever an expert stays on its rank.

    relabel_ranks: first hand each rank's set to that rank of its node (and each node's to that node) where most of it
    is already (an assignment problem a layer). Raises ValueError where the two are of different shapes.
    """
    if old.slot_to_expert_LS.shape != new.slot_to_expert_LS.shape or old.rank_to_node != new.rank_to_node:
        raise ValueError("two maps of one deployment have the same layers, slots, ranks and nodes")
    ranks, room = old.num_ranks, old.slots_per_rank
    before_LGC = old.slot_to_expert_LS.reshape(-1, ranks, room)
    after_LGC = new.slot_to_expert_LS.reshape(-1, ranks, room)
    if relabel_ranks:
        order_LG = _relabelled(before_LGC, after_LGC, new)
        after_LGC = np.take_along_axis(after_LGC, order_LG[..., None], axis=1)
    settled = _in_place(before_LGC, after_LGC).reshape(old.slot_to_expert_LS.shape)
    return Placement(settled, new.num_experts, ranks, new.rank_to_node)


def _in_place(before_LGC: NDArray[np.int32], after_LGC: NDArray[np.int32]) -> NDArray[np.int32]:
    """Each rank's new experts, those that stay in their slot, the others in the slots left, in order."""
    before, after = _numbered(before_LGC), _numbered(after_LGC)
    same_LGCC = before[..., :, None] == after[..., None, :]  # old slot, place in the new list
    stays_LGC, taken_LGC = same_LGCC.any(axis=-1), same_LGCC.any(axis=-2)
    # of what does not stay: the n-th free slot takes the n-th expert that has none
    free_order = np.argsort(stays_LGC, axis=-1, kind="stable")
    left_order = np.argsort(taken_LGC, axis=-1, kind="stable")
    source = np.where(stays_LGC, same_LGCC.argmax(axis=-1), 0)
    others = np.empty_like(source)
    np.put_along_axis(others, free_order, left_order, axis=-1)
    source = np.where(stays_LGC, source, others)
    return np.asarray(np.take_along_axis(after_LGC, source, axis=-1))


def _numbered(expert_LGC: NDArray[np.int32]) -> IntArray:
    """A key of its own for each copy of an expert on a rank: expert * C + earlier copies."""
    room = expert_LGC.shape[-1]
    equal = expert_LGC[..., :, None] == expert_LGC[..., None, :]
    earlier = (equal & np.tri(room, k=-1, dtype=np.bool_)).sum(axis=-1)
    return np.asarray(expert_LGC.astype(np.int64) * room + earlier)


def _relabelled(before_LGC: NDArray[np.int32], after_LGC: NDArray[np.int32], placement: Placement) -> IntArray:
    """For every rank, the rank of the new map whose set it takes: int64 [L, G], nodes kept whole."""
    from scipy.optimize import linear_sum_assignment  # half a second, where experts move

    layers, ranks, _ = before_LGC.shape
    node_G = placement.node_of_rank_G
    members = [np.flatnonzero(node_G == n) for n in np.unique(node_G)]
    order_LG = np.broadcast_to(np.arange(ranks), (layers, ranks)).copy()
    for layer in range(layers):
        held = [_one_hot(x[layer], placement.num_experts) for x in (before_LGC, after_LGC)]
        common_GG = np.minimum(held[0][:, None], held[1][None]).sum(axis=-1)
        inner: dict[tuple[int, int], Any] = {}
        gain_NN = np.full((len(members), len(members)), -1.0)
        for i, here in enumerate(members):
            for j, there in enumerate(members):
                if len(here) == len(there):
                    block = common_GG[np.ix_(here, there)]
                    rows, columns = linear_sum_assignment(block, maximize=True)
                    inner[i, j] = there[columns]
                    gain_NN[i, j] = block[rows, columns].sum()
        for a, b in zip(*linear_sum_assignment(gain_NN, maximize=True), strict=True):
            order_LG[layer, members[int(a)]] = inner[int(a), int(b)]
    return order_LG


def _one_hot(expert_GC: NDArray[np.int32], experts: int) -> NDArray[np.float32]:
    """Copies of each expert on each rank, float32 [G, E]."""
    out = np.zeros((len(expert_GC), experts + 1), np.float32)
    np.add.at(out, (np.arange(len(expert_GC))[:, None], expert_GC), 1.0)  # EMPTY counts in the last column
    return out[:, :experts]


def moves(old: Placement, new: Placement, layers: Sequence[int] | None = None) -> Moves:
    """What it takes to turn `old` into `new`, slot by slot; `layers`: only these change, the others count as unchanged.

    Emptied slots are unchanged: nothing has to arrive there.
    """
    number, ranks, room = old.num_layers, old.num_ranks, old.slots_per_rank
    tally = {name: np.zeros(number, np.int64) for name in ("same_rank", "free_rider", "same_node", "across")}
    ports = {name: np.zeros((number, ranks), np.int64) for name in ("near_out", "near_in", "far_out", "far_in", "copy")}
    node_G = old.node_of_rank_G
    changed_LS = (old.slot_to_expert_LS != new.slot_to_expert_LS) & (new.slot_to_expert_LS != EMPTY)
    for layer in range(number) if layers is None else layers:
        holders: dict[int, list[int]] = {}
        for slot, expert in enumerate(old.slot_to_expert_LS[layer].tolist()):
            holders.setdefault(expert, []).append(slot // room)
        arriving: set[tuple[int, int]] = set()
        near_out, far_out = ports["near_out"][layer], ports["far_out"][layer]
        for slot in np.flatnonzero(changed_LS[layer]).tolist():
            expert, rank = int(new.slot_to_expert_LS[layer, slot]), slot // room
            sources = holders[expert]
            if rank in sources or (expert, rank) in arriving:
                tally["same_rank" if rank in sources else "free_rider"][layer] += 1
                ports["copy"][layer, rank] += 1
                continue
            arriving.add((expert, rank))
            near = [g for g in sources if node_G[g] == node_G[rank]]
            if near:
                source = min(near, key=lambda g: (near_out[g], g))
                near_out[source] += 1
                ports["near_in"][layer, rank] += 1
                tally["same_node"][layer] += 1
            else:
                source = min(sources, key=lambda g: (far_out[g], g))
                far_out[source] += 1
                ports["far_in"][layer, rank] += 1
                tally["across"][layer] += 1
    moved_L = sum(tally.values(), np.zeros(number, np.int64))
    return Moves(
        unchanged_L=new.held_LS.sum(axis=1) - moved_L,
        same_rank_L=tally["same_rank"],
        free_rider_L=tally["free_rider"],
        same_node_L=tally["same_node"],
        across_L=tally["across"],
        near_out_LG=ports["near_out"],
        near_in_LG=ports["near_in"],
        far_out_LG=ports["far_out"],
        far_in_LG=ports["far_in"],
        copies_LG=ports["copy"],
    )
