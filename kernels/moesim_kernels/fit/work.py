"""The row-work table: what an expert's rows cost a grouped GEMM, fitted from samples that carry their histograms.

Of an MoE layer  t = launch + main + rows * per row,  main from W = sum over experts of g(rows of the expert):
- experts one after the other (a CPU): main = W * FLOP of a row / rate; g holds the reading of the weights too;
- experts together (a GPU): main = soft maximum of the active experts' bytes and W * FLOP of a row / rate.
g is piecewise linear and never falls; a block of b rows makes steps of b. W is linear in the heights of g, so the
least squares on log time stay small. Which form and which block: the least of n log(cost / n) + parameters log n
(Schwarz 1978) over the same samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from moesim.cost.physics import soft_max
from moesim.dtypes import dtype_bytes
from moesim.hardware import DeviceProfile, RowWork
from moesim_kernels.fit.physics import dtype_of
from moesim_kernels.fit.samples import Samples

__all__ = ["Worked", "fit_work", "stairs"]

FloatArray = NDArray[np.float64]
_KNOTS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192], dtype=np.float64)
_BLOCKS = (16, 32, 64, 128)
_SMOOTH = 0.01  # weight of the second differences of ln g over ln rows: fills in knots that few samples touch


@dataclass(frozen=True)
class Worked:
    """Parameters of `Rates.moe_ns` and the table they go with. score: what forms are compared by, less is better."""

    values: dict[str, float]
    table: RowWork
    score: float


def stairs(block: int) -> RowWork:
    """Rows rounded up to `block` for the first four blocks, half a block above the rows beyond them."""
    rows = [1.0]
    for i in (1, 2, 3):
        rows += [i * block, i * block + 1]
    work = [block * float(np.ceil(r / block)) for r in rows]
    ends = ([4.0 * block, 5.0 * block, 64.0 * block], [4.0 * block, 5.5 * block, 64.5 * block])
    return RowWork(np.array([*rows, *ends[0]]), np.array([*work, *ends[1]]))


def fit_work(s: Samples, profile: DeviceProfile, forms: tuple[str, ...] = ("serial", "together", "blocks")) -> Worked:
    """The best of the forms on MoE samples with counts. Raises ValueError without counts or with fewer than 4 points.

    A part of the time that the samples cannot tell apart (cost of a row, growth of g where all experts have many)
    goes to g.
    """
    if s.counts is None or len(s.ns) < 4:
        raise ValueError("a row-work table needs at least 4 MoE samples with the rows of each expert slot")
    found = []
    if "serial" in forms:
        found.append(_fit_table(s, profile, serial=True))
    if "together" in forms:
        found.append(_fit_table(s, profile, serial=False))
    if "blocks" in forms:
        found += [_fit_blocks(s, profile, block) for block in _BLOCKS]
    return min(found, key=lambda w: w.score)


def _fit_table(s: Samples, profile: DeviceProfile, serial: bool) -> Worked:
    """Heights of g at the knots, launch, cost of a row, and the memory rate where experts run together."""
    counts = s.counts or []
    most = max(float(c.max()) for c in counts)
    knots = _KNOTS[: int(np.searchsorted(_KNOTS, most)) + 1]
    height_PN = np.array([_hats(c, knots).sum(axis=0) for c in counts])

    def total(x: FloatArray) -> FloatArray:
        return np.asarray(height_PN @ np.cumsum(np.exp(x)))

    def bent(x: FloatArray) -> FloatArray:
        ln_work = np.log(np.cumsum(np.exp(x)))
        return np.asarray(_SMOOTH * np.sqrt(len(s.ns)) * np.diff(np.diff(ln_work) / np.diff(np.log(knots))))

    start = np.log(np.diff(np.maximum(knots, 4.0), prepend=0.0) + 1e-3)
    values, x, score = _least(s, profile, total, start, bent if len(knots) > 2 else None, serial)
    work = np.cumsum(np.exp(x))
    slope = (work[-1] - work[-2]) / (knots[-1] - knots[-2]) if len(knots) > 1 else work[0] / knots[0]
    slope = max(slope, 1e-3 * work[-1] / knots[-1])
    values["flop_eff"] = float(f"{1.0 / slope:.5g}")
    work = np.array([float(f"{w:.5g}") for w in np.maximum.accumulate(work / slope)])
    return Worked(values, RowWork(knots, work), score)


def _fit_blocks(s: Samples, profile: DeviceProfile, block: int) -> Worked:
    """Steps of a block; the FLOP rate is fitted in place of heights."""
    table = stairs(block)
    fixed = np.array([float(table.at(c).sum()) for c in s.counts or []])
    values, x, score = _least(s, profile, lambda x: fixed * np.exp(x[0]), np.log([1.4]), None, serial=False)
    values["flop_eff"] = float(f"{float(np.exp(-x[0])):.5g}")
    return Worked(values, table, score)


def _hats(count: NDArray[np.int64], knots: FloatArray) -> FloatArray:
    """Weights of the knots' heights in g(count), [experts, knots]: linear between, from 0, on with the last slope."""
    n = count[count > 0].astype(np.float64)
    ends = np.concatenate([[0.0], knots])
    cell = np.clip(np.searchsorted(ends, n, side="left") - 1, 0, len(ends) - 2)
    place = (n - ends[cell]) / (ends[cell + 1] - ends[cell])
    out = np.zeros((len(n), len(ends)))
    out[np.arange(len(n)), cell] += 1.0 - place
    out[np.arange(len(n)), cell + 1] += place
    return out[:, 1:]


