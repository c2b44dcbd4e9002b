"""Fit the physics and take residual curves from samples, for the shipped profiles and for their validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from tables import BYTES, Samples

from moesim.cost.operators import AttentionShape, decode_work, prefill_work
from moesim.cost.physics import Rates
from moesim.hardware import Curve

HBM = 3350.0
# HBM bytes per ns, SMs, FLOP per ns by dtype
DEVICES: dict[str, tuple[float, int, dict[str, float]]] = {
    "h100": (HBM, 132, {"bf16": 989e3, "fp8": 1978e3, "fp8_block": 1978e3, "mxfp4": 989e3}),
    "rtx_pro_6000": (1792.0, 188, {"bf16": 467.8e3}),
}
BLOCK = 64  # rows a grouped GEMM pads an expert's share to; 64 suits the skewed rows of three of four kernels best

# Start, lower and upper bound of each fitted parameter.
_EFF = {"mem_eff": (0.85, 0.1, 1.0), "flop_eff": (0.7, 0.05, 1.0)}
PARAMETERS: dict[str, dict[str, tuple[float, float, float]]] = {
    "gemm": {"launch_ns": (3e3, 0, 2e5), **_EFF, "k_half": (100, 0, 5e3), "row_ns": (0.5, 0, 100)},
    "gemm@eager": {
        "launch_ns": (1e4, 0, 2e5),
        **_EFF,
        "k_half": (100, 0, 5e3),
        "row_ns": (0.5, 0, 100),
        "host_small_ns": (6e4, 0, 5e5),
        "host_ns": (8.8e4, 0, 5e5),
        "host_odd_ns": (1e4, 0, 1e5),
        "host_narrow_ns": (1.7e5, 0, 5e5),
    },
    "moe": {
        "launch_ns": (3e4, 0, 2e5),
        **_EFF,
        "row_hidden": (10, 0, 60),
        "row_inter": (10, 0, 60),
        "nonlocal_hidden": (0.5, 0, 10),
        "inter_half": (100, 0, 4e3),
    },
    "attention_prefill": {
        "launch_ns": (1.2e4, 0, 1e5),
        **_EFF,
        "diagonal": (128, 0, 512),
        "seq_ns": (30, 0, 1e4),
        "tile_rows": (64, 0, 256),
    },
    "attention_decode": {
        "launch_ns": (1.2e4, 0, 1e5),
        **_EFF,
        "seq_ns": (20, 0, 1e4),
        "unit_ns": (10, 0, 1e4),
        "token_ns": (0.4, 0, 1e3),
    },
}


def spread(counts: Iterable[float], number: int) -> list[float]:
    """`number` counts out of many by one rule: the least, the largest, then again and again the count nearest the
    log middle of the widest gap (ties: the lower).
    """
    pool = sorted(set(counts))
    kept = {pool[0], pool[-1]}
    while len(kept) < min(number, len(pool)):
        order = sorted(kept)
        gaps = [(-round(float(np.log2(b / a)), 9), a, b) for a, b in pairwise(order)]
        _, low, high = min(g for g in gaps if any(g[1] < c < g[2] for c in pool))
        middle = (low * high) ** 0.5
        kept.add(min((c for c in pool if low < c < high), key=lambda c: (round(abs(np.log2(c / middle)), 6), c)))
    return sorted(kept)


def dtype_of(variant: str) -> str:
    """The dtype that multiplies: attention runs in bf16."""
    name = variant.split("@")[0]
    return name if name in BYTES else "bf16"


def rates(values: dict[str, float], variant: str, device: str = "h100") -> Rates:
    """Rates on the device with these parameters."""
    hbm, sms, peaks = DEVICES[device]
    peak = peaks[dtype_of(variant)]
    return Rates(values["launch_ns"], hbm * values["mem_eff"], peak * values["flop_eff"], hbm, peak, sms, values)


def physics_ns(s: Samples, values: dict[str, float]) -> np.ndarray:
    """Physics of every sample, shapes as arrays."""
    r = rates(values, s.variant, s.device)
    x = s.extra
    if s.op == "gemm":
        return np.asarray(r.gemm_ns(s.size[:, 0], x["n"], x["k"], BYTES[dtype_of(s.variant)]))
    if s.op == "moe":
        rows, active = s.size[:, 0], x["active"]
        padded = np.ceil(rows / active / BLOCK) * BLOCK * active
        size = (x["hidden"], x["inter"], x["matrices"], BYTES[dtype_of(s.variant)])
        return np.asarray(r.moe_ns(rows, active, padded, x["other"], size))
    batch, length = s.size[:, 0], s.size[:, 1]
    shape = _shape(s)
    if s.op == "attention_prefill":
        moved, pairs, per_pair = prefill_work(shape, length, length)
        if s.variant.startswith("gqa"):
            moved, pairs = _windowed(s, moved, pairs)
        work = (moved, (pairs + length * r.get("diagonal")) * per_pair)
        keys = length
        if s.variant.startswith("gqa"):
            keys = np.where(x["window"] > 0, np.minimum(length, x["window"] + 128.0), length)
        return np.asarray(r.prefill_ns(batch, keys, shape.head_dim + shape.v_head_dim, work))
    kv = batch * length
    units = shape.num_kv_heads
    if s.variant.startswith("gqa"):
        kv = batch * np.where(x["window"] > 0, np.minimum(length, x["window"]), length)
    else:
        units = shape.num_heads
    return np.asarray(r.decode_ns(batch, kv, units, decode_work(shape, batch, kv)))


def _windowed(s: Samples, moved: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Causal pairs of whole prompts under each sample's own window."""
    length, window = s.size[:, 1], s.extra["window"]
    w = np.where(window > 0, np.minimum(window, length), length)
    return moved, w * (w + 1) / 2 + (length - w) * w


