"""Waterfill: the shared expert is dispatched like a routed one, mostly to ranks whose routed experts have little to do
(SGLang `--enable-deepep-waterfill`, `layers/moe/deepep_waterfill.py`; its blog of 2026-06-26).

Every rank holds the shared expert. The load of a rank is the routed pairs it serves and the tokens that come from it;
the level is the mean load once every token's shared expert is counted as well. A token's shared expert goes to a
candidate rank with probability proportional to what it lacks to the level, its own rank's lack weighed 1.1 times
the others'. Candidates are all ranks while none is above the level; else the ranks that the token reaches anyway
and its own, so that nothing more travels. Where no candidate lacks anything the token's own rank does it, unless a
candidate has less than 1 / 1.1 of the load. Below `min_batch` tokens a rank keeps its own.

`mode: static` is what SGLang does where its placement came with recorded loads: every rank looks at its own tokens
alone, and all ranks are candidates. The draw is a hash of the token here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.dispatch import DispatchPolicy, assign_ragged, hash_TLK, split
from moesim.dispatch.lp import Policy as Lp
from moesim.dispatch.min_max import min_max_split
from moesim.dispatch.plan import Batches, Coupled, Plan, Served, count_pairs, empty_guests, own_slots
from moesim.dispatch.random import Policy as Random
from moesim.dispatch.static import Policy as Static
from moesim.dispatch.static import rank_slots
from moesim.placement import Placement

__all__ = ["Policy"]

_BIAS = 1.1
"""SGLang's _LOCAL_PREF_NUMER / _LOCAL_PREF_DENOM"""
_CELLS = 1 << 22
"""(token, layer, candidate) looked at together"""


