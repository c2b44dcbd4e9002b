"""Where a request's experts are: what a balancer may be told of requests, and how local the activations of a run were.

An activation, that is a token's choice of an expert in a layer, is local where the rank that the token is on holds that
expert. A target (data-parallel rank) of several tensor-parallel ranks counts as the mean of its ranks, to which its
tokens are dealt out.
"""

from __future__ import annotations

import numpy as np

from moesim.arrays import AnyArray, FloatArray, IntArray
from moesim.errors import BadInput, Problem
from moesim.layout import Layout
from moesim.placement import Placement, PlacementContext
from moesim.workload.replay import Replay

__all__ = ["local_activation_rate", "nearness", "row_nearness"]

_IDS = 1 << 20
"""expert ids looked up together"""


def row_nearness(expert_TLK: AnyArray, placement: Placement, layout: Layout) -> FloatArray:
    """Share of each token's activations that is local on each target: [T, D]. expert_TLK: ids, E for none."""
    layers, experts, targets = placement.num_layers, placement.num_experts, layout.dp
    part_D = np.arange(layout.ranks).reshape(targets, layout.tp) // layout.expert_tp
    held_LEP = np.zeros((layers, experts + 1, placement.num_ranks))
    layer, slot = np.nonzero(placement.held_LS)
    held_LEP[layer, placement.slot_to_expert_LS[layer, slot], placement.slot_to_rank_S[slot]] = 1.0
    held_LED = held_LEP[:, :, part_D].mean(axis=3)
    out = np.zeros((len(expert_TLK), targets))
    step = max(1, _IDS // (layers * expert_TLK.shape[2] * targets))
    each_L = np.arange(layers)[:, None]
    for lo in range(0, len(out), step):
        ids = expert_TLK[lo : lo + step]
        out[lo : lo + step] = held_LED[each_L, ids].sum(axis=(1, 2))
    taken_T = (expert_TLK < experts).sum(axis=(1, 2))
    return np.asarray(out / np.maximum(taken_T, 1)[:, None])


def nearness(
    predict: str, replay: Replay, context: PlacementContext | None, placement: Placement, layout: Layout
) -> FloatArray:
    """What a balancer is told of each request, from its prompt: the share of activations that is expected to be local
    on each target, [R, D].

    predict: `experts`, what the prompt really activates; `tokens`, the mean of tokens with the same vocabulary id in
    the sample that the placement was made for (unknown ids: the mean of all). Raises BadInput where ids are missing.
    """
    if predict == "experts":
        row_TD = row_nearness(replay.source.expert_TLK, placement, layout)
    else:
        row_TD = _by_token(replay, context, placement, layout)
    out = np.zeros((len(replay.prompt_R), row_TD.shape[1]))
    for request, prompt in enumerate(replay.prompt_R.tolist()):
        rows = replay.rows(np.full(prompt, request), np.arange(prompt))
        out[request] = row_TD[rows].mean(axis=0) if prompt else 0.0
    return out


def _by_token(replay: Replay, context: PlacementContext | None, placement: Placement, layout: Layout) -> FloatArray:
    token_T = replay.source.token_T
    sample = None if context is None else context.sample
    if token_T is None or sample is None or sample.token_T is None:
        raise BadInput(
            Problem(
                "policies.balancer",
                "semantic with predict: tokens looks prompts up by vocabulary id, and the routing"
                f" ({replay.source.source}), or that which the placement was made for, has none. Use a trace with"
                " token_id, or predict: experts, which knows what prompts activate and so is a bound",
            )
        )
    known_TD = row_nearness(sample.expert_TLK, placement, layout)
    tokens, place_T = np.unique(sample.token_T, return_inverse=True)
    table = np.zeros((len(tokens) + 1, known_TD.shape[1]))
    np.add.at(table, place_T, known_TD)
    table[:-1] /= np.bincount(place_T)[:, None]
    table[-1] = known_TD.mean(axis=0)
    at_T = np.minimum(np.searchsorted(tokens, token_T), len(tokens) - 1)
    return np.asarray(table[np.where(tokens[at_T] == token_T, at_T, len(tokens))])


def local_activation_rate(replay: Replay, target_R: IntArray, placement: Placement, layout: Layout) -> float:
    """Share of the activations of all served requests' tokens that was local. target_R: where requests went, below 0
    for those that were not served."""
    row_TD = row_nearness(replay.source.expert_TLK, placement, layout)
    total = tokens = 0.0
    for request in np.flatnonzero(target_R >= 0).tolist():
        computed = int(replay.computed_R[request])
        rows = replay.rows(np.full(computed, request), np.arange(computed))
        total += float(row_TD[rows, int(target_R[request]) % layout.dp].sum())
        tokens += computed
    return total / max(tokens, 1.0)
