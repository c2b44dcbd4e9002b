"""Derive hw_profiles/rtx_pro_6000.yaml from vLLM 0.19 layer times on one RTX PRO 6000 (LLMServingSim, MIT).

`python benchmarks/profiles/fit_rtx_pro_6000.py` (seconds; needs ../shared/data and scipy).
"""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import cache
from typing import Any

import fit_h100
import numpy as np
import yaml
from fit_h100 import OUT, part
from holdout import BLOCK
from moesim_kernels.fit.curves import curves, every_size, spread, write_curves, write_whole
from moesim_kernels.fit.model import profile_yaml
from moesim_kernels.fit.physics import PARAMETERS, fit_physics, physics_ns
from moesim_kernels.fit.samples import Samples
from scipy.optimize import least_squares
from tables import DATA

from moesim.hardware import Curve, DeviceProfile

TABLES = DATA / "llmservingsim_rtxpro6000_qwen3_30b_a3b"
DEVICE = "rtx_pro_6000"
HIDDEN, VOCABULARY, HEADS, KV_HEADS, DIM, INTER, EXPERTS, TOP_K = 2048, 151936, 32, 4, 128, 768, 128, 8
SOURCE = "github.com/casys-kaist/LLMServingSim@5daddb21a545 profiler/perf/RTXPRO6000/Qwen3-30B-A3B (MIT): vLLM 0.19.0"


@cache
def device() -> DeviceProfile:
    """The datasheet profile's rates, with this kernel's block."""
    path = OUT / "rtx_pro_6000_datasheet.yaml"
    profile = DeviceProfile.from_spec(yaml.safe_load(path.read_text()), path.parent, str(path))
    return replace(profile, moe_block_rows=BLOCK)


def rows(name: str) -> list[dict[str, str]]:
    """One CSV file."""
    with (TABLES / name).open() as file:
        return list(csv.DictReader(file))


def samples(op: str, variant: str, key: list[Any], size: list[Any], us: list[float], extra: Any) -> Samples:
    """Samples on this device."""
    arrays = {k: np.array(v, float) for k, v in extra.items()}
    ns = np.array(us) * 1e3
    return Samples(op, variant, key, np.array(size, float).reshape(len(us), -1), ns, 0, arrays)


