"""MC-MoE: bit widths that a small program allocates, and a second expert that is dropped where it weighs little.

Huang et al., "Mixture Compressor for MoE LLMs" (arXiv 2410.06270; `precision_solver.py` and `expert_weight.py` of
Aaronhuang-778/MC-MoE). In each layer: min sum_i f_i^alpha w_i^beta eps_{i,b_i}^gamma with f the frequency and w the
mean gate weight of an expert (each divided by its layer's sum), eps its error at b bits, within a sum of bits, at least
one expert at 3 and one at 2. Their code raises eps to alpha and leaves gamma unused: 1 by default here.

Where the arrays are not given: f is the popularity, w the mean gate weight in the sample (1 where it has none), and
eps_{i,b} = 4^-b for every expert (ours: the mean square error of uniform rounding falls to a quarter with each bit).
Online pruning: a token's later choices are dropped where their weight is below `drop` times the first one's (the paper
has top-2, so one later choice; ours for more), in the layers with the least pruning loss, but for a share of a prompt's
tokens that attention says are important. A trace has no attention: evenly spaced tokens stand for them (ours), so their
number is right and their choice is not.
What is lost: 3.8 % of accuracy at 2.54 bits, and less than 0.6 % more with pruning (quoted, not computed).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import BoolArray, FloatArray
from moesim.errors import BadInput
from moesim.offload import Compressed, OffloadContext, StepRoutes
from moesim.offload.precision.allocation import allocate
from moesim.offload.precision.base import Grid, Precision, own_map, scaled, the_grid
from moesim.offload.precision.significance import mean_weight, significance

__all__ = ["Policy"]

WIDTHS = (1, 2, 3)
ALWAYS = (3, 2)
QUALITY = "3.8 % average accuracy lost at 2.54 bits; dropping 15 % of active parameters, less than 0.6 % more (arXiv \
2410.06270, abstract)"
_Losses = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=1)]


class Policy(Precision):
    """average: bits a weight of each layer's experts, scales apart. alpha, beta, gamma: exponents. frequency, weight:
    [L, E]; error: [L, 3 E], an expert's errors at 1, 2 and 3 bits one after the other; None: see the file. group,
    scale_bits: as of `uniform` (32: a scale and a zero point in fp16, as HQQ and GPTQ store them).

    drop: the share of the first choice's weight below which later ones are dropped; 0: none are (their betas for
    Mixtral are medians by layer, 0.40 to 0.62). layers, layer_loss: only in so many layers with the least loss; without
    losses, in all. protect: share of a prompt's tokens that keep all their choices.
    """

    average: Annotated[float, Field(ge=1, le=3)] = 2.5
    alpha: Annotated[float, Field(ge=0, le=10)] = 1.0
    beta: Annotated[float, Field(ge=0, le=10)] = 1.5
    gamma: Annotated[float, Field(ge=0, le=10)] = 1.0
    frequency: Grid | None = None
    weight: Grid | None = None
    error: Grid | None = None
    group: Annotated[int, Field(ge=1)] | None = 128
    scale_bits: Annotated[int, Field(ge=0, le=64)] = 32
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    layers: Annotated[int, Field(ge=0)] = 10
    layer_loss: _Losses | None = None
    protect: Annotated[float, Field(ge=0, le=1)] = 0.02

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`. Raises BadInput where the widths do not fit the average, or
        are not smaller than the model's own format."""
        scaled(max(WIDTHS), self.group, self.scale_bits, bits)
        layers, experts = context.num_layers, context.num_experts
        frequency_LE = the_grid(self.frequency, "frequency", context)
        weight_LE = the_grid(self.weight, "weight", context)
        frequency_LE = context.popularity_LE if frequency_LE is None else frequency_LE
        weight_LE = mean_weight(context) if weight_LE is None else weight_LE
        # arXiv 2410.06270: f^alpha * w^beta * eps^gamma
        significance_LE = significance(frequency_LE, weight_LE, self.alpha, self.beta)
        error_LEB = self._error(layers, experts)
        width_LE = np.zeros((layers, experts))
        for layer in range(layers):
            cost_EB = significance_LE[layer][:, None] * error_LEB[layer] ** self.gamma
            budget = int(self.average * experts + 1e-9)
            width_LE[layer] = allocate(cost_EB, WIDTHS, budget, ALWAYS)
        extra = self.scale_bits / self.group if self.group else 0.0
        return Compressed(width_LE + extra, own_map(context), quality=QUALITY)

    def _error(self, layers: int, experts: int) -> FloatArray:
        if self.error is None:
            return np.tile(4.0 ** -np.array(WIDTHS, float), (layers, experts, 1))
        if len(self.error) != layers or any(len(row) != len(WIDTHS) * experts for row in self.error):
            raise BadInput(
                f"policies.precision.error must have {layers} rows of {len(WIDTHS) * experts} numbers: each expert's"
                " errors at 1, 2 and 3 bits."
            )
        return np.array(self.error, np.float64).reshape(layers, experts, len(WIDTHS))

    def prune(self, step: StepRoutes, layer: int) -> BoolArray | None:
        """See `moesim.offload.PrecisionPolicy.prune`. Raises BadInput where gate weights are not known."""
        if self.drop == 0.0 or not self._prunes(layer):
            return None
        if step.weight_TLK is None:
            raise BadInput("policies.precision.drop is a share of gate weights, which these routes lack. Use 0.")
        weight = np.asarray(step.weight_TLK[:, layer], np.float64)
        first_TK = np.arange(weight.shape[1]) == weight.argmax(axis=1)[:, None]
        out = (weight < self.drop * weight.max(axis=1, keepdims=True)) & ~first_TK
        safe = round(self.protect * len(weight))
        if step.prompt and safe:
            out[(np.arange(safe) * len(weight)) // safe] = False
        return np.asarray(out, bool)

    def _prunes(self, layer: int) -> bool:
        if self.layer_loss is None:
            return True
        return layer in np.argsort(np.array(self.layer_loss), kind="stable")[: self.layers]
