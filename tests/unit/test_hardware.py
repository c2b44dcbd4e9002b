"""Profiles and clusters: what ships loads, what is wrong is refused with its place, and speed scales everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.hardware import ASSUMED, GRADES, INTERPOLATED, MEASURED, Cluster, DeviceProfile
from moesim.scenario.yamlio import load_yaml

ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "hw_profiles").glob("*.yaml"))
FACTS = ROOT.parent / "shared" / "data" / "accelerators.yaml"
NAMES = {
    "h100_sxm": "h100-sxm",
    "h100_sxm_datasheet": "h100-sxm",
    "h200_sxm": "h200-sxm",
    "a100_sxm_80gb": "a100-sxm-80gb",
    "b200_sxm": "b200-sxm",
    "rtx_4090": "rtx-4090",
    "rtx_pro_6000": "rtx-pro-6000",
    "rtx_pro_6000_datasheet": "rtx-pro-6000",
    "l40s": "l40s",
    "mi300x": "mi300x",
}


def load(path: Path) -> DeviceProfile:
    data, _ = load_yaml(path)
    return DeviceProfile.from_spec(data, path.parent, str(path))


def good() -> dict[str, Any]:
    node = {
        "gpus_per_node": 8,
        "nvlink_gb_per_s": 450,
        "nvlink_latency_us": 2,
        "nic_gb_per_s": 50,
        "nic_latency_us": 10,
        "pcie_gb_per_s": 64,
        "host_memory_gib": 2048,
        "host_gb_per_s": 600,
        "nvme_gb_per_s": 25,
        "nvme_gib": 27000,
        "cpu_cores": 112,
    }
    return {
        "name": "toy",
        "kind": "assumed",
        "device": "a toy",
        "vendor": "nobody",
        "memory_gib": 80,
        "hbm_gb_per_s": 3350,
        "flop_per_s": {"bf16": "989 TFLOP/s", "fp8": 1.978e15},
        "num_sms": 132,
        "graph_launch_us": 2.5,
        "eager_launch_us": 8,
        "node": node,
    }


def test_every_issue_profile_ships() -> None:
    assert {p.stem for p in PROFILES} >= set(NAMES) | {"cpu_2core"}


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_profile_loads_and_names_its_sources(path: Path) -> None:
    p = load(path)
    assert p.name == path.stem
    # a datasheet's links may follow a table, but say that they are assumed like all the rest
    curves = [c for found in p.curves.values() for c in found]
    assert (p.kind == "measured") == any(c.grade is None or (c.grade < ASSUMED).any() for c in curves)
    sources = p.provenance["sources"]
    assert any("hbm" in key for key in sources)
    assert any("flop" in key for key in sources)
    assert p.provenance["date"]
    if p.kind == "measured":
        last = len(p.provenance["curve_sources"])
        assert all(0 <= c.source < last for curves in p.curves.values() for c in curves)
        assert {"gemm", "moe", "attention_prefill", "attention_decode"} <= set(p.curves) & set(p.errors)
        assert {f"{op}/{c.variant}" for op in ("gemm", "moe") for c in p.curves[op]} <= set(p.fits)


@pytest.mark.skipif(not FACTS.is_file(), reason="../shared/data/accelerators.yaml is not here")
@pytest.mark.parametrize("name", sorted(NAMES))
def test_datasheet_figures_are_the_published_ones(name: str) -> None:
    facts = load_yaml(FACTS)[0]["accelerators"][NAMES[name]]
    p = load(ROOT / "hw_profiles" / f"{name}.yaml")
    assert p.hbm_bytes_per_s == pytest.approx(facts["hbm_bandwidth_gb_s"]["value"] * 1e9, rel=1e-9)
    assert p.memory_bytes == pytest.approx(facts["hbm_capacity_bytes"]["value"], rel=1e-6)
    assert p.flop_per_s["bf16"] == pytest.approx(facts["peak_dense_bf16_tflops"]["value"] * 1e12, rel=1e-9)
    assert p.node.nvlink_bytes_per_s == facts["intra_node_bw_gb_s_per_gpu_one_direction"]["value"] * 1e9


def test_curve_files_stay_small() -> None:
    measured = (".log.jsonl", ".plan.json")  # what a calibration leaves beside its profile, never committed
    sizes = [p.stat().st_size for p in (ROOT / "hw_profiles").iterdir() if not p.name.endswith(measured)]
    assert max(sizes) < 300_000
    assert sum(sizes) < 800_000


INTERVAL = {"level": 0.9, "half_width": 0.1, "n": 20, "method": "split-conformal"}


def test_intervals_are_found_by_operator_and_grade() -> None:
    p = DeviceProfile.from_spec(good() | {"intervals": {"moe": {"interpolated": INTERVAL}}}, ROOT)
    found = p.interval("moe", INTERPOLATED)
    assert found is not None
    assert (found.level, found.half_width, found.n, found.method) == (0.9, 0.1, 20, "split-conformal")
    assert p.interval("moe", MEASURED) is None
    assert p.interval("gemm", INTERPOLATED) is None


def test_row_work_is_read() -> None:
    p = DeviceProfile.from_spec(good() | {"moe_row_work": {"bf16": {"rows": [1, 4], "work": [3, 6]}}}, ROOT)
    assert p.moe_row_work["bf16"].at([0, 1, 2, 8]).tolist() == [0, 3, 4, 10]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("memory_gib", 0, "memory_gib"),
        ("memory_gib", float("nan"), "memory_gib"),
        ("hbm_gb_per_s", -1, "hbm_gb_per_s"),
        ("hbm_gb_per_s", "3350 GiB", "bandwidth"),
        ("hbm_gb_per_s", 1e300, "hbm_gb_per_s"),
        ("flop_per_s", {}, "flop_per_s"),
        ("flop_per_s", {"bf17": 1e12}, "bf17"),
        ("flop_per_s", {"bf16": float("inf")}, "flop_per_s"),
        ("num_sms", 1.5, "num_sms"),
        ("num_sms", 0, "num_sms"),
        ("kind", "guessed", "kind"),
        ("moe_block_rows", 0, "moe_block_rows"),
        ("fits", {"gem": {"mem_eff": 0.8}}, "gemm"),
        ("fits", {"gemm": {"mem_eff": -0.1}}, "mem_eff"),
        ("errors", {"attention_prefil": 0.1}, "attention_prefill"),
        ("errors", {"gemm": -1}, "errors.gemm"),
        ("kind", "measured", "curves"),
        ("moe_row_work", {"bf16": {"rows": [1, 2], "work": [1]}}, "as many"),
        ("moe_row_work", {"bf16": {"rows": [2, 1], "work": [1, 2]}}, "rows must increase"),
        ("moe_row_work", {"bf16": {"rows": [1, 2], "work": [2, 1]}}, "must not fall"),
        ("moe_row_work", {"bf16": {"rows": [0, 2], "work": [1, 2]}}, "moe_row_work.bf16.rows"),
        ("moe_row_work", {"bf16": {"rows": [], "work": []}}, "moe_row_work.bf16.rows"),
        ("moe_row_work", {"bf17": {"rows": [1], "work": [1]}}, "bf17"),
        ("intervals", {"mo": {"measured": INTERVAL}}, "moe"),
        ("intervals", {"moe": {"sure": INTERVAL}}, "sure"),
        ("intervals", {"moe": {"measured": INTERVAL | {"level": 1.0}}}, "level"),
        ("intervals", {"moe": {"measured": INTERVAL | {"half_width": float("nan")}}}, "half_width"),
        ("intervals", {"moe": {"measured": INTERVAL | {"method": "hoped"}}}, "method"),
        ("curves", ["../../etc/passwd"], "beside the profile"),
        ("curves", ["nowhere.json"], "cannot read"),
        ("nodes", 4, "nodes"),
    ],
)
def test_bad_profile_values_are_refused(place: str, value: Any, said: str) -> None:
    spec = good() | {place: value}
    with pytest.raises(BadInput) as caught:
        DeviceProfile.from_spec(spec, ROOT, "toy.yaml")
    assert said in str(caught.value)
    assert "toy.yaml" in str(caught.value) or "nowhere.json" in str(caught.value)


def test_all_problems_at_once() -> None:
    spec = good() | {"memory_gib": -1, "num_sms": 0}
    with pytest.raises(BadInput) as caught:
        DeviceProfile.from_spec(spec, ROOT, "toy.yaml")
    assert len(caught.value.problems) == 2


CURVE = {"key": [1, 2, "bf16"], "variant": "bf16", "axes": [0], "log_ratio": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("axes", "change", "said"),
    [
        ([[1, 2]], {"log_ratio": [0.1]}, "shape"),
        ([[2, 1]], {}, "increase"),
        ([[0, 1]], {}, "positive"),
        ([[]], {}, "positive"),
        ([["a", "b"]], {}, "axes"),
        ([[1, 2]], {"log_ratio": [0.1, float("nan")]}, "finite"),
        ([[1, 2]], {"log_ratio": [0.1, 99]}, "within"),
        ([[1, 2]], {"key": []}, "key"),
        ([[1, 2]], {"key": [1.5]}, "key"),
        ([[1, 2]], {"axes": [3]}, "not a curve"),
        ([[1, 2]], {"axes": [-1]}, "axes"),
        ([[1, 2]], {"grade": [0, 9]}, "grade"),
        ([[1, 2]], {"grade": [0]}, "grade"),
        ([[1, 2]], {"log_ratio": "ab"}, "not a curve"),
    ],
)
def test_bad_curves_are_refused(tmp_path: Path, axes: Any, change: Any, said: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"axes": axes, "curves": {"gemm": [CURVE | change]}}))
    with pytest.raises(BadInput) as caught:
        DeviceProfile.from_spec(good() | {"curves": ["c.json"]}, tmp_path, "toy.yaml")
    assert said in str(caught.value)
    assert "c.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"axes": []}', "[" * 100_000, '{"axes": [], "curves": {"gem": []}}'])
def test_files_that_hold_no_curves_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(BadInput):
        DeviceProfile.from_spec(good() | {"curves": ["c.json"]}, tmp_path, "toy.yaml")


def test_a_good_curve_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"axes": [[1, 2]], "curves": {"gemm": [CURVE | {"grade": 2}]}}))
    p = DeviceProfile.from_spec(good() | {"curves": ["c.json"]}, tmp_path)
    (curve,) = p.curves["gemm"]
    assert curve.key == (1, 2, "bf16")
    assert curve.log_ratio.tolist() == [0.1, 0.2]
    assert curve.grade is not None
    assert curve.grade.tolist() == [2, 2]


def test_flop_rate_falls_back_to_what_multiplies() -> None:
    p = DeviceProfile.from_spec(good(), ROOT)
    assert p.flop_rate("fp8_block") == 1.978e15
    assert p.flop_rate("int4") == p.flop_rate("mxfp4") == p.flop_rate("fp16") == 989e12
    with pytest.raises(BadInput, match="fp5"):
        p.flop_rate("fp5")


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_scaled_doubles_rates_and_halves_latencies(path: Path) -> None:
    a = load(path)
    b = a.scaled(2.0)
    assert b.hbm_bytes_per_s == 2 * a.hbm_bytes_per_s
    assert b.graph_launch_ns == a.graph_launch_ns / 2
    assert b.node.nic_bytes_per_s == 2 * a.node.nic_bytes_per_s
    assert b.node.nvlink_latency_ns == a.node.nvlink_latency_ns / 2
    assert b.memory_bytes == a.memory_bytes
    assert b.node.host_memory_bytes == a.node.host_memory_bytes
    for op, values in a.fits.items():
        for name, value in values.items():
            times = {"_ns": 0.5, "_per_s": 2.0}
            assert b.fits[op][name] == value * next((t for end, t in times.items() if name.endswith(end)), 1.0)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_scaled_refuses_what_is_no_speed(speed: float) -> None:
    with pytest.raises(BadInput):
        DeviceProfile.from_spec(good(), ROOT).scaled(speed)


def cluster(**more: Any) -> Cluster:
    return Cluster.from_spec({"device": "toy", "nodes": 4} | more, DeviceProfile.from_spec(good(), ROOT))


def test_cluster_places_ranks() -> None:
    c = cluster()
    assert c.num_ranks == 32
    assert c.node_of_rank(np.arange(32)).tolist() == [r // 8 for r in range(32)]
    assert c.rail_of_rank([0, 7, 8, 31]).tolist() == [0, 7, 0, 7]
    assert [c.nodes_of_group(r) for r in (1, 8, 9, 32)] == [1, 1, 2, 4]
    assert c.nodes_of_group(4, stride=8) == 4
    with pytest.raises(ValueError, match="ranks must lie"):
        c.node_of_rank([32])


def test_cluster_resolves_links() -> None:
    c = cluster(nic_gb_per_s=100, nics_per_gpu=2, oversubscription=4, nvlink_latency_us=5, gpus_per_node=4)
    assert c.node.nic_bytes_per_s == 100e9 * 2 / 4
    assert c.spine_bytes_per_s == c.node.nic_bytes_per_s
    assert c.node.nvlink_latency_ns == 5000
    assert c.node.nvlink_bytes_per_s == 450e9
    assert c.gpus_per_node == c.node.gpus_per_node == 4
    assert cluster(host_memory_gib=1).node.host_memory_bytes == 2**30


def test_rails_keep_the_rate_of_a_rail() -> None:
    c = cluster(oversubscription=4, rails=True)
    assert c.node.nic_bytes_per_s == 50e9
    assert c.spine_bytes_per_s == 12.5e9
    assert c.scaled(2).spine_bytes_per_s == 25e9


@pytest.mark.parametrize(
    "wrong",
    [
        {"nodes": 0},
        {"nodes": 10**9},
        {"gpus_per_node": 0},
        {"oversubscription": 0.5},
        {"nic_gb_per_s": -1},
        {"nic_gb_per_s": 0},
        {"nics_per_gpu": 0},
        {"rails": "yes"},
        {"nvlink_gbps": 1},
        {"device": ""},
    ],
)
def test_bad_clusters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        cluster(**wrong)


def test_grades_run_from_firm_to_weak() -> None:
    assert GRADES == ("measured", "interpolated", "extrapolated", "assumed")
