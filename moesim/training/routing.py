"""Who gets which token, step after step: the routing policy on a score model's scores, its state carried on.

A router that looks at one token at a time is asked once for all tokens of a step and layer, so that what it learns
from the loads comes from the whole batch. One that balances within a batch (`couples`) is asked for each micro-batch
of each rank (or, as `routing_scope` says, for all ranks of a replica together), its state going on from micro-batch
to micro-batch.

A step may have millions of tokens. Some are routed and stand for all (`moesim.training.sampling`): counts are scaled
up to a micro-batch of a replica, and where not all of those are routed, each stands for some. Fewer tokens have more
uneven loads than all would have; the result says what chance alone would give.

Legend: M micro-batches, R replicas, D data-parallel ranks of one, L MoE layers, E experts, S slots, P parts, W places
of an assignment, T tokens routed in a step in the order (micro-batch, replica, rank, position), B micro-batches of
replicas that are routed, N bins of position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import FloatArray, IntArray
from moesim.cost.experts import Ports
from moesim.cost.touch import touch
from moesim.errors import BadInput, Problem
from moesim.layout import Layout
from moesim.model import MoEModel
from moesim.placement import Placement
from moesim.rng import generator
from moesim.routing import NONE, Arrays, Routed, Router, RoutingContext
from moesim.routing.capacity import CapacitySpec, capacity_of, limit
from moesim.training.sampling import Scope, Shape, offsets, plan, spread
from moesim.training_spec import TrainingSpec

__all__ = ["POSITION_BINS", "ScoreSource", "StepRouter", "StepRouting"]

POSITION_BINS = 10
_DENOISING = 16


class ScoreSource(Protocol):
    """Router logits (see `moesim.workload.scores.ScoreModel`)."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    @property
    def assumed(self) -> str:
        """What part of the scores is assumed; "" where none is."""
        ...

    def scores(self, rows_N: NDArray[np.int64], layer: int, progress: float = 1.0) -> NDArray[np.float32]:
        """Logits [N, E] of the tokens with the numbers `rows_N`, at this share of the training run."""
        ...


@dataclass(slots=True)
class StepRouting:
    """One step. Counts stand for all tokens.

    wanted_MRLE: (token, expert) pairs as the router chose. slot_MRLS: rows that each slot's kernel runs. rows_MRLP:
    pairs that reach each part. ports: copies through the busiest ports [M, R, L], None where tokens do not travel.
    wanted_N, dropped_N: pairs by position in the sequence.
    """

    wanted_MRLE: FloatArray
    slot_MRLS: FloatArray
    rows_MRLP: FloatArray
    ports: Ports | None
    wanted_N: FloatArray
    dropped_N: FloatArray


