"""Fit the exchanges of tokens (`all_to_all` of hw_profiles) to public tables: figures, not copies.

`python benchmarks/profiles/fit_exchange.py WHEEL` (seconds) rewrites the all_to_all part of hw_profiles/h100_sxm.yaml
and h100_sxm.exchange.json, and the fits of the datasheet profiles of B200 and H200. WHEEL: PyPI aiconfigurator-core
0.12.0 (NVIDIA, Apache-2.0), which also holds what SGLang 0.5.6 measured on 2, 4 and 8 nodes; read, never copied.

Left out, each with its reason: normal kernels on 8 nodes (dispatch there moves a third of what 4 nodes' NICs move and
waits up to 16 ms for counts, while DeepEP publishes 51 GB/s for the same case: a congested fabric, not the kernels);
their points with 12 SMs on 2 nodes (slower than both 8 and 16).
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from moesim_kernels.fit.curves import write_curves, write_whole
from moesim_kernels.fit.model import profile_yaml
from scipy.optimize import isotonic_regression, least_squares

from moesim.cost.swaps import knee
from moesim.hardware import ASSUMED, Curve

OUT = Path(__file__).resolve().parents[2] / "hw_profiles"
NODE = "comm/sglang/0.5.12/wideep_deepep_"
NODES = "comm/sglang/0.5.6.post2/wideep_deepep_"
SOURCES = {
    "normal": "comm/sglang/0.5.12: DeepEP normal kernels, 20 SMs",
    "ll": "comm/sglang/0.5.12: DeepEP low-latency kernels",
    "normal/nodes": "comm/sglang/0.5.6.post2: DeepEP normal kernels on 2 and 4 nodes, 20 SMs",
    "ll/nodes": "comm/sglang/0.5.6.post2: DeepEP low-latency kernels on 2, 4 and 8 nodes",
    "pairwise": "comm/nccl/2.29.2: alltoall",
}
WAYS = ("dispatch", "combine")
FP8, BF16, HEADER = 1 + 4 / 128, 2.0, 16
Table = dict[str, np.ndarray]
Fits = dict[str, dict[str, float]]


class Wheel:
    """Tables of one device in the wheel."""

    def __init__(self, path: str, device: str) -> None:
        self._zip = zipfile.ZipFile(path)
        self._folder = f"aiconfigurator_core/systems/data/{device}/"

    def read(self, name: str) -> Table:
        """All columns of a table."""
        table = pq.read_table(io.BytesIO(self._zip.read(self._folder + name)))
        return {c: table[c].to_numpy(zero_copy_only=False) for c in table.column_names}


def pick(table: Table, mask: np.ndarray) -> Table:
    """Rows of a table."""
    return {name: values[mask] for name, values in table.items()}


def distinct(places: Any, top_k: Any) -> Any:
    """Mean places that top_k even picks reach."""
    return places * (1.0 - (1.0 - 1.0 / places) ** top_k)


def solve(model: Any, ns: np.ndarray, start: list[float], scale: list[float]) -> np.ndarray:
    """Parameters above 0 for which ln(model / ns) is small, outliers counting less."""
    found = least_squares(
        lambda p: np.log(model(p) / ns), start, bounds=(1e-6, np.inf), loss="soft_l1", f_scale=0.1, x_scale=scale
    )
    return np.asarray(found.x)


def rising(ns: np.ndarray) -> np.ndarray:
    """The nearest times, in log, that never fall with size: neighbours that do are put at their mean."""
    return np.asarray(np.exp(isotonic_regression(np.log(ns)).x))


def curve(key: tuple[str, int], size: np.ndarray, ns: np.ndarray, model: np.ndarray, source: int) -> Curve:
    """A residual at every size measured, of times that never fall with size."""
    order = np.argsort(size)
    ratio = np.log(rising(ns[order]) / model[order])
    return Curve(key, "", (np.round(size[order], 0),), np.round(ratio, 3), None, source)


def shared_curve(
    key: tuple[str | int, ...], size: np.ndarray, ns: np.ndarray, model: Callable[[np.ndarray], np.ndarray], source: int
) -> tuple[Curve, np.ndarray]:
    """One residual for many shapes, smoothed over knots two octaves apart, and what is left of each point. model: ns of
    sizes."""
    ratio = np.log(ns / model(size))
    knots = 2.0 ** np.arange(np.floor(np.log2(size.min())), np.ceil(np.log2(size.max())) + 1, 2)
    basis = np.array([np.interp(np.log(size), np.log(knots), row) for row in np.eye(len(knots))]).T
    soft = np.vstack([basis, 0.1 * np.eye(len(knots))])
    height = np.linalg.lstsq(soft, np.concatenate([ratio, np.zeros(len(knots))]), rcond=None)[0]
    height = np.log(rising(model(knots) * np.exp(height)) / model(knots))
    # between knots too: the residual never falls as steeply as the model rises at the left one
    slope = np.log(model(knots * 1.0001) / model(knots)) / np.log(1.0001)
    for i, step in enumerate(np.diff(np.log(knots))):
        height[i + 1] = max(height[i + 1], height[i] - 0.9 * slope[i] * step)
    grade = np.full(len(knots), 1, np.uint8)
    return Curve(key, "", (knots,), np.round(height, 3), grade, source), np.abs(ratio - basis @ height)


def inside(wheel: Wheel, nvlink: float, latency: float) -> tuple[Fits, list[Curve], list[float]]:
    """DeepEP on one node of 8; hidden >= 4096, top 4 to 10, both ways together. nvlink: bytes a ns; latency: ns."""
    fits: Fits = {}
    curves, miss = [], []
    for kind, unit in (("normal", "transmit_us"), ("ll", "avg_t_us")):
        t = wheel.read(f"{NODE}{kind}_perf.parquet")
        t = pick(t, (t["hidden_size"] >= 4096) & (t["num_topk"] >= 4) & (t["num_topk"] <= 10))
        copies = (distinct(8, t["num_topk"]) if kind == "normal" else t["num_topk"]) * 7.0 / 8.0 * t["num_token"]
        head = HEADER if kind == "ll" else 0
        near = np.concatenate([copies * (t["hidden_size"] * FP8 + head), copies * t["hidden_size"] * BF16])
        ns = np.concatenate([t[f"{way}_{unit}"] for way in WAYS]) * 1e3
        if kind == "ll":

            def ll(p: np.ndarray, near: np.ndarray = near) -> np.ndarray:
                return np.asarray(p[0] + latency + near / (nvlink * p[1]))

            p = solve(ll, ns, [1e4, 0.5], [1e4, 0.1])
            fits["all_to_all/ll"] = {"launch_ns": p[0], "nvlink_eff": p[1]}
            at, kept = partial(ll, p), np.ones(len(ns), bool)
        else:
            sms = np.concatenate([t[f"{way}_sms"] for way in WAYS])

            def normal(p: np.ndarray, near: np.ndarray = near, sms: np.ndarray = sms) -> np.ndarray:
                return np.asarray(p[0] + latency + knee(near / (nvlink * p[1]), near / (sms * p[2])))

            p = solve(normal, ns, [3e4, 0.7, 15.0], [1e4, 0.1, 10])
            fits["all_to_all/normal"] = {"launch_ns": p[0], "nvlink_eff": p[1], "sm_per_s": p[2] * 1e9, "sms": 20.0}
            at, kept = partial(normal, p, sms=np.array(20.0)), sms == 20
        for i, way in enumerate(WAYS):  # a combine sums what it receives: a curve for each
            mine = kept & (np.arange(len(ns)) // len(copies) == i)
            found, left = shared_curve((f"{kind}/{way}", 8), near[mine], ns[mine], at, list(SOURCES).index(kind))
            curves.append(found)
            miss += left.tolist()
    return fits, curves, miss


def across(wheel: Wheel, fits: Fits, nvlink: float) -> tuple[list[Curve], list[float]]:
    """Normal kernels on 2 and 4 nodes of 8 (NICs of 50 GB/s, 10 us), added to fits; hidden 7168, top 8."""
    t = wheel.read(f"{NODES}normal_perf.parquet")
    keep = np.isin(t["node_num"], (2, 4)) & (t["dispatch_sms"] == t["combine_sms"])
    t = pick(t, keep & ~((t["node_num"] == 2) & (t["dispatch_sms"] == 12)))
    nodes, sms = t["node_num"].astype(float), t["dispatch_sms"].astype(float)
    near = t["num_token"] * distinct(8 * nodes, 8) * (1 - 1 / (8 * nodes)) * 7168
    far = t["num_token"] * distinct(nodes, 8) * (1 - 1 / nodes) * 7168
    width = {"dispatch": FP8, "combine": BF16}
    own = fits["all_to_all/normal"]

    def model(p: np.ndarray, way: str) -> np.ndarray:
        launch, forward, nic = p[2:5] if way == "dispatch" else p[5:8]
        n, f = near * width[way], far * width[way]
        copied = (n / forward + f / nic) / sms
        wire = knee(n / (nvlink * own["nvlink_eff"]), copied)
        return np.asarray(launch + p[0] * np.log2(nodes) + 1e4 + knee(wire, f / (50.0 * p[1])))

    ns = {way: t[f"{way}_transmit_us"] * 1e3 for way in WAYS}
    both = np.concatenate([ns[way] for way in WAYS])
    start = [8e3, 0.95, 1e4, 13.0, 40.0, 3e4, 10.0, 30.0]
    p = solve(
        lambda p: np.concatenate([model(p, way) for way in WAYS]), both, start, [1e3, 0.1, 1e4, 10, 10, 1e4, 10, 10]
    )
    own |= {
        "nic_step_ns": p[0],
        "nic_eff": p[1],
        "nic_launch_ns": p[2],
        "forward_per_s": p[3] * 1e9,
        "sm_nic_per_s": p[4] * 1e9,
    }
    own |= {"combine_launch_ns": p[5], "combine_forward_per_s": p[6] * 1e9}
    own |= {"combine_nic_per_s": p[7] * 1e9}
    few = t["num_token"] <= 4096  # the time for counts, where no token waits behind another
    counts = [float(np.median(t[f"{way}_notify_us"][few & (nodes == n)])) for n in (2, 4) for way in WAYS]
    two, four = np.mean(counts[:2]) * 1e3, np.mean(counts[2:]) * 1e3
    own |= {"notify_step_ns": four - two, "notify_ns": 2 * two - four}
    curves, miss = [], []
    for way in WAYS:
        ratio = np.log(ns[way] / model(p, way))
        miss += np.abs(ratio[sms >= 16]).tolist()
        for n in (2, 4):
            at = (nodes == n) & (sms == 20)
            key, source = (f"normal/nodes/{way}", 8 * n), list(SOURCES).index("normal/nodes")
            curves.append(curve(key, far[at] * width[way], ns[way][at], model(p, way)[at], source))
    return curves, miss


def across_quick(wheel: Wheel, fits: Fits) -> tuple[list[Curve], list[float]]:
    """Low-latency kernels on 2, 4 and 8 nodes (256 experts, 288 where they were measured too), added to fits."""
    t = wheel.read(f"{NODES}ll_perf.parquet")
    t = pick(t, t["node_num"] > 1)
    nodes = t["node_num"].astype(float)
    pairs = t["num_token"] * 8 * (1 - 1 / nodes)
    far = {"dispatch": pairs * (7168 * FP8 + HEADER), "combine": pairs * 7168 * BF16}
    ns = {way: t[f"{way}_avg_t_us"] * 1e3 for way in WAYS}

    def model(p: np.ndarray, way: str) -> np.ndarray:
        return np.asarray(p[0] + p[1] * np.log2(nodes) + 1e4 + far[way] / (50.0 * p[2]))

    both = np.concatenate([ns[way] for way in WAYS])
    p = solve(lambda p: np.concatenate([model(p, way) for way in WAYS]), both, [1e4, 4e3, 0.94], [1e4, 1e3, 0.1])
    fits["all_to_all/ll"] |= {"nic_launch_ns": p[0], "nic_step_ns": p[1], "nic_eff": p[2]}
    curves, miss = [], []
    for way in WAYS:
        ratio = np.log(ns[way] / model(p, way))
        miss += np.abs(ratio).tolist()
        for n in (2, 4, 8):
            at = (nodes == n) & (t["num_experts"] == 256)
            key, source = (f"ll/nodes/{way}", 8 * n), list(SOURCES).index("ll/nodes")
            curves.append(curve(key, far[way][at], ns[way][at], model(p, way)[at], source))
    return curves, miss


def pairwise(wheel: Wheel, fits: Fits, nvlink: float, latency: float, table: str) -> tuple[list[Curve], list[float]]:
    """NCCL's all-to-all on 2, 4 and 8 GPUs; message_size counts elements of `half` in the buffer of a rank."""
    t = wheel.read(table)
    t = pick(t, (t["op_name"] == "alltoall") & (t["nccl_dtype"] == "half"))
    ranks = t["num_gpus"].astype(float)
    near, ns = t["message_size"] * 2.0 * (1 - 1 / ranks), t["latency"] * 1e6

    def model(p: np.ndarray, near: np.ndarray = near, ranks: Any = ranks) -> np.ndarray:
        return np.asarray(p[0] + latency + p[1] * (ranks - 1) + near / (nvlink * p[2]))

    p = solve(model, ns, [5e3, 200.0, 0.7], [1e3, 100, 0.1])
    fits["all_to_all/pairwise"] = {"launch_ns": p[0], "peer_ns": p[1], "nvlink_eff": p[2]}
    curves, miss = [], []
    for r in sorted(set(ranks.tolist())):
        at = ranks == r
        here = partial(model, p, ranks=r)
        found, left = shared_curve(("pairwise", int(r)), near[at], ns[at], here, list(SOURCES).index("pairwise"))
        curves.append(found)
        miss += left.tolist()
    return curves, miss


