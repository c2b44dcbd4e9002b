"""Loading a scenario's routing: trace, counts, synthetic; against the model; under a policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.policy import load_policy
from moesim.workload.routing import RoutingSpec, load_routing

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "routing"


def model(layers=(1, 2, 3, 4), experts=8, top_k=2, groups=(1, 1)):
    return SimpleNamespace(
        name="small", moe_layers=tuple(layers), num_moe_layers=len(layers), num_experts=experts, top_k=top_k,
        num_expert_groups=groups[0], top_groups=groups[1], moe_passes=tuple(layers), num_moe_passes=len(layers),
    )  # fmt: skip


def trace(folder, layers=4, experts=8, top_k=2, **more):
    ids = np.random.default_rng(1).random((20, layers, experts)).argsort(2)[:, :, :top_k]
    np.savez(folder / "t.npz", expert_ids=ids, sequence_id=np.arange(20) // 5, num_experts=experts, **more)
    return ids


def test_a_trace_is_taken_as_recorded(tmp_path):
    ids = trace(tmp_path)
    for policy in (None, load_policy("routing", "topk"), load_policy("routing", "grouped_topk")):
        source = load_routing(RoutingSpec(path="t.npz"), model(), tmp_path, 1, policy)
        assert source.recorded
        np.testing.assert_array_equal(source.expert_TLK, ids)
        assert source.layer_index == (1, 2, 3, 4)


@pytest.mark.parametrize("kind", ["random", "balanced"])
def test_a_policy_that_chooses_by_itself_replaces_the_ids(tmp_path, kind):
    ids = trace(tmp_path)
    policy = load_policy("routing", kind)
    source = load_routing(RoutingSpec(path="t.npz"), model(), tmp_path, 1, policy)
    assert not source.recorded
    assert source.ideal == (kind == "balanced")
    assert source.sequence_start.tolist() == [0, 5, 10, 15, 20]
    assert (source.expert_TLK != ids).any()
    assert kind in source.source
    assert "t.npz" in source.source
    synthetic = load_routing(RoutingSpec(pool_tokens=64), model(), tmp_path, 1, policy)
    assert synthetic.num_tokens == 64


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": 5}, ["5 MoE layers", "small 4"]),
        ({"experts": 16}, ["16 experts", "small here 8"]),
        ({"top_k": 3}, ["top_k 3", "small here 2"]),
        ({"layers": 5, "experts": 16, "top_k": 3}, ["layers", "experts", "top_k"]),
    ],
)
def test_a_trace_of_another_model_is_refused(tmp_path, given, words):
    trace(tmp_path, **given)
    with pytest.raises(BadInput) as caught:
        load_routing(RoutingSpec(path="t.npz"), model(), tmp_path, 1)
    assert all(word in str(caught.value) for word in words), caught.value


def test_layers_that_were_not_recorded_repeat_those_that_were(tmp_path):
    ids = trace(tmp_path, layers=2, layer_index=np.array([2, 3]))
    source = load_routing(RoutingSpec(path="t.npz"), model(range(1, 6)), tmp_path, 1)
    np.testing.assert_array_equal(source.expert_TLK, ids[:, [0, 0, 1, 1, 0]])
    assert "2 of the 5 MoE layers" in source.warnings[-1]
    unnumbered = trace(tmp_path, layers=2)
    source = load_routing(RoutingSpec(path="t.npz"), model(range(1, 6)), tmp_path, 1)
    np.testing.assert_array_equal(source.expert_TLK, unnumbered[:, [0, 1, 0, 1, 0]])


def test_knobs_beside_a_trace_and_two_popularities_are_refused(tmp_path):
    trace(tmp_path)
    with pytest.raises(BadInput, match="repeat"):
        load_routing(RoutingSpec(path="t.npz", repeat=0.1), model(), tmp_path, 1)
    (tmp_path / "c.csv").write_text("layer,e0,e1\n0,3,1\n")
    with pytest.raises(BadInput, match="popularity_zipf"):
        load_routing(RoutingSpec(path="c.csv", popularity_zipf=1.0), model((1,), 2, 1), tmp_path, 1)


def test_counts_give_the_popularity(tmp_path):
    (tmp_path / "c.csv").write_text("layer,e0,e1,e2,e3\n1,30,10,5,5\n3,1,1,1,1\n")
    spec = RoutingSpec(path="c.csv", pool_tokens=8192, repeat=0.1)
    source = load_routing(spec, model((1, 2, 3), 4, 1), tmp_path, 1)
    share = source.count_LE() / 8192
    np.testing.assert_allclose(share, [[0.6, 0.2, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.25] * 4], atol=0.03)
    assert "2 of the 3 MoE layers" in source.warnings[0]
    with pytest.raises(BadInput, match="2 layers of 4 experts"):
        load_routing(spec, model((1, 2, 3), 8, 1), tmp_path, 1)


def test_a_model_with_groups_has_tokens_in_few_groups(tmp_path):
    grouped = model((0, 1), 32, 4, (8, 2))
    source = load_routing(RoutingSpec(pool_tokens=500, popularity_zipf=0.5), grouped, tmp_path, 1)
    kinds = [len(set(row)) for row in (source.expert_TLK // 4).reshape(-1, 4).tolist()]
    assert max(kinds) == 2
    free = load_routing(RoutingSpec(pool_tokens=500), grouped, tmp_path, 1, load_policy("routing", "topk"))
    assert max(len(set(row)) for row in (free.expert_TLK // 4).reshape(-1, 4).tolist()) == 4


def test_dense_models_absent_files_and_sizes(tmp_path):
    with pytest.raises(BadInput, match="dense"):
        load_routing(RoutingSpec(), model(()), tmp_path, 1)
    for name in ("absent.npz", "absent.csv", "absent"):
        with pytest.raises(BadInput, match="no such"):
            load_routing(RoutingSpec(path=name), model(), tmp_path, 1)
    with pytest.raises(BadInput, match="pool_tokens"):
        load_routing(RoutingSpec(pool_tokens=1 << 24), model(range(2000)), tmp_path, 1)


@pytest.mark.skipif(not DATA.exists(), reason="recorded routing is in ../shared/data, which is not here")
def test_recorded_counts_fill_deepseek_v3():
    v3 = model(range(3, 61), 256, 8, (8, 4))
    source = load_routing(RoutingSpec(path="deepseek_v3_counts_l3_18.csv", pool_tokens=4096), v3, DATA, 1)
    share = source.count_LE()[0] / (4096 * 8)
    recorded = np.loadtxt(DATA / "deepseek_v3_counts_l3_18.csv", delimiter=",", skiprows=1)[0, 1:] / 4096
    assert np.corrcoef(share, recorded)[0, 1] > 0.97
    assert np.abs(share - recorded).sum() < 0.2
