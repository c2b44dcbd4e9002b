"""The time line of a training step: its parts add up, and it costs what its pieces cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.cost.attention import AttentionTables
from moesim.cost.backward import ExpertPasses, Op, Passes
from moesim.cost.dense import DenseTables, attention_shape
from moesim.cost.experts import ExpertPrices
from moesim.cost.operators import Operators
from moesim.engine_spec import EngineSpec
from moesim.layout import Layout
from moesim.model import Gemm
from moesim.scenario.load import Scenario
from moesim.simulate import simulate
from moesim.training.reduce import serial_end, stalls_one_ahead, stalls_serial
from moesim.training.result import TrainingResult
from tests.build import tiny_model, training_scenario


def run(folder: Path, **parts: Any) -> TrainingResult:
    result = simulate(training_scenario(folder, **parts))
    assert isinstance(result, TrainingResult)
    assert result.feasible, result.reasons
    return result


CASES: dict[str, dict[str, Any]] = {
    "exchange": {},
    "nodes": {"cluster": {"device": "h100_sxm_datasheet", "nodes": 4, "gpus_per_node": 2}},
    "tp": {"parallel": {"tp": 2, "dp": 4, "ep": 8}},
    "split_experts": {"parallel": {"tp": 2, "dp": 4, "ep": 4}},
    "alone": {"parallel": {"tp": 1, "dp": 1, "ep": 1}},
    "replicas": {"parallel": {"dp": 2, "ep": 2, "replicas": 4}, "training": {"zero_stage": 1}},
    "full": {"training": {"recompute": "full", "zero_stage": 2}, "parallel": {"dp": 4, "ep": 4, "replicas": 2}},
    "selective": {"training": {"recompute": "selective", "overlap_grad_reduce": False}},
    "zero3": {"training": {"zero_stage": 3}, "parallel": {"dp": 2, "ep": 2, "replicas": 4}},
    "zero3_plain": {"training": {"zero_stage": 3, "overlap_param_gather": False}},
    "zero1_plain": {"training": {"zero_stage": 1, "overlap_param_gather": False, "measured_from_step": 1}},
    "capacity": {"capacity": {"factor": 1.0}},
    "padded": {"capacity": {"factor": 1.25, "pad": True}},
    "expert_choice": {"policies": {"routing": "expert_choice"}},
}


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_to_the_step(name: str, tmp_path: Path) -> None:
    result = run(tmp_path, routing={"popularity_zipf": 1.0}, **CASES[name])
    training = result.scenario.training
    assert training is not None
    measured = result.times[training.measured_from_step :]
    total = sum(t.total for t in measured)
    ledger = result.ledger
    assert ledger.total == total
    assert sum(ledger.phase_ns.values()) == total
    assert sum(ledger.operator_ns.values()) == total
    assert ledger.grade_ns.sum() == total
    for t in measured:
        assert t.total == t.compute + t.gather_exposed + t.reduction_exposed + t.optimizer
        assert 0 <= t.reduction_exposed <= t.reduction
        assert t.total >= max(t.compute, t.reduction) + t.optimizer
        assert t.expert_mean <= t.expert_slowest
    summary = result.to_json()["summary"]
    assert sum(summary["time_share"].values()) == pytest.approx(1.0)
    assert sum(summary["phase_share"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_forward_pass_is_a_prompt(moe: bool, tp: int, tmp_path: Path) -> None:
    """The rank's own part of one sequence costs what serving asks for a prompt of as many tokens, head apart."""
    model_file = tiny_model(tmp_path) if moe else tiny_model(tmp_path, moe=None)
    parallel = {"tp": tp, "dp": 8 // tp, "ep": 8 if moe else 1}
    s = training_scenario(tmp_path, model_file, parallel=parallel)
    layout, ops, passes = pieces(s)
    engine = EngineSpec(cuda_graph=False)
    dense = DenseTables(s.model, layout, engine, ops, layout.meets)
    attention = AttentionTables(ops, attention_shape(s.model, tp, False), 1, 128, 128)
    blocks = [b for layer in range(s.model.num_layers) for b in passes.layer(layer)]
    own = sum(b.forward_ns for b in (passes.blocks["first"], *blocks, passes.blocks["last"]))
    assert own == dense.total_N[128] + s.model.num_layers * attention.prefill(0, 128)


def pieces(s: Scenario) -> tuple[Layout, Operators, Passes]:
    assert s.training is not None
    layout = Layout.of(s.model, s.cluster, s.parallel.tp, s.parallel.dp, s.parallel.ep)
    ops = Operators(s.cluster.profile, s.training.cuda_graph)
    return layout, ops, Passes(s.model, layout, ops, s.training)


class Counting(Operators):
    """Adds up the FLOP of the products it prices."""

    flop = 0.0
    gradients: tuple[str, ...] = ()

    def gemm(self, m: Any, n: int, k: int, dtype: str) -> Any:
        self.flop += 2.0 * float(np.sum(m)) * n * k
        return super().gemm(m, n, k, dtype)

    def moe_gradient(self, of: Any, rows: Any, active: Any, padded_rows: Any, shape: Any) -> Any:
        self.gradients += (of, rows.tobytes(), active.tobytes(), padded_rows.tobytes())
        return super().moe_gradient(of, rows, active, padded_rows, shape)


class Watched(Passes):
    """Keeps what each block's backward products cost in FLOP, and what the forward ones do."""

    seen: tuple[tuple[float, float], ...] = ()

    def _products(self, name: str, gemms: list[Gemm]) -> Op:
        assert isinstance(self._ops, Counting)
        self._ops.flop = 0.0
        out = super()._products(name, gemms)
        ahead = sum(2.0 * self.tokens * g.n * g.k * g.batch for g in gemms)
        self.seen += ((ahead, self._ops.flop),)
        return out


MLA = {"kind": "mla", "num_heads": 8, "num_kv_heads": None, "head_dim": None, "kv_lora_rank": 64, "q_lora_rank": 96}
MLA |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_backward_products_have_twice_the_flop(attention: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"moe": {"shared_intermediate_size": 128}}
    if attention == "mla":
        changes["attention"] = {k: v for k, v in MLA.items() if v is not None}
    name = tiny_model(tmp_path, **changes)
    if attention == "mla":
        text = (tmp_path / name).read_text()
        kept = [line for line in text.splitlines() if not line.startswith(("  num_kv_heads:", "  head_dim:"))]
        (tmp_path / name).write_text("\n".join(kept))
    s = training_scenario(tmp_path, name)
    assert s.training is not None
    layout = Layout.of(s.model, s.cluster, 1, 8, 8)
    ops = Counting(s.cluster.profile, False)
    watched = Watched(s.model, layout, ops, s.training)
    assert len(watched.seen) == 4  # attention, dense and shared feed-forward, head
    for ahead, back in watched.seen:
        assert back == 2 * ahead > 0
    experts = ExpertPasses(ExpertPrices(s.model, layout, ops, 8), ops, "none", 2.0)
    experts.gradients(np.random.default_rng(0).integers(0, 9, (3, 64)))
    of = ops.gradients
    assert of[0] == "dgrad"
    assert of[4] == "wgrad"
    assert of[1:4] == of[5:8]


def test_micro_batches_add_up(tmp_path: Path) -> None:
    """Under an even load each further micro-batch costs the same; sums of gradients are paid once."""

    def step(micro_batches: int, **training: Any) -> Any:
        training |= {"global_batch_sequences": 8 * micro_batches, "steps": 1}
        return run(tmp_path, policies={"routing": "balanced"}, training=training).times[0]

    one, two, five = (step(n, overlap_grad_reduce=False) for n in (1, 2, 5))
    assert five.total - two.total == 3 * (two.total - one.total)
    assert two.compute == 2 * one.compute
    assert one.reduction == five.reduction
    assert step(5).total < five.total
    apart = [step(n, overlap_grad_reduce=False, zero_stage=2) for n in (1, 3)]
    assert apart[1].reduction == 3 * apart[0].reduction


def test_overlap_never_costs(tmp_path: Path) -> None:
    for stage in range(4):
        both = {"zero_stage": stage, "steps": 2}
        parts: dict[str, Any] = {"parallel": {"dp": 4, "ep": 4, "replicas": 2}}
        hidden = run(tmp_path, training=both, **parts)
        plain = run(tmp_path, training={**both, "overlap_grad_reduce": False, "overlap_param_gather": False}, **parts)
        for a, b in zip(hidden.times, plain.times, strict=True):
            assert a.total <= b.total
            assert a.compute == b.compute


def test_serial_streams_against_a_walk() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        n = int(rng.integers(1, 9))
        ready, cost = np.sort(rng.integers(0, 100, n)), rng.integers(0, 40, n)
        end = 0
        for r, c in zip(ready.tolist(), cost.tolist(), strict=True):
            end = max(end, r) + c if c else end
        assert serial_end(ready, cost) == end
        compute = rng.integers(0, 40, (3, n))
        for row, stall in zip(compute.tolist(), stalls_serial(cost, compute).tolist(), strict=True):
            there = done = 0
            for gather, unit in zip(cost.tolist(), row, strict=True):
                there += gather
                done = max(done, there) + unit
            assert stall == done - sum(row)
        gathers, units = cost.tolist(), compute[0].tolist()
        start_U, fetched_U, end_U = [0], [], [0]
        for gather, unit in zip(gathers, units, strict=True):
            fetched_U.append(max(fetched_U[-1] if fetched_U else 0, start_U[-1]) + gather)
            start_U.append(max(end_U[-1], fetched_U[-1]))
            end_U.append(start_U[-1] + unit)
        assert sum(stalls_one_ahead(gathers, units)) == end_U[-1] - sum(units)


@pytest.mark.parametrize("drop", ["position", "score"])
def test_padding_to_capacity_makes_time_independent_of_skew(drop: str, tmp_path: Path) -> None:
    def total(zipf: float, pad: bool) -> list[int]:
        capacity = {"factor": 1.25, "pad": pad, "drop": drop}
        result = run(tmp_path, routing={"popularity_zipf": zipf}, capacity=capacity)
        return [t.total for t in result.times]

    assert total(0.0, True) == total(1.5, True)
    assert total(0.0, False) != total(1.5, False)


def test_a_capacity_bounds_rows_and_drops_what_is_beyond(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"routing": {"popularity_zipf": 1.2}, "training": {"routing_tokens": 1024}}
    free = run(tmp_path, **parts)
    tight = run(tmp_path, capacity={"factor": 1.0}, **parts)
    loose = run(tmp_path, capacity={"factor": 64.0}, **parts)
    assert [t.total for t in loose.times] == [t.total for t in free.times]
    assert loose.to_json()["summary"]["drops"]["share"] == 0
    drops = tight.to_json()["summary"]["drops"]
    assert 0.1 < drops["share"] < 0.9
    early, late = np.mean(drops["by_position"][:3]), np.mean(drops["by_position"][-3:])
    assert late > early  # who comes late finds no room (OpenMoE, arXiv:2402.01739)
    assert tight.times[0].total < free.times[0].total
    assert tight.loads[0].max_over_mean < free.loads[0].max_over_mean


@pytest.mark.parametrize("scope", ["rank", "sequence", "all"])
def test_scopes_share_a_capacity(scope: str, tmp_path: Path) -> None:
    """The wider the scope, the fewer choices are dropped; a padded kernel runs factor * T * K / E rows in any."""
    training = {"micro_batch_sequences": 2, "routing_tokens": 2048}
    parts: dict[str, Any] = {"routing": {"popularity_zipf": 0.5}, "training": training}
    result = run(tmp_path, capacity={"factor": 1.0, "scope": scope, "pad": True}, **parts)
    assert result.loads[0].run == 32 * 128 * 4 * 3
    share = result.to_json()["summary"]["drops"]["share"]
    wide = run(tmp_path, capacity={"factor": 1.0, "scope": "all"}, **parts).to_json()["summary"]["drops"]["share"]
    assert 0 < wide <= share
    assert (wide == share) == (scope == "all")


def test_twice_the_nic_is_never_slower(tmp_path: Path) -> None:
    for name in ("nodes", "replicas", "zero3"):
        parts = dict(CASES[name])
        cluster = {"device": "h100_sxm_datasheet", "nodes": 4, "gpus_per_node": 2}
        slow = run(tmp_path, **{**parts, "cluster": {**cluster, "nic_gb_per_s": 25}})
        fast = run(tmp_path, **{**parts, "cluster": {**cluster, "nic_gb_per_s": 50}})
        for a, b in zip(slow.times, fast.times, strict=True):
            assert b.total <= a.total
        assert sum(t.total for t in fast.times) < sum(t.total for t in slow.times)


def test_more_copies_of_experts_take_longer(tmp_path: Path) -> None:
    """Expert upcycling 32 -> 64 experts at the same top-k: the same FLOP a token, so what a micro-batch computes and
    exchanges grows by weights to read at most; sums and the optimizer grow as experts' parameters do, no more."""
    model = tiny_model(tmp_path, moe={"num_experts": 32, "top_k": 4, "intermediate_size": 512})
    training = {"zero_stage": 1, "overlap_grad_reduce": False, "overlap_param_gather": False}
    parts: dict[str, Any] = {"parallel": {"dp": 4, "ep": 4, "replicas": 2}, "training": training}
    parts["policies"] = {"routing": "balanced"}  # so that both have the same loads
    before = run(tmp_path, model=model, **parts)
    after = run(tmp_path, model={"name": model, "upcycle": 2}, **parts)
    assert after.scenario.model.num_experts == 64
    flop = [r.to_json()["summary"]["training"]["model_flop_per_token"] for r in (before, after)]
    assert flop[0] < flop[1] < 1.02 * flop[0]  # the router's columns
    assert before.reduce_bytes.nvlink < after.reduce_bytes.nvlink < 2 * before.reduce_bytes.nvlink
    grown = ("reduction", "gather_exposed", "optimizer", "expert_slowest")
    more = 0
    for a, b in zip(before.times, after.times, strict=True):
        for name in grown:
            assert getattr(a, name) < getattr(b, name) < 2 * getattr(a, name), name
        more += sum(getattr(b, name) - getattr(a, name) for name in grown)
        assert a.total < b.total
    # nothing else grows but the router, by its columns; experts that are dealt out otherwise travel hardly otherwise
    ledgers = before.ledger, after.ledger
    exchanged = [ledger.phase_ns["exchange"] for ledger in ledgers]
    assert exchanged[1] == pytest.approx(exchanged[0], rel=0.01)
    router = [sum(ns for name, ns in ledger.ns.items() if name.startswith(("router", "top_k"))) for ledger in ledgers]
    assert 0 < router[1] - router[0] < 0.1 * router[0]
    rest = ledgers[1].total - ledgers[0].total - more - exchanged[1] + exchanged[0] - router[1] + router[0]
    assert abs(rest) < 1e-3 * more  # the router's own sums and weights


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_split_experts_gather(recompute: str, nodes: int, tmp_path: Path) -> None:
    """Experts split over two ranks: all gather all tokens and sum their own back, booked as that, their bytes counted
    by hand: a ring inside the node, each rank's share over its NIC."""
    cluster = {"device": "h100_sxm_datasheet", "nodes": 2, "gpus_per_node": 8 // nodes}
    training = {"recompute": recompute, "steps": 2, "measured_from_step": 1}
    split = run(tmp_path, cluster=cluster, parallel={"tp": 2, "dp": 4, "ep": 4}, training=training)
    whole = run(tmp_path, cluster=cluster, parallel={"tp": 2, "dp": 4, "ep": 8}, training=training)
    assert split.ledger.operator_ns["reduce_scatter"] > 0
    assert "all_gather" not in whole.ledger.operator_ns
    assert "all_to_all" in whole.ledger.operator_ns
    assert "all_to_all" not in split.ledger.operator_ns
    spent = split.ledger.operator_ns["all_gather"] + split.ledger.operator_ns["reduce_scatter"]
    exchanged = split.ledger.phase_ns["exchange"]
    assert spent > exchanged > 0 if recompute == "full" else spent == exchanged
    # 8 micro-batches of 3 layers; 4 * 128 tokens of 256 bf16, gathered and summed, forward and backward (and again)
    passes = 3 if recompute == "full" else 2
    calls, size, near = 8 * 3 * 2 * passes, 4 * 128 * 256 * 2, 8 // nodes
    links = split.to_json()["summary"]["links"]
    assert links["nvlink"]["exchange_bytes"] == calls * 8 * size * (near - 1) // near
    if nodes == 2:
        assert links["nic"]["exchange_bytes"] == calls * 8 * size // near // 2


def test_relabelling_experts_changes_nothing(tmp_path: Path) -> None:
    from moesim.training import run as module

    class Renamed:
        """The same scores under other names."""

        def __init__(self, scores: Any, name_LE: NDArray[np.int64]) -> None:
            self._scores, self._name_LE = scores, name_LE
            self.name, self.assumed = scores.name, scores.assumed

        def scores(self, rows_N: Any, layer: int, progress: float = 1.0) -> Any:
            out = np.empty_like(given := self._scores.scores(rows_N, layer, progress))
            out[:, self._name_LE[layer]] = given
            return out

    class Fixed:
        def __init__(self, table: Any) -> None:
            self._table = table

        def place(self, weight_LE: Any, ctx: Any) -> Any:
            return ctx.placement(self._table, weight_LE.shape[1])

    s = training_scenario(tmp_path, routing={"popularity_zipf": 1.0}, training={"routing_tokens": 1024})
    plain = simulate(s)
    name_LE = np.stack([np.random.default_rng(layer).permutation(64) for layer in range(3)])
    original = module.training_scores
    try:
        module.training_scores = lambda *given: Renamed(original(*given), name_LE)  # type: ignore[assignment]
        policies = dataclasses.replace(s.policies, placement=Fixed(name_LE))  # type: ignore[arg-type]
        renamed = simulate(dataclasses.replace(s, policies=policies))
    finally:
        module.training_scores = original
    assert isinstance(plain, TrainingResult)
    assert isinstance(renamed, TrainingResult)
    assert plain.times == renamed.times
    assert [load.maxvio for load in plain.loads] == [load.maxvio for load in renamed.loads]
