"""Grouped GEMMs under uneven load: Frontier's Qwen3-30B-A3B layer on an A800.

The table's `load_distribution` says `uniform` in every row: routing is random, so load is uneven by chance alone, and
only where a batch is small. It has no skewed rows. Counts are not in it; experts with a row follow from
`expert_utilization`, blocks of rows from the routing's law (8 distinct experts a token, evenly). Left out: 16 rows of
another convention (a rank's own share of a router over all experts), 259 that repeat others' grouped GEMM. TP 4 and 8
are judged apart: repeats of one point differ there by 9 to 30 % (launches of the host).
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from moesim_kernels.fit.curves import spread
from moesim_kernels.fit.model import Fitted, fit_operator, predict, with_fits
from moesim_kernels.fit.samples import Samples, sample_points
from numpy.typing import NDArray
from scipy.stats import binom

from benchmarks.validation.rows import (
    DATA,
    HELD_OUT,
    ROOT,
    SKEWED,
    Beside,
    Found,
    Row,
    Source,
    beside,
    found,
    interpolated,
)
from moesim.cost.operators import MoEShape, Operators
from moesim.hardware import DeviceProfile
from moesim.scenario.load import load_profile

GROUP = "operators"
TITLE = "Grouped GEMM under uneven load, A800"
SOURCE = Source(
    "Frontier A800",
    "github.com/NetX-lab/Frontier",
    "a4b22df82118",
    "MIT",
    ("kernels/frontier/a800_qwen3_30b_a3b_moe.csv.gz",),
    "A800 80GB, vLLM's fused MoE, bf16",
)
HIDDEN, INTER, TOP_K, BLOCK, KEPT = 2048, 768, 8, 64, 8
ROUTER = (HIDDEN, 128, TOP_K, "bf16", "softmax", 1, 1)
BALANCED, UNEVEN = 0.25, 0.5
"""cv of the experts' loads: at most, and above"""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Rows as samples, with what they say of load. cv, tokens, padded (rows of work): [P]."""

    samples: Samples
    cv: Floats
    tokens: Floats
    padded: Floats

    def where(self, mask: NDArray[np.bool_]) -> Table:
        """Some of them."""
        return Table(self.samples.where(mask), self.cv[mask], self.tokens[mask], self.padded[mask])


@cache
def device() -> DeviceProfile:
    """An A100's rates (an A800 has its chip, with fewer NVLinks) from the datasheet, taken as measured."""
    path = ROOT / "hw_profiles" / "a100_sxm_80gb.yaml"
    return replace(load_profile(path), kind="measured", moe_block_rows=BLOCK)


@cache
def blocks(tokens: int, slots: int) -> float:
    """Blocks of rows that an expert with rows fills, on average: a token takes each expert with probability K / slots,
    so an expert's rows are binomial."""
    rows = np.arange(1, tokens + 1)
    share = binom.pmf(rows, tokens, TOP_K / slots)
    return float((share * np.ceil(rows / BLOCK)).sum() / share.sum())


