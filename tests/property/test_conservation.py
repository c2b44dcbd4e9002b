"""Nothing is lost and nothing appears: 1,000 random scenarios, every invariant checked while they run.

Tokens in are tokens out or rejected; every (token, choice) of every layer lands on a slot; copies sent are copies
received; KV blocks stay within memory; a group's steps neither overlap nor pause while it has work; and the parts of a
result's time add up to all of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.cost import bank, blocks, tokens
from moesim.cost.experts import ExpertPrices
from moesim.cost.tokens import TokenExperts
from moesim.cost.touch import touch
from moesim.engine.group import Group
from moesim.engine.rank import KvShape, Rank, Sequence
from moesim.errors import BadInput
from moesim.scenario import load
from moesim.scenario.load import Scenario
from moesim.simulate import RunResult, simulate
from moesim.workload.requests import RequestStream, build_requests
from tests.build import scenario, tiny_model, with_kv_tokens

SMALL: dict[str, Any] = {"hidden_size": 64, "vocab_size": 256, "dense_intermediate_size": 128}
HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16}
WINDOW = {**HEADS, "window": 12, "layer_pattern": ["window", "full"]}
EXPERTS = {"num_experts": 16, "intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 2, "moe": None, "attention": HEADS},
    "dense_window": {"num_layers": 3, "moe": None, "attention": WINDOW},
    "top1": {"num_layers": 2, "moe": {**EXPERTS, "top_k": 1, "first_dense_layers": 0}, "attention": HEADS},
    "first_dense": {"num_layers": 3, "moe": {**EXPERTS, "top_k": 4}, "attention": HEADS},
    "interleaved": {"num_layers": 4, "moe": {**EXPERTS, "top_k": 3, "layer_step": 2, "first_dense_layers": 0},
                    "attention": WINDOW},
    "all_experts": {"num_layers": 2, "moe": {**EXPERTS, "num_experts": 8, "top_k": 8}, "attention": HEADS},
}  # fmt: skip
LAYOUTS = (
    (1, 1, 1),
    (1, 1, 1),
    (2, 1, 1),
    (2, 1, 2),
    (1, 2, 2),
    (1, 4, 4),
    (1, 4, 2),
    (1, 8, 8),
    (2, 2, 4),
    (4, 2, 4),
    (1, 2, 1),
)
"""tp, dp, ep"""


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a scenario; `model` names one of MODELS, `kv_tokens` sizes the KV cache."""
    name = draw(st.sampled_from(sorted(MODELS)))
    moe = MODELS[name]["moe"]
    tp, dp, ep = draw(st.sampled_from(LAYOUTS))
    longest = draw(st.sampled_from([8, 50]))
    requests = {
        "num_requests": draw(st.integers(1, 14)),
        "prompt_tokens": {"distribution": "uniform", "min": 1, "max": longest},
        "output_tokens": {"distribution": "geometric", "mean": draw(st.sampled_from([1, 8, 25])), "max": 40},
    }
    if draw(st.booleans()):
        requests |= {"format": "poisson", "rate_per_s": draw(st.sampled_from([500.0, 100_000.0]))}
    else:
        requests |= {"format": "closed_loop", "concurrency": draw(st.sampled_from([1, 5, 12]))}
    seqs = draw(st.sampled_from([1, 4, 8]))
    engine = {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": max(seqs, draw(st.sampled_from([8, 16, 64]))),
        "max_model_len": draw(st.sampled_from([50, 100])),
        "block_size": draw(st.sampled_from([1, 4, 16])),
        "graph_batch_sizes": [1, 4, 8],
        "cuda_graph": draw(st.booleans()),
        "run_ahead": draw(st.booleans()),
        "bank_entries": 3,
        "max_duration_s": draw(st.sampled_from([None, None, None, 0.01])),
    }
    policies: dict[str, Any] = {
        "batching": draw(
            st.sampled_from(["vllm_v1", "sglang", {"kind": "vllm_v1", "long_prefill_token_threshold": 5}])
        ),
        "balancer": draw(st.sampled_from(["round_robin", "least_loaded", "session"])),
    }
    parts = {"parallel": {"tp": tp, "dp": dp, "ep": ep if moe else 1, "replicas": draw(st.sampled_from([1, 1, 2]))}}
    if moe:
        redundant = draw(st.sampled_from([0, 8]))
        policies |= {
            "placement": {"kind": "eplb", "num_redundant_experts": redundant} if redundant else "contiguous",
            "dispatch": draw(
                st.sampled_from(
                    [
                        "local_first",
                        "random",
                        "first",
                        "static",
                        "node_limited",
                        "lp",
                        {"kind": "llep", "threshold": 1.0, "min_tokens": 2},
                    ]
                )
            ),
            "routing": draw(st.sampled_from([None, "balanced"])),
        }
        parts["routing"] = {
            "fidelity": draw(st.sampled_from(["token", "count"])), "pool_tokens": draw(st.sampled_from([40, 128])),
            "sequence_tokens": 20, "popularity_zipf": draw(st.sampled_from([0.0, 1.5])),
        }  # fmt: skip
    cluster = {"device": "h100_sxm_datasheet", "nodes": 8, "gpus_per_node": draw(st.sampled_from([2, 8]))}
    if tp == 4:
        cluster["gpus_per_node"] = 8
    return {
        "model": name, "seed": draw(st.integers(0, 10**6)), "kv_tokens": draw(st.sampled_from([32, 48, 80, 10_000])),
        "cluster": cluster, "requests": requests, "engine": {k: v for k, v in engine.items() if v is not None},
        "policies": {k: v for k, v in policies.items() if v is not None}, **parts,
    }  # fmt: skip


