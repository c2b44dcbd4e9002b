"""What a step asks of the layers on one device: whose weights serve each choice, and how often each is asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from moesim.arrays import AnyArray, BoolArray, IntArray
from moesim.offload import Compressed, OffloadContext, StepRoutes

__all__ = ["asked", "own_copy", "serves_LE"]


def own_copy(step: StepRoutes) -> StepRoutes:
    """A copy whose routes may be written."""
    weight = None if step.weight_TLK is None else step.weight_TLK.copy()
    return replace(step, expert_TLK=step.expert_TLK.astype(np.int64), weight_TLK=weight)


def serves_LE(context: OffloadContext, compressed: Compressed | None, held_LE: BoolArray | None) -> IntArray | None:
    """Which expert's weights serve each one on this device, num_experts: none; the last is of those that are no expert
    [L, E + 1]. None: each is served by its own."""
    if compressed is None and held_LE is None:
        return None
    layers, none = context.num_layers, context.num_experts
    own_LE = np.tile(np.arange(none), (layers, 1)) if compressed is None else compressed.map_LE
    serves_LE = np.concatenate([own_LE, np.full((layers, 1), none)], axis=1)
    if held_LE is not None:
        held = np.concatenate([held_LE, np.zeros((layers, 1), bool)], axis=1)
        serves_LE = np.where(held[np.arange(layers)[:, None], serves_LE], serves_LE, none)
    return serves_LE


def asked(ids_TLK: AnyArray, none: int, first: int = 0) -> list[tuple[list[int], list[int]]]:
    """By layer, from `first` on, the keys that are asked for, in order, and rows of each."""
    layers = ids_TLK.shape[1]
    place_TLK = np.minimum(ids_TLK, none) + np.arange(layers)[:, None] * (none + 1)
    count_LE = np.bincount(place_TLK.ravel(), minlength=layers * (none + 1)).reshape(layers, none + 1)[:, :none]
    layer_N, expert_N = np.nonzero(count_LE)
    keys, rows = (layer_N + first) * none + expert_N, count_LE[layer_N, expert_N]
    ends = [0, *np.searchsorted(layer_N, np.arange(layers), side="right").tolist()]
    key, row = keys.tolist(), rows.tolist()
    return [(key[a:b], row[a:b]) for a, b in itertools.pairwise(ends)]
