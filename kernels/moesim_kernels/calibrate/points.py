"""From measured points to samples of the cost model, and the refusal of points that no machine can have measured.

A point is refused when it beats what the same run measured of the machine itself: reading its weights, keys or values
faster than memory was read, or multiplying faster than the reference product. Refused points are kept with their
reason, printed, and never fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moesim.cost.operators import AttentionShape, BlockShape, RouterShape
from moesim_kernels.bench.floors import case_counts, element_bytes, floors, weight_shapes
from moesim_kernels.bench.log import Point
from moesim_kernels.bench.plan import Case
from moesim_kernels.fit.samples import Key, Samples, sample_points
from moesim_kernels.ops.routing import exchange_splits

__all__ = [
    "FLOP_OPS",
    "READ_MARGIN",
    "Ceilings",
    "Refused",
    "Sorted",
    "ceilings",
    "curve_key",
    "floor_ns",
    "least_work",
    "priced_as",
    "sort_points",
]

READ_MARGIN = 0.9  # of the least time that the measured ceiling allows; the ceiling is a measurement too
FLOP_MARGIN = 0.8  # the reference product is square, and another shape may suit the library a little better
_MATRICES = 3  # gate, up, down
_MOE = ("moe", "moe_dgrad", "moe_wgrad")
FLOP_OPS = ("gemm", "router", "block", "shared_expert", "attention_prefill", "attention_decode", *_MOE)
_RINGS = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Ceilings:
    """What the machine itself was measured to do: bytes a ns read, and FLOP a ns by dtype."""

    read: float
    flop: Mapping[str, float]

    def flop_of(self, dtype: str) -> float:
        """The rate of a dtype; without a product of its own, no bound."""
        return self.flop.get(dtype, np.inf)


@dataclass(frozen=True)
class Refused:
    """A point that was left out, with what it beat."""

    case: Case
    ns: float
    floor_ns: float
    why: str

    def __str__(self) -> str:
        size = ", ".join(f"{k} {v}" for k, v in self.case.size.items())
        return f"{self.case.op} ({size}): {self.ns / 1e3:,.1f} us, but {self.why} takes {self.floor_ns / 1e3:,.1f} us"


@dataclass
class Sorted:
    """Samples to fit, samples to judge the fit by (both by operator and variant), and what was refused."""

    grid: list[Samples] = field(default_factory=list)
    held_out: list[Samples] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def ceilings(points: Iterable[Point]) -> Ceilings:
    """The machine's rates from the points with the role `ceiling`: the fastest quarter's edge of each.

    Raises ValueError where memory was not read.
    """
    read, flop = 0.0, dict[str, float]()
    for p in points:
        if p.case.op == "read_bandwidth":
            read = max(read, float(p.case.size["bytes"]) / p.ns_p25)
        elif p.case.op == "peak_gemm":
            rate = 2.0 * float(p.case.size["n"]) ** 3 / p.ns_p25
            flop[p.case.dtype] = max(flop.get(p.case.dtype, 0.0), rate)
    if read <= 0:
        raise ValueError("the log has no point of read_bandwidth, which says what is possible")
    return Ceilings(read, flop)


def floor_ns(case: Case, top: Ceilings) -> tuple[float, str]:
    """The least time that the ceilings allow, ns, margins applied, and what it is spent on; (0, "") without a bound."""
    moved, flop, what = least_work(case)
    reading, multiplying = READ_MARGIN * moved / top.read, FLOP_MARGIN * flop / top.flop_of(case.dtype)
    if moved and reading >= multiplying:
        more = 1.0 / READ_MARGIN - 1.0
        rate = f"the measured {top.read:,.1f} GB/s and {more:.0%} more"
        return reading, f"reading {what} ({moved / 1e6:,.2f} MB) at {rate}"
    if not multiplying:
        return 0.0, ""
    more = 1.0 / FLOP_MARGIN - 1.0
    rate = f"the measured {top.flop_of(case.dtype):,.0f} GFLOP/s and {more:.0%} more"
    return multiplying, f"{flop / 1e9:,.2f} GFLOP at {rate}"


def least_work(case: Case) -> tuple[float, float, str]:
    """Bytes that must come from memory (weights, keys and values: they are rotated, and caches may hold everything
    else), FLOP, and a name for the bytes.
    """
    if case.op not in FLOP_OPS:
        return 0.0, 0.0, ""
    moved = sum(math.prod(shape) for shape in weight_shapes(case)) * element_bytes(case.dtype)
    flop = floors(case)[1]
    if case.op in _MOE:
        active = int((case_counts(case) > 0).sum())
        return moved * active / int(case.shape["slots"]), flop, f"{active} active experts"
    return float(moved), flop, "keys and values" if case.op.startswith("attention") else "the weights"


def _attention_shape(case: Case) -> AttentionShape:
    """The cost model's shape of an attention case."""
    s = {k: int(v) for k, v in case.shape.items() if k != "kind"}
    if case.shape["kind"] == "mla":
        wide = s["nope_dim"] + s["rope_dim"]
        return AttentionShape("mla", s["heads"], s["heads"], wide, s["v_head_dim"], s["kv_dim"], case.dtype, case.dtype)
    return AttentionShape(
        "gqa", s["heads"], s["kv_heads"], s["head_dim"], s["v_head_dim"], 0, case.dtype, case.dtype, s["window"]
    )