class Watch:
    """What the checks below see of one run."""

    def __init__(self) -> None:
        self.lost = 0  # KV tokens thrown away by preemptions
        self.preemptions = 0
        self.priced = 0  # steps of expert counts seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the models lie. Each is read once: reading YAML would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_model", "load_profile"):
            patch.setattr(load, name, functools.cache(getattr(load, name)))
        yield tmp_path_factory.mktemp("models")


def spy(patch: pytest.MonkeyPatch, watch: Watch) -> None:
    """Check the engine and the cost model from inside."""
    plan, preempt, end = Rank.plan, Rank._preempt, Group._end
    compute, price, draw = ExpertPrices.compute, ExpertPrices.price, bank.Blocks.draw

    def checked_plan(rank: Rank) -> Any:
        rank._check()
        chunks, decode, dropped = plan(rank)
        held = sum(rank.kv.units(s.offset + rank.dtick) for s in rank.running_set.values() if s not in rank.prefilling)
        granted = Counter({s.index: n for s, n in chunks})
        assert len(granted) == len(chunks), "one chunk of a request a step"
        held += sum(rank.kv.units(s.computed + granted[s.index]) for s in rank.prefilling)
        assert rank.used == held
        assert rank.used + (rank._need(1) if decode else 0) <= rank.kv.capacity, "the step's own tokens fit"
        computed = sum(granted.values()) + (rank.decoding if decode else 0)
        assert computed <= max(rank.max_num_batched_tokens, rank.decoding)
        assert rank.running <= rank.max_num_seqs
        return chunks, decode, dropped

    def counted_preempt(rank: Rank) -> Sequence:
        sequence = next(reversed(rank.running_set.values()))
        inside = sequence in rank.prefilling
        watch.lost += sequence.computed if inside else sequence.offset + rank.dtick
        watch.preemptions += 1
        return preempt(rank)

    def checked_end(group: Group, now: int) -> None:
        end(group, now)
        for rank in group.ranks:
            rank._check()

    def checked_compute(self: ExpertPrices, slot_count: Any, plan: Any = None) -> Any:
        total = check_counts(slot_count, self.shape.top_k)
        watch.priced += 1
        computed = compute(self, slot_count, plan)
        np.testing.assert_array_equal(computed.rows_LP.sum(axis=-1), total * self.shape.top_k)
        return computed

    def checked_price(
        self: ExpertPrices, computed: Any, busiest: Any, ports: Any, by_layer: bool = False, moves: Any = None
    ) -> Any:
        pairs_L = computed.rows_LP.sum(axis=-1)
        assert (np.asarray(busiest)[..., None] * self.shape.top_k <= pairs_L * (1 + 1e-9)).all()
        if ports is not None:
            assert (ports.nvlink_total <= pairs_L).all()
            assert (ports.nic_total <= ports.nvlink_total).all()
            assert (ports.nvlink <= ports.nvlink_total).all()
            assert (ports.nic <= ports.nic_total).all()
        return price(self, computed, busiest, ports, by_layer, moves)

    def checked_draw(self: Any, number: int, entries: int, seed: int, phase: str) -> Any:
        count_BLS, ports = draw(self, number, entries, seed, phase)
        assert len(count_BLS) == entries
        assert (check_counts(count_BLS, self._slot_TLK.shape[-1]) == number).all(), "T * K in every draw and layer"
        return count_BLS, ports

    patch.setattr(Rank, "plan", checked_plan)
    patch.setattr(Rank, "_preempt", counted_preempt)
    patch.setattr(Group, "_end", checked_end)
    patch.setattr(ExpertPrices, "compute", checked_compute)
    patch.setattr(ExpertPrices, "price", checked_price)
    patch.setattr(bank.Blocks, "draw", checked_draw)
    for module in (blocks, tokens):
        patch.setattr(module, "touch", checked_touch)


