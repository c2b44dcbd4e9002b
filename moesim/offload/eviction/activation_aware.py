"""Activation-aware: who the running sequences, all traffic and the layers' order make least likely leaves."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import AnyArray, IntArray
from moesim.offload import OffloadContext, StepRoutes
from moesim.offload.ranked import ArrayEviction
from moesim.spec import Spec

__all__ = ["Policy"]

_LEAST = 1e-6
"""added to each factor, so that one that is nought does not hide the others (MoE-Infinity's constant)"""


class Policy(Spec):
    """MoE-Infinity's (arXiv:2401.14361), from its code. form: which of the two rules found there.

    - `scores`: the least product of three factors leaves (`priority_score`): the share of its layer's activations that
      the expert has in the running sequences, its share of all uses, and a weight of its layer. layers: that weight;
      `to_come` gives layer i of L that is still to come in this step 1 - i / L and all others 1 (the code's: prefetch
      has time for late layers), `none` gives all 1.
    - `visits`: the expert with the fewest uses leaves, of equals the lower id, then the lower layer (the rule of the
      C++ engine, which does not ask the Python side).

    Ours: encoder and decoder halves are one stack, since models of today have no encoder; where several sequences run,
    their counts are summed (the code looks at one); counts of a layer enter when its look-up is made. sequences: counts
    are kept of so many, the oldest go first (the size of MoE-Infinity's store of traces).
    """

    knows_future: ClassVar[bool] = False

    form: Literal["scores", "visits"] = "scores"
    layers: Literal["to_come", "none"] = "to_come"
    sequences: int = Field(default=1000, ge=1)

    def start(self, context: OffloadContext) -> _Visits:
        """See `moesim.offload.EvictionPolicy.start`."""
        if self.form == "visits":
            return _Visits(context)
        return _Scores(context, self.layers == "to_come", self.sequences)


class _Visits(ArrayEviction):
    def __init__(self, context: OffloadContext) -> None:
        super().__init__(context.group_K)
        self._experts, self._layers = context.num_experts, context.num_layers
        self._uses_K = np.zeros(context.num_keys, np.int64)

    def ranks(self, key_M: IntArray, now: int) -> tuple[AnyArray, ...]:
        """Uses, then the expert's id; of equals the lower key leaves, which is the lower layer."""
        return self._uses_K[key_M], key_M % self._experts

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        self._uses_K[key] += 1


class _Scores(_Visits):
    def __init__(self, context: OffloadContext, to_come: bool, sequences: int) -> None:
        super().__init__(context)
        self._to_come, self._keep = to_come, sequences
        self._layer = -1
        """of the last look-up"""
        self._uses = 0
        self._rows: dict[int, dict[int, int]] = {}
        """key -> sequence -> choices of this step whose look-up has not been made"""
        self._running: list[int] = []
        self._count: dict[int, IntArray] = {}
        """activations by sequence, [L * E]"""
        self._sum_K = np.zeros(context.num_keys, np.int64)
        """of the running sequences"""
        self._sum_L = np.zeros(context.num_layers, np.int64)

    def ranks(self, key_M: IntArray, now: int) -> tuple[AnyArray, ...]:
        """priority_score of moe_infinity/memory/expert_priority_score.py: topology * sequence * frequency."""
        layer_M = key_M // self._experts
        sum_M = self._sum_L[layer_M]
        share_M = np.where(sum_M > 0, self._sum_K[key_M] / np.maximum(sum_M, 1), 1 / self._experts) / self._layers
        frequency_M = self._uses_K[key_M] / self._uses if self._uses else np.full(len(key_M), 1 / len(self._uses_K))
        weight_L = np.ones(self._layers)
        if self._to_come:
            layer_L = np.arange(self._layers)
            weight_L = np.where(layer_L > self._layer, 1 - layer_L / self._layers, 1.0)
        topology_M = weight_L[layer_M] / (weight_L.sum() * self._experts)
        return ((topology_M + _LEAST) * (share_M + _LEAST) * (frequency_M + _LEAST),)

    def begin(self, step: StepRoutes) -> None:
        """See Eviction. A layer's routes are taken from the step when its look-up is made, not before."""
        self._layer = -1
        sequences, index_T = np.unique(step.sequence_T, return_inverse=True)
        keys = len(self._uses_K)
        ids_TLK = np.asarray(step.expert_TLK, np.int64)
        key_TLK = ids_TLK + np.arange(self._layers)[None, :, None] * self._experts
        both, count = np.unique((index_T[:, None, None] * keys + key_TLK)[ids_TLK < self._experts], return_counts=True)
        self._rows = {}
        for number, rows in zip(both.tolist(), count.tolist(), strict=True):
            self._rows.setdefault(number % keys, {})[int(sequences[number // keys])] = rows
        if sequences.tolist() != self._running:
            self._run(sequences.tolist())

    def _run(self, sequences: list[int]) -> None:
        """Sum the counts of these sequences; forget the oldest of too many others."""
        self._running = sequences
        for sequence in sequences:  # the running ones are the newest
            self._count[sequence] = self._count.pop(sequence, np.zeros(len(self._uses_K), np.int64))
        for sequence in list(self._count)[: max(0, len(self._count) - max(self._keep, len(sequences)))]:
            del self._count[sequence]
        self._sum_K = np.sum([self._count[sequence] for sequence in sequences], axis=0)
        self._sum_L = self._sum_K.reshape(self._layers, self._experts).sum(axis=1)

    def used(self, key: int, now: int) -> None:
        """See Eviction."""
        super().used(key, now)
        self._uses += 1
        self._layer = key // self._experts
        for sequence, rows in self._rows.pop(key, {}).items():
            self._count[sequence][key] += rows
            self._sum_K[key] += rows
            self._sum_L[self._layer] += rows
