"""MC-SMoE: experts that are used little are merged into those most like them, then factored.

Li et al., "Merge, Then Compress" (arXiv 2310.01334; `merging/grouping.py` of UNITES-Lab/MC-SMoE). Dominant experts are
the most used ones, their number a layer decided over all layers together (each layer's frequencies divided by its
largest, so that every layer keeps one); each other expert joins the dominant one most like it; a group becomes one
matrix, its members weighted by frequency, which the router goes on choosing under all their names: a many-to-one map.
The likeness is of router logits there, of routes here (`coactive`: ours). After merging, a matrix may be stored as low
rank plus columns: r (d + n) / (d n) of its parameters, and a share of columns kept whole.
A token two of whose choices fall into one group has both computed, as the original's code does.
What is lost: what the members' differences carried; the paper fine-tunes and reports virtually no loss (quoted).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import IntArray
from moesim.errors import BadInput
from moesim.offload import Compressed, OffloadContext
from moesim.offload.precision.base import Precision
from moesim.offload.precision.coactive import likeness, nearest

__all__ = ["Policy"]

QUALITY = "virtually no loss in performance, after fine-tuning, at up to 80 % less memory (arXiv 2310.01334, abstract)"
_Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]


class Policy(Precision):
    """groups: experts a layer that are left, on average over the merged layers; None: a quarter. unmerged: layers that
    stay as they are (their script leaves the first out). rank: of the low-rank part; 0: matrices stay whole. columns:
    share of columns that are kept beside it."""

    groups: Annotated[int, Field(ge=1)] | None = None
    unmerged: _Layers = (0,)
    rank: Annotated[int, Field(ge=0)] = 0
    columns: Annotated[float, Field(ge=0, le=1)] = 0.1

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`. Raises BadInput for more groups than experts, and for a rank
        whose factors are no smaller, or where the context has no `expert_shape`."""
        layers, experts = context.num_layers, context.num_experts
        groups = self.groups or max(1, experts // 4)
        if groups > experts:
            raise BadInput(f"policies.precision.groups must be at most the {experts} experts of a layer; got {groups}.")
        map_LE = np.tile(np.arange(experts, dtype=np.int64), (layers, 1))
        merged = [layer for layer in range(layers) if layer not in self.unmerged]
        for layer, dominant in zip(merged, _dominant(context, merged, groups), strict=True):
            order = np.lexsort((np.arange(experts), -context.popularity_LE[layer]))
            map_LE[layer] = nearest(likeness(context, layer), order[:dominant], order)
        bits_LE = np.full((layers, experts), bits)
        bits_LE[merged] *= self._share(context)
        return Compressed(bits_LE, map_LE, quality=QUALITY)

    def _share(self, context: OffloadContext) -> float:
        """Parameters of a merged expert that are left."""
        if not self.rank:
            return 1.0
        if context.expert_shape is None:
            raise BadInput("policies.precision.rank needs an expert's hidden and intermediate sizes (expert_shape).")
        hidden, inner = context.expert_shape
        share = self.rank * (hidden + inner) / (hidden * inner) + self.columns
        if share >= 1:
            raise BadInput(
                f"low rank and columns must be smaller than the matrix: rank {self.rank} of {hidden} x {inner} and"
                f" {self.columns:g} of the columns are {share:.3f} of it. Lower policies.precision.rank."
            )
        return share


def _dominant(context: OffloadContext, merged: list[int], groups: int) -> IntArray:
    """How many experts each merged layer keeps: the `groups` * layers most used of all, at least one each."""
    if not merged:
        return np.zeros(0, np.int64)
    use_LE = context.popularity_LE[merged]
    top_L = use_LE.max(axis=1, keepdims=True)
    share_LE = np.where(top_L > 0, use_LE / np.where(top_L > 0, top_L, 1.0), 1.0)
    share_LE[np.arange(len(merged)), share_LE.argmax(axis=1)] = np.inf  # each layer's first stays
    order = np.argsort(-share_LE.reshape(-1), kind="stable")[: groups * len(merged)]
    return np.bincount(order // context.num_experts, minlength=len(merged))