def _least(
    s: Samples,
    profile: DeviceProfile,
    total: Callable[[FloatArray], FloatArray],
    start: FloatArray,
    bent: Callable[[FloatArray], FloatArray] | None,
    serial: bool,
) -> tuple[dict[str, float], FloatArray, float]:
    """Least squares on log time (soft L1) of launch, memory rate, cost of a row and what `total` takes."""
    x, dtype = s.extra, dtype_of(s)
    hbm, peak = profile.hbm_bytes_per_s * 1e-9, profile.flop_rate(dtype) * 1e-9
    weights, rows = x["matrices"] * x["hidden"] * x["inter"], s.size[:, 0]
    read, flop = x["active"] * weights * dtype_bytes(dtype) / hbm, 2.0 * weights / peak
    # launch from a thousandth to all of the fastest point; rows' bytes over hidden; memory rate over the datasheet's
    head = np.array([np.log(0.05 * s.ns.min()), np.log(2.0), np.log(1.2)])

    def ns(p: FloatArray) -> FloatArray:
        compute = total(p[3:]) * flop
        main = compute if serial else soft_max(read * np.exp(p[2]), compute)
        return np.asarray(np.exp(p[0]) + main + rows * x["hidden"] * (np.exp(p[1]) / hbm))

    def miss(p: FloatArray) -> FloatArray:
        light = [0.01 * np.sqrt(len(s.ns)) * (p[:3] - head)]  # what the samples cannot tell stays where it starts
        return np.concatenate([np.log(ns(p) / s.ns), *light, *([bent(p[3:])] if bent is not None else [])])

    low = np.concatenate([[np.log(1e-3 * s.ns.min()), np.log(1e-3), 0.0], np.full(len(start), -14.0)])
    high = np.concatenate([[np.log(s.ns.min()), np.log(100.0), np.log(20.0)], np.full(len(start), 14.0)])
    found = least_squares(
        miss, np.concatenate([head, start]), bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=200
    )
    launch, row_hidden, memory = (float(f"{v:.5g}") for v in np.exp(found.x[:3]))
    values = {"launch_ns": launch, "mem_eff": 1.0 if serial else float(f"{1.0 / memory:.5g}")}
    values |= {"row_hidden": row_hidden} | ({"serial": 1.0} if serial else {})
    off = np.log(ns(found.x) / s.ns) / 0.1
    cost = float((2.0 * (np.sqrt(1.0 + off * off) - 1.0)).sum())
    parameters = len(found.x) - (1 if serial else 0)
    n = len(s.ns)
    return values, found.x[3:], n * float(np.log(max(cost, 1e-9) / n)) + parameters * float(np.log(n))
