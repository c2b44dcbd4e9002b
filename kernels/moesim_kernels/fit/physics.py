"""Physics of samples, vectorised over shapes, and its parameters by least squares on log time.

The formulas are those of `moesim.cost.physics`; sizes stand in as arrays. `PARAMETERS` says what is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from moesim.cost.operators import AttentionShape, BlockShape, Operators, decode_work, prefill_work
from moesim.cost.own import block_ns
from moesim.cost.physics import BACKWARD, Rates, causal_pairs
from moesim.dtypes import Dtype, dtype_bytes
from moesim.hardware import DeviceProfile
from moesim_kernels.fit.samples import Samples

__all__ = ["PARAMETERS", "dtype_of", "fit_physics", "physics_ns", "rates", "work_rows"]

FloatArray = NDArray[np.float64]
Start = tuple[float, float, float]

# Start, lower and upper bound of each fitted parameter.
_EFF: dict[str, Start] = {"mem_eff": (0.85, 0.1, 1.0), "flop_eff": (0.7, 0.05, 1.0)}
_GEMM: dict[str, Start] = {"launch_ns": (3e3, 0, 2e5), **_EFF, "k_half": (100, 0, 5e3), "row_ns": (0.5, 0, 100)}
_MOE: dict[str, Start] = {
    "launch_ns": (3e4, 0, 2e5),
    **_EFF,
    "row_hidden": (10, 0, 60),
    "row_inter": (10, 0, 60),
    "nonlocal_hidden": (0.5, 0, 10),
    "inter_half": (100, 0, 4e3),
}
_PREFILL: dict[str, Start] = {
    "launch_ns": (1.2e4, 0, 1e5),
    **_EFF,
    "diagonal": (128, 0, 512),
    "seq_ns": (30, 0, 1e4),
    "tile_rows": (64, 0, 256),
}
_LINK: dict[str, Start] = {"launch_ns": (5e3, 0, 1e7), "nvlink_eff": (0.7, 0.01, 1.0)}
_STREAM: dict[str, Start] = {"launch_ns": (1e4, 0, 1e8), "eff": (0.8, 0.001, 4.0)}
PARAMETERS: dict[str, dict[str, Start]] = {
    "gemm": _GEMM,
    "gemm@eager": {
        **{**_GEMM, "launch_ns": (1e4, 0, 2e5)},
        "host_small_ns": (6e4, 0, 5e5),
        "host_ns": (8.8e4, 0, 5e5),
        "host_odd_ns": (1e4, 0, 1e5),
        "host_narrow_ns": (1.7e5, 0, 5e5),
    },
    "router": _GEMM,
    "router_backward": _GEMM,
    "block": {},  # what its parts add up to on the profile
    "moe": _MOE,
    "moe_dgrad": _MOE,
    "moe_wgrad": _MOE,
    "attention_prefill": _PREFILL,
    "attention_backward": _PREFILL,
    "attention_decode": {
        "launch_ns": (1.2e4, 0, 1e5),
        **_EFF,
        "seq_ns": (20, 0, 1e4),
        "unit_ns": (10, 0, 1e4),
        "token_ns": (0.4, 0, 1e3),
    },
    "elementwise": {"launch_ns": (3e3, 0, 1e6), "mem_eff": (0.8, 0.01, 8.0)},
    "all_reduce": _LINK,
    "all_gather": _LINK,
    "reduce_scatter": _LINK,
    "all_to_all": {**_LINK, "peer_ns": (1e3, 0, 1e7), "counts_ns": (1e3, 0, 1e7), "shared": (0.5, 0, 1.0)},
    "copy": _STREAM,
    "storage": _STREAM,
}
"""Parameters fitted for each operator. An efficiency above 1 of elementwise means that activations stay in a cache."""


def dtype_of(s: Samples) -> str:
    """The dtype that multiplies: the samples', else the variant's, else bf16 (attention)."""
    name = s.dtype or s.variant.split("@")[0]
    return name if name in get_args(Dtype) else "bf16"


def rates(values: Mapping[str, float], dtype: str, profile: DeviceProfile) -> Rates:
    """Rates on the device with these parameters."""
    peak, hbm = profile.flop_rate(dtype) * 1e-9, profile.hbm_bytes_per_s * 1e-9
    mem, flop = hbm * values.get("mem_eff", 1.0), peak * values.get("flop_eff", 1.0)
    return Rates(values["launch_ns"], mem, flop, hbm, peak, profile.num_sms, dict(values))


def work_rows(s: Samples, profile: DeviceProfile) -> FloatArray:
    """Rows of work of every MoE point on `profile`: its row-work table, else shares rounded up to the block."""
    table = profile.moe_row_work.get(dtype_of(s))
    block = profile.moe_block_rows
    if s.counts is not None:
        if table is not None:
            return np.array([float(table.at(c).sum()) for c in s.counts])
        return np.array([float(np.ceil(c / block).sum()) * block for c in s.counts])
    share = s.size[:, 0] / s.extra["active"]
    if table is not None:
        return np.asarray(table.at(share) * s.extra["active"])
    return np.asarray(np.ceil(share / block) * block * s.extra["active"])


def physics_ns(s: Samples, values: Mapping[str, float], profile: DeviceProfile) -> FloatArray:
    """Physics of every sample with these parameters, [points]; of a block, what `profile` says of its parts."""
    if s.op == "block":
        return _blocks(s, profile)
    r, x, dtype = rates(values, dtype_of(s), profile), s.extra, dtype_of(s)
    if s.op == "gemm":
        return np.asarray(r.gemm_ns(s.size[:, 0], x["n"], x["k"], dtype_bytes(dtype)))
    if s.op in ("router", "router_backward"):
        both = 2.0 if s.op == "router_backward" else 1.0
        return np.asarray(r.gemm_ns(s.size[:, 0] * both, x["experts"], x["hidden"], dtype_bytes(dtype)))
    if s.op in ("moe", "moe_dgrad", "moe_wgrad"):
        size = (x["hidden"], x["inter"], x["matrices"], dtype_bytes(dtype))
        return np.asarray(r.moe_ns(s.size[:, 0], x["active"], work_rows(s, profile), x["other"], size))
    if s.op in ("attention_prefill", "attention_backward"):
        return _prefill(s, r)
    if s.op == "attention_decode":
        return _decode(s, r)
    moved = s.size[:, 0]
    if s.op == "elementwise":
        return np.asarray(r.launch_ns + moved / r.bytes_per_ns)
    if s.op in ("copy", "storage"):
        rate = np.array([stream_rate(s.op, k, profile) for k in s.key]) * values["eff"]
        return np.asarray(r.launch_ns + moved / rate)
    ranks, node = x["ranks"], profile.node
    if s.op == "all_to_all":  # moesim.cost.swaps, pairwise in a node
        counts = np.array([str(k[0]).endswith("dispatch") for k in s.key]) * values["counts_ns"]
        moved = moved + values["shared"] * (x.get("total", moved * ranks) / ranks - moved)
        wire = moved / (node.nvlink_bytes_per_s * 1e-9 * values["nvlink_eff"])
        return np.asarray(r.launch_ns + node.nvlink_latency_ns + counts + values["peer_ns"] * (ranks - 1) + wire)
    traffic, hops = (2.0 * (ranks - 1) / ranks, 2.0) if s.op == "all_reduce" else (ranks - 1, 1.0)
    wire = moved * traffic / (node.nvlink_bytes_per_s * 1e-9 * values["nvlink_eff"])
    return np.asarray(r.launch_ns + node.nvlink_latency_ns * hops * np.log2(ranks) + wire)


def stream_rate(op: str, key: tuple[Any, ...], profile: DeviceProfile) -> float:
    """Bytes per ns of the link under a copy (key: direction, memory, streams, busy) or a read from storage."""
    if op == "storage":
        return profile.node.nvme_bytes_per_s * 1e-9
    return (profile.node.host_bytes_per_s if key[0] == "host" else profile.node.pcie_bytes_per_s) * 1e-9


def _blocks(s: Samples, profile: DeviceProfile) -> FloatArray:
    """The sum of every block's parts."""
    ops, out = Operators(profile), np.zeros(len(s.ns))
    for key, rows in s.by_key().items():
        out[rows] = block_ns(ops, s.size[rows, 0], BlockShape(*key))
    return out


