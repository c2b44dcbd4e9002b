"""Semantic grouping: tokens and experts clustered together (Speculative MoE, also Sem-MoE and Semantic Parallelism,
arXiv:2503.04398).

Units of traffic (tokens of one vocabulary id; sequences where nobody recorded ids) and the experts of every layer are
dealt out to ranks so that what a unit activates stands on its own rank: the local activation rate. In turn, units go to
the rank that holds most of what they activate, then every layer's experts to the rank whose units activate them, a
transportation problem, until nothing gains; both under a price on uneven loads. A request then goes to the rank that
holds most of its tokens' experts (`moesim/balancing/semantic.py`).

A reconstruction: the paper weighs sum_i |load_i - mean| against remote activations by a theta that it does not give,
and places by a score with improving exchanges. Ours: squares in place of absolute values, the weights, and the
alternation. A unit has one rank in all layers, as a request under attention data parallelism has. Nodes play no part.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse import csr_matrix

from moesim.arrays import FloatArray, IntArray
from moesim.placement import Placement, PlacementContext, TokenSample, check_weights
from moesim.placement.crossings import (
    better_layer,
    check_sample,
    check_sizes,
    contiguous_ranks,
    load_shares,
    placement_of,
    rank_of,
    spread,
    transport,
)
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Policy", "Units", "local_share", "units_of"]

_GAIN = 1e-9
_ROUNDS = 60


class Units(NamedTuple):
    """count_JE: share of all activations by unit and (layer, expert), sparse [J, L * E], adding up to 1. mass_J: of
    each unit. unit_T: the unit of each token of the sample."""

    count_JE: csr_matrix
    mass_J: FloatArray
    unit_T: IntArray


class Policy(Spec):
    """balance_weight: what a unit of variance of the ranks' expert loads (over their squared mean, mean over layers) is
    worth in remote activations; token_weight: the same of the tokens that ranks hold. starts: drawn ones besides
    contiguous. uneven: where ranks do not divide the experts, some have an empty slot; false refuses that. No expert is
    replicated."""

    uses_sample: ClassVar[bool] = True

    balance_weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    token_weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    starts: Annotated[int, Field(ge=0, le=1000)] = 4
    uneven: bool = True

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. Without a sample of tokens, loads are balanced alone."""
        weight_LE = check_weights(weight_LE)
        layers, experts = weight_LE.shape
        check_sizes(experts, ctx, self.uneven)
        check_sample(weight_LE, ctx)
        share_LE, units = load_shares(weight_LE), units_of(ctx.sample)
        plain = contiguous_ranks(layers, experts, ctx.num_ranks)
        found = [plain]
        for start in range(-1, self.starts if units is not None else 0):
            rank_LE = plain
            if start >= 0 and units is not None:
                drawn_J = generator(0, "placement/semantic", start).integers(ctx.num_ranks, size=len(units.mass_J))
                rank_LE = self._experts(units, drawn_J, share_LE, plain, ctx.num_ranks, fresh=True)
            found.append(self._alternate(units, share_LE, rank_LE, ctx.num_ranks))
        return placement_of(min(found, key=lambda r: self._value(units, share_LE, r, ctx.num_ranks)), ctx)

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> float:
        """What `place` minimises: share of remote activations, units dealt out for the placement, and both prices."""
        return self._value(
            units_of(ctx.sample), load_shares(check_weights(weight_LE)), rank_of(placement), ctx.num_ranks
        )

    def _value(self, units: Units | None, share_LE: FloatArray, rank_LE: IntArray, bins: int) -> float:
        value = self.balance_weight * spread(share_LE, rank_LE, bins)
        if units is None:
            return value
        local_JG = local_share(units, rank_LE, bins)
        rank_J = _deal(local_JG, units.mass_J, self.token_weight)
        held_G = np.bincount(rank_J, weights=units.mass_J, minlength=bins)
        value += self.token_weight * (bins * float((held_G**2).sum()) - 1.0)
        return value + 1.0 - float(local_JG[np.arange(len(rank_J)), rank_J].sum())

    def _alternate(self, units: Units | None, share_LE: FloatArray, rank_LE: IntArray, bins: int) -> IntArray:
        """Units, experts, units, ... until nothing gains."""
        reached = self._value(units, share_LE, rank_LE, bins)
        for _ in range(_ROUNDS):
            rank_J = np.zeros(0, np.int64)
            if units is not None:
                rank_J = _deal(local_share(units, rank_LE, bins), units.mass_J, self.token_weight)
            then_LE = self._experts(units, rank_J, share_LE, rank_LE, bins)
            now = self._value(units, share_LE, then_LE, bins)
            if now >= reached - _GAIN:
                break
            reached, rank_LE = now, then_LE
        return rank_LE

    def _experts(
        self, units: Units | None, rank_J: IntArray, share_LE: FloatArray, rank_LE: IntArray, bins: int,
        fresh: bool = False,
    ) -> IntArray:  # fmt: skip
        """Each layer's experts for units as they are. fresh: whatever stands there now, and for locality alone."""
        layers, experts = share_LE.shape
        cost_LEG = np.zeros((layers, experts, bins))
        if units is not None:
            of_rank = csr_matrix((np.ones(len(rank_J)), (rank_J, np.arange(len(rank_J)))), (bins, len(rank_J)))
            cost_LEG -= (of_rank @ units.count_JE).toarray().reshape(bins, layers, experts).transpose(1, 2, 0)
        if fresh:
            return np.array([transport(cost_EG) for cost_EG in cost_LEG]).reshape(layers, experts)
        weight = self.balance_weight / max(layers, 1)
        new = [better_layer(rank_LE[n], cost_LEG[n], share_LE[n], weight) for n in range(layers)]
        return np.array(new).reshape(layers, experts)


