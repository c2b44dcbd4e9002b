"""A plan measures what the simulator will ask for: the shapes its own tables price, up to the sizes they reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_kernels.bench.floors import case_counts
from moesim_kernels.bench.plan import Case, Plan, load_plan, save_plan
from moesim_kernels.calibrate.deployment import default_deployments, deployment_of, from_model
from moesim_kernels.calibrate.grid import HELD_OUT, HELD_OUT_MOE, ladder
from moesim_kernels.calibrate.plan import make_plan
from moesim_kernels.calibrate.points import curve_key

from moesim.cost.attention import AttentionTables
from moesim.cost.dense import DenseTables, attention_shape
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.errors import BadInput
from moesim.scenario.load import scenario_from_dict

BF16 = [f"model.{name}_dtype=bf16" for name in ("weight", "expert", "kv", "activation")]
LAYOUTS = [
    ("mixtral-8x7b", {"tp": 2}),
    ("qwen3-30b-a3b", {"dp": 4, "ep": 4}),
    ("deepseek-v3", {"dp": 8, "ep": 8}),
    ("deepseek-v2-lite", {"tp": 2, "dp": 2, "ep": 2}),
    ("gpt-oss-20b", {"tp": 2, "dp": 2, "ep": 4}),
    ("qwen1.5-moe-a2.7b", {}),
    ("llama-3.1-8b", {"tp": 4}),
]


class Recorder(Operators):
    """Prices as usual and keeps every shape that was asked for, with the least and most of its size."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: dict[tuple[Any, ...], tuple[float, float]] = {}

    def _note(self, key: tuple[Any, ...], size: Any) -> None:
        sizes = np.asarray(size, float)
        sizes = sizes[sizes > 0]
        low, high = self.asked.get(key, (np.inf, 0.0))
        self.asked[key] = (min(low, float(sizes.min())), max(high, float(sizes.max())))

    def gemm(self, m: Any, n: int, k: int, dtype: str) -> Any:
        self._note(("gemm", n, k, dtype), m)
        return super().gemm(m, n, k, dtype)

    def moe(self, rows: Any, active: Any, padded_rows: Any, nonlocal_rows: Any, shape: Any) -> Any:
        matrices = 3 if shape.gated else 2
        key = (shape.hidden, shape.intermediate, shape.local_experts, shape.top_k, shape.dtype, matrices)
        self._note(("moe", *key), rows)
        return super().moe(rows, active, padded_rows, nonlocal_rows, shape)

    def attention_prefill(self, q_tokens: Any, kv_tokens: Any, shape: Any, sequences: Any = 1) -> Any:
        self._note(("attention_prefill", *shape.key), q_tokens)
        return super().attention_prefill(q_tokens, kv_tokens, shape, sequences)

    def attention_decode(self, batch: Any, kv_tokens: Any, shape: Any) -> Any:
        self._note(("attention_decode", *shape.key), batch)
        return super().attention_decode(batch, kv_tokens, shape)

    def elementwise(self, bytes_moved: Any) -> Any:
        self._note(("elementwise", 0), bytes_moved)
        return super().elementwise(bytes_moved)


def scenario_of(model: str, parallel: dict[str, int], overrides: list[str]) -> Any:
    data = {
        "model": model,
        "cluster": {"device": "h200_sxm", "gpus_per_node": 8},
        "parallel": parallel,
        "requests": {"format": "poisson", "rate_per_s": 1.0, "num_requests": 1, "prompt_tokens": 1, "output_tokens": 1},
    }
    return scenario_from_dict(data, Path(), overrides)


