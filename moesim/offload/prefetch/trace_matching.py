"""Which recorded sequence is this one like, and what did that one use next (MoE-Infinity, arXiv 2401.14361;
EfficientMoE/MoE-Infinity, `expert_tracer.py`, `expert_predictor.py`, `expert_prefetcher.py`).

A sequence's activations are counted in a matrix [L, E]. A store holds such matrices of whole sequences; the one whose
rows point where this sequence's rows do (mean cosine) says what later layers will use, weighted down with distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import FloatArray, IntArray
from moesim.offload import OffloadContext, RouteSample, StepRoutes, Wanted
from moesim.offload.prefetch.naming import Limited, fit_of
from moesim.rng import generator

__all__ = ["Policy", "cluster", "matrices"]


class Policy(Limited):
    """capacity: matrices stored, 1,000 in the source. rows: over which the cosine is taken: `seen`, all in which the
    sequence has been counted so far (the paper: for the first token those up to this layer); `later`, as the code has
    it, where rows of stored matrices up to this layer are blanked, so that only what earlier tokens used of the layers
    to come counts. decay: predicted rows are weighted 1 - distance / (L + 1) as in the code; `none`: not at all.
    threshold: least chance that a token takes the expert for which it is fetched; the code fetches all there are (0).
    names: experts of a layer and sequence; None: all over the threshold. ahead: layers; None: all later ones, as in the
    code. keep: which matrices are kept where there are more sequences than capacity: one member of each of so many
    clusters (the paper; k-means over mean cosines, the member nearest to its centre) or the `latest`. learn: a sequence
    that is not in a step any more is taken to be finished, and its matrix stored; where the store is full it replaces
    the one matched least often among those learnt while serving (the code), never one that was fitted.
    """

    capacity: Annotated[int, Field(ge=1, le=1 << 20)] = 1000
    rows: Literal["seen", "later"] = "seen"
    decay: Literal["linear", "none"] = "linear"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    names: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    ahead: Annotated[int, Field(ge=1, le=512)] | None = None
    keep: Literal["cluster", "latest"] = "cluster"
    learn: bool = True

    def start(self, context: OffloadContext) -> _Matching:
        """See `moesim.offload.PrefetchPolicy.start`. Raises BadInput where there is nothing to fit on."""
        return _Matching(context, self, fit_of(context, "trace_matching"))


def matrices(fit: RouteSample, num_experts: int) -> FloatArray:
    """Activations of each sequence, float64 [Q, L, E], in the order in which sequences start."""
    _, first, row_T = np.unique(fit.sequence_T, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    row_T = rank[row_T]
    layers = fit.expert_TLK.shape[1]
    out = np.zeros((len(first), layers, num_experts + 1))
    ids = np.minimum(fit.expert_TLK.astype(np.int64), num_experts)
    np.add.at(out, (row_T[:, None, None], np.arange(layers)[None, :, None], ids), 1.0)
    return out[:, :, :num_experts]


def unit(count_QLE: FloatArray) -> FloatArray:
    """Rows of length 1; empty ones stay empty."""
    length = np.linalg.norm(count_QLE, axis=-1, keepdims=True)
    out: FloatArray = np.divide(count_QLE, length, out=np.zeros_like(count_QLE), where=length > 0)
    return out


def cluster(count_QLE: FloatArray, capacity: int, seed: int, rounds: int = 20) -> IntArray:
    """Numbers [capacity] of the matrices kept: of each cluster the member nearest to its centre.

    k-means where the likeness of two matrices is the mean over layers of their rows' cosines (the paper's distance is 1
    minus that). First centres are drawn far apart (k-means++), by (seed); the rest is deterministic.
    """
    unit_QLE = unit(count_QLE)
    number, layers = unit_QLE.shape[:2]
    if number <= capacity:
        return np.arange(number)
    flat_QX = unit_QLE.reshape(number, -1) / np.sqrt(layers)
    rng = generator(seed, "prefetch/trace_matching/cluster")
    chosen = [int(rng.integers(number))]
    far_Q = np.maximum(1 - flat_QX @ flat_QX[chosen[0]], 0)
    while len(chosen) < capacity:
        total = far_Q.sum()
        pick = int(np.searchsorted(np.cumsum(far_Q), rng.random() * total)) if total > 0 else len(chosen)
        chosen.append(min(pick, number - 1))
        far_Q = np.minimum(far_Q, np.maximum(1 - flat_QX @ flat_QX[chosen[-1]], 0))
    centre_CX = flat_QX[chosen]
    home_Q = np.full(number, -1)
    for _ in range(rounds):
        new_Q = np.argmax(flat_QX @ centre_CX.T, axis=1)
        if (new_Q == home_Q).all():
            break
        home_Q = new_Q
        for c in range(capacity):
            if (home_Q == c).any():
                mean_LE = flat_QX[home_Q == c].mean(axis=0).reshape(layers, -1)
                centre_CX[c] = (unit(mean_LE) / np.sqrt(layers)).reshape(-1)
    likeness_QC = flat_QX @ centre_CX.T
    nearest = [np.where(home_Q == c, likeness_QC[:, c], -np.inf) for c in range(capacity) if (home_Q == c).any()]
    return np.sort(np.array([int(np.argmax(n)) for n in nearest], np.int64))


class _Matching:
    def __init__(self, context: OffloadContext, policy: Policy, fit: RouteSample) -> None:
        self._context, self._policy = context, policy
        count_QLE = matrices(fit, context.num_experts)
        if policy.keep == "latest":
            kept = np.arange(max(0, len(count_QLE) - policy.capacity), len(count_QLE))
        else:
            kept = cluster(count_QLE, policy.capacity, context.seed)
        self._fitted = len(kept)
        self._store: list[FloatArray] = [_shares(count_QLE[q]) for q in kept]
        self._unit_PLE = unit(count_QLE[kept])
        self._matched = [0] * len(kept)
        self._count: dict[int, FloatArray] = {}
        self._cosine: dict[int, FloatArray] = {}
        self._rows: dict[int, IntArray] = {}
        self._step: StepRoutes | None = None

    def begin(self, step: StepRoutes) -> None:
        """See Prefetch."""
        rows: dict[int, list[int]] = {}
        for row, sequence in enumerate(step.sequence_T.tolist()):
            rows.setdefault(sequence, []).append(row)
        gone = [sequence for sequence in self._count if sequence not in rows]
        for sequence in gone:
            count_LE = self._count.pop(sequence)
            self._cosine.pop(sequence)
            if self._policy.learn:
                self._learn(count_LE)
        self._rows = {sequence: np.array(own, np.int64) for sequence, own in rows.items()}
        self._step = step

    def _learn(self, count_LE: FloatArray) -> None:
        if len(self._store) < self._policy.capacity:
            self._store.append(_shares(count_LE))
            self._unit_PLE = np.concatenate([self._unit_PLE, unit(count_LE)[None]])
            self._matched.append(1)
            at = len(self._store) - 1
            self._cosine = {
                s: np.vstack([c, (self._unit_PLE[at] * unit(self._count[s])).sum(axis=-1)[None]])
                for s, c in self._cosine.items()
            }
        elif self._fitted < len(self._store):
            at = self._fitted + int(np.argmin(self._matched[self._fitted :]))
            self._store[at], self._matched[at] = _shares(count_LE), 1
            self._unit_PLE[at] = unit(count_LE)
            for s, cosine_PL in self._cosine.items():
                cosine_PL[at] = (self._unit_PLE[at] * unit(self._count[s])).sum(axis=-1)

    def _see(self, sequence: int, layer: int) -> None:
        """Count what the sequence's tokens of this step took in `layer`."""
        assert self._step is not None
        experts = self._context.num_experts
        if sequence not in self._count:
            self._count[sequence] = np.zeros((self._context.num_layers, experts))
            self._cosine[sequence] = np.zeros((len(self._store), self._context.num_layers))
        ids = np.asarray(self._step.expert_TLK[self._rows[sequence], layer]).ravel()
        row_E = self._count[sequence][layer]
        row_E += np.bincount(ids[ids < experts], minlength=experts)
        self._cosine[sequence][:, layer] = self._unit_PLE[:, layer] @ unit(row_E)

    def _match(self, sequence: int, layer: int) -> int:
        """The stored matrix most like the sequence's; the first of equal ones."""
        seen_L = self._count[sequence].sum(axis=1) > 0
        if self._policy.rows == "later":
            seen_L = seen_L & (np.arange(len(seen_L)) > layer)
        # the mean over rows: their number is the same for all stored matrices
        at = int(np.argmax(self._cosine[sequence] @ seen_L))
        self._matched[at] += 1
        return at

    def wanted(self, layer: int) -> list[Wanted]:
        """See Prefetch. Of the step it looks at the routes up to `layer` and of no later one."""
        context, policy = self._context, self._policy
        if layer < 0 or not self._rows:
            return []
        tokens = sum(len(rows) for rows in self._rows.values())
        last = context.num_layers - 1 if policy.ahead is None else min(layer + policy.ahead, context.num_layers - 1)
        worth_LE = np.zeros((context.num_layers, context.num_experts))
        for sequence, rows in self._rows.items():
            self._see(sequence, layer)
            chance_LE = np.minimum(self._store[self._match(sequence, layer)] * context.top_k, 1.0)
            worth_LE[layer + 1 : last + 1] += self._likely(chance_LE[layer + 1 : last + 1]) * len(rows) / tokens
        if policy.decay == "linear":
            distance_L = np.arange(context.num_layers) - layer
            worth_LE *= 1 - distance_L[:, None] / (context.num_layers + 1)
        worth = worth_LE.ravel()
        likely = np.flatnonzero(worth > 0)
        order = likely[np.argsort(-worth[likely], kind="stable")][: policy.limit]
        experts = context.num_experts
        out = [Wanted(key // experts, key % experts, float(worth[key])) for key in order.tolist()]
        return policy.cut(out, context.size_LE)

    def _likely(self, chance_LE: FloatArray) -> FloatArray:
        """Chances that are over the threshold and among the layer's largest, 0 elsewhere."""
        out = np.where(chance_LE >= self._policy.threshold, chance_LE, 0.0)
        names = self._policy.names
        if names is not None and names < chance_LE.shape[1]:
            order_LE = np.argsort(-chance_LE, axis=1, kind="stable")
            np.put_along_axis(out, order_LE[:, names:], 0.0, axis=1)
        return out

    def told(self, layer: int, found: Sequence[tuple[int, str]]) -> None:
        """See Prefetch."""


def _shares(count_LE: FloatArray) -> FloatArray:
    """Each row's share of its activations; empty rows stay empty."""
    total = count_LE.sum(axis=1, keepdims=True)
    out: FloatArray = np.divide(count_LE, total, out=np.zeros_like(count_LE), where=total > 0)
    return out
