"""Precision policies, what follows of them, and adapters: cases worked by hand and against brute force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput, Infeasible
from moesim.offload import CacheSemantics, Compressed, MissCosts, OffloadContext, RouteSample, StepRoutes
from moesim.offload.adapters import ExpertAdapters, redirect, slot_table
from moesim.offload.compression import apply, stored_bytes_LE, total_bytes
from moesim.offload.precision.premoe import reload_bytes
from moesim.policy import load_policy
from moesim.scenario.load import load_model

ROOT = Path(__file__).parents[2]


def context(popularity, k=1, size=800, fit=None, shape=(10, 8)):
    popularity = np.asarray(popularity, float)
    layers, experts = popularity.shape
    costs = MissCosts(1.0, lambda rows: 1.0, lambda rows: 1.0, 0.0, 1.0)
    size_LE = np.full((layers, experts), size, np.int64)
    return OffloadContext(
        layers, experts, k, size_LE, 10_000, 1, popularity, CacheSemantics(), costs, 0, fit, expert_shape=shape
    )


def compress(ctx, bits=16.0, **value):
    return load_policy("precision", value).compress(ctx, bits)


def sample(ids, weight=None):
    ids = np.asarray(ids)
    return RouteSample(ids, np.zeros(len(ids), np.int64), None if weight is None else np.asarray(weight, float))


# ---- sizes


def test_four_bits_with_a_scale_for_128_are_four_and_an_eighth():
    ctx = context(np.ones((2, 4)))
    compressed = compress(ctx, kind="uniform")
    assert (compressed.bits_LE == 4.125).all()
    assert stored_bytes_LE(ctx, compressed, 16.0).tolist() == [[207] * 4] * 2  # 800 * 4.125 / 16 = 206.25
    assert (compress(ctx, kind="uniform", width=3.0, group=None).bits_LE == 3).all()


def test_ternary_weights():
    ctx = context(np.ones((1, 2)))
    assert compress(ctx, kind="mote").bits_LE.tolist() == [[2.0, 2.0]]
    assert compress(ctx, kind="mote", packing="ideal").bits_LE[0, 0] == pytest.approx(1.584962500721156)


def test_latent_factors_by_hand():
    # d = 10, n = 8, N = 4, m = 5: an expert's own 5/10 of 800 bytes; a layer's shared factor 5/8 of one expert's bytes
    ctx = context(np.ones((2, 4)))
    compressed = compress(ctx, kind="mole", latent=0.5)
    assert stored_bytes_LE(ctx, compressed, 16.0).tolist() == [[400] * 4] * 2
    assert compressed.extra_bytes == 2 * 500
    assert total_bytes(ctx, compressed, 16.0) / ctx.size_LE.sum() == pytest.approx(5 / 10 + 5 / (4 * 8))
    assert compress(ctx, kind="mole", latent=0.25, group=2).extra_bytes == 2 * 2 * 200  # round(2.5) = 2: 2/8 of 800
    assert apply(ctx, compressed, 16.0).capacity_bytes == 9_000
    with pytest.raises(Infeasible, match="500 bytes are missing"):
        apply(replace(ctx, capacity_bytes=500), compressed, 16.0)
    with pytest.raises(BadInput, match="expert_shape"):
        compress(replace(ctx, expert_shape=None), kind="mole")


def test_hobbits_copies():
    compressed = compress(context(np.ones((1, 4))), kind="hobbit", high=0.5, low=0.2)
    assert compressed.miss_bits == ((0.5, 16.0), (0.2, 4.0), (0.0, 2.0))
    assert compress(context(np.ones((1, 4))), 4.0, kind="hobbit").miss_bits == ((0.6, 4.0), (0.3, 4.0), (0.0, 2.0))


def test_what_is_used_more_has_more_bits():
    popularity = [[100.0, 10, 10, 1], [1, 1, 1, 1]]
    compressed = compress(context(popularity), kind="mc_moe", average=2.0, group=None)
    # one at 3 and the least used at 1, of equals any; all in 8 bits
    assert compressed.bits_LE[0].tolist() == [3, 2, 2, 1]
    assert sorted(compressed.bits_LE[1].tolist()) == [1, 2, 2, 3]
    assert (compress(context(popularity), kind="mc_moe", average=2.0).bits_LE[0] == [3.25, 2.25, 2.25, 1.25]).all()
    # gate weights in the sample count with an exponent of 1.5, and errors that are given replace 4^-b
    fit = sample([[[0]], [[1]], [[2]], [[3]]], [[[0.1]], [[0.1]], [[0.1]], [[0.9]]])
    assert compress(context(np.ones((1, 4)), fit=fit), kind="mc_moe", average=2.0, group=None).bits_LE[0, 3] == 3
    error = [[1.0, 1, 1, 9, 1, 1, 1, 1, 1, 1, 1, 1]]
    chosen = compress(context(np.ones((1, 4))), kind="mc_moe", average=2.0, group=None, error=error).bits_LE
    assert chosen[0, 1] >= 2
    # one bit costs expert 0 8 - 4 and expert 1 1.5 - 0.2 in error; of their tenth powers 0.082 and 0.190
    error = [[8.0, 4, 4, 1.5, 0.2, 0.2, 9, 0.1, 0.05, 9, 0.1, 0.05]]
    for gamma, least in ((1.0, 1), (0.1, 0)):
        given = compress(
            context(np.ones((1, 4))), kind="mc_moe", average=2.0, group=None, error=error, gamma=gamma, alpha=1.0
        )
        assert given.bits_LE[0].argmin() == least


def test_edgemoe_lowers_the_least_sensitive_first():
    ctx = context(np.ones((1, 4)))
    given = compress(ctx, kind="edgemoe", average=5.0, sensitivity=[[4.0, 3.0, 2.0, 1.0]])
    assert given.bits_LE.tolist() == [[8, 4, 4, 4]]
    by_use = compress(context([[1.0, 2, 3, 4]]), kind="edgemoe", average=7.0)
    assert by_use.bits_LE.tolist() == [[4, 8, 8, 8]]
    assert (compress(ctx, 4.125, kind="edgemoe").bits_LE <= 4.125).all()


# ---- merging and pruning


def test_merging_by_hand():
    # Layer 1: experts 0 and 1 are dominant. Tokens of 2 come from where those of 0 come from, tokens of 3 from 1's.
    ids = [[[0], [0]]] * 6 + [[[1], [1]]] * 5 + [[[0], [2]]] * 2 + [[[1], [3]]] * 2
    fit = sample(ids)
    ctx = context(fit.count_LE(4), fit=fit)
    compressed = compress(ctx, kind="mc_smoe", groups=2)
    assert compressed.map_LE.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert stored_bytes_LE(ctx, compressed, 16.0).tolist() == [[800] * 4, [800, 800, 0, 0]]
    new = apply(ctx, compressed, 16.0)
    assert new.popularity_LE.tolist() == [[8, 7, 0, 0], [8, 7, 0, 0]]
    assert new.size_LE.tolist() == [[800] * 4, [800, 800, 1, 1]]
    assert new.fit.expert_TLK[:, 1, 0].tolist() == [0] * 6 + [1] * 5 + [0] * 2 + [1] * 2
    # rank 2 of 10 x 8 and a tenth of the columns: 2 * 18 / 80 + 0.1 = 0.55
    factored = compress(ctx, kind="mc_smoe", groups=2, rank=2)
    assert stored_bytes_LE(ctx, factored, 16.0)[1].tolist() == [440, 440, 0, 0]


def test_dominant_experts_are_shared_out_over_layers():
    """Six for two layers: each layer's first, then by use over the layer's largest."""
    ctx = context([[10.0, 9, 8, 7], [100, 50, 3, 2], [5, 5, 5, 5]])
    compressed = compress(ctx, kind="mc_smoe", groups=3, unmerged=[2])
    own = compressed.map_LE == np.arange(4)
    assert own.sum(axis=1).tolist() == [4, 2, 4]
    assert compressed.map_LE[1].tolist() == [0, 1, 0, 1]  # nothing known: dealt out in turn, by use


def test_pruning_keeps_what_a_task_uses():
    # 2 goes with 0 in a token, 3 with 1
    fit = sample([[[0, 1]], [[0, 2]], [[1, 3]], [[0, 1]]], [[[0.5, 0.5]], [[0.6, 0.4]], [[0.9, 0.1]], [[0.5, 0.5]]])
    ctx = context(fit.count_LE(4), k=2, fit=fit)
    dropped = compress(ctx, kind="premoe", kept=2, fall="drop")
    assert dropped.map_LE.tolist() == [[0, 1, 4, 4]]
    assert apply(ctx, dropped, 16.0).fit.expert_TLK[:, 0].tolist() == [[0, 1], [0, 4], [1, 4], [0, 1]]
    # profiles: 0 -> (1: 2, 2: 1), 1 -> (0: 2, 3: 1), 2 -> (0: 1), 3 -> (1: 1). 2 is like 1, 3 is like 0.
    assert compress(ctx, kind="premoe", kept=2).map_LE.tolist() == [[0, 1, 1, 0]]
    # gate weights: 0 has 1.6, 1 has 1.9, so one alone would be 1
    one = context(fit.count_LE(4), k=1, fit=fit)
    assert compress(one, kind="premoe", kept=1, fall="drop").map_LE.tolist() == [[4, 1, 4, 4]]
    other = compress(ctx, kind="premoe", kept=2, fall="drop", importance=[[0.0, 2, 1, 0]])
    assert other.map_LE.tolist() == [[4, 1, 2, 4]]
    assert reload_bytes(dropped, other, stored_bytes_LE(ctx, other, 16.0)) == 800  # expert 2
    assert reload_bytes(other, other, stored_bytes_LE(ctx, other, 16.0)) == 0


# ---- while it serves


def step(weight, ids=None, prompt=False, score=None, number=0):
    weight = np.asarray(weight, float)[:, None]
    ids = np.tile(np.arange(weight.shape[2]), (len(weight), 1, 1)) if ids is None else np.asarray(ids)[:, None]
    score = None if score is None else np.asarray(score, float)[:, None]
    return StepRoutes(number, ids, np.zeros(len(weight), np.int64), weight, prompt, score)


def test_the_second_expert_is_dropped_where_it_weighs_little():
    policy = load_policy("precision", {"kind": "mc_moe", "drop": 0.5})
    one = step([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    assert policy.prune(one, 0).tolist() == [[False, False], [False, True], [True, False], [False, False]]
    assert load_policy("precision", "mc_moe").prune(one, 0) is None
    # only in the layers with the least loss
    some = load_policy("precision", {"kind": "mc_moe", "drop": 0.5, "layers": 2, "layer_loss": [5.0, 1.0, 3.0, 2.0]})
    deep = replace(one, weight_TLK=np.repeat(one.weight_TLK, 4, axis=1))
    assert [some.prune(deep, layer) is not None for layer in range(4)] == [False, True, False, True]
    # a tenth of a prompt's tokens keep all, output tokens do not
    weak = [[0.9, 0.1]] * 20
    most = load_policy("precision", {"kind": "mc_moe", "drop": 0.5, "protect": 0.1})
    assert most.prune(step(weak, prompt=True), 0).sum() == 18
    assert most.prune(step(weak), 0).sum() == 20


def test_hobbit_skips_what_hardly_counts():
    policy = load_policy("precision", {"kind": "hobbit", "skip": 0.2})
    assert policy.prune(step([[0.9, 0.1], [0.8, 0.2]]), 0).tolist() == [[False, True], [False, False]]
    # of the token's largest, not of all: 0.15 is more than a fifth of 0.5, 0.07 is not
    assert policy.prune(step([[0.5, 0.15, 0.35], [0.5, 0.43, 0.07]]), 0).tolist() == [[False] * 3, [False, False, True]]


def test_routes_drift_to_the_next_best():
    policy = load_policy("precision", {"kind": "eaquant", "drift_share": 1.0})
    one = step([[0.7, 0.3]], [[3, 1]], score=[[0.0, 2.0, 1.5, 3.0, 1.0]])
    assert policy.drift(one, 0, 5).tolist() == [[3, 2]]
    blind = step([[0.3, 0.7]] * 50, [[3, 1]] * 50)
    moved = policy.drift(blind, 0, 5)
    assert (moved[:, 1] == 1).all()
    assert set(moved[:, 0].tolist()) == {0, 2, 4}
    assert load_policy("precision", "eaquant").drift(one, 0, 5) is None
    # a tenth of 4,000 tokens: 400, four standard deviations are 76
    tenth = load_policy("precision", {"kind": "eaquant", "drift_share": 0.1})
    many = step([[0.7, 0.3]] * 4000, [[3, 1]] * 4000)
    changed = (tenth.drift(many, 0, 5) != many.expert_TLK[:, 0]).any(axis=1)
    assert abs(changed.sum() - 400) < 76


# ---- adapters


@pytest.fixture(scope="module")
def lite():
    return load_model(ROOT / "workloads" / "models" / "deepseek-v2-lite.yaml")


def test_pages_against_a_set_of_all_pages(lite):
    rng = np.random.default_rng(0)
    small = replace(lite, moe_layers=(1, 2), num_experts=5, top_k=2)
    for _ in range(30):
        tuned = rng.integers(0, 6, (3, 2))
        page = int(rng.integers(1, 9)) << 20
        adapters = ExpertAdapters(small, tuned, room=6, page_bytes=page)
        rows = (2 * 2 * 2048 * 1408, 2 * 2048 * 1408)
        pages = padded = 0
        for row in rows:
            for layer in range(2):
                there = [*range(5), *(5 + 6 * i + n for i in range(3) for n in range(tuned[i, layer]))]
                touched = {b // page for r in there for b in (r * row, (r + 1) * row - 1)}
                touched |= {p for r in there for p in range(r * row // page, ((r + 1) * row - 1) // page + 1)}
                pages += len(touched)
                padded += len(there) * -(-row // page)
        assert adapters.mapped_bytes() == pages * page
        assert adapters.mapped_bytes(share_pages=False) == padded * page
        assert adapters.held_bytes() <= adapters.mapped_bytes() <= adapters.mapped_bytes(False)
        assert adapters.held_bytes() == (2 * 5 + tuned.sum()) * 3 * 2 * 2048 * 1408
        assert adapters.padded_bytes() / adapters.held_bytes() == pytest.approx(adapters.fragmentation())


def test_fragmentation_and_sparsity_by_hand(lite):
    tuned = np.zeros((2, 26), np.int64)
    tuned[0, 0], tuned[1, :] = 4, 2
    adapters = ExpertAdapters(lite, tuned)
    assert adapters.sparsity_N().tolist() == pytest.approx([1 - 4 / (26 * 4), 0.0])
    assert adapters.fragmentation() == pytest.approx(26 * (64 + 2 * 4) / (26 * 64 + 4 + 52))
    assert adapters.merged_bytes() == 2 * 26 * 64 * lite.expert_bytes()
    assert adapters.table_bytes() == 4 * 26 * 3 * 64


@pytest.mark.parametrize(
    ("tuned", "room", "why"),
    [
        (np.zeros((2, 3), int), None, "26 MoE layers"),
        (np.full((1, 26), 65), None, "0 to 64 experts"),
        (np.full((1, 26), -1), None, "0 to 64 experts"),
        (np.full((1, 26), 5), 4, "room for"),
    ],
)
def test_adapters_that_cannot_be(lite, tuned, room, why):
    with pytest.raises(BadInput, match=why):
        ExpertAdapters(lite, tuned, room)


def test_tokens_go_to_their_adapters_experts():
    tuned = np.zeros((2, 1, 4), bool)
    tuned[0, 0, [1, 3]] = True
    tuned[1, 0, 3] = True
    table = slot_table(tuned)
    assert table[:, 0].tolist() == [[0, 4, 2, 5], [0, 1, 2, 6], [0, 1, 2, 3]]
    ids = np.array([[[1, 3]], [[1, 3]], [[1, 3]]])
    assert redirect(ids, np.array([0, 1, 2]), table)[:, 0].tolist() == [[4, 5], [1, 6], [1, 3]]


def test_a_compressed_context_leaves_the_caller_s_alone():
    ctx = context([[1.0, 2.0]])
    compressed = Compressed(np.full((1, 2), 8.0), np.array([[1, 1]]))
    new = apply(ctx, compressed, 16.0)
    assert new.popularity_LE.tolist() == [[0.0, 3.0]]
    assert new.size_LE.tolist() == [[1, 400]]
    assert ctx.popularity_LE.tolist() == [[1.0, 2.0]]
