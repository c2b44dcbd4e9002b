"""Figures, settings and counts of a study as words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moesim.tune_values import shown

__all__ = ["figure", "settings_in_short"]

_GIB = 2**30


def figure(value: float, name: str = "") -> str:
    """A figure in its unit: bytes as GiB, shares as percent, else three or four digits."""
    if not math.isfinite(value):
        return str(value)
    if name.endswith("_bytes"):
        return f"{value / _GIB:.1f} GiB"
    if name.endswith("_share") or name in ("hit_rate", "mfu"):
        return f"{100 * value:.1f}%" if value < 0.0995 else f"{100 * value:.0f}%"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 or not size else f"{value:.3g}"


def settings_in_short(point: Mapping[str, Any]) -> str:
    """`max_num_seqs 64, layout tp4`: parameters by the last part of their names where that is enough to tell them
    apart, a policy by its value."""
    last = [name.rpartition(".")[2] for name in point]
    words = []
    for name, short in zip(point, last, strict=True):
        told = short if last.count(short) == 1 else ".".join(name.split(".")[-2:])
        words.append(f"{told} {shown(point[name])}")
    return ", ".join(words)
