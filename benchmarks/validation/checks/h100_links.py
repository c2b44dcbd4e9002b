"""Links of an H100 node: NCCL's collectives and all-to-all, DeepEP's kernels. The shipped profile was fitted to these
tables by benchmarks/profiles/fit_h100.py and fit_exchange.py; here the same fits see a part of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from moesim_kernels.fit.model import fit_operator, predict, with_fits
from moesim_kernels.fit.samples import Samples
from numpy.typing import NDArray

from benchmarks.validation.rows import HELD_OUT, ROOT, Beside, Bound, Errors, Row, Source, beside, interpolated
from benchmarks.validation.tables import Part, profiles
from moesim.cost.operators import Operators
from moesim.hardware import Curve, DeviceProfile
from moesim.scenario.load import load_profile

GROUP = "links"
TITLE = "NCCL and DeepEP inside an H100 node"
SOURCE = Source(
    "aiconfigurator H100 links",
    "PyPI aiconfigurator-core",
    "0.12.0",
    "Apache-2.0",
    (
        "kernels/h100_sxm/comm/nccl/2.29.2/nccl_perf.parquet",
        "kernels/h100_sxm/comm/vllm/0.24.0/custom_allreduce_perf.parquet",
        "kernels/h100_sxm/comm/sglang/0.5.12/wideep_deepep_normal_perf.parquet",
        "kernels/h100_sxm/comm/sglang/0.5.12/wideep_deepep_ll_perf.parquet",
    ),
    "8 x H100 SXM",
)
NVLINK, LATENCY = 450.0, 1500.0
"""bytes a ns; ns, as the shipped profile has them"""
NCCL = "comm/nccl/2.29.2/nccl_perf.parquet"
RANKS = "2 and 8 GPUs"
Floats = NDArray[np.float64]


@cache
def shipped() -> DeviceProfile:
    """hw_profiles/h100_sxm.yaml."""
    return load_profile(ROOT / "hw_profiles" / "h100_sxm.yaml")


def claim(op: str) -> Bound:
    """What the shipped profile says of an operator's own error, 1 sigma of log: nine in ten within 1.645 of them."""
    sigma = shipped().error(op)
    why = f"what hw_profiles/h100_sxm.yaml claims for {op}: 1 sigma of log {sigma:g}, so 90 % within that"
    return Bound(why, None, round(float(np.expm1(1.645 * sigma)), 2))


CLAIM = claim("all_to_all")


def exchanging(fits: dict[str, dict[str, float]], curves: list[Curve]) -> Operators:
    """The node with these exchanges in place of its own."""
    own = {k: v for k, v in shipped().fits.items() if not k.startswith("all_to_all")}
    found = {**shipped().curves, "all_to_all": tuple(curves)}
    return Operators(replace(shipped(), fits=MappingProxyType({**own, **fits}), curves=MappingProxyType(found)))


def every_other(values: Floats) -> set[float]:
    """Sizes that are fitted: the least, the third, ..., and the largest."""
    pool = sorted(set(values.tolist()))
    return {*pool[::2], pool[-1]}


def split_sizes(s: Samples) -> NDArray[np.bool_]:
    """Fitted points: every other size of each shape."""
    out = np.zeros(len(s.ns), bool)
    for at in s.by_key().values():
        out[at] = np.isin(s.size[at, 0], list(every_other(s.size[at, 0])))
    return out


def collectives() -> list[Row]:
    """Sizes held out, then a number of ranks held out, of every collective inside the node."""
    profiles()
    import tables

    out = []
    for what, reader in {
        "all-gather, NCCL": ("all_gather", "nccl"),
        "reduce-scatter, NCCL": ("reduce_scatter", "nccl"),
        "all-reduce, NCCL": ("all_reduce", "nccl"),
        "all-reduce, vLLM's kernel in a CUDA graph": ("all_reduce", "graph"),
    }.items():
        s = tables.ring(*reader)
        for calibrated, held_out, mask in (
            ("every other size of 2, 4, 8 GPUs", "the sizes between", split_sizes(s)),
            (RANKS, "4 GPUs, all sizes", s.extra["ranks"] != 4),
        ):
            some, rest = s.where(mask), s.where(~mask)
            found, bare = fit_operator(some, shipped()), Errors()
            bare.add(predict(with_fits(shipped(), [found]), rest), rest.ns)
            others = _beside(some, rest) if held_out == "the sizes between" else (_nearest(some, rest),)
            out.append(Row(what, calibrated, held_out, bare.found(), HELD_OUT, others))
    return out


