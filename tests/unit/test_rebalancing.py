"""Experts that move while serving: what is moved, when, and what steps pay for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cost.rebalancing import MoveCosts, RebalancingPricer, _Loads, move_ns
from moesim.errors import BadInput
from moesim.hardware import DeviceProfile
from moesim.placement import Placement
from moesim.placement.moves import moves
from moesim.scenario.load import load_profile
from moesim.simulate import RunResult, simulate
from tests.build import scenario, tiny_model

ROOT = Path(__file__).parents[2]
EPLB = {"placement": {"kind": "eplb", "num_redundant_experts": 8}}
CLOSED = {"format": "closed_loop", "concurrency": 64, "num_requests": 200, "prompt_tokens": 40, "output_tokens": 60}


def run(folder: Path, rebalance: dict[str, Any] | None, **parts: Any) -> RunResult:
    parts = {"parallel": {"dp": 8, "ep": 8}, "policies": EPLB, "requests": CLOSED, **parts}
    result = simulate(scenario(folder, rebalance=rebalance, **parts))
    assert isinstance(result, RunResult)
    return result


def told(result: RunResult) -> dict[str, Any]:
    found: dict[str, Any] = result.to_json()["summary"]["rebalance"]
    return found


@pytest.mark.parametrize("fidelity", ["token", "count"])
def test_a_synchronous_rebalance_stalls_for_its_plan_and_its_transfers(tmp_path: Path, fidelity: str) -> None:
    found = run(tmp_path, {"interval_steps": 60, "host_ms": 5, "layer_ms": 2}, routing={"fidelity": fidelity})
    summary = told(found)
    assert summary["asked"] == summary["moved"] > 2
    assert summary["step_time_s"] == pytest.approx(summary["transfer_s"] + summary["moved"] * 5e-3, abs=1e-8)
    assert summary["transfer_s"] > summary["moved"] * 1 * 2e-3
    assert summary["planned_after"] < 1.1 < summary["planned_before"] + 0.1
    slots = summary["slots"]
    assert sum(slots.values()) == summary["moved"] * 3 * 72  # three MoE layers of 64 + 8 slots
    assert slots["same_node"] > 0 == slots["across"]


def test_across_nodes_weights_travel_by_nic(tmp_path: Path) -> None:
    found = told(run(tmp_path, {"interval_steps": 60}, parallel={"dp": 16, "ep": 16},
                     policies={"placement": {"kind": "eplb", "num_redundant_experts": 16}}))  # fmt: skip
    assert min(found["slots"]["across"], found["slots"]["same_node"]) > 100
    size = 3 * 256 * 128 * 2  # three bf16 matrices
    assert found["bytes"]["across"] == found["slots"]["across"] * size


def test_a_map_that_stays_the_same_costs_its_plan_alone(tmp_path: Path) -> None:
    """Loads are exactly even in every step, so from the second time on the policy gives the map there is."""
    policies = {**EPLB, "routing": "balanced"}
    found = told(run(tmp_path, {"interval_steps": 20, "host_ms": 2, "threshold": 1.0}, policies=policies))
    assert found["asked"] > 5
    assert found["moved"] <= 1
    assert found["moved"] + found["skipped_balanced"] == found["asked"]
    assert found["step_time_s"] == pytest.approx(found["asked"] * 2e-3 + found["transfer_s"], abs=1e-8)


def test_rebalancing_wins_back_what_the_initial_map_loses(tmp_path: Path) -> None:
    """Skewed loads: after the first rebalance ranks are nearly as even as under a map that was fitted beforehand."""
    skew = {"fidelity": "token", "popularity_zipf": 1.0}
    never = run(tmp_path, {"interval_steps": 10000}, routing=skew)
    soon = run(tmp_path, {"interval_steps": 10000, "first_after_steps": 20, "host_ms": 0}, routing=skew)
    fitted = run(tmp_path, None, routing=skew)
    lock = [r.to_json()["summary"]["balance"]["lockstep"] for r in (never, soon, fitted)]
    assert lock[0] > 1.5 * lock[2]
    assert lock[2] < lock[1] < lock[2] + 0.25 * (lock[0] - lock[2])


def test_balanced_enough_is_left_alone(tmp_path: Path) -> None:
    found = told(run(tmp_path, {"interval_steps": 60, "threshold": 0.05}))
    assert found["skipped_balanced"] == found["asked"] > 0 == found["moved"]


def test_asynchronous_moves_cost_only_shared_links_and_take_steps(tmp_path: Path) -> None:
    spec = {"interval_steps": 60, "host_ms": 5, "layer_ms": 2}
    waits, meanwhile = run(tmp_path, spec), run(tmp_path, {**spec, "asynchronous": True})
    assert told(meanwhile)["moved"] > 2
    assert 0 < told(meanwhile)["step_time_s"] < 0.5 * told(waits)["step_time_s"]
    # a transfer longer than the interval is not begun twice
    slow = told(run(tmp_path, {**spec, "asynchronous": True, "layer_ms": 200}))
    assert slow["skipped_busy"] > 0
    assert slow["asked"] == slow["moved"] + slow["skipped_busy"]


def test_a_transfer_ends_where_the_steps_have_given_it_its_time(tmp_path: Path) -> None:
    """By hand: a plan of 1 ms shares no link; then every step takes its exchange twice until the weights, which get
    the time of a step without that, are there."""
    spec = {"interval_steps": 10000, "first_after_steps": 10, "asynchronous": True, "host_ms": 1.0, "layer_ms": 4.0}
    result = run(tmp_path, spec, routing={"fidelity": "token"}, engine={"run_ahead": False})
    pricer = result.pricers[0]
    assert isinstance(pricer, RebalancingPricer)
    assert result.outcome is not None
    assert pricer.done.moved == 1
    needed, done, shared = 1e6 + pricer.done.transfer_ns, 0.0, 0
    for tick, step in enumerate(result.outcome.runs):
        added = 0 if step.rebalance_ns is None else int(step.rebalance_ns[0])
        assert (added > 0) == (tick >= 10 and 1e6 <= done < needed), tick
        shared += added > 0
        if tick >= 10:
            done += int(step.cumulative_ns[0]) - added
    assert shared > 10


def test_layers_one_by_one_move_the_same_in_as_many_steps(tmp_path: Path) -> None:
    """One rebalance, after ten steps, of three MoE layers: a chunk of one layer takes its share of the stall in each of
    three steps, all at once takes it in one; bytes, and the sum, are the same."""
    spec = {"interval_steps": 10000, "first_after_steps": 10, "host_ms": 5.0, "layer_ms": 2.0}
    found = {}
    for layers in (None, 1, 2):
        routing = {"fidelity": "token", "popularity_zipf": 1.0}
        result = run(tmp_path, {**spec, "layers_per_chunk": layers}, routing=routing, engine={"run_ahead": False})
        assert result.outcome is not None
        stalls = {}
        for tick, step in enumerate(result.outcome.runs):
            if step.rebalance_ns is not None and step.rebalance_ns[0] > 0:
                stalls[tick] = int(step.rebalance_ns[0])
        found[layers] = told(result), stalls
    (at_once, once), (by_layer, each), (by_two, two) = found[None], found[1], found[2]
    assert at_once["moved"] == by_layer["moved"] == by_two["moved"] == 1
    assert at_once["bytes"] == by_layer["bytes"] == by_two["bytes"]
    assert at_once["bytes"]["same_node"] > 0
    assert list(once) == [10]
    assert list(each) == [10, 11, 12]
    assert list(two) == [10, 11]
    # the first step waits for the plan, too; sums differ by the rounding of each stall to a ns
    assert sum(each.values()) == pytest.approx(sum(once.values()), abs=3)
    assert sum(two.values()) == pytest.approx(sum(once.values()), abs=3)
    assert each[10] - 5e6 + each[11] == pytest.approx(two[10] - 5e6, abs=3)
    assert min(each[10] - 5e6, each[11], each[12]) > 2e6
    assert by_layer["step_time_s"] == pytest.approx(at_once["step_time_s"], abs=5e-9)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"rebalance\.interval_steps"):
        scenario(tmp_path, rebalance={"interval_steps": 0})
    with pytest.raises(BadInput, match=r"experts of other sizes"):
        scenario(tmp_path, model={"name": tiny_model(tmp_path), "expert_widths": [0.5, 1.5]}, rebalance={})
    with pytest.raises(BadInput, match="has no experts to move"):
        scenario(tmp_path, model=tiny_model(tmp_path, moe=None), rebalance={})
    with pytest.raises(BadInput, match="layers that share experts"):
        scenario(tmp_path, model={"name": tiny_model(tmp_path), "iterations": 2}, policies=EPLB, rebalance={})
    for kind, told_so in {
        "contiguous": "heeds no loads", "random": "heeds no loads", "affinity": "whole tokens",
        "exflow": "whole tokens", "memory_aware": "chooses its number of slots",
    }.items():  # fmt: skip
        with pytest.raises(BadInput, match=told_so):
            scenario(tmp_path, policies={"placement": kind}, parallel={"dp": 4, "ep": 4}, rebalance={})


def test_the_most_guests_are_not_forgotten_when_maps_change(tmp_path: Path) -> None:
    dispatch = {"dispatch": {"kind": "llep", "min_tokens": 1}}
    parts: dict[str, Any] = {"policies": {**EPLB, **dispatch}, "routing": {"popularity_zipf": 1.0}}
    peaks = [
        run(tmp_path, {"interval_steps": every, "first_after_steps": 20}, **parts).to_json()["summary"]["guests"]
        for every in (20, 10_000)
    ]
    assert peaks[0]["peak_bytes"] >= 0.5 * peaks[1]["peak_bytes"] > 0


def test_loads_forget_what_did_not_happen() -> None:
    loads = _Loads(5)

    def counter(value: float) -> Any:
        return lambda lo, hi: np.full((1, 2), value * (hi - lo))

    loads.record(0, 10, counter(1.0))  # priced for ten steps, cut after three
    loads.record(3, 4, counter(10.0))
    loads.record(7, 2, counter(100.0))
    assert loads.sum(9).tolist() == [[230.0, 230.0]]  # steps 4, 5, 6 and 7, 8
    assert loads.sum(8).tolist() == [[140.0, 140.0]]
    loads.record(8, 1, counter(1000.0))  # the second of them was cut off, too
    assert loads.sum(9).tolist() == [[1130.0, 1130.0]]


def test_the_busiest_port_decides_how_long_a_layer_takes() -> None:
    profile = load_profile(ROOT / "hw_profiles" / "h100_sxm_datasheet.yaml")
    assert isinstance(profile, DeviceProfile)
    costs = MoveCosts(slot_bytes=1000, near=10.0, far=1.0, memory=100.0, launch_ns=7.0)
    old = Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, 4, (0, 0, 1, 1))
    new = Placement(np.array([[1, 0, 2, 3], [2, 3, 0, 1]]), 4, 4, (0, 0, 1, 1))
    assert move_ns(moves(old, new), costs).tolist() == [7 + 100, 7 + 1000]
    assert move_ns(moves(old, old), costs).tolist() == [0, 0]
    real = MoveCosts.of(profile, 1 << 20)
    assert real.near == pytest.approx(profile.node.nvlink_bytes_per_s * 0.75e-9)


# ---- placement_from


def lockstep(result: RunResult) -> float:
    found: float = result.to_json()["summary"]["balance"]["lockstep"]
    return found


def test_a_placement_made_for_a_share_of_the_pool_is_judged_on_the_rest(tmp_path: Path) -> None:
    routing = {"fidelity": "token", "popularity_zipf": 1.0, "drift": 0.8, "pool_tokens": 8192, "sequence_tokens": 256}
    share = run(tmp_path, None, routing=routing, placement_from={"share": 0.5})
    assert share.experts is not None
    assert share.experts.source.num_sequences == 16
    assert any("made for the first 16 of 32 sequences" in w for w in share.warnings)
    assert not any("best case" in w for w in share.warnings)
    assert any("best case" in w for w in run(tmp_path, None, routing=routing).warnings)
    # later windows have other favourites, so a map made for the first ones is worse there than one made for all
    assert lockstep(share) > 1.05 * lockstep(run(tmp_path, None, routing=routing))


def test_a_placement_made_for_other_traffic(tmp_path: Path) -> None:
    routing = {"fidelity": "token", "popularity_zipf": 1.0}
    own = run(tmp_path, None, routing=routing)
    other = run(tmp_path, None, routing=routing, placement_from={"routing": {"popularity_zipf": 1.0, "drift": 0.9}})
    even = run(tmp_path, None, routing=routing, placement_from={"routing": {"popularity_zipf": 0.0}})
    assert lockstep(own) < lockstep(other)
    assert lockstep(own) < lockstep(even)
    assert own.scenario.hash != other.scenario.hash != even.scenario.hash


def test_what_placement_from_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="either routing"):
        scenario(tmp_path, placement_from={})
    with pytest.raises(BadInput, match=r"placement_from\.routing\.path: no such file"):
        scenario(tmp_path, placement_from={"routing": {"path": "nowhere.npz"}})
    with pytest.raises(BadInput, match="has no experts to move"):
        scenario(tmp_path, model=tiny_model(tmp_path, moe=None), placement_from={"share": 0.5})
    with pytest.raises(BadInput, match="both parts need a sequence"):
        run(tmp_path, None, placement_from={"share": 0.001}, routing={"pool_tokens": 512, "sequence_tokens": 256})
    with pytest.raises(BadInput, match="cuts the pool in two"):
        run(tmp_path, None, placement_from={"share": 0.5}, capacity={"factor": 1.0},
            routing={"pool_tokens": 512, "sequence_tokens": 64})  # fmt: skip


def test_ranks_that_do_not_fill_nodes_are_on_the_nodes_they_are_on(tmp_path: Path) -> None:
    """12 ranks on nodes of 8: eight on the first and four on the second, for placements as for links."""
    made = run(tmp_path, None, parallel={"dp": 12, "ep": 12}, policies={"placement": {
        "kind": "eplb", "num_redundant_experts": 8}})  # fmt: skip
    assert made.experts is not None
    assert made.experts.placement.rank_to_node == (0,) * 8 + (1,) * 4