def _prefill(s: Samples, r: Rates) -> FloatArray:
    """Chunks of q new tokens among kv keys, forward or backward."""
    x, batch, q = s.extra, s.size[:, 0], s.size[:, 1]
    kv = x.get("kv", q)
    shape = _shape(s)
    moved, pairs, per_pair = prefill_work(shape, q, kv)
    keys = kv
    if s.variant.startswith("gqa"):
        pairs = causal_pairs(q, kv, x["window"])
        keys = np.where(x["window"] > 0, np.minimum(kv, x["window"] + 128.0), kv)
    flops, memory = BACKWARD if s.op == "attention_backward" else (1.0, 1.0)
    work = (moved * memory, (pairs + q * r.get("diagonal")) * per_pair * flops)
    return np.asarray(r.prefill_ns(batch, keys, shape.head_dim + shape.v_head_dim, work))


def _decode(s: Samples, r: Rates) -> FloatArray:
    x, batch, length = s.extra, s.size[:, 0], s.size[:, 1]
    shape = _shape(s)
    if s.variant.startswith("gqa"):
        kv = batch * np.where(x["window"] > 0, np.minimum(length, x["window"]), length)
        return np.asarray(r.decode_ns(batch, kv, shape.num_kv_heads, decode_work(shape, batch, kv)))
    kv = batch * length
    return np.asarray(r.decode_ns(batch, kv, shape.num_heads, decode_work(shape, batch, kv)))