class StepRouter:
    """Routes steps in order; `route` must be called for step 0, 1, 2, ..."""

    def __init__(
        self,
        model: MoEModel,
        layout: Layout,
        training: TrainingSpec,
        policy: Router,
        placement: Placement,
        capacity: CapacitySpec | None,
        scores: ScoreSource,
        replicas: int,
        seed: int,
    ) -> None:
        self._capacity = capacity
        self._scores_are_experts = policy.score_columns(model.num_experts) == model.num_experts
        if capacity is not None and capacity.drop == "reroute" and not self._scores_are_experts:
            raise BadInput(
                Problem(
                    "capacity.drop",
                    "reroute needs a score of every expert, and this router scores something else; drop by position "
                    "or by score",
                )
            )
        self._model, self._layout, self._training = model, layout, training
        self._policy, self._placement, self._scores = policy, placement, scores
        self._seed = seed
        self._replicas = replicas
        self.micro_batches = training.global_batch_sequences // (training.micro_batch_sequences * layout.dp * replicas)
        shape = Shape(self.micro_batches, replicas, layout.dp, model.num_experts, model.num_moe_layers)
        self.sampling = plan(shape, training, self._coupled())
        self._states: dict[tuple[int, int], Arrays] = {}
        self._lay_out()
        self._slot_of_LE = np.argsort(placement.slot_to_expert_LS, axis=1, kind="stable")
        self._node_G = np.arange(layout.ranks) // layout.gpus_per_node

    def _coupled(self) -> Scope | None:
        """The widest scope whose tokens compete for experts, as the router or a capacity has it."""
        scopes: set[Scope] = set()
        if self._policy.couples:
            scopes.add("rank" if self._training.routing_scope == "rank" else "all")
        c = self._capacity
        if c is not None and any(c.factor_of(layer, "training") for layer in range(self._model.num_moe_layers)):
            scopes.add(c.scope)
        widest: tuple[Scope, ...] = ("all", "rank", "sequence")
        return next((scope for scope in widest if scope in scopes), None)

    def _lay_out(self) -> None:
        """What is the same in every step: which tokens are routed, where they stand, and for what."""
        sampling, layout, length = self.sampling, self._layout, self._training.sequence_tokens
        routed, groups = sampling.routed, sampling.groups
        micro, self._stands_M = spread(sampling.micro_batches, self.micro_batches)
        replica, self._stands_R = spread(sampling.replicas, self._replicas)
        rank, _ = spread(sampling.ranks, layout.dp)
        group_B = (micro[:, None] * self._replicas + replica).ravel()
        # how many micro-batches of replicas each one stands for
        self._stands_for_B = np.outer(np.bincount(self._stands_M), np.bincount(self._stands_R)).ravel()
        self._block = (group_B[:, None] * layout.dp + rank).ravel()  # (micro-batch, replica, rank), as numbered in all
        self._offset_T = offsets(sampling, length, self._policy.couples)
        self._position_T = np.tile(self._offset_T % length, len(self._block))
        self._bin_T = self._position_T * POSITION_BINS // length
        self._group_T = np.repeat(np.arange(groups), sampling.ranks * routed)
        within = np.tile(np.arange(sampling.ranks * routed), groups)
        if sampling.ranks == layout.dp:
            # a data-parallel rank's tokens are dealt out to its tensor-parallel ranks for the exchange
            self._source_T = within // routed * layout.tp + within % routed % layout.tp
        else:
            self._source_T = within % layout.ranks  # some ranks' tokens stand for those that all ranks send

    def _rows(self, step: int) -> tuple[IntArray, IntArray]:
        """Number of each token in the whole run, and of its sequence."""
        blocks = self.micro_batches * self._replicas * self._layout.dp
        block_T = step * blocks + np.repeat(self._block, self.sampling.routed)
        offset_T = np.tile(self._offset_T, len(self._block))
        length = self._training.sequence_tokens
        return block_T * self.sampling.real + offset_T, block_T * (self.sampling.real // length) + offset_T // length

    def route(self, step: int) -> StepRouting:
        """Every layer of one step."""
        rows_T, sequence_T = self._rows(step)
        progress = self._training.progress(step)
        layers = self._model.num_moe_layers
        if self._policy.denoises:
            progress = step % _DENOISING / (_DENOISING - 1)  # diffusion models train on all steps of denoising alike
        token_T = None
        if "token_T" in self._policy.asks_for:
            token_T = _vocabulary_ids(self._seed, step, len(rows_T), self._model.vocab_size)
        made: list[_Counted] = []
        carry: dict[int, Arrays] = {}
        for layer in range(layers):
            score_TE = self._scores.scores(rows_T, layer, progress)
            context = RoutingContext(
                top_k=self._model.top_k,
                num_groups=self._model.num_expert_groups,
                top_groups=self._model.top_groups,
                scoring=self._model.scoring,
                norm_topk_prob=self._model.norm_topk_prob,
                seed=self._seed,
                step=step,
                layer=layer,
                num_layers=layers,
                training=True,
                progress=progress,
                token_T=token_T,
                sequence_T=sequence_T,
                position_T=self._position_T,
                class_T=sequence_T % 2,
            )
            expert_TW, gate_TW = self._choose(score_TE, context, carry)
            made.append(self._count(expert_TW, gate_TW, score_TE, layer, step))
        return self._together(made)

    # -- choosing -----------------------------------------------------------------------------------------------
    def _scopes(self) -> list[tuple[int, slice]]:
        """(whose state, tokens) of each call of the policy, in order."""
        tokens = len(self._position_T)
        if not self._policy.couples:
            return [(0, slice(0, tokens))]
        sampling = self.sampling
        share = sampling.routed * (1 if self._training.routing_scope == "rank" else sampling.ranks)
        per_micro = tokens // sampling.micro_batches // share
        return [(i % per_micro, slice(i * share, (i + 1) * share)) for i in range(tokens // share)]

    def _choose(
        self, score_TE: NDArray[np.float32], context: RoutingContext, carry: dict[int, Arrays]
    ) -> tuple[IntArray, NDArray[Any]]:
        """Experts and gates [T, W] of all tokens in one layer; states and what is carried to the next layer are
        kept."""
        scopes = self._scopes()
        routed: list[Routed] = []
        for call, (owner, part) in enumerate(scopes):
            own = _part_of(context, part, self._states.get((context.layer, owner), {}), carry.get(call, {}))
            try:
                found = self._policy.route(score_TE[part], own)
            except ValueError as error:
                raise BadInput(Problem("policies.routing", str(error))) from None
            self._states[context.layer, owner] = found.state
            carry[call] = found.carry
            routed.append(found)
        width = max(r.expert_TK.shape[1] for r in routed)
        expert_TW = np.full((len(score_TE), width), NONE, np.int64)
        gate_TW = np.zeros((len(score_TE), width), routed[0].gate_TK.dtype)
        for (_, part), found in zip(scopes, routed, strict=True):
            expert_TW[part, : found.expert_TK.shape[1]] = found.expert_TK
            gate_TW[part, : found.expert_TK.shape[1]] = found.gate_TK
        return expert_TW, gate_TW

    # -- counting -----------------------------------------------------------------------------------------------
    def _count(
        self, expert_TW: IntArray, gate_TW: NDArray[Any], score_TE: NDArray[np.float32], layer: int, step: int
    ) -> _Counted:
        """Counts of one layer, of the sample."""
        wanted = self._by_expert(expert_TW)
        wanted_N = self._by_position(expert_TW != NONE)
        dropped_N = np.zeros(POSITION_BINS)
        kept, run, capacity = wanted, wanted, self._capacity
        factor = None if capacity is None else capacity.factor_of(layer, "training")
        if self._policy.ideal and capacity is None:
            wanted = kept = run = np.broadcast_to(wanted.mean(axis=1, keepdims=True), wanted.shape)
        elif capacity is not None and factor is not None:
            scope_T, tokens, _ = self._capacity_scopes(capacity)
            room_S = self._rooms(np.bincount(scope_T), tokens, capacity, factor, (step, layer))
            by_expert_TE = score_TE if self._scores_are_experts else None
            limited = limit(expert_TW.astype(np.int32), gate_TW, by_expert_TE, room_S, capacity, scope_T)
            expert_TW = limited.expert_TW.astype(np.int64)
            dropped_N = self._by_position(limited.dropped_TW)
            kept = run = self._by_expert(expert_TW)
            if capacity.pad:
                run = self._padded_rows(capacity, factor)
        ports = self._ports(expert_TW, layer) if run is kept else self._padded_ports(run)
        kept_BS, run_BS = (x[:, self._placement.slot_to_expert_LS[layer]] for x in (kept, run))
        return _Counted(wanted, run_BS, kept_BS, ports, wanted_N, dropped_N)

    def _by_expert(self, expert_TW: IntArray) -> FloatArray:
        """Pairs by group and expert."""
        experts, groups = self._model.num_experts, self.sampling.groups
        key_TW = self._group_T[:, None] * experts + expert_TW
        count = np.bincount(key_TW[expert_TW != NONE], minlength=groups * experts)
        return count.reshape(groups, experts).astype(np.float64)

    def _by_position(self, mask_TW: NDArray[np.bool_]) -> FloatArray:
        """Pairs by position, those of each micro-batch as often as it stands for one."""
        pairs_T = mask_TW.sum(axis=1) * self._stands_for_B[self._group_T].astype(np.float64)
        return np.asarray(np.bincount(self._bin_T, weights=pairs_T, minlength=POSITION_BINS), np.float64)

    def _capacity_scopes(self, capacity: CapacitySpec) -> tuple[IntArray, int, int]:
        """The scope of each token whose tokens share a capacity, from 0, the tokens that such a scope really has, and
        scopes of a replica's micro-batch: each data-parallel rank's part, each of its sequences, or all."""
        sampling, length = self.sampling, self._training.sequence_tokens
        block_T = np.arange(len(self._group_T)) // sampling.routed
        if capacity.scope == "all":
            return block_T // sampling.ranks, self._layout.dp * sampling.real, 1
        if capacity.scope == "rank":
            return block_T, sampling.real, self._layout.dp
        number, within_T = np.unique(self._offset_T // length, return_inverse=True)
        scope_T = block_T * len(number) + np.tile(within_T, len(self._block))
        return scope_T, length, self._layout.dp * self._training.micro_batch_sequences

    def _rooms(
        self, routed_S: IntArray, tokens: int, capacity: CapacitySpec, factor: float, key: tuple[int, int]
    ) -> IntArray:
        """Tokens that an expert takes of each scope [S]: C of a whole one. Of a part of one (`routed_S` of its
        `tokens`) as large a part of C, whose fraction is rounded up as often as it is large."""
        share_S = self._room(tokens, capacity, factor) * routed_S / tokens
        drawn_S = generator(self._seed, "training/room", *key).random(len(routed_S))
        return np.asarray(np.floor(share_S) + (drawn_S < share_S % 1.0), np.int64)

    def _room(self, tokens: int, capacity: CapacitySpec, factor: float) -> int:
        return capacity_of(tokens, self._model.top_k, self._model.num_experts, factor, capacity.min_capacity)

    def _padded_rows(self, capacity: CapacitySpec, factor: float) -> FloatArray:
        """Rows that each expert's kernel runs whatever is in them, [groups, E]: those of all scopes, at the capacity
        that whole ones have."""
        _, tokens, scopes = self._capacity_scopes(capacity)
        room = self._room(tokens, capacity, factor)
        return np.full((self.sampling.groups, self._model.num_experts), room * scopes / self.sampling.scale)

    def _padded_ports(self, run_BE: FloatArray) -> FloatArray | None:
        """Copies where every rank sends each expert its share of the padded rows, each copy on its own (GShard,
        arXiv:2006.16668, algorithm 1: the dispatched tensor has a row for every expert and place)."""
        if not self._layout.exchanges:
            return None
        ranks, near = self._layout.ranks, min(self._layout.ranks, self._layout.gpus_per_node)
        part_B = run_BE.sum(axis=1) / ranks
        away_B, far_B = part_B * (ranks - 1) / ranks, part_B * (ranks - near) / ranks
        return np.stack([away_B, far_B, away_B * ranks, far_B * ranks])

    def _ports(self, expert_TW: IntArray, layer: int) -> FloatArray | None:
        """Copies of the sample through the busiest ports [4, groups] (see `Ports`)."""
        if not self._layout.exchanges:
            return None
        spr = self._placement.slots_per_rank
        # what a token does not take stays at home and is not counted
        home_T1 = (self._source_T * spr)[:, None]
        slot_TW = np.where(expert_TW == NONE, home_T1, self._slot_of_LE[layer][expert_TW])
        groups = self.sampling.groups
        starts = np.arange(groups, dtype=np.int64) * (len(self._source_T) // groups)
        copies = touch(slot_TW[:, None], self._source_T, starts, spr, self._node_G, self._layout.copies)
        share = self._busiest_share()
        out, node_out = copies.out_BL[:, 0], copies.node_out_BL[:, 0]
        return np.stack(
            [
                np.maximum(copies.in_BLG[:, 0].max(axis=-1), out * share),
                np.maximum(copies.node_in_BLN[:, 0].max(axis=-1) / self._layout.nics_shared, node_out * share),
                out,
                node_out,
            ]
        )

    def _busiest_share(self) -> float:
        """Share of a replica's tokens that its busiest sender has: all have as many, as far as they divide."""
        own = -(-self.sampling.real // self._layout.tp)
        return own / (self.sampling.real * self._layout.dp)

    def _together(self, made: list[_Counted]) -> StepRouting:
        """All layers of a step, scaled up to all tokens."""
        sampling = self.sampling
        sampled, stands = (sampling.micro_batches, sampling.replicas), np.ix_(self._stands_M, self._stands_R)

        def to_all(count_BLX: FloatArray) -> FloatArray:
            return np.asarray(count_BLX.reshape(*sampled, *count_BLX.shape[1:])[stands] * sampling.scale)

        def stack(name: str) -> FloatArray:
            return to_all(np.stack([getattr(c, name) for c in made], axis=1))

        slot_MRLS, kept_MRLS = stack("run_BS"), stack("kept_BS")
        rows_MRLP = kept_MRLS.reshape(*kept_MRLS.shape[:3], self._layout.ep, -1).sum(axis=-1)
        ports = None
        if made[0].port_4B is not None:
            port_4BL = np.stack([c.port_4B for c in made if c.port_4B is not None], axis=-1)
            ports = Ports(*(to_all(port_BL) for port_BL in port_4BL))
        wanted_N = sum((c.wanted_N for c in made), np.zeros(POSITION_BINS)) * sampling.scale
        dropped_N = sum((c.dropped_N for c in made), np.zeros(POSITION_BINS)) * sampling.scale
        return StepRouting(stack("wanted_BE"), slot_MRLS, rows_MRLP, ports, wanted_N, dropped_N)


def _vocabulary_ids(seed: int, step: int, tokens: int, vocabulary: int) -> IntArray:
    """Assumed ids of a step's tokens, by Zipf's law."""
    share = 1.0 / np.arange(1, vocabulary + 1)
    drawn = generator(seed, "training/token", step).random(tokens)
    return np.searchsorted(np.cumsum(share / share.sum()), drawn).clip(0, vocabulary - 1).astype(np.int64)


class _Counted(NamedTuple):
    """One layer, of the sample: pairs wanted by group and expert, rows run and pairs kept by slot, copies through
    ports, pairs by position."""

    wanted_BE: FloatArray
    run_BS: FloatArray
    kept_BS: FloatArray
    port_4B: FloatArray | None
    wanted_N: FloatArray
    dropped_N: FloatArray


def _part_of(context: RoutingContext, part: slice, state: Arrays, carry: Arrays) -> RoutingContext:
    """The context of some of the tokens, with what this router was left by an earlier call."""
    changes: dict[str, Any] = {"state": state, "carry": carry}
    for name in ("token_T", "sequence_T", "position_T", "class_T"):
        whole = getattr(context, name)
        changes[name] = None if whole is None else whole[part]
    return replace(context, **changes)
