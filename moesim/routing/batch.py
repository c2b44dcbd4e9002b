"""Routing whole batches of a pool's tokens: scores, the policy layer by layer, then the capacity.

A policy that looks at one token at a time gives the pool its experts once (`route_pool`). One that looks at the batch,
or any policy under a capacity, is asked again for every batch that a simulation forms. Legend: N tokens of a batch, L
passes through experts, E experts, W places a token has.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, Problem
from moesim.rng import generator
from moesim.routing import NONE, Arrays, Routed, Router, RoutingContext
from moesim.routing.capacity import CapacitySpec, Phase, capacity_of, limit
from moesim.workload.pool import Ids, RoutingSource, id_dtype
from moesim.workload.scores import ScoreModel

__all__ = ["BINS", "UNLIMITED", "BatchRouter", "ModelFacts", "RoutedBatch"]

BINS = 10
"""tenths of a sequence, for drops by position"""
_CHUNK = 4096
_WARM_TOKENS, _WARM_RATE = 512, 0.03
_WARM_STEPS = (64, 16)
"""of routers that learn at a rate, and of those whose state is made anew from the loads"""
_VOCABULARY = 32_768


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What routers ask of the model. layers: passes through experts; experts: those a layer chooses from."""

    top_k: int
    experts: int
    layers: int
    num_groups: int = 1
    top_groups: int = 1
    scoring: Any = "softmax"
    norm_topk_prob: bool = True


UNLIMITED = -1


class RoutedBatch(NamedTuple):
    """expert_NLW: ids, E where there is none. wanted_NL, dropped_NL: how many experts a token chose, and how many of
    them the capacity refused. room_SL: rows an expert has room for in each scope, UNLIMITED where a layer has none."""

    expert_NLW: Ids
    wanted_NL: NDArray[np.int32]
    dropped_NL: NDArray[np.int32]
    room_SL: NDArray[np.int64]


class _About(NamedTuple):
    """A batch: rows of the pool, whose token each is, its place there, and the progress of denoising."""

    rows_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    progress: float


