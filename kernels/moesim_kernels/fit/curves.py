"""Residual curves, ln(measured / physics) at chosen sizes of each shape, and the file they are kept in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.dtypes import dtype_bytes
from moesim.hardware import Curve, DeviceProfile
from moesim_kernels.fit.physics import dtype_of, physics_ns, rates
from moesim_kernels.fit.samples import Samples

__all__ = ["Axes", "curves", "every_size", "monotone", "spread", "write_curves", "write_whole"]

FloatArray = NDArray[np.float64]
Axes = Callable[[FloatArray], list[list[float]]]
"""Of one shape's sizes [points, axes], the sizes to keep on each axis."""


_NO_KERNEL = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "copy", "storage")


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


def every_size(size: FloatArray) -> list[list[float]]:
    """All sizes of a shape."""
    return [sorted(set(size[:, i].tolist())) for i in range(size.shape[1])]


def curves(
    s: Samples, values: Mapping[str, float], profile: DeviceProfile, axes_of: Axes = every_size, drop: float = 0.3
) -> list[Curve]:
    """Residual curves of every shape at the sizes that `axes_of` keeps of it.

    Where a size was timed more than once the median counts. Cells of a grid without a point are filled in and graded
    extrapolated. Along one axis log times are made isotonic up to kernel switches, drops above `drop` (`monotone`),
    of which links, copies and disks have none; not where samples carry histograms, since more rows on fewer experts
    may be faster.
    """
    drop = math.inf if s.op in _NO_KERNEL else drop
    ratio = np.log(s.ns / physics_ns(s, values, profile))
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
        grid = _fill(grid)
        if len(axes) == 1 and not missing.any() and s.counts is None:
            own = {float(s.size[row, 0]): float(np.log(s.ns[row])) - float(ratio[row]) for row in rows}
            physics = np.array([own[v] for v in axes[0]])
            grid = monotone(grid + physics, drop) - physics
        if s.op == "gemm":
            grid = _steady_host(s, values, profile, (key, axes[0], grid))
        grade = np.where(missing, 2, 0).astype(np.uint8) if missing.any() else None
        if s.op == "moe" and "ep" in s.extra and s.extra["ep"][rows[0]] > 1:
            grade = np.full(grid.shape, 1, np.uint8)
        out.append(Curve(key, s.variant, tuple(np.array(a) for a in axes), np.round(grid, 3), grade, s.source))
    return out


def monotone(values: FloatArray, most: float = 0.3) -> FloatArray:
    """Isotonic regression (pool adjacent violators) of log times. Drops above `most` stay: they are kernel switches."""
    blocks: list[list[float]] = []
    for v in values.tolist():
        blocks.append([v, 1.0])
        while len(blocks) > 1 and 0 < blocks[-2][0] - blocks[-1][0] < most:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.concatenate([np.full(int(n), v) for v, n in blocks])


def _steady_host(
    s: Samples,
    values: Mapping[str, float],
    profile: DeviceProfile,
    curve: tuple[tuple[Any, ...], list[float], FloatArray],
) -> FloatArray:
    """Where the host's launches bound a kernel the points differ by noise alone: give them their median."""
    key, m, grid = curve
    if "host_ns" not in values:
        return grid
    rows, dtype = np.array(m), dtype_of(s)
    bare = {name: v for name, v in values.items() if name != "host_ns"}
    device = np.asarray(rates(bare, dtype, profile).gemm_ns(rows, key[0], key[1], dtype_bytes(dtype)))
    both = np.asarray(rates(values, dtype, profile).gemm_ns(rows, key[0], key[1], dtype_bytes(dtype)))
    out = grid.copy()
    for group in ((device < 0.8 * both) & (rows < 32), (device < 0.8 * both) & (rows >= 32)):
        if group.any():
            out[group] = np.median(grid[group])
    return out


def _fill(grid: FloatArray) -> FloatArray:
    """Empty cells of a grid from the nearest filled ones along the last, then the first axis."""
    out = grid.copy()
    for _ in range(3):
        for view in (out, out.T) if out.ndim == 2 else (out[None],):
            for line in view:
                known = np.isfinite(line)
                if known.any() and not known.all():
                    line[~known] = np.interp(np.flatnonzero(~known), np.flatnonzero(known), line[known])
    return out


def curves_text(curves_by_op: Mapping[str, Sequence[Curve]]) -> str:
    """Compact JSON as `moesim.hardware_curves.load_curves` reads it; axes that curves share are written once."""
    axes: list[list[float]] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    for op, found in curves_by_op.items():
        for c in found:
            places = []
            for axis in c.axes:
                plain = [int(v) if v == int(v) else round(v, 3) for v in axis.tolist()]
                if plain not in axes:
                    axes.append(plain)
                places.append(axes.index(plain))
            row = {"key": list(c.key), "variant": c.variant, "axes": places, "log_ratio": c.log_ratio.tolist()}
            if c.grade is not None and c.grade.any():
                codes = sorted(set(c.grade.ravel().tolist()))
                row["grade"] = codes[0] if len(codes) == 1 else c.grade.tolist()
            row["source"] = c.source
            rows.setdefault(op, []).append(row)
    body = ",\n".join(
        f'"{op}":[\n' + ",\n".join(json.dumps(r, separators=(",", ":")) for r in found) + "\n]"
        for op, found in rows.items()
    )
    return '{"axes":' + json.dumps(axes, separators=(",", ":")) + ',\n"curves":{\n' + body + "\n}}\n"


def write_curves(path: Path, curves_by_op: Mapping[str, Sequence[Curve]]) -> int:
    """Write a curve file, whole or not at all; its bytes. Raises OSError where the folder cannot be written."""
    return write_whole(path, curves_text(curves_by_op))


def write_whole(path: Path, text: str) -> int:
    """Write a text file beside its place, then rename it: readers see the old file or the new one. Its bytes."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        data = text.encode()
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return len(data)
