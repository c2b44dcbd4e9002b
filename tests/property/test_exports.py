"""Maps for engines: 500 random ones a format are accepted by the engine's rules and read back as they were.

Changed ones are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.exports import ENGINES, Target, emit, sglang, trtllm, vllm, vllm_ascend
from moesim.exports.apart import keep_apart
from moesim.exports.checks import sglang as sglang_rules
from moesim.exports.checks import trtllm as trtllm_rules
from moesim.exports.checks import vllm as vllm_rules
from moesim.exports.checks import vllm_ascend as ascend_rules
from moesim.placement import EMPTY, Placement

MAPS = 500


def target(seed: int, apart: bool = False) -> Target:
    """A random legal map: 2 to 6 ranks, up to 16 experts, up to 2 replicas a rank, some layers of the model dense."""
    rng = np.random.default_rng([7, seed])
    ranks, experts = int(rng.integers(2, 7)), int(rng.integers(2, 17))
    slots = experts + -experts % ranks + ranks * int(rng.integers(0, 3))
    if apart:
        slots = min(slots, experts * ranks)
        slots -= slots % ranks
    layers = int(rng.integers(1, 4))
    rows = [
        rng.permutation(np.r_[np.arange(experts), rng.integers(0, experts, slots - experts)]) for _ in range(layers)
    ]
    placement = Placement(np.array(rows), experts, ranks)
    if apart:
        placement = Placement(np.array([_apart(rng, experts, ranks, slots) for _ in rows]), experts, ranks)
    index = np.sort(rng.choice(layers + 3, layers, replace=False))
    return Target(placement, tuple(int(i) for i in index), layers + 3)


def _apart(rng: np.random.Generator, experts: int, ranks: int, slots: int) -> Any:
    """A row whose ranks hold distinct experts: the experts in a random order, again and again."""
    assert slots // ranks <= experts
    return np.resize(rng.permutation(experts), slots)


def same(a: Placement, b: Placement) -> bool:
    return np.array_equal(a.slot_to_expert_LS, b.slot_to_expert_LS) and a.num_ranks == b.num_ranks


def test_sglang_maps_are_accepted_and_come_back() -> None:
    for seed in range(MAPS):
        made = target(seed)
        placement, text = made.placement, sglang.write(made)
        assert sglang_rules.check(text, placement.num_experts, placement.num_ranks, made.model_layers, "x") == []
        assert same(sglang.read(text, placement.num_experts, placement.num_ranks, made.layer_index), placement)
        assert list(json.loads(text)) == ["physical_to_logical_map"]


def test_trtllm_maps_are_accepted_and_come_back() -> None:
    for seed in range(MAPS):
        made = target(seed)
        placement, text = made.placement, trtllm.write(made)
        assert trtllm_rules.check(text, placement.num_experts, placement.num_ranks, made.layer_index, "x") == []
        back, layers = trtllm.read(text, placement.num_experts, placement.num_ranks)
        assert same(back, placement)
        assert layers == made.layer_index


def test_vllm_ascend_maps_are_accepted_and_come_back() -> None:
    for seed in range(MAPS):
        made = target(seed, apart=True)
        placement, text = made.placement, vllm_ascend.write(made)
        facts = placement.num_experts, placement.num_ranks, placement.num_layers
        assert ascend_rules.check(text, *facts, "x") == []
        assert same(vllm_ascend.read(text, placement.num_experts), placement)


def test_vllm_values_are_accepted_and_come_back() -> None:
    rng = np.random.default_rng(0)
    for seed in range(MAPS):
        placement = target(seed).placement
        redundant = placement.num_slots - placement.num_experts
        config = vllm.EplbConfig(redundant, *(int(x) for x in rng.integers(1, 9999, 2)), bool(rng.integers(2)))
        text = vllm.render(config)
        assert vllm_rules.check(text, placement.num_experts, placement.num_ranks, "x") == []
        assert vllm.read(text, placement.num_experts, placement.num_ranks) == config


def _set(path: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is ...:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


def _other(row: list[int], experts: int) -> None:
    """The only slot of an expert goes to another, or one of all to one that is not there."""
    once = [i for i, e in enumerate(row) if row.count(e) == 1]
    at = once[0] if once else 0
    row[at] = (row[at] + 1) % experts if once else experts


@pytest.mark.parametrize("seed", range(25))
def test_changed_sglang_maps_are_refused(seed: int) -> None:
    made = target(seed)
    experts, ranks = made.placement.num_experts, made.placement.num_ranks
    changes: list[Callable[[Any], None]] = [
        _set(("num_layers",), 4),
        _set(("physical_to_logical_map",), ...),
        _set(("physical_to_logical_map", 0, 0), -1),
        _set(("physical_to_logical_map", 0, 0), experts),
        _set(("physical_to_logical_map", 0, 0), 1.0),
        _set(("physical_to_logical_map", 0, 0), None),
        _set(("physical_to_logical_map", 0, 0), True),
        _set(("physical_to_logical_map", 0), []),
        lambda data: data["physical_to_logical_map"].pop(),
        lambda data: data["physical_to_logical_map"][-1].append(0),
        lambda data: [row.append(0) for row in data["physical_to_logical_map"]],
        lambda data: _other(data["physical_to_logical_map"][-1], experts),
    ]
    for change in changes:
        data = json.loads(sglang.write(made))
        change(data)
        assert sglang_rules.check(json.dumps(data), experts, ranks, made.model_layers, "x")
    assert sglang_rules.check("{", experts, ranks, None, "x")


@pytest.mark.parametrize("seed", range(25))
def test_changed_trtllm_maps_are_refused(seed: int) -> None:
    made = target(seed)
    experts, ranks, layers = made.placement.num_experts, made.placement.num_ranks, made.layer_index
    lines = trtllm.write(made).splitlines()
    row = [int(x) for x in lines[-1].partition("[")[2].strip("]").split(", ")]
    wrong = list(row)
    _other(wrong, experts)
    assert len(lines) == 3 + len(layers)
    changed = [
        [*lines, "ep_size: 4"],
        lines[1:],
        ["num_slots: 0", *lines[1:]],
        ["num_slots: " + str(made.placement.num_slots + 1), *lines[1:]],
        ["num_slots: many", *lines[1:]],
        [lines[0], "layer_updates_per_iter: -1", *lines[2:]],
        lines[:-1] + ([] if len(lines) > 4 else ["  99: [0]"]),
        [*lines[:-1], f"  {layers[-1]}: {row[:-1]}"],
        [*lines[:-1], f"  {layers[-1]}: {wrong}"],
        [*lines[:-1], f"  {layers[-1]}: [{experts}{', 0' * (len(row) - 1)}]"],
        [*lines[:-1], f"  layer{layers[-1]}: {row}"],
        [*lines, f"  {layers[-1]}: {row}"],  # the key twice
        [*lines[:-1], f"  {layers[-1]}: 3"],
        [*lines[:2], "initial_global_assignments: [1, 2]"],
        ["- 1"],
    ]
    for text in changed:
        assert trtllm_rules.check("\n".join(text) + "\n", experts, ranks, layers, "x"), text
    assert trtllm_rules.check("\n".join(lines), experts, 1, layers, "x")


@pytest.mark.parametrize("seed", range(25))
def test_changed_vllm_ascend_maps_are_refused(seed: int) -> None:
    made = target(seed, apart=True)
    placement = made.placement
    first = placement.slot_to_expert_LS[0].tolist()
    changes: list[Callable[[Any], None]] = [
        _set(("moe_layer_count",), 99),
        _set(("moe_layer_count",), ...),
        _set(("layer_list",), []),
        _set(("layer_list", 0, "device_count"), 1),
        _set(("layer_list", 0, "device_list", 0, "device_expert", 0), placement.num_experts),
        _set(("layer_list", 0, "device_list", 0, "device_expert", 0), 0.5),
        _set(("layer_list", 0, "device_list", 0, "device_expert"), []),
        _set(("layer_list", 0, "device_list", 0, "device_id"), 1),
        lambda data: data["layer_list"][0]["device_list"].pop(),
        lambda data: data["layer_list"][0]["device_list"][0]["device_expert"].append(first[0]),
        lambda data: data["layer_list"].pop(),
    ]
    for change in changes:
        data = json.loads(vllm_ascend.write(made))
        change(data)
        facts = placement.num_experts, placement.num_ranks, placement.num_layers
        assert ascend_rules.check(json.dumps(data), *facts, "x"), data


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": 0}, {"step_interval": -1}, {"num_redundant_experts": 3}, {"num_redundant_experts": "8"},
        {"use_async": 1}, {"policy": "flashlb"}, {"communicator": "gloo"}, {"communicator": "pynccl"},
        {"communicator": ["nixl"]}, {"expert_map_path": "map.json"}, {"log_balancedness_interval": 0},
        {"window_size": True},
    ],
)  # fmt: skip
def test_changed_vllm_values_are_refused(change: dict[str, Any]) -> None:
    good = json.loads(vllm.render(vllm.EplbConfig(8)))
    assert vllm_rules.check(json.dumps(good), 64, 8, "x") == []
    assert vllm_rules.check(json.dumps(good | {"communicator": "pynccl", "use_async": False}), 64, 8, "x") == []
    assert vllm_rules.check(json.dumps(good | change), 64, 8, "x")
    with pytest.raises(BadInput):
        vllm.read(json.dumps(good | change), 64, 8)


def test_empty_slots_and_doubles_are_refused_in_one_sentence_each() -> None:
    row = np.r_[np.arange(7), EMPTY]
    gap = Target(Placement(row[None], 7, 4), (0,), 1)
    for engine in ENGINES:
        with pytest.raises(BadInput, match=r"an expert in every slot, .* Use num_redundant_experts = 1 or 1") as caught:
            emit(gap, [engine])
        assert len(caught.value.problems) == 1
    double = Target(Placement(np.array([[0, 0, 1, 2]]), 3, 2), (5,), 6)
    with pytest.raises(BadInput, match="rank 0 of layer 5 holds one twice"):
        emit(double, ["vllm-ascend"])
    assert {e.engine for e in emit(double, ["sglang", "trtllm", "vllm"])} == {"sglang", "trtllm", "vllm"}
    with pytest.raises(BadInput, match="engines are sglang, trtllm, vllm, vllm-ascend, got sgl"):
        emit(double, ["sgl"])
    with pytest.raises(BadInput, match="Name the model"):
        emit(Target(double.placement, (5,)), ["sglang"])


@pytest.mark.parametrize("seed", range(40))
def test_replicas_kept_apart_are_the_same_replicas(seed: int) -> None:
    placement = target(seed).placement
    rng = np.random.default_rng(seed)
    weight_LE = rng.random((placement.num_layers, placement.num_experts))
    apart, moved = keep_apart(placement, weight_LE)
    np.testing.assert_array_equal(apart.replica_count_LE, placement.replica_count_LE)
    assert (moved == 0) == np.array_equal(apart.slot_to_expert_LS, placement.slot_to_expert_LS)
    if placement.max_replicas <= 2 <= placement.num_ranks and placement.num_experts >= 2 * placement.slots_per_rank:
        rows = apart.slot_to_expert_LS.reshape(-1, placement.slots_per_rank)
        assert all(len(set(r)) == len(r) for r in rows.tolist())


def test_keeping_apart_takes_the_change_that_leaves_the_lower_maximum() -> None:
    # rank 0 holds 0 twice (4 each) and 3 (0), rank 1 holds 1, 2 and 4 (1, 3, 5). A replica of 0 for 1 leaves 5 and 12,
    # for 2 leaves 7 and 10, for 4 leaves 9 and 8.
    before = Placement(np.array([[0, 0, 3, 1, 2, 4]]), 5, 2)
    apart, moved = keep_apart(before, np.array([[8.0, 1.0, 3.0, 0.0, 5.0]]))
    assert moved == 1
    np.testing.assert_array_equal(apart.slot_to_expert_LS, [[0, 4, 3, 1, 2, 0]])