def gemm() -> Samples:
    """Projections and lm_head at TP 1 and 2: key (n, k, dtype)."""
    key, size, us = [], [], []
    for tp in (1, 2):
        width = (HEADS + 2 * KV_HEADS) * DIM // tp
        shapes = {"qkv_proj": (width, HIDDEN), "o_proj": (HIDDEN, HEADS * DIM // tp)}
        shapes["lm_head"] = (VOCABULARY // tp, HIDDEN)
        for name, column in (("dense", "tokens"), ("per_sequence", "sequences")):
            for r in rows(f"tp{tp}/{name}.csv"):
                if r["layer"] in shapes:
                    key.append((*shapes[r["layer"]], "bf16"))
                    size.append(float(r[column]))
                    us.append(float(r["time_us"]))
    return samples("gemm", "bf16", key, size, us, {"n": [k[0] for k in key], "k": [k[1] for k in key]})


def moe() -> Samples:
    """Fused MoE with A of 128 experts hit evenly: key (hidden, inter, A, top_k, dtype, 3), size rows."""
    key, size, us, active = [], [], [], []
    for r in rows("tp1/moe.csv"):
        hit = int(r["activated_experts"])
        key.append((HIDDEN, INTER, hit, TOP_K, "bf16", 3))
        size.append(float(r["tokens"]) * TOP_K)
        active.append(min(hit, size[-1]))
        us.append(float(r["time_us"]))
    many = len(us)
    extra = {"hidden": [HIDDEN] * many, "inter": [INTER] * many, "matrices": [3] * many, "active": active}
    extra |= {"ep": [1 if k[2] == EXPERTS else 2 for k in key], "other": [0.0] * many}
    return samples("moe", "bf16", key, size, us, extra)


def attention(phase: str, prefix: bool = False) -> Samples:
    """Prompts alone (with a cached prefix: `prefix`, size (1, chunk), extra kv) or decodes alone (batch, context)."""
    key, size, us, kv = [], [], [], []
    for tp in (1, 2):
        shape = ("gqa", HEADS // tp, KV_HEADS // tp, DIM, DIM, 0, "bf16")
        for r in rows(f"tp{tp}/attention.csv"):
            chunk, before, many, context = (int(r[c]) for c in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode"))
            if phase == "prefill" and many == 0 and chunk and (before > 0) == prefix:
                size.append((1.0, chunk))
                kv.append(chunk + before)
            elif phase == "decode" and chunk == 0 and before == 0 and many:
                size.append((many, context))
                kv.append(many * context)
            else:
                continue
            key.append(shape)
            us.append(float(r["time_us"]))
    many = len(us)
    extra = {"heads": [k[1] for k in key], "kv_heads": [k[2] for k in key], "dim": [DIM] * many, "v_dim": [DIM] * many}
    return samples(f"attention_{phase}", "gqa_bf16", key, size, us, extra | {"window": [0] * many, "kv": kv})


def elementwise() -> dict[str, float]:
    """Launch and effective bandwidth from norms, rotary embedding and embedding: bytes read and written by each."""
    moved, us = [], []
    width = {"layernorm": 4 * HIDDEN, "final_layernorm": 4 * HIDDEN, "embedding": 2 * HIDDEN}
    width |= {"qk_norm": 2 * (HEADS + KV_HEADS) * DIM, "rotary_emb": 2 * (HEADS + KV_HEADS) * DIM}
    for r in rows("tp1/dense.csv"):
        if r["layer"] in width:
            moved.append(2.0 * width[r["layer"]] * float(r["tokens"]))
            us.append(float(r["time_us"]))
    x, y = np.array(moved), np.array(us) * 1e3
    found = least_squares(
        lambda p: np.log((p[0] + x / (1792.0 * p[1])) / y), [2e3, 0.8], bounds=([0, 0.1], [1e5, 4.0]), loss="soft_l1"
    )
    miss = np.abs(np.log((found.x[0] + x / (1792.0 * found.x[1])) / y))
    print(
        f"elementwise: launch {found.x[0]:.0f} ns, {found.x[1]:.2f} of HBM bandwidth (activations stay in L2), "
        f"90 % within {np.quantile(miss, 0.9):.2f}"
    )
    return {"launch_ns": float(found.x[0]), "mem_eff": float(found.x[1]), "sigma": fit_h100.sigma(miss)}


def eight(size: np.ndarray) -> list[list[float]]:
    """The kept sizes of validation: eight of each shape's last axis; all batches."""
    lengths = spread(size[:, -1].tolist(), 8)
    return [lengths] if size.shape[1] == 1 else [sorted(set(size[:, 0].tolist())), lengths]


def held_out(s: Samples) -> np.ndarray:
    """Held-out errors with eight sizes a shape kept (all batches, of attention)."""
    kept = np.zeros(len(s.ns), bool)
    for at in s.by_key().values():
        axes = eight(s.size[at])
        kept[at] = np.all([np.isin(s.size[at, i], axis) for i, axis in enumerate(axes)], axis=0)
    some = s.where(kept)
    values = fit_physics(some, device())
    rest = s.where(~kept)
    physics = physics_ns(rest, values, device())
    found = {c.key: c for c in curves(some, values, device(), eight)}
    error = []
    for key, at in rest.by_key().items():
        curve = found[key]
        value = np.zeros(len(at))
        lines = curve.log_ratio if curve.log_ratio.ndim == 2 else curve.log_ratio[None]
        for i, line in enumerate(lines):
            mine = rest.size[at, 0] == curve.axes[0][i] if curve.log_ratio.ndim == 2 else np.ones(len(at), bool)
            value[mine] = np.interp(np.log(rest.size[at[mine], -1]), np.log(curve.axes[-1]), line)
        error += np.abs(physics[at] * np.exp(value) / rest.ns[at] - 1).tolist()
    return np.array(error)


def every() -> dict[str, Samples]:
    """All timed operators."""
    heads = {f"attention_{phase}": attention(phase) for phase in ("prefill", "decode")}
    return {"gemm": gemm(), "moe": moe(), **heads}


def prefill_part() -> tuple[Samples, dict[str, float], list[Curve]]:
    """Physics of prefill over whole prompts (weight 3) and chunks on a prefix; residuals of whole prompts."""
    alone, later = attention("prefill"), attention("prefill", prefix=True)
    table = PARAMETERS["attention_prefill"]
    start, low, high = (np.array([row[i] for row in table.values()], float) for i in range(3))

    def miss(x: np.ndarray) -> np.ndarray:
        values = dict(zip(table, x.tolist(), strict=True))
        parts = [np.log(physics_ns(s, values, device()) / s.ns) * w for s, w in ((alone, 3.0), (later, 1.0))]
        return np.concatenate(parts)

    found = least_squares(miss, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale=np.maximum(start, 1e-3))
    values = {n: float(f"{v:.5g}") for n, v in zip(table, found.x.tolist(), strict=True)}
    found_curves = curves(alone, values, device(), every_size)
    area = np.sqrt(later.size[:, 1] * (2 * later.extra["kv"] - later.size[:, 1]))
    physics, error = physics_ns(later, values, device()), []
    for c in found_curves:
        at = [i for i, k in enumerate(later.key) if k == c.key]
        value = np.interp(np.log(area[at]), np.log(c.axes[1]), c.log_ratio[0])
        error += np.abs(physics[at] * np.exp(value) / later.ns[at] - 1).tolist()
    p50, p90 = np.quantile(error, [0.5, 0.9]) * 100
    print(f"attention_prefill on a prefix: {len(error)} fitted points, median {p50:.1f} %, p90 {p90:.1f} %")
    return alone, values, found_curves


def main() -> None:
    """Fit everything and write the profile."""
    timed = every()
    errors = {op: fit_h100.sigma(np.log1p(held_out(s))) for op, s in timed.items()}
    axes = {
        "gemm": lambda size: [spread(size[:, 0].tolist(), 24)],
        "moe": lambda size: [sorted(set(size[:, 0].tolist()))],
    }
    parts = {
        op: part(s, axes.get(op, every_size), profile=device()) for op, s in timed.items() if op != "attention_prefill"
    }
    parts["attention_prefill"] = prefill_part()
    fits = {op: values for op, (_, values, _) in parts.items()}
    fits |= {f"{op}/{s.variant}": values for op, (s, values, _) in parts.items()}
    light = elementwise()
    errors["elementwise"] = light.pop("sigma")
    fits["elementwise"] = light
    write_curves(OUT / "rtx_pro_6000.json", {op: found for op, (_, _, found) in parts.items()})
    sheet = yaml.safe_load((OUT / "rtx_pro_6000_datasheet.yaml").read_text())
    spec = {
        "name": DEVICE,
        "kind": "measured",
        **{k: sheet[k] for k in ("device", "vendor", "memory_gib", "hbm_gb_per_s", "flop_per_s", "num_sms")},
        **{k: sheet[k] for k in ("graph_launch_us", "eager_launch_us")},
        "moe_block_rows": BLOCK,
        "node": sheet["node"],
        "fits": fits,
        "errors": {**{k: round(v, 3) for k, v in sorted(errors.items())}, "host": 0.3},
        "curves": ["rtx_pro_6000.json"],
        "provenance": {
            "date": "2026-04-24 (timed), 2026-11-22 (derived)",
            "tables": SOURCE,
            "versions": "vLLM 0.19.0, CUDA 13.0",
            "driver": "not stated by the tables",
            "how": "python benchmarks/profiles/fit_rtx_pro_6000.py",
            "links, host": "assumed: datasheet; no collective was timed",
            "sources": sheet["provenance"]["sources"],
            "curve_sources": [SOURCE],
        },
    }
    head = "Written by benchmarks/profiles/fit_rtx_pro_6000.py; figures derived, tables not copied."
    write_whole(OUT / "rtx_pro_6000.yaml", profile_yaml(spec, head))
    print("errors", spec["errors"])


if __name__ == "__main__":
    main()
