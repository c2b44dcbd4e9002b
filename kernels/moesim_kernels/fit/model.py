"""From samples to an operator model and back: fit it, put it into a profile, ask the profile for times.

fitted = fit_operator(samples, profile)      # physics, residual curves, and for MoE the row-work table
profile = with_fits(profile, [fitted])       # a profile that prices with them
ns = predict(profile, samples)               # through `moesim.cost.operators.Operators`, as a simulation would
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moesim.cost.operators import AttentionShape, BlockShape, MoEShape, Operators, RouterShape
from moesim.cost.own import block_ns
from moesim.hardware import Curve, DeviceProfile, ProfileSpec, RowWork
from moesim_kernels.fit.curves import Axes, curves, every_size
from moesim_kernels.fit.physics import dtype_of, fit_physics
from moesim_kernels.fit.samples import Samples
from moesim_kernels.fit.work import fit_work

__all__ = ["Fitted", "fit_operator", "predict", "profile_yaml", "with_fits"]

_DROP = (
    0.15  # of log time between neighbouring sizes: less is noise, more a kernel switch (benchmarks/profiles/figures.py)
)


@dataclass(frozen=True)
class Fitted:
    """One operator variant as fitted. row_work: of MoE with histograms, for its `dtype`; None: blocks of rows."""

    op: str
    variant: str
    dtype: str
    values: dict[str, float]
    curves: list[Curve]
    row_work: RowWork | None = None


def fit_operator(s: Samples, profile: DeviceProfile, axes_of: Axes = every_size, most: int = 4000) -> Fitted:
    """Physics by least squares on log time over at most `most` points, and residual curves at the sizes of `axes_of`.

    `profile` gives the device's rates (hbm, FLOP by dtype, links) and the rows of a MoE block; its curves are not
    looked at, but by a `block`, which is set against the prices of its parts: fit those first. MoE samples with counts
    give the row-work table as well (`fit_work`); its gradients use the table that `profile` has, so fit the forward
    pass first. Raises ValueError for samples of an operator without physics.
    """
    dtype, table = dtype_of(s), None
    if s.op == "moe" and s.counts is not None:
        worked = fit_work(s, profile)
        values, table = worked.values, worked.table
        profile = replace(profile, moe_row_work=MappingProxyType({**profile.moe_row_work, dtype: table}))
    else:
        values = fit_physics(s, profile, most, _given(s, profile))
    return Fitted(s.op, s.variant, dtype, values, curves(s, values, profile, axes_of, _DROP), table)


def _given(s: Samples, profile: DeviceProfile) -> dict[str, float]:
    """Parameters that these samples cannot tell: where gradients run one by one as the forward pass does, and what a
    peer more costs where all had the same number of ranks, or a count where no dispatch was timed (all of it launch).
    """
    if s.op.startswith("moe") and profile.fit("moe", s.variant, "serial", 0.0):
        return {"serial": 1.0}
    given = {}
    if s.op == "all_to_all":
        if len(set(s.extra["ranks"].tolist())) == 1:
            given["peer_ns"] = 0.0
        if len({str(k[0]).rpartition("/")[2] for k in s.key}) == 1:
            given["counts_ns"] = 0.0
        if "total" not in s.extra:
            given["shared"] = 0.0
    return given


def with_fits(profile: DeviceProfile, parts: Iterable[Fitted]) -> DeviceProfile:
    """`profile`, marked measured, with the parts' physics, row work and curves in place of its own for their
    operators.
    """
    fits: dict[str, Mapping[str, float]] = {}
    found: dict[str, tuple[Curve, ...]] = {}
    work: dict[str, RowWork] = {}
    for part in parts:
        fits[f"{part.op}/{part.variant}" if part.variant else part.op] = part.values
        fits.setdefault(part.op, {})
        found[part.op] = found.get(part.op, ()) + tuple(part.curves)
        if part.row_work is not None:
            work[part.dtype] = part.row_work
    ops = set(found)
    kept = {k: v for k, v in profile.fits.items() if k.split("/")[0] not in ops}
    return replace(
        profile,
        kind="measured",
        fits=MappingProxyType({**kept, **fits}),
        curves=MappingProxyType({**profile.curves, **found}),
        moe_row_work=MappingProxyType({**profile.moe_row_work, **work}),
    )


def predict(profile: DeviceProfile, s: Samples, cuda_graph: bool = True) -> NDArray[np.float64]:
    """ns of every sample, [points], through the public methods of `Operators(profile)`."""
    ops = Operators(profile, cuda_graph)
    out = np.zeros(len(s.ns))
    for key, rows in s.by_key().items():
        out[rows] = _price(ops, s.where(rows), key)
    return out


def _price(ops: Operators, s: Samples, key: tuple[Any, ...]) -> NDArray[np.float64]:
    """Points that share a shape."""
    first = s.size[:, 0]
    if s.op == "gemm":
        return ops.gemm(first, key[0], key[1], key[2]).ns
    if s.op in ("moe", "moe_dgrad", "moe_wgrad"):
        shape = MoEShape(key[0], key[1], key[2], key[3], key[4], key[5] == 3)
        active = s.extra["active"]
        if s.counts is None:
            work = ops.moe_work(first / active, shape.dtype) * active
        else:
            work = np.array([float(ops.moe_work(c, shape.dtype).sum()) for c in s.counts])
        if s.op == "moe":
            return ops.moe(first, active, work, s.extra["other"], shape).ns
        return ops.moe_gradient("dgrad" if s.op == "moe_dgrad" else "wgrad", first, active, work, shape).ns
    if s.op in ("router", "router_backward"):
        return ops.router(first, RouterShape(*key), s.op == "router_backward").ns
    if s.op == "block":
        shape_of = BlockShape(*key)
        parts = block_ns(ops, first, shape_of)
        whole = ops.block(first, parts, shape_of)
        return parts if whole is None else whole.ns
    if s.op.startswith("attention"):
        length = s.size[:, 1]
        heads = _attention(key, dtype_of(s))
        if s.op == "attention_backward":
            return ops.attention_backward(length, heads, first).ns
        if s.op == "attention_prefill":
            return ops.attention_prefill(length, s.extra.get("kv", length), heads, first).ns
        return ops.attention_decode(first, first * length, heads).ns
    if s.op == "elementwise":
        return ops.elementwise(first).ns
    if s.op == "copy":
        return ops.copy(first, key[0], key[1], key[2], bool(key[3])).ns
    if s.op == "storage":
        return ops.storage(first, key[0], key[1], key[2]).ns
    if s.op == "all_to_all":
        kind, _, way = str(key[0]).partition("/")
        total = s.extra.get("total")
        return ops.all_to_all(first, 0.0, int(key[1]), 1, 1, kind, way or "dispatch", 0, total).ns  # type: ignore[arg-type]
    return {"all_reduce": ops.all_reduce, "all_gather": ops.all_gather, "reduce_scatter": ops.reduce_scatter}[s.op](
        first, int(key[0]), False
    ).ns


def _attention(key: tuple[Any, ...], dtype: str) -> AttentionShape:
    """The shape that a curve key names."""
    if key[0] == "mla":
        return AttentionShape("mla", key[1], key[1], 192, 128, key[2], dtype, key[3])
    return AttentionShape("gqa", key[1], key[2], key[3], key[4], 0, dtype, key[6], key[5])


def profile_yaml(spec: ProfileSpec | Mapping[str, Any], head: str = "") -> str:
    """YAML text of a profile, name and kind first; `head` is a comment line above it. Figures keep five digits.

    A mapping is checked as a ProfileSpec is when loaded, so its curves need not be there yet.
    """
    plain = dict(spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, ProfileSpec) else spec)
    if "fits" in plain:
        plain["fits"] = {k: {n: float(f"{v:.5g}") for n, v in x.items()} for k, x in sorted(plain["fits"].items())}
    first = [k for k in ("name", "kind", "device", "vendor") if k in plain]
    plain = {k: plain[k] for k in [*first, *[k for k in plain if k not in first]]}
    text = yaml.safe_dump(plain, sort_keys=False, width=120)
    return (f"# {head}\n" if head else "") + text