def _block_shape(case: Case) -> BlockShape:
    """The cost model's shape of a block case."""
    s = case.shape
    score, groups, top_groups = _choice(case)
    return BlockShape(
        hidden=int(s["hidden"]),
        heads=int(s["heads"]),
        kv_heads=int(s["kv_heads"]),
        head_dim=int(s["head_dim"]),
        experts=int(s["experts"]),
        top_k=int(s["top_k"]),
        dtype=case.dtype,
        router_dtype=str(s["router_dtype"]),
        score=score,
        groups=groups,
        top_groups=top_groups,
        bias=int(s["bias"]),
        head_norm=int(s["head_norm"]),
    )


def sort_points(points: Sequence[Point], top: Ceilings) -> Sorted:
    """Refuse what cannot be, and group the rest by operator and variant into samples to fit and held-out samples.

    Points of operators that a profile does not price (permute, combine, launch, ceilings) take no part.
    """
    out = Sorted()
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for p in points:
        least, why = floor_ns(p.case, top)
        if p.ns_median < least:
            out.refused.append(Refused(p.case, p.ns_median, least, why))
            continue
        variant = _variant(p.case)
        if variant is not None and p.case.role in ("grid", "heldout"):
            groups.setdefault((p.case.role, priced_as(p.case), variant), []).append(p)
    for (role, op, variant), found in groups.items():
        into = out.grid if role == "grid" else out.held_out
        into.append(_samples(op, variant, found))
    for s in out.grid:
        s.refused = sum(r.case.op == s.op and _variant(r.case) == s.variant for r in out.refused)
    return out


def priced_as(case: Case) -> str:
    """The operator of a profile whose times a case measures."""
    return "all_to_all" if case.op == "token_exchange" else case.op


def _variant(case: Case) -> str | None:
    """Whose physics a case is fitted with; None for an operator that profiles do not price."""
    if case.op in ("gemm", "router", "router_backward", "block", *_MOE):
        return case.dtype
    if case.op.startswith("attention"):
        return _attention_shape(case).variant
    if case.op == "token_exchange":
        return "pairwise"
    return "" if case.op in ("elementwise", "copy", "storage", *_RINGS) else None


def _samples(op: str, variant: str, points: Sequence[Point]) -> Samples:
    cases = [p.case for p in points]
    kv = [float(c.size["length"]) + float(c.size["prefix"]) for c in cases] if "length" in cases[0].size else None
    counts = [case_counts(c) for c in cases] if op in _MOE else None
    total = [_sent_bytes(c) for c in cases] if op == "all_to_all" else None
    return sample_points(
        op,
        variant,
        [curve_key(c) for c in cases],
        [_sizes(c) for c in cases],
        [p.ns_median for p in points],
        counts=counts,
        kv=kv,
        total=total,
        dtype=cases[0].dtype,
    )


def _sent_bytes(case: Case) -> float:
    """Bytes that all ranks of an exchange send to others."""
    ranks, row = int(case.shape["ranks"]), int(case.shape["hidden"]) * element_bytes(case.dtype)
    rows_GG = np.array(exchange_splits(int(case.size["bytes"]) // row, ranks, str(case.size["spread"]), case.seed))
    return float((rows_GG.sum() - np.trace(rows_GG)) * row)


def curve_key(case: Case) -> Key:
    """The shape as curves are keyed (`moesim.cost.operators`)."""
    s = case.shape
    if case.op == "gemm":
        return int(s["n"]), int(s["k"]), case.dtype
    if case.op in _MOE:
        sizes = (int(s["hidden"]), int(s["intermediate"]), int(s["slots"]), int(s["top_k"]))
        return (*sizes, case.dtype, _MATRICES)
    if case.op in ("router", "router_backward"):
        score, groups, top_groups = _choice(case)
        three = (int(s["hidden"]), int(s["experts"]), int(s["top_k"]))
        return RouterShape(*three, case.dtype, score, groups, top_groups).key
    if case.op == "block":
        return _block_shape(case).key
    if case.op.startswith("attention"):
        return _attention_shape(case).key
    if case.op == "copy":
        return str(s["direction"]), str(s["memory"]), int(s["streams"]), int(s["busy"])
    if case.op == "storage":
        return str(s["mode"]), int(s["block_bytes"]), int(s["depth"])
    if case.op == "token_exchange":
        return f"pairwise/{s['way']}", int(s["ranks"])
    return (int(s["ranks"]),) if case.op in _RINGS else (0,)


def _choice(case: Case) -> tuple[Literal["softmax", "sigmoid"], int, int]:
    """How a router chooses: scores, groups of experts, and how many of them a token may use."""
    score: Literal["softmax", "sigmoid"] = "sigmoid" if case.shape["score"] == "sigmoid" else "softmax"
    return score, int(case.shape["groups"]), int(case.shape["top_groups"])


def _sizes(case: Case) -> tuple[float, ...]:
    """The sizes on the curve's axes."""
    size = case.size
    if case.op == "gemm":
        return (float(size["m"]),)
    if case.op in _MOE:
        return (float(size["rows"]),)
    if case.op in ("router", "router_backward", "block"):
        return (float(size["tokens"]),)
    if case.op == "attention_decode":
        return float(size["batch"]), float(size["context"])
    if case.op.startswith("attention"):
        return float(size["batch"]), float(size["length"])
    return (float(size["bytes"]),)