def units_of(sample: TokenSample | None) -> Units | None:
    """What each unit of a sample activates; None without one."""
    if sample is None or not sample.expert_TLK.size:
        return None
    ids, experts = sample.expert_TLK, sample.num_experts
    tokens, layers = ids.shape[:2]
    told = sample.sequence_T if sample.token_T is None else sample.token_T
    _, unit_T = np.unique(told, return_inverse=True)
    column = (np.arange(layers, dtype=np.int64)[:, None] * experts + ids).reshape(tokens, -1)
    held = (ids < experts).reshape(tokens, -1)
    row = np.broadcast_to(unit_T[:, None], column.shape)
    shape = (int(unit_T.max()) + 1, layers * experts)
    count_JE = csr_matrix((np.ones(int(held.sum())), (row[held], column[held])), shape)
    count_JE.sum_duplicates()
    count_JE.data /= max(float(count_JE.data.sum()), 1.0)
    return Units(count_JE, np.asarray(count_JE.sum(axis=1)).ravel(), unit_T.astype(np.int64))


def local_share(units: Units, rank_LE: IntArray, bins: int) -> FloatArray:
    """Share of all activations that is of a unit and on a rank: [J, G]; what a unit on that rank would find there."""
    holds = (rank_LE.reshape(-1, 1) == np.arange(bins)).astype(np.float64)
    return np.asarray(units.count_JE @ holds)


def _deal(local_JG: FloatArray, mass_J: FloatArray, weight: float) -> IntArray:
    """The rank of each unit: heaviest first to where remote activations and weight * G * sum_g mass_g^2 grow least,
    then again one by one until nothing gains."""
    bins = local_JG.shape[1]
    held_G = np.zeros(bins)
    rank_J = np.full(len(mass_J), -1, np.int64)
    price = 2 * weight * bins
    order = np.argsort(-mass_J, kind="stable").tolist()
    for turn in range(_ROUNDS):
        moved = False
        for unit in order:
            mass, here = mass_J[unit], rank_J[unit]
            if here >= 0:
                held_G[here] -= mass
            cost_G = price * mass * held_G - local_JG[unit]
            best = int(cost_G.argmin())
            if here >= 0 and cost_G[best] >= cost_G[here] - 1e-15:
                best = int(here)
            moved |= best != here
            rank_J[unit] = best
            held_G[best] += mass
        if turn and not moved:
            break
    return rank_J
