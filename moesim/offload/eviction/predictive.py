"""Predictive: what a predictor says the layers to come need stays, what it was wrong about leaves first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from moesim.arrays import AnyArray, IntArray
from moesim.offload import OffloadContext, StepRoutes
from moesim.offload.ranked import ArrayEviction, Recency
from moesim.rng import generator
from moesim.spec import Spec

__all__ = ["Policy"]


class Policy(Spec):
    """ExpertFlow's predictive locality-aware expert caching (arXiv:2410.17954v2): a small model predicts the routes of
    all layers before a step runs; slots are dealt to layers in proportion to the experts predicted for them, slots of
    layers that have run serve later ones, and experts that were predicted and not used go to the end of the queue.

    A reconstruction: the paper states these rules in words. Leaving first to last:
    1. predicted for a layer that has been looked up in this step, and not used by it;
    2. of layers that hold more than their share of the group's slots (experts predicted for the layer over those
       predicted for all layers of the group, times the experts that are there);
    3. all others, used ones of layers that have run among them;
    4. predicted for a layer to come, the last layer first.
    Within a class the least recently touched leaves. Misses are fetched before anything prefetched by the driver.

    accuracy: the probability that an expert that a step needs in a layer is predicted; for every one that is not,
    another one is predicted in its place, each as likely as any other (ours: real predictors err towards popular ones).
    The default is what ProMoE states of its predictor (84.7 %); ExpertFlow's own was not found. What is predicted is
    drawn by step number. The routes of a step's later layers are known to this policy through the predictor alone, and
    those of later steps not at all.
    """

    knows_future: ClassVar[bool] = False

    accuracy: float = Field(default=0.85, ge=0, le=1)

    def start(self, context: OffloadContext) -> _Predictive:
        """See `moesim.offload.EvictionPolicy.start`."""
        return _Predictive(context, self.accuracy)


class _Predictive(ArrayEviction):
    def __init__(self, context: OffloadContext, accuracy: float) -> None:
        super().__init__(context.group_K)
        self._context, self._accuracy = context, accuracy
        self._layer = -1
        """of the last look-up in this step"""
        self._predicted_K = np.zeros(context.num_keys, bool)
        self._demand_L = np.zeros(context.num_layers, np.int64)
        self._used_K = np.zeros(context.num_keys, bool)
        """in this step"""
        self._layers_G = [np.unique(keys // context.num_experts) for keys in self._keys_G]
        self._held_L = np.zeros(context.num_layers, np.int64)
        """experts of each layer that are there"""
        self._recency = Recency(context.group_K)
        self._last_K = np.zeros(context.num_keys, np.int64)

    def ranks(self, key_M: IntArray, now: int) -> tuple[AnyArray, ...]:
        """Class, layers to come (the nearest is worth most), the last touch."""
        if not len(key_M):
            return (key_M,)
        layer_M = key_M // self._context.num_experts
        to_come_M = layer_M > self._layer
        predicted_M = self._predicted_K[key_M]
        wrong_M = predicted_M & ~to_come_M & ~self._used_K[key_M]
        wanted_M = predicted_M & to_come_M
        over_L = self._over_share(self._group[int(key_M[0])])
        class_M = np.where(wrong_M, 1, np.where(wanted_M, 4, 3 - over_L[layer_M]))
        return class_M, np.where(wanted_M, -layer_M, 0), self._last_K[key_M]

    def _over_share(self, group: int) -> AnyArray:
        """Layers of a group that hold more than their share of what is there: bool [L]."""
        layers = self._layers_G[group]
        demand, held = int(self._demand_L[layers].sum()), int(self._held_L[layers].sum())
        # held of a layer / held of the group > demand of the layer / demand of the group, in whole numbers
        over_L: AnyArray = self._held_L * demand > self._demand_L * held
        return over_L

    def begin(self, step: StepRoutes) -> None:
        """See Eviction: the predictor runs."""
        layers, experts = self._context.num_layers, self._context.num_experts
        needed_LE = np.zeros((layers, experts + 1), bool)
        for layer in range(layers):
            needed_LE[layer, np.minimum(step.expert_TLK[:, layer].ravel(), experts)] = True
        needed_LE = needed_LE[:, :experts]
        rng = generator(self._context.seed, "predictive eviction", step.number)
        right_LE = needed_LE & (rng.random((layers, experts)) < self._accuracy)
        wrong = needed_LE.sum(axis=1) - right_LE.sum(axis=1)
        # of the others as many as were overlooked, those with the least of equal draws
        draw_LE = np.where(needed_LE, 2.0, rng.random((layers, experts)))
        place_LE = np.argsort(np.argsort(draw_LE, axis=1, kind="stable"), axis=1, kind="stable")
        predicted_LE = right_LE | ((place_LE < wrong[:, None]) & ~needed_LE)
        self._predicted_K = predicted_LE.reshape(-1)
        self._demand_L = predicted_LE.sum(axis=1)
        self._used_K[:] = False
        self._layer = -1

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        self._layer = key // self._context.num_experts
        self._used_K[key] = True
        self._recency.used(key, now)
        self._last_K[key] = self._recency.last_K[key]

    def loaded(self, key: int, now: int, prefetched: bool) -> None:
        """See Eviction."""
        self._recency.loaded(key, now, prefetched)
        self._last_K[key] = self._recency.last_K[key]
        super().loaded(key, now, prefetched)
        self._held_L[key // self._context.num_experts] += 1

    def evicted(self, key: int) -> None:
        """See Eviction."""
        super().evicted(key)
        self._held_L[key // self._context.num_experts] -= 1