def rings(wheel: Wheel, nvlink: float, latency: float, table: str) -> tuple[Fits, dict[str, list[Curve]]]:
    """NCCL's gather and scatter inside a node; sizes are one rank's part."""
    fits: Fits = {}
    curves: dict[str, list[Curve]] = {}
    whole = wheel.read(table)
    for op in ("all_gather", "reduce_scatter"):
        t = pick(whole, (whole["op_name"] == op) & (whole["nccl_dtype"] == "half"))
        ranks = t["num_gpus"].astype(float)
        part, ns = t["message_size"] * 2.0 / ranks, t["latency"] * 1e6

        def model(p: np.ndarray, part: np.ndarray = part, ranks: Any = ranks) -> np.ndarray:
            return np.asarray(p[0] + latency * np.log2(ranks) + part * (ranks - 1) / (nvlink * p[1]))

        p = solve(model, ns, [3e3, 0.7], [1e3, 0.1])
        fits[op] = {"launch_ns": p[0], "nvlink_eff": min(p[1], 1.0)}
        curves[op] = []
        for r in sorted(set(ranks.tolist())):
            at = ranks == r
            found, _ = shared_curve((int(r),), part[at], ns[at], partial(model, p, ranks=r), 0)
            curves[op].append(found)
    return fits, curves


