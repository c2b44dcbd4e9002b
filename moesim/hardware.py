"""A device and the machines it stands in, as data: rates, sizes, links, fitted physics, measured curves,
errors.

A profile is `measured` (its curves come from timed kernels) or `assumed` (datasheet figures and typical
efficiencies). Facts and fitted figures live in `hw_profiles/*.yaml`; measured residual curves stand beside
them as JSON. This module takes the mapping a YAML file holds and checks it; it reads no YAML itself.

Legend: G ranks (devices). Rates are one direction per GPU, in bytes a second; times are nanoseconds.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError, model_validator

from moesim.errors import BadInput, Problem
from moesim.hardware_curves import OPERATORS, Curve, load_curves
from moesim.spec import Spec
from moesim.units import FlopPerS, GBPerS, GiB, Us

__all__ = [
    "ASSUMED",
    "EXTRAPOLATED",
    "GRADES",
    "INTERPOLATED",
    "MEASURED",
    "OPERATORS",
    "Cluster",
    "ClusterSpec",
    "Curve",
    "DeviceProfile",
    "Interval",
    "Node",
    "NodeSpec",
    "PowerSpec",
    "ProfileSpec",
    "RowWork",
]

GRADES = ("measured", "interpolated", "extrapolated", "assumed")
"""What a priced time rests on, firm to weak; its index is the uint8 code in `Priced.grade`."""

MEASURED, INTERPOLATED, EXTRAPOLATED, ASSUMED = np.arange(4, dtype=np.uint8)

GradeName = Literal["measured", "interpolated", "extrapolated", "assumed"]

DtypeName = Literal["fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "mxfp4", "nvfp4", "ternary"]
"""The same names as `moesim.model.Dtype`; written again because hardware and model do not import each other."""

_COMPUTE_AS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp32": ("fp32", "bf16"),
        "bf16": ("bf16", "fp16"),
        "fp16": ("fp16", "bf16"),
        "fp8": ("fp8", "bf16", "fp16"),
        "fp8_block": ("fp8_block", "fp8", "bf16", "fp16"),
        "int8": ("int8", "bf16", "fp16"),
        "int4": ("bf16", "fp16"),  # weights only: unpacked, multiplied in bf16
        "mxfp4": ("mxfp4", "bf16", "fp16"),
        "nvfp4": ("nvfp4", "bf16", "fp16"),
        "ternary": ("bf16", "fp16"),  # weights only, as int4
    }
)
_DEFAULT_ERROR = 0.30  # 1 sigma of log where a profile states none: a roofline with typical efficiencies

Fits = Mapping[str, Mapping[str, float]]
_S = TypeVar("_S", bound=Spec)


class NodeSpec(Spec):
    """The server around the device, per GPU where not said otherwise."""

    gpus_per_node: Annotated[int, Field(ge=1, le=1024)]
    nvlink_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)]
    nvlink_latency_us: Annotated[Us, Field(le=1e6)]
    nic_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)]
    nic_latency_us: Annotated[Us, Field(le=1e6)]
    pcie_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)]
    host_memory_gib: Annotated[GiB, Field(le=1e7)]
    host_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)]
    nvme_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)]
    nvme_gib: Annotated[GiB, Field(le=1e8)]
    cpu_cores: Annotated[int, Field(ge=1, le=100_000)]


class RowWorkSpec(Spec):
    """Work of one expert by its rows (`RowWork`): both lists rise, `work` may stay level."""

    rows: Annotated[tuple[Annotated[float, Field(gt=0, le=1e9)], ...], Field(strict=False, min_length=1, max_length=64)]
    work: Annotated[tuple[Annotated[float, Field(gt=0, le=1e9)], ...], Field(strict=False, min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _check(self) -> RowWorkSpec:
        if len(self.rows) != len(self.work):
            raise ValueError(f"rows and work must be as many, got {len(self.rows)} and {len(self.work)}")
        if any(b <= a for a, b in pairwise(self.rows)):
            raise ValueError(f"rows must increase, got {list(self.rows)}")
        if any(b < a for a, b in pairwise(self.work)):
            raise ValueError(f"work must not fall as rows rise, got {list(self.work)}")
        return self


class Interval(Spec):
    """Half width, in |ln(predicted / measured)|, of the interval that held `level` of `n` held-out points.

    method: `split-conformal` where the points are exchangeable with those to come and n allows the level (Lei et al.
    2018), else `empirical`.
    """

    level: Annotated[float, Field(gt=0, lt=1)]
    half_width: Annotated[float, Field(ge=0, le=10)]
    n: Annotated[int, Field(ge=1)]
    method: Literal["split-conformal", "empirical"]


class PowerSpec(Spec):
    """What a device draws, in watts: busy_w while it steps, idle_w while it waits (None: not known). source: who says
    so. No time depends on it, so it is not in a scenario's hash."""

    busy_w: Annotated[float, Field(gt=0, le=1e5)]
    idle_w: Annotated[float, Field(ge=0, le=1e5)] | None = None
    source: Annotated[str, Field(min_length=1, max_length=500)]

    @model_validator(mode="after")
    def _check(self) -> PowerSpec:
        if self.idle_w is not None and self.idle_w > self.busy_w:
            raise ValueError(f"idle_w must not exceed busy_w, got {self.idle_w:g} and {self.busy_w:g}")
        return self