def asked_of(scenario: Any, step_tokens: list[int]) -> dict[tuple[Any, ...], tuple[float, float]]:
    """What the simulator's tables ask of the operators, with evenly spread experts at `step_tokens` tokens a rank."""
    d = deployment_of(scenario)
    ops = Recorder(scenario.cluster.profile, scenario.engine.cuda_graph)
    engine = scenario.engine.model_copy(update={"max_num_batched_tokens": d.max_tokens, "graph_batch_sizes": ()})
    DenseTables(d.model, d.layout, engine, ops, d.layout.meets)
    for window in sorted({kind != "full" for kind in d.model.attention_kind_of_layer}):
        shape = attention_shape(d.model, d.layout.tp, window)
        AttentionTables(ops, shape, engine.max_num_seqs, 4096, engine.max_num_batched_tokens).fill(engine.max_num_seqs)
    if d.model.is_moe:
        prices = ExpertPrices(d.model, d.layout, ops, d.slots)
        for tokens in step_tokens:
            rows = d.group_tokens(tokens) * d.model.top_k
            even_S = np.full(d.slots * d.layout.ep, rows // (d.slots * d.layout.ep))
            even_S[: rows - int(even_S.sum())] += 1
            prices.compute(even_S[None, None])
    return ops.asked


def measured_of(plan: Plan) -> dict[tuple[Any, ...], list[float]]:
    """Sizes of every shape that the plan's grid measures, on the axis that the recorder keeps."""
    axis = {"gemm": "m", "moe": "rows", "attention_prefill": "length", "attention_decode": "batch"}
    axis["elementwise"] = "bytes"
    out: dict[tuple[Any, ...], list[float]] = {}
    for case in plan.cases:
        if case.op in axis and case.role == "grid":
            out.setdefault((case.op, *curve_key(case)), []).append(float(case.size[axis[case.op]]))
    return out


@pytest.mark.parametrize(("model", "parallel"), LAYOUTS, ids=[m for m, _ in LAYOUTS])
def test_every_shape_that_the_simulator_asks_for_is_measured_to_its_last_size(
    model: str, parallel: dict[str, int]
) -> None:
    limits = ["engine.max_num_batched_tokens=512", "engine.max_num_seqs=32"]
    scenario = scenario_of(model, parallel, [*BF16, *limits])
    d = deployment_of(scenario)
    measured = measured_of(make_plan([d], "cuda"))
    asked = asked_of(scenario, [1, 7, 512])
    assert asked
    for key, (low, high) in asked.items():
        # a model may keep its router in another format than --dtype says; then it is measured in that one
        assert key in measured, key
        assert min(measured[key]) <= low, key
        assert max(measured[key]) >= high, key


@settings(max_examples=25, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2, 8]),
    part=st.sampled_from([0, 1]),
    tokens=st.integers(1, 3000),
    seqs=st.integers(1, 300),
    model=st.sampled_from(["olmoe-1b-7b", "mixtral-8x7b", "deepseek-v2-lite"]),
)
def test_any_layout_gives_a_plan_whose_histograms_exist(
    tp: int, dp: int, part: int, tokens: int, seqs: int, model: str
) -> None:
    ranks = tp * dp
    experts = {"olmoe-1b-7b": 64, "mixtral-8x7b": 8, "deepseek-v2-lite": 64}[model]
    ep = 1 if part == 0 else min(ranks, experts)
    limits = [f"engine.max_num_batched_tokens={max(tokens, seqs)}", f"engine.max_num_seqs={seqs}"]
    try:
        d = from_model(model, {"tp": tp, "dp": dp, "ep": ep}, [*BF16, *limits])
    except BadInput:
        return
    plan = make_plan([d], "cuda", training=True)
    most = max(int(c.size["rows"]) for c in plan.cases if c.op == "moe" and c.size["histogram"] == "uniform")
    assert most >= d.rows_of(d.max_tokens)
    for case in plan.cases:
        if case.op in ("moe", "moe_dgrad", "moe_wgrad"):
            counts = case_counts(case)
            assert counts.sum() == case.size["rows"]
            assert counts.max() <= case.size["tokens"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_grid_is_stable_and_goes_through_its_file(device: str, tmp_path: Path) -> None:
    plan = make_plan(default_deployments(device), device, training=True)
    again = make_plan(default_deployments(device), device, training=True)
    save_plan(plan, tmp_path / "plan.json")
    assert plan.to_json() == again.to_json()
    assert load_plan(tmp_path / "plan.json").to_json() == plan.to_json()
    assert make_plan(default_deployments(device), device, seed=1).plan_id != plan.plan_id
    assert {c.op for c in plan.cases} >= {"moe_dgrad", "moe_wgrad", "attention_backward", "router_backward"}


def test_a_chunk_as_long_as_the_longest_sequence_leaves_no_room_for_a_prefix() -> None:
    limits = ["engine.max_num_batched_tokens=8192", "engine.max_num_seqs=4"]
    d = from_model("granite-powermoe-3b", {"tp": 2, "dp": 4, "ep": 8}, [*BF16, *limits])
    assert d.max_tokens >= d.max_context
    prefixes = {c.size["length"]: c.size["prefix"] for c in make_plan([d], "cpu").cases if c.op == "attention_prefill"}
    assert max(int(length) for length in prefixes) >= d.max_context


def test_gradients_run_by_torch_where_the_forward_kernel_has_none() -> None:
    plan = make_plan(default_deployments("cuda"), "cuda", backend="triton", training=True)
    assert {c.backend for c in plan.cases if c.op == "moe"} == {"triton"}
    assert {c.backend for c in plan.cases if c.op in ("moe_dgrad", "moe_wgrad")} == {"torch"}


def test_held_out_points_are_many_enough_for_intervals_and_are_no_grid_points() -> None:
    plan = make_plan(default_deployments("cpu"), "cpu")
    by_op: dict[str, list[Case]] = {}
    for case in plan.cases:
        if case.role == "heldout":
            by_op.setdefault(case.op, []).append(case)
    assert len(by_op["moe"]) == HELD_OUT_MOE >= 10
    assert all(len(by_op[op]) == HELD_OUT >= 9 for op in ("gemm", "attention_prefill", "attention_decode"))
    grid = {c.id for c in plan.cases if c.role != "heldout"}
    assert not grid & {c.id for found in by_op.values() for c in found}
    tokens = [int(c.size["tokens"]) for c in by_op["moe"]]
    assert len(set(tokens)) > 5
    assert len({str(c.size["histogram"]) for c in by_op["moe"]}) > 3


def test_the_moe_grid_has_twelve_counts_three_skewed_and_micro_points() -> None:
    (d,) = default_deployments("cpu")
    moe = [c.size for c in make_plan([d], "cpu").cases if c.op == "moe" and c.role == "grid"]
    uniform = [s["tokens"] for s in moe if s["histogram"] == "uniform"]
    assert len(uniform) == 12
    assert {1, d.max_tokens} <= set(uniform)
    assert sum(s["histogram"] == "zipf:1.2" for s in moe) == 3
    few = [int(s["rows"]) // 4 for s in moe if s["histogram"] == "few:4"]
    assert few == [2**i for i in range(9)]


@pytest.mark.parametrize(
    ("most", "count", "least", "expected"),
    [
        (8192, 8, 1, [1, 4, 16, 64, 256, 1024, 4096, 8192]),
        (256, 6, 1, [1, 4, 16, 64, 128, 256]),
        (1, 8, 1, [1]),
        (3, 8, 1, [1, 2, 3]),
        (5, 3, 9, [9]),
    ],
)
def test_a_ladder_reaches_both_ends_and_fills_the_widest_gaps(
    most: int, count: int, least: int, expected: list[int]
) -> None:
    assert ladder(most, count, least) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_formats_without_a_kernel_are_refused_with_the_mend(device: str) -> None:
    d = from_model("gpt-oss-20b", {}, [])
    with pytest.raises(BadInput, match="--dtype bf16"):
        make_plan([d], device)
    assert make_plan([from_model("gpt-oss-20b", {}, BF16)], device).cases


def test_a_rank_of_an_expert_parallel_group_gets_its_share_of_the_rows() -> None:
    d = from_model("deepseek-v3", {"dp": 8, "ep": 8}, [*BF16, "engine.max_num_batched_tokens=256"])
    assert d.slots == 32
    assert d.rows_of(256) == 256 * 8 * 8 // 8
    tokens = d.tokens_of(256, d.rows_of(256))
    assert d.rows_of(256) / 8 <= tokens <= 256 * 8
    rows = [int(c.size["rows"]) for c in make_plan([d], "cuda").cases if c.size.get("histogram") == "uniform"]
    assert max(rows) == 2 * d.rows_of(256)
