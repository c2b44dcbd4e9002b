"""Segments: contiguous tokens of a sequence share one decision.

Source: Ortigossa and Segal 2026, Seg-MoE (arXiv:2601.21641): routers see contiguous segments of time steps, and one
choice holds for all of a segment; its length changes from layer to layer (multi-resolution). Reconstruction: the
decision is made on the mean of the tokens' scores, where the paper's router reads the segment's own features.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moesim.routing import Floats, Routed, Router, RoutingContext
from moesim.routing.gating import known, plain
from moesim.routing.select import check_top_k

__all__ = ["Policy"]

Length = Annotated[int, Field(ge=1, le=1 << 20)]
Lengths = Annotated[tuple[Length, ...], Field(strict=False, min_length=1, max_length=4096)]


class Policy(Router):
    """tokens: length of a segment, one for all layers or a list that the layers go through in turn."""

    couples: ClassVar[bool] = True

    tokens: Length | Lengths = 4
    norm_topk_prob: bool | None = None

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """Top-k of each segment's mean score for all its tokens. Segments begin where a sequence's positions divide by
        `tokens`; without sequences the batch is one, without positions they count from its first token. An expert
        that is at -inf for one token of a segment is so for the segment."""
        rows = len(score_TE)
        check_top_k(context.top_k, score_TE.shape[1])
        if rows == 0:
            return plain(score_TE, context)
        length = self.tokens if isinstance(self.tokens, int) else self.tokens[context.layer % len(self.tokens)]
        begins_T = np.arange(rows) == 0
        if context.sequence_T is not None:
            sequence_T = known(context.sequence_T, rows, "routing by segments", "the sequence")
            begins_T[1:] |= np.diff(sequence_T) != 0
        if context.position_T is None:
            first_T = np.maximum.accumulate(np.where(begins_T, np.arange(rows), 0))
            block_T = (np.arange(rows) - first_T) // length
        else:
            block_T = known(context.position_T, rows, "routing by segments", "the position") // length
        begins_T[1:] |= np.diff(block_T) != 0
        start_S = np.flatnonzero(begins_T)
        size_S = np.diff(np.append(start_S, rows))
        mean_SE = np.add.reduceat(score_TE.astype(np.float64), start_S, axis=0) / size_S[:, None]
        routed = plain(mean_SE.astype(score_TE.dtype), context, normalise=self.norm_topk_prob)
        return Routed(np.repeat(routed.expert_TK, size_S, axis=0), np.repeat(routed.gate_TK, size_S, axis=0))
