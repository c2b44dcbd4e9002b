"""Batches of the bank whose tokens are routed together, rank by rank as an engine forms them.

A batch of T tokens with a given share on the busiest data-parallel rank is made of requests of the run: whole prompts
(the last one of a rank cut) for prefill, one token each of as many requests for decode. Of a large batch a sample of
at most 1,024 tokens is routed: whole ranks as long as they are small enough, each standing for others like it, so that
what an expert has room for, and what a capacity refuses, is that of real ranks; a rank that is larger is thinned and
its room with it. Legend: N tokens routed, S ranks looked at, L passes through experts, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.cost.experts import Drawn, Ports
from moesim.cost.touch import touch
from moesim.dispatch import DispatchPolicy
from moesim.dispatch.plan import Plan, serve_batches
from moesim.layout import Layout
from moesim.placement import Placement
from moesim.rng import generator
from moesim.routing.batch import BINS, UNLIMITED, BatchRouter, RoutedBatch
from moesim.routing.capacity import Phase
from moesim.workload.replay import Replay

__all__ = ["Entry", "RoutedBank", "drawn_of", "room_of", "stack_drawn"]

_MOST = 1024
"""tokens routed for one entry"""
_LEAST, _CELLS = 256, 1 << 23
"""and fewer, but not under so many, where their scores in all layers would be more than so many"""
_RANKS = 4
"""ranks looked at, at least, however large they are"""
_ENTRIES = 8
_DENOISING = 16
"""entries where a router's choice goes with the step of denoising: each stands at a step of its own"""


class Entry(NamedTuple):
    """One batch: tokens per slot [L, slots], ports by layer, rows that experts have room for [L], what was drawn; the
    plan of its dispatch, where there is one."""

    count_LS: FloatArray
    ports: Ports
    room_L: FloatArray
    drawn: Drawn
    plan: Plan | None = None


class _Ranks(NamedTuple):
    """Ranks that are looked at: number, tokens routed, tokens they really have, and how many ranks each stands for."""

    rank_S: IntArray
    routed_S: IntArray
    real_S: IntArray
    weight_S: FloatArray