def check_counts(slot_count: Any, top_k: int) -> NDArray[np.float64]:
    """Tokens [..., L] behind counts [..., L, S]: the same in all layers, K pairs each, none twice on a slot."""
    count = np.asarray(slot_count)
    total = count.sum(axis=-1, dtype=np.float64) / top_k
    np.testing.assert_allclose(total, np.rint(total[..., :1]).repeat(total.shape[-1], axis=-1), rtol=1e-6)
    assert (count <= total[..., None] * (1 + 1e-9)).all(), "K distinct experts a token: none has more than T"
    assert (count >= 0).all()
    return total


def checked_touch(
    slot_TLK: Any, source_T: Any, starts_B: Any, slots_per_rank: int, node_G: Any, copies: Any = "distinct"
) -> Any:
    """Copies counted where they leave are the copies counted where they arrive, rank by rank and node by node."""
    out = touch(slot_TLK, source_T, starts_B, slots_per_rank, node_G, copies)
    rank_TLK = np.sort(slot_TLK // slots_per_rank, axis=-1)
    new = np.concatenate([np.ones_like(rank_TLK[..., :1], bool), np.diff(rank_TLK, axis=-1) > 0], axis=-1)
    sent_TL = (new & (rank_TLK != np.asarray(source_T)[:, None, None])).sum(axis=-1)
    np.testing.assert_array_equal(np.add.reduceat(sent_TL, starts_B, axis=0), out.in_BLG.sum(axis=-1))
    np.testing.assert_array_equal(out.out_BL, out.in_BLG.sum(axis=-1))
    edges = np.searchsorted(node_G, np.arange(node_G[-1] + 1))
    by_node = np.add.reduceat(out.in_BLG, edges, axis=-1)
    assert (out.node_in_BLN <= by_node).all(), "what comes to a node goes on to one of its ranks"
    node_TLK = np.asarray(node_G)[rank_TLK]
    new = np.concatenate([np.ones_like(new[..., :1]), np.diff(node_TLK, axis=-1) > 0], axis=-1)
    sent_TL = (new & (node_TLK != np.asarray(node_G)[np.asarray(source_T)][:, None, None])).sum(axis=-1)
    np.testing.assert_array_equal(np.add.reduceat(sent_TL, starts_B, axis=0), out.node_in_BLN.sum(axis=-1))
    return out


@settings(max_examples=1000, derandomize=True, deadline=None)
@given(parts=scenarios())
def test_nothing_is_lost(folder: Path, parts: dict[str, Any]) -> None:
    parts = dict(parts)
    kv_tokens = parts.pop("kv_tokens")
    parts["model"] = tiny_model(folder, **SMALL, **MODELS[parts["model"]])
    built = with_kv_tokens(scenario(folder, **parts), kv_tokens)
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, watch)
        try:
            result = simulate(built)
        except BadInput:
            assert too_long(built, build_requests(built.requests, built.base, built.seed), kv_tokens).all()
            return
    assert result.stream is not None
    if not result.feasible:  # the KV cache is too small for each of them
        assert too_long(built, result.stream, kv_tokens).all(), result.reasons
        return
    rejected = too_long(built, result.stream, kv_tokens)
    if built.engine.max_duration_s is None:
        np.testing.assert_array_equal(result.outcome.requests.target < 0, rejected)
    assert result.to_json()["summary"]["requests"]["rejected"] <= int(rejected.sum())
    check_tokens(result, watch)
    check_experts(result, watch)
    check_steps(result)
    check_json(result)


