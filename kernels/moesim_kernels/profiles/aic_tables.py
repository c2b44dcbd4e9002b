"""Measured tables of aiconfigurator-core as samples of our operators; rows left out are counted by reason.

Read as data only: parquet by pyarrow, bounded in size, columns checked. What cannot be right is refused: no kernel
reads its bytes faster than memory gives them or multiplies faster than the device's peak.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.arrays import BoolArray, FloatArray
from moesim.errors import BadInput, Problem
from moesim.hardware import DeviceProfile
from moesim_kernels.fit.samples import Samples, sample_points
from moesim_kernels.profiles.aic_package import TableRef
from moesim_kernels.profiles.find import clean
from moesim_kernels.profiles.shapes import Shape, floor_parts

__all__ = ["DTYPES", "LIMITED", "Rows", "attention", "collective", "gemm", "mla", "moe", "possible", "read"]

_MAX_BYTES = 256 << 20
_MAX_ROWS = 4_000_000
_DTYPES = ("gemm_dtype", "moe_dtype", "attn_dtype", "kv_cache_dtype", "nccl_dtype")
_TEXT = frozenset((*_DTYPES, "kernel_source", "device", "distribution", "op_name", "backend"))

DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "w4a16_mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "int4_wo": "int4",
}
"""The tables' number formats -> ours. Others are left out and counted."""

LIMITED = (7168, 256)
"""Hidden size and experts of DeepSeek-V3: engines with group-limited routing hit about half of the experts that a
balanced row claims, so the rows of a backend without it stand in.
"""

BYTES_REASON = "faster than its bytes at the datasheet's bandwidth"
FLOP_REASON = "faster than its FLOP at the datasheet's peak"
LATER_REASON = "larger size of a shape refused for its bytes"


@dataclass
class Rows:
    """Columns of one table, the rows still in play, and how many went for which reason."""

    ref: TableRef
    columns: dict[str, NDArray[Any]]
    refused: Counter[str] = field(default_factory=Counter)
    total: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def keep(self, mask: BoolArray, reason: str) -> Rows:
        """The rows of `mask`; the others are counted under `reason` (of the whole table, not only of this part)."""
        gone = int(len(mask) - np.count_nonzero(mask))
        if gone:
            self.refused[reason] += gone
        return self.part(mask)

    def part(self, mask: BoolArray) -> Rows:
        """The rows of `mask`, for a part of the table; the count of refusals is shared."""
        return Rows(self.ref, {name: values[mask] for name, values in self.columns.items()}, self.refused, self.total)


