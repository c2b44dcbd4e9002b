"""Every compute operator is built, runs on each of its rotations, and is timed; the arenas are what they say."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moesim_kernels.bench import cases, clock, harness  # noqa: E402  after the check for torch
from moesim_kernels.bench.errors import BadPlan  # noqa: E402
from moesim_kernels.bench.floors import case_counts, floors, guess_ns  # noqa: E402
from moesim_kernels.bench.plan import OPS, Case, Plan  # noqa: E402
from moesim_kernels.bench.pool import Device, Pool, PoolFull, Prepared, cache_bytes  # noqa: E402
from moesim_kernels.ops.moe import moe_local  # noqa: E402

EXPERTS: dict[str, Any] = {"hidden": 32, "intermediate": 16, "slots": 4, "top_k": 2}
ROWS: dict[str, Any] = {"tokens": 8, "rows": 16, "histogram": "uniform"}
ROUTER: dict[str, Any] = {"hidden": 32, "experts": 8, "top_k": 2, "score": "softmax", "groups": 1, "top_groups": 1}
BLOCK: dict[str, Any] = ROUTER | {
    "heads": 4, "kv_heads": 2, "head_dim": 8, "router_dtype": "fp32", "bias": False, "head_norm": False,
}  # fmt: skip
GQA: dict[str, Any] = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 16, "v_head_dim": 16, "window": 0}
MLA: dict[str, Any] = {"kind": "mla", "heads": 4, "kv_dim": 24, "rope_dim": 8, "nope_dim": 16, "v_head_dim": 16}
SHARE = {key: EXPERTS[key] for key in ("hidden", "slots", "top_k")}
PREFILL: dict[str, Any] = {"batch": 1, "length": 8, "prefix": 4}
COMPUTE: list[Case] = [
    Case("gemm", {"n": 32, "k": 32}, {"m": 4}, "fp32"),
    Case("moe", EXPERTS, ROWS, "fp32"),
    Case("moe", EXPERTS, ROWS, "bf16", "grouped"),
    Case("moe", EXPERTS, {"tokens": 8, "rows": 0, "histogram": "uniform"}, "fp32"),
    Case("moe", EXPERTS, {"tokens": 8, "rows": 5, "histogram": "few:2"}, "fp32"),
    Case("moe_dgrad", EXPERTS, ROWS, "fp32"),
    Case("moe_wgrad", EXPERTS, ROWS, "fp32"),
    Case("router", ROUTER, {"tokens": 8}, "fp32"),
    Case("router", ROUTER | {"score": "sigmoid", "groups": 4, "top_groups": 2}, {"tokens": 8}, "fp32"),
    Case("router_backward", ROUTER, {"tokens": 8}, "fp32"),
    Case("block", BLOCK, {"tokens": 1}, "fp32"),
    Case("block", BLOCK | {"score": "sigmoid", "bias": True, "head_norm": True}, {"tokens": 40}, "fp32"),
    Case("permute", SHARE, ROWS, "fp32"),
    Case("permute", SHARE, {"tokens": 8, "rows": 5, "histogram": "zipf:1.2"}, "fp32"),
    Case("combine", SHARE, ROWS, "fp32"),
    Case("shared_expert", {"hidden": 32, "intermediate": 16}, {"tokens": 4}, "fp32"),
    Case("attention_prefill", GQA, PREFILL, "fp32"),
    Case("attention_prefill", GQA | {"window": 6}, PREFILL, "fp32"),
    Case("attention_prefill", MLA, PREFILL, "fp32"),
    Case("attention_decode", GQA, {"batch": 2, "context": 9}, "fp32"),
    Case("attention_decode", GQA | {"window": 4}, {"batch": 2, "context": 9}, "fp32"),
    Case("attention_decode", MLA, {"batch": 2, "context": 9}, "fp32"),
    Case("attention_backward", GQA, PREFILL | {"prefix": 0}, "fp32"),
    Case("attention_backward", MLA, PREFILL, "fp32"),
    Case("elementwise", {}, {"bytes": 1 << 17}, "fp32"),
    Case("launch", {}, {}, "fp32"),
    Case("read_bandwidth", {}, {"bytes": 1 << 14}, "fp32"),
    Case("copy_bandwidth", {}, {"bytes": 1 << 14}, "fp32"),
    Case("peak_gemm", {}, {"n": 32}, "fp32"),
]
DEVICE = Device("cpu", cache_bytes=1 << 14, capacity_bytes=1 << 28)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Pool(DEVICE)
    cases.reserve(COMPUTE, made)
    yield made
    torch.set_num_threads(threads)


def test_all_operators_of_a_plan_have_a_builder():
    assert set(cases.BUILDERS) == set(OPS)


@pytest.mark.parametrize("case", COMPUTE, ids=[f"{i}-{case.op}" for i, case in enumerate(COMPUTE)])
def test_case_runs_on_every_rotation_and_is_timed(case: Case, pool: Pool):
    before = pool.used_bytes
    prepared = cases.build(case, DEVICE, pool)
    for i in range(prepared.rotations):
        out = prepared.run(i)
        parts = out if isinstance(out, tuple) else (out,)
        assert all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point())
    assert (prepared.bytes, prepared.flop) == floors(case)
    assert prepared.clock == "thread"
    assert not prepared.graph
    ns, wall_ns = clock.sampler(prepared, DEVICE, pool).sample()
    assert ns > 0
    assert wall_ns > 0
    assert pool.used_bytes - before <= 1 << 10  # masks aside, all it holds was reserved


def test_rotations_read_other_memory_until_the_cache_is_passed(pool: Pool):
    sets = pool.rotate(torch.float32, [(16, 32), (8, 8)])
    starts = [view.data_ptr() for views in sets for view in views]
    assert len(set(starts)) == 2 * len(sets)
    assert max(starts) - min(starts) >= 1.5 * DEVICE.cache_bytes
    assert all(start % 64 == 0 for start in starts)
    values = np.array([float(view.std()) for views in sets for view in views])
    assert values.min() > 0.01  # random, of deviation 0.02, never zeros
    assert values.max() < 0.04


def test_experts_rotate_where_a_layer_exceeds_the_cache(pool: Pool):
    """The same counts on other slots each time: all slots have been busy before the first comes again."""
    case = Case("moe", EXPERTS | {"slots": 16}, {"tokens": 4, "rows": 8, "histogram": "few:2"}, "fp32")
    rows = cases._Rows(case, DEVICE, pool)
    counts = [np.diff(end_E.numpy(), prepend=0) for end_E in rows.end_E]
    assert len(counts) == rows.rotations >= 3
    assert all(sorted(count_E) == sorted(case_counts(case)) for count_E in counts)
    busy = [set(np.flatnonzero(count_E)) for count_E in counts]
    assert all(a.isdisjoint(b) for a, b in pairwise(busy))
    for token_R, expert_R, count_E in zip(rows.token_R, rows.expert_R, counts, strict=True):
        assert (np.bincount(expert_R, minlength=16) == count_E).all()
        assert len(set(zip(token_R.tolist(), expert_R.tolist(), strict=True))) == 8


def test_moe_case_is_moe_local_on_its_rotation(pool: Pool):
    case = Case("moe", EXPERTS, ROWS, "fp32")
    prepared = cases.build(case, DEVICE, pool)
    sets = pool.rotate(torch.float32, [(4, 32, 32), (4, 32, 16)])
    rows = cases._Rows(case, DEVICE, pool, len(sets))
    x_TH = pool.arena("input", torch.float32, 256)[:256].view(8, 32)
    for i in range(prepared.rotations):
        out_TH = prepared.run(i).fill_(float("nan"))
        out_TH = prepared.run(i)
        turn, weights = i // len(sets), sets[i % len(sets)]
        wanted = moe_local(x_TH, rows.token_R[turn], rows.gate_R, rows.end_E[turn], *weights)
        torch.testing.assert_close(out_TH, wanted)


def test_floors_by_hand():
    assert floors(Case("gemm", {"n": 3, "k": 5}, {"m": 2}, "bf16")) == (2.0 * (10 + 15 + 6), 60.0)
    few = Case("moe", EXPERTS, {"tokens": 8, "rows": 6, "histogram": "few:2"}, "fp32")
    assert floors(few) == (4.0 * (2 * 3 * 32 * 16 + 2 * 6 * 32), 6.0 * 6 * 32 * 16)
    prefill = Case("attention_prefill", GQA, {"batch": 1, "length": 2, "prefix": 3}, "fp32")
    assert floors(prefill) == (4.0 * (4 * 2 * 16 * 2 + 2 * 2 * 5 * 16), 2.0 * 4 * (4 + 5) * 32)
    chunk = Case("attention_prefill", GQA | {"window": 4}, {"batch": 1, "length": 4, "prefix": 2}, "fp32")
    assert floors(chunk)[1] == 2.0 * 4 * (3 + 4 + 4 + 4) * 32
    window = Case("attention_decode", GQA | {"window": 4}, {"batch": 1, "context": 9}, "fp32")
    assert floors(window) == floors(Case("attention_decode", GQA, {"batch": 1, "context": 4}, "fp32"))


@pytest.mark.parametrize(
    "case",
    [
        Case("gemm", {"n": 32, "k": 32}, {"m": 4}, "fp8"),
        Case("peak_gemm", {}, {"n": 32}, "fp8"),
        Case("router", ROUTER, {"tokens": 8}, "fp8"),
        Case("moe_dgrad", EXPERTS, ROWS, "bf16", "triton"),
        Case("launch", {"graph": True}, {}, "fp32"),
    ],
    ids=lambda case: f"{case.op}-{case.dtype}",
)
def test_what_a_cpu_cannot_run_is_refused_with_the_reason(case: Case, pool: Pool):
    with pytest.raises((BadPlan, ValueError), match=r"use |need|leave"):
        cases.build(case, DEVICE, pool).run(0)


@pytest.mark.parametrize(
    "case",
    [
        Case("attention_prefill", GQA, {"batch": 1, "length": 1 << 40, "prefix": 0}, "fp32"),
        Case("moe", EXPERTS | {"slots": 1 << 29}, ROWS, "fp32"),
        Case(
            "permute",
            SHARE | {"slots": 8, "top_k": 8},
            {"tokens": 10**8, "rows": 8 * 10**8, "histogram": "balanced"},
            "fp32",
        ),
        Case("router", ROUTER | {"hidden": 1, "experts": 1 << 17}, {"tokens": 1 << 19}, "fp32"),
        Case("shared_expert", {"hidden": 1, "intermediate": 1 << 19}, {"tokens": 1 << 19}, "fp32"),
    ],
    ids=lambda case: case.op,
)
def test_what_memory_cannot_hold_is_refused_before_any_is_taken(case: Case, pool: Pool):
    tracemalloc.start()
    try:
        guess_ns(case, "cpu")
        with pytest.raises(PoolFull, match=r"where 0\.27 GB are to be used"):
            cases.build(case, DEVICE, pool)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_pool_keeps_its_bound():
    small = Pool(Device("cpu", cache_bytes=1 << 10, capacity_bytes=1 << 16))
    flat = small.arena("input", torch.float32, 1 << 13)
    assert small.arena("input", torch.float32, 10) is flat
    assert small.get("a", 1 << 14, lambda: "made") == "made"
    assert small.get("a", 1 << 14, lambda: "again") == "made"
    with pytest.raises(PoolFull, match=r"0\.00 GB are to be used"):
        small.get("b", 1 << 15, lambda: "more")
    small.release()
    assert small.used_bytes == 1 << 15  # the arena stays
    assert small.get("b", 1 << 15, lambda: "more") == "more"


def test_cache_of_this_machine_or_the_default(tmp_path: Any):
    assert cache_bytes() >= 1 << 18
    assert cache_bytes(tmp_path) == 64 << 20
    for index, size in enumerate(("32K", "1M", "512K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cache_bytes(tmp_path) == 1 << 20


def test_samples_go_on_with_the_next_rotation():
    called: list[int] = []
    sampler = clock.HostSampler(Prepared(called.append, 7, 1.0, 1.0, "thread"), thread=True, start=3)
    for _ in range(3):
        sampler.sample()
    assert called == [i % 7 for i in range(3, 3 + len(called))]


def test_case_that_times_itself_is_asked():
    prepared = Prepared(lambda i: None, 2, 1.0, 1.0, "wall", timed=lambda i: 100_000 + i, note="by itself")
    sampler = clock.sampler(prepared, DEVICE, Pool(DEVICE))
    assert sampler.remark == "by itself"
    assert sampler.sample()[0] == pytest.approx(100_000.5, abs=1)


@pytest.mark.parametrize(
    ("call_ns", "resolution_ns", "calls"),
    [(2e6, 1.0, 1), (1e6, 1.0, 1), (500_001, 1.0, 2), (1000, 1.0, 1000), (0, 1.0, 10_000), (1e6, 1e6, 50)],
)
def test_a_sample_is_long_against_the_clock(call_ns: float, resolution_ns: float, calls: int):
    assert clock.repeats(call_ns, resolution_ns) == calls


def test_more_threads_are_timed_by_the_wall(pool: Pool):
    prepared = cases.build(COMPUTE[0], DEVICE, pool)
    two = Device("cpu", threads=2, cache_bytes=1 << 14)
    one_now = clock.sampler(prepared, DEVICE, pool)._now
    two_now = clock.sampler(prepared, two, pool)._now
    assert (one_now.__name__, two_now.__name__) == ("thread_time_ns", "perf_counter_ns")


@pytest.mark.gpu
def test_cuda_cases_run_in_graphs(tmp_path: Any):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    wanted = [case for case in COMPUTE if case.op not in ("storage", "copy")]
    plan = Plan("cuda", tuple({case.id: case for case in wanted}.values()))
    summary = harness.run(plan, tmp_path / "log", 300.0, target=3, minimum=2)
    assert (summary.refused, summary.short) == ({}, [])
