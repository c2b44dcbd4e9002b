"""`explain eplb`: a no where EPLB does not pay, a yes where it does, and gains that hold on rows nobody has seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cost.touch import touch
from moesim.dispatch.random import Policy as RandomDispatch
from moesim.errors import BadInput
from moesim.explain_eplb import Answer, Ask, explain_eplb, render, to_json
from moesim.explain_eplb.judge import block_rows, compare_gain, persistence
from moesim.explain_eplb.prices import StepPrices
from moesim.explain_eplb.replay import BASE, Candidate, Replay
from moesim.explain_eplb.traffic import batch_rows, thinned
from moesim.scenario.load import Scenario
from moesim.workload.loads import ExpertLoads
from tests.build import scenario, tiny_model, with_kv_tokens

LAYERS, EXPERTS, TOP_K, RANKS = 3, 64, 4, 8
STEPS = 200


def deployment(folder: Path, **engine: Any) -> Scenario:
    """Experts wide enough that a step waits for the busiest rank; 128 requests a rank."""
    model = tiny_model(
        folder,
        hidden_size=4096,
        moe={"num_experts": EXPERTS, "top_k": TOP_K, "intermediate_size": 2048, "first_dense_layers": 1},
    )
    return scenario(
        folder, model, parallel={"dp": RANKS, "ep": RANKS},
        cluster={"device": "h100_sxm_datasheet", "nodes": 1, "gpus_per_node": 8},
        engine={"max_num_seqs": 128, "max_num_batched_tokens": 512, "host_overhead_us": 20, **engine},
    )  # fmt: skip


def zipf(seed: int, exponent: float = 0.9) -> np.ndarray:
    """Shares of experts by layer, another order in each."""
    rng = np.random.default_rng(seed)
    weight = np.arange(1, EXPERTS + 1) ** -exponent
    return np.stack([rng.permutation(weight / weight.sum()) for _ in range(LAYERS)])


def recording(share_RLE: np.ndarray, seed: int = 0, tokens: int = 1024 * 2, **facts: Any) -> ExpertLoads:
    rng = np.random.default_rng(seed)
    count = rng.multinomial(tokens * TOP_K, share_RLE)
    return ExpertLoads(count, "made up", **{"top_k": TOP_K, "steps_per_row": STEPS, **facts})


def steady(rows: int = 64, **facts: Any) -> ExpertLoads:
    return recording(np.broadcast_to(zipf(3), (rows, LAYERS, EXPERTS)), **facts)


def one_hot(share: float) -> np.ndarray:
    """One expert of each layer takes `share` of all pairs, the others are alike."""
    out = np.full((LAYERS, EXPERTS), (1 - share) / (EXPERTS - 1))
    out[:, 7] = share
    return out


# ---- the verdict


def test_yes_on_skewed_steady_traffic(tmp_path: Path) -> None:
    answer = explain_eplb(steady(), deployment(tmp_path), Ask(host_ms=50))
    assert answer.enable
    assert answer.chosen.gain.value > max(0.05, answer.stages.even / 2)
    assert answer.chosen.whole.low > 0
    assert answer.chosen.gain.value <= answer.stages.even
    assert answer.chosen.played.times.balance.mean() < 0.75 * answer.base.times.balance.mean()


def test_no_on_balanced_traffic(tmp_path: Path) -> None:
    even = np.full((64, LAYERS, EXPERTS), 1 / EXPERTS)
    answer = explain_eplb(recording(even), deployment(tmp_path), Ask(host_ms=50))
    assert not answer.enable
    assert answer.bound == "balance"
    assert answer.stages.fresh < 0.01
    assert "chance" in to_json(answer)["why"]


def test_no_where_traffic_drifts_faster_than_every_interval(tmp_path: Path) -> None:
    """Every row has other hot experts: by its own tokens EPLB would gain, by the past it does not."""
    fast = np.stack([zipf(seed) for seed in range(64)])
    answer = explain_eplb(recording(fast), deployment(tmp_path), Ask(redundant=(0, 8, 16), host_ms=50))
    assert not answer.enable
    assert answer.bound == "drift"
    assert answer.stages.fresh > 0.05
    intervals = {j.played.candidate.interval_rows for j in answer.judged} - {0}
    assert min(intervals) == 1
    assert len(intervals) >= 3
    for judged in answer.judged:
        assert judged.whole.low <= 0 or judged.gain.value < 0.01
    assert answer.persistence.correlation < 0.1


def test_the_same_traffic_slower_is_a_yes_at_short_intervals(tmp_path: Path) -> None:
    """Hot experts change every 16 rows: what is placed once is worth nothing, what follows is."""
    slow = np.stack([zipf(row // 16) for row in range(128)])
    answer = explain_eplb(recording(slow), deployment(tmp_path), Ask(redundant=(8,), host_ms=50))
    assert answer.enable
    assert answer.chosen.played.candidate.interval_rows in range(1, 9)
    once = next(j for j in answer.judged if j.played.candidate.mode == "static")
    assert once.gain.value < answer.chosen.gain.low


def test_no_where_replicas_take_more_kv_than_balance_gains(tmp_path: Path) -> None:
    """One hot expert: only replicas help. With memory to spare they do; with a KV cache that one slot more shrinks by
    half they cost more than they bring."""
    loads = recording(np.broadcast_to(one_hot(0.2), (64, LAYERS, EXPERTS)))
    wide = deployment(tmp_path)
    ask = Ask(redundant=(8,), host_ms=50)
    assert explain_eplb(loads, wide, ask).enable
    prices = StepPrices(wide, 1.0)
    slot = prices.slot_bytes * LAYERS
    kv_token = 2 * 8 * 32 * 2 * 4
    narrow = with_kv_tokens(wide, int(2 * slot / kv_token))
    lengths = {"prompt_tokens": int(2 * slot / kv_token / 130), "output_tokens": 2}
    narrow = dataclasses.replace(narrow, requests=wide.requests.model_copy(update=closed(lengths)))
    answer = explain_eplb(loads, narrow, ask)
    assert not answer.enable
    assert answer.bound == "KV memory"
    assert answer.stages.moved > 0.05
    assert answer.chosen.played.batch.requests < 0.6 * answer.base.batch.requests
    # without redundant experts there is nothing to lose, and nothing to win
    assert explain_eplb(loads, narrow, Ask(redundant=(0,), host_ms=50)).chosen.gain.value < 0.01


def closed(lengths: dict[str, int]) -> dict[str, Any]:
    from moesim.workload.requests import RequestsSpec

    spec = RequestsSpec.model_validate({"format": "closed_loop", "concurrency": 1, "num_requests": 1, **lengths})
    return {name: getattr(spec, name) for name in spec.model_fields_set}


def test_no_where_the_stall_costs_more_than_it_brings(tmp_path: Path) -> None:
    slow = np.stack([zipf(row // 16) for row in range(64)])
    loads = recording(slow, steps_per_row=1)
    answer = explain_eplb(loads, deployment(tmp_path), Ask(redundant=(8,), intervals=(4,), host_ms=1000))
    assert not answer.enable
    assert answer.bound == "rebalance time"
    assert answer.stages.past > 0.02


# ---- what it says


def test_one_snapshot_is_judged_without_intervals(tmp_path: Path) -> None:
    total = steady().count_SLE.sum(axis=0, keepdims=True)
    answer = explain_eplb(ExpertLoads(total, "total", top_k=TOP_K, steps_per_row=0), deployment(tmp_path), Ask())
    assert {j.played.candidate.mode for j in answer.judged} == {"static"}
    assert answer.enable
    assert any("intervals cannot be judged" in text for text in answer.warnings)
    assert not to_json(answer)["traffic"]["timed"]


def test_few_rows_have_no_interval_and_say_so(tmp_path: Path) -> None:
    answer = explain_eplb(steady(rows=2), deployment(tmp_path), Ask(redundant=(8,)))
    report = to_json(answer)
    assert not answer.enable
    assert report["gain_interval"] is report["gain_sampling_interval"] is None
    assert "too few rows" in render(report)
    json.dumps(report, allow_nan=False)


def test_lost_order_is_not_taken_for_time(tmp_path: Path) -> None:
    fast = np.stack([zipf(row // 32) for row in range(64)])
    answer = explain_eplb(recording(fast, ordered=False), deployment(tmp_path), Ask(redundant=(8,)))
    assert all(j.played.candidate.interval_rows == 0 for j in answer.judged)
    assert answer.skip is None


def test_report_and_text(tmp_path: Path) -> None:
    answer = explain_eplb(steady(), deployment(tmp_path), Ask(host_ms=50))
    report = to_json(answer)
    text = render(report)
    assert text.startswith("enable EPLB: ")
    assert "why: max/mean load without EPLB is" in text
    assert report["flags"]["sglang"].startswith("--")
    costs = report["costs"]
    slots = report["chosen"]["num_redundant_experts"] // RANKS
    expert_bytes = 3 * 4096 * 2048 * 2
    assert costs["memory_bytes_per_rank"] == slots * LAYERS * expert_bytes
    assert sum(report["baseline"]["time_share"].values()) == pytest.approx(1)
    assert render(to_json(explain_eplb(steady(), deployment(tmp_path), Ask(host_ms=50)))) == text


def test_moves_are_all_slots(tmp_path: Path) -> None:
    loads = recording(np.stack([zipf(row // 8) for row in range(64)]))
    answer = explain_eplb(loads, deployment(tmp_path), Ask(redundant=(8,), intervals=(STEPS * 4,), host_ms=0))
    for judged in answer.judged:
        found = judged.played.moved
        if found is not None:
            assert sum(found.slots.values()) == pytest.approx(LAYERS * (EXPERTS + 8))
            assert found.slots["across"] == 0  # one node
            assert found.ns > 0


@pytest.mark.parametrize(
    ("change", "ask", "told"),
    [
        ({}, Ask(redundant=(3,)), "num_redundant_experts = 0, 8 or 16"),
        ({"top_k": 2}, Ask(), "2 experts a token"),
        ({}, Ask(modes=("sometimes",)), "unknown mode sometimes"),
        ({}, Ask(intervals=(7,)), "cannot be judged on rows of 200 steps"),
    ],
)
def test_bad_input(tmp_path: Path, change: dict[str, Any], ask: Ask, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        explain_eplb(steady(**change), deployment(tmp_path), ask)


def test_a_recording_shorter_than_a_batch_is_refused(tmp_path: Path) -> None:
    loads = recording(zipf(1)[None], tokens=1500)
    with pytest.raises(BadInput, match="1,024 tokens and the recording 1,500 in all"):
        explain_eplb(loads, deployment(tmp_path), Ask())


# ---- the parts


def replayed(folder: Path, loads: ExpertLoads, start: int, tokens: int = 1024, **change: Any) -> Replay:
    place = dataclasses.replace(deployment(folder), **change) if change else deployment(folder)
    rows = batch_rows(loads, tokens, TOP_K, 5)
    prices = StepPrices(place, place.model.num_moe_passes / len(rows.layers))
    return Replay(rows, prices, "eplb", place.policies.dispatch, start, (80.0, 20.0), 0.0, 5)


def test_maps_are_fitted_on_the_past_alone(tmp_path: Path) -> None:
    """What comes later changes no map that is in use before it."""
    share = np.broadcast_to(zipf(3), (32, LAYERS, EXPERTS))
    loads = recording(share)
    changed = loads.count_SLE.copy()
    changed[20:] = changed[20:, :, ::-1]
    kept, other = (replayed(tmp_path, dataclasses.replace(loads, count_SLE=c), 8) for c in (loads.count_SLE, changed))
    candidate = Candidate("sync", 8, 4, 4)
    a, b = kept.maps(candidate), other.maps(candidate)
    assert len(a) == 6
    np.testing.assert_array_equal(a[:4], b[:4])  # in use on rows 8 to 23, fitted on rows up to 19
    assert (a[4] != b[4]).any()


def test_slot_counts_keep_every_pair_and_follow_the_periods(tmp_path: Path) -> None:
    replay = replayed(tmp_path, steady(24), 8)
    candidate = Candidate("sync", 8, 5, 5)
    maps = replay.maps(candidate)
    count = replay.batches(1024)[8:]
    slots = replay.slot_counts(maps, count, 5)
    assert slots.shape == (16, LAYERS, EXPERTS + 8)
    for row in range(16):
        for layer in range(LAYERS):
            back = np.bincount(maps[row // 5, layer], weights=slots[row, layer], minlength=EXPERTS)
            np.testing.assert_array_equal(back, count[row, layer])


def test_batches_have_the_size_and_the_noise_of_a_batch() -> None:
    rng = np.random.default_rng(1)
    share = zipf(2)[:1]
    count = rng.multinomial(50_000 * TOP_K, np.broadcast_to(share, (400, 1, EXPERTS)))
    batch = thinned(count, 1000.0 * TOP_K, rng)
    assert abs(batch.sum(axis=-1) - 4000).max() <= EXPERTS / 2  # rounding
    mean = 4000 * share[0]
    np.testing.assert_allclose(batch.mean(axis=0)[0], mean, rtol=0.05)
    spread = batch.var(axis=0)[0] / (mean * (1 - share[0]))
    assert spread.mean() == pytest.approx(1.0, abs=0.05)


def test_few_tokens_are_merged_and_scaled_layers_stand_for_all(tmp_path: Path) -> None:
    loads = recording(np.broadcast_to(zipf(3), (90, LAYERS, EXPERTS)), tokens=400, steps_per_row=10)
    rows = batch_rows(loads, 1024, TOP_K, 0)
    assert rows.number == 30
    assert rows.row_steps == 30
    assert any("3 rows of the recording make one row here" in note for note in rows.notes)


def test_even_loads_are_the_least_time(tmp_path: Path) -> None:
    replay = replayed(tmp_path, steady(24), 8)
    base = replay.play(BASE)
    assert base is not None
    assert replay.even_ns(slice(None)) < base.full_ns_R.min()


def test_ports_of_one_expert_a_rank_are_exact(tmp_path: Path) -> None:
    """All tokens take the same four experts of four ranks: each of these receives every token but its own."""
    prices = StepPrices(deployment(tmp_path), 1.0)
    count = np.zeros((1, 1, EXPERTS))
    count[0, 0, [0, 8, 16, 24]] = 1024
    ports = prices._ports(count, 1024.0)
    assert ports.nvlink[0, 0] == pytest.approx(1024 * 7 / 8, rel=1e-6)
    assert ports.nvlink_total[0, 0] == pytest.approx(4 * 1024 * 7 / 8, rel=1e-6)
    assert ports.nic_total[0, 0] == 0


@pytest.mark.parametrize("kind", ["deepep_normal", "pairwise", "hierarchical", "allgather_reducescatter"])
def test_ports_are_those_of_tokens_counted_one_by_one(tmp_path: Path, kind: str) -> None:
    """Many independent tokens from all ranks of two nodes, counted by `touch`."""
    place = scenario(
        tmp_path, parallel={"dp": 8, "ep": 8}, cluster={"device": "h100_sxm_datasheet", "nodes": 2, "gpus_per_node": 4},
        communication={"all_to_all": kind},
    )  # fmt: skip
    prices = StepPrices(place, 1.0)
    lay = prices.layout
    if not lay.exchanges:
        assert prices.layers(np.full((1, 1, EXPERTS), 64.0), 1024.0).exchange[0] > 0
        return
    rng = np.random.default_rng(4)
    tokens = 40_000
    weight = zipf(5, 0.6)[0]
    ids = np.argsort(-(np.log(weight) + rng.gumbel(size=(tokens, EXPERTS))), axis=1)[:, None, :TOP_K]
    source = np.arange(tokens) % 8
    seen = touch(ids, source, np.array([0]), EXPERTS // 8, np.arange(8) // 4, lay.copies)
    count = np.bincount(ids.ravel(), minlength=EXPERTS)[None, None]
    ports = prices._ports(count, float(tokens))
    near = 0.05 if lay.copies == "distinct" else 0.02
    assert ports.nvlink_total[0, 0] == pytest.approx(seen.out_BL[0, 0], rel=near)
    assert ports.nic_total[0, 0] == pytest.approx(seen.node_out_BL[0, 0], rel=near)
    assert ports.nvlink[0, 0] == pytest.approx(seen.in_BLG[0, 0].max(), rel=near)
    assert ports.nic[0, 0] == pytest.approx(seen.node_in_BLN[0, 0].max() / lay.nics_shared, rel=near)


def test_persistence_takes_chance_out() -> None:
    flat = np.full((LAYERS, EXPERTS), 1 / EXPERTS)
    quiet = batch_rows(recording(np.broadcast_to(flat, (32, LAYERS, EXPERTS))), 1024, TOP_K, 0)
    assert persistence(quiet, 1).skew < 0.03
    same = batch_rows(recording(np.broadcast_to(zipf(3), (32, LAYERS, EXPERTS))), 1024, TOP_K, 0)
    kept = persistence(same, 8)
    assert kept.skew == pytest.approx(float((zipf(3) * EXPERTS).std()), rel=0.03)
    assert kept.correlation == pytest.approx(1, abs=0.03)
    halves = np.stack([zipf(row // 4) for row in range(32)])
    kept = persistence(batch_rows(recording(halves), 1024, TOP_K, 0), 4)
    assert kept.next_row == pytest.approx(24 / 31, abs=0.08)
    assert kept.correlation < 0.1


def test_blocks_are_a_period_or_the_root_of_the_rows() -> None:
    assert block_rows(64, 0) == 8
    assert block_rows(64, 10) == 10
    assert block_rows(64, 40) == 10
    assert block_rows(4, 0) == 1


@pytest.mark.parametrize(
    "memory", [pytest.param(0.8, id="settles within a block"), pytest.param(0.97, id="wanders", marks=pytest.mark.slow)]
)
def test_intervals_cover_the_gain_of_later_traffic(tmp_path: Path, memory: float) -> None:
    """40 recordings whose popularity changes from row to row: the gain on the 128 rows that follow lies in the 90 %
    interval of what was claimed about nine times of ten. 90 % of 40 less two binomial standard deviations is 32.2."""
    place = deployment(tmp_path)
    ask = Ask(redundant=(8,), intervals=(STEPS * 4,), host_ms=50)
    inside, errors = 0, []
    for seed in range(40):
        loads = wandering(seed, memory)
        answer = explain_eplb(loads.rows(0, 64), place, ask)
        claimed, got = answer.chosen.gain, later_gain(loads, answer)
        inside += claimed.low <= got <= claimed.high
        assert claimed.value > 0
        errors.append(claimed.value - got)
    assert inside >= 33
    assert np.mean(errors) < 3 * np.std(errors) / 40**0.5  # neither the fit nor the choice flatters


def wandering(seed: int, memory: float) -> ExpertLoads:
    """Some experts are hot for good; on top of that log popularity is a stationary autoregression with the correlation
    `memory` from row to row."""
    rng = np.random.default_rng(seed)
    state, shares = rng.normal(size=(LAYERS, EXPERTS)), []
    for _ in range(192):
        state = memory * state + np.sqrt(1 - memory**2) * rng.normal(size=state.shape)
        weight = zipf(seed) * np.exp(0.6 * state)
        shares.append(weight / weight.sum(axis=-1, keepdims=True))
    return recording(np.stack(shares), seed)


def later_gain(loads: ExpertLoads, answer: Answer) -> float:
    """The chosen candidate's gain on the rows after those that were explained."""
    place = answer.scenario
    rows = batch_rows(loads, answer.replay.rows.tokens, TOP_K, 99)
    later = Replay(
        rows, StepPrices(place, 1.0), "eplb", place.policies.dispatch, 64, answer.replay.mean_tokens,
        answer.replay.host_ns, 99,
    )  # fmt: skip
    candidate = dataclasses.replace(answer.chosen.played.candidate)
    base, other = later.play(BASE), later.play(candidate)
    assert base is not None
    assert other is not None
    return compare_gain(base, other, slice(None), 0).value


