"""What tokens pay to travel: byte rules, back ends, shares of a batch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from moesim.communication_spec import CommunicationSpec
from moesim.cost.exchange import Exchange, Ports
from moesim.cost.operators import Operators
from moesim.cost.swaps import Swaps, Way, undo
from moesim.cost.touch import touch
from moesim.errors import BadInput
from moesim.hardware import INTERPOLATED, Curve
from moesim.layout import Copies, Layout
from moesim.memory import RankMemory, deepep_queue_bytes, low_latency_buffer_bytes, rank_memory
from moesim.model import MoEModel
from moesim.scenario.load import load_profile
from moesim.simulate import simulate
from tests.build import scenario, tiny_model, training_scenario

WAYS = get_args(Way)


def build(
    folder: Path, dp: int = 16, ep: int = 16, dtype: str = "fp8_block", **communication: Any
) -> tuple[Exchange, Operators, MoEModel]:
    """The tiny model's exchange over dp ranks of measured H100s."""
    s = scenario(
        folder, {"name": tiny_model(folder), "expert_dtype": dtype}, cluster={"device": "h100_sxm", "nodes": 8}
    )  # type: ignore[arg-type]
    ops = Operators(s.cluster.profile)
    layout = Layout.of(s.model, s.cluster, 1, dp, ep)
    return Exchange(s.model, layout, ops, CommunicationSpec(**communication)), ops, s.model


def ports(near: Any, far: Any) -> Ports:
    """Copies through the busiest ports; totals as if all ports carried as many."""
    near, far = np.asarray(near, float), np.asarray(far, float)
    return Ports(near, far, near * 16, far * 16)


def test_auto_is_the_faster_of_deepeps_two_kernels(tmp_path: Path) -> None:
    exchange, ops, model = build(tmp_path)
    copies = ports([[40.0, 900.0]], [[20.0, 500.0]])
    priced = exchange.price((1, 2), 128, copies)
    ways: tuple[tuple[Any, Way, float], ...] = (
        (priced.dispatch_ns, "dispatch", model.hidden_size * (1 + 4 / 128)),
        (priced.combine_ns, "combine", model.hidden_size * 2),
    )
    for found, way, width in ways:
        near, far = copies.nvlink * width, copies.nic * width
        expected = ops.all_to_all(near, far, 16, 2, model.top_k, "auto", way).ns
        pairs = (near * undo(16, 4) * 7 / 15, far * undo(2, 4))
        one_by_one = [
            ops.all_to_all(near, far, 16, 2, kind="normal", way=way).ns,
            ops.all_to_all(*pairs, 16, 2, kind="ll", way=way).ns,
        ]
        np.testing.assert_allclose(expected, np.minimum(*one_by_one), rtol=1e-12)
        np.testing.assert_array_equal(found, np.rint(expected).astype(np.int64))


def pairwise(**fit: float) -> Swaps:
    """Exchanges over a link of 1 GB/s without latency, and these parameters."""
    base = load_profile(Path("hw_profiles/cpu_2core.yaml"))
    node = replace(base.node, nvlink_bytes_per_s=1e9, nvlink_latency_ns=0.0)
    values = {"launch_ns": 100.0, "peer_ns": 0.0, "nvlink_eff": 1.0, **fit}
    return Swaps(replace(base, node=node, fits={"all_to_all/pairwise": values}, curves={}), True)


def test_a_dispatch_tells_how_many_rows_will_come_and_a_combine_knows() -> None:
    near, far = np.array([0.0, 1000.0]), np.zeros(2)
    swaps = pairwise(counts_ns=40.0)
    np.testing.assert_allclose(swaps.swap("pairwise", near, far, 2, 1, "dispatch")[0], [140.0, 1140.0])
    np.testing.assert_allclose(swaps.swap("pairwise", near, far, 2, 1, "combine")[0], [100.0, 1100.0])


def test_ports_that_share_a_medium_cost_what_all_ranks_send() -> None:
    near, far = np.array([1000.0, 1000.0]), np.zeros(2)
    total = np.array([2000.0, 1000.0])  # both ranks send, or one alone
    for shared, expected in ((0.0, [1100.0, 1100.0]), (0.5, [1100.0, 850.0]), (1.0, [1100.0, 600.0])):
        swaps = pairwise(shared=shared)
        np.testing.assert_allclose(swaps.swap("pairwise", near, far, 2, 1, total=total)[0], expected)
        np.testing.assert_allclose(swaps.swap("pairwise", near, far, 2, 1)[0], [1100.0, 1100.0])