class ProfileSpec(Spec):
    """What `hw_profiles/*.yaml` says. `curves` names JSON files beside it, `fits` holds the physics' parameters."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    kind: Literal["measured", "assumed"]
    device: Annotated[str, Field(min_length=1, max_length=200)]
    vendor: Annotated[str, Field(min_length=1, max_length=100)]
    memory_gib: Annotated[GiB, Field(gt=0, le=1e6)]
    hbm_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)]
    flop_per_s: Annotated[dict[DtypeName, Annotated[FlopPerS, Field(gt=0, le=1e18)]], Field(min_length=1)]
    num_sms: Annotated[int, Field(ge=1, le=100_000)]
    graph_launch_us: Annotated[Us, Field(le=1e6)]
    eager_launch_us: Annotated[Us, Field(le=1e6)]
    moe_block_rows: Annotated[int, Field(ge=1, le=1024)] = 16
    moe_row_work: Annotated[dict[DtypeName, RowWorkSpec], Field(default_factory=dict)]
    node: NodeSpec
    fits: Annotated[dict[str, dict[str, float]], Field(default_factory=dict)]
    errors: Annotated[dict[str, Annotated[float, Field(ge=0, le=3)]], Field(default_factory=dict)]
    intervals: Annotated[dict[str, dict[GradeName, Interval]], Field(default_factory=dict)]
    speed_error: Annotated[float, Field(ge=0, le=3)] = 0.0
    curves: Annotated[tuple[str, ...], Field(strict=False, max_length=16)] = ()
    power: PowerSpec | None = None
    provenance: Annotated[dict[str, Any], Field(default_factory=dict)]


@dataclass(frozen=True, slots=True)
class Node:
    """Resolved `NodeSpec`. Rates are bytes a second, one direction, per GPU; host and NVMe ones per node."""

    gpus_per_node: int
    nvlink_bytes_per_s: float
    nvlink_latency_ns: float
    nic_bytes_per_s: float
    nic_latency_ns: float
    pcie_bytes_per_s: float
    host_memory_bytes: int
    host_bytes_per_s: float
    nvme_bytes_per_s: float
    nvme_bytes: int
    cpu_cores: int

    @classmethod
    def from_spec(cls, spec: NodeSpec) -> Node:
        """Convert units once."""
        return cls(
            gpus_per_node=spec.gpus_per_node,
            nvlink_bytes_per_s=spec.nvlink_gb_per_s * 1e9,
            nvlink_latency_ns=spec.nvlink_latency_us * 1e3,
            nic_bytes_per_s=spec.nic_gb_per_s * 1e9,
            nic_latency_ns=spec.nic_latency_us * 1e3,
            pcie_bytes_per_s=spec.pcie_gb_per_s * 1e9,
            host_memory_bytes=round(spec.host_memory_gib * 2**30),
            host_bytes_per_s=spec.host_gb_per_s * 1e9,
            nvme_bytes_per_s=spec.nvme_gb_per_s * 1e9,
            nvme_bytes=round(spec.nvme_gib * 2**30),
            cpu_cores=spec.cpu_cores,
        )

    def scaled(self, speed: float) -> Node:
        """Every rate times `speed`, every latency divided by it; sizes stay."""
        return replace(
            self,
            nvlink_bytes_per_s=self.nvlink_bytes_per_s * speed,
            nvlink_latency_ns=self.nvlink_latency_ns / speed,
            nic_bytes_per_s=self.nic_bytes_per_s * speed,
            nic_latency_ns=self.nic_latency_ns / speed,
            pcie_bytes_per_s=self.pcie_bytes_per_s * speed,
            host_bytes_per_s=self.host_bytes_per_s * speed,
            nvme_bytes_per_s=self.nvme_bytes_per_s * speed,
        )


@dataclass(frozen=True, slots=True, eq=False)
class RowWork:
    """What an expert's rows cost a grouped GEMM, in rows at the rate of many: 0 for none, linear between the knots,
    on with the slope of the last piece. rows, work: [knots], rows increase, work does not fall.
    """

    rows: NDArray[np.float64]
    work: NDArray[np.float64]

    def at(self, count: ArrayLike) -> NDArray[np.float64]:
        """Work of `count` rows of one expert, elementwise."""
        rows, work = np.concatenate([[0.0], self.rows]), np.concatenate([[0.0], self.work])
        slope, n = (work[-1] - work[-2]) / (rows[-1] - rows[-2]), np.asarray(count, dtype=np.float64)
        beyond = np.maximum(n - rows[-1], 0.0) * slope
        return np.asarray(np.interp(n, rows, work) + beyond)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceProfile:
    """A device, its node, the fitted physics and the measured curves. Built by `from_spec`.

    fits: `op` or `op/variant` -> parameter -> value. A parameter ending in `_ns` is a time, one ending in
    `_per_s` a rate, any other has no unit; `scaled` relies on it. errors: held-out relative error (1 sigma
    of log) by operator. speed_error: 1 sigma of log of the device's own speed from one run to another, which all
    operators share and no held-out point of the same run can show.
    """

    name: str
    kind: Literal["measured", "assumed"]
    device: str
    vendor: str
    memory_bytes: int
    hbm_bytes_per_s: float
    flop_per_s: Mapping[str, float]
    num_sms: int
    graph_launch_ns: float
    eager_launch_ns: float
    moe_block_rows: int
    moe_row_work: Mapping[str, RowWork]
    node: Node
    fits: Fits
    errors: Mapping[str, float]
    intervals: Mapping[str, Mapping[str, Interval]]
    speed_error: float
    curves: Mapping[str, tuple[Curve, ...]]
    provenance: Mapping[str, Any]
    power: PowerSpec | None = None

    @classmethod
    def from_spec(cls, spec: ProfileSpec | Mapping[str, Any], base: Path, where: str = "") -> DeviceProfile:
        """Build a profile. `base` is the folder its `curves` file is named from; `where` names the YAML in
        errors.

        Raises BadInput with every problem found: unknown keys and operators, wrong units, values out of
        range, curves that are missing, too large, not increasing or not finite.
        """
        parsed = _parse(ProfileSpec, spec, where or "profile")
        problems = _check_names(parsed, where or parsed.name)
        curves: dict[str, tuple[Curve, ...]] = {}
        for name in parsed.curves:
            if Path(name).name != name or name in (".", ".."):
                problems.append(Problem(where, f"curves must name files beside the profile, got {name!r}."))
                continue
            for op, more in load_curves(base / name, problems).items():
                curves[op] = curves.get(op, ()) + more
        if parsed.kind == "measured" and not parsed.curves:
            problems.append(
                Problem(where, "a measured profile names its curve files: curves is missing. Add it or say assumed.")
            )
        if problems:
            raise BadInput(problems)
        return cls(
            name=parsed.name,
            kind=parsed.kind,
            device=parsed.device,
            vendor=parsed.vendor,
            memory_bytes=round(parsed.memory_gib * 2**30),
            hbm_bytes_per_s=parsed.hbm_gb_per_s * 1e9,
            flop_per_s=MappingProxyType({str(k): v for k, v in parsed.flop_per_s.items()}),
            num_sms=parsed.num_sms,
            graph_launch_ns=parsed.graph_launch_us * 1e3,
            eager_launch_ns=parsed.eager_launch_us * 1e3,
            moe_block_rows=parsed.moe_block_rows,
            moe_row_work=MappingProxyType(
                {str(k): RowWork(np.array(v.rows), np.array(v.work)) for k, v in parsed.moe_row_work.items()}
            ),
            node=Node.from_spec(parsed.node),
            fits=MappingProxyType({k: MappingProxyType(dict(v)) for k, v in parsed.fits.items()}),
            errors=MappingProxyType(dict(parsed.errors)),
            intervals=MappingProxyType({op: {str(g): i for g, i in v.items()} for op, v in parsed.intervals.items()}),
            speed_error=parsed.speed_error,
            curves=MappingProxyType(curves),
            provenance=MappingProxyType(dict(parsed.provenance)),
            power=parsed.power,
        )

    def flop_rate(self, dtype: str) -> float:
        """Peak dense FLOP/s at which operands of `dtype` are multiplied (int4 weights run at the bf16 rate).

        Raises BadInput for a dtype that neither the device nor a wider type it lists can multiply.
        """
        for name in _COMPUTE_AS.get(dtype, ()):
            if name in self.flop_per_s:
                return self.flop_per_s[name]
        known = ", ".join(sorted(self.flop_per_s))
        raise BadInput(f"device {self.name} has no FLOP rate for dtype {dtype!r}; it lists {known}.", self.name)

    def fit(self, op: str, variant: str, name: str, default: float) -> float:
        """A physics parameter: of `op/variant` if stated, else of `op`, else `default`."""
        for key in (f"{op}/{variant}", op):
            if key in self.fits and name in self.fits[key]:
                return self.fits[key][name]
        return default

    def error(self, op: str) -> float:
        """Held-out relative error (1 sigma of log) of an operator; 0.30 where the profile states none."""
        return self.errors.get(op, _DEFAULT_ERROR)

    def interval(self, op: str, grade: int) -> Interval | None:
        """How far a time of this grade (index into GRADES) may be off, as seen on held-out points; None: not known."""
        return self.intervals.get(op, {}).get(GRADES[int(grade)])

    def scaled(self, speed: float) -> DeviceProfile:
        """The device `speed` times as fast: rates times it, latencies divided by it; residuals have no unit."""
        if not (math.isfinite(speed) and speed > 0):
            raise BadInput(f"speed must be a positive number, got {speed!r}.", self.name)

        def scale(name: str, value: float) -> float:
            if name.endswith("_ns"):
                return value / speed
            return value * speed if name.endswith("_per_s") else value

        fits = {op: MappingProxyType({n: scale(n, v) for n, v in p.items()}) for op, p in self.fits.items()}
        return replace(
            self,
            hbm_bytes_per_s=self.hbm_bytes_per_s * speed,
            flop_per_s=MappingProxyType({k: v * speed for k, v in self.flop_per_s.items()}),
            graph_launch_ns=self.graph_launch_ns / speed,
            eager_launch_ns=self.eager_launch_ns / speed,
            node=self.node.scaled(speed),
            fits=MappingProxyType(fits),
        )


class ClusterSpec(Spec):
    """The `cluster` block of a scenario. Link numbers left out are the profile's."""

    device: Annotated[str, Field(min_length=1, max_length=500)]
    nodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    gpus_per_node: Annotated[int, Field(ge=1, le=1024)] | None = None
    nics_per_gpu: Annotated[float, Field(gt=0, le=64)] = 1.0
    oversubscription: Annotated[float, Field(ge=1, le=1000)] = 1.0
    rails: bool = False
    nvlink_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)] | None = None
    nvlink_latency_us: Annotated[Us, Field(le=1e6)] | None = None
    nic_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)] | None = None
    nic_latency_us: Annotated[Us, Field(le=1e6)] | None = None
    pcie_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)] | None = None
    host_memory_gib: Annotated[GiB, Field(le=1e7)] | None = None
    nvme_gb_per_s: Annotated[GBPerS, Field(gt=0, le=1e6)] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Cluster:
    """`nodes` equal servers. `profile.node` already holds the resolved link rates, so
    `Operators(cluster.profile)` prices this cluster.

    Oversubscription: with `rails` false every byte that leaves a node crosses the spine, so the NIC rate is
    divided by it. With `rails` true GPU i of every node hangs on switch i and the collectives here keep to
    their rail (the bytes change rail over NVLink, as DeepEP and NCCL's PXN do), so they see the full rate;
    `spine_bytes_per_s` is what traffic that does change rail gets.
    """

    profile: DeviceProfile
    nodes: int
    gpus_per_node: int
    nics_per_gpu: float
    oversubscription: float
    rails: bool

    @classmethod
    def from_spec(
        cls, spec: ClusterSpec | Mapping[str, Any], profile: DeviceProfile, where: str = "cluster"
    ) -> Cluster:
        """Resolve link numbers: the scenario's where it states them, else the profile's. Raises BadInput."""
        parsed = _parse(ClusterSpec, spec, where)
        node = profile.node
        gpus = parsed.gpus_per_node or node.gpus_per_node
        nic = (parsed.nic_gb_per_s * 1e9 if parsed.nic_gb_per_s else node.nic_bytes_per_s) * parsed.nics_per_gpu
        spine = nic / parsed.oversubscription
        resolved = replace(
            node,
            gpus_per_node=gpus,
            nvlink_bytes_per_s=_or(parsed.nvlink_gb_per_s, 1e9, node.nvlink_bytes_per_s),
            nvlink_latency_ns=_or(parsed.nvlink_latency_us, 1e3, node.nvlink_latency_ns),
            nic_bytes_per_s=nic if parsed.rails else spine,
            nic_latency_ns=_or(parsed.nic_latency_us, 1e3, node.nic_latency_ns),
            pcie_bytes_per_s=_or(parsed.pcie_gb_per_s, 1e9, node.pcie_bytes_per_s),
            host_memory_bytes=round(_or(parsed.host_memory_gib, 2.0**30, node.host_memory_bytes)),
            nvme_bytes_per_s=_or(parsed.nvme_gb_per_s, 1e9, node.nvme_bytes_per_s),
        )
        return cls(
            profile=replace(profile, node=resolved),
            nodes=parsed.nodes,
            gpus_per_node=gpus,
            nics_per_gpu=parsed.nics_per_gpu,
            oversubscription=parsed.oversubscription,
            rails=parsed.rails,
        )

    @property
    def num_ranks(self) -> int:
        """GPUs in the cluster."""
        return self.nodes * self.gpus_per_node

    @property
    def node(self) -> Node:
        """The resolved link rates, host memory and NVMe."""
        return self.profile.node

    @property
    def spine_bytes_per_s(self) -> float:
        """One direction per GPU for traffic that changes rail (equal to the NIC rate without rails)."""
        node = self.profile.node
        return node.nic_bytes_per_s / self.oversubscription if self.rails else node.nic_bytes_per_s

    def node_of_rank(self, rank_G: ArrayLike) -> NDArray[np.int64]:
        """Node of each rank: consecutive ranks fill a node. rank_G: any shape, 0 <= rank < num_ranks."""
        rank = np.asarray(rank_G, dtype=np.int64)
        if rank.size and (rank.min() < 0 or rank.max() >= self.num_ranks):
            raise ValueError(f"ranks must lie in [0, {self.num_ranks}), got {rank.min()}..{rank.max()}")
        return rank // self.gpus_per_node

    def rail_of_rank(self, rank_G: ArrayLike) -> NDArray[np.int64]:
        """Place of each rank in its node, which is the rail its NIC hangs on."""
        return np.asarray(rank_G, dtype=np.int64) % self.gpus_per_node

    def nodes_of_group(self, ranks: int, stride: int = 1) -> int:
        """Nodes that a group of `ranks` ranks, `stride` apart from a node's first rank on, spreads over."""
        return int(((ranks - 1) * stride) // self.gpus_per_node) + 1

    def scaled(self, speed: float) -> Cluster:
        """The cluster with `profile.scaled(speed)`."""
        return replace(self, profile=self.profile.scaled(speed))


def _or(value: float | None, scale: float, otherwise: float) -> float:
    return otherwise if value is None else value * scale


def _parse(cls: type[_S], spec: _S | Mapping[str, Any], where: str) -> _S:
    """Validate a mapping, turning pydantic's errors into one BadInput that names every key."""
    if isinstance(spec, cls):
        return spec
    try:
        return cls.model_validate(dict(spec))
    except ValidationError as error:
        raise BadInput(
            [Problem(where, f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}") for e in error.errors()]
        ) from None


def _check_names(spec: ProfileSpec, where: str) -> list[Problem]:
    """Operator names in `fits`, `errors` and `intervals` must exist; the nearest one is offered."""
    problems = []
    for field, names in (("fits", spec.fits), ("errors", spec.errors), ("intervals", spec.intervals)):
        for name in names:
            op = name.split("/")[0]
            if op not in OPERATORS or (field != "fits" and name != op):
                near = difflib.get_close_matches(op, OPERATORS, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Operators: {', '.join(OPERATORS)}."
                problems.append(Problem(where, f"{field}.{name} is not an operator. {hint}"))
    for name, parameters in spec.fits.items():
        for key, value in parameters.items():
            if not (math.isfinite(value) and value >= 0):
                problems.append(Problem(where, f"fits.{name}.{key} must be a finite number >= 0, got {value!r}."))
            elif key.endswith("eff") and value == 0:
                problems.append(Problem(where, f"fits.{name}.{key} is a share of a rate and must be above 0."))
    return problems
