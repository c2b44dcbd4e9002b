"""A log that came from a GPU machine is fitted here: rates and links of that machine, what it lacks by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moesim_kernels.bench.floors import floors
from moesim_kernels.bench.plan import Case, Plan, load_plan, save_plan
from moesim_kernels.calibrate.deployment import from_model
from moesim_kernels.calibrate.fitted import calibrate_log
from moesim_kernels.calibrate.plan import make_plan
from moesim_kernels.calibrate.write import write_profile

from moesim.scenario.load import load_profile

ROOT = Path(__file__).parents[2]
FACTS = {
    "device": "NVIDIA H200", "cpu": "Xeon", "cpus": 64, "threads": 1, "driver": "570.1", "cuda": "12.8", "cudnn": 90800,
    "torch": "2.9.0", "triton": "3.5.0", "numpy": "2.2.0", "python": "3.12.3", "kernel": "00ff", "psi": 1.0, "gpus": 1,
    "date": "2026-01-01T00:00:00+00:00", "memory_bytes": 140 << 30, "host_memory_bytes": 1 << 40, "sms": 132,
}  # fmt: skip
RATES = {"copy": 55.0, "storage": 6.0, "read_bandwidth": 4300.0, "copy_bandwidth": 4100.0}


def time_ns(case: Case) -> float:
    """A time that an H200 could take: launch, bytes and FLOP at sustained rates."""
    if case.op in RATES:
        return 2e3 + float(case.size["bytes"]) / RATES[case.op]
    if case.op == "launch":
        return 2e3 if case.shape.get("graph") else 5e3
    moved, flop = floors(case)
    peak = 50e3 if case.dtype == "fp32" else 750e3
    return 8e3 * (case.op != "peak_gemm") + max(moved / 4000.0, flop / peak)


@pytest.fixture(scope="module")
def plan() -> Plan:
    limits = ["engine.max_num_batched_tokens=2048", "engine.max_num_seqs=64", "engine.max_model_len=8192"]
    return make_plan([from_model("mixtral-8x7b", {"tp": 4}, limits)], "cuda", training=True)


def write_log(plan: Plan, path: Path, facts: dict[str, Any], skip: tuple[str, ...] = ()) -> None:
    """A log of the plan with a little noise, five samples a case."""
    rng = np.random.default_rng(1)
    lines: list[dict[str, Any]] = [{"schema": 1, "plan": plan.plan_id, "machine": facts}]
    for case in plan.cases:
        if case.op not in skip:
            ns = (time_ns(case) * np.exp(rng.normal(0, 0.01, 5))).tolist()
            row = {"id": case.id, "round": 0, "ns": ns, "wall_ns": ns, "psi": 1.0, "reference_ns": 1e5}
            lines.append(row)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_log_from_a_gpu_becomes_a_profile_of_that_gpu(plan: Plan, tmp_path: Path) -> None:
    write_log(plan, tmp_path / "l.jsonl", FACTS, skip=("all_reduce", "all_gather", "reduce_scatter", "token_exchange"))
    made = calibrate_log(plan, tmp_path / "l.jsonl", "gpu", "by hand")
    write_profile(tmp_path / "gpu.yaml", made.spec, made.curves)
    profile = load_profile(tmp_path / "gpu.yaml")
    assert profile.device == "NVIDIA H200"
    assert profile.hbm_bytes_per_s == pytest.approx(4300e9, rel=0.05)
    assert profile.flop_rate("bf16") == pytest.approx(750e12, rel=0.05)
    assert profile.node.pcie_bytes_per_s == pytest.approx(55e9, rel=0.05)
    assert profile.graph_launch_ns == pytest.approx(2e3, rel=0.05)
    assert profile.eager_launch_ns == pytest.approx(5e3, rel=0.05)
    assumed = profile.provenance["assumed"]
    assert assumed["node.nvlink_gb_per_s"] == "of h200_sxm"
    assert (
        profile.node.nvlink_bytes_per_s == load_profile(ROOT / "hw_profiles" / "h200_sxm.yaml").node.nvlink_bytes_per_s
    )
    assert profile.provenance["versions"]["cuda"] == "12.8"
    assert {"moe_dgrad", "moe_wgrad", "attention_backward", "router_backward"} <= set(profile.curves)
    assert not made.refused
    for row in made.judged:
        # the times follow bytes and FLOP with 1 % noise, so that whatever is off is the fit
        # (most batches of 8 experts read them all and take one time, so that ranks say little)
        assert row.median < 0.08, row
        assert row.p90 < 0.25, row


def test_links_are_measured_where_ranks_are_and_cases_that_could_not_run_are_told(plan: Plan, tmp_path: Path) -> None:
    rings = [c for c in plan.cases if c.op in ("all_reduce", "all_gather", "reduce_scatter")]
    assert {int(c.shape["ranks"]) for c in rings} == {4}
    write_log(
        plan, tmp_path / "l.jsonl", {**FACTS, "device": "Some GPU", "gpus": 8}, skip=("storage", "token_exchange")
    )
    storage = next(c for c in plan.cases if c.op == "storage")
    with (tmp_path / "l.jsonl").open("a") as file:
        file.write(json.dumps({"id": storage.id, "refused": "OSError: no direct reads here"}) + "\n")
        file.write(json.dumps({"id": rings[0].id, "refused": "in an earlier run"}) + "\n")
    made = calibrate_log(plan, tmp_path / "l.jsonl", "gpu", "by hand")
    said = made.spec["provenance"]
    assert "node.nvlink_gb_per_s" not in said["assumed"]
    assert said["assumed"]["node.nvme_gb_per_s"] == "a common value"
    assert said["points"]["could_not_run"] == 1
    assert "OSError: no direct reads here" in said["could_not_run"].values()
    counts = said["points"]
    assert counts["measured"] + counts["could_not_run"] + counts["not_reached"] == counts["planned"]


def test_a_plan_that_was_saved_gives_the_same_bytes_as_the_one_just_made(plan: Plan, tmp_path: Path) -> None:
    write_log(plan, tmp_path / "l.jsonl", FACTS)
    save_plan(plan, tmp_path / "p.json")
    for folder, given in (("made", plan), ("read", load_plan(tmp_path / "p.json"))):
        (tmp_path / folder).mkdir()
        found = calibrate_log(given, tmp_path / "l.jsonl", "gpu", "by hand")
        write_profile(tmp_path / folder / "gpu.yaml", found.spec, found.curves)
    assert (tmp_path / "made" / "gpu.yaml").read_bytes() == (tmp_path / "read" / "gpu.yaml").read_bytes()