class Policy(Coupled):
    """routed: how replicas of routed experts are chosen. mode: see above. min_batch: tokens of a rank from which it
    sends shared experts away (SGLang: 64)."""

    guests: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    routed: Literal["static", "random", "lp"] = "static"
    mode: Literal["dynamic", "static"] = "dynamic"
    min_batch: Annotated[int, Field(ge=0, le=1 << 31)] = 64

    def stand_in(self) -> DispatchPolicy:
        """See `moesim.dispatch.plan.Coupled.stand_in`."""
        return Static() if self.routed == "static" else Random()

    def plan(self, batches: Batches, placement: Placement, seed: int) -> Plan:
        """See `moesim.dispatch.plan.Coupled.plan`. Expected shares of tokens that reach ranks independently of each
        other: `reach_BLG` says how many reach each (None: as pairs say, were they tokens)."""
        own_BLS = self._routed_slots(batches.count_BLE, placement, seed)
        load_BLG = placement.rank_load(own_BLS)
        tokens_BG = batches.tokens_BG
        total_B11 = tokens_BG.sum(axis=1)[:, None, None]
        reach_BLG = np.minimum(load_BLG, total_B11) if batches.reach_BLG is None else batches.reach_BLG
        chance_BLG = reach_BLG / np.maximum(total_B11, 1.0)
        if self.mode == "static":
            level = _levels(load_BLG / len(placement.rank_to_node), tokens_BG * 0, tokens_BG.mean(axis=1), True)
        else:
            level = _levels(load_BLG, tokens_BG, tokens_BG.sum(axis=1), False)
        sent_BG = np.where(tokens_BG < self.min_batch, 0.0, tokens_BG)
        at_GN = _at_nodes(placement)
        reach_BLN = np.minimum(reach_BLG @ at_GN, total_B11) if batches.reach_BLN is None else batches.reach_BLN
        node_chance_BLG = (reach_BLN / np.maximum(total_B11, 1.0)) @ at_GN.T
        moved_BLG, new_BLG, across_BLG = _expected(level, chance_BLG, node_chance_BLG, sent_BG, at_GN)
        moved_BLG += (tokens_BG - sent_BG)[:, None]
        return _with_shared(placement, own_BLS, moved_BLG, new_BLG, across_BLG @ at_GN)

    def _routed_slots(self, count_BLE: IntArray, placement: Placement, seed: int) -> IntArray:
        """Pairs of the routed experts by slot [B, L, S]."""
        if self.routed == "lp":
            return min_max_split(count_BLE, placement)
        if self.routed == "random" or placement.max_replicas == 1:
            return split(count_BLE, placement)
        return _by_ranks(count_BLE, placement, seed)

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
        """See `moesim.dispatch.plan.Coupled.assign_batches`. One choice more a token, the last: the shared expert's
        slot on the rank chosen, behind the rank's own slots."""
        batch_T = np.searchsorted(starts_B, np.arange(len(expert_TLK)), side="right") - 1
        source_T = np.asarray(source_rank_T, np.int64)
        if self.routed == "lp":
            lp = Lp().assign_batches(expert_TLK, source_T, starts_B, placement, seed, token_T, weight_T)
            slot_TLK = lp.slot_TLK
        else:
            slot_TLK = assign_ragged(self.stand_in(), expert_TLK, source_T, placement, seed, token_T)
        token = np.arange(len(expert_TLK)) if token_T is None else np.asarray(token_T)
        rank_TL = self._choose(slot_TLK, source_T, batch_T, len(starts_B), placement, seed, token, weight_T)
        wide = np.append(own_slots(placement, 1), placement.num_ranks * (placement.slots_per_rank + 1))
        each = placement.slots_per_rank + 1
        shared_TL1 = (rank_TL * each + each - 1)[..., None]
        out = np.concatenate([wide[slot_TLK], shared_TL1], axis=2).astype(np.int32)
        plan = _counted(out, batch_T, len(starts_B), placement, weight_T)
        return Served(out, plan.num_slots, plan.slots_per_rank, plan)

    def _choose(
        self, slot_TLK: NDArray[np.int32], source_T: IntArray, batch_T: IntArray, batches: int, placement: Placement,
        seed: int, token_T: AnyArray, weight_T: FloatArray | None,
    ) -> IntArray:  # fmt: skip
        """The rank of every token's shared expert [T, L]."""
        tokens, layers, choices = slot_TLK.shape
        ranks = placement.num_ranks
        # a level a source rank and batch, or one a batch
        sources = source_T if self.mode == "static" else np.zeros(tokens, np.int64)
        number = ranks if self.mode == "static" else 1
        view_T = batch_T * number + sources
        rank_TLK = slot_TLK // placement.slots_per_rank  # G: no expert
        shape = (batches * number, layers, ranks + 1)
        load_VLG = count_pairs(rank_TLK, view_T, shape, weight_T)[..., :ranks].astype(np.float64)
        place_T = batch_T * ranks + source_T
        tokens_BG = np.bincount(place_T, weight_T, batches * ranks).reshape(batches, ranks).astype(np.float64)
        if self.mode == "static":
            level = _levels(load_VLG, np.zeros((len(load_VLG), ranks)), tokens_BG.ravel(), True)
        else:
            level = _levels(load_VLG, tokens_BG, tokens_BG.sum(axis=1), False)
        keep_T = tokens_BG[batch_T, source_T] < self.min_batch
        out_TL = np.broadcast_to(source_T[:, None], (tokens, layers)).copy()
        step = max(1, _CELLS // max(1, layers * ranks))
        for lo in range(0, tokens, step):
            part = np.arange(lo, min(lo + step, tokens))
            part = part[~keep_T[part]]
            bits_TL = hash_TLK(seed, token_T[part], layers, choices + 1)[..., -1]
            draw_TL = np.asarray((bits_TL >> np.uint64(11)) * 2.0**-53, np.float64)
            out_TL[part] = _draw(level, view_T[part], source_T[part], rank_TLK[part].astype(np.int64), draw_TL)
        return out_TL


class _Level(NamedTuple):
    """load_VLG: effective load of ranks. lack_VLG: what they lack to the level. open_VL: all ranks are candidates."""

    load_VLG: FloatArray
    lack_VLG: FloatArray
    open_VL: AnyArray


def _levels(routed_VLG: FloatArray, tokens_VG: FloatArray, total_V: FloatArray, everywhere: bool) -> _Level:
    """The level that all loads and a further pair of each of `total_V` tokens fill the ranks to."""
    load_VLG = routed_VLG + tokens_VG[:, None]
    level_VL1 = np.ceil((load_VLG.sum(axis=2) + total_V[:, None]) / load_VLG.shape[2])[..., None]
    open_VL = np.ones(load_VLG.shape[:2], bool) if everywhere else load_VLG.max(axis=2) <= level_VL1[..., 0]
    return _Level(load_VLG, np.maximum(level_VL1 - load_VLG, 0.0), open_VL)


def _draw(level: _Level, view_T: IntArray, source_T: IntArray, rank_TLK: IntArray, draw_TL: FloatArray) -> IntArray:
    """Each token's rank [T, L] with probability proportional to its candidates' lack."""
    tokens, layers, _ = rank_TLK.shape
    ranks = level.lack_VLG.shape[2]
    candidate = np.zeros((tokens, layers, ranks + 1), bool)
    candidate |= level.open_VL[view_T][..., None]
    np.put_along_axis(candidate, rank_TLK, True, 2)
    candidate = candidate[..., :ranks]
    candidate[np.arange(tokens), :, source_T] = True
    own_TG = np.arange(ranks) == source_T[:, None]
    weight = np.where(candidate, level.lack_VLG[view_T] * np.where(own_TG, _BIAS, 1.0)[:, None], 0.0)
    filled = np.cumsum(weight, axis=2)
    total_TL1 = filled[..., -1:]
    drawn_TL = np.minimum((filled <= draw_TL[..., None] * total_TL1).sum(axis=2), ranks - 1)
    # nobody lacks anything: the least loaded candidate if it has clearly less than the own rank
    load = np.where(candidate, level.load_VLG[view_T], np.inf)
    least_TL = load.argmin(axis=2)
    low_TL = np.take_along_axis(load, least_TL[..., None], 2)[..., 0]
    own_TL = np.take_along_axis(load, source_T[:, None, None], 2)[..., 0]
    fallback_TL = np.where(low_TL * _BIAS < own_TL, least_TL, source_T[:, None])
    return np.where(total_TL1[..., 0] > 0, drawn_TL, fallback_TL)


def _expected(
    level: _Level, chance_BLG: FloatArray, node_chance_BLG: FloatArray, sent_BG: FloatArray, at_GN: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Shared experts that each rank does, and of those the ones that travel to it, and from another node, for that
    alone: three [B, L, G]. chances: of a
    token that its experts are on a rank, and on its node. sent_BG: tokens by source rank."""
    sent = sent_BG[:, None]
    there = np.where(level.open_VL[..., None], 1.0, chance_BLG)
    pull = level.lack_VLG * there
    total = pull.sum(axis=2, keepdims=True) + level.lack_VLG * _BIAS - pull  # of each source rank
    # a token that reaches no rank that lacks anything stays where it is
    misses = np.where(level.lack_VLG > 0, np.log1p(-np.minimum(there, 1.0 - 1e-12)), 0.0)
    stay = np.where(level.lack_VLG > 0, 0.0, np.exp(misses.sum(axis=2, keepdims=True)))
    stay = np.where(total > 0, stay, 1.0)
    flow = np.where(total > 0, sent * (1.0 - stay) / np.where(total > 0, total, 1.0), 0.0)  # tokens for a unit of lack
    others = pull * (flow.sum(axis=2, keepdims=True) - flow)
    moved = others + level.lack_VLG * _BIAS * flow + sent * stay
    across = pull * (flow.sum(axis=2, keepdims=True) - flow @ at_GN @ at_GN.T)
    open_ = level.open_VL[..., None]
    return (
        moved,
        np.where(open_, others * (1.0 - chance_BLG), 0.0),
        np.where(open_, across * (1.0 - node_chance_BLG), 0.0),
    )


def _by_ranks(count_BLE: IntArray, placement: Placement, seed: int) -> IntArray:
    """Pairs by slot [B, L, S] where ranks send alike and each to its own choice: what does not divide to the lowest."""
    slot_GLE = rank_slots(placement, seed)
    ranks, layers, experts = slot_GLE.shape
    key = np.arange(layers)[:, None] * placement.num_slots + slot_GLE
    senders_LS = np.bincount(key.ravel(), minlength=layers * placement.num_slots).reshape(layers, -1)
    order_LS = np.argsort(np.where(placement.held_LS, placement.slot_to_expert_LS, experts), axis=1, kind="stable")
    filled_LS = np.cumsum(np.take_along_axis(senders_LS, order_LS, axis=1), axis=1)
    expert_LS = np.take_along_axis(placement.expert_LS, order_LS, axis=1)
    # an expert's senders are all ranks, so its slots fill a stretch of `ranks`
    up_LS = filled_LS - ranks * expert_LS
    count = np.take_along_axis(count_BLE, np.broadcast_to(expert_LS, (*count_BLE.shape[:2], expert_LS.shape[1])), 2)
    upto = count * up_LS // ranks
    before = count * (up_LS - np.take_along_axis(senders_LS, order_LS, axis=1)) // ranks
    held = np.take_along_axis(placement.held_LS, order_LS, axis=1)
    out = np.zeros(upto.shape, np.int64)
    np.put_along_axis(out, np.broadcast_to(order_LS, upto.shape), np.where(held, upto - before, 0), axis=2)
    return out


def _with_shared(
    placement: Placement, own_BLS: IntArray, moved_BLG: FloatArray, new_BLG: FloatArray, new_BLN: FloatArray
) -> Plan:
    """The plan in which every rank serves the shared expert too."""
    expert, count = empty_guests(placement, len(own_BLS), 1)
    each = placement.slots_per_rank
    count[:, :, own_slots(placement, 1)] = own_BLS
    expert[:, :, each :: each + 1] = placement.num_experts
    count[:, :, each :: each + 1] = whole(moved_BLG)
    return Plan(placement, expert, count, None, new_BLG, new_BLN)


def _at_nodes(placement: Placement) -> FloatArray:
    """1 where a rank is on a node: float64 [G, N]."""
    return np.asarray(placement.node_of_rank_G[:, None] == np.unique(placement.node_of_rank_G), np.float64)


def whole(share_BLG: FloatArray) -> IntArray:
    """Whole numbers whose sums over the last axis are those of the shares, rounded, none further off than 1."""
    total = np.rint(np.cumsum(share_BLG, axis=2)).astype(np.int64)
    return np.diff(total, axis=2, prepend=0)


def _counted(
    slot_TLW: NDArray[np.int32], batch_T: IntArray, batches: int, placement: Placement, weight_T: FloatArray | None
) -> Plan:
    """The plan that tokens with slots carry out."""
    expert, count = empty_guests(placement, batches, 1)
    each = placement.slots_per_rank
    expert[:, :, each :: each + 1] = placement.num_experts
    layers, wide = count.shape[1:]
    got = count_pairs(slot_TLW, batch_T, (batches, layers, wide + 1), weight_T)
    return Plan(placement, expert, got[..., :wide])