def _beside(some: Samples, rest: Samples) -> tuple[Beside, ...]:
    return (beside("interpolated", interpolated(some, rest), rest.ns),)


def _nearest(some: Samples, rest: Samples) -> Beside:
    """The middle, in log, of the times of 2 and 8 ranks at the same size."""
    ns = {(int(r), b): t for r, b, t in zip(some.extra["ranks"], some.size[:, 0].tolist(), some.ns, strict=True)}
    sizes = rest.size[:, 0].tolist()
    at = np.array([(2, b) in ns and (8, b) in ns for b in sizes])
    middle = np.array([np.sqrt(ns[2, b] * ns[8, b]) for b, has in zip(sizes, at, strict=True) if has])
    return beside("middle of 2 and 8 GPUs", middle, rest.ns[at])


def all_to_all() -> list[tuple[Row, Errors]]:
    """NCCL's all-to-all; with each row the errors that it sums up."""
    profiles()
    import fit_exchange as fx

    def read(keep: Any = None) -> dict[str, np.ndarray]:
        t = Part(keep).read(NCCL)
        return dict(fx.pick(t, (t["op_name"] == "alltoall") & (t["nccl_dtype"] == "half")))

    sizes = list(every_other(read()["message_size"]))
    out = []
    for calibrated, held_out, keep in (
        ("every other size of 2, 4, 8 GPUs", "the sizes between", lambda t: np.isin(t["message_size"], sizes)),
        (RANKS, "4 GPUs, all sizes", lambda t: t["num_gpus"] != 4),
    ):
        fits: dict[str, dict[str, float]] = {}
        curves, _ = fx.pairwise(Part(keep), fits, NVLINK, LATENCY, NCCL)
        rest = read(lambda t, keep=keep: ~keep(t))
        ops, errors = exchanging(fits, curves), Errors()
        for ranks in sorted(set(rest["num_gpus"].tolist())):
            t = fx.pick(rest, rest["num_gpus"] == ranks)
            near = t["message_size"] * 2.0 * (1 - 1 / ranks)
            errors.add(ops.all_to_all(near, 0.0, ranks, 1, kind="pairwise").ns, t["latency"] * 1e6)
        some, other = (_plain(t, ("num_gpus",), "message_size", t["latency"] * 1e6) for t in (read(keep), rest))
        others = _beside(some, other) if held_out == "the sizes between" else (_nearest(some, other),)
        out.append((Row("all-to-all, NCCL", calibrated, held_out, errors.found(), CLAIM, others), errors))
    return out


def _plain(t: dict[str, np.ndarray], names: tuple[str, ...], size: str, ns: Floats) -> Samples:
    """Points of a table as samples, for `interpolated`: equal `names` are one curve."""
    key = list(zip(*(t[name].tolist() for name in names), strict=True))
    extra = {"ranks": t["num_gpus"].astype(float)} if "num_gpus" in t else {}
    return Samples("all_to_all", "", key, t[size].astype(float)[:, None], ns, 0, extra)


