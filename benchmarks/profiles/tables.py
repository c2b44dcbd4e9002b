"""Read the public H100 kernel tables into samples of the cost model's operators.

Source: PyPI aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), folder systems/data/h100_sxm; see the README beside the
data. Rows that cannot be right are left out, each with its reason: `Samples.refused` counts them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from moesim_kernels.fit.samples import Samples

from moesim.dtypes import dtype_bytes

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "kernels"
H100 = DATA / "h100_sxm"
DTYPE = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "w4a16_mxfp4": "mxfp4"}

SOURCES = {
    0: "gemm/vllm/0.24.0: torch.nn.functional.linear (bf16), Cutlass (fp8), DeepGEMM and FlashInfer (fp8_block)",
    1: "moe/vllm/0.24.0: Triton fused MoE, EP 1, balanced",
    2: "moe/trtllm/1.3.0rc20: Cutlass MoE, balanced, its EP ranks",
    3: "attention/vllm/0.24.0: FlashAttention 3",
    4: "mla/trtllm/1.3.0rc20",
    5: "comm/vllm/0.24.0: custom all-reduce under a CUDA graph",
    6: "comm/vllm/0.24.0: custom all-reduce launched one by one",
    7: "comm/nccl/2.29.2",
    8: "comm/sglang/0.5.12: DeepEP normal kernels, 20 SMs",
    9: "comm/sglang/0.5.12: DeepEP low-latency kernels",
    10: "gemm/vllm/0.24.0 Cutlass fp8, times the fp8_block/fp8 ratio of device-bound rows",
}


def read(path: str, columns: list[str]) -> dict[str, np.ndarray]:
    """Columns of one table; the latency (ms) as `ns`."""
    table = pq.read_table(H100 / path, columns=columns)
    out = {c: table[c].to_numpy(zero_copy_only=False) for c in table.column_names}
    if "latency" in out:
        out["ns"] = out.pop("latency") * 1e6
    return out


def pick(table: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of a table."""
    return {name: values[mask] for name, values in table.items()}


def gemm(dtype: str) -> Samples:
    """GEMM of one weight dtype: key (n, k, dtype), size m. The median where a point was timed more than once."""
    t = read("gemm/vllm/0.24.0/gemm_perf.parquet", ["gemm_dtype", "m", "n", "k", "latency"])
    t = pick(t, np.array([DTYPE.get(d) == dtype for d in t["gemm_dtype"]]))
    points: dict[tuple[int, int, int], list[float]] = {}
    for n, k, m, ns in zip(t["n"].tolist(), t["k"].tolist(), t["m"].tolist(), t["ns"].tolist(), strict=True):
        points.setdefault((n, k, m), []).append(ns)
    order = sorted(points)
    size = np.array([[m] for _, _, m in order], dtype=np.float64)
    variant = "fp8_block@eager" if dtype == "fp8_block" else dtype
    return Samples(
        "gemm",
        variant,
        [(n, k, dtype) for n, k, _ in order],
        size,
        np.array([float(np.median(points[p])) for p in order]),
        0,
        {"n": np.array([p[0] for p in order], float), "k": np.array([p[1] for p in order], float)},
    )


def moe(backend: str, dtype: str, ep_one: bool, distribution: str = "balanced") -> Samples:
    """MoE rows (by default balanced): key (hidden, inter, slots, top_k, dtype, matrices), size rows = T K / EP.

    Refused: rows faster than reading their active experts' weights from HBM at the datasheet rate (the router of
    the benchmark cannot have hit that many experts), and the shape's other rows from the first refused token
    count on; vLLM rows with EP > 1 (they do not scale with EP); ranks with less than one row.
    """
    names = ["moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size"]
    names += ["moe_ep_size", "distribution", "kernel_source", "latency"]
    path = "moe/vllm/0.24.0/moe_perf.parquet" if backend == "vllm" else "moe/trtllm/1.3.0rc20/moe_perf.parquet"
    t = read(path, names)
    mask = np.array([DTYPE.get(d) == dtype for d in t["moe_dtype"]]) & (t["distribution"] == distribution)
    kernels = {"vllm_unquantizedfusedmoe_triton_tritonexperts", "vllm_fp8moe_triton_tritonexperts"}
    kernels |= {"vllm_gptossmxfp4moe_triton_oaitritonmxfp4expertsmonolithic"}
    kernels |= {"moe_torch_flow_cutlass", "moe_torch_flow_nongated", "moe_torch_flow"}
    mask &= np.array([k in kernels for k in t["kernel_source"]])
    if ep_one or backend == "vllm":
        mask &= t["moe_ep_size"] == 1
    t = pick(t, mask)
    plain = (t["hidden_size"] == 2688) | ((t["num_experts"] == 512) & (t["topk"] == 22))
    matrices = np.where(plain, 2, 3)
    inter = t["inter_size"] // t["moe_tp_size"]
    slots = t["num_experts"] // t["moe_ep_size"]
    rows = t["num_tokens"] * t["topk"] / t["moe_ep_size"]
    active = np.minimum(slots, rows)
    floor = active * matrices * t["hidden_size"] * inter * dtype_bytes(dtype) / 3350.0
    ep = t["moe_ep_size"]
    ident = np.stack([t["hidden_size"], inter, slots, t["topk"], matrices, ep], axis=1)
    bad = (t["ns"] < floor) & (distribution == "balanced")
    first_bad: dict[tuple[int, ...], int] = {}
    for shape, tokens in zip(map(tuple, ident[bad].tolist()), t["num_tokens"][bad].tolist(), strict=True):
        first_bad[shape] = min(first_bad.get(shape, tokens), tokens)
    limit = np.array([first_bad.get(s, 1 << 62) for s in map(tuple, ident.tolist())])
    if (
        backend == "vllm" and dtype == "fp8_block" and distribution == "balanced"
    ):  # group-limited routing halves the experts hit, from 16 tokens on
        grouped = (t["hidden_size"] == 7168) & (t["num_experts"] == 256)
        limit = np.where(grouped, np.minimum(limit, 16), limit)
    keep = (t["num_tokens"] < limit) & (rows >= 1)
    keys = [(h, i, s, k, dtype, m) for h, i, s, k, m, _ in ident[keep].tolist()]
    extra = {"hidden": t["hidden_size"], "inter": inter, "matrices": matrices, "active": active, "ep": ep}
    extra |= {
        "experts": t["num_experts"],
        "top_k": t["topk"],
        "tokens": t["num_tokens"],
        "other": rows * 0 + t["num_tokens"] * t["topk"] - rows,
    }
    extra = {name: np.asarray(values, float)[keep] for name, values in extra.items()}
    size = rows[keep].astype(float)[:, None]
    variant = dtype if backend == "vllm" else f"{dtype}@trtllm"
    refused = int((~keep & (rows >= 1)).sum())
    return Samples("moe", variant, keys, size, t["ns"][keep], 1 if backend == "vllm" else 2, extra, refused)