def test_ways_that_were_measured_apart_have_curves_of_their_own() -> None:
    swaps = pairwise()
    axis, flat = (np.array([1.0, 1e6]),), np.zeros(2)
    curves = tuple(Curve((f"pairwise/{way}", 2), "pairwise", axis, flat + i) for i, way in enumerate(WAYS, 1))
    swaps = Swaps(replace(swaps.profile, curves={"all_to_all": curves}), True)
    near, far = np.array([1000.0]), np.zeros(1)
    for i, way in enumerate(WAYS, 1):
        ns, grade = swaps.swap("pairwise", near, far, 2, 1, way)
        np.testing.assert_allclose(ns, 1100.0 * np.exp(i))
        assert grade == [INTERPOLATED]


def test_experts_split_over_ranks_gather_all_tokens(tmp_path: Path) -> None:
    exchange, ops, model = build(tmp_path, ep=8)
    priced = exchange.price((3, 2), np.array([5, 6, 7]), None)
    size = np.array([5.0, 6.0, 7.0]) * model.hidden_size * 2
    np.testing.assert_array_equal(priced.dispatch_ns[:, 1], np.rint(ops.all_gather(size, 16, True).ns))
    np.testing.assert_array_equal(priced.combine_ns[:, 0], np.rint(ops.reduce_scatter(size, 16, True).ns))