def read(ref: TableRef, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> Rows:
    """Columns of a table, times as `ns`; rows without a positive finite time or size are refused.

    Raises BadInput naming the file: not parquet, too large, a column missing or of another type.
    """
    from pyarrow import ArrowException, parquet

    where = str(ref.path)
    wanted = (*names, "latency")
    try:
        if ref.path.stat().st_size > _MAX_BYTES:
            raise BadInput(Problem(where, f"a table may hold {_MAX_BYTES >> 20} MiB, this one is larger"))
        file = parquet.ParquetFile(ref.path)
        known = file.schema_arrow.names
        missing = [name for name in wanted if name not in known]
        if missing:
            message = f"the table lacks {', '.join(missing)}. It has {clean(', '.join(known))}"
            raise BadInput(Problem(where, f"{message}; is it of another version of aiconfigurator-core?"))
        if file.metadata.num_rows > _MAX_ROWS:
            raise BadInput(Problem(where, f"a table may hold {_MAX_ROWS:,} rows, this has {file.metadata.num_rows:,}"))
        table = file.read(columns=[*wanted, *[name for name in optional if name in known]])
    except OSError as error:
        raise BadInput(Problem(where, f"cannot be read: {error.strerror or clean(error)}")) from None
    except ArrowException as error:
        raise BadInput(Problem(where, f"is not a parquet table: {clean(error, 200)}")) from None
    columns: dict[str, NDArray[Any]] = {}
    for name in table.column_names:
        values = table[name].to_numpy()
        number = np.issubdtype(values.dtype, np.number)
        if number == (name in _TEXT):
            raise BadInput(
                Problem(where, f"column {name} holds {values.dtype}, {'text' if number else 'numbers'} needed")
            )
        columns[name] = values
    columns["ns"] = columns.pop("latency").astype(np.float64) * 1e6
    rows = Rows(ref, columns, Counter(), table.num_rows)
    good = np.isfinite(columns["ns"]) & (columns["ns"] > 0)
    for name, values in columns.items():
        if name not in _TEXT:
            good &= np.isfinite(values) & (values >= 0) & (values < 2**40)
    return rows.keep(good, "no positive time, or a size below zero")


def formats(rows: Rows, column: str, profile: DeviceProfile) -> list[str]:
    """Our names of the number formats in `column` that the device multiplies, most rows first; others are counted."""
    counts = Counter(rows[column].tolist())
    known = []
    for name, count in counts.most_common():
        dtype = DTYPES.get(name)
        if dtype is None:
            rows.refused[f"number format {clean(name, 40)}"] += count
        elif _multiplies(profile, dtype):
            known.append(dtype)
        else:
            rows.refused[f"number format {clean(name, 40)}, without a rate of the device"] += count
    return known


def _multiplies(profile: DeviceProfile, dtype: str) -> bool:
    try:
        profile.flop_rate(dtype)
    except BadInput:
        return False
    return True


def _of(rows: Rows, column: str, dtype: str) -> BoolArray:
    names = [name for name, ours in DTYPES.items() if ours == dtype]
    return np.isin(rows[column], names)


def possible(s: Samples, profile: DeviceProfile, refused: Counter[str], later: bool = False) -> Samples:
    """The samples that the datasheet allows. later: a shape whose bytes cannot have been read at one size is not
    believed at larger ones either (its benchmark did not do the work it claims).
    """
    memory, compute = np.zeros(len(s.ns)), np.zeros(len(s.ns))
    for key, rows in s.by_key().items():
        batches = s.size[rows, 0] if s.size.shape[1] == 2 else np.ones(len(rows))
        for batch in np.unique(batches).tolist():
            at = rows[batches == batch]
            memory[at], compute[at] = floor_parts(profile, Shape(s.op, key, int(batch)), s.size[at, -1])
    by_bytes = s.ns < memory
    by_flop = ~by_bytes & (s.ns < compute)
    after = np.zeros(len(s.ns), bool)
    if later:
        for rows in s.by_key().values():
            bad = rows[by_bytes[rows]]
            if len(bad):
                after[rows] = s.size[rows, -1] > s.size[bad, -1].min()
        after &= ~by_bytes & ~by_flop
    for reason, mask in ((BYTES_REASON, by_bytes), (FLOP_REASON, by_flop), (LATER_REASON, after)):
        if mask.any():
            refused[reason] += int(mask.sum())
    return s.where(~(by_bytes | by_flop | after))


# ---- readers, one a table


def gemm(ref: TableRef, profile: DeviceProfile) -> tuple[Rows, dict[str, Samples]]:
    """GEMM by weight format: key (n, k, dtype), size m; the median where a point was timed more than once."""
    rows = read(ref, ("gemm_dtype", "m", "n", "k"), ("kernel_source", "device"))
    rows = rows.keep((rows["n"] >= 128) & (rows["k"] >= 128) & (rows["m"] >= 1), "narrower than 128 columns or rows")
    out = {}
    for dtype in formats(rows, "gemm_dtype", profile):
        own = rows.part(_of(rows, "gemm_dtype", dtype))
        points: dict[tuple[int, int, int], list[float]] = {}
        for n, k, m, ns in zip(*(own[c].tolist() for c in ("n", "k", "m", "ns")), strict=True):
            points.setdefault((int(n), int(k), int(m)), []).append(ns)
        order = sorted(points)
        times = [float(np.median(points[p])) for p in order]
        out[dtype] = sample_points("gemm", dtype, [(n, k, dtype) for n, k, _ in order], [m for _, _, m in order], times)
    return rows, out


def moe(ref: TableRef, profile: DeviceProfile, ranks: bool) -> tuple[Rows, dict[tuple[str, str], Samples]]:
    """Balanced MoE rows by (format, kernel): key (hidden, inter, slots, top_k, dtype, matrices), size T K / EP pairs.

    ranks false: EP 1; true: what a rank of many runs, and DeepSeek-V3 whole (`LIMITED`). `extra` also has tokens, ep
    and `other`, the pairs of other ranks.
    """
    names = ("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size")
    rows = read(ref, (*names, "moe_ep_size", "distribution", "kernel_source"), ("device",))
    rows = rows.keep(rows["distribution"] == "balanced", "skewed routing, its histogram not in the table")
    sizes = (*names[1:], "moe_ep_size")
    rows = rows.keep(np.all([rows[n] >= 1 for n in sizes], axis=0), "a size below one")
    limited = (rows["hidden_size"] == LIMITED[0]) & (rows["num_experts"] == LIMITED[1])
    if ranks:
        rows = rows.part((rows["moe_ep_size"] > 1) | limited)
    elif ref.backend == "trtllm":  # its EP ranks are read apart
        rows = rows.part(rows["moe_ep_size"] == 1)
    else:
        rows = rows.keep(rows["moe_ep_size"] == 1, "EP rank: its time does not shrink with its share of the rows")
    pairs = rows["num_tokens"] * rows["topk"] / np.maximum(rows["moe_ep_size"], 1)
    rows = rows.keep(pairs >= 1, "less than one pair on a rank")
    out = {}
    for dtype in formats(rows, "moe_dtype", profile):
        own = rows.part(_of(rows, "moe_dtype", dtype))
        for kernel, _ in Counter(own["kernel_source"].tolist()).most_common():
            out[dtype, clean(kernel, 100)] = _moe_samples(own.part(own["kernel_source"] == kernel), dtype, kernel)
    return rows, out


def _moe_samples(t: Rows, dtype: str, kernel: str) -> Samples:
    """Samples of one kernel. Two matrices an expert: Nemotron's relu^2 experts, by the sizes only they have."""
    plain = (t["hidden_size"] == 2688) | ((t["num_experts"] == 512) & (t["topk"] == 22)) | ("nongated" in kernel)
    inter = t["inter_size"] // t["moe_tp_size"]
    slots = t["num_experts"] // t["moe_ep_size"]
    shape = np.stack([t["hidden_size"], inter, slots, t["topk"], np.where(plain, 2, 3)], axis=1).astype(np.int64)
    keys = [(h, i, s, k, dtype, m) for h, i, s, k, m in shape.tolist()]
    pairs = t["num_tokens"] * t["topk"] / t["moe_ep_size"]
    s = sample_points("moe", dtype, keys, pairs, t["ns"])
    s.extra["other"] = np.asarray(t["num_tokens"] * t["topk"] - pairs, float)
    s.extra["ep"] = np.asarray(t["moe_ep_size"], float)
    s.extra["tokens"] = np.asarray(t["num_tokens"], float)
    return s


def attention(ref: TableRef, phase: str) -> tuple[Rows, dict[str, Samples]]:
    """GQA by cache format: key ("gqa", heads, kv heads, dim, dim, window, cache); size (batch, length)."""
    names = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype")
    rows = read(ref, names, ("attn_dtype", "window_size", "kernel_source", "device"))
    rows = rows.keep(np.all([rows[n] >= 1 for n in names[:2] + names[3:6]], axis=0), "a size below one")
    if "attn_dtype" in rows.columns:
        rows = rows.keep(rows["attn_dtype"] == "bfloat16", "attention itself not in bf16")
    if "window_size" not in rows.columns:
        rows.columns["window_size"] = np.zeros(len(rows), np.int64)
    heads, kv, dim, window = (rows[n] for n in (*names[3:6], "window_size"))
    small = np.array([(h, k) in _SMALL for h, k in zip(heads.tolist(), kv.tolist(), strict=True)], bool)
    served = ((dim == 128) & np.isin(window, (0, 8192))) | ((dim == 64) & np.isin(window, (0, 128)) & small)
    served |= np.isin(dim, (192, 256)) & (window == 0)
    rows = rows.keep(served, "head size or window of no model here")
    out = {}
    for cache, name in (("bf16", "bfloat16"), ("fp8", "fp8")):
        t = rows.part(rows["kv_cache_dtype"] == name)
        if len(t):
            shape = np.stack([t[n] for n in (*names[3:6], "head_dim", "window_size")], axis=1).astype(np.int64)
            keys = [("gqa", *row, cache) for row in shape.tolist()]
            out[cache] = sample_points(f"attention_{phase}", f"gqa_{cache}", keys, _lengths(t, phase), t["ns"])
    return rows, out


_SMALL = {(64, 8), (32, 4), (16, 2), (8, 1), (64, 64), (32, 32), (16, 16), (32, 8), (24, 8)}
"""(heads, KV heads) with head size 64 that models have, whole and split"""


def _lengths(t: Rows, phase: str) -> FloatArray:
    """(batch, length): of a prompt, or of the context with the new token in it, cut to the window as callers do."""
    length = np.asarray(t["isl"] if phase == "prefill" else t["step"] + 1, np.float64)
    if phase == "decode" and "window_size" in t.columns:
        length = np.where(t["window_size"] > 0, np.minimum(length, t["window_size"]), length)
    return np.stack([np.asarray(t["batch_size"], np.float64), length], axis=1)


def mla(ref: TableRef, phase: str) -> tuple[Rows, dict[str, Samples]]:
    """DeepSeek's MLA kernel alone, by cache format: key ("mla", heads, 576, cache); size (batch, length)."""
    names = ("kv_cache_dtype", "num_heads", "batch_size", "isl", "step")
    rows = read(ref, names, ("kernel_source", "device"))
    rows = rows.keep(np.all([rows[n] >= 1 for n in names[1:4]], axis=0), "a size below one")
    out = {}
    for cache, name in (("bf16", "bfloat16"), ("fp8", "fp8")):
        t = rows.part(rows["kv_cache_dtype"] == name)
        if len(t):
            keys = [("mla", int(h), 576, cache) for h in t["num_heads"].tolist()]
            out[cache] = sample_points(f"attention_{phase}", f"mla_{cache}", keys, _lengths(t, phase), t["ns"])
    return rows, out


def collective(ref: TableRef, op: str, how: str) -> tuple[Rows, Samples | None]:
    """One collective inside a node: key (ranks,), size bytes a rank. how: nccl, or graph or eager of a custom one.

    NCCL's message_size counts elements of `half`; for a gather or scatter it is the whole buffer of all ranks.
    """
    if how == "nccl":
        rows = read(ref, ("op_name", "nccl_dtype", "num_gpus", "message_size"), ("kernel_source", "device"))
        own = rows.part((rows["op_name"] == op) & (rows["nccl_dtype"] == "half"))
        size = own["message_size"] * 2.0 / (1.0 if op == "all_reduce" else own["num_gpus"])
    else:
        rows = read(ref, ("num_gpus", "message_size"), ("backend", "kernel_source", "device"))
        if "backend" in rows.columns:
            own = rows.part(np.array([str(b).endswith(f"_{how}") for b in rows["backend"].tolist()], bool))
        else:
            own = rows.part(np.full(len(rows), how == "graph"))
        size = own["message_size"] * 1.0
    fine = (own["num_gpus"] >= 2) & (size > 0)
    own, size = own.keep(fine, "fewer than two ranks"), size[fine]
    if not len(own):
        return rows, None
    return own, sample_points(op, "", [(int(r),) for r in own["num_gpus"].tolist()], size, own["ns"])
