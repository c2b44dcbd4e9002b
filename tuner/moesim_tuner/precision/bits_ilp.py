"""Bit widths for the experts of all layers together: the least error within a number of bytes, with a proof.

MC-MoE's programme (arXiv 2410.06270) with its two bounds taken away: any widths, and one budget for all layers, so that
layers with uneven use give bits to others. min sum_{l,i} f_{l,i}^alpha w_{l,i}^beta eps_{i,b}^gamma with f the
frequency and w the mean gate weight of an expert (divided by its layer's sum), within bytes of the whole and, where
asked for, of each layer. `moesim_tuner.knapsack` solves it: thousands of experts lie within 0.01 % of the bound after
the greedy steps, so the solver is asked for small models and tight limits alone.

Where arrays are not given: f is the popularity, w the mean gate weight in the sample, eps = 4^-b as in `mc_moe` (ours:
the mean square error of uniform rounding falls to a quarter with each bit), and 0 for weights left in the model's own
format. Ours, too, is that errors of different layers add up; a table of measured ones (`error`) may say otherwise.
What is lost: accuracy, by an amount that no error of single experts says; the proof is of the sum, not of accuracy.
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from moesim.arrays import FloatArray, IntArray
from moesim.errors import BadInput
from moesim.offload import Compressed, OffloadContext, Proof
from moesim.offload.precision.base import Grid, Precision, own_map, the_grid
from moesim.offload.precision.significance import mean_weight, significance
from moesim.units import GiB
from moesim_tuner.knapsack import Choices, choose
from moesim_tuner.solving import Part

__all__ = ["Policy"]

Bits = Annotated[float, Field(gt=0, le=32)]
Exponent = Annotated[float, Field(ge=0, le=10)]
Limits = Bits | Annotated[tuple[Bits, ...], Field(strict=False, min_length=1)] | None


class Policy(Precision):
    """widths: bits that a weight may have; 16 (or whatever the model has): left as it is. average: bits a weight of all
    experts, scales included: the budget. gib: the budget instead, of all experts of a rank. layer_least, layer_most:
    limits on the average of each layer; one number, or one a layer.

    error_by_width: eps of each of `widths`; error: [L, B E], an expert's errors at each of them one after the other (as
    of `mc_moe`). frequency, weight: [L, E]. alpha, beta, gamma, group, scale_bits: as of `mc_moe`.
    tolerance: a gap to the bound up to this share is left. deterministic_time: the solver's (a unit took 1 to 9
    seconds).
    """

    widths: Annotated[tuple[Bits, ...], Field(strict=False, min_length=1, max_length=16)] = (1.58, 2.0, 3.0, 4.0, 8.0)
    average: Bits | None = None
    gib: Annotated[GiB, Field(gt=0, le=1e7)] | None = None
    layer_least: Limits = None
    layer_most: Limits = None
    error_by_width: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)] | None = None
    error: Grid | None = None
    frequency: Grid | None = None
    weight: Grid | None = None
    alpha: Exponent = 1.0
    beta: Exponent = 1.5
    gamma: Exponent = 1.0
    group: Annotated[int, Field(ge=1)] | None = 128
    scale_bits: Annotated[int, Field(ge=0, le=64)] = 32
    tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-4
    deterministic_time: Annotated[float, Field(gt=0, le=1e6)] = 0.5

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.average is not None and self.gib is not None:
            raise ValueError("average and gib both say how many bytes the experts may take; give one")
        if self.error is not None and self.error_by_width is not None:
            raise ValueError("error and error_by_width both say how large errors are; give one")
        if self.error_by_width is not None and len(self.error_by_width) != len(self.widths):
            raise ValueError(
                f"error_by_width has {len(self.error_by_width)} numbers, widths {len(self.widths)}: give one for each"
            )
        if len(set(self.widths)) != len(self.widths):
            raise ValueError("widths names one twice")
        return self

    def compress(self, context: OffloadContext, bits: float) -> Compressed:
        """See `moesim.offload.PrecisionPolicy.compress`. Raises BadInput where the widths do not fit the budget or the
        limits, or none is smaller than the model's own format."""
        bits_LE, part = self.solve(context, bits)
        proof = Proof("weighted error", part.objective, part.bound, part.status, part.units)
        return Compressed(bits_LE, own_map(context), proof=proof)

    def solve(self, context: OffloadContext, bits: float) -> tuple[FloatArray, Part]:
        """Bits of each expert as stored, [L, E], and what is proven of the sum of weighted errors."""
        stored_B, kept = self._stored(bits)
        choices = self._choices(context, bits, stored_B, kept)
        option_N, part = choose(choices, "bits", self.tolerance, self.deterministic_time)
        if option_N is None:
            raise BadInput(
                "policies.precision bits_ilp: no widths were found that keep every layer within its limits and all of"
                f" them within {choices.budget:,} bytes. Widen layer_least and layer_most, or raise the budget."
            )
        return stored_B[option_N].reshape(context.num_layers, context.num_experts), part

    def _stored(self, bits: float) -> tuple[FloatArray, list[int]]:
        """Bits of each width with its scales, narrow to wide, and its place in `widths`. Widths that save nothing are
        left out; one of the model's own stands for the weights as they are."""
        scale = self.scale_bits / self.group if self.group else 0.0
        found: dict[float, int] = {}
        for place in sorted(range(len(self.widths)), key=lambda b: self.widths[b]):
            width = self.widths[place]
            if width >= bits:
                found.setdefault(bits, place)
            elif width + scale < bits:
                found[width + scale] = place
        if not found or min(found) >= bits:
            raise BadInput(
                f"policies.precision.widths must have one below the model's own {bits:g} bits, scales of {scale:g} bits"
                f" included; got {', '.join(f'{w:g}' for w in self.widths)}."
            )
        return np.array(list(found)), list(found.values())

    def _choices(self, context: OffloadContext, bits: float, stored_B: FloatArray, kept: list[int]) -> Choices:
        layers, experts = context.num_layers, context.num_experts
        frequency_LE = the_grid(self.frequency, "frequency", context)
        weight_LE = the_grid(self.weight, "weight", context)
        frequency_LE = context.popularity_LE if frequency_LE is None else frequency_LE
        weight_LE = mean_weight(context) if weight_LE is None else weight_LE
        # arXiv 2410.06270: f^alpha * w^beta * eps^gamma
        weighs_LE = significance(frequency_LE, weight_LE, self.alpha, self.beta)
        cost_LEB = weighs_LE[:, :, None] * self._error(layers, experts, stored_B, kept, bits) ** self.gamma
        size_LE = context.size_LE
        size_LEB = np.ceil(size_LE[:, :, None] * (stored_B / bits) - 1e-6).astype(np.int64)
        least_L, most_L = self._limits(context, bits, size_LEB)
        return Choices(
            cost_LEB.reshape(-1, len(stored_B)), size_LEB.reshape(-1, len(stored_B)),
            self._budget(bits, size_LE, size_LEB),
            *(() if most_L is None else (np.repeat(np.arange(layers), experts), least_L, most_L)),
        )  # fmt: skip

    def _error(
        self, layers: int, experts: int, stored_B: FloatArray, kept: list[int], bits: float
    ) -> FloatArray:  # fmt: skip
        """[L, E, B] or what broadcasts to it."""
        if self.error is not None:
            number = len(self.widths)
            if len(self.error) != layers or any(len(row) != number * experts for row in self.error):
                raise BadInput(
                    f"policies.precision.error must have {layers} rows of {number * experts} numbers: each expert's"
                    f" errors at the {number} widths."
                )
            return np.array(self.error, np.float64).reshape(layers, experts, number)[:, :, kept]
        if self.error_by_width is not None:
            return np.array(self.error_by_width, np.float64)[kept]
        return np.where(stored_B >= bits, 0.0, 4.0 ** -np.array(self.widths)[kept])

    def _budget(self, bits: float, size_LE: IntArray, size_LEB: IntArray) -> int:
        least = int(size_LEB.min(axis=2).sum())
        if self.gib is not None:
            budget, said = int(self.gib * 2**30), f"gib: {self.gib:g} GiB"
        else:
            average = 4.0 if self.average is None else self.average
            # a byte more for each expert, because sizes are whole bytes, rounded up
            budget, said = int(average / bits * int(size_LE.sum()) + 1e-6) + size_LE.size, f"average: {average:g} bits"
        if budget < least:
            raise BadInput(
                f"policies.precision.{said} is {budget:,} bytes for the experts, and with the least of the widths they"
                f" take {least:,} ({least / int(size_LE.sum()) * bits:.3g} bits a weight, scales included). Raise it,"
                " or add a smaller width."
            )
        return budget

    def _limits(
        self, context: OffloadContext, bits: float, size_LEB: IntArray
    ) -> tuple[IntArray | None, IntArray | None]:
        """Bytes that each layer must have at least, and may have at most; None where nobody asked for any."""
        if self.layer_least is None and self.layer_most is None:
            return None, None
        own_L, low_L, high_L = context.size_LE.sum(axis=1), size_LEB.min(axis=2).sum(axis=1), size_LEB.max(axis=2)
        least_L = np.minimum(self._per_layer("layer_least", self.layer_least, low_L, own_L, bits), high_L.sum(axis=1))
        most_L = self._per_layer("layer_most", self.layer_most, high_L.sum(axis=1), own_L, bits)
        most_L = most_L + (0 if self.layer_most is None else context.num_experts)
        wrong = np.flatnonzero((most_L < low_L) | (least_L > most_L))
        if len(wrong):
            first = int(wrong[0])
            low, least, most = (x_L[first] / own_L[first] * bits for x_L in (low_L, least_L, most_L))
            raise BadInput(
                f"layer {first} can have {low:.3g} bits a weight or more, scales included, and its limits are"
                f" {least:.3g} to {most:.3g}: exchange or widen layer_least and layer_most of policies.precision."
            )
        return least_L, most_L

    @staticmethod
    def _per_layer(name: str, given: Limits, none_L: IntArray, own_L: IntArray, bits: float) -> IntArray:
        if given is None:
            return none_L
        each = np.full(len(own_L), given) if isinstance(given, float) else np.array(given)
        if len(each) != len(own_L):
            raise BadInput(
                f"policies.precision.{name} is one number, or one for each of the {len(own_L)} MoE layers; got"
                f" {len(each)}."
            )
        return np.asarray(each / bits * own_L + 1e-6, np.int64)
