"""Hash routing: a fixed table says which experts a vocabulary id takes; nothing is learnt and no score is looked at.

Source: Roller et al. 2021, Hash Layers (arXiv:2106.04426): a random hash of the token id, a balanced one,
and K hashes for K experts. `balanced` deals the ids of the vocabulary out evenly by a shuffle keyed by seed and layer;
the further experts of an id stand at distinct offsets from its first one, which is our way to keep K distinct.
"""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.rng import generator
from moesim.routing import Floats, Routed, Router, RoutingContext
from moesim.routing.gating import known
from moesim.routing.select import check_top_k, top_ids

__all__ = ["Policy"]


class Policy(Router):
    """table: `balanced` (drawn, another one in each layer) or `modulo` (id modulo E). vocab_size: rows of the drawn
    table; ids beyond it start again at its top."""

    asks_for: ClassVar[tuple[str, ...]] = ("token_T",)

    normalised: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False

    table: Literal["balanced", "modulo"] = "balanced"
    vocab_size: int = Field(default=65536, ge=1, le=1 << 22)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The table's K experts, gates 1 / K. Scores count only for which experts may be taken: where the table names
        one at -inf, the next higher id that is allowed steps in. Raises ValueError without token ids."""
        tokens, experts = score_TE.shape
        check_top_k(context.top_k, experts)
        token_T = known(context.token_T, tokens, "hash routing", "the vocabulary id")
        expert_TK = self._look_up(token_T, context, experts)
        if np.isneginf(score_TE).any():
            expert_TK = _avoid(expert_TK, np.isneginf(score_TE))
        return Routed(expert_TK, np.full(expert_TK.shape, 1 / context.top_k, score_TE.dtype))

    def _look_up(self, token_T: NDArray[np.int64], context: RoutingContext, experts: int) -> NDArray[np.int32]:
        if self.table == "modulo":
            offset_K = np.arange(context.top_k) * (experts // context.top_k)
            return ((token_T[:, None] + offset_K) % experts).astype(np.int32)
        table_VK = _table(context.seed, context.layer, self.vocab_size, experts, context.top_k)
        taken: NDArray[np.int32] = table_VK[token_T % self.vocab_size]
        return taken


@functools.lru_cache(maxsize=64)
def _table(seed: int, layer: int, vocab_size: int, experts: int, top_k: int) -> NDArray[np.int32]:
    """[V, K]: each expert is the first choice of V / E ids (the remainder one more each)."""
    rng = generator(seed, "routing/hash", layer)
    first_V = rng.permutation(vocab_size) % experts
    patterns = 1 if top_k == 1 else max(64, min(vocab_size, 4096, (1 << 22) // experts))
    further_PJ = rng.permuted(np.tile(np.arange(1, experts), (patterns, 1)), axis=1)[:, : top_k - 1]
    offset_PK = np.concatenate([np.zeros((patterns, 1), np.int64), further_PJ], axis=1)
    table_VK = (first_V[:, None] + offset_PK[rng.integers(patterns, size=vocab_size)]) % experts
    out: NDArray[np.int32] = table_VK.astype(np.int32)
    out.setflags(write=False)
    return out


def _avoid(expert_TK: NDArray[np.int32], closed_TE: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The table's experts in its order, closed ones replaced by those that follow the first in the circle of ids."""
    experts = closed_TE.shape[1]
    wish_TE = -((np.arange(experts) - expert_TK[:, :1]) % experts).astype(np.float64)
    np.put_along_axis(wish_TE, expert_TK.astype(np.int64), np.arange(expert_TK.shape[1], 0, -1.0)[None], 1)
    return top_ids(np.where(closed_TE, -np.inf, wish_TE), expert_TK.shape[1])
