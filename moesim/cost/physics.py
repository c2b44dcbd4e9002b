"""The physics under every operator: few parameters, vectorised, monotone in work. Times in ns, float64.

Form (roofline with a soft knee, after Williams et al., CACM 2009, plus a launch term):
    t = launch + [ (bytes / (HBM * mem_eff))^4 + (FLOP / (peak * flop_eff))^4 ]^(1/4)
The fourth power keeps the sum within 19 % of the larger term and above it. Parameters come from
`DeviceProfile.fits`; the defaults here are the typical efficiencies of a datasheet profile.

Legend: m, n, k matrix sizes; q new tokens of one sequence; kv tokens it attends to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.hardware import DeviceProfile

__all__ = ["Engine", "causal_pairs", "soft_max", "stream_ns", "work_ns"]

Floats = NDArray[np.float64]

_DEFAULTS: dict[str, tuple[float, float, float]] = {
    # op: (launches, mem_eff, flop_eff)
    "gemm": (1.0, 0.80, 0.75),
    "moe": (5.0, 0.80, 0.60),
    "attention_prefill": (2.0, 0.80, 0.60),
    "attention_decode": (2.0, 0.80, 0.50),
    "elementwise": (1.0, 0.80, 1.0),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """What one operator variant gets from the device: effective rates, launch, and the hard roofline."""

    launch_ns: float
    bytes_per_ns: float
    flop_per_ns: float
    peak_bytes_per_ns: float
    peak_flop_per_ns: float

    @classmethod
    def of(cls, profile: DeviceProfile, op: str, variant: str, dtype: str) -> Engine:
        """Parameters of `op/variant` (else `op`, else typical): launch_ns, mem_eff, flop_eff."""
        launches, mem_eff, flop_eff = _DEFAULTS[op]
        peak = profile.flop_rate(dtype)
        return cls(
            launch_ns=profile.fit(op, variant, "launch_ns", launches * profile.graph_launch_ns),
            bytes_per_ns=profile.hbm_bytes_per_s * profile.fit(op, variant, "mem_eff", mem_eff) * 1e-9,
            flop_per_ns=peak * profile.fit(op, variant, "flop_eff", flop_eff) * 1e-9,
            peak_bytes_per_ns=profile.hbm_bytes_per_s * 1e-9,
            peak_flop_per_ns=peak * 1e-9,
        )


def soft_max(a: Floats, b: Floats) -> Floats:
    """(a^4 + b^4)^(1/4), elementwise; between max(a, b) and 1.19 max(a, b)."""
    a2, b2 = a * a, b * b
    out: Floats = np.sqrt(np.sqrt(a2 * a2 + b2 * b2))
    return out


def work_ns(engine: Engine, moved: Floats, flop: Floats) -> Floats:
    """Launch plus the soft maximum of the memory and the compute time."""
    return engine.launch_ns + soft_max(moved / engine.bytes_per_ns, flop / engine.flop_per_ns)


def floor_ns(engine: Engine, moved: Floats, flop: Floats) -> Floats:
    """The hard roofline: nothing runs faster than the datasheet's rates."""
    out: Floats = np.maximum(moved / engine.peak_bytes_per_ns, flop / engine.peak_flop_per_ns)
    return out


def stream_ns(launch_ns: float, bytes_per_ns: float, moved: Floats) -> Floats:
    """Latency plus bytes over rate."""
    return launch_ns + moved / bytes_per_ns


def causal_pairs(q: Floats, kv: Floats, window: int) -> Floats:
    """(query, key) pairs of a causal chunk: query i of q sees keys up to kv - q + i + 1, at most
    `window` (0: all).
    """
    first = kv - q + 1.0
    if window <= 0:
        return q * (first + kv) * 0.5
    w = float(window)
    growing = np.clip(w - first, 0.0, q)  # queries that still see fewer than `window` keys
    return growing * (first + first + growing - 1.0) * 0.5 + (q - growing) * np.minimum(w, kv)
