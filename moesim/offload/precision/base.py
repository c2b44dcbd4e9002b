"""What precision policies share: nothing is pruned and no route moves unless a policy says so."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from moesim.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moesim.errors import BadInput
from moesim.offload import OffloadContext, StepRoutes
from moesim.spec import Spec

__all__ = ["Grid", "Precision", "own_map", "scaled", "the_grid"]

Row = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=1)]
Grid = Annotated[tuple[Row, ...], Field(strict=False, min_length=1)]
"""Numbers by layer and expert, as YAML lists."""


class Precision(Spec):
    """`moesim.offload.PrecisionPolicy` but for `compress`."""

    def prune(self, step: StepRoutes, layer: int) -> BoolArray | None:
        """See PrecisionPolicy: no choice is dropped."""
        return None

    def drift(self, step: StepRoutes, layer: int, num_experts: int) -> AnyArray | None:
        """See PrecisionPolicy: no route moves."""
        return None


def own_map(context: OffloadContext) -> IntArray:
    """Every expert serves itself: [L, E]."""
    return np.tile(np.arange(context.num_experts, dtype=np.int64), (context.num_layers, 1))


def scaled(width: float, group: int | None, scale_bits: int, bits: float) -> float:
    """Bits a weight of `width` with a scale (and a zero point) of `scale_bits` for each `group` of weights; None: one a
    row, left out (below 0.1 %). Raises BadInput where that is no less than the model's own `bits`."""
    stored = width + (scale_bits / group if group else 0.0)
    if stored >= bits:
        raise BadInput(
            f"rounding must make weights smaller: {stored:g} bits a weight with its scales, and the model has {bits:g}."
            " Use fewer bits, or precision: none."
        )
    return stored


def the_grid(given: tuple[tuple[float, ...], ...] | None, name: str, context: OffloadContext) -> FloatArray | None:
    """A parameter by layer and expert as an array [L, E]; None where it was not given. Raises BadInput for others."""
    if given is None:
        return None
    shape = (context.num_layers, context.num_experts)
    if len(given) != shape[0] or any(len(row) != shape[1] for row in given):
        raise BadInput(
            f"policies.precision.{name} must have a row for each MoE layer and a number for each expert: {shape[0]}"
            f" rows of {shape[1]}, not {len(given)} of {sorted({len(row) for row in given})}."
        )
    return np.array(given, np.float64)
