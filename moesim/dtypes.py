"""Number formats of weights, activations and caches, and the bytes they take."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from moesim.errors import BadInput

__all__ = ["FLOAT_DTYPES", "KV_DTYPES", "Dtype", "dtype_bytes", "tensor_bytes"]

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "mxfp4", "nvfp4", "ternary"]
FLOAT_DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp16")
KV_DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "nvfp4")

# Bytes an element, scales included. Scales of a whole tensor or of a whole row are left out (below 0.1 %).
_BYTES: dict[str, Fraction] = {
    "fp32": Fraction(4),
    "bf16": Fraction(2),
    "fp16": Fraction(2),
    "fp8": Fraction(1),
    "fp8_block": 1 + Fraction(4, 128 * 128),  # one fp32 scale a 128 x 128 block (DeepSeek-V3 report, 3.3.2)
    "int8": Fraction(1),
    "int4": Fraction(1, 2) + Fraction(2, 128),  # one fp16 scale a group of 128 (GPTQ, AWQ defaults)
    "mxfp4": Fraction(17, 32),  # 32 elements of 4 bits and one 8-bit scale (OCP MX v1.0, table 1)
    "nvfp4": Fraction(9, 16),  # 16 elements of 4 bits and one fp8 scale
    "ternary": Fraction(1, 4),  # two bits a weight as kernels pack them (MoTE, BitNet); log2(3) bits would be the least
}


def dtype_bytes(dtype: str) -> float:
    """Bytes an element of `dtype` takes in memory, its share of the block scales included.

    Raises BadInput for an unknown dtype.
    """
    if dtype not in _BYTES:
        raise BadInput(f"dtype must be one of {', '.join(_BYTES)}; got {dtype!r}")
    return float(_BYTES[dtype])


def tensor_bytes(elements: int, dtype: str) -> int:
    """Bytes of `elements` elements of `dtype`, exact and rounded up to a whole byte."""
    dtype_bytes(dtype)
    return -int(-elements * _BYTES[dtype] // 1)