@cache
def lines() -> tuple[dict[str, str], ...]:
    """The file."""
    with gzip.open(DATA / SOURCE.files[0], "rt", encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


@cache
def table(parallel: tuple[int, ...]) -> Table:
    """Grouped GEMMs of these tensor-parallel degrees, in a fixed order."""
    name = "time_stats.moe_grouped_gemm.median"
    skipped = ("moe_decode", "uniform_topk")
    rows = []
    for r in lines():
        tp = int(r["num_tensor_parallel_workers"])
        if r[name] and not r["profiling_patch_tag"].startswith(skipped) and tp in parallel:
            slots, tokens = int(r["num_experts_per_device"]), int(r["num_tokens"])
            active = round(float(r["expert_utilization"]) * slots)
            rows.append((slots, tp, tokens, float(r["load_imbalance_cv"]), active, float(r[name]) * 1e6))
    rows.sort()
    key = [(HIDDEN, INTER // tp, slots, TOP_K, "bf16", 3) for slots, tp, *_ in rows]
    tokens = np.array([r[2] for r in rows], np.float64)
    s = sample_points("moe", "bf16", key, tokens * TOP_K, [r[5] for r in rows])
    s.extra["active"] = np.array([r[4] for r in rows], np.float64)
    fill = np.array([blocks(int(r[2]), r[0]) for r in rows])
    return Table(s, np.array([r[3] for r in rows]), tokens, fill * s.extra["active"] * BLOCK)


def blind(s: Samples) -> Samples:
    """The same points as if load were even: as many experts active as rows allow."""
    slots = np.array([float(k[2]) for k in s.key])
    return replace(s, extra={**s.extra, "active": np.minimum(slots, s.size[:, 0])})


def priced(profile: DeviceProfile, t: Table) -> Floats:
    """ns through the histogram's features: experts with rows, rows of work."""
    ops, s = Operators(profile), t.samples
    out = np.zeros(len(s.ns))
    for key, at in s.by_key().items():
        shape = MoEShape(*key[:5], True)
        out[at] = ops.moe(s.size[at, 0], s.extra["active"][at], t.padded[at], 0.0, shape).ns
    return out


def kept(s: Samples, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Eight token counts a shape, of the allowed points."""
    out = np.zeros(len(s.ns), bool)
    for at in s.by_key().values():
        mine = at[allowed[at]]
        out[mine] = np.isin(s.size[mine, 0], spread(s.size[mine, 0].tolist(), KEPT))
    return out


def fitted(s: Samples, bare: bool = False) -> DeviceProfile:
    """Physics and residual curves of these points."""
    part = fit_operator(s, device())
    return with_fits(device(), [Fitted(part.op, part.variant, "", part.values, []) if bare else part])


def noise(t: Table) -> Beside:
    """The table beside itself: a repeat of the same shape and tokens as prediction of the first."""
    groups: dict[tuple[object, ...], list[float]] = {}
    for key, tokens, ns in zip(t.samples.key, t.tokens.tolist(), t.samples.ns.tolist(), strict=True):
        groups.setdefault((key, tokens), []).append(ns)
    pairs = [(b, v[0]) for v in groups.values() for b in v[1:]]
    return beside("the table's own repeats", [p[0] for p in pairs], [p[1] for p in pairs])


def predicted(t: Table, mask: NDArray[np.bool_], rest: NDArray[np.bool_]) -> tuple[Found, tuple[Beside, ...]]:
    """Points of `rest` from those of `mask`: with the histogram's features, and beside it without."""
    some, other = t.samples.where(mask), t.where(rest)
    measured = other.samples.ns
    by_load = priced(fitted(some), other)
    without = predict(fitted(blind(some)), blind(other.samples))
    table_alone = interpolated(some, other.samples)
    return found(by_load, measured), (
        beside("load-blind", without, measured),
        beside("interpolated", table_alone, measured),
        noise(other),
    )


def pairs(t: Table, profile: DeviceProfile) -> tuple[int, int]:
    """Of pairs of batches with one shape and size that hit unlike numbers of experts and differ by more than 2 %: how
    many there are, and for how many the slower one is named."""
    ours, s = priced(profile, t), t.samples
    right = asked = 0
    for at in s.by_key().values():
        for tokens in set(t.tokens[at].tolist()):
            same = at[t.tokens[at] == tokens]
            for n, i in enumerate(same):
                for j in same[n + 1 :]:
                    gap = np.log(s.ns[i] / s.ns[j])
                    if s.extra["active"][i] != s.extra["active"][j] and abs(gap) > 0.02:
                        asked += 1
                        right += int(gap * np.log(ours[i] / ours[j]) > 0)
    return right, asked


def gate() -> list[Row]:
    """Router with its top-k, and shuffling of rows, by tokens: EP 1, TP 1, launched by the host."""
    out = []
    for what, columns, op, key in (
        ("router and top-k", ("moe_gating_linear", "moe_gating_routing_topk"), "router", ROUTER),
        ("shuffling", ("moe_shuffling",), "elementwise", (0,)),
    ):
        chosen = sorted(
            (int(r["num_tokens"]), sum(float(r[f"time_stats.{c}.median"]) * 1e6 for c in columns))
            for r in lines()
            if r["expert_parallel_size"] == r["num_tensor_parallel_workers"] == "1"
            and (r["routing_runtime_path"], r["gating_runtime_context"]) == ("standard_fused_topk", "standalone_legacy")
        )
        tokens, ns = (np.array(v, np.float64) for v in zip(*chosen, strict=True))
        size = tokens if op == "router" else tokens * (TOP_K * HIDDEN * 2.0 * 2.0)
        s = sample_points(op, "bf16" if op == "router" else "", [key] * len(ns), size, ns)
        mask = kept(s, np.ones(len(ns), bool))
        some, rest = s.where(mask), s.where(~mask)
        ours = predict(with_fits(device(), [fit_operator(some, device())]), rest)
        alone = beside("interpolated", interpolated(some, rest), rest.ns)
        out.append(Row(what, "8 token counts", "all other token counts", found(ours, rest.ns), HELD_OUT, (alone,)))
    return out


def rows() -> list[Row]:
    """Balanced rows, uneven ones, which of two equal batches is slower, launch-bound ranks, and what is around them."""
    one, many = table((1, 2)), table((4, 8))
    even, odd = one.cv <= BALANCED, one.cv > UNEVEN
    out = []
    on_even = kept(one.samples, even)
    on_all = kept(one.samples, np.ones(len(one.cv), bool))
    f, others = predicted(one, on_even, even & ~on_even)
    eight = "8 balanced token counts a shape (cv <= 0.25), 5 shapes"
    out.append(Row("balanced load", eight, "the other balanced rows, TP 1 and 2", f, HELD_OUT, others))
    f, others = predicted(one, on_even, odd)
    out.append(
        Row(
            "uneven load, smaller than anything fitted",
            eight,
            "every row with cv > 0.5, TP 1 and 2",
            f,
            SKEWED,
            others,
            note="uneven rows of this table are small batches, so this asks for sizes down to a hundredth of the least"
            " fitted one as well: launch and memory rate do not show in large batches",
        )
    )
    f, others = predicted(one, on_all, odd & ~on_all)
    out.append(
        Row(
            "uneven load",
            "8 token counts a shape, least and largest among them",
            "the other rows, cv > 0.5",
            f,
            SKEWED,
            others,
        )
    )
    right, asked = pairs(one.where(~on_all), fitted(one.samples.where(on_all)))
    out.append(
        Row(
            "which of two equal batches is slower",
            "the same",
            "pairs of one size that hit unlike numbers of experts and differ by > 2 %",
            Found(asked, 1 - right / asked, 1 - right / asked),
            None,
            (Beside("load-blind", 0.5, 0.5),),
            unit="wrong",
        )
    )
    on_many = kept(many.samples, np.ones(len(many.cv), bool))
    f, others = predicted(many, on_many, ~on_many)
    out.append(
        Row(
            "launch-bound ranks", "8 token counts a shape, 6 shapes", "all other rows, TP 4 and 8", f, HELD_OUT, others,
            note="the host launches these kernels; no model can be closer than repeats are to each other",
        )
    )  # fmt: skip
    return [*out, *gate()]