class BatchRouter:
    """One policy on one pool."""

    def __init__(
        self,
        policy: Router,
        scores: ScoreModel,
        source: RoutingSource,
        facts: ModelFacts,
        capacity: CapacitySpec | None,
        seed: int,
    ) -> None:
        self.policy = policy
        self.scores = scores
        self.capacity = capacity
        self.facts = facts
        self._source = source
        self._seed = seed
        self._sequence_T = np.repeat(np.arange(source.num_sequences), source.sequence_tokens_Q)
        self._token_T, self._class_T, assumed = _facts_of_tokens(source, seed)
        self.warnings = tuple(text for name, text in assumed.items() if name in policy.asks_for)
        self._states: list[Arrays] = [{} for _ in range(facts.layers)]
        if policy.stateful:
            self._warm_up()

    @property
    def pool_tokens(self) -> int:
        return self._source.num_tokens

    @property
    def couples(self) -> bool:
        """A token's experts depend on its batch."""
        return self.policy.couples or self.capacity is not None

    def route(
        self,
        rows_N: NDArray[np.int64],
        phase: Phase,
        step: int,
        *,
        rank_N: NDArray[np.int64] | None = None,
        request_N: NDArray[np.int64] | None = None,
        position_N: NDArray[np.int64] | None = None,
        real_S: NDArray[np.int64] | None = None,
        progress: float | None = None,
    ) -> RoutedBatch:
        """Experts of the batch that the pool's rows `rows_N` form.

        phase: `prefill` or `decode`. step: keys the draws. rank_N: each token's data-parallel rank (or its number among
        those that are looked at), from 0; None: one. request_N, position_N: whose token it is and its place there,
        tokens of one request together; None: as in the pool, where consecutive rows of a sequence are together. real_S:
        tokens that each scope really has, where the batch is a sample of them (ranks, or one number for all): its room
        is the real one, scaled. progress: of denoising; None: by step.
        """
        facts, tokens = self.facts, len(rows_N)
        label_N, run_N = self._runs(rows_N, request_N)
        if position_N is None:
            position_N = rows_N - self._source.sequence_start[self._sequence_T[rows_N]]
        about = _About(rows_N, label_N, position_N, _timestep(step) if progress is None else progress)
        scope_N = self._scopes(rank_N, run_N)
        tokens_S = np.bincount(np.zeros(tokens, np.int64) if scope_N is None else scope_N)
        chosen: list[NDArray[np.int32]] = []
        wanted, dropped = (np.zeros((tokens, facts.layers), np.int32) for _ in range(2))
        room = np.full((len(tokens_S), facts.layers), UNLIMITED, np.int64)
        carry: Arrays = {}
        for layer in range(facts.layers):
            routed, score = self._layer(about, layer, step, carry)
            carry = routed.carry
            expert_NW = routed.expert_TK
            wanted[:, layer] = (expert_NW != NONE).sum(axis=1)
            factor = None if self.capacity is None else self.capacity.factor_of(layer, phase)
            if self.capacity is not None and factor is not None and tokens:
                room[:, layer] = self._rooms(tokens_S if real_S is None else real_S, factor)
                room_S = room[:, layer]
                if real_S is not None:
                    room_S = np.rint(room_S * (tokens_S / np.maximum(real_S, 1))).astype(np.int64)
                limited = limit(expert_NW, routed.gate_TK, self._by_expert(score), room_S, self.capacity, scope_N)
                dropped[:, layer] = limited.dropped_TW.sum(axis=1)
                expert_NW = limited.expert_TW
            chosen.append(expert_NW)
        return RoutedBatch(self._stacked(chosen), wanted, dropped, room)

    def _scopes(self, rank_N: NDArray[np.int64] | None, run_N: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Which tokens share a capacity; None: all."""
        if self.capacity is None or self.capacity.scope == "all":
            return None
        return run_N if self.capacity.scope == "sequence" else rank_N

    def _by_expert(self, score_NX: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Scores that name a next best expert; None where columns are rows and columns of a grid."""
        assert self.capacity is not None
        if score_NX.shape[1] == self.facts.experts:
            return score_NX
        if self.capacity.drop == "reroute":
            message = (
                "drop: reroute needs a score for each expert, which this router does not make; use position or score"
            )
            raise BadInput(Problem("capacity.drop", message))
        return None

    def _rooms(self, tokens_S: NDArray[np.int64], factor: float) -> NDArray[np.int64]:
        """Rows an expert has room for in each scope."""
        assert self.capacity is not None
        facts, least = self.facts, self.capacity.min_capacity
        sizes, which_S = np.unique(tokens_S, return_inverse=True)
        rooms = [capacity_of(int(n), facts.top_k, facts.experts, factor, least) if n else 0 for n in sizes]
        return np.array(rooms, np.int64)[which_S]

    def _stacked(self, chosen_L: list[NDArray[np.int32]]) -> Ids:
        """The layers' choices side by side, as wide as the widest token needs."""
        none = self.facts.experts
        used = max(1, *(int((e != NONE).sum(axis=1).max(initial=0)) for e in chosen_L))
        out = np.full((len(chosen_L[0]), len(chosen_L), used), none, id_dtype(none + 1))
        for layer, expert_NW in enumerate(chosen_L):
            part = expert_NW[:, :used]
            out[:, layer, : part.shape[1]] = np.where(part == NONE, none, part)
        return out

    def route_pool(self) -> RoutingSource:
        """The whole pool with this policy's experts, batch by batch of at most about 4,096 consecutive rows, cut where
        sequences end."""
        facts, source = self.facts, self._source
        parts = []
        for number, (lo, hi) in enumerate(itertools.pairwise(_cuts(source.sequence_start))):
            rows = np.arange(lo, hi)
            parts.append(self.route(rows, "prefill", number, request_N=self._sequence_T[rows]).expert_NLW)
        wide = max(part.shape[2] for part in parts)
        ids = np.concatenate([_widened(part, wide, facts.experts) for part in parts])
        name = f"{type(self.policy).__module__.rpartition('.')[2]} on {self.scores.name} of {source.source}"
        ragged = bool((ids == facts.experts).any())
        narrow = ids if ragged else ids.astype(id_dtype(facts.experts))
        return source.with_ids(narrow, name, ragged=ragged, num_experts=facts.experts)

    def _runs(
        self, rows_N: NDArray[np.int64], request_N: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Whose each token is, and the same numbered from 0 in the order of the batch."""
        if not len(rows_N):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        if request_N is not None:
            new = np.diff(request_N) != 0
        else:
            new = (np.diff(rows_N) != 1) | (np.diff(self._sequence_T[rows_N]) != 0)
        run_N = np.concatenate([[0], np.cumsum(new)]).astype(np.int64)
        return (run_N if request_N is None else np.asarray(request_N, np.int64)), run_N

    def _layer(
        self, about: _About, layer: int, step: int, carry: Arrays, training: Router | None = None
    ) -> tuple[Routed, NDArray[np.float32]]:
        """One layer's choice and the scores it was made on; `training`: the policy as it is while training."""
        facts, rows_N = self.facts, about.rows_N
        score = self.scores.scores(rows_N, layer)
        context = RoutingContext(
            facts.top_k,
            facts.num_groups,
            facts.top_groups,
            facts.scoring,
            facts.norm_topk_prob,
            seed=self._seed,
            step=step,
            layer=layer,
            num_layers=facts.layers,
            training=training is not None,
            progress=about.progress if self.policy.denoises else 1.0,
            token_T=self._token_T[rows_N],
            sequence_T=about.label_N,
            position_T=about.position_N,
            class_T=self._class_T[rows_N],
            state=self._states[layer],
            carry=carry,
        )
        try:
            return (training or self.policy).route(score, context), score
        except ValueError as error:
            kind = type(self.policy).__module__.rpartition(".")[2]
            raise BadInput(Problem("policies.routing", f"{kind} cannot route this model's tokens: {error}")) from None

    def _warm_up(self) -> None:
        """Bring the state to where training would have left it: steps on batches of the pool, with a learning rate
        that falls from 0.03 to the policy's own where it has one."""
        rate = getattr(self.policy, "rate", None)
        steps = _WARM_STEPS[not isinstance(rate, float)]
        rng = generator(self._seed, "routing/warm")
        for step in range(steps):
            policy = self.policy
            if isinstance(rate, float) and rate < _WARM_RATE:
                falling = _WARM_RATE * (rate / _WARM_RATE) ** (step / (steps - 1))
                policy = policy.model_copy(update={"rate": falling})
            rows = np.sort(rng.integers(self._source.num_tokens, size=_WARM_TOKENS))
            label_N, _ = self._runs(rows, None)
            position_N = rows - self._source.sequence_start[self._sequence_T[rows]]
            about = _About(rows, label_N, position_N, 1.0)
            carry: Arrays = {}
            for layer in range(self.facts.layers):
                routed, _ = self._layer(about, layer, step, carry, policy)
                carry, self._states[layer] = routed.carry, routed.state


def _timestep(step: int) -> float:
    """Denoising step of a batch: batches go round the whole schedule."""
    return (step % 16) / 15


def _cuts(sequence_start: NDArray[np.int64]) -> list[int]:
    """Where batches of at most 4,096 rows begin and end: at ends of sequences, inside one only where it is longer."""
    out = [0]
    for start, end in itertools.pairwise(sequence_start.tolist()):
        if end - out[-1] > _CHUNK and start > out[-1]:
            out.append(start)
        out += range(out[-1] + _CHUNK, end, _CHUNK)
    return [*out, int(sequence_start[-1])]


def _widened(expert_NLW: Ids, wide: int, none: int) -> Ids:
    more = wide - expert_NLW.shape[2]
    out: Any = np.pad(expert_NLW, ((0, 0), (0, 0), (0, more)), constant_values=none)
    return out  # type: ignore[no-any-return]


def _facts_of_tokens(source: RoutingSource, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, str]]:
    """Vocabulary ids and classes of the pool's tokens, and what is assumed of them: ids where the trace has none follow
    Zipf's law; the class is the sequence's domain, else sequences alternate between two."""
    recorded = source.token_T
    assumed: dict[str, str] = {}
    if recorded is None:
        share = 1.0 / np.arange(1, _VOCABULARY + 1)
        drawn = generator(seed, "routing/token").random(source.num_tokens)
        recorded = np.searchsorted(np.cumsum(share / share.sum()), drawn).clip(0, _VOCABULARY - 1)
        assumed |= {"token_T": "vocabulary ids are assumed: drawn from Zipf's law, as the routing source has none"}
    class_Q = source.domain_Q
    if class_Q is None:
        class_Q = (np.arange(source.num_sequences) % 2).astype(np.int16)
        assumed |= {"class_T": "classes of tokens are assumed: sequences alternate between two (see routing.domains)"}
    class_T = np.repeat(class_Q.astype(np.int64), source.sequence_tokens_Q)
    return np.asarray(recorded, np.int64), class_T, assumed
