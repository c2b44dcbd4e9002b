"""Least-loaded expert parallelism: a rank beyond its share spills tokens to the least loaded ranks and sends them the
expert's weights (Nguyen et al., arXiv:2601.17111, algorithms 2 to 4; SalesforceAIResearch/LeastLoadedEP).

Experts come by load, heaviest first. A rank takes what fits under `alpha` times the mean; what is left goes to
the ranks with least assigned and pending load, in chunks that fit and are not under `min_tokens` unless they end it;
where none fits, all of it to the least loaded. Plain expert parallelism below the threshold `lambda`.

`paper` compares the experts' loads with lambda and looks for the least loaded rank again before tokens are forced on
it; `code` compares the ranks' loads, and forces what a full rank cannot take at all on the rank that was least loaded
before that expert's spill began. Whole tokens: the limit is rounded up, in `code` down. The code's defaults are alpha
1.1 and no threshold.

Ours, because both know one replica an expert: replicas share an expert's tokens evenly before, each of them may spill,
and tokens that spill to a rank that holds the expert need no weights. Weights are sent anew for each batch and layer.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.dispatch import split
from moesim.dispatch.plan import Batches, Coupled, Plan, empty_guests, own_slots, plan_of
from moesim.placement import Placement

__all__ = ["Policy"]


class Policy(Coupled):
    """threshold: the paper's lambda, max over mean load from which tokens spill. alpha: what a rank takes, in mean
    loads. min_tokens: m, the smallest chunk that is worth sending weights for."""

    guests: ClassVar[bool] = True

    variant: Literal["paper", "code"] = "paper"
    threshold: Annotated[float, Field(ge=0, le=1e6)] = 1.3
    alpha: Annotated[float, Field(ge=1, le=1e6)] = 1.0
    min_tokens: Annotated[int, Field(ge=0, le=1 << 31)] = 1024

    def plan(self, batches: Batches, placement: Placement, seed: int) -> Plan:
        """See `moesim.dispatch.plan.Coupled.plan`."""
        count_BLE = np.asarray(batches.count_BLE, np.int64)
        batch_count, layers, _ = count_BLE.shape
        even_BLS = split(count_BLE, placement)
        spills = self._spills(count_BLE, even_BLS, placement)
        cells = np.flatnonzero(spills)
        if not len(cells) or placement.num_ranks == 1:
            return plan_of(placement, even_BLS)
        own_CS = even_BLS.reshape(batch_count * layers, -1).copy()
        moved = _spill(own_CS, cells, placement, self)
        own_BLS = own_CS.reshape(even_BLS.shape)
        return _with_guests(placement, own_BLS, moved)

    def _spills(self, count_BLE: IntArray, even_BLS: IntArray, placement: Placement) -> AnyArray:
        """Which batches and layers are out of balance [B * L]."""
        load = placement.rank_load(even_BLS) if self.variant == "code" else count_BLE.astype(np.float64)
        mean = load.mean(axis=2)
        return np.asarray((load.max(axis=2) >= self.threshold * mean) & (mean > 0)).ravel()

    def limit(self, total_C: IntArray, ranks: int) -> FloatArray:
        """Tokens a rank takes before it spills [C] (algorithm 2: m_alpha)."""
        if self.variant == "paper":
            return np.asarray(np.ceil(self.alpha * total_C / ranks), np.float64)
        return np.asarray(np.maximum(np.floor(self.alpha * (total_C // ranks)), 1.0), np.float64)


def _spill(own_CS: IntArray, cells: IntArray, placement: Placement, policy: Policy) -> IntArray:
    """Algorithms 2 and 3 in the batches and layers `cells`: takes from `own_CS` what its slot does not serve, and
    returns what others do: columns (cell, native slot, rank, tokens), whole tokens."""
    each, ranks = placement.slots_per_rank, placement.num_ranks
    load_CS = own_CS[cells]
    limit_C = policy.limit(load_CS.sum(axis=1), ranks)
    pending_CG = load_CS.reshape(len(cells), ranks, each).sum(axis=2).astype(np.float64)
    assigned_CG = np.zeros_like(pending_CG)
    order_CS = np.argsort(-load_CS, axis=1, kind="stable")
    row_C = np.arange(len(cells))
    moved: list[IntArray] = []
    for place in range(int((load_CS > 0).sum(axis=1).max())):
        slot_C = order_CS[:, place]
        native_C, tokens_C = slot_C // each, load_CS[row_C, slot_C]
        pending_CG[row_C, native_C] -= tokens_C
        free_C = np.floor(limit_C - assigned_CG[row_C, native_C] - pending_CG[row_C, native_C])
        take_C = np.clip(free_C, 0, tokens_C).astype(np.int64)
        assigned_CG[row_C, native_C] += take_C
        own_CS[cells, slot_C] = take_C
        rest_C = tokens_C - take_C
        some = np.flatnonzero(rest_C > 0)
        if len(some):
            stale = (take_C[some] == 0) & (policy.variant == "code")
            parts = _rest(
                rest_C[some], native_C[some], assigned_CG, pending_CG, limit_C[some], some, policy.min_tokens, stale
            )
            moved += [np.stack([cells[some[at]], slot_C[some[at]], rank, tokens]) for at, rank, tokens in parts]
    return np.concatenate(moved, axis=1) if moved else np.zeros((4, 0), np.int64)


def _rest(
    rest_K: IntArray, native_K: IntArray, assigned_CG: FloatArray, pending_CG: FloatArray, limit_K: FloatArray,
    cell_K: IntArray, least: int, stale_K: AnyArray,
) -> list[tuple[IntArray, IntArray, IntArray]]:  # fmt: skip
    """Algorithm 3 for K cells, one expert each: (which of them, rank, tokens) of each round. `assigned_CG` is
    changed. stale_K: tokens that fit nowhere go to the rank that was least loaded at the beginning."""
    rest_K = rest_K.copy()
    out = []
    effective = assigned_CG[cell_K] + pending_CG[cell_K]
    effective[np.arange(len(cell_K)), native_K] = np.inf
    first_K = effective.argmin(axis=1)
    live = np.arange(len(cell_K))
    while len(live):
        effective = assigned_CG[cell_K[live]] + pending_CG[cell_K[live]]
        effective[np.arange(len(live)), native_K[live]] = np.inf
        chunk = np.floor(np.minimum(rest_K[live, None], limit_K[live, None] - effective))
        fits = (chunk > 0) & ((chunk >= least) | (chunk >= rest_K[live, None]))
        open_ = np.where(fits, effective, np.inf)
        rank = open_.argmin(axis=1)
        found = fits.any(axis=1)
        forced = np.where(stale_K[live], first_K[live], effective.argmin(axis=1))
        rank = np.where(found, rank, forced)
        tokens = np.where(found, chunk[np.arange(len(live)), rank], rest_K[live]).astype(np.int64)
        assigned_CG[cell_K[live], rank] += tokens
        rest_K[live] -= tokens
        out.append((live, rank, tokens))
        live = live[rest_K[live] > 0]
    return out


def _with_guests(placement: Placement, own_BLS: IntArray, moved: IntArray) -> Plan:
    """The plan in which ranks also serve what was moved to them."""
    batches, layers, slots = own_BLS.shape
    ranks, experts = placement.num_ranks, placement.num_experts
    cell_M, slot_M, rank_M, tokens_M = moved
    layer_M = cell_M % layers
    expert_M = placement.expert_LS[layer_M, slot_M]
    before = placement.replicas_before_rank_LEG[layer_M, expert_M]
    at = np.arange(len(rank_M))
    here_M = before[at, rank_M + 1] > before[at, rank_M]
    own = own_BLS.reshape(batches * layers, slots).copy()
    some = np.flatnonzero(here_M)
    held = placement.expert_to_slots_LEX[layer_M[some], expert_M[some], before[some, rank_M[some]]]
    np.add.at(own, (cell_M[some], held), tokens_M[some])
    away = np.flatnonzero(~here_M)
    key, first, inverse = np.unique(
        (cell_M[away] * ranks + rank_M[away]) * experts + expert_M[away], return_index=True, return_inverse=True
    )
    place = key // experts  # cell and rank
    index = np.arange(len(place)) - np.searchsorted(place, place)
    guests = int(index.max(initial=-1)) + 1
    each = placement.slots_per_rank
    expert, count = empty_guests(placement, batches, guests)
    count.reshape(batches * layers, -1)[:, own_slots(placement, guests)] = own
    home = np.full(count.shape, -1, np.int32)
    to = (place // ranks, place % ranks * (each + guests) + each + index)
    expert.reshape(batches * layers, -1)[to] = key % experts
    home.reshape(batches * layers, -1)[to] = slot_M[away][first] // each
    count.reshape(batches * layers, -1)[to] = np.bincount(inverse.ravel(), weights=tokens_M[away]).astype(np.int64)
    return Plan(placement, expert, count, home)
