"""The physics under every operator: few parameters, vectorised, growing with work. Times in ns, float64.

Each is a roofline with a soft knee (Williams et al., CACM 2009) plus what does not overlap with it:
    t = launch + [ (bytes / (HBM * mem_eff))^4 + (FLOP / (peak * flop_eff))^4 ]^(1/4) + ...
The fourth power keeps the sum above the larger term and within 19 % of it. Parameters come from
`DeviceProfile.fits` (`op/variant`, else `op`); the defaults are typical efficiencies for a datasheet profile.
Sizes may be arrays as well as numbers, so that the same code is fitted over many shapes at once.

Legend: m, n, k matrix sizes; q new tokens of one sequence; kv tokens it attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from moesim.arrays import FloatArray
from moesim.hardware import DeviceProfile

__all__ = ["BACKWARD", "DEFAULTS", "Rates", "causal_pairs", "soft_max"]

Number: TypeAlias = Any  # a float or a float64 array: formulas broadcast

DEFAULTS: dict[str, dict[str, float]] = {
    # launch: graph launches that the operator's kernels take together
    "gemm": {"launch": 1.0, "mem_eff": 0.85, "flop_eff": 0.80, "k_half": 100.0},
    "moe": {"launch": 8.0, "mem_eff": 0.85, "flop_eff": 0.65, "row_hidden": 10.0, "nonlocal_hidden": 0.5},
    "attention_prefill": {"launch": 4.0, "mem_eff": 0.8, "flop_eff": 0.5, "diagonal": 128.0, "tile_rows": 64.0},
    "attention_decode": {"launch": 4.0, "mem_eff": 0.85, "flop_eff": 0.6},
    "elementwise": {"launch": 1.0, "mem_eff": 0.80, "flop_eff": 1.0},
    "router": {"launch": 2.0, "mem_eff": 0.85, "flop_eff": 0.5},
    "block": {"launch": 0.0, "mem_eff": 1.0, "flop_eff": 1.0},  # its physics are the parts' prices
    "copy": {"launch": 2.0, "eff": 0.85, "mem_eff": 1.0, "flop_eff": 1.0},
    "storage": {"launch": 10.0, "eff": 0.8, "mem_eff": 1.0, "flop_eff": 1.0},
}
DEFAULTS |= {"router_backward": DEFAULTS["router"], "attention_backward": DEFAULTS["attention_prefill"]}
DEFAULTS |= {"moe_dgrad": DEFAULTS["moe"], "moe_wgrad": DEFAULTS["moe"]}
BACKWARD = (2.5, 2.0)
"""FLOP and bytes of attention's backward pass over those of its forward pass: five products where there were two
(FlashAttention-2, arXiv 2307.08691, section 4.1), and the gradients of all that is read."""


@dataclass(frozen=True, slots=True)
class Rates:
    """One operator variant on one device: effective and peak rates, and its other parameters by name."""

    launch_ns: float
    bytes_per_ns: float
    flop_per_ns: float
    peak_bytes_per_ns: float
    peak_flop_per_ns: float
    sms: int
    more: dict[str, float]

    @classmethod
    def of(cls, profile: DeviceProfile, op: str, variant: str, dtype: str) -> Rates:
        """Parameters of `op/variant`, else of `op`, else DEFAULTS."""
        values = dict(DEFAULTS[op])
        if profile.kind == "measured":
            values |= {"row_hidden": 0.0, "nonlocal_hidden": 0.0, "diagonal": 0.0, "tile_rows": 0.0, "k_half": 0.0}
        for key in (op, f"{op}/{variant}"):
            values |= profile.fits.get(key, {})
        peak = profile.flop_rate(dtype) * 1e-9
        hbm = profile.hbm_bytes_per_s * 1e-9
        launch = values.get("launch_ns", values["launch"] * profile.graph_launch_ns)
        return cls(launch, hbm * values["mem_eff"], peak * values["flop_eff"], hbm, peak, profile.num_sms, values)

    def get(self, name: str) -> float:
        """A parameter that is 0 unless stated."""
        return self.more.get(name, 0.0)

    def floor_ns(self, moved: Number, flop: Number) -> Number:
        """The hard roofline: nothing runs faster than the datasheet's rates."""
        return np.maximum(moved / self.peak_bytes_per_ns, flop / self.peak_flop_per_ns)

    def gemm_ns(self, m: Number, n: Number, k: Number, weight_bytes: float) -> Number:
        """C[m, n] = A[m, k] B[k, n]. Host terms bound kernels that the host launches one by one (no graph):
        below and from `switch_rows` rows different kernels run; rows not a multiple of 4 cost a padding launch.
        row_ns: what a row costs whatever its width (activations quantised row by row).
        """
        memory = (n * k * weight_bytes + m * (2.0 * (n + k))) / self.bytes_per_ns
        compute = m * (2.0 * n * k / self.flop_per_ns * (1.0 + self.get("k_half") / k))
        ns = self.launch_ns + soft_max(memory, compute) + m * self.get("row_ns")
        if "host_ns" not in self.more:
            return ns
        large = m >= self.get("switch_rows")
        odd = np.where(large & (m % 4 > 0), self.get("host_odd_ns"), 0.0)
        host = np.where(large, self.more["host_ns"], self.get("host_small_ns")) + odd
        narrow = (np.asarray(n) < 64) | (np.asarray(k) < 128)
        host = np.where(narrow, self.get("host_narrow_ns"), host)
        return np.maximum(ns + odd, host)

    def moe_ns(
        self, rows: Number, active: Number, padded: Number, other: Number, size: tuple[Number, Number, Number, float]
    ) -> Number:
        """Grouped GEMMs. size: hidden, intermediate, matrices an expert (3 gated, 2 not), bytes a weight.

        Skew enters through active experts (weight bytes) and padded rows (FLOP). Rows pay for permute, activation
        and combine (bytes: row_hidden * hidden + row_inter * intermediate); rows of others for being passed over.
        serial 1: experts run one after the other, and the row-work table holds the reading of their weights too, so
        that t = launch + sum over experts of g(rows) + rows * per row.
        """
        hidden, inter, matrices, weight_bytes = size
        weights = matrices * hidden * inter
        memory = active * (weights * weight_bytes / self.bytes_per_ns)
        saturation = 1.0 + self.get("inter_half") / inter
        compute = padded * (2.0 * weights / self.flop_per_ns * saturation)
        per_row = (self.get("row_hidden") * hidden + self.get("row_inter") * inter) / self.peak_bytes_per_ns
        per_other = self.get("nonlocal_hidden") * hidden / self.peak_bytes_per_ns
        main = compute if self.get("serial") else soft_max(memory, compute)
        return self.launch_ns + main + rows * per_row + other * per_other

    def prefill_ns(self, count: Number, kv: Number, wide: Number, work: tuple[Number, Number]) -> Number:
        """`count` equal chunks that see kv keys. wide: key plus value dim. work: bytes and FLOP of one chunk.

        One SM takes `tile_rows` queries of a head through their keys in series: a floor that few or short chunks
        (a small chunk on a long prefix above all) do not get under, however idle the other SMs are.
        """
        moved, flop = work
        compute = flop * count / self.flop_per_ns
        series = kv * (self.get("tile_rows") * 2.0 * wide * self.sms / self.flop_per_ns)
        memory = moved * count / self.bytes_per_ns
        return self.launch_ns + count * self.get("seq_ns") + soft_max(memory, soft_max(compute, series))

    def decode_ns(self, batch: Number, kv: Number, units: Number, work: tuple[Number, Number]) -> Number:
        """One token for each of `batch` sequences, `kv` context tokens in all. units: parallel parts a sequence
        (KV heads; query heads for MLA). work: bytes and FLOP in all. A long context is read in series per part.
        """
        moved, flop = work
        memory = soft_max(moved / self.bytes_per_ns, flop / self.flop_per_ns)
        series = kv / np.maximum(batch, 1.0) * self.get("token_ns")
        fixed = self.launch_ns + batch * (self.get("seq_ns") + units * self.get("unit_ns"))
        return fixed + soft_max(memory, series)


def soft_max(a: Number, b: Number) -> Number:
    """(a^4 + b^4)^(1/4), elementwise; between max(a, b) and 1.19 max(a, b)."""
    a2, b2 = a * a, b * b
    return np.sqrt(np.sqrt(a2 * a2 + b2 * b2))


def causal_pairs(q: FloatArray, kv: FloatArray, window: Number) -> FloatArray:
    """(query, key) pairs of a causal chunk: query i of q sees keys up to kv - q + i + 1, at most `window` (0: all)."""
    first = kv - q + 1.0
    full: FloatArray = q * (first + kv) * 0.5
    if np.ndim(window) == 0 and window <= 0:
        return full
    w = np.where(np.asarray(window) > 0, window, np.inf)
    growing = np.clip(w - first, 0.0, q)  # queries that still see fewer than `window` keys
    capped: FloatArray = growing * (first + first + growing - 1.0) * 0.5 + (q - growing) * np.minimum(w, kv)
    return capped