def sigma(absolute: list[float]) -> float:
    """1 sigma of log from the 90 % quantile of |log error| (a normal law's is 1.645 sigma)."""
    return round(float(np.quantile(absolute, 0.9)) / 1.645, 3)


def measured(path: str) -> None:
    """Rewrite the H100's part."""
    wheel, file = Wheel(path, "h100_sxm"), OUT / "h100_sxm.yaml"
    fits, curves, miss = inside(wheel, 450.0, 1500.0)
    errors = {"inside": miss}
    for name, (more, left) in {
        "across": across(wheel, fits, 450.0),
        "low latency": across_quick(wheel, fits),
        "pairwise": pairwise(wheel, fits, 450.0, 1500.0, "comm/nccl/2.29.2/nccl_perf.parquet"),
    }.items():
        curves += more
        errors[name] = left
    print({name: (len(e), sigma(e)) for name, e in errors.items()})
    spec: dict[str, Any] = yaml.safe_load(file.read_text())
    spec["fits"] = {k: v for k, v in spec["fits"].items() if not k.startswith("all_to_all")} | fits
    # the worst of the data sets that `auto` takes; NCCL's, whose small messages scatter, is said beside it
    spec["errors"]["all_to_all"] = max(sigma(e) for name, e in errors.items() if name != "pairwise")
    name = "h100_sxm.exchange.json"
    first = len(spec["provenance"]["curve_sources"]) - sum(
        s in SOURCES.values() for s in spec["provenance"]["curve_sources"][11:]
    )
    spec["provenance"]["curve_sources"] = spec["provenance"]["curve_sources"][:first] + list(SOURCES.values())
    spec["provenance"].pop("all_to_all across nodes", None)
    spec["provenance"]["all_to_all"] = f"{PROVENANCE}; error of NCCL's alone {sigma(errors['pairwise'])}"
    spec["curves"] = [c for c in spec["curves"] if c != name] + [name]
    placed = [Curve(c.key, c.variant, c.axes, c.log_ratio, c.grade, c.source + first) for c in curves]
    print(name, write_curves(OUT / name, {"all_to_all": placed}), "bytes")
    head = "Written by benchmarks/profiles/fit_h100.py and fit_exchange.py; figures derived, tables not copied."
    write_whole(file, profile_yaml(spec, head))
    for kind, values in sorted(fits.items()):
        print(kind, {k: float(f"{v:.5g}") for k, v in values.items()})


