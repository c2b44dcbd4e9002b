"""Kinds of offload: hand-worked plans, choices against all subsets, and the words of what cannot be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesim.errors import BadInput, Infeasible
from moesim.offload import CacheSemantics, MissCosts, OffloadContext, llama_cpp
from moesim.offload.shares import layer_capacity, shortest_layer
from moesim.policy import load_policy

COSTS = MissCosts(transfer_ns=70.0, gpu_ns=lambda n: 1.0, cpu_ns=lambda n: 7.0 * n, sync_ns=5.0, layer_ns=10.0)


def context(layers, experts, room, size=None, popularity=None, costs=COSTS, **more):
    """room: bytes; experts of 10 bytes each unless `size` says otherwise."""
    size = np.full((layers, experts), 10) if size is None else np.array(size)
    popularity = np.ones((layers, experts)) if popularity is None else np.array(popularity, float)
    semantics = more.pop("semantics", CacheSemantics())
    return OffloadContext(layers, experts, 2, size, room, 2, popularity, semantics, costs, 3, **more)


def plan(ctx, kind, **parameters):
    return load_policy("offload", {"kind": kind, **parameters}).plan(ctx)


def on_cpu(kind, rows, costs=COSTS, **parameters):
    policy = load_policy("offload", {"kind": kind, **parameters})
    rows = np.array(rows)
    return policy.on_cpu(0, np.arange(len(rows)), rows, None, costs).tolist()


# ---- shares of layers


def test_equal_parts_are_equal_and_lose_less_than_a_byte_a_layer():
    np.testing.assert_array_equal(layer_capacity(context(3, 8, 100), "cached", "equal", None), [33, 33, 33])


def test_what_a_full_layer_leaves_goes_to_the_others():
    ctx = context(2, 4, 100, size=[[5] * 4, [30] * 4])
    np.testing.assert_array_equal(layer_capacity(ctx, "cached", "equal", None), [20, 80])


def test_by_entropy_a_layer_that_uses_one_expert_gets_one_part_in_five():
    ctx = context(2, 4, 50, popularity=[[9, 0, 0, 0], [2, 2, 2, 2]])
    np.testing.assert_array_equal(layer_capacity(ctx, "cached", "entropy", None), [10, 40])


def test_by_entropy_a_layer_of_which_nothing_is_known_counts_as_even():
    ctx = context(2, 4, 40, popularity=[[0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(layer_capacity(ctx, "cached", "entropy", None), [20, 20])


def test_slots_are_as_large_as_the_layers_largest_expert():
    ctx = context(2, 3, 100, size=[[1, 2, 3], [10, 10, 10]])
    np.testing.assert_array_equal(plan(ctx, "cached", slots_per_layer=2).capacity_G, [6, 20])
    np.testing.assert_array_equal(plan(ctx, "cached", slots_per_layer=[3, 1]).capacity_G, [6, 10])


def test_slots_that_do_not_fit_or_do_not_match_are_told():
    ctx = context(2, 8, 50)
    with pytest.raises(Infeasible, match=r"takes 60 bytes, 50 are free"):
        plan(ctx, "cached", slots_per_layer=3)
    with pytest.raises(BadInput, match="3 are given"):
        plan(ctx, "cached", slots_per_layer=[1, 1, 1])
    with pytest.raises(BadInput, match="pooled"):
        plan(context(2, 8, 50, semantics=CacheSemantics(pooled=True)), "cached", share="entropy")


def test_a_warm_cache_starts_with_the_most_popular():
    ctx = context(2, 4, 40, popularity=[[1, 4, 3, 2], [5, 5, 5, 6]])
    np.testing.assert_array_equal(plan(ctx, "cached").initial_LE, [[0, 1, 1, 0], [1, 0, 0, 1]])
    assert not plan(ctx, "cached", warm=False).initial_LE.any()


# ---- Mixtral-offloading


def test_mixtral_offloading_keeps_the_last_experts_of_each_layer():
    found = plan(context(2, 8, 90), "mixtral_offloading", offload_per_layer=4)
    np.testing.assert_array_equal(found.capacity_G, [40, 40])
    np.testing.assert_array_equal(found.initial_LE, [[0, 0, 0, 0, 1, 1, 1, 1]] * 2)
    assert found.write_back
    assert not found.cpu_LE.any()


def test_mixtral_offloading_takes_what_fits_and_says_what_does():
    assert plan(context(2, 8, 119), "mixtral_offloading").initial_LE.sum(axis=1).tolist() == [5, 5]
    with pytest.raises(Infeasible, match="Set offload_per_layer to 3"):
        plan(context(2, 8, 119), "mixtral_offloading", offload_per_layer=2)
    with pytest.raises(BadInput, match="Set it to 8 at most"):
        plan(context(2, 8, 119), "mixtral_offloading", offload_per_layer=9)


# ---- Fiddler


def test_fiddler_places_the_most_popular_over_all_layers():
    ctx = context(2, 3, 35, popularity=[[1, 9, 2], [8, 3, 7]])
    found = plan(ctx, "fiddler")
    np.testing.assert_array_equal(found.fixed_LE, [[0, 1, 0], [1, 0, 1]])
    assert found.capacity_G.sum() == 0


def test_fiddlers_constants_put_nine_tokens_on_the_cpu_and_ten_on_the_gpu():
    """7 ms a token against 70 ms a copy; equals go to the GPU (`mixtral.py` keeps the first of equal sums)."""
    assert on_cpu("fiddler", [1, 9, 10, 11], latency_cpu_ms=7, latency_gpu_ms=70) == [True, True, False, False]


def fiddler_cost(chosen, rows, objective):
    """Costs of one choice as in `mixtral.py`, for all experts are missing."""
    cpu = sum(7.0 * n for on, n in zip(chosen, rows, strict=True) if on)
    gpu = sum(70.0 for on in chosen if not on)
    return cpu + gpu if objective == "sum" else max(cpu, gpu)


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_fiddlers_choice_is_the_best_of_all_subsets(objective):
    rng = np.random.default_rng(0)
    for _ in range(150):
        rows = rng.integers(1, 40, rng.integers(1, 9)).tolist()
        best = min(fiddler_cost(c, rows, objective) for c in itertools.product((False, True), repeat=len(rows)))
        mine = on_cpu("fiddler", rows, objective=objective)
        assert fiddler_cost(mine, rows, objective) == best


def test_fiddlers_first_of_equal_sums_is_ours():
    """The code counts subsets up from 0 (all on the GPU) and keeps the first least sum."""
    for rows in ([10, 10, 3], [10], [20, 10, 9, 10]):
        subsets = [[bool(n >> i & 1) for i in range(len(rows))] for n in range(1 << len(rows))]
        first = min(subsets, key=lambda c: fiddler_cost(c, rows, "sum"))
        assert on_cpu("fiddler", rows) == first


# ---- the general optimum


def layer_end(chosen, cpu_ns, transfer_ns, sync_ns):
    cpu = sum(c for on, c in zip(chosen, cpu_ns, strict=True) if on) + (sync_ns if any(chosen) else 0)
    return max(cpu, transfer_ns * sum(not on for on in chosen))


def test_the_split_ends_a_layer_as_early_as_any_subset_does():
    rng = np.random.default_rng(1)
    for _ in range(300):
        cpu_ns = rng.integers(1, 60, rng.integers(1, 10)).astype(float)
        transfer, sync = float(rng.integers(1, 60)), float(rng.integers(0, 80))
        ends = {c: layer_end(c, cpu_ns, transfer, sync) for c in itertools.product((False, True), repeat=len(cpu_ns))}
        mine = tuple(shortest_layer(cpu_ns, transfer, sync).tolist())
        assert ends[mine] == min(ends.values())
        fewest = min(sum(not on for on in c) for c, end in ends.items() if end == ends[mine])
        assert sum(not on for on in mine) == fewest


def test_no_miss_is_split_into_nothing():
    assert shortest_layer(np.zeros(0), 5.0, 1.0).tolist() == []


def test_a_free_cpu_that_is_slower_than_the_link_is_left_alone():
    assert on_cpu("expert_split", [40], costs=COSTS) == [False]
    assert on_cpu("expert_split", [1, 40], costs=COSTS) == [True, False]


def test_expert_split_divides_a_layers_part():
    ctx = context(1, 4, 30, popularity=[[4, 3, 2, 1]])
    assert plan(ctx, "expert_split").fixed_LE.tolist() == [[True, True, True, False]]
    half = plan(ctx, "expert_split", fixed_share=0.5)
    assert half.fixed_LE.tolist() == [[True, False, False, False]]
    assert half.initial_LE.tolist() == [[False, True, True, False]]
    assert half.capacity_G.tolist() == [20]


def test_expert_split_gives_what_whole_experts_leave_to_the_most_popular():
    """Parts of 15 bytes hold one expert of 10 each; the other 10 bytes hold one more."""
    ctx = context(2, 3, 30, popularity=[[3, 2, 1], [9, 8, 7]])
    assert plan(ctx, "expert_split").fixed_LE.tolist() == [[True, False, False], [True, True, False]]


# ---- KTransformers


def gpu(strategy, room=50, popularity=None, **more):
    ctx = context(3, 4, room, popularity=popularity)
    return plan(ctx, "ktransformers", strategy=strategy, **more).fixed_LE.astype(int).tolist()


def test_ktransformers_strategies_on_five_of_twelve():
    """As SGLang's masks have it: [4, 1, 0] of front-loading is a test of theirs."""
    assert gpu("uniform") == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert gpu("front_loading") == [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    popularity = [[9, 8, 7, 0], [1, 2, 6, 6], [5, 5, 5, 5]]
    assert gpu("frequency", popularity=popularity) == [[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert sum(map(sum, gpu("random"))) == 5
    assert gpu("random") != gpu("uniform")


def test_ktransformers_numbers_and_ratios():
    assert gpu("uniform", num_gpu_experts=1) == [[1, 0, 0, 0]] * 3
    assert sum(map(sum, gpu("uniform", gpu_experts_ratio=0.24))) == 2  # floor(12 * 0.24)
    with pytest.raises(Infeasible, match="lower num_gpu_experts to 1"):
        gpu("uniform", num_gpu_experts=2)
    with pytest.raises(BadInput, match="give one"):
        gpu("uniform", num_gpu_experts=1, gpu_experts_ratio=0.1)


def test_ktransformers_never_fetches_and_updates_only_when_dynamic():
    assert on_cpu("ktransformers", [1, 500]) == [True, True]
    ctx = context(3, 4, 50)
    assert plan(ctx, "ktransformers").update_tokens is None
    assert plan(ctx, "ktransformers", strategy="dynamic", update_tokens=100).update_tokens == 100
    assert plan(ctx, "ktransformers", deferred_experts=2).deferred == 2


def test_slots_that_change_hands_are_as_large_as_the_largest():
    ctx = context(1, 3, 14, size=[[2, 4, 10]], popularity=[[3, 2, 1]])
    assert plan(ctx, "ktransformers", strategy="frequency").fixed_LE.sum() == 2
    assert plan(ctx, "ktransformers", strategy="dynamic").fixed_LE.sum() == 1


# ---- llama.cpp


def on_device(room=40, block_L=None, **parameters):
    ctx = context(4, 2, room, block_L=block_L)
    return plan(ctx, "llama_cpp", **parameters).fixed_LE[:, 0].astype(int).tolist()


def test_llama_cpp_puts_the_first_layers_on_the_cpu():
    assert on_device() == [0, 0, 1, 1]
    assert on_device(room=100) == [1, 1, 1, 1]
    assert on_device(n_cpu_moe=3) == [0, 0, 0, 1]
    assert on_device(cpu_moe=True) == [0, 0, 0, 0]
    assert on_cpu("llama_cpp", [1, 9]) == [True, True]


def test_llama_cpp_counts_dense_blocks():
    """DeepSeek-V3 has three: --n-cpu-moe 4 moves the experts of one block."""
    assert on_device(room=60, block_L=np.arange(3, 7), n_cpu_moe=4) == [0, 1, 1, 1]
    with pytest.raises(Infeasible, match="Set n_cpu_moe to 5"):
        on_device(block_L=np.arange(3, 7), n_cpu_moe=4)


def test_llama_cpp_overrides_come_first_and_the_first_decides():
    assert on_device(override_tensor=[r"blk\.(1|3)\.ffn_.*_exps=CPU"]) == [1, 0, 1, 0]
    assert on_device(override_tensor=[r"blk\.0\.=CUDA0"], cpu_moe=True) == [1, 0, 0, 0]
    assert on_device(override_tensor=[r"blk\.[01]\.=CPU", "exps=CUDA0"], cpu_moe=True) == [0, 0, 1, 1]


def test_llama_cpp_says_what_it_cannot_read_or_hold():
    with pytest.raises(BadInput, match="parts those of block 0 and 3 more"):
        on_device(override_tensor=["ffn_up_exps=CPU"])
    for wrong in ("blk.1", "(=CPU", "=CPU"):
        with pytest.raises(BadInput):
            on_device(override_tensor=[wrong])
    with pytest.raises(Infeasible, match=r"takes 60 bytes, 40 are free.*Set n_cpu_moe to 2"):
        on_device(n_cpu_moe=1)


# ---- MoE-Lightning


def test_moe_lightning_holds_two_layers_of_what_travels():
    """Of 4 experts and 6 other bytes a layer: 3 layers of one fixed expert each, and 2 * (30 + 6) of buffers."""
    ctx = context(3, 4, 102, layer_bytes_L=np.full(3, 6))
    found = plan(ctx, "moe_lightning")
    assert found.fixed_LE.sum(axis=1).tolist() == [1, 1, 1]
    assert found.capacity_G.sum() == 72
    assert (found.paged, found.look_ahead) == (True, 1)
    assert plan(ctx, "moe_lightning", r_w=0.0).capacity_G.sum() == 92


def test_moe_lightning_needs_room_for_its_buffers():
    ctx = context(3, 4, 79)
    with pytest.raises(Infeasible, match="takes 80 bytes, 79 are free"):
        plan(ctx, "moe_lightning")
    with pytest.raises(Infeasible, match=r"r_w 0\.5"):
        plan(ctx, "moe_lightning", r_w=0.6)


def test_llama_cpp_looks_at_no_more_blocks_than_there_are(monkeypatch):
    """A pattern a block; a number beyond them all means all of them."""
    seen = []
    real = llama_cpp.re.compile
    monkeypatch.setattr(llama_cpp.re, "compile", lambda text, *more: seen.append(text) or real(text, *more))
    assert on_device(n_cpu_moe=1 << 20) == [0, 0, 0, 0]
    assert len([text for text in seen if text.startswith("blk")]) <= 4
