"""Names of experts mean nothing: relabelling them in the trace and in the placement changes no time and no load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.placement import Placement, PlacementContext
from moesim.rng import generator
from moesim.scenario.load import Scenario
from moesim.simulate import RunResult, simulate
from moesim.spec import Spec
from tests.build import scenario, tiny_model

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 64, 4, 480


class Fixed(Spec):
    """Places as told, whatever the loads."""

    slot_to_expert: tuple[tuple[int, ...], ...]

    def place(self, weight_LE: NDArray[np.float64], ctx: PlacementContext) -> Placement:
        return ctx.placement(np.array(self.slot_to_expert), weight_LE.shape[1])


def skewed_ids(seed: int) -> NDArray[np.uint8]:
    """K distinct experts a token, popular ones first in id, [T, L, K]."""
    rng = generator(seed, "test/relabel")
    score = rng.exponential(size=(TOKENS, LAYERS, EXPERTS)) * np.arange(1, EXPERTS + 1) ** 0.7
    return np.argsort(score, axis=-1)[..., :TOP_K].astype(np.uint8)


def write(folder: Path, name: str, ids: NDArray[np.uint8]) -> str:
    np.savez(folder / name, expert_ids=ids, sequence_id=np.arange(TOKENS) // 60)
    return name


def relabelled(folder: Path, base: Scenario, seed: int) -> tuple[Scenario, NDArray[np.int64]]:
    """`base` with its trace's and placement's experts renamed layer by layer; new name of each, [L, E]."""
    rng = generator(seed, "test/relabel/names")
    name_LE = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    ids = np.load(folder / str(base.routing.path))["expert_ids"]
    write(folder, "renamed.npz", name_LE[np.arange(LAYERS)[:, None], ids].astype(np.uint8))
    placement = base.policies.placement
    assert isinstance(placement, Fixed)
    renamed = np.take_along_axis(name_LE, np.array(placement.slot_to_expert), axis=1)
    policies = dataclasses.replace(base.policies, placement=Fixed(slot_to_expert=as_tuples(renamed)))
    routing = base.routing.model_copy(update={"path": "renamed.npz"})
    return dataclasses.replace(base, policies=policies, routing=routing), name_LE


def as_tuples(table: NDArray[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def placed(base: Scenario) -> Scenario:
    """`base` with the placement its own policy finds written down."""
    result = simulate(base)
    assert result.experts is not None
    table = as_tuples(result.experts.placement.slot_to_expert_LS)
    return dataclasses.replace(base, policies=dataclasses.replace(base.policies, placement=Fixed(slot_to_expert=table)))


def assert_same(a: RunResult, b: RunResult, name_LE: NDArray[np.int64]) -> None:
    """Requests, steps and summaries are equal; the hottest expert has its new name."""
    for one, other in ((a.requests_table(), b.requests_table()), (a.steps_table(), b.steps_table())):
        for column, values in one.items():
            np.testing.assert_array_equal(values, other[column], err_msg=column)
    here, there = a.to_json()["summary"], b.to_json()["summary"]
    hot, hot_there = here["balance"].pop("hottest"), there["balance"].pop("hottest")
    layer = a.scenario.model.moe_layers.index(hot["layer"])
    assert hot_there.pop("expert") == name_LE[layer, hot.pop("expert")]
    assert hot_there == hot
    assert there == here
    np.testing.assert_array_equal(a.rank_load_LP(), b.rank_load_LP())


LAYOUTS: dict[str, dict[str, Any]] = {
    "ep4": {"parallel": {"dp": 4, "ep": 4}},
    "replicas": {
        "parallel": {"dp": 8, "ep": 8},
        "policies": {"placement": {"kind": "eplb", "num_redundant_experts": 8}, "dispatch": "random"},
    },
    "near": {
        "parallel": {"dp": 4, "ep": 4},
        "cluster": {"device": "h100_sxm_datasheet", "nodes": 2, "gpus_per_node": 2},
        "policies": {"placement": {"kind": "eplb", "num_redundant_experts": 16}},
    },
    "alone": {},
    "split": {"parallel": {"tp": 2, "dp": 2, "ep": 2}},
}


@pytest.mark.parametrize("fidelity", ["token", "count"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000))
def test_relabelling_experts_with_their_placement_changes_nothing(
    tmp_path: Path, layout: str, fidelity: str, seed: int
) -> None:
    routing = {"path": write(tmp_path, "trace.npz", skewed_ids(seed)), "fidelity": fidelity}
    requests = {
        "format": "poisson", "rate_per_s": 2000.0, "num_requests": 20,
        "prompt_tokens": {"distribution": "uniform", "min": 1, "max": 100},
        "output_tokens": {"distribution": "geometric", "mean": 10, "max": 40},
    }  # fmt: skip
    engine = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "graph_batch_sizes": [1, 4, 8], "bank_entries": 4}
    model = tiny_model(tmp_path)
    parts = {"routing": routing, "requests": requests, "engine": engine, "seed": seed, **LAYOUTS[layout]}
    base = placed(scenario(tmp_path, model, **parts))
    other, name_LE = relabelled(tmp_path, base, seed)
    a, b = simulate(base), simulate(other)
    assert a.experts is not None
    assert (a.experts.replay is None) == (fidelity == "count")
    assert_same(a, b, name_LE)


def test_relabelling_the_trace_alone_changes_times(tmp_path: Path) -> None:
    """The test above can fail: names that no longer fit the placement give other loads and times."""
    write(tmp_path, "trace.npz", skewed_ids(0))
    base = placed(scenario(tmp_path, tiny_model(tmp_path), routing={"path": "trace.npz"}, parallel={"dp": 4, "ep": 4}))
    other, name_LE = relabelled(tmp_path, base, 0)
    wrong = dataclasses.replace(other, policies=base.policies)
    with pytest.raises(AssertionError):
        assert_same(simulate(base), simulate(wrong), name_LE)