class RoutedBank:
    """Draws entries for `moesim.cost.bank.CountExperts`."""

    def __init__(
        self,
        router: BatchRouter,
        replay: Replay,
        dispatch: DispatchPolicy,
        layout: Layout,
        placement: Placement,
        seed: int,
    ) -> None:
        self.router = router
        self._replay = replay
        self._dispatch = dispatch
        self._layout = layout
        self._placement = placement
        self._seed = seed
        self._node_G = np.arange(layout.ranks) // layout.gpus_per_node
        self._most = min(_MOST, max(_LEAST, _CELLS // (router.facts.layers * router.facts.experts)))

    def entries(self, asked: int) -> int:
        """How many batches of a size are drawn where the scenario asks for `asked`."""
        return min(asked, _DENOISING if self.router.policy.denoises else _ENTRIES)

    def entry(self, phase: Phase, tokens: int, skew: float, entry: int, entries: int) -> Entry:
        """Batch number `entry` of `entries` with `tokens` tokens; skew: the busiest rank's tokens over the mean."""
        layout, placement = self._layout, self._placement
        ranks = self._ranks(tokens, skew, entry)
        request_N, position_N, number_N = self._tokens(phase, ranks.routed_S, entry)
        batch = self.router.route(
            self._replay.rows(request_N, position_N),
            phase,
            entry,
            rank_N=number_N,
            request_N=_occurrences(request_N, position_N, number_N),
            position_N=position_N,
            real_S=self._real(ranks, tokens),
            progress=entry / max(1, entries - 1),
        )
        weight_N = (ranks.weight_S * ranks.real_S / ranks.routed_S)[number_N]
        turn_N = np.arange(len(number_N))
        source_N = ranks.rank_S[number_N] * layout.tp + turn_N % layout.tp
        part_N = source_N if layout.exchanges else source_N // layout.expert_tp
        token_N = request_N * (1 << 32) + position_N
        served = serve_batches(
            self._dispatch, batch.expert_NLW, part_N, np.zeros(1, np.int64), placement, self._seed, token_N, weight_N
        )
        slot_NLW = served.slot_TLK
        room = room_of(batch, self._room_weights(batch, ranks, tokens))
        drawn = drawn_of(batch, self._replay.tenth(request_N, position_N), weight_N)
        return Entry(
            _weighted_slots(slot_NLW, weight_N, served.slots),
            self._ports(slot_NLW, source_N, number_N, ranks, served.slots_per_rank),
            room,
            drawn,
            served.plan,
        )

    def _ranks(self, tokens: int, skew: float, entry: int) -> _Ranks:
        """The ranks of a batch that are looked at."""
        number = self._layout.dp if self._layout.meets else 1
        busiest = min(tokens, max(-(-tokens // number), round(tokens / number * skew)))
        size_D = np.full(number, (tokens - busiest) // max(number - 1, 1), np.int64)
        size_D[0] = busiest
        size_D[1 : 1 + tokens - int(size_D.sum())] += 1
        order_D = np.concatenate([[0], 1 + generator(self._seed, "bank/ranks", entry).permutation(number - 1)])
        order_D = order_D[size_D[order_D] > 0].astype(np.int64)
        if tokens <= self._most:
            size_S = size_D[order_D]
            return _Ranks(order_D, size_S, size_S, np.ones(len(size_S)))
        whole = int(np.searchsorted(np.cumsum(size_D[order_D]), self._most, side="right"))  # ranks that fit as they are
        rank_S = order_D[: max(whole, _RANKS)]
        real_S = size_D[rank_S]
        thin = min(1.0, self._most / int(real_S.sum()))
        routed_S = np.maximum(1, np.floor(real_S * thin)).astype(np.int64)
        others = int(real_S[1:].sum())
        if others == 0 or busiest - int(size_D[-1]) <= 1:  # all alike: each token stands for as many
            return _Ranks(rank_S, routed_S, real_S, np.full(len(rank_S), tokens / int(real_S.sum())))
        share = (tokens - busiest) / others
        return _Ranks(rank_S, routed_S, real_S, np.concatenate([[1.0], np.full(len(rank_S) - 1, share)]))

    def _real(self, ranks: _Ranks, tokens: int) -> IntArray | None:
        """Tokens that each scope of the capacity really has, where the batch holds fewer."""
        capacity = self.router.capacity
        if capacity is None or capacity.scope == "sequence":
            return None
        real_S = ranks.real_S if capacity.scope == "rank" else np.array([tokens], np.int64)
        return real_S if int(ranks.routed_S.sum()) < tokens else None

    def _room_weights(self, batch: RoutedBatch, ranks: _Ranks, tokens: int) -> FloatArray | None:
        """How many scopes each scope of the batch stands for; None: itself."""
        capacity = self.router.capacity
        if capacity is None or capacity.scope == "all":
            return None
        if capacity.scope == "rank":
            return ranks.weight_S
        return np.full(len(batch.room_SL), tokens / int(ranks.routed_S.sum()))

    def _tokens(self, phase: Phase, routed_S: IntArray, entry: int) -> tuple[IntArray, IntArray, IntArray]:
        """Request, position and rank's number of each token, rank after rank."""
        rng = generator(self._seed, "bank/requests", int(phase == "decode"), entry)
        replay, total = self._replay, int(routed_S.sum())
        requests = len(replay.prompt_R)
        number_N = np.repeat(np.arange(len(routed_S)), routed_S)
        if phase == "decode":
            request_N = rng.integers(requests, size=total)
            prompt_N = replay.prompt_R[request_N]
            ahead_N = np.maximum(replay.computed_R[request_N] - prompt_N, 1)
            return request_N, prompt_N + np.floor(rng.random(total) * ahead_N).astype(np.int64), number_N
        request_P, position_P = [], []
        for tokens in routed_S.tolist():
            left = tokens
            while left > 0:
                request = int(rng.integers(requests))
                length = min(left, int(replay.prompt_R[request]))
                request_P.append(np.full(length, request, np.int64))
                position_P.append(np.arange(length))
                left -= length
        return np.concatenate(request_P), np.concatenate(position_P), number_N

    def _ports(
        self, slot_NLW: AnyArray, source_N: IntArray, number_N: IntArray, ranks: _Ranks, slots_per_rank: int
    ) -> Ports:
        """The busiest ports of each layer, and copies in all."""
        layout = self._layout
        if not layout.exchanges:
            return Ports(*(np.zeros(slot_NLW.shape[1]) for _ in range(4)))
        starts_S = np.flatnonzero(np.r_[True, np.diff(number_N) != 0])
        copies = touch(slot_NLW, source_N, starts_S, slots_per_rank, self._node_G, layout.copies)
        weight_S = ranks.weight_S * ranks.real_S / ranks.routed_S
        in_LG = np.einsum("s,slg->lg", weight_S, copies.in_BLG)
        node_in_LN = np.einsum("s,sln->ln", weight_S, copies.node_in_BLN)
        return Ports(
            nvlink=in_LG.max(axis=-1),
            nic=node_in_LN.max(axis=-1) / layout.nics_shared,
            nvlink_total=in_LG.sum(axis=-1),
            nic_total=node_in_LN.sum(axis=-1),
        )


def _occurrences(request_N: IntArray, position_N: IntArray, number_N: IntArray) -> IntArray:
    """Numbers that differ where a request is drawn twice: it then stands for another one like it."""
    new = (np.diff(request_N) != 0) | (np.diff(position_N) != 1) | (np.diff(number_N) != 0)
    return np.concatenate([[0], np.cumsum(new)]).astype(np.int64)


def _weighted_slots(slot_NLW: AnyArray, weight_N: FloatArray, slots: int) -> FloatArray:
    """Tokens per layer and slot [L, slots], each token counted `weight_N` times; slot `slots` is no expert."""
    tokens, layers, wide = slot_NLW.shape
    key = slot_NLW + (np.arange(layers, dtype=np.int64) * (slots + 1))[:, None]
    weight = np.broadcast_to(weight_N[:, None, None], (tokens, layers, wide))
    count = np.bincount(key.ravel(), weights=weight.ravel(), minlength=layers * (slots + 1))
    return np.asarray(count.reshape(layers, slots + 1)[:, :slots], np.float64)


def drawn_of(batch: RoutedBatch, tenth_N: IntArray, weight_N: FloatArray | None) -> Drawn:
    """What a batch chose and lost, as one column. tenth_N: where in its request each token stands."""
    weight_N = np.ones(len(tenth_N)) if weight_N is None else weight_N
    wanted_N = batch.wanted_NL.sum(axis=1) * weight_N
    dropped_N = batch.dropped_NL.sum(axis=1) * weight_N
    return Drawn(
        np.array([weight_N.sum() * batch.wanted_NL.shape[1]]),
        np.array([wanted_N.sum()]),
        np.array([dropped_N.sum()]),
        np.bincount(tenth_N, weights=wanted_N, minlength=BINS)[:, None].astype(np.float64),
        np.bincount(tenth_N, weights=dropped_N, minlength=BINS)[:, None].astype(np.float64),
    )


def stack_drawn(drawn: Sequence[Drawn]) -> Drawn:
    """Columns side by side."""
    return Drawn(*(np.concatenate([d[i] for d in drawn], axis=-1) for i in range(len(Drawn._fields))))


def room_of(batch: RoutedBatch, weight_S: FloatArray | None) -> FloatArray:
    """Rows an expert has room for in all scopes together [L]; UNLIMITED where the layer has no capacity."""
    weight_S = np.ones(len(batch.room_SL)) if weight_S is None else weight_S
    total_L = weight_S @ np.maximum(batch.room_SL, 0)
    unlimited_L = (batch.room_SL == UNLIMITED).any(axis=0) if len(batch.room_SL) else np.ones(len(total_L), bool)
    return np.where(unlimited_L, UNLIMITED, total_L).astype(np.float64)
