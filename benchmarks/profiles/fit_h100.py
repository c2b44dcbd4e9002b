"""Derive hw_profiles/h100_sxm.yaml and its curve files from the public H100 tables: figures, not copies.

`python benchmarks/profiles/fit_h100.py` (about a minute; needs ../shared/data and scipy, pyarrow).
"""

from __future__ import annotations

from typing import Any

import holdout
import numpy as np
import tables
import yaml
from moesim_kernels.fit.curves import curves as curves_of
from moesim_kernels.fit.curves import spread, write_curves, write_whole
from moesim_kernels.fit.model import profile_yaml
from moesim_kernels.fit.physics import fit_physics, physics_ns, rates
from moesim_kernels.fit.samples import Samples
from scipy.optimize import least_squares
from tables import ROOT

from moesim.hardware import Curve, DeviceProfile

OUT = ROOT / "hw_profiles"
GEMM_ROWS = [1.0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768]
LENGTHS = [1.0, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
CONTEXTS = [2.0, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
BATCHES = [1.0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
Part = tuple[Samples, dict[str, float], list[Curve]]


def graph_fp8_block() -> Samples:
    """fp8_block GEMM as it runs inside a CUDA graph.

    The table's rows were launched one by one: below 1.5 times the host's floor they time the host. There the Cutlass
    fp8 row of the same size (timed under a graph) stands in, times the ratio of the two kernels where both are bound
    by the device. Those points are graded extrapolated.
    """
    block, plain = tables.gemm("fp8_block"), tables.gemm("fp8")
    other = {(k[0], k[1], m): ns for k, m, ns in zip(plain.key, plain.size[:, 0], plain.ns, strict=True)}
    stand_in = np.array([other.get((k[0], k[1], m), np.nan) for k, m in zip(block.key, block.size[:, 0], strict=True)])
    host = np.where(block.size[:, 0] < 32, 60e3, 88e3)
    bound = block.ns > 1.5 * host
    ratio = float(np.nanmedian((block.ns / stand_in)[bound]))
    bound &= ~((block.ns < 2.5 * host) & (block.ns > 1.3 * ratio * stand_in))  # a hiccup of the host
    ns = np.where(bound, block.ns, stand_in * ratio)
    block.extra["weak"] = (~bound).astype(float)
    out = Samples("gemm", "fp8_block", block.key, block.size, ns, 10, block.extra)
    wide = (block.extra["n"] >= 64) & (block.extra["k"] >= 128) & np.isfinite(ns)
    print(f"fp8_block / fp8 over {int(bound.sum())} device-bound points: median {ratio:.3f}")
    return out.where(wide)


def part(s: Samples, axes: Any, most: int = 12000, profile: DeviceProfile | None = None) -> Part:
    """Fit and curves of one variant, on the H100 unless another device is given."""
    profile = profile or holdout.base()
    values = fit_physics(s, profile, most)
    found = curves_of(s, values, profile, axes)
    error = np.log(s.ns / physics_ns(s, values, profile))
    print(f"{s.op}/{s.variant}: {len(s.ns)} points, {len(found)} curves, physics alone {np.median(abs(error)):.3f}")
    return s, values, found


def on(wanted: list[list[float]], number: int = 0) -> Any:
    """The wanted sizes that a shape has on each axis; all of them up to `number` by the rule of `spread` if given."""

    def axes(size: np.ndarray) -> list[list[float]]:
        if number:
            return [spread(size[:, 0].tolist(), number)]
        return [sorted(set(size[:, i].tolist()) & set(w)) or [float(size[:, i].min())] for i, w in enumerate(wanted)]

    return axes


def gemms() -> list[Part]:
    """bf16 and fp8 as timed, fp8_block inside a graph and launched by the host."""
    out = []
    for s in (tables.gemm("bf16"), tables.gemm("fp8"), graph_fp8_block(), tables.gemm("fp8_block")):
        wide = s.where((s.extra["n"] >= 128) & (s.extra["k"] >= 128))
        done = part(wide, on([GEMM_ROWS]))
        if s.variant == "fp8_block":
            weak = {(k[0], k[1], m): w for k, m, w in zip(s.key, s.size[:, 0], s.extra["weak"], strict=True)}
            done = (done[0], done[1], [_weaken(c, weak) for c in done[2]])
        out.append(done)
    return out


def _weaken(curve: Curve, weak: dict[Any, float]) -> Curve:
    grade = [2 if weak.get((curve.key[0], curve.key[1], m), 1.0) else 0 for m in curve.axes[0].tolist()]
    source = 10 if any(grade) else 0
    return Curve(curve.key, curve.variant, curve.axes, curve.log_ratio, np.array(grade, np.uint8), source)


def experts() -> list[Part]:
    """vLLM at EP 1; TensorRT-LLM for EP ranks' local work and for DeepSeek-V3 at EP 1 (vLLM's rows are refused)."""
    out, base = [], holdout.base()
    for dtype in ("bf16", "fp8_block", "mxfp4"):
        s = tables.moe("vllm", dtype, True)
        deepseek = np.array([k[0] == 7168 and k[2] == 256 for k in s.key])
        s, values, found = part(s.where(~deepseek), on([], 16))
        if dtype != "mxfp4":
            values["nonlocal_hidden"] = passed_over(dtype if dtype == "fp8_block" else "bf16", values)
        else:
            values["nonlocal_hidden"] = out[0][1]["nonlocal_hidden"]
        out.append((s, values, found))
    for dtype in ("bf16", "fp8_block"):
        s = tables.moe("trtllm", dtype, False)
        error = np.log(s.ns / physics_ns(s, fit_physics(s, base), base))
        slow = {key for key, rows in s.by_key().items() if np.median(error[rows]) > 0.5}
        deepseek = np.array([k[0] == 7168 for k in s.key]) & (dtype == "fp8_block")
        ranks = (s.extra["ep"] > 1) | deepseek
        whole = s.extra["hidden"] * s.extra["inter"] >= 768 * 2048
        fine = np.array([(k not in slow and k[2] <= 128) or d for k, d in zip(s.key, deepseek, strict=True)])
        print(f"moe/{s.variant}: {len(slow)} shapes left out, far slower than their neighbours")
        out.append(part(s.where(ranks & fine & whole), on([], 12)))
    return out


def passed_over(dtype: str, values: dict[str, float]) -> float:
    """What Triton pays for a row of another rank (in hidden-sized bytes): vLLM's EP 8..64 rows from 4096 tokens on."""
    names = ["moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size"]
    names += ["moe_ep_size", "distribution", "kernel_source", "latency"]
    t = tables.read("moe/vllm/0.24.0/moe_perf.parquet", names)
    mask = (t["distribution"] == "balanced") & (t["moe_ep_size"] >= 8) & (t["moe_ep_size"] <= 64)
    mask &= (t["num_tokens"] >= 4096) & (t["moe_tp_size"] == 1)
    t = tables.pick(t, mask & (t["kernel_source"] == "vllm_unquantizedfusedmoe_triton_tritonexperts"))
    rows = t["num_tokens"] * t["topk"] / t["moe_ep_size"]
    active = np.minimum(t["num_experts"] // t["moe_ep_size"], rows)
    block = holdout.BLOCK
    padded = np.ceil(rows / active / block) * block * active
    own = {**holdout_bf16(), "nonlocal_hidden": 0.0} if dtype != "bf16" else {**values, "nonlocal_hidden": 0.0}
    size = (t["hidden_size"], t["inter_size"], 3.0, 2.0)
    physics = rates(own, "bf16", holdout.base()).moe_ns(rows, active, padded, 0.0, size)
    other = t["num_tokens"] * t["topk"] - rows
    found = float(np.median((t["ns"] - physics) * 3350.0 / other / t["hidden_size"]))
    print(f"rows passed over, {dtype}: {found:.2f} x hidden bytes, from {len(rows)} bf16 points")
    return round(found, 2)


def holdout_bf16() -> dict[str, float]:
    """The bf16 physics (vLLM has no fp8_block rows with EP of this kind)."""
    return fit_physics(tables.moe("vllm", "bf16", True), holdout.base())


def attention() -> list[Part]:
    """Head dim 128 whole, head dim 64 where gpt-oss needs it, windows of gpt-oss and Llama 4; MLA."""
    out = []
    small = {(64, 8), (32, 4), (16, 2), (8, 1), (64, 64), (32, 32), (16, 16), (32, 8), (24, 8)}
    for phase, lengths in (("prefill", LENGTHS), ("decode", CONTEXTS)):
        batches = BATCHES[::2]
        for kv in ("bf16", "fp8"):
            s = tables.gqa(phase, kv)
            wanted = np.array(
                [
                    (k[3] == 128 and k[5] in (0, 8192)) or (k[3] == 64 and k[5] in (0, 128) and (k[1], k[2]) in small)
                    for k in s.key
                ]
            )
            out.append(part(s.where(wanted), on([batches, lengths])))
            out.append(part(tables.mla(phase, kv), on([BATCHES, lengths])))
    return out


def rings(node: dict[str, float]) -> tuple[dict[str, dict[str, float]], dict[str, list[Curve]], dict[str, float]]:
    """Collectives inside a node: launch and NVLink efficiency fitted, residuals by bytes, held-out error."""
    fits: dict[str, dict[str, float]] = {}
    curves: dict[str, list[Curve]] = {}
    errors = {}
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        s = tables.ring(op, "nccl")
        if op == "all_reduce":
            s = _faster(tables.ring(op, "graph"), s)
        hops = 2.0 if op == "all_reduce" else 1.0
        x = s.extra["ranks"]
        traffic = 2 * (x - 1) / x if op == "all_reduce" else x - 1

        def ns(p: np.ndarray, s: Samples = s, x: Any = x, t: Any = traffic, h: float = hops) -> np.ndarray:
            wire = s.size[:, 0] * t / (node["nvlink_bytes_per_ns"] * p[1])
            return np.asarray(p[0] + node["nvlink_latency_ns"] * h * np.log2(x) + wire)

        found = least_squares(
            lambda p, ns=ns, s=s: np.log(ns(p) / s.ns), [2e3, 0.7], bounds=([0, 0.1], [1e5, 1.0]), loss="soft_l1"
        )
        fits[op] = {"launch_ns": round(float(found.x[0]), 1), "nvlink_eff": round(float(found.x[1]), 4)}
        fits[op]["nic_eff"] = 0.85
        curves[op] = []
        miss = []
        eager = [tables.ring(op, "eager")] if op == "all_reduce" else []
        for t in [*eager, s]:
            ranks = t.extra["ranks"]
            cost = 2 * (ranks - 1) / ranks if op == "all_reduce" else ranks - 1
            ratio = np.log(t.ns / ns(np.array([*fits[op].values()]), t, ranks, cost))
            for key, rows in t.by_key().items():
                rows = rows[np.argsort(t.size[rows, 0])]
                axis, r = t.size[rows, 0], ratio[rows]
                variant = "@eager" if t in eager else ""
                curves[op].append(Curve(key, variant, (axis,), np.round(r, 3), None, t.source))
                kept = np.isin(axis, spread(axis.tolist(), 8))
                guess = np.interp(np.log(axis), np.log(axis[kept]), r[kept])
                miss += (guess - r)[~kept].tolist()
        errors[op] = sigma(np.abs(np.array(miss)))
    return fits, curves, errors


def _faster(a: Samples, b: Samples) -> Samples:
    """Point by point the faster of two kernels, on a's sizes (what an engine that knows both would take)."""
    ns = a.ns.copy()
    for key, rows in a.by_key().items():
        other = np.array([i for i, k in enumerate(b.key) if k == key])
        other = other[np.argsort(b.size[other, 0])]
        log = np.interp(np.log(a.size[rows, 0]), np.log(b.size[other, 0]), np.log(b.ns[other]))
        inside = a.size[rows, 0] >= b.size[other, 0].min()
        ns[rows] = np.where(inside, np.minimum(ns[rows], np.exp(log)), ns[rows])
    return Samples(a.op, a.variant, a.key, a.size, ns, a.source, a.extra)


def sigma(absolute: np.ndarray) -> float:
    """1 sigma of log from the 90 % quantile of |log error| (a normal law's is 1.645 sigma)."""
    return round(float(np.quantile(absolute, 0.9)) / 1.645, 3)


def held_out_errors() -> dict[str, float]:
    """By operator: the worst of its data sets (eight sizes a shape kept); MoE includes skewed routing."""
    out: dict[str, float] = {}
    for s, data in holdout.cases(quick=True):
        for row in holdout.held_out_sizes(s, data):
            out[row.op] = max(out.get(row.op, 0.0), sigma(np.abs(np.log1p(np.minimum(row.error, 5)))))
    for dtype in ("bf16", "fp8_block"):
        for alpha in (1.01, 1.2):
            row = holdout.skewed(dtype, alpha)[0]
            out["moe"] = max(out["moe"], sigma(np.abs(np.log1p(np.minimum(row.error, 5)))))
    return out


def main() -> None:
    """Fit everything and write the profile."""
    sheet = yaml.safe_load((OUT / "h100_sxm_datasheet.yaml").read_text())
    node = {"nvlink_bytes_per_ns": 450.0, "nvlink_latency_ns": 1500.0}
    dense, moe, heads = gemms(), experts(), attention()
    fits: dict[str, dict[str, float]] = {"gemm": dense[0][1], "moe": moe[0][1], "moe/fp8": moe[1][1]}
    for s, values, _ in [*dense, *moe, *heads]:
        fits[f"{s.op}/{s.variant}"] = values
    for op in ("attention_prefill", "attention_decode"):
        fits[op] = fits[f"{op}/gqa_bf16"]
    ring_fits, ring_curves, errors = rings(node)
    # exchanges are fit_exchange.py's: what it wrote stays
    before: dict[str, Any] = yaml.safe_load((OUT / "h100_sxm.yaml").read_text())
    fits |= ring_fits | {k: v for k, v in before["fits"].items() if k.startswith("all_to_all")}
    errors["all_to_all"] = before["errors"]["all_to_all"]
    errors = {k: round(v, 3) for k, v in {**held_out_errors(), **errors}.items()}
    files = {
        "h100_sxm.gemm.json": {"gemm": [c for _, _, found in dense for c in found]},
        "h100_sxm.moe.json": {"moe": [c for _, _, found in moe for c in found]},
        "h100_sxm.attention.json": {},
        "h100_sxm.links.json": ring_curves,
    }
    for s, _, found in heads:
        files["h100_sxm.attention.json"].setdefault(s.op, []).extend(found)
    for name, curves in files.items():
        print(name, write_curves(OUT / name, curves), "bytes", {op: len(found) for op, found in curves.items()})
    spec = {
        **{k: sheet[k] for k in ("device", "vendor", "memory_gib", "hbm_gb_per_s", "flop_per_s", "num_sms")},
        "name": "h100_sxm",
        "kind": "measured",
        "graph_launch_us": 2.5,
        "eager_launch_us": 8,
        "moe_block_rows": holdout.BLOCK,
        "node": {**sheet["node"], "nvlink_latency_us": node["nvlink_latency_ns"] / 1e3},
        "fits": fits,
        "errors": {**dict(sorted(errors.items())), "elementwise": 0.3, "host": 0.3},
        "curves": [*files, "h100_sxm.exchange.json"],
        "provenance": PROVENANCE
        | {k: before["provenance"][k] for k in ("all_to_all", "curve_sources")}
        | {"sources": sheet["provenance"]["sources"]},
    }
    write_whole(
        OUT / "h100_sxm.yaml",
        profile_yaml(spec, "Written by benchmarks/profiles/fit_h100.py; figures derived, tables not copied."),
    )
    print("errors", errors)


PROVENANCE: dict[str, Any] = {
    "date": "2026-11-22",
    "tables": "PyPI aiconfigurator-core 0.12.0, NVIDIA, Apache-2.0: systems/data/h100_sxm (NVIDIA H100 80GB HBM3)",
    "versions": "vLLM 0.24.0, TensorRT-LLM 1.3.0rc20, NCCL 2.29.2, SGLang 0.5.12 (DeepEP)",
    "driver": "not stated by the tables",
    "how": "python benchmarks/profiles/fit_h100.py; held-out error: python benchmarks/profiles/holdout.py",
    "elementwise, host": "assumed: 2.5 us a launch and 80 % of HBM bandwidth",
}

if __name__ == "__main__":
    main()
