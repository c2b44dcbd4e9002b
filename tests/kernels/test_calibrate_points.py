"""Measured points become samples of the right shape, and points that no machine can have measured are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moesim_kernels.bench.floors import case_counts, floors
from moesim_kernels.bench.log import Point
from moesim_kernels.bench.plan import Case
from moesim_kernels.calibrate.points import READ_MARGIN, Ceilings, ceilings, floor_ns, least_work, sort_points

MOE = {"hidden": 64, "intermediate": 32, "slots": 8, "top_k": 2}
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 16, "v_head_dim": 16, "window": 0}
MLA = {"kind": "mla", "heads": 4, "kv_dim": 24, "rope_dim": 8, "nope_dim": 16, "v_head_dim": 16}
TOP = Ceilings(10.0, {"fp32": 50.0})


def point(op: str, shape: dict[str, Any], size: dict[str, Any], ns: float, role: str = "grid", seed: int = 0) -> Point:
    return Point(Case(op, shape, size, "fp32", "torch", role, seed), ns, ns, ns, 5, ns, 1.0)


def rows(tokens: int, kind: str = "uniform") -> dict[str, Any]:
    return {"tokens": tokens, "rows": 2 * tokens, "histogram": kind}


def test_ceilings_are_the_quick_quarter_of_the_machines_own_points() -> None:
    read = point("read_bandwidth", {}, {"bytes": 1000}, 100.0, "ceiling")
    product = point("peak_gemm", {}, {"n": 10}, 40.0, "ceiling")
    top = ceilings([read, product, point("gemm", {"n": 8, "k": 8}, {"m": 1}, 1e3)])
    assert top.read == 10.0
    assert top.flop == {"fp32": 50.0}
    with pytest.raises(ValueError, match="read_bandwidth"):
        ceilings([product])


@pytest.mark.parametrize(
    ("op", "shape", "size", "moved"),
    [
        ("gemm", {"n": 100, "k": 30}, {"m": 2}, 100 * 30 * 4),
        ("moe", MOE, rows(4, "few:2"), 2 * 3 * 64 * 32 * 4),
        ("moe_wgrad", MOE, rows(4, "few:2"), 2 * 3 * 64 * 32 * 4),
        ("attention_decode", GQA, {"batch": 3, "context": 5}, 3 * 5 * 2 * 32 * 4),
        ("attention_decode", MLA, {"batch": 3, "context": 5}, 3 * 5 * 24 * 4),
        ("elementwise", {}, {"bytes": 4096}, 0),
    ],
)
def test_the_least_time_is_that_of_reading_what_caches_cannot_hold(
    op: str, shape: dict[str, Any], size: dict[str, Any], moved: float
) -> None:
    case = point(op, shape, size, 1.0).case
    assert least_work(case)[0] == pytest.approx(moved)
    least, why = floor_ns(case, Ceilings(10.0, {"fp32": 1e12}))
    assert least == pytest.approx(READ_MARGIN * moved / 10.0)
    assert ("the measured 10.0 GB/s" in why) == (moved > 0)
    assert least_work(case)[0] <= floors(case)[0]


def test_a_planted_impossible_point_is_refused_with_its_reason_and_no_other_is() -> None:
    real = [point("moe", MOE, rows(t), 5e6 + t) for t in (1, 4, 16)]
    planted = point("moe", MOE, rows(8), 100.0)
    flying = point("gemm", {"n": 512, "k": 512}, {"m": 512}, 1e5)
    found = sort_points([*real, planted, flying], TOP)
    assert [r.case.id for r in found.refused] == [planted.case.id, flying.case.id]
    assert "active experts" in str(found.refused[0])
    assert "0.1 us" in str(found.refused[0])
    assert "GFLOP" in str(found.refused[1])
    (moe,) = found.grid
    assert moe.refused == 1
    assert moe.size[:, 0].tolist() == [2.0, 8.0, 32.0]


def test_samples_carry_keys_sizes_counts_and_prefixes_as_the_cost_model_reads_them() -> None:
    points = [
        point("moe", MOE, rows(4, "zipf:1.2"), 1e7, seed=3),
        point("attention_prefill", GQA, {"batch": 1, "length": 8, "prefix": 24}, 1e7),
        point("attention_decode", MLA, {"batch": 2, "context": 9}, 1e7),
        point("router", {"hidden": 64, "experts": 8, "top_k": 2, "score": "softmax", "groups": 1, "top_groups": 1},
              {"tokens": 5}, 1e7),
        point("all_reduce", {"ranks": 2, "backend": "gloo"}, {"bytes": 64}, 1e7),
        point("gemm", {"n": 8, "k": 16}, {"m": 3}, 1e7, "heldout", 1),
        point("launch", {}, {}, 1e3, "ceiling"),
    ]  # fmt: skip
    found = sort_points(points, TOP)
    by_op = {s.op: s for s in found.grid}
    assert set(by_op) == {"moe", "attention_prefill", "attention_decode", "router", "all_reduce"}
    assert by_op["moe"].key == [(64, 32, 8, 2, "fp32", 3)]
    assert by_op["moe"].counts is not None
    np.testing.assert_array_equal(by_op["moe"].counts[0], case_counts(points[0].case))
    prefill = by_op["attention_prefill"]
    assert prefill.key == [("gqa", 4, 2, 16, 16, 0, "fp32")]
    assert prefill.size.tolist() == [[1.0, 8.0]]
    assert prefill.extra["kv"].tolist() == [32.0]
    assert by_op["attention_decode"].key == [("mla", 4, 24, "fp32")]
    assert by_op["attention_decode"].size.tolist() == [[2.0, 9.0]]
    assert by_op["all_reduce"].key == [(2,)]
    assert [s.op for s in found.held_out] == ["gemm"]
    assert found.held_out[0].key == [(8, 16, "fp32")]