def test_rebalances_of_what_stays_even_are_skipped_and_needed_ones_are_not(tmp_path: Path) -> None:
    """Popularity that never changes needs no second map; one that changes every fourth period needs one in four."""
    place, ask = deployment(tmp_path), Ask(redundant=(8,), intervals=(STEPS * 4,), host_ms=50)
    kept = explain_eplb(steady(128), place, ask).skip
    assert kept is not None
    assert kept.due == 12
    assert kept.skipped >= 11
    assert kept.gain > 0
    changing = recording(np.stack([zipf(row // 4) for row in range(128)]))
    fresh = Ask(redundant=(8,), intervals=(STEPS,), host_ms=20, modes=("sync",))
    answer = explain_eplb(changing, place, fresh)
    needed, played = answer.skip, answer.chosen.played
    assert needed is not None
    assert 0.5 * needed.due < needed.skipped < 0.75 * needed.due  # a quarter of the periods begins with a change
    # what is skipped was not needed: all that it changes is the stalls that are saved
    spent = float(played.step_ns_R[needed.due :].sum()) * STEPS
    saved = needed.skipped * played.stall_ns
    assert saved > 0.05 * spent
    assert needed.gain == pytest.approx(saved / (spent - saved), rel=0.05)


def test_dispatch_of_the_scenario_is_used(tmp_path: Path) -> None:
    place = deployment(tmp_path)
    place = dataclasses.replace(place, policies=dataclasses.replace(place.policies, dispatch=RandomDispatch()))
    assert explain_eplb(steady(32), place, Ask(redundant=(8,))).replay.dispatch == RandomDispatch()