@pytest.mark.parametrize("ep", [16, 8])
def test_a_share_of_the_tokens_is_priced_as_that_many(tmp_path: Path, ep: int) -> None:
    exchange, _, _ = build(tmp_path, ep=ep)
    whole = ports([[400.0, 900.0]], [[200.0, 500.0]]) if ep == 16 else None
    part = ports([[100.0, 225.0]], [[50.0, 125.0]]) if ep == 16 else None
    quarter, own = exchange.price((1, 2), 64, whole, share=0.25), exchange.price((1, 2), 16, part)
    for a, b in zip(quarter, own, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- which copies travel


def by_hand(
    slot_TLK: np.ndarray, source_T: np.ndarray, spr: int, ranks: int, node: int, copies: Copies
) -> tuple[np.ndarray, np.ndarray]:
    """Received over NVLink [L, G] and over NICs [L, N or G], token by token."""
    tokens, layers, choices = slot_TLK.shape
    by_rank = copies in ("pairs", "two_level")
    near = np.zeros((layers, ranks), int)
    far = np.zeros((layers, ranks if by_rank else -(-ranks // node)), int)
    for t in range(tokens):
        home = int(source_T[t])
        for layer in range(layers):
            targets = [int(slot_TLK[t, layer, k]) // spr for k in range(choices)]
            targets = [g for g in targets if g < ranks]
            if copies == "pairs":
                for g in targets:
                    near[layer, g] += g != home and g // node == home // node
                    far[layer, g] += g // node != home // node
            elif copies == "two_level":
                for g in targets:
                    stop = home // node * node + g % node
                    near[layer, stop] += stop != home
                    far[layer, g] += g != stop
            else:
                for g in set(targets) - {home}:
                    near[layer, g] += 1
                for n in {g // node for g in targets} - {home // node}:
                    far[layer, n] += 1
                first = int(slot_TLK[t, layer, 0]) // spr
                if copies == "coherent" and first < ranks:
                    home = first
    return near, far


@pytest.mark.parametrize("copies", ["distinct", "pairs", "two_level", "coherent"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_copies_are_those_counted_by_hand(copies: Copies, top_k: int) -> None:
    rng = np.random.default_rng(7)
    ranks, node, spr, tokens = 8, 4, 2, 60
    slot = rng.permuted(np.tile(np.arange(16), (tokens, 5, 1)), axis=-1)[..., :top_k]
    slot[rng.random(slot.shape) < (0.1 if top_k > 1 else 0.0)] = 16  # no expert
    source = rng.integers(ranks, size=tokens)
    starts = np.array([0, 25])
    found = touch(slot, source, starts, spr, np.arange(ranks) // node, copies)
    for b, part in enumerate((slice(0, 25), slice(25, 60))):
        near, far = by_hand(slot[part], source[part], spr, ranks, node, copies)
        np.testing.assert_array_equal(found.in_BLG[b], near)
        np.testing.assert_array_equal(found.node_in_BLN[b], far)


def test_every_pair_that_leaves_a_rank_arrives_somewhere() -> None:
    rng = np.random.default_rng(3)
    ranks, node = 16, 4
    slot = rng.permuted(np.tile(np.arange(32), (200, 3, 1)), axis=-1)[..., :6]
    source = rng.integers(ranks, size=200)
    nodes = np.arange(ranks) // node
    pairs, two = (touch(slot, source, np.zeros(1, int), 2, nodes, how) for how in ("pairs", "two_level"))  # type: ignore[arg-type]
    target = slot // 2
    away = target != source[:, None, None]
    far = target // node != (source // node)[:, None, None]
    np.testing.assert_array_equal(pairs.out_BL[0] + pairs.node_out_BL[0], away.sum(axis=(0, 2)))
    np.testing.assert_array_equal(pairs.node_out_BL[0], far.sum(axis=(0, 2)))
    # 2DH crosses nodes with the same pairs, and sends over NVLink those whose number in the node is another's
    np.testing.assert_array_equal(two.node_in_BLN, pairs.node_in_BLN)
    np.testing.assert_array_equal(two.out_BL[0], (target % node != (source % node)[:, None, None]).sum(axis=(0, 2)))
    one = np.zeros(ranks, int)
    alike = [touch(slot, source, np.zeros(1, int), 2, one, how).in_BLG for how in ("pairs", "two_level")]  # type: ignore[arg-type]
    np.testing.assert_array_equal(*alike)  # one node: 2DH is the plain all-to-all


def test_a_coherent_chain_travels_once_a_change_of_rank() -> None:
    # experts 0..3 on four ranks: the token goes 2, 2, 1, 3 and starts on rank 0
    slot = np.array([2, 2, 1, 3]).reshape(1, 4, 1)
    found = touch(slot, np.array([0]), np.zeros(1, int), 1, np.array([0, 0, 1, 1]), "coherent")
    np.testing.assert_array_equal(found.in_BLG[0], [[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(found.node_in_BLN[0], [[0, 1], [0, 0], [1, 0], [0, 1]])


# ---- bytes and prices


def test_low_latency_bytes_are_deepeps_own(tmp_path: Path) -> None:
    """DeepEP's tests/legacy/test_low_latency.py: 128 tokens, top 8, hidden 7168: 77 and 114 us are 98 and 129 GB/s."""
    exchange, _, model = build(tmp_path, all_to_all="deepep_low_latency")
    assert exchange.dispatch_bytes == model.hidden_size * (1 + 4 / 128) + 16
    wide = 7168 * (1 + 4 / 128) + 16
    assert wide * 128 * 8 / 77e3 == pytest.approx(98, abs=0.6)
    width = exchange.combine_bytes / model.hidden_size * 7168
    assert width * 128 * 8 / 114e3 == pytest.approx(129, abs=0.3)


@pytest.mark.parametrize(
    ("how", "dtype", "there"),
    [
        ("deepep_normal", "fp8_block", 256 * (1 + 4 / 128)),
        ("deepep_normal", "bf16", 512),
        ("deepep_low_latency", "bf16", 512 + 16),
        ("pairwise", "fp8_block", 512),
        ("hierarchical", "fp8_block", 512),
    ],
)
def test_bytes_of_a_copy(tmp_path: Path, how: str, dtype: str, there: float) -> None:
    exchange, _, _ = build(tmp_path, dtype=dtype, all_to_all=how)
    assert exchange.dispatch_bytes == there
    assert exchange.combine_bytes == 512


BACK_ENDS = ["auto", "deepep_normal", "deepep_v2", "deepep_low_latency", "pairwise", "hierarchical"]


@pytest.mark.parametrize("how", BACK_ENDS)
@pytest.mark.parametrize("dp", [8, 16, 64])
def test_more_copies_never_take_less_time(tmp_path: Path, how: str, dp: int) -> None:
    exchange, _, _ = build(tmp_path, dp=dp, ep=dp, all_to_all=how)
    copies = np.geomspace(1, 1e5, 60)[None]
    far = copies / 3 if dp > 8 else copies * 0
    priced = exchange.price(copies.shape, 1.0, ports(copies, far))
    for ns in (priced.dispatch_ns, priced.combine_ns):
        assert (ns > 0).all()
        # between two knots a residual may bend a price by a per cent
        assert (ns[0, 1:] >= ns[0, :-1] * 0.99).all()
        assert ns[0, -1] > 2 * ns[0, 0]
    nothing = exchange.price((1, 1), 1.0, ports([[0.0]], [[0.0]]))
    assert nothing.dispatch_ns == nothing.combine_ns == 0


def test_low_latency_sends_large_batches_in_turns(tmp_path: Path) -> None:
    exchange, _, _ = build(tmp_path, all_to_all="deepep_low_latency", max_dispatch_tokens=64)
    one = exchange.price((1, 1), 64, ports([[200.0]], [[300.0]]))
    four = exchange.price((1, 1), 256, ports([[800.0]], [[1200.0]]))
    assert four.dispatch_ns == pytest.approx(4 * one.dispatch_ns[0, 0], abs=2)
    assert exchange.price((1, 1), 65, ports([[200.0]], [[300.0]])).dispatch_ns > one.dispatch_ns


@pytest.mark.parametrize("how", ["deepep_normal", "deepep_v2"])
def test_more_multiprocessors_carry_more_until_the_links_are_full(tmp_path: Path, how: str) -> None:
    sent = ports([[6e6]], [[0.0]])
    sms = (2, 4, 8, 16, 32, 64, 128)
    made = [build(tmp_path, dp=8, ep=8, all_to_all=how, sms=n)[0] for n in sms]
    ns = np.array([int(e.price((1, 1), 1.0, sent).dispatch_ns[0, 0]) for e in made])
    assert (np.diff(ns) <= 0).all()
    assert ns[0] == pytest.approx(2 * ns[1], rel=0.05)
    assert ns[-1] == pytest.approx(ns[-2], rel=0.01)
    scales = [e.compute_scale for e in made]
    assert scales == pytest.approx([1 - n / 132 for n in sms])


def test_multiprocessors_left_to_compute(tmp_path: Path) -> None:
    taken = {how: build(tmp_path, all_to_all=how)[0].sms for how in BACK_ENDS}
    assert taken["deepep_low_latency"] == 0
    assert taken["deepep_v2"] < taken["deepep_normal"] == taken["auto"] == 20
    assert build(tmp_path, all_to_all="deepep_low_latency")[0].compute_scale == 1.0


def test_a_gather_back_end_costs_what_split_experts_do(tmp_path: Path) -> None:
    whole, _, _ = build(tmp_path, all_to_all="allgather_reducescatter")
    split, _, _ = build(tmp_path, ep=8)
    for a, b in zip(whole.price((1, 2), 40, None), split.price((1, 2), 40, None), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_levels_on_one_node_are_the_plain_all_to_all(tmp_path: Path) -> None:
    plain, two = (build(tmp_path, dp=8, ep=8, all_to_all=how)[0] for how in ("pairwise", "hierarchical"))
    sent = ports([[40.0, 4000.0]], [[0.0, 0.0]])
    for a, b in zip(plain.price((1, 2), 40, sent), two.price((1, 2), 40, sent), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_levels_win_where_many_ranks_send_little(tmp_path: Path) -> None:
    """Tutel's reason for 2DH: few large messages instead of many small ones; with much to send the extra hop costs."""
    plain, two = (build(tmp_path, dp=64, ep=64, all_to_all=how)[0] for how in ("pairwise", "hierarchical"))
    little, much = (np.full((1, 1), n) for n in (8.0, 3e6))
    for copies, wins in ((little, True), (much, False)):
        a = plain.price((1, 1), 1, ports(copies * 7 / 64, copies * 7 / 8))
        b = two.price((1, 1), 1, ports(copies * 7 / 8, copies * 7 / 8))
        assert (b.dispatch_ns < a.dispatch_ns) == wins


def test_coherent_needs_no_combine_and_gathers_once(tmp_path: Path) -> None:
    plain, ops, _ = build(tmp_path, all_to_all="deepep_normal")
    coherent, _, _ = build(tmp_path, all_to_all="deepep_normal", coherent=True)
    sent = ports(np.full((1, 3), 400.0), np.full((1, 3), 100.0))
    a, b = plain.price((1, 3), 32, sent), coherent.price((1, 3), 32, sent)
    gather = ops.all_gather(32 * 4 * 2 * 8 * 32 * 2.0, 16, True).ns  # keys and values of 4 layers, 8 heads of 32, bf16
    np.testing.assert_array_equal(b.dispatch_ns - a.dispatch_ns, [[round(float(gather)), 0, 0]])
    assert not b.combine_ns.any()
    assert a.combine_ns.all()


# ---- memory


def test_low_latency_buffers_are_deepeps_size_hint() -> None:
    # csrc/legacy/config.hpp by hand: 256 experts x 128 tokens x 14,560 bytes (bf16 and 4 bytes for 128 elements), sent
    # and received, twice; 2 x 1,024 bytes of signals; rounded up past 128
    assert low_latency_buffer_bytes(128, 7168, 64, 256) == 4 * 256 * 128 * 14560 + 2048 + 128
    assert low_latency_buffer_bytes(256, 7168, 64, 256) > 2 * low_latency_buffer_bytes(128, 7168, 64, 256) - 4096


def test_deepep_queues_are_its_size_hints() -> None:
    # 20 SMs are 10 channels; 8 peers with 256 tokens of 14,336 + 8 + 2,048 bytes and 5 counters each
    assert deepep_queue_bytes(14336, 8, 20) == (-(-10 * 8 * (5 * 4 + 256 * 16392) // 128) * 128, 0)
    # 4 nodes: 288 tokens a peer, 11 counters; over NICs 128 tokens a node, sent and received, with 16 bytes more
    nvlink, nic = deepep_queue_bytes(14336, 32, 20)
    assert nvlink == -(-10 * 8 * (11 * 4 + 288 * 16392) // 128) * 128
    assert nic == -(-10 * 4 * 2 * (18 * 4 + 128 * (16392 + 16)) // 128) * 128
    # 16 ranks send 20 at once, which rounds 128 up to 140
    assert deepep_queue_bytes(14336, 16, 20)[1] == -(-10 * 2 * 2 * (18 * 4 + 140 * 16408) // 128) * 128


def test_memory_by_back_end(tmp_path: Path) -> None:
    def buffers(how: str, **more: Any) -> RankMemory:
        s = scenario(
            tmp_path, parallel={"dp": 8, "ep": 8}, communication={"all_to_all": how, **more},
            engine={"max_num_batched_tokens": 1000},
        )  # fmt: skip
        layout = Layout.of(s.model, s.cluster, 1, 8, 8, s.communication)
        return rank_memory(s.model, s.cluster, layout, s.engine, 8)

    row = 256 * 2
    assert buffers("auto").exchange_buffers == 2 * 1000 * 4 * row
    assert buffers("pairwise").exchange_buffers == 2 * 1000 * 4 * row
    assert buffers("hierarchical").exchange_buffers == 3 * 1000 * 4 * row
    assert buffers("allgather_reducescatter").exchange_buffers == 2 * 1000 * 8 * row
    normal = buffers("deepep_normal").exchange_buffers
    assert normal == 2 * 1000 * 4 * row + sum(deepep_queue_bytes(row, 8, 20))
    for cap in (16, 128):
        quick = buffers("deepep_low_latency", max_dispatch_tokens=cap).exchange_buffers
        assert quick == low_latency_buffer_bytes(cap, 256, 8, 64)


def test_a_coherent_rank_keeps_every_ranks_context(tmp_path: Path) -> None:
    name = tiny_model(tmp_path, moe={"top_k": 1})
    s = scenario(tmp_path, name, parallel={"dp": 8, "ep": 8}, communication={"coherent": True})
    plain, coherent = (
        rank_memory(s.model, s.cluster, Layout.of(s.model, s.cluster, 1, 8, 8, how), s.engine, 8)
        for how in (None, s.communication)
    )
    assert coherent.kv_units == pytest.approx(plain.kv_units / 8, abs=1)
    assert coherent.kv_cache <= plain.kv_cache
    assert coherent.kv_cache == pytest.approx(plain.kv_cache, rel=1e-3)


# ---- scenarios


@pytest.mark.parametrize(
    ("communication", "parallel", "told"),
    [
        ({"all_to_all": "deepep_normal"}, {"dp": 8, "ep": 4}, "needs a MoE model, dp > 1 and ep = tp * dp: dp=8, ep=4"),
        ({"all_to_all": "pairwise"}, {"tp": 8}, "dp > 1"),
        ({"all_to_all": "hierarchical"}, {"dp": 4, "ep": 4}, None),
        ({"all_to_all": "allgather_reducescatter"}, {"dp": 8, "ep": 4}, None),
        ({"all_to_all": "deepep_normal"}, {"dp": 12, "ep": 12}, "whole nodes"),
        ({"all_to_all": "deepep_normal", "sms": 21}, {"dp": 8, "ep": 8}, "must be even"),
        ({"all_to_all": "deepep_normal", "sms": 132}, {"dp": 8, "ep": 8}, "multiprocessors to compute on"),
        ({"all_to_all": "deepep_low_latency", "sms": 20}, {"dp": 8, "ep": 8}, "must be 0"),
        ({"max_dispatch_tokens": 64}, {"dp": 8, "ep": 8}, "deepep_low_latency"),
        ({"coherent": True}, {"dp": 8, "ep": 8}, "top_k=4"),
        ({"coherent": True}, {"dp": 8, "ep": 4}, "ep = tp * dp"),
        ({"coherent": True, "all_to_all": "pairwise"}, {"dp": 8, "ep": 8}, "once a rank"),
    ],
)
def test_what_a_back_end_needs(tmp_path: Path, communication: Any, parallel: Any, told: str | None) -> None:
    model = tiny_model(tmp_path, moe={"num_experts": 48}) if parallel.get("dp") == 12 else None
    parts = {"parallel": parallel, "communication": communication}
    if told is None:
        scenario(tmp_path, model, **parts)
        return
    with pytest.raises(BadInput, match=re.escape(told)):
        scenario(tmp_path, model, **parts)


def test_training_refuses_a_coherent_context(tmp_path: Path) -> None:
    name = tiny_model(tmp_path, moe={"top_k": 1})
    with pytest.raises(BadInput, match="is for serving"):
        training_scenario(tmp_path, name, communication={"coherent": True})


@pytest.mark.parametrize("fidelity", ["token", "count"])
def test_back_ends_in_a_run(tmp_path: Path, fidelity: str) -> None:
    """Each runs on two nodes; exchanges differ, all else is the same; a coherent top-1 model sends no combine."""
    name = tiny_model(tmp_path, moe={"top_k": 1})
    seen: dict[str, dict[str, int]] = {}
    ways: list[dict[str, Any]] = [{"all_to_all": how} for how in [*BACK_ENDS, "allgather_reducescatter"]]
    for how in [*ways, {"all_to_all": "deepep_normal", "coherent": True}]:
        s = scenario(
            tmp_path, name, parallel={"dp": 16, "ep": 16}, routing={"fidelity": fidelity}, communication=how,
            requests={"format": "closed_loop", "concurrency": 32, "num_requests": 32, "prompt_tokens": 40,
                      "output_tokens": 3},
        )  # fmt: skip
        result = simulate(s)
        assert result.feasible
        assert result.explanation is not None
        seen["coherent" if how.get("coherent") else how["all_to_all"]] = result.explanation.ns
    for how, ns in seen.items():
        assert ns["dispatch"] > 0
        assert ("combine" in ns) == (how != "coherent")
        if how != "allgather_reducescatter":
            assert ns["experts"] == seen["auto"]["experts"]
    # a rank that gathers all tokens walks past rows of others
    assert seen["allgather_reducescatter"]["experts"] > seen["auto"]["experts"]
    assert len({ns["dispatch"] for ns in seen.values()}) >= 6


def test_too_large_a_dispatch_cap_is_infeasible_and_told_which_fits(tmp_path: Path) -> None:
    def run(cap: int, memory: float) -> Any:
        return simulate(
            scenario(
                tmp_path, parallel={"dp": 8, "ep": 8}, engine={"gpu_memory_utilization": memory},
                communication={"all_to_all": "deepep_low_latency", "max_dispatch_tokens": cap},
            )
        )  # fmt: skip

    # 64 experts' 32,768 rows twice, sent with 520 bytes (bf16, least and greatest), received with 528 (a header)
    refused = run(32768, 0.03)
    assert not refused.feasible
    assert f"exchange_buffers {2 * (64 * 32768 * (520 + 528) + 256) + 128:,} B" in refused.reasons[0]
    mend = next(reason for reason in refused.reasons if "max_dispatch_tokens" in reason)
    assert mend == "Or communication.max_dispatch_tokens=1024."
    assert run(1024, 0.03).feasible
