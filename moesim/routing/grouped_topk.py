"""Group-limited top-k: the best groups of experts first, then the K best experts inside them.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.2.2: softmax scores, a group is as good as its best expert.
DeepSeek-V3 (arXiv:2412.19437), section 2.1.2: sigmoid scores plus a balancing bias for the choice, a group is as good
as the sum of its two best; gates are the unbiased scores, normalised over the chosen. The bias is context.bias_E, which
a simulation leaves at 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesim.routing import Floats, Routed, Router, RoutingContext, sigmoid, softmax, top_ids
from moesim.routing.select import close_as, gates_of
from moesim.workload.pool import Ids
from moesim.workload.synthetic import Groups, SyntheticSpec, generate

__all__ = ["Policy"]


class Policy(Router):
    """group_score: `max` or `top2_sum`; none: max for softmax scores, top2_sum for sigmoid ones.

    scoring: softmax or sigmoid gates; none: as the model does. norm_topk_prob: divide the chosen gates by their sum;
    none: as the model does. scaling_factor: multiplies the gates.
    """

    from_scores: ClassVar[bool] = False
    replaces_ids: ClassVar[bool] = False

    group_score: Literal["max", "top2_sum"] | None = None
    scoring: Literal["softmax", "sigmoid"] | None = None
    norm_topk_prob: bool | None = None
    scaling_factor: float = Field(default=1.0, gt=0)

    def route(self, score_TE: Floats, context: RoutingContext) -> Routed:
        """The K best experts of the top_groups best groups; of equals the lowest group and the lowest id."""
        tokens, experts = score_TE.shape
        number, kept = context.num_groups, context.top_groups
        if number < 1 or experts % number or not 1 <= kept <= number or context.top_k > kept * experts // number:
            raise ValueError(
                f"groups must divide the experts and the kept ones hold top_k: {experts} experts, {number}"
                " groups,"
                f" {kept} kept, top_k {context.top_k}"
            )
        by_sigmoid = (self.scoring or context.scoring) == "sigmoid"
        gate_TE = sigmoid(score_TE) if by_sigmoid else softmax(score_TE)
        choice_TE = close_as(score_TE, gate_TE.copy() if context.bias_E is None else gate_TE + context.bias_E)
        if kept < number:
            split = choice_TE.reshape(tokens, number, experts // number)
            best = top_ids(self._group_scores(split, by_sigmoid), kept)
            closed = np.full((tokens, number, 1), -np.inf, choice_TE.dtype)
            np.put_along_axis(closed[:, :, 0], best.astype(np.int64), 0, 1)
            split += closed
        expert_TK = top_ids(choice_TE, context.top_k)
        normalise = context.norm_topk_prob if self.norm_topk_prob is None else self.norm_topk_prob
        return Routed(expert_TK, gates_of(gate_TE, expert_TK, normalise, self.scaling_factor))

    def _group_scores(self, split_TGE: Floats, by_sigmoid: bool) -> Floats:
        by = self.group_score or ("top2_sum" if by_sigmoid else "max")
        best: Floats = split_TGE[:, :, 0].copy()
        second = np.full_like(best, -np.inf)
        for member in range(1, split_TGE.shape[2]):  # groups are narrow: a pass for each place beats a reduction
            score = split_TGE[:, :, member]
            if by == "top2_sum":
                np.maximum(second, np.minimum(best, score), out=second)
            np.maximum(best, score, out=best)
        return best if by == "max" or split_TGE.shape[2] == 1 else best + second

    def groups(self, num_groups: int, top_groups: int) -> Groups:
        """The model's groups (none in a model without: then this is topk)."""
        return Groups(num_groups, top_groups)

    def draw(self, weight_LE: NDArray[np.float64], tokens: int, top_k: int, groups: Groups, seed: int) -> Ids:
        """Tokens within `groups.kept` groups each, popularity `weight_LE`, independent of each other."""
        return generate(SyntheticSpec(pool_tokens=tokens), weight_LE, top_k, seed, groups).expert_TLK