def _shape(s: Samples) -> Any:
    """Sizes as arrays behind AttentionShape's names (windows are handled apart)."""
    kv = s.variant.split("_")[1]
    x = s.extra
    if s.variant.startswith("mla"):
        heads: Any = x["heads"]
        return AttentionShape("mla", heads, heads, 192, 128, 576, "bf16", kv, 0)
    sizes: Any = (x["heads"], x["kv_heads"], x["dim"], x["v_dim"])
    return AttentionShape("gqa", *sizes, 0, "bf16", kv, 0)


def fit(s: Samples, most: int = 4000) -> dict[str, float]:
    """Least squares on log time (soft L1), over at most `most` evenly spaced samples."""
    name = "gemm@eager" if s.variant.endswith("@eager") and s.op == "gemm" else s.op
    table = PARAMETERS[name]
    some = s.where(np.isin(np.arange(len(s.ns)), np.linspace(0, len(s.ns) - 1, min(most, len(s.ns))).astype(int)))
    fixed = {"switch_rows": 32.0} if name == "gemm@eager" else {}
    names = list(table)
    start, low, high = (np.array([table[n][i] for n in names], float) for i in range(3))

    def miss(x: np.ndarray) -> np.ndarray:
        values = {**fixed, **dict(zip(names, x.tolist(), strict=True))}
        return np.log(physics_ns(some, values) / some.ns)

    found = least_squares(
        miss, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale=np.maximum(start, 1e-3), max_nfev=60
    )
    values = {n: float(f"{v:.5g}") if v > 1e-6 else 0.0 for n, v in zip(names, found.x.tolist(), strict=True)}
    return {**values, **fixed}


def curves(s: Samples, values: dict[str, float], axes_of: Callable[[np.ndarray], list[list[float]]]) -> list[Curve]:
    """Residual curves of every shape at the sizes `axes_of` keeps of it (one list for each axis)."""
    ratio = np.log(s.ns / physics_ns(s, values))
    out = []
    for key, rows in s.by_key().items():
        axes = axes_of(s.size[rows])
        grid = np.full([len(a) for a in axes], np.nan)
        at = [{v: i for i, v in enumerate(axis)} for axis in axes]
        points: dict[tuple[int, ...], list[float]] = {}
        for row in rows:
            if all(v in places for v, places in zip(s.size[row].tolist(), at, strict=True)):
                cell = tuple(places[v] for v, places in zip(s.size[row].tolist(), at, strict=True))
                points.setdefault(cell, []).append(float(ratio[row]))
        for cell, found in points.items():
            grid[cell] = float(np.median(found))
        if not points:
            continue
        missing = np.isnan(grid)
        grid = fill(grid)
        if len(axes) == 1 and not missing.any():
            own = {float(s.size[row, 0]): float(np.log(s.ns[row])) - float(ratio[row]) for row in rows}
            physics = np.array([own[v] for v in axes[0]])
            grid = monotone(grid + physics) - physics
        if s.op == "gemm":
            grid = steady_host(s, values, key, axes[0], grid)
        grade = np.where(missing, 2, 0).astype(np.uint8) if missing.any() else None
        if s.op == "moe" and s.extra["ep"][rows[0]] > 1:
            grade = np.full(grid.shape, 1, np.uint8)
        variant = s.variant
        out.append(Curve(key, variant, tuple(np.array(a) for a in axes), np.round(grid, 3), grade, s.source))
    return out


def monotone(values: np.ndarray, most: float = 0.3) -> np.ndarray:
    """Isotonic regression (pool adjacent violators) of log times. Drops above `most` stay: they are kernel switches."""
    blocks: list[list[float]] = []
    for v in values.tolist():
        blocks.append([v, 1.0])
        while len(blocks) > 1 and 0 < blocks[-2][0] - blocks[-1][0] < most:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.concatenate([np.full(int(n), v) for v, n in blocks])


def steady_host(
    s: Samples, values: dict[str, float], key: tuple[Any, ...], m: list[float], grid: np.ndarray
) -> np.ndarray:
    """Where the host's launches bound a kernel the points differ by noise alone: give them their median."""
    if "host_ns" not in values:
        return grid
    n, k, dtype = key
    rows = np.array(m)
    bare = {name: v for name, v in values.items() if name != "host_ns"}
    device = np.asarray(rates(bare, s.variant).gemm_ns(rows, n, k, BYTES[dtype]))
    both = np.asarray(rates(values, s.variant).gemm_ns(rows, n, k, BYTES[dtype]))
    out = grid.copy()
    for group in ((device < 0.8 * both) & (rows < 32), (device < 0.8 * both) & (rows >= 32)):
        if group.any():
            out[group] = np.median(grid[group])
    return out


def fill(grid: np.ndarray) -> np.ndarray:
    """Empty cells of a grid from the nearest filled ones along the last, then the first axis."""
    out = grid.copy()
    for _ in range(3):
        for view in (out, out.T) if out.ndim == 2 else (out[None],):
            for line in view:
                known = np.isfinite(line)
                if known.any() and not known.all():
                    line[~known] = np.interp(np.flatnonzero(~known), np.flatnonzero(known), line[known])
    return out
