"""Products in fp8 (e4m3) on CUDA, with what they cost in deployment: activations are quantised inside the operator.

Weights are quantised once, ahead. A scale belongs to a row (of activations: a token's; of weights: an output's) or to
the whole tensor. Quantising runs anywhere; products need an NVIDIA device of compute capability 8.9 or later, the
grouped ones 9.0. Suffixes as in moe.py and dense.py. Error bounds:
bounds.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from .moe import swiglu

__all__ = ["FP8_MAX", "Per", "Quantised", "dequantise", "gemm_fp8", "grouped_swiglu_fp8", "quantise", "why_no_fp8"]

Per = Literal["row", "tensor"]

FP8_MAX = 448.0  # the largest e4m3 number (OCP 8-bit floating point, table 1)


class Quantised(NamedTuple):
    """x ~ data * scale: e4m3 data shaped as x, float32 scale [..., 1] by row or [] by tensor."""

    data: torch.Tensor
    scale: torch.Tensor


def quantise(x: torch.Tensor, per: Per = "row") -> Quantised:
    """The largest magnitude of a row (or of the tensor) becomes 448; zeros stay zeros. No host sync."""
    largest = x.abs().amax(dim=-1, keepdim=True) if per == "row" else x.abs().amax()
    scale = (largest.float() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return Quantised((x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)


def dequantise(quantised: Quantised) -> torch.Tensor:
    """data * scale in float64: exact, since both have few bits."""
    return quantised.data.double() * quantised.scale.double()


def why_no_fp8(device: torch.device | str, grouped: bool = False) -> str | None:
    """None where fp8 products run on `device`, else one sentence with the reason."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"fp8 products need a CUDA device of compute capability 8.9 or later, not {device.type}; use bf16 here"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"fp8 products need compute capability 8.9 or later: this device has {capability}; use bf16 here"
    if grouped and (capability[0] != 9 or not _takes_any_counts()):
        return (
            f"grouped fp8 products need compute capability 9.0, torch >= 2.9: {capability}, torch {torch.__version__}"
        )
    return None


def _takes_any_counts() -> bool:
    """Whether `_scaled_grouped_mm` takes groups of any size. At first it asserted multiples of 16 in the kernel, which
    ends CUDA for the process (pytorch/pytorch#148531, relaxed by #155466).
    """
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return hasattr(torch, "_scaled_grouped_mm") and release >= (2, 9)


def gemm_fp8(x_MK: torch.Tensor, weight_NK: Quantised, per: Per = "row") -> torch.Tensor:
    """x w^T in bf16, [M, N], x quantised here, both by row or both by tensor. K and N divisible by 16.

    Sums in the tensor cores' own accumulator (`use_fast_accum`), as inference engines do. Raises ValueError with the
    reason where there is no fp8.
    """
    _require(x_MK.device, grouped=False)
    x = quantise(x_MK, per)
    weight_scale = weight_NK.scale.t() if per == "row" else weight_NK.scale
    return torch._scaled_mm(
        x.data,
        weight_NK.data.t(),
        scale_a=x.scale,
        scale_b=weight_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def grouped_swiglu_fp8(row_RH: torch.Tensor, w13: Quantised, w2: Quantised, end_E: torch.Tensor) -> torch.Tensor:
    """`moe.grouped_swiglu` with weights quantised by row, and rows and activations quantised here; bf16 [R, H]."""
    _require(row_RH.device, grouped=True)
    return _grouped(swiglu(_grouped(row_RH, w13, end_E)), w2, end_E)


def _grouped(row_RK: torch.Tensor, weight_ENK: Quantised, end_E: torch.Tensor) -> torch.Tensor:
    row = quantise(row_RK)
    return torch._scaled_grouped_mm(
        row.data,
        weight_ENK.data.transpose(1, 2),
        row.scale.squeeze(1),
        weight_ENK.scale.squeeze(2),
        offs=end_E,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _require(device: torch.device, grouped: bool) -> None:
    reason = why_no_fp8(device, grouped)
    if reason:
        raise ValueError(reason)