def deep_ep() -> list[tuple[Row, Errors]]:
    """DeepEP on 8 GPUs: token counts held out, then hidden sizes held out; dispatch (FP8) and combine (bf16) together.
    Normal kernels: with 20 multiprocessors, where the profile has a curve, and with other numbers. With each row the
    errors that it sums up."""
    profiles()
    import fit_exchange as fx

    out = []
    for kind, name in (("normal", "DeepEP normal kernels"), ("ll", "DeepEP low-latency kernels")):
        tokens = list(every_other(of_deep_ep(fx, kind)["num_token"]))
        ways: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
            ("every other token count", "the counts between", lambda t, on=tokens: np.isin(t["num_token"], on)),
            ("hidden 4096 and 7168", "hidden 5120 and 6144", lambda t: np.isin(t["hidden_size"], (4096, 7168))),
        )
        for calibrated, held_out, keep in ways:
            fits, curves, _ = fx.inside(Part(keep), NVLINK, LATENCY)
            parts = [of_deep_ep(fx, kind, keep), of_deep_ep(fx, kind, lambda t, keep=keep: ~keep(t))]
            for label, pick in (
                {", 20 SMs": _at_twenty, ", 4 to 24 SMs": lambda t: ~_at_twenty(t)} if kind == "normal" else {"": None}
            ).items():
                some, rest = parts if pick is None else [fx.pick(t, pick(t)) for t in parts]
                errors, others = _deep_ep(fx, kind, exchanging(fits, curves), some, rest)
                between = others if held_out == "the counts between" else ()
                out.append((Row(name + label, calibrated, held_out, errors.found(), CLAIM, between), errors))
    return out


def _at_twenty(t: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(t["dispatch_sms"] == 20)


def _deep_ep(fx: Any, kind: str, ops: Operators, some: Any, rest: Any) -> tuple[Errors, tuple[Beside, ...]]:
    """Errors of `rest`, and those of interpolating `some` at the same shape."""
    errors, alone, theirs = Errors(), [], []
    names = ("hidden_size", "num_topk", "num_experts", *(("dispatch_sms",) if kind == "normal" else ()))
    known = {way: ns for way, _, _, ns in exchanges(fx, kind, some)}
    for way, near, sms, ns in exchanges(fx, kind, rest):
        for number in sorted(set(sms.tolist())):
            at = sms == number
            errors.add(ops.all_to_all(near[at], 0.0, 8, 1, 8, kind, way, int(number)).ns, ns[at])  # type: ignore[arg-type]
        alone.append(interpolated(_plain(some, names, "num_token", known[way]), _plain(rest, names, "num_token", ns)))
        theirs.append(ns)
    guess, ns = np.concatenate(alone), np.concatenate(theirs)
    has = np.isfinite(guess)
    return errors, (beside("interpolated", guess[has], ns[has]),) if has.any() else ()


def of_deep_ep(fx: Any, kind: str, keep: Any = None) -> dict[str, np.ndarray]:
    """The rows that the shipped fit reads."""
    t = Part(keep).read(f"{fx.NODE}{kind}_perf.parquet")
    return dict(fx.pick(t, (t["hidden_size"] >= 4096) & (t["num_topk"] >= 4) & (t["num_topk"] <= 10)))


def exchanges(fx: Any, kind: str, t: dict[str, np.ndarray]) -> list[tuple[Any, Floats, Floats, Floats]]:
    """Way, bytes through the busiest port, multiprocessors (0: the kernel's own), ns."""
    unit = "transmit_us" if kind == "normal" else "avg_t_us"
    copies = (fx.distinct(8, t["num_topk"]) if kind == "normal" else t["num_topk"]) * 7.0 / 8.0 * t["num_token"]
    head = fx.HEADER if kind == "ll" else 0
    out = []
    for way, width in (("dispatch", fx.FP8), ("combine", fx.BF16)):
        near = copies * (t["hidden_size"] * width + (head if way == "dispatch" else 0))
        sms = t[f"{way}_sms"] if kind == "normal" else np.zeros(len(near))
        out.append((way, near, sms, t[f"{way}_{unit}"] * 1e3))
    return out


def rows() -> list[Row]:
    """Collectives, NCCL's all-to-all, DeepEP."""
    return [*collectives(), *(row for row, _ in (*all_to_all(), *deep_ep()))]
