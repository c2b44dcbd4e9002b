"""DeepGEMM's FP8 kernels on H20 and H800, as InferSim timed them: GEMM, and grouped GEMM of decode (masked) and
prefill (contiguous). Two devices of one architecture, one with a seventh of the other's FLOP.

A grouped row holds both products of a layer, up and gate in one, down; their sum is what is predicted. Its benchmark
draws each expert's rows as the integer part of m * U(0.7, 1.3) (kernel_benchmark/deepgemm_grouped_gemm_masked.py), so
at m = 1 half of the experts have none: load-blind models read all of their weights.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import numpy as np
from moesim_kernels.fit.curves import spread
from moesim_kernels.fit.model import Fitted, fit_operator, predict, with_fits
from moesim_kernels.fit.samples import Samples, sample_points
from numpy.typing import NDArray

from benchmarks.validation.rows import DATA, HELD_OUT, ROOT, UNSEEN, Row, Source, beside, found, interpolated
from moesim.cost.operators import MoEShape, Operators
from moesim.hardware import DeviceProfile
from moesim.scenario.load import load_profile

GROUP = "operators"
TITLE = "DeepGEMM on H20 and H800"
KINDS = ("gemm", "grouped_gemm/decode", "grouped_gemm/prefill")
SOURCE = Source(
    "InferSim",
    "github.com/alibaba/InferSim",
    "f2293dab6d23",
    "Apache-2.0",
    tuple(f"kernels/infersim/{kind}/{gpu}/data.csv" for kind in KINDS for gpu in ("h20", "h800")),
    "H20 96GB, H800 80GB",
)
KEPT = 4
"""sizes a shape at most, and no more than half of those that it has (2 to 22)"""
RATES = {"h20": (4.096, 148e12, 296e12, 78), "h800": (3.35, 989e12, 1979e12, 132)}
"""TB/s, bf16 and FP8 FLOP/s (hardware/gpu.py there; the H800's memory as of an H100), multiprocessors"""
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@cache
def device(gpu: str) -> DeviceProfile:
    """An H100's datasheet with this device's rates."""
    base = load_profile(ROOT / "hw_profiles" / "h100_sxm_datasheet.yaml")
    memory, half, eight, sms = RATES[gpu]
    flop = MappingProxyType({**base.flop_per_s, "bf16": half, "fp16": half, "fp8": eight})
    return replace(
        base, name=gpu, kind="measured", hbm_bytes_per_s=memory * 1e12, flop_per_s=flop, num_sms=sms, moe_block_rows=64
    )


def read(kind: str, gpu: str) -> list[dict[str, str]]:
    """One CSV file."""
    with (DATA / "kernels" / "infersim" / kind / gpu / "data.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def gemm(gpu: str) -> Samples:
    """Key (n, k, dtype), size m; the median where a point was timed twice."""
    points: dict[tuple[int, int, int], list[float]] = {}
    for r in read("gemm", gpu):
        points.setdefault((int(r["n"]), int(r["k"]), int(r["m"])), []).append(float(r["latency_us"]) * 1e3)
    order = sorted(points)
    key = [(n, k, "fp8_block") for n, k, _ in order]
    return sample_points("gemm", "fp8_block", key, [m for *_, m in order], [float(np.median(points[p])) for p in order])


@dataclass(frozen=True)
class Grouped:
    """Grouped GEMMs and the mean rows of work of each point, [P]."""

    samples: Samples
    padded: Floats

    def where(self, mask: NDArray[np.bool_]) -> Grouped:
        """Some of them."""
        return Grouped(self.samples.where(mask), self.padded[mask])


@cache
def grouped(phase: str, gpu: str) -> Grouped:
    """Key (hidden, inter, slots, top-k, dtype, 3), size rows; active and padded as the benchmark draws them. Masked
    kernels get tiles of 64 rows, contiguous ones pad to 128."""
    points: dict[tuple[int, ...], list[float]] = {}
    for r in read(f"grouped_gemm/{phase}", gpu):
        at = (r["hidden_size"], r["intermediate_size"], r["num_local_experts"], r["topk"], r["tokens_per_expert"])
        ns = (float(r["up_proj_us"]) + float(r["down_proj_us"])) * 1e3
        points.setdefault(tuple(map(int, at)), []).append(ns)
    order = sorted(points)
    key = [(*p[:4], "fp8_block", 3) for p in order]
    slots, mean = (np.array([float(p[i]) for p in order]) for i in (2, 4))
    share = (np.arange(2000) + 0.5) / 2000
    drawn = [np.floor(m * (0.7 + 0.6 * share)) for m in mean.tolist()]
    block = 64 if phase == "decode" else 128
    rows = slots * [float(d.mean()) for d in drawn]
    ns = [float(np.median(points[p])) for p in order]
    s = sample_points("moe", "fp8_block", key, np.maximum(rows, 1.0), ns)
    s.extra["active"] = slots * [float((d > 0).mean()) for d in drawn]
    return Grouped(s, slots * [float(np.ceil(d / block).mean()) * block for d in drawn])


def kept(s: Samples) -> NDArray[np.bool_]:
    """A few sizes a shape."""
    out = np.zeros(len(s.ns), bool)
    for at in s.by_key().values():
        sizes = sorted(set(s.size[at, 0].tolist()))
        out[at] = np.isin(s.size[at, 0], spread(sizes, min(KEPT, max(2, len(sizes) // 2))))
    return out


def priced(profile: DeviceProfile, t: Grouped) -> Floats:
    """ns, from the drawn rows."""
    ops, s = Operators(profile), t.samples
    out = np.zeros(len(s.ns))
    for key, at in s.by_key().items():
        shape = MoEShape(*key[:5], True)
        out[at] = ops.moe(s.size[at, 0], s.extra["active"][at], t.padded[at], 0.0, shape).ns
    return out


def row(
    what: str, s: Samples, fit: NDArray[np.bool_], rest: NDArray[np.bool_], t: Grouped | None, base: DeviceProfile
) -> Row:
    """One line: fitted on `fit`, judged on `rest`."""
    some, other = s.where(fit), s.where(rest)
    part = fit_operator(some, base)
    profile = with_fits(base, [part])
    bare = with_fits(base, [Fitted(part.op, part.variant, "", part.values, [])])
    unseen = not set(other.key) <= set(some.key)

    def ns(p: DeviceProfile) -> Floats:
        return predict(p, other) if t is None else priced(p, t.where(rest))

    name, guess = ("physics alone", ns(bare)) if unseen else ("interpolated", interpolated(some, other))
    return Row(
        what,
        f"2 to {KEPT} sizes a shape, {len(some.by_key())} shapes",
        "every sixth shape" if unseen else "all other sizes",
        found(ns(profile), other.ns),
        UNSEEN if unseen else HELD_OUT,
        (beside(name, guess, other.ns),),
    )


def rows() -> list[Row]:
    """Each device and kernel: sizes held out, then (where there are enough) shapes."""
    out = []
    for gpu in ("h20", "h800"):
        base = device(gpu)
        for kind in KINDS:
            t = None if kind == "gemm" else grouped(kind.split("/")[1], gpu)
            s = gemm(gpu) if t is None else t.samples
            mask, shapes = kept(s), list(s.by_key())
            name = "GEMM" if t is None else f"grouped GEMM, {kind.split('/')[1]}"
            out.append(row(f"{gpu.upper()}, {name}", s, mask, ~mask, t, base))
            if len(shapes) >= 12:
                new = np.isin([shapes.index(k) for k in s.key], range(3, len(shapes), 6))
                out.append(row(f"{gpu.upper()}, {name}, shapes never timed", s, mask & ~new, new, t, base))
    return out
