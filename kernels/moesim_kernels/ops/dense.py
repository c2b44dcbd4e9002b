"""Dense operators around the experts: GEMMs, and the residual add with RMS norm.

Suffixes: M rows, N outputs, K inputs, T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["gemm", "norm_residual", "norm_residual_bytes", "product"]

# Without AVX-512 torch multiplies bf16 at a scalar's pace (10 against 80 GFLOP/s on one core of a Zen 3). There bf16
# operands are lifted to float32 for the product, from the row count on at which the lift pays (measured: 6).
LIFTED_CAPABILITIES = ("AVX2", "DEFAULT", "NO AVX")
LIFT_ROWS = 6
LIFT_COLUMNS = 256  # the right operand is lifted so many columns at a time: they stay in the cache


def gemm(x_MK: torch.Tensor, w_NK: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x w^T, [M, N], in torch's linear layout and the operands' dtype; written into `out` where given."""
    return product(x_MK, w_NK.t(), out)


def product(a_MK: torch.Tensor, b_KN: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a b, [M, N], in the operands' dtype, summed in float32; either may be strided. Written into `out` where given."""
    if not _lifts(a_MK):
        return torch.mm(a_MK, b_KN, out=out)
    rows, columns = a_MK.shape[0], b_KN.shape[1]
    out = a_MK.new_empty(rows, columns) if out is None else out
    lifted_MK = a_MK.float()
    for start in range(0, columns, LIFT_COLUMNS):
        part = slice(start, start + LIFT_COLUMNS)
        out[:, part] = lifted_MK @ b_KN[:, part].float()
    return out


def _lifts(a_MK: torch.Tensor) -> bool:
    """Whether this product runs in float32: bf16 on a CPU without bf16 arithmetic, and rows enough."""
    return (
        a_MK.dtype == torch.bfloat16
        and a_MK.device.type == "cpu"
        and a_MK.shape[0] >= LIFT_ROWS
        and torch.backends.cpu.get_cpu_capability() in LIFTED_CAPABILITIES
    )


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