def gqa(phase: str, kv: str) -> Samples:
    """FlashAttention 3: key ("gqa", heads, kv heads, dim, dim, window, kv dtype); size (batch, length)."""
    name = "context" if phase == "prefill" else "generation"
    columns = ["kernel_source", "batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim"]
    columns += ["kv_cache_dtype", "window_size", "latency"]
    t = read(f"attention/vllm/0.24.0/{name}_attention_perf.parquet", columns)
    wanted = "bfloat16" if kv == "bf16" else "fp8"
    t = pick(t, (t["kv_cache_dtype"] == wanted) & (t["kernel_source"] == "vllm_flash_attn_fa3"))
    length = t["isl"] if phase == "prefill" else t["step"] + 1
    if phase == "decode":  # callers cut contexts to the window, so the curve's axis is cut too
        length = np.where(t["window_size"] > 0, np.minimum(length, t["window_size"]), length)
    shape = np.stack([t["num_heads"], t["num_key_value_heads"], t["head_dim"], t["head_dim"], t["window_size"]], 1)
    extra = {"heads": shape[:, 0], "kv_heads": shape[:, 1], "dim": shape[:, 2], "v_dim": shape[:, 3]}
    extra |= {"window": shape[:, 4]}
    return Samples(
        f"attention_{phase}",
        f"gqa_{kv}",
        [("gqa", *row, kv) for row in shape.tolist()],
        np.stack([t["batch_size"], length], 1).astype(float),
        t["ns"],
        3,
        {k: v.astype(float) for k, v in extra.items()},
    )


def mla(phase: str, kv: str) -> Samples:
    """DeepSeek's MLA in TensorRT-LLM: key ("mla", heads, 576, kv dtype); size (batch, length)."""
    name = "context" if phase == "prefill" else "generation"
    columns = ["kv_cache_dtype", "num_heads", "batch_size", "isl", "step", "latency"]
    t = read(f"mla/trtllm/1.3.0rc20/{name}_mla_perf.parquet", columns)
    t = pick(t, t["kv_cache_dtype"] == ("bfloat16" if kv == "bf16" else "fp8"))
    length = t["isl"] if phase == "prefill" else t["step"] + 1
    heads = t["num_heads"]
    return Samples(
        f"attention_{phase}",
        f"mla_{kv}",
        [("mla", h, 576, kv) for h in heads.tolist()],
        np.stack([t["batch_size"], length], 1).astype(float),
        t["ns"],
        4,
        {"heads": heads.astype(float)},
    )


def ring(op: str, backend: str) -> Samples:
    """all_reduce (nccl, graph, eager), all_gather, reduce_scatter (nccl): key (ranks,), size bytes a rank.

    NCCL's message_size counts elements of `half`; for a gather or scatter it is the whole buffer of all ranks.
    """
    if backend == "nccl":
        columns = ["op_name", "nccl_dtype", "num_gpus", "message_size", "latency"]
        t = read("comm/nccl/2.29.2/nccl_perf.parquet", columns)
        t = pick(t, (t["op_name"] == op) & (t["nccl_dtype"] == "half"))
        size, variant, source = t["message_size"] * 2.0, "", 7
        if op != "all_reduce":
            size = size / t["num_gpus"]
    else:
        columns = ["backend", "num_gpus", "message_size", "latency"]
        t = read("comm/vllm/0.24.0/custom_allreduce_perf.parquet", columns)
        t = pick(t, t["backend"] == f"vllm_{backend}")
        size = t["message_size"].astype(float)
        variant, source = ("@eager", 6) if backend == "eager" else ("", 5)
    ranks = t["num_gpus"]
    return Samples(
        op, variant, [(r,) for r in ranks.tolist()], size[:, None], t["ns"], source, {"ranks": ranks.astype(float)}
    )


def distinct_ranks(ranks: int, experts: int, top_k: int) -> float:
    """Mean distinct ranks that top_k distinct experts, picked evenly, live on."""
    local = experts // ranks
    missed = 1.0
    for i in range(top_k):
        missed *= (experts - local - i) / (experts - i)
    return ranks * (1.0 - missed)