def _shape(s: Samples) -> Any:
    """Sizes as arrays behind AttentionShape's names (windows are handled apart)."""
    kv = s.variant.split("_")[1]
    x = s.extra
    if s.variant.startswith("mla"):
        heads: Any = x["heads"]
        wide: Any = np.array([float(k[2]) for k in s.key])
        return AttentionShape("mla", heads, heads, 192, 128, wide, "bf16", kv, 0)
    query: Any = x["heads"]
    cached: Any = x["kv_heads"]
    dim: Any = x["dim"]
    v_dim: Any = x["v_dim"]
    return AttentionShape("gqa", query, cached, dim, v_dim, 0, "bf16", kv, 0)


def fit_physics(
    s: Samples, profile: DeviceProfile, most: int = 4000, given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Parameters by least squares on log time (soft L1), over at most `most` evenly spaced samples; `given` ones are
    taken as they are. A parameter that no sample depends on (rows of other ranks where there are none) keeps its
    start. Raises ValueError for an operator without physics.
    """
    name = "gemm@eager" if s.variant.endswith("@eager") and s.op == "gemm" else s.op
    if name not in PARAMETERS:
        raise ValueError(f"{s.op} has no physics to fit; operators: {', '.join(PARAMETERS)}")
    table = PARAMETERS[name]
    if not table:
        return {}
    some = s.where(np.unique(np.linspace(0, len(s.ns) - 1, min(most, len(s.ns))).astype(int)))
    fixed = {**({"switch_rows": 32.0} if name == "gemm@eager" else {}), **(given or {})}
    names = [n for n in table if n not in fixed]
    start, low, high = (np.array([table[n][i] for n in names], float) for i in range(3))

    def miss(x: FloatArray) -> FloatArray:
        values = {**fixed, **dict(zip(names, x.tolist(), strict=True))}
        return np.asarray(np.log(physics_ns(some, values, profile) / some.ns))

    found = least_squares(
        miss, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale=np.maximum(start, 1e-3), max_nfev=60
    )
    best = found.x.copy()
    for j in range(len(names)):
        at = np.arange(len(names)) == j
        if np.array_equal(miss(np.where(at, low, found.x)), miss(np.where(at, high, found.x))):
            best[j] = start[j]
    values = {n: float(f"{v:.5g}") if v > 1e-6 else 0.0 for n, v in zip(names, best.tolist(), strict=True)}
    return {**values, **fixed}