def too_long(built: Scenario, stream: RequestStream, kv_tokens: int) -> NDArray[np.bool_]:
    """Requests that can never be served, [R]: by max_model_len, or because all KV blocks do not hold them."""
    engine, model = built.engine, built.model
    total_R = stream.prompt_tokens + stream.output_tokens
    blocks_R = -(-total_R // engine.block_size)
    window = max(model.window_of_layer)
    inside_R = np.where((window > 0) & (total_R >= window), -(-window // engine.block_size) + 1, blocks_R)
    windows = sum(kind != "full" for kind in model.attention_kind_of_layer)
    units_R = (model.num_layers - windows) * blocks_R + windows * inside_R
    assert engine.max_model_len is not None
    return (total_R > engine.max_model_len) | (units_R > -(-kv_tokens // engine.block_size) * model.num_layers)


def check_tokens(result: RunResult, watch: Watch) -> None:
    """Tokens in = out + rejected; tokens computed = tokens of the answers, and what preemptions threw away again."""
    assert result.outcome is not None
    assert result.stream is not None
    engine, requests, stream = result.scenario.engine, result.outcome.requests, result.stream
    served, done = requests.target >= 0, requests.completed
    open_ended = engine.max_duration_s is not None
    total = stream.prompt_tokens + stream.output_tokens
    assert not (total[served] > (engine.max_model_len or 0)).any()
    assert open_ended or (done == served).all(), "served to the end"
    np.testing.assert_array_equal(requests.prompt_tokens, stream.prompt_tokens)
    np.testing.assert_array_equal(requests.output_tokens, stream.output_tokens)
    times = np.stack([requests.arrival_ns, requests.first_token_ns, requests.finish_ns])[:, done]
    assert (np.diff(times, axis=0) >= 0).all()
    assert (times[1] > times[0]).all()
    single = requests.output_tokens[done] == 1
    np.testing.assert_array_equal(times[1][single], times[2][single])
    assert (requests.finish_ns[~done] == -1).all()
    if open_ended:
        return
    assert int(requests.preemptions.sum()) == watch.preemptions
    table = result.steps_table()
    prefill, decode = int(table["prefill_tokens"].sum()), int(table["decode_tokens"].sum())
    stalls = len(result.outcome.steps.stall_ns)
    assert decode + int(done.sum()) + stalls == int(stream.output_tokens[done].sum())
    assert prefill + decode == int((total - 1)[done].sum()) + watch.lost
    assert int(table["preempted"].sum()) == watch.preemptions


def check_experts(result: RunResult, watch: Watch) -> None:
    """Every (token, choice) of every layer is on a slot, at token fidelity over the whole run."""
    model = result.scenario.model
    if not model.is_moe:
        assert watch.priced == 0
        return
    assert result.experts is not None
    table = result.steps_table()
    computed = int(table["prefill_tokens"].sum() + table["decode_tokens"].sum())
    moes = [p.moe for p in result.pricers if isinstance(p.moe, TokenExperts)]
    if moes:
        per_layer_L = sum(moe.slot_load_LS() for moe in moes).sum(axis=1)
        per_layer_L = per_layer_L + sum(moe.guests.load_LP for moe in moes).sum(axis=1)
        whole = not result.scenario.engine.run_ahead and result.scenario.engine.max_duration_s is None
        assert (per_layer_L == computed * model.top_k).all() if whole else (per_layer_L >= computed * model.top_k).all()


def check_steps(result: RunResult) -> None:
    """Per group: no step begins before the last one ended, and none is missing while a request is there."""
    assert result.outcome is not None
    assert result.layout is not None
    table, requests = result.steps_table(), result.outcome.requests
    assert (table["duration_ns"] > 0).all()
    finish = np.where(requests.completed, requests.finish_ns, np.iinfo(np.int64).max)
    group_of = requests.target // (result.layout.dp if result.layout.meets else 1)
    until = result.outcome.end_ns
    for group in np.unique(table["group"]):
        mine = table["group"] == group
        order = np.argsort(table["start_ns"][mine], kind="stable")
        start = table["start_ns"][mine][order]
        end = start + table["duration_ns"][mine][order]
        assert (start[1:] >= end[:-1]).all(), "steps overlap"
        arrival, gone = (x[(requests.target >= 0) & (group_of == group)] for x in (requests.arrival_ns, finish))
        for idle_from, idle_to in zip([0, *end], [*start, until], strict=True):
            if idle_from < idle_to and result.scenario.engine.max_duration_s is None:
                assert not ((arrival < idle_to) & (gone > idle_from)).any(), "a request waits at an idle group"
    assert int(requests.first_token_ns.max()) <= until


def check_json(result: RunResult) -> None:
    """The parts of the time are all of it, and shares are shares."""
    assert result.outcome is not None
    assert result.memory is not None
    explained, steps = result.explanation, result.outcome.steps
    summary = result.to_json()["summary"]
    requests = summary["requests"]
    assert requests["completed"] + requests["rejected"] + requests["unfinished"] == len(result.outcome.requests.target)
    hbm = summary["memory"]["hbm"]
    assert 0 < hbm["used"] <= result.memory.usable <= hbm["capacity"]
    if explained is None:
        assert steps.steps == 0
        return
    assert sum(explained.ns.values()) == int(steps.duration_ns.sum())
    assert min(explained.ns.values()) >= 0, explained.ns
    assert explained.steps == steps.steps
    assert sum(summary["time_share"].values()) == pytest.approx(1, abs=1e-12)
    shares = result.to_json()["provenance"]["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    loads = result.rank_load_LP()
    if loads is not None and loads.sum():
        np.testing.assert_allclose(loads.sum(axis=1), 1, rtol=1e-9)


def test_a_broken_run_is_seen(folder: Path) -> None:
    """The checks above do fail: a KV block too few booked, and a lost expert row."""
    built = scenario(folder, tiny_model(folder, **SMALL, **MODELS["first_dense"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KvShape, "units", lambda kv, tokens: kv.full_layers)
        spy(patch, Watch())
        with pytest.raises(AssertionError):
            simulate(built)
    with pytest.MonkeyPatch.context() as patch:
        draw = bank.Blocks.draw
        patch.setattr(bank.Blocks, "draw", lambda self, number, *rest: draw(self, 2 * number, *rest))
        spy(patch, Watch())
        with pytest.raises(AssertionError):
            simulate(dataclasses.replace(built))
