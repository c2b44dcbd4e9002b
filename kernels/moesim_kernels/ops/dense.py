"""Dense operators around the experts: a GEMM in torch's linear layout, and the residual add with RMS norm.

Suffixes: M rows, N outputs, K inputs, T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["gemm", "norm_residual", "norm_residual_bytes"]


def gemm(x_MK: torch.Tensor, w_NK: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x w^T, [M, N], in the operands' dtype; written into `out` where given."""
    return torch.mm(x_MK, w_NK.t(), out=out)


def norm_residual(
    hidden_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """residual += hidden, in place; returns residual / sqrt(mean(residual^2) + eps) * weight, [T, H].

    The elementwise work between two layers (Zhang and Sennrich 2019, eq. 4). It must move `norm_residual_bytes`.
    """
    residual_TH.add_(hidden_TH)
    return functional.rms_norm(residual_TH, (residual_TH.shape[-1],), weight_H, eps)


def norm_residual_bytes(tokens: int, hidden: int, dtype_bytes: int) -> int:
    """The least bytes `norm_residual` can move: hidden and residual read, residual and result written."""
    return 4 * tokens * hidden * dtype_bytes
