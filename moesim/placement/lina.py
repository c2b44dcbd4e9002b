"""Lina: replicas in proportion to expert popularity, which is estimated from the paths of tokens, packed first-fit.

Li et al., "Accelerating Distributed MoE Training and Inference with Lina" (USENIX ATC'23, arXiv:2210.17223), the part
on inference: tokens that shared experts in the last layers tend to share the next one, so a profile of paths gives the
popularity of a layer before its gate has spoken; popular experts get several devices, unpopular ones share one.

A reconstruction: the paper's text was not at hand, only summaries of it. Theirs: n_e = N * (sum over tokens of
P(e | path)) / (number of tokens) devices for expert e of N, paths of three layers, first-fit decreasing. Ours: one map
for the run instead of one a batch (its second phase, a new plan where a gate proves the estimate wrong, is
rebalancing here); half the sample's sequences are the profile and the other half the batch; slots that n_e leaves over
go where a replica is heaviest; the path is each token's first choice; a layer keeps contiguous order where that is
better balanced.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.placement import Placement, PlacementContext, TokenSample, check_weights, initial_map, slot_count
from moesim.placement.search import better_of
from moesim.spec import Spec

__all__ = ["Policy", "path_popularity"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Policy(Spec):
    """`num_redundant_experts`: slots beyond one an expert. `path_layers`: layers of a path."""

    num_redundant_experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    path_layers: Annotated[int, Field(ge=1, le=3)] = 3

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        """See `moesim.placement.PlacementPolicy.place`. Without a sample the loads themselves are the popularity."""
        weight_LE = self._popularity(check_weights(weight_LE), ctx)
        layers, experts = weight_LE.shape
        slots = slot_count(experts, self.num_redundant_experts, ctx.num_ranks)
        table_LS = np.empty((layers, slots), np.int64)
        for layer in range(layers):
            table_LS[layer] = _first_fit(weight_LE[layer], slots, ctx.num_ranks)
        plain_LS = np.tile(initial_map(experts, slots).astype(np.int64), (layers, 1))
        return ctx.placement(better_of(table_LS, plain_LS, weight_LE, ctx), experts)

    def objective(self, placement: Placement, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Floats:
        """Largest over mean rank load under the popularity that it estimates, [L]."""
        return placement.balance(self._popularity(check_weights(weight_LE), ctx))

    def _popularity(self, weight_LE: Floats, ctx: PlacementContext) -> Floats:
        """Expected share of a layer's pairs, [L, E]; each row sums to 1."""
        out_LE = np.where(weight_LE.max(axis=1, keepdims=True, initial=0.0) > 0, weight_LE, 1.0)
        out_LE = out_LE / out_LE.max(axis=1, keepdims=True, initial=0.0)
        out_LE = out_LE / out_LE.sum(axis=1, keepdims=True)
        if ctx.sample is not None and ctx.sample.expert_TLK.shape[1] == len(weight_LE):
            found_LE = path_popularity(ctx.sample, self.path_layers)
            known_L = found_LE.sum(axis=1) > 0
            out_LE[known_L] = found_LE[known_L]
        return np.asarray(out_LE)


def path_popularity(sample: TokenSample, path_layers: int) -> Floats:
    """Share of each expert that the paths of every other sequence lead to, by what followed such paths in the rest of
    the sample, [L, E]: rows sum to 1, and are 0 for the first `path_layers` layers and where there is nothing to see.
    A path that the rest has not met counts as the rest's mean."""
    ids_TLK, experts = sample.expert_TLK, sample.num_experts
    out_LE = np.zeros((ids_TLK.shape[1], experts))
    _, sequence_T = np.unique(sample.sequence_T, return_inverse=True)
    batch_T = sequence_T % 2 == 1
    if not batch_T.any():  # one sequence: its second half
        batch_T = np.arange(len(batch_T)) >= len(batch_T) // 2
    if batch_T.all() or not batch_T.any():
        return out_LE
    for layer in range(path_layers, ids_TLK.shape[1]):
        path_T = np.zeros(len(ids_TLK), np.int64)
        for before in range(layer - path_layers, layer):
            path_T = path_T * (experts + 1) + ids_TLK[:, before, 0]
        _, path_T = np.unique(path_T, return_inverse=True)
        profile_P, batch_P = (np.bincount(path_T[of], minlength=path_T.max() + 1) for of in (~batch_T, batch_T))
        met_P = profile_P > 0
        each_P = np.divide(batch_P, profile_P, out=np.zeros(len(batch_P)), where=met_P)
        unmet = float(batch_P[~met_P].sum()) / float((~batch_T).sum())
        token_T = each_P[path_T[~batch_T]] + unmet
        next_TK = ids_TLK[~batch_T, layer].astype(np.int64)
        weight_TK = np.broadcast_to(token_T[:, None], next_TK.shape)
        row_E = np.bincount(next_TK.ravel(), weight_TK.ravel(), experts + 1)[:experts]
        out_LE[layer] = row_E / max(row_E.sum(), 1e-300)
    return out_LE


def _first_fit(share_E: Floats, slots: int, ranks: int) -> Ints:
    """Replicas by n_e, heaviest first to the first rank with a slot and room for its load, else to the lightest: [S]"""
    count_E = np.maximum(np.ceil(ranks * share_E * (1 - 1e-12)), 1).astype(np.int64)  # n_e = N sum P(e) / N_t
    while count_E.sum() > slots:  # give back where a replica grows least heavy
        after_E = np.where(count_E > 1, share_E / np.maximum(count_E - 1, 1), np.inf)
        count_E[after_E.argmin()] -= 1
    while count_E.sum() < slots:
        count_E[(share_E / count_E).argmax()] += 1
    expert_S = np.repeat(np.arange(len(share_E)), count_E)
    load_S = (share_E / count_E)[expert_S]
    room = slots // ranks
    load_G, filled_G = np.zeros(ranks), np.zeros(ranks, np.int64)
    table_GQ = np.empty((ranks, room), np.int64)
    for slot in np.argsort(-load_S, kind="stable"):
        fits_G = (filled_G < room) & (load_G + load_S[slot] <= (1 + 1e-9) / ranks)
        open_G = np.where(filled_G < room, load_G, np.inf)
        rank = int(fits_G.argmax()) if fits_G.any() else int(open_G.argmin())
        table_GQ[rank, filled_G[rank]] = expert_S[slot]
        filled_G[rank] += 1
        load_G[rank] += load_S[slot]
    return table_GQ.ravel()