DATASHEETS = {"b200_sxm": "2.29.2", "h200_sxm": "2.29.2", "a100_sxm_80gb": "2.27.3"}
"""profile -> NCCL's version"""
MARK = "fits:  # links alone, by benchmarks/profiles/fit_exchange.py; from tables of this device, one node of 8\n"


def datasheet(path: str, name: str) -> None:
    """Rewrite the links of a datasheet profile, on one node; assumed, as the profile says of all it gives."""
    wheel, file = Wheel(path, name.removesuffix("_80gb")), OUT / f"{name}.yaml"
    text = file.read_text()
    node = yaml.safe_load(text)["node"]
    nvlink, latency = float(node["nvlink_gb_per_s"]), node["nvlink_latency_us"] * 1e3
    nccl = f"comm/nccl/{DATASHEETS[name]}/nccl_perf.parquet"
    fits, curves = rings(wheel, nvlink, latency, nccl)
    curves["all_to_all"] = pairwise(wheel, fits, nvlink, latency, nccl)[0]
    if not name.startswith("a100"):  # DeepEP needs Hopper
        own, found, _ = inside(wheel, nvlink, latency)
        fits |= own
        curves["all_to_all"] += found
    assumed = {
        op: [Curve(c.key, "", c.axes, c.log_ratio, np.full(len(c.log_ratio), ASSUMED), 0) for c in found]
        for op, found in curves.items()
    }
    write_curves(OUT / f"{name}.links.json", assumed)
    lines = []
    for op, values in sorted(fits.items()):
        lines.append(f"  {op}:\n")
        lines += [f"    {key}: {float(f'{value:.5g}')}\n" for key, value in values.items()]
    lines.append(f"curves: [{name}.links.json]\n")
    head, _, tail = text.partition("fits:")
    if tail:  # what follows the curves stays
        tail = tail[tail.index("\n", tail.index("curves:")) + 1 :]
    else:
        head, _, tail = text.partition("provenance:")
        tail = "provenance:" + tail
    write_whole(file, head + MARK + "".join(lines) + tail)
    print(name, {op: {k: float(f"{v:.4g}") for k, v in values.items()} for op, values in sorted(fits.items())})


PROVENANCE = (
    "python benchmarks/profiles/fit_exchange.py: DeepEP normal kernels on 1, 2, 4 nodes, low-latency kernels on 1, 2, "
    "4, 8, NCCL on one; across nodes NCCL, 2DH and DeepEP V2 are assumed"
)

if __name__ == "__main__":
    measured(sys.argv[1])
    for sheet in DATASHEETS:
        datasheet(sys.argv[1], sheet)
