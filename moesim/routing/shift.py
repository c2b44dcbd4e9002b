"""Test-time re-mixing: scores or gates are shifted before the choice, nothing learnt anew.

One rule, score + delta, then top-k, and the papers differ in delta; C3PO mixes gates instead.
Steering: named experts `boost`ed by a constant. RICE (arXiv:2505.14681) multiplies the gates of two experts where they
are chosen anyway: `chosen_only`, e^by times the gate (to divide by the sum again where the model normalises is ours).
Expert silencing (L3, arXiv:2602.08741): named experts at -inf.
C3PO (arXiv:2504.07964), kernel regression: a token's gates of all experts, before the choice, move towards the
similarity-weighted mean of its nearest neighbours', w <- (1 - mix) w + mix w^, for the last token in the last five
layers; the choice is by the mixed gates. The authors' code replaces w altogether (mix 1), as we do by default; the
paper searches for the share. Its neighbours are solved samples, near by the embedding of the question; ours are the
other rows of the batch (reconstruction), near by cosine of the hidden states, or of the scores' rows where there are
none.
Rewiring (arXiv:2510.14853): a delta per layer and context, from 0, found by gradient steps on the context's own loss as
it is read. There is no loss here (reconstruction): the step goes towards the experts whose mean gate in the latest
tokens is above the running mean of all before them. It is taken in training steps and in a simulation's warm-up on
tokens of the pool; what a simulation serves has the delta of that warm-up, one for all requests.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.routing import Arrays, Floats, Routed, Router, RoutingContext, top_ids
from moesim.routing.gating import plain, probabilities, weigh
from moesim.routing.select import check_top_k, close_as
from moesim.spec import Spec

__all__ = ["Boost", "Policy"]

Expert = Annotated[int, Field(ge=0, lt=65536)]
Experts = Annotated[tuple[Expert, ...], Field(strict=False, max_length=65536)]
_CELLS = 1 << 24
"""Numbers held at once (similarities, neighbours' scores): bounds the memory of the search for neighbours."""


class Boost(Spec):
    """`by` is added to the scores of the experts `ids` (logits: the odds of each are multiplied by e^by).

    chosen_only: their gates are multiplied by e^by where they are chosen, and the choice stays as it is.
    """

    ids: Experts
    by: float = Field(ge=-80, le=80)
    chosen_only: bool = False


class Policy(Router):
    """boost, silence: experts by id, in every layer the shift reaches. neighbours, mix: how many near rows, and the
    share of the way towards the mean of their gates. step, every: Rewiring's step, taken when so many tokens have
    passed (while serving none is taken: a simulation does not hand states on). last_layers: shift in the last so
    many layers alone; none: in all. last_token: only the last token of each sequence moves to its neighbours."""

    boost: Boost | None = None
    silence: Experts = ()
    neighbours: int = Field(default=0, ge=0, le=1024)
    mix: float = Field(default=1.0, ge=0, le=1)
    step: float = Field(default=0.0, ge=0)
    every: int = Field(default=128, ge=1)
    last_layers: int | None = Field(default=None, ge=1)
    last_token: bool = False
    norm_topk_prob: bool | None = None

    @property
    def couples(self) -> bool:  # type: ignore[override]  # a constant shift does not
        """Neighbours and the context's mean are other tokens."""
        return self.neighbours > 0

    @property
    def stateful(self) -> bool:  # type: ignore[override]  # only Rewiring's delta lives on
        """Rewiring keeps its delta."""
        return self.step > 0

    @property
    def equivariant(self) -> bool:  # type: ignore[override]  # ids in parameters do not move with the columns
        """Experts named by id do not move with their columns."""
        return self.boost is None and not self.silence

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Top-k of the shifted scores (of mixed gates where rows moved); gates of the shifted scores too. Raises
        ValueError for ids beyond the experts, and where too few experts are left."""
        check_top_k(context.top_k, score_TE.shape[1])
        state = self._learn(score_TE, context) if self.step > 0 else context.state
        if self.last_layers is not None and context.layer < context.num_layers - self.last_layers:
            routed = plain(score_TE, context, normalise=self.norm_topk_prob)
        else:
            shifted_TE = (score_TE + self._delta(score_TE, context)).astype(score_TE.dtype)
            routed = plain(shifted_TE, context, normalise=self.norm_topk_prob)
            self._mix(routed, shifted_TE, score_TE if context.feature_TD is None else context.feature_TD, context)
            routed = replace(routed, gate_TK=self._reinforced(routed, context))
        return Routed(routed.expert_TK, routed.gate_TK, state)

    def _delta(self, score_TE: Floats, context: RoutingContext) -> Floats:
        """What every token's scores get, [E]."""
        experts = score_TE.shape[1]
        named = (*self.silence, *(self.boost.ids if self.boost else ()))
        if max(named, default=0) >= experts:
            raise ValueError(f"an expert to be boosted or silenced does not exist: {max(named)}, {experts} experts")
        delta_E = (
            np.array(context.state["delta_E"]) if self.step > 0 and "delta_E" in context.state else np.zeros(experts)
        )
        if self.boost is not None and not self.boost.chosen_only:
            delta_E[list(self.boost.ids)] += self.boost.by
        delta_E[list(self.silence)] = -np.inf
        return delta_E

    def _reinforced(self, routed: Routed, context: RoutingContext) -> Floats:
        """Gates with those of reinforced experts multiplied (arXiv:2505.14681)."""
        if self.boost is None or not self.boost.chosen_only:
            return routed.gate_TK
        times_TK = np.where(np.isin(routed.expert_TK, self.boost.ids), math.exp(self.boost.by), 1)
        gate_TK = (routed.gate_TK * times_TK).astype(routed.gate_TK.dtype)
        if context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob:
            gate_TK = gate_TK / gate_TK.sum(1, keepdims=True)
        return gate_TK

    def _mix(self, routed: Routed, score_TE: Floats, feature_TD: Floats, context: RoutingContext) -> None:
        """Choose anew for the rows that move to their neighbours, by mixed gates; writes into `routed`."""
        tokens, experts = score_TE.shape
        count = min(self.neighbours, tokens - 1)
        if count < 1 or self.mix == 0:
            return
        moved = np.arange(tokens)
        if self.last_token and context.sequence_T is not None:
            moved = np.flatnonzero(np.append(np.diff(context.sequence_T) != 0, True))
        elif self.last_token:
            moved = moved[-1:]
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        unit_TD, gate_TE = _unit(feature_TD), probabilities(score_TE, context)
        for rows in np.array_split(moved, max(1, -(-len(moved) * max(tokens, count * experts) // _CELLS))):
            near_RN, weight_RN = _nearest(unit_TD, rows, count)
            mass_R1 = weight_RN.sum(1, keepdims=True)
            mean_RE = np.einsum("rn,rne->re", weight_RN, gate_TE[near_RN]) / np.where(mass_R1 > 0, mass_R1, 1)
            # arXiv:2504.07964, kernel regression: w <- (1 - mix) w + mix w^, w^ = sum sim_j w_j / sum sim_j
            mixed_RE = (1 - self.mix) * gate_TE[rows] + self.mix * mean_RE
            mixed_RE = np.where(mass_R1 > 0, mixed_RE, gate_TE[rows]).astype(gate_TE.dtype)  # nobody is near
            choice_RE = mixed_RE if context.bias_E is None else mixed_RE + context.bias_E
            routed.expert_TK[rows] = top_ids(close_as(score_TE[rows], choice_RE.copy()), context.top_k)
            routed.gate_TK[rows] = weigh(mixed_RE, routed.expert_TK[rows], normalise)

    def _learn(self, score_TE: Floats, context: RoutingContext) -> Arrays:
        """The state after these tokens: delta, mean gates so far, tokens seen."""
        tokens, experts = score_TE.shape
        delta_E = np.array(context.state.get("delta_E", np.zeros(experts)), np.float64)
        mean_E = np.array(context.state.get("mean_E", np.zeros(experts)), np.float64)
        seen = int(context.state.get("seen", np.zeros(1, np.int64))[0])
        if tokens:
            now_E = probabilities(score_TE, context).mean(0, dtype=np.float64)
            if seen and (seen + tokens) // self.every > seen // self.every:
                delta_E += self.step * (now_E - mean_E) / max(float(np.abs(now_E - mean_E).max()), 1e-12)
            mean_E += (now_E - mean_E) * tokens / (seen + tokens)
        return {"delta_E": delta_E, "mean_E": mean_E, "seen": np.array([seen + tokens], np.int64)}


def _unit(feature_TD: Floats) -> Floats:
    wide_TD: Floats = np.where(np.isneginf(feature_TD), 0, feature_TD).astype(np.float64)
    wide_TD /= np.maximum(np.abs(wide_TD).max(1, keepdims=True), 1e-300)
    wide_TD /= np.maximum(np.sqrt((wide_TD**2).sum(1, keepdims=True)), 1e-300)
    return wide_TD


def _nearest(unit_TD: Floats, rows: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], Floats]:
    """The `count` nearest other rows of each of `rows` and their cosines, 0 at least, of equals the earliest row."""
    cosine_RT = unit_TD[rows] @ unit_TD.T
    cosine_RT[np.arange(len(rows)), rows] = -np.inf
    near_RN = np.argsort(-cosine_RT, axis=1, kind="stable")[:, :count]
    return near_RN, np.maximum(np.take_along_axis(cosine_RT, near_RN, 1), 0)
