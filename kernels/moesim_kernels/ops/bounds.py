"""How far an operator may lie from float64: the bounds every check uses, carried along with the values.

The model is the standard one of forward error analysis (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
ed., 2.2 and 3.1). u is the unit roundoff of a dtype: 2^-24 in fp32, 2^-8 in bf16, 2^-4 in fp8 e4m3.

- A stored result is off by at most u times its magnitude.
- A product summed over k terms: |error| <= (2 k 2^-24 + u) sum |a| |b|. Sums are kept in fp32 by every back end; the
  2 allows for the truncating adders of tensor cores. u stands on the sum of magnitudes, not on the result, because
  cuBLAS may round the partial sums of a split k to bf16.
- exp, sigmoid and what is made of them: 64 x 2^-24 relative (torch's vectorised exp is good to about 20 units).
- fp8: operands are off by FP8_UNIT relative, or by half the subnormal step; sums are kept to 13 bits below the
  largest term of each step of 32 (Hopper's accumulator; DeepSeek-V3, arXiv 2412.19437, 3.3.2, measured 14 bits).

A `Ball` holds float64 values and the magnitude that the operator's own value may be off by; operations carry both.
Nothing is fitted: a check compares |operator - value| with the error element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = [
    "ELEMENTARY",
    "UNIT",
    "Ball",
    "attention_weights",
    "exact",
    "factor",
    "fp8_rounded",
    "fp8_unit",
    "rms_norm_ball",
    "score_ball",
    "swiglu_ball",
]

FP32 = 2.0**-24
UNIT = {torch.float32: FP32, torch.bfloat16: 2.0**-8}
ELEMENTARY = 64 * FP32
FP8_UNIT = 2.0**-4
FP8_SUBNORMAL = 2.0**-10  # half the step of e4m3 below 2^-6, before the scale
FP8_ACCUMULATE = 2.0**-13
SILU_SLOPE = 1.1  # max |silu'| = 1.0998...
SILU_BEND = 0.5  # max |silu''|, at 0


@dataclass(frozen=True)
class Ball:
    """Float64 values, and how far the computed ones may be off, of the same shape."""

    value: torch.Tensor
    error: torch.Tensor

    @property
    def largest(self) -> torch.Tensor:
        """Bound of the computed magnitudes."""
        return self.value.abs() + self.error

    def rounded(self, unit: float) -> Ball:
        """Stored with unit roundoff `unit`."""
        return Ball(self.value, self.error + unit * self.largest)

    def matmul(self, other: Ball, unit: float) -> Ball:
        """The matrix product, stored with unit roundoff `unit`."""
        inner = self.error @ other.largest + self.value.abs() @ other.error
        rounding = 2 * self.value.shape[-1] * FP32 + unit
        return Ball(self.value @ other.value, inner + rounding * (self.largest @ other.largest))

    def times(self, other: Ball, unit: float) -> Ball:
        """The elementwise product."""
        inner = self.error * other.largest + self.value.abs() * other.error
        return Ball(self.value * other.value, inner).rounded(unit)

    def plus(self, other: Ball, unit: float) -> Ball:
        """The elementwise sum."""
        return Ball(self.value + other.value, self.error + other.error).rounded(unit)

    def minus(self, other: Ball, unit: float) -> Ball:
        """The elementwise difference."""
        return Ball(self.value - other.value, self.error + other.error).rounded(unit)

    def over(self, other: Ball, unit: float) -> Ball:
        """The elementwise quotient; infinite error where the divisor may be 0."""
        low = (other.value.abs() - other.error).clamp_min(0.0)
        value = self.value / other.value
        return Ball(value, (self.error + value.abs() * other.error) / low).rounded(unit)

    def sum(self, dim: int) -> Ball:
        """The sum along `dim`, kept as a dimension of 1, in fp32."""
        rounding = 2 * self.value.shape[dim] * FP32 * self.largest.sum(dim, keepdim=True)
        return Ball(self.value.sum(dim, keepdim=True), self.error.sum(dim, keepdim=True) + rounding)

    def through(self, function: Callable[[torch.Tensor], torch.Tensor], slope: float, unit: float) -> Ball:
        """function(self), whose slope is nowhere more than `slope`."""
        value = function(self.value)
        return Ball(value, slope * self.error + ELEMENTARY * value.abs()).rounded(unit)

    @property
    def t(self) -> Ball:
        """The last two dimensions exchanged."""
        return Ball(self.value.transpose(-1, -2), self.error.transpose(-1, -2))

    def __getitem__(self, index: object) -> Ball:
        return Ball(self.value[index], self.error[index])


def exact(x: torch.Tensor) -> Ball:
    """Values an operator is given: known exactly."""
    value = x.detach().double().cpu()
    return Ball(value, torch.zeros_like(value))


def factor(x: float) -> Ball:
    """A constant, stored in fp32."""
    return Ball(torch.tensor(x, dtype=torch.float64), torch.tensor(abs(x) * FP32, dtype=torch.float64))


def swiglu_ball(x_R2I: Ball, unit: float) -> tuple[Ball, Ball, Ball, Ball]:
    """(silu(gate), silu'(gate), up, silu(gate) * up) of the first product [R, 2I]."""
    half = x_R2I.value.shape[-1] // 2
    gate, up = x_R2I[..., :half], x_R2I[..., half:]
    silu = gate.through(torch.nn.functional.silu, SILU_SLOPE, unit)
    sigmoid = torch.sigmoid(gate.value)
    terms = sigmoid * (1 + gate.value.abs())  # silu' may cancel; its two terms bound its rounding
    slope = Ball(sigmoid * (1 + gate.value * (1 - sigmoid)), SILU_BEND * gate.error + ELEMENTARY * terms).rounded(unit)
    return silu, slope, up, silu.times(up, unit)


def attention_weights(score: Ball, visible: torch.Tensor) -> Ball:
    """Softmax over the last dimension of what is visible: scores off by d move a weight by exp(2 d) - 1 at most."""
    off = torch.where(visible, score.error, 0.0).amax(dim=-1, keepdim=True)
    value = torch.softmax(score.value.masked_fill(~visible, float("-inf")), dim=-1)
    terms = score.value.shape[-1]
    return Ball(value, value * (torch.expm1(2 * off) + 2 * ELEMENTARY + 2 * terms * FP32))


def score_ball(logit: Ball, score: str) -> Ball:
    """Scores of a router: softmax or sigmoid of its logits, in fp32."""
    if score == "softmax":
        return attention_weights(logit, torch.ones_like(logit.value, dtype=torch.bool))
    value = torch.sigmoid(logit.value)  # d log sigmoid / dx <= 1
    return Ball(value, value * (torch.expm1(logit.error) + ELEMENTARY))


def rms_norm_ball(x: Ball, weight: Ball, eps: float, unit: float) -> Ball:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, stored after the quotient and after the product."""
    mean = x.times(x, FP32).sum(-1).times(factor(1 / x.value.shape[-1]), 2 * FP32)
    inverse = (mean.value + eps).rsqrt()  # the slope of x^-1/2 is x^-3/2 / 2, largest at the lower end
    low = (mean.value - mean.error).clamp_min(0.0) + eps
    return x.times(Ball(inverse, 0.5 * low**-1.5 * mean.error + ELEMENTARY * inverse), unit).times(weight, unit)


def fp8_rounded(x: Ball, scale: torch.Tensor) -> Ball:
    """x quantised to e4m3 under `scale` (broadcast): half a step of a normal number, or of a subnormal one."""
    step = torch.maximum(FP8_UNIT * x.largest, FP8_SUBNORMAL * scale.detach().double().cpu())
    return Ball(x.value, x.error + step * (1 + 8 * FP32))


def fp8_unit(terms: int) -> float:
    """The `unit` of a product of e4m3 operands over so many terms: Hopper's accumulator, then a bf16 result."""
    return UNIT[torch.bfloat16] + FP8_ACCUMULATE * (terms / 32 + 1)
