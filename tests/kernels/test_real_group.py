"""Ranks as processes: what they compute together is what one rank computes, and what travels is what was counted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moesim_kernels.real.group import GroupFailed, RealGroup, critical_path
from moesim_kernels.real.group_rank import with_dummy
from moesim_kernels.real.rank import RealRank
from moesim_kernels.real.run import Measurement, measure
from moesim_kernels.real.work import Setting, StepWork, prepare_real, resolve
from moesim_kernels.validate.measure import write_settings
from moesim_kernels.validate.record import read_record

from moesim.cost.touch import touch
from moesim.errors import BadInput
from moesim.scenario.load import Scenario, load_scenario
from moesim.simulate import Prepared

MODEL = """
name: tiny
source: this test
num_layers: 3
hidden_size: 32
vocab_size: 40
tie_word_embeddings: false
max_position_embeddings: 64
attention: {kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8}
moe: {num_experts: 12, top_k: 3, intermediate_size: 16, router_dtype: fp32, first_dense_layers: 1,
      shared_intermediate_size: 8}
dense_intermediate_size: 24
weight_dtype: fp32
expert_dtype: fp32
kv_dtype: fp32
activation_dtype: fp32
"""
SCENARIO = """
name: tiny
model: model.yaml
cluster: {device: cpu_epyc_1thread, nodes: 1, gpus_per_node: 1, host_memory_gib: 4}
parallel: {tp: 1, dp: 1, ep: 1}
requests: {format: poisson, rate_per_s: 10, num_requests: 20, prompt_tokens: 20, output_tokens: 8}
routing: {popularity_zipf: 1.0, fidelity: token}
engine: {max_num_seqs: 6, max_num_batched_tokens: 32, max_model_len: 48, cuda_graph: false, host_overhead_us: 0}
"""
EPLB = ("policies.placement={kind: eplb, num_redundant_experts: 6}",)
CAPACITY = ("capacity.factor=1.0",)
WAYS = {"contiguous": (), "eplb with replicas": EPLB, "capacity 1.0": CAPACITY, "both": (*EPLB, *CAPACITY)}
START_S = 120.0


def scenario(folder: Path, ranks: int) -> Scenario:
    (folder / "model.yaml").write_text(MODEL)
    (folder / "scenario.yaml").write_text(SCENARIO)
    together = (f"cluster.gpus_per_node={ranks}", f"parallel.dp={ranks}", f"parallel.ep={ranks}")
    exchange = ("communication.all_to_all=pairwise",) if ranks > 1 else ()
    return load_scenario(folder / "scenario.yaml", (*together, *exchange))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("group")


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["2ranks", "3ranks"])
def group(request: pytest.FixtureRequest, folder: Path) -> Iterator[RealGroup]:
    """Started once, since processes that import torch cost seconds; the last test ends it."""
    with RealGroup(scenario(folder, request.param), seed=5, timeout_s=START_S) as started:
        yield started
    assert all(gone(pid) for pid in started.pids)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def prepared_for(group: RealGroup, overrides: tuple[str, ...]) -> Prepared:
    base = group.scenario.base
    together = (f"cluster.gpus_per_node={group.ranks}", f"parallel.dp={group.ranks}", f"parallel.ep={group.ranks}")
    named = (*together, "communication.all_to_all=pairwise", *overrides)
    return prepare_real(load_scenario(base / "scenario.yaml", named))


def sent(work: StepWork) -> np.ndarray:
    """Rows from rank to rank, counted one by one: [L, G, G]."""
    layers = work.slot_NLK.shape[1]
    out = np.zeros((layers, work.ranks, work.ranks), int)
    for token, layer, choice in np.ndindex(work.slot_NLK.shape):
        slot = work.slot_NLK[token, layer, choice]
        if slot < work.num_slots:
            out[layer, work.rank_N[token], slot // work.slots_per_rank] += 1
    return out


def alone(folder: Path, prepared: Prepared, work: StepWork) -> np.ndarray:
    """Logits [S, V] of the same choices on one rank that holds all experts, by place."""
    placement = prepared.result.experts.placement  # type: ignore[union-attr]
    expert_LS = np.pad(placement.slot_to_expert_LS, ((0, 0), (0, 1)), constant_values=placement.num_experts)
    expert_NLK = expert_LS[np.arange(len(expert_LS))[None, :, None], work.slot_NLK]
    experts = placement.num_experts
    single = replace(
        work, rank_N=np.zeros_like(work.rank_N), slot_NLK=expert_NLK, num_slots=experts, slots_per_rank=experts, ranks=1
    )
    single = replace(single, chunks=tuple(c._replace(rank=0) for c in work.chunks))
    widest = load_scenario(folder / "scenario.yaml", ["engine.max_num_seqs=20"])
    rank = RealRank(prepare_real(widest), seed=5)
    loaded = rank.load(single)
    rank.run(loaded)
    return rank.logits_SV.numpy()[np.argsort(loaded.own_N[loaded.sampled_S.numpy()])]


def mixed(ranks: int, overrides: tuple[str, ...] = ()) -> Setting:
    decode = tuple((i, 7 + i, i % ranks) for i in range(8))
    return Setting("mixed", overrides, decode, ((9, 0, 11, ranks - 1, 1), (10, 4, 5, 0, 0)))


@pytest.mark.parametrize("way", WAYS)
def test_together_ranks_compute_what_one_rank_with_all_experts_does(group: RealGroup, folder: Path, way: str) -> None:
    setting = mixed(group.ranks, WAYS[way])
    prepared = prepared_for(group, setting.overrides)
    work = resolve(prepared, setting)
    step = group.load(setting)
    times = group.run(step)
    place, logits = group.logits()
    assert place.tolist() == np.flatnonzero(work.sampled_N).tolist()
    expected = alone(folder, prepared, work)
    # the sums of a row run in another order where it stands among other rows
    np.testing.assert_allclose(logits, expected, atol=2e-5 * float(np.abs(expected).max()))
    np.testing.assert_array_equal(times.sent_LGG, sent(work))
    refused = int((work.slot_NLK == work.num_slots).sum())
    assert times.sent_LGG.sum() == work.slot_NLK.size - refused
    assert (refused > 0) == ("capacity.factor=1.0" in setting.overrides)
    assert sum(times.part_ns.values()) == times.cpu_ns
    assert sum(times.part_wall_ns.values()) == times.wall_ns
    assert set(times.part_wall_ns) == {"embedding", "own", "attention", "dispatch", "experts", "combine", "head"}
    assert min(times.part_wall_ns.values()) >= 0
    assert len(times.rank_cpu_ns) == len(times.wait_ns) == group.ranks
    group.drop(step)


@pytest.mark.parametrize("way", ["contiguous", "eplb with replicas"])
def test_rows_that_travel_are_those_that_the_simulator_counts(group: RealGroup, way: str) -> None:
    setting = mixed(group.ranks, WAYS[way])
    work = resolve(prepared_for(group, setting.overrides), setting)
    step = group.load(setting)
    travelled = group.run(step).sent_LGG * (1 - np.eye(group.ranks, dtype=int))
    counted = touch(work.slot_NLK, work.rank_N, np.array([0]), work.slots_per_rank, np.zeros(group.ranks, int), "pairs")
    np.testing.assert_array_equal(travelled.sum(axis=1), counted.in_BLG[0])
    np.testing.assert_array_equal(travelled.sum(axis=(1, 2)), counted.out_BL[0])
    group.drop(step)


def test_a_rank_without_tokens_takes_part_with_a_dummy_and_sends_nothing(group: RealGroup, folder: Path) -> None:
    setting = Setting("idle", (), tuple((i, 5 + i, 0) for i in range(6)))
    prepared = prepared_for(group, ())
    work = resolve(prepared, setting)
    step = group.load(setting)
    first, again = group.run(step), group.run(step)
    np.testing.assert_array_equal(first.sent_LGG, sent(work))
    np.testing.assert_array_equal(first.sent_LGG, again.sent_LGG)
    assert first.sent_LGG[:, 1:].sum() == 0
    assert first.sent_LGG[:, 0].sum() == work.slot_NLK.size
    expected = alone(folder, prepared, work)
    np.testing.assert_allclose(group.logits()[1], expected, atol=2e-5 * float(np.abs(expected).max()))
    group.drop(step)


def test_the_dummy_is_one_token_that_reaches_no_expert(folder: Path) -> None:
    prepared = prepare_real(scenario(folder, 2))
    work = resolve(prepared, Setting("idle", (), ((0, 5, 0),), ((1, 0, 4, 0, 1),)))
    assert with_dummy(work, 0) is work
    one = with_dummy(work, 1)
    assert (one.tokens, one.decode) == (work.tokens + 1, 2)
    assert (one.rank_N == 1).sum() == 1
    np.testing.assert_array_equal(one.rows_LS(), work.rows_LS())
    np.testing.assert_array_equal(one.sampled_N[1:], work.sampled_N)
    assert not one.sampled_N[0]


def test_what_cannot_be_loaded_is_refused_and_the_group_goes_on(group: RealGroup) -> None:
    crowd = Setting("crowd", (), tuple((i, 5, 0) for i in range(8)))  # more than max_num_seqs on one rank
    with pytest.raises(BadInput, match=r"rank 0.*8 sequences at once"):
        group.load(crowd)
    with pytest.raises(BadInput, match="20 requests"):
        group.load(Setting("no such request", (), ((99, 5, 0),)))
    four = ("cluster.gpus_per_node=4", "parallel.dp=4", "parallel.ep=4")
    with pytest.raises(BadInput, match="this has 4"):
        group.load(Setting("other ranks", four, ((0, 5, 0),)))
    step = group.load(mixed(group.ranks))
    assert group.run(step).wall_ns > 0
    group.drop(step)


def test_a_scenario_without_an_exchange_is_no_group(folder: Path) -> None:
    with pytest.raises(BadInput, match="dp = ep of at least 2"):
        RealGroup(scenario(folder, 1))


@pytest.mark.slow
def test_steps_of_one_rank_and_of_two_are_measured_in_one_record(folder: Path) -> None:
    """Where a search varies the number of ranks; each setting stands by itself, whatever requests it names."""
    scenario(folder, 1)
    two = ("cluster.gpus_per_node=2", "parallel.dp=2", "parallel.ep=2", "communication.all_to_all=pairwise")
    settings = [replace(mixed(2, (*two, *way)), name=name) for name, way in WAYS.items()]
    settings += [Setting("one", (), tuple((i, 9, 0) for i in range(5))), replace(mixed(1), name="lone", decode=())]
    write_settings(folder / "settings.json", settings)
    asked = Measurement(folder / "scenario.yaml", folder / "settings.json", folder / "record.jsonl", "seal", rounds=2)
    ended = measure(asked)
    assert not ended.refused
    record = read_record(folder / "record.jsonl", "seal")
    assert record.ranks == 2
    assert Counter(s.setting for s in record.samples) == dict.fromkeys([*WAYS, "one", "lone"], 2)
    for sample in record.samples:
        assert ("dispatch" in sample.part_ns) == (sample.setting in WAYS)


def test_the_critical_path_by_hand() -> None:
    """Two ranks, one layer: rank 1 comes to the dispatch last, rank 0 to the combine; CPU times are others."""
    rank0 = [("", 0, 100), ("own", 8, 110), ("dispatch", 9, 145), ("experts", 30, 185), ("back", 31, 196),
             ("combine", 33, 198), ("head", 40, 206)]  # fmt: skip
    rank1 = [("", 0, 103), ("own", 5, 113), ("attention", 20, 133), ("dispatch", 22, 146), ("experts", 30, 156),
             ("back", 31, 195), ("combine", 34, 198), ("head", 40, 205)]  # fmt: skip
    times = critical_path([rank0, rank1], np.zeros((1, 2, 2), np.int64))
    # from 103: rank 1's 10 own and 20 attention, 133 to 146 dispatch, rank 0 until 185, combine until 196, then 10
    assert times.wall_ns == 206 - 103
    assert times.part_wall_ns == {
        "own": 10, "attention": 20, "dispatch": 13, "experts": 39 + 2, "combine": 11, "head": 8,
    }  # fmt: skip
    # CPU: rank 1's 5 and 15, rank 0's 21 of the experts, rank 1's 3 and 6 or rank 0's 2 and 7: nine each
    assert times.part_ns == {"own": 5, "attention": 15, "dispatch": 13, "experts": 21 + 2, "combine": 11, "head": 7}
    assert times.cpu_ns == 74
    assert times.rank_cpu_ns == (40, 40)
    assert times.wait_ns == (133 - 110, 185 - 156)


@pytest.mark.slow
def test_a_worker_that_stalls_is_given_up_within_the_deadline(folder: Path) -> None:
    with RealGroup(scenario(folder, 2), timeout_s=START_S) as group:
        pids, step = group.pids, group.load(mixed(2))
        group._workers.timeout_s = 1.0
        os.kill(pids[1], signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(GroupFailed, match=r"no answer of rank \[0, 1\] within 1 s"):
            group.run(step)
        assert time.monotonic() - began < 10
    assert all(gone(pid) for pid in pids)


def test_a_worker_that_dies_is_told_and_nothing_is_left(group: RealGroup) -> None:
    pids, step = group.pids, group.load(mixed(group.ranks))
    os.kill(pids[1], signal.SIGSTOP)  # the others wait for it
    killer = threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL))
    killer.start()
    with pytest.raises(GroupFailed, match=r"mixed on \d gloo workers failed.*rank 1 was killed by signal 9"):
        group.run(step)
    killer.join()
    assert not group.alive
    with pytest.raises(GroupFailed, match="has ended"):
        group.run(step)
    assert all(gone(pid) for pid in pids)
