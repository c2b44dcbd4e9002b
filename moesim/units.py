"""Units change once, at load. The one module that converts.

A YAML key carries its unit (`ttft_ms`, `hbm_gib`, `bandwidth_gb_per_s`); its value is a plain number in that
unit or text with a unit of the same dimension (`2 s`, `80 GiB`, `400 Gb/s`). Inside, times are `_ns` (int),
sizes `_bytes` (int), rates `_bytes_per_s` and `_flop_per_s` (float). Decimal prefixes are decimal (1 GB = 1e9
bytes), binary ones binary (1 GiB = 2**30), and bits are bits (1 Gb = 1.25e8 bytes).
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

__all__ = [
    "Bytes",
    "BytesPerS",
    "FlopPerS",
    "GBPerS",
    "GiB",
    "Ms",
    "PerS",
    "Seconds",
    "Us",
    "ms_to_ns",
    "parse_quantity",
    "s_to_ns",
    "us_to_ns",
]

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _scales() -> dict[str, tuple[str, float]]:
    """Every known unit -> (dimension, size in the dimension's base unit: s, B, B/s, FLOP/s, 1/s)."""
    out: dict[str, tuple[str, float]] = {
        "ns": ("time", 1e-9),
        "us": ("time", 1e-6),
        "ms": ("time", 1e-3),
        "s": ("time", 1.0),
        "min": ("time", 60.0),
        "h": ("time", 3600.0),
        "/s": ("rate", 1.0),
        "req/s": ("rate", 1.0),
        "/min": ("rate", 1 / 60.0),
        "Hz": ("rate", 1.0),
    }
    for prefix, scale in {**_DECIMAL, **_BINARY}.items():
        out[f"{prefix}B"] = ("bytes", scale)
        out[f"{prefix}B/s"] = ("bandwidth", scale)
        out[f"{prefix}b/s"] = ("bandwidth", scale / 8)
        out[f"{prefix}bit/s"] = ("bandwidth", scale / 8)
    for prefix, scale in _DECIMAL.items():
        out[f"{prefix}FLOP/s"] = out[f"{prefix}FLOPS"] = ("compute", scale)
    return out


_UNITS = _scales()
_TEXT = re.compile(r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*")


def parse_quantity(value: Any, unit: str) -> float:
    """Turn `value` (a number in `unit`, or text with a unit of the same dimension) into a float in `unit`.

    Raises ValueError for booleans, NaN, infinities, unknown units and units of another dimension.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"a number in {unit} or text such as '1 {unit}' is needed, got {value!r}")
    dimension, scale = _UNITS[unit]
    if isinstance(value, str):
        match = _TEXT.fullmatch(value)
        if match is None:
            raise ValueError(f"{value!r} is not a number with a unit; write for example '1 {unit}'")
        number, written = float(match[1].replace("_", "")), match[2] or unit
        if written not in _UNITS:
            same = ", ".join(u for u, (d, _) in _UNITS.items() if d == dimension)
            raise ValueError(f"unknown unit {written!r} in {value!r}; use one of: {same}")
        if _UNITS[written][0] != dimension:
            raise ValueError(f"{value!r} is a {_UNITS[written][0]}, but a {dimension} (such as '1 {unit}') is needed")
        result = number * _UNITS[written][1] / scale
    else:
        result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"a finite number is needed, got {value!r}")
    return result


def _quantity(unit: str) -> Any:
    return BeforeValidator(lambda value: parse_quantity(value, unit), json_schema_input_type=float | str)


_NOT_NEGATIVE = Field(ge=0)
Seconds = Annotated[float, _quantity("s"), _NOT_NEGATIVE]
Ms = Annotated[float, _quantity("ms"), _NOT_NEGATIVE]
Us = Annotated[float, _quantity("us"), _NOT_NEGATIVE]
GiB = Annotated[float, _quantity("GiB"), _NOT_NEGATIVE]
Bytes = Annotated[float, _quantity("B"), _NOT_NEGATIVE]
GBPerS = Annotated[float, _quantity("GB/s"), _NOT_NEGATIVE]
BytesPerS = Annotated[float, _quantity("B/s"), _NOT_NEGATIVE]
FlopPerS = Annotated[float, _quantity("FLOP/s"), _NOT_NEGATIVE]
PerS = Annotated[float, _quantity("/s"), _NOT_NEGATIVE]


def s_to_ns(seconds: float) -> int:
    """Seconds -> integer nanoseconds, rounded to nearest."""
    return round(seconds * 1e9)


def ms_to_ns(ms: float) -> int:
    """Milliseconds -> integer nanoseconds, rounded to nearest."""
    return round(ms * 1e6)


def us_to_ns(us: float) -> int:
    """Microseconds -> integer nanoseconds, rounded to nearest."""
    return round(us * 1e3)
