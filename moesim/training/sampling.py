"""Which tokens of a training step are routed and stand for all.

Where a capacity limits the tokens of a rank or sequence, or a router balances within them, half of a scope is no small
scope: ceilings, least capacities and segments are those of whole ones. So whole scopes are routed, fewer of them: of
fewer replicas, fewer micro-batches or fewer ranks of each, in this order, since a micro-batch whose ranks are all there
has the loads that it would have. Only a scope that alone exceeds what may be routed is cut. Tokens that nothing couples
are taken from every rank alike.

Legend: M micro-batches, R replicas, D data-parallel ranks of one, E experts, L MoE layers, T tokens of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from moesim.arrays import IntArray
from moesim.training_spec import TrainingSpec

__all__ = ["Sampling", "Scope", "Shape", "offsets", "plan", "spread"]

Scope = Literal["sequence", "rank", "all"]
"""tokens that share a capacity or are balanced together: a sequence, a rank's micro-batch, a replica's"""

_CELLS = 1 << 26
"""scores of one layer and step held at once (256 MiB)"""
_TOKENS, _STEP_CELLS = 8192, 1 << 29
"""tokens of a micro-batch, and scores of a step's layers, unless a scenario says how many tokens"""
_STRETCH = 128
"""tokens side by side where a sequence is cut, so that segments stay whole"""


class Shape(NamedTuple):
    """How many there are in a step."""

    micro_batches: int
    replicas: int
    ranks: int
    """data-parallel ranks of a replica"""
    experts: int
    layers: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """`micro_batches`, `replicas` and `ranks` of each that are routed, and of `shape` the ones that they stand for.
    routed, real: tokens of such a rank that are routed, and that it has. kind: `all`; `tokens` that nothing couples;
    whole `scopes`; `parts` of scopes. scope: what couples tokens; None: nothing does.
    """

    kind: Literal["all", "tokens", "scopes", "parts"]
    scope: Scope | None
    shape: Shape
    micro_batches: int
    replicas: int
    ranks: int
    routed: int
    real: int

    @property
    def tokens_routed(self) -> int:
        """Tokens of a step and layer that are routed."""
        return self.micro_batches * self.replicas * self.ranks * self.routed

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.shape.micro_batches * self.shape.replicas * self.shape.ranks * self.real

    @property
    def groups(self) -> int:
        """Micro-batches of replicas that are routed."""
        return self.micro_batches * self.replicas

    @property
    def scale(self) -> float:
        """Tokens of a replica's micro-batch that one of its routed tokens stands for."""
        return self.shape.ranks * self.real / (self.ranks * self.routed)


def plan(shape: Shape, training: TrainingSpec, scope: Scope | None) -> Sampling:
    """The sample of every step of a training run whose tokens `scope` couples (the widest, where several do)."""
    micros, replicas, ranks, experts, layers = shape
    real = training.micro_batch_sequences * training.sequence_tokens
    cells = experts * micros  # of one token a micro-batch and layer
    wished = training.routing_tokens or max(1, min(_TOKENS, _STEP_CELLS // (cells * layers)))
    total = max(1, min(wished * micros, _CELLS // experts))
    most = min(training.routing_tokens or total, total)  # of one micro-batch
    if micros * replicas * ranks * real <= total and replicas * ranks * real <= most:
        return Sampling("all", scope, shape, micros, replicas, ranks, real, real)
    if scope is None:
        routed = min(real, max(1, min(wished, _CELLS // cells) // (ranks * replicas)))
        return Sampling("tokens" if routed < real else "all", scope, shape, micros, replicas, ranks, routed, real)
    if most < real:
        length = training.sequence_tokens
        routed = most // length * length if scope == "sequence" and most >= length else most
        whole = scope == "sequence" and routed % length == 0
        kind: Literal["scopes", "parts"] = "scopes" if whole else "parts"
        return Sampling(kind, scope, shape, min(micros, total // routed), 1, 1, routed, real)
    some = min(ranks, most // real)
    of_micro = min(replicas, most // (some * real))
    some_micros = min(micros, total // (some * real))
    kind = "parts" if scope == "all" and some < ranks else "scopes"
    return Sampling(
        kind, scope, shape, some_micros, min(of_micro, total // (some * real) // some_micros), some, real, real
    )


def spread(some: int, of: int) -> tuple[IntArray, IntArray]:
    """Numbers of `some` of `of` things, evenly spaced, and for each of the `of` which of those stands for it."""
    stands = np.arange(of, dtype=np.int64) * some // of
    return np.searchsorted(stands, np.arange(some)).astype(np.int64), stands


def offsets(sampling: Sampling, sequence_tokens: int, couples: bool) -> IntArray:
    """Places of the routed tokens among their rank's [T], rising.

    Tokens that nothing but a rank's capacity joins: evenly spaced, so that all sequences and positions are met alike.
    Of sequences that matter as a whole, as many whole ones as go in; less than one: of the middle one. A router that
    balances sees stretches of neighbours.
    """
    routed, real = sampling.routed, sampling.real
    if not couples and sampling.scope != "sequence":
        return _spaced(routed, real)
    sequences, there = routed // sequence_tokens, real // sequence_tokens
    if not sequences:
        within_T = _stretches(routed, sequence_tokens) if couples else _spaced(routed, sequence_tokens)
        return there // 2 * sequence_tokens + within_T
    whole = _spaced(sequences, there).tolist()
    at = [q * sequence_tokens + np.arange(sequence_tokens, dtype=np.int64) for q in whole]
    if rest := routed - sequences * sequence_tokens:
        cut = next(q for q in range(there) if q not in whole)
        at.append(cut * sequence_tokens + _stretches(rest, sequence_tokens))
    return np.sort(np.concatenate(at))


def _spaced(some: int, of: int) -> IntArray:
    """In the middle of each of `some` stretches."""
    return (2 * np.arange(some, dtype=np.int64) + 1) * of // (2 * some)


def _stretches(some: int, of: int) -> IntArray:
    """Stretches of neighbours that begin at multiples of their length."""
    places, needed = -(-of // _STRETCH), -(-some // _STRETCH)
    begin_N = _spaced(min(needed, places), places) * _STRETCH
    at_T = (begin_N[:, None] + np.arange(_STRETCH)).ravel()
    at_T = at_T[at_T < of]
    if len(at_T) < some:  # the last stretch of the sequence is short: fill up from what is left
        left_T = np.setdiff1d(np.arange(of), at_T)
        at_T = np.sort(np.concatenate([at_T, left_T[: some - len(at_T)]]))
    return np.asarray(at_T[:some], np.int64)
