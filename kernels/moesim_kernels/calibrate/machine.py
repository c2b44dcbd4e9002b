"""The machine of a profile: rates and sizes measured by the run, and what nobody measured, by name.

Rates are bytes or FLOP a ns until they are written. A figure that was not measured is that of the shipped profile of
the same device where there is one, else a common value; either way its name stands in `assumed`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import BadInput
from moesim.hardware import DeviceProfile
from moesim.scenario.files import home, names_in
from moesim.scenario.load import load_profile
from moesim_kernels.bench.log import Point
from moesim_kernels.calibrate.points import Ceilings

__all__ = ["Machine", "machine_of"]

_COMMON = {
    "nvlink_gb_per_s": 50.0,
    "nvlink_latency_us": 5.0,
    "nic_gb_per_s": 1.25,
    "nic_latency_us": 50.0,
    "pcie_gb_per_s": 25.0,
    "host_gb_per_s": 50.0,
    "nvme_gb_per_s": 2.0,
    "nvme_gib": 100.0,
    "host_memory_gib": 64.0,
    "cpu_cores": 16.0,
}


@dataclass
class Machine:
    """Keys of a profile that describe the machine. `assumed`: the keys nobody measured, with where they come from."""

    spec: dict[str, Any]
    assumed: dict[str, str] = field(default_factory=dict)


def machine_of(points: Sequence[Point], top: Ceilings, facts: Mapping[str, Any]) -> Machine:
    """The machine that `facts` names, with `top` as its rates and links from the points of copies, storage and
    collectives.
    """
    cuda = facts.get("device") != "cpu"
    like = _shipped(str(facts.get("device", ""))) if cuda else None
    out = Machine({})
    known: dict[str, float | None] = {
        "pcie_gb_per_s": _rate(points, "copy", lambda s: s["direction"] == ("h2d" if cuda else "host")),
        "nvme_gb_per_s": _rate(points, "storage", lambda s: s["mode"] == "direct"),
        "host_gb_per_s": None if cuda else top.read,
        "host_memory_gib": _gib(facts.get("host_memory_bytes")),
        "cpu_cores": facts.get("cpus"),
        **_links(points),
    }
    node: dict[str, Any] = {"gpus_per_node": int(facts.get("gpus") or 1) if cuda else 1}
    for name, otherwise in _COMMON.items():
        value = known.get(name)
        if value is None:
            value = _of_node(like, name) if like is not None else otherwise
            out.assumed[f"node.{name}"] = f"of {like.name}" if like is not None else "a common value"
        node[name] = _figure(value)
    node["cpu_cores"] = int(node["cpu_cores"])
    memory = _gib(facts.get("memory_bytes"))
    if memory is None:
        memory = like.memory_bytes / 2**30 if like is not None else 16.0
        out.assumed["memory_gib"] = "of " + like.name if like is not None else "a common value"
    launch = {bool(p.case.shape.get("graph")): p.ns_median for p in points if p.case.op == "launch"}
    eager = launch.get(False)
    if eager is None:
        eager = 5e3
        out.assumed["eager_launch_us"] = "a common value"
    sms = facts.get("sms") or (like.num_sms if like is not None else facts.get("threads") or 1)
    out.spec = {
        "device": str(facts.get("cpu") if not cuda else facts.get("device")),
        "vendor": _vendor(str(facts.get("cpu") if not cuda else facts.get("device"))),
        "memory_gib": _figure(memory),
        "hbm_gb_per_s": _figure(top.read),
        "flop_per_s": {dtype: _figure(rate * 1e9) for dtype, rate in sorted(top.flop.items())},
        "num_sms": int(sms),
        "graph_launch_us": _figure(launch.get(True, eager) / 1e3),
        "eager_launch_us": _figure(eager / 1e3),
        "moe_block_rows": 16 if cuda else 1,
        "node": node,
    }
    return out


def _rate(points: Sequence[Point], op: str, chosen: Callable[[Mapping[str, Any]], bool]) -> float | None:
    """The best rate of an operator's points, bytes a ns (= GB/s)."""
    rates = [float(p.case.size["bytes"]) / p.ns_median for p in points if p.case.op == op and chosen(p.case.shape)]
    return max(rates, default=None)


def _links(points: Sequence[Point]) -> dict[str, float | None]:
    """Rate and latency of the link between ranks: the best rate of a port over all collectives and exchanges, and half
    of the shortest collective's time a hop (the other half is left to its launch).
    """
    rates, shortest = [], []
    for p in points:
        if p.case.op == "token_exchange":
            rates.append(float(p.case.size["bytes"]) / p.ns_median)
        if p.case.op not in ("all_reduce", "all_gather", "reduce_scatter"):
            continue
        ranks = int(p.case.shape["ranks"])
        traffic = 2.0 * (ranks - 1) / ranks if p.case.op == "all_reduce" else ranks - 1.0
        rates.append(float(p.case.size["bytes"]) * traffic / p.ns_median)
        shortest.append(p.ns_median)
    if not shortest:
        return {}
    return {"nvlink_gb_per_s": max(rates), "nvlink_latency_us": min(shortest) / 2e3 / 2.0}


def _shipped(device: str) -> DeviceProfile | None:
    """The shipped profile of a device of this name, by its model word (H200, A100, MI300X, 4090)."""
    words = re.findall(r"[A-Za-z]*\d{2,}[A-Za-z]*", device)
    for name in names_in("hw_profiles"):
        if any(word.lower() in name.split("_") for word in words):
            try:
                return load_profile(home() / "hw_profiles" / f"{name}.yaml")
            except BadInput:
                continue
    return None


def _of_node(like: DeviceProfile, name: str) -> float:
    """A figure of a loaded profile's node, in the unit of its YAML key."""
    node = like.node
    return float(
        {
            "nvlink_gb_per_s": node.nvlink_bytes_per_s / 1e9,
            "nvlink_latency_us": node.nvlink_latency_ns / 1e3,
            "nic_gb_per_s": node.nic_bytes_per_s / 1e9,
            "nic_latency_us": node.nic_latency_ns / 1e3,
            "pcie_gb_per_s": node.pcie_bytes_per_s / 1e9,
            "host_gb_per_s": node.host_bytes_per_s / 1e9,
            "nvme_gb_per_s": node.nvme_bytes_per_s / 1e9,
            "nvme_gib": node.nvme_bytes / 2**30,
            "host_memory_gib": node.host_memory_bytes / 2**30,
            "cpu_cores": node.cpu_cores,
        }[name]
    )


def _gib(size: Any) -> float | None:
    return size / 2**30 if isinstance(size, int | float) and size > 0 else None


def _figure(value: float) -> float:
    """Five digits: more is noise."""
    return float(f"{value:.5g}")


def _vendor(device: str) -> str:
    known = ("NVIDIA", "AMD", "Intel", "Apple", "ARM")
    return next((name for name in known if name.lower() in device.lower()), "unknown")
