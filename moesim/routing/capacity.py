"""Capacity: an expert takes at most C tokens of a scope; choices beyond are dropped, or go to another expert.

C = ceil(factor * T * K / E) over the T tokens of a scope: one rank's tokens, one sequence's, or all of them. Sources:
GShard (arXiv:2006.16668, algorithm 1: places go in position order, first choices before second ones; its 2 N / (G E) is
factor 1 with K = 2 and T = N / G), Switch (arXiv:2101.03961, section 2.2), Megatron-LM (`moe_token_drop_policy`: by
position or by probability; what is left is not renormalised).

C is Megatron-LM's alone. Not modelled: C rounded down, and without the factor K for two choices (Mesh-TensorFlow);
drops at random and gates divided by their sum again after drops (DeepSpeed); a second expert that is asked only by
chance (GShard, Mesh-TensorFlow).
Legend: T tokens, W places a token has, E experts, S scopes, N choices, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from moesim.routing.select import NONE
from moesim.spec import Spec

__all__ = ["CapacitySpec", "Limited", "capacity_of", "dropped_by_position", "limit"]

Floats = NDArray[Any]
Ids = NDArray[np.int32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Factor = float | None
Phase = Literal["prefill", "decode", "training"]


def _numbered(value: Any) -> Any:
    """Keys that are whole numbers written as text (JSON knows no others) as numbers."""
    if not isinstance(value, Mapping):
        return value
    return {int(k) if isinstance(k, str) and k.isascii() and k.isdecimal() else k: v for k, v in value.items()}


class CapacitySpec(Spec):
    """How much an expert takes and what becomes of the rest.

    factor: of an even share; none: no limit but where `layers` or a phase sets one. drop: choices beyond go by
    `position` (the earlier token stays), by `score` (the higher gate stays, the earlier token of equals), or `reroute`
    (as by position, then to the token's next best expert with room). order: by `choice`, first choices of all tokens go
    before second ones; by `token`, all choices of a token before the next token's. pad: kernels compute all C rows of
    every expert. scope: whose tokens share a capacity, each `rank`'s, each `sequence`'s or `all` (GShard's groups, N /
    G tokens each, are `rank` where a rank has one group). min_capacity: the least C. layers: factors of single MoE
    layers, counted from 0. prefill, decode: factors of a phase; a serving step with prompts and decodes is of the phase
    that has more of its tokens.
    """

    factor: float | None = Field(default=None, gt=0, le=1e6)
    drop: Literal["position", "score", "reroute"] = "position"
    order: Literal["choice", "token"] = "choice"
    pad: bool = False
    scope: Literal["rank", "sequence", "all"] = "rank"
    min_capacity: int = Field(default=0, ge=0, le=1 << 20)
    layers: Annotated[Mapping[int, float], BeforeValidator(_numbered)] = Field(default_factory=dict)
    prefill: float | None = Field(default=None, gt=0, le=1e6)
    decode: float | None = Field(default=None, gt=0, le=1e6)

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if self.factor is None and self.prefill is None and self.decode is None and not self.layers:
            raise ValueError("a capacity needs a factor, but factor, layers, prefill and decode are all left out")
        wrong = {layer: factor for layer, factor in self.layers.items() if layer < 0 or not 0 < factor <= 1e6}
        if wrong:
            raise ValueError(f"layers are counted from 0 and their factors are above 0 and at most 1e6, got {wrong}")
        return self

    def factor_of(self, layer: int, phase: Phase) -> float | None:
        """The factor of a MoE layer in a phase: the layer's own, else the phase's, else `factor`; None: no limit."""
        if layer in self.layers:
            return self.layers[layer]
        of_phase = {"prefill": self.prefill, "decode": self.decode}.get(phase)
        return self.factor if of_phase is None else of_phase


@dataclass(frozen=True, slots=True)
class Limited:
    """What is left of an assignment. `expert_TW`, `gate_TW`: as in `Routed`, NONE and 0 in the last places; gates of
    the choices kept are as they were, a rerouted choice keeps its gate. The masks [T, W] stand at the places that the
    choices had before: `wanted_TW` was a choice, `dropped_TW` found no place, `rerouted_TW` found one with another
    expert.
    """

    expert_TW: Ids
    gate_TW: Floats
    dropped_TW: Bools
    wanted_TW: Bools
    rerouted_TW: Bools

    @property
    def wanted(self) -> int:
        """Choices before the limit."""
        return int(np.count_nonzero(self.wanted_TW))

    @property
    def dropped(self) -> int:
        """Choices that found no place."""
        return int(np.count_nonzero(self.dropped_TW))


def capacity_of(tokens: int, top_k: float, experts: int, factor: float, least: int = 0) -> int:
    """C = ceil(factor * T * K / E), at least `least`: Switch (arXiv:2101.03961), eq. 3, with K choices a token.

    Exact: the factor counts as the decimal number that was written, so 1.1 * 10 is 11 and not a little more.
    """
    share = Fraction(repr(float(factor))) * tokens * Fraction(repr(float(top_k))) / experts
    return max(least, math.ceil(share))


def limit(
    expert_TW: Ids,
    gate_TW: Floats,
    score_TE: Floats | None,
    capacity: int | Ints,
    spec: CapacitySpec,
    scope_T: Ints | None = None,
) -> Limited:
    """Hold every expert to `capacity` tokens of each scope.

    `score_TE`: what `reroute` ranks experts by (-inf: never); None: the others. `capacity`: one for all scopes, or [S].
    `scope_T`: the scope 0 .. S - 1 of each token (None: one for all). Raises ValueError for a reroute without scores.
    """
    wanted_TW = expert_TW != NONE
    room_S = np.asarray(capacity, np.int64)
    if room_S.ndim == 0:
        room_S = np.full(1 if scope_T is None else int(scope_T.max(initial=0)) + 1, room_S)
    scopes = len(room_S)
    scope_T = np.zeros(len(expert_TW), np.int64) if scope_T is None else np.asarray(scope_T, np.int64)
    experts = _experts(expert_TW, score_TE)
    group_TW = scope_T[:, None] * experts + np.maximum(expert_TW, 0)
    kept_TW = _kept(group_TW, wanted_TW, gate_TW, room_S, experts, spec)
    moved_TW = np.where(kept_TW, expert_TW, NONE).astype(np.int32)
    if spec.drop == "reroute":
        if score_TE is None:
            raise ValueError("drop: reroute needs scores to name a token's next best expert, but there are none")
        left_SE = np.repeat(room_S, experts) - np.bincount(group_TW[kept_TW], minlength=scopes * experts)
        _reroute(moved_TW, expert_TW, score_TE, left_SE, scope_T, spec.order)
    stays_TW = moved_TW != NONE
    front_TW = np.argsort(~stays_TW, axis=1, kind="stable")
    gate_TW = np.where(stays_TW, gate_TW, 0).astype(gate_TW.dtype)
    return Limited(
        np.take_along_axis(moved_TW, front_TW, 1), np.take_along_axis(gate_TW, front_TW, 1),
        wanted_TW & ~stays_TW, wanted_TW, stays_TW & ~kept_TW,
    )  # fmt: skip


def _experts(expert_TW: Ids, score_TE: Floats | None) -> int:
    return int(expert_TW.max(initial=0)) + 1 if score_TE is None else score_TE.shape[1]


def _narrow(key_N: Ints, cells: int) -> NDArray[Any]:
    """Keys below `cells` in 16 bits where they fit: NumPy sorts those by radix."""
    return key_N.astype(np.uint16) if cells <= 1 << 16 else key_N


def _kept(group_TW: Ints, wanted_TW: Bools, gate_TW: Floats, room_S: Ints, experts: int, spec: CapacitySpec) -> Bools:
    """The choices among the first C of their (scope, expert), in the order of `spec`."""
    by_choice = spec.order == "choice" and spec.drop != "score"
    if by_choice:
        wanted_TW, group_TW = wanted_TW.T, group_TW.T
    at_N = np.flatnonzero(wanted_TW)
    group_N = group_TW.ravel()[at_N]
    cells = len(room_S) * experts
    if spec.drop == "score":
        sorted_N = np.lexsort((-gate_TW.ravel()[at_N], _narrow(group_N, cells)))
    else:
        sorted_N = np.argsort(_narrow(group_N, cells), kind="stable")
    count = np.bincount(group_N, minlength=cells)
    first = np.cumsum(count) - count
    rank_N = np.arange(len(at_N)) - np.repeat(first, count)
    fits_N = rank_N < np.repeat(np.repeat(room_S, experts), count)
    kept_N = np.zeros(wanted_TW.size, bool)
    kept_N[at_N[sorted_N]] = fits_N
    kept_TW = kept_N.reshape(wanted_TW.shape)
    return kept_TW.T if by_choice else kept_TW


def _reroute(moved_TW: Ids, expert_TW: Ids, score_TE: Floats, left_SE: Ints, scope_T: Ints, order: str) -> None:
    """Give the choices that were dropped, in order, to their tokens' best other experts with room; in place.

    By token, a token's dropped choices go at once; by choice, the first choices of all tokens go before the second.
    """
    dropped_TW = (expert_TW != NONE) & (moved_TW == NONE)
    row_N = np.flatnonzero(dropped_TW.any(1))
    if not len(row_N):
        return
    score_NE = score_TE[row_N].astype(np.float64)
    for place in range(expert_TW.shape[1]):
        had_N = np.flatnonzero(expert_TW[row_N, place] != NONE)
        score_NE[had_N, expert_TW[row_N[had_N], place]] = -np.inf
    for places in [slice(None)] if order == "token" else [slice(w, w + 1) for w in range(expert_TW.shape[1])]:
        due_NW = dropped_TW[row_N, places]
        busy_N = np.flatnonzero(due_NW.any(1))
        due_NW, row_B = due_NW[busy_N], row_N[busy_N]
        number_N = due_NW.sum(1)
        taken_NW = _serve(score_NE[busy_N], number_N, scope_T[row_B], left_SE)
        found_NW = np.full(due_NW.shape, NONE, np.int32)
        found_NW[due_NW] = taken_NW[np.arange(taken_NW.shape[1]) < number_N[:, None]]
        block_NW = moved_TW[row_B, places]
        moved_TW[row_B, places] = np.where(due_NW, found_NW, block_NW)
        hit_N, hit_W = np.nonzero(taken_NW != NONE)
        score_NE[busy_N[hit_N], taken_NW[hit_N, hit_W]] = -np.inf


def _serve(score_NE: Floats, number_N: Ints, scope_N: Ints, left_SE: Ints) -> Ids:
    """Token after token takes its `number_N` best experts that still have room (and a score above -inf): [N, most],
    best first, NONE behind. Takes the room off `left_SE`.

    In rounds: all take their best ones among those open to them; an expert over its room closes to all behind the
    last token that it can serve. An expert closes to a token only when enough tokens before it hold it, and those never
    let go, so that what is left when nobody is turned away is what serving one after the other gives (the stable
    matching under one order of tokens is unique: Gale and Shapley 1962).
    """
    tokens, experts = score_NE.shape
    most = int(number_N.max(initial=0))
    base_N1 = (scope_N * experts)[:, None]
    order_NE = np.argsort(-score_NE, axis=1, kind="stable")
    cell_NE = base_N1 + order_NE
    usable_NE = ~np.isneginf(np.take_along_axis(score_NE, order_NE, 1))
    cut_SE = np.where(left_SE > 0, tokens, 0)  # an expert serves tokens before its cut
    token_N1 = np.arange(tokens)[:, None]
    while True:
        open_NE = usable_NE & (token_N1 < cut_SE[cell_NE])
        asks_NE = open_NE & (np.cumsum(open_NE, 1) <= number_N[:, None])
        who_A, place_A = np.nonzero(asks_NE)
        cell_A = cell_NE[who_A, place_A]
        sorted_A = np.argsort(_narrow(cell_A, len(left_SE)), kind="stable")
        count_SE = np.bincount(cell_A, minlength=len(left_SE))
        over_X = np.flatnonzero(count_SE > left_SE)
        if not len(over_X):
            break
        first_SE = np.cumsum(count_SE) - count_SE
        cut_SE[over_X] = who_A[sorted_A[first_SE[over_X] + left_SE[over_X]]]
    left_SE -= count_SE
    out_NW = np.full((tokens, most), NONE, np.int32)
    out_NW[who_A, (np.cumsum(asks_NE, 1) - 1)[who_A, place_A]] = order_NE[who_A, place_A]
    return out_NW


def dropped_by_position(dropped_TW: Bools, wanted_TW: Bools, share_T: Floats, bins: int = 10) -> tuple[Ints, Ints]:
    """Choices dropped and choices wanted by place in the sequence, int64 [B] each: to be added up, then divided.

    `share_T`: a token's position over the length of its sequence, 0 .. 1 (OpenMoE, arXiv:2402.01739, figure 12).
    """
    bin_T = np.clip((np.asarray(share_T) * bins).astype(np.int64), 0, bins - 1)
    dropped_B = np.bincount(bin_T, dropped_TW.sum(1), minlength=bins).astype(np.int64)
    wanted_B = np.bincount(bin_T, wanted_TW.sum(1), minlength=bins).astype(np.int64)
    return dropped_B, wanted_B
