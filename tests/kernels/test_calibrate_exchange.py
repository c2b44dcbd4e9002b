"""The exchange of tokens between ranks: planned as the deployment has it, fitted, and priced from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moesim_kernels.bench.floors import floors
from moesim_kernels.bench.plan import Case, Plan
from moesim_kernels.calibrate.deployment import from_scenario
from moesim_kernels.calibrate.fitted import Calibrated, calibrate_log
from moesim_kernels.calibrate.plan import make_plan
from moesim_kernels.calibrate.points import curve_key, sort_points
from moesim_kernels.calibrate.write import write_profile
from moesim_kernels.ops.routing import exchange_splits
from moesim_kernels.real.work import Setting, prepare_real, price

from moesim.cost.exchange import Ports
from moesim.scenario.load import load_profile, load_scenario

FILE = Path("workloads/validate_cpu.yaml")
EP2 = ("cluster.gpus_per_node=2", "parallel.dp=2", "parallel.ep=2", "communication.all_to_all=pairwise")
ROW = 768 * 4
FACTS = {
    "device": "cpu", "cpu": "Some CPU", "cpus": 2, "threads": 1, "torch": "2.9.0", "numpy": "2.2.0", "python": "3.12.3",
    "kernel": "00ff", "date": "2026-01-01T00:00:00+00:00", "host_memory_bytes": 16 << 30,
}  # fmt: skip
LAUNCH, COUNTS, RATE = 400e3, 700e3, 0.7  # ns, ns, bytes a ns


def plan_of(*overrides: str) -> Plan:
    return make_plan([from_scenario(FILE, [*EP2, *overrides])], "cpu")


def exchanges(plan: Plan, role: str = "grid") -> list[Case]:
    return [c for c in plan.cases if c.op == "token_exchange" and c.role == role]


def sent_bytes(case: Case) -> float:
    ranks = int(case.shape["ranks"])
    rows = exchange_splits(int(case.size["bytes"]) // ROW, ranks, str(case.size["spread"]), case.seed)
    return float(ROW * (np.sum(rows) - np.trace(np.array(rows))))


def time_ns(case: Case, shared: float) -> float:
    """What one machine takes: exchanges by their law, all else by bytes and FLOP."""
    if case.op == "token_exchange":
        ranks, near = int(case.shape["ranks"]), float(case.size["bytes"])
        moved = (1 - shared) * near + shared * sent_bytes(case) / ranks
        return LAUNCH + COUNTS * (case.shape["way"] == "dispatch") + moved / RATE
    if case.op in ("all_reduce", "all_gather", "reduce_scatter"):
        return 500e3 + float(case.size["bytes"]) / RATE
    if case.op in ("copy", "storage"):
        return 1e4 + float(case.size["bytes"]) / 2.0
    if case.op == "launch":
        return 5e3
    moved, flop = floors(case)
    return 1e4 * (case.role != "ceiling") + max(moved / 15.0, flop / 70.0)


def calibrated(plan: Plan, log: Path, shared: float, noise: float = 0.01) -> Calibrated:
    rng = np.random.default_rng(1)
    lines: list[dict[str, Any]] = [{"schema": 1, "plan": plan.plan_id, "machine": FACTS}]
    for case in plan.cases:
        ns = (time_ns(case, shared) * np.exp(rng.normal(0, noise, 5))).tolist()
        lines.append({"id": case.id, "round": 0, "ns": ns, "wall_ns": ns, "psi": 1.0, "reference_ns": 1e5})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return calibrate_log(plan, log, "made", "by hand")


def test_a_plan_holds_the_exchange_of_the_deployment_at_its_own_sizes() -> None:
    plan = plan_of()
    for way in ("dispatch", "combine"):
        found = [c for c in exchanges(plan) if c.shape["way"] == way]
        assert {(c.shape["ranks"], c.shape["hidden"], c.shape["slots"], c.shape["top_k"], c.dtype) for c in found} == {
            (2, 768, 16, 4, "fp32")
        }
        sizes = [int(c.size["bytes"]) for c in found]
        assert min(sizes) == ROW  # one row
        assert max(sizes) == 128 * 4 * ROW  # all choices of a rank's 128 tokens sit on the other rank
        assert len([c for c in exchanges(plan, "heldout") if c.shape["way"] == way]) >= 9
    grid = {c.id for c in exchanges(plan)}
    assert not grid & {c.id for c in exchanges(plan, "heldout")}
    rings = {c.op for c in plan.cases if c.role == "heldout"}
    assert rings >= {"all_reduce", "all_gather", "reduce_scatter"}


def test_ranks_that_are_measured_are_those_of_the_deployment() -> None:
    three = ["cluster.gpus_per_node=3", "parallel.dp=3", "parallel.ep=3", "policies.placement={kind: contiguous}"]
    many = ["cluster.gpus_per_node=16", "parallel.dp=16", "parallel.ep=16"]
    for more, ranks in (([], {2}), (many, {2})):
        assert {int(c.shape["ranks"]) for c in exchanges(plan_of(*more))} == ranks
    cases = exchanges(plan_of(*three, "model.num_experts=33"))
    assert {int(c.shape["ranks"]) for c in cases} == {3}
    # equal ranks: every port carries the bytes that the case names
    for case in cases:
        even = case.size["spread"] == "even"
        assert (sent_bytes(case) == 3 * int(case.size["bytes"])) or not even
    alone = make_plan([from_scenario(FILE, [])], "cpu")
    assert {int(c.shape["ranks"]) for c in exchanges(alone)} == {2}
    assert not exchanges(make_plan([from_scenario(FILE, ["cluster.device=h100_sxm"])], "cuda"))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_busiest_port_has_exactly_the_rows_asked_for(ranks: int) -> None:
    for rows in (0, 1, 2, 5, 100, 1001):
        for kind in ("even", "one", "drawn"):
            for seed in range(5):
                sent = np.array(exchange_splits(rows, ranks, kind, seed))
                kept = np.diag(sent)
                other = sent - np.diag(kept)
                assert max(other.sum(axis=0).max(), other.sum(axis=1).max()) == rows
                np.testing.assert_allclose(kept, other.sum(axis=1) / (ranks - 1), atol=0.5)
    with pytest.raises(ValueError, match="even, one or drawn"):
        exchange_splits(1, 2, "few:1", 0)


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_a_known_law_is_found_again_and_prices_the_deployment_interpolated(shared: float, tmp_path: Path) -> None:
    plan = plan_of()
    made = calibrated(plan, tmp_path / "l.jsonl", shared)
    fit, node = made.spec["fits"]["all_to_all/pairwise"], made.spec["node"]
    assert fit["launch_ns"] + node["nvlink_latency_us"] * 1e3 == pytest.approx(LAUNCH, rel=0.05)
    assert fit["counts_ns"] == pytest.approx(COUNTS, rel=0.05)
    assert fit["nvlink_eff"] * node["nvlink_gb_per_s"] == pytest.approx(RATE, rel=0.05)
    assert fit["shared"] == pytest.approx(shared, abs=0.05)
    assert fit["peer_ns"] == 0.0
    for op in ("all_to_all", "all_reduce", "all_gather", "reduce_scatter"):
        assert made.spec["errors"][op] < 0.05
        assert made.spec["intervals"][op]["interpolated"]["method"] == "split-conformal"
    keys = {c.key for c in made.curves["all_to_all"]}
    assert keys == {("pairwise/dispatch", 2), ("pairwise/combine", 2)}
    write_profile(tmp_path / "made.yaml", made.spec, made.curves)
    assert load_profile(tmp_path / "made.yaml").kind == "measured"
    prepared = prepare_real(load_scenario(FILE, [*EP2, f"cluster.device={tmp_path / 'made.yaml'}"]))
    setting = Setting("s", (), tuple((i, 20 + i, i % 2) for i in range(8)), ((9, 0, 30, 1, 1),))
    found = price(prepared, setting)
    assert found.operator["dispatch"] == found.operator["combine"] == "all_to_all"
    exchange = prepared.result.pricers[0].moe._prices.exchange  # type: ignore[attr-defined]
    nothing = exchange.price((1, 1), 1, Ports(*np.zeros((4, 1, 1))))
    assert int(nothing.dispatch_ns[0, 0]) == pytest.approx(LAUNCH + COUNTS, rel=0.1)  # ranks tell each other so
    assert found.operation_ns["dispatch"] - found.operation_ns["combine"] == pytest.approx(6 * COUNTS, rel=0.1)
    assert found.grade[3] == 0.0  # nothing is assumed
    few = price(prepared, Setting("one token", (), ((3, 7, 0),)))
    for priced in (found, few):
        for part in ("dispatch", "experts", "combine"):
            assert sum(priced.operation_grade[part][:2]) == pytest.approx(1.0), part


def test_what_gloo_cannot_resolve_is_in_the_interval(tmp_path: Path) -> None:
    quiet, noisy = (calibrated(plan_of(), tmp_path / f"{n}.jsonl", 1.0, n) for n in (0.01, 0.5))
    width = [m.spec["intervals"]["all_to_all"]["interpolated"]["half_width"] for m in (quiet, noisy)]
    assert width[1] > 5 * width[0]


def test_points_carry_their_way_and_what_all_ranks_sent() -> None:
    from moesim_kernels.bench.log import Point
    from moesim_kernels.calibrate.points import Ceilings

    cases = exchanges(plan_of())
    found = sort_points([Point(c, 1e6, 1e6, 1e6, 5, 1e6, 1.0) for c in cases], Ceilings(10.0, {"fp32": 50.0}))
    (s,) = found.grid
    assert (s.op, s.variant) == ("all_to_all", "pairwise")
    assert s.key == [curve_key(c) for c in cases]
    np.testing.assert_array_equal(s.extra["total"], [sent_bytes(c) for c in cases])
    np.testing.assert_array_equal(s.extra["ranks"], 2.0)
