"""PreMoe: only the experts that a task uses are loaded.

Pei et al., "PreMoe" (arXiv 2505.17639; JarvisPei/PreMoe). An expert's importance to a task is its expected selection
score: the mean over tokens of its logit where it is among the top K, else 0 (TCESS). A trace has no logits below its
gate weights: the mean gate weight where taken, times how often, stands for it, or the popularity alone (ours). The
`kept` most important of each layer stay. A new task loads its own: `reload_bytes`.

Tokens of an expert that is gone take their router's next among the kept. Routes alone do not say which that is:
`rerouting: kept` does it exactly where scores are known (give `fall: drop` here then); `fall: alike` maps each expert
to the kept one most like it (`coactive`, ours), `fall: drop` lets the choice go.
What is lost: accuracy away from the task; on it the paper keeps 97.2 % on MATH500 with 128 of 256 experts of
DeepSeek-R1, and 72.0 % with 32 (quoted, not computed).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from moesim.arrays import FloatArray, IntArray
from moesim.errors import BadInput
from moesim.offload import Compressed, OffloadContext
from moesim.offload.precision.base import Grid, Precision, the_grid
from moesim.offload.precision.coactive import likeness, nearest

__all__ = ["Policy", "reload_bytes"]

QUALITY = "DeepSeek-R1 on MATH500: 97.2 % with 8/128 experts, 72.0 % with 8/32 (arXiv 2505.17639, abstract)"


class Policy(Precision):
    """kept: experts of each layer; None: half of them. fall: what a choice of a gone expert becomes (see the file).
    importance: of each expert, [L, E]; None: from the sample, or the popularity."""

    kept: Annotated[int, Field(ge=1)] | None = None
    fall: Literal["alike", "drop"] = "alike"
    importance: Grid | None = None

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`. Raises BadInput for more kept than there are, or fewer than a
        token takes."""
        layers, experts = context.num_layers, context.num_experts
        kept = self.kept or max(context.top_k, experts // 2)
        if not context.top_k <= kept <= experts:
            raise BadInput(
                f"policies.precision.kept must be {context.top_k} (experts a token) to {experts} (experts of a layer);"
                f" got {kept}."
            )
        important_LE = the_grid(self.importance, "importance", context)
        important_LE = _importance(context) if important_LE is None else important_LE
        map_LE = np.full((layers, experts), experts, np.int64)
        for layer in range(layers):
            order = np.lexsort((np.arange(experts), -important_LE[layer]))
            best = order[:kept]
            map_LE[layer, best] = best
            if self.fall == "alike":
                map_LE[layer] = nearest(likeness(context, layer), best, order)
        return Compressed(np.full((layers, experts), bits), map_LE, quality=QUALITY)


def _importance(context: OffloadContext) -> FloatArray:
    """Sum of gate weights over the sample (mean over tokens, times their number), or the popularity: [L, E]."""
    fit = context.fit
    if fit is None or fit.weight_TLK is None:
        return context.popularity_LE
    out = np.zeros((context.num_layers, context.num_experts + 1))
    for layer in range(context.num_layers):
        ids = np.minimum(fit.expert_TLK[:, layer], context.num_experts).ravel().astype(np.int64)
        np.add.at(out[layer], ids, np.asarray(fit.weight_TLK[:, layer], np.float64).ravel())
    return np.ascontiguousarray(out[:, :-1])


def reload_bytes(before: Compressed, after: Compressed, stored_bytes_LE: IntArray) -> int:
    """What a change of task loads: experts that are kept now and were not before. stored_bytes_LE: of `after`
    (`moesim.offload.compression.stored_bytes_LE`); their sum is what a first load, or one from nothing, costs."""
    own_E = np.arange(before.map_LE.shape[1])
    return int(stored_bytes_LE[(after.map_LE == own_E) & (before.map_LE != own_E)].sum())
