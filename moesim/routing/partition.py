"""Pools of experts by class: a token takes experts of its own class's pool and of a shared one.

Source: Wang et al. 2025, MoIIE (arXiv:2508.09779): intra-modality experts for each modality beside
inter-modality ones; a router chooses among a token's own and the shared. The authors' code has 4 experts, one of each
modality and two shared, top-2, renormalised: `shared` is half the experts by default. Language families take the place
of modalities in multilingual models: experts for one group of similar languages each (Li et al. 2025, Group then Scale,
arXiv:2506.12388); arXiv:2601.14050, which analyses models as they are and steers their middle layers, is motivation
alone. Sizes of the pools are the model's.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moesim.routing import NONE, Floats, Routed, Router, RoutingContext
from moesim.routing.gating import compact, known, open_ids, probabilities, weigh
from moesim.routing.select import check_top_k

__all__ = ["Policy"]


class Policy(Router):
    """pools: classes with experts of their own, ids 0 .. pools - 1. shared: experts of all; none: half of them,
    and what the pools leave over. from_own, from_shared: so many of either (both or neither); none: the model's K
    of both together. The pools stand first, in the order of the classes, then the shared experts."""

    asks_for: ClassVar[tuple[str, ...]] = ("class_T",)

    ragged: ClassVar[bool] = True
    equivariant: ClassVar[bool] = False

    pools: int = Field(default=2, ge=1, le=65536)
    shared: int | None = Field(default=None, ge=0)
    from_own: int | None = Field(default=None, ge=0)
    from_shared: int | None = Field(default=None, ge=0)
    norm_topk_prob: bool | None = None

    @model_validator(mode="after")
    def _both(self) -> Policy:
        if (self.from_own is None) != (self.from_shared is None) or self.from_own == self.from_shared == 0:
            raise ValueError(
                "from_own and from_shared are given both or neither, and add up to one expert or more:"
                f" from_own {self.from_own}, from_shared {self.from_shared}"
            )
        return self

    def sizes(self, num_experts: int) -> tuple[int, int]:
        """Experts of each class's pool, and shared ones."""
        shared = num_experts // 2 if self.shared is None else self.shared
        own = max(num_experts - shared, 0) // self.pools
        if shared > num_experts:
            raise ValueError(
                f"{self.pools} pools and {shared} shared experts cannot be cut from {num_experts} experts."
            )
        return own, num_experts - own * self.pools

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The best of what a token's class may take, fewer where its pools hold fewer. Raises ValueError without
        classes, or for a class without a pool."""
        tokens, experts = score_TE.shape
        check_top_k(context.top_k, experts)
        class_T = known(context.class_T, tokens, "routing by pools", "the class (modality, language)")
        if tokens and (class_T.min() < 0 or class_T.max() >= self.pools):
            raise ValueError(
                f"every class needs a pool: classes {class_T.min()} to {class_T.max()}, pools 0 to {self.pools - 1}."
            )
        own, shared = self.sizes(experts)
        pool_E = np.minimum(np.arange(experts) // max(own, 1), self.pools) if own else np.full(experts, self.pools)
        mine_TE, ours_E = pool_E == class_T[:, None], pool_E == self.pools
        if self.from_own is None or self.from_shared is None:
            picked_TK = open_ids(np.where(mine_TE | ours_E, score_TE, -np.inf), min(context.top_k, own + shared))
        else:
            picked_TK = self._each(score_TE, mine_TE, ours_E)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(picked_TK, weigh(probabilities(score_TE, context), picked_TK, normalise))

    def _each(self, score_TE: Floats, mine_TE: NDArray[np.bool_], ours_E: NDArray[np.bool_]) -> NDArray[np.int32]:
        """`from_own` of a token's pool and `from_shared` of the shared one, the highest score first."""
        parts = [
            open_ids(np.where(open_TE, score_TE, -np.inf), k)
            for open_TE, k in ((mine_TE, self.from_own or 0), (ours_E, self.from_shared or 0))
        ]
        both_TK = np.concatenate(parts, axis=1)
        value_TK = np.take_along_axis(score_TE, np.maximum(both_TK, 0).astype(np.int64), 1).astype(np.float64)
        value_TK[both_TK == NONE] = -np.inf
        order_TK = np.lexsort((both_TK, -value_TK), axis=1)
        sorted_TK = np.take_along_axis(both_TK, order_TK, 1)
        return compact(sorted_TK, sorted_TK != NONE)

    def width(self, top_k: int, num_experts: int) -> int:
        """K, or the stated numbers of both pools."""
        if self.from_own is None or self.from_shared is None:
            return min(top_k, num_experts)
        return min(self.from_own + self.from_shared, num_experts)
