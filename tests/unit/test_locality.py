"""Requests that go to their experts: what the balancer is told and picks, and that a run shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.balancing.semantic import Policy as Balancer
from moesim.cost.locality import local_activation_rate, nearness, row_nearness
from moesim.errors import BadInput
from moesim.layout import Layout
from moesim.placement import PlacementContext, TokenSample
from moesim.scenario.load import load_scenario
from moesim.simulate import simulate
from moesim.workload.pool import RoutingSource
from moesim.workload.replay import Replay

ROOT = Path(__file__).parents[2]
IDS = np.array([[[0, 1]], [[2, 3]], [[1, 2]], [[0, 3]]], np.uint8)


def pool(token_T=None):
    return RoutingSource(IDS, np.array([0, 2, 4]), 4, 2, True, "hand-made", token_T=token_T)


def layout(tp, dp):
    return Layout(tp, dp, tp * dp, 8, True)


def test_a_tokens_share_on_each_target_by_hand():
    two = PlacementContext(2).placement(np.array([[0, 1, 2, 3]]), 4)
    assert row_nearness(IDS, two, layout(1, 2)).tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]]
    # two tensor-parallel ranks a target: a token is on either of them
    four = PlacementContext(4).placement(np.array([[0, 1, 2, 3]]), 4)
    assert row_nearness(IDS, four, layout(2, 2)).tolist() == [[0.5, 0], [0, 0.5], [0.25, 0.25], [0.25, 0.25]]
    # a replica on each rank is local everywhere; an id that stands for no expert counts as nothing
    copies = PlacementContext(2).placement(np.array([[0, 1, 2, 0, 3, 2]]), 4)
    none = np.array([[[0, 4]]], np.uint8)
    assert row_nearness(none, copies, layout(1, 2)).tolist() == [[1, 1]]


def test_requests_are_foretold_from_prompts_or_from_a_table():
    placement = PlacementContext(2).placement(np.array([[0, 1, 2, 3]]), 4)
    source = pool(np.array([7, 8, 9, 9]))
    replay = Replay(source, [2, 2, 1], [3, 3, 1], seed=1)
    truth = nearness("experts", replay, None, placement, layout(1, 2))
    first = {0: [0.5, 0.5], 1: [0.5, 0.5]}
    assert truth[:2].tolist() == [first[int(q)] for q in replay.sequence_R[:2]]
    known = TokenSample(IDS[:3], np.zeros(3, np.int64), 4, np.array([7, 8, 7]))
    table = nearness("tokens", replay, PlacementContext(2, sample=known), placement, layout(1, 2))
    # id 7: the mean of [1, 0] and [.5, .5]; 8: [0, 1]; 9 is unknown: the mean of all three
    by_id = {7: [0.75, 0.25], 8: [0.0, 1.0], 9: [0.5, 0.5]}
    rows = [replay.rows(np.full(n, r), np.arange(n)) for r, n in enumerate([2, 2, 1])]
    expected = [np.mean([by_id[int(source.token_T[row])] for row in some], axis=0) for some in rows]
    np.testing.assert_allclose(table, expected)
    with pytest.raises(BadInput, match="predict: experts"):
        nearness("tokens", Replay(pool(), [1], [1], 1), PlacementContext(2, sample=known), placement, layout(1, 2))


def test_the_balancer_goes_near_unless_that_target_is_far_ahead():
    near = np.array([0.1, 0.6, 0.3])
    assert Balancer(slack=4).pick_near(np.array([0, 4, 0]), near) == 1
    assert Balancer(slack=3).pick_near(np.array([0, 4, 0]), near) == 2
    assert Balancer(slack=3).pick_near(np.array([9, 4, 9]), np.zeros(3)) == 1


BASE = ROOT / "workloads" / "dsv2lite_replay_ep8.yaml"


def served(*changes):
    settings = [
        f"routing.path={ROOT / 'workloads' / 'routing' / 'stdlib_moe_loss_free.npz'}",
        "model=stdlib-moe-16e",
        "parallel={tp: 1, dp: 4, ep: 4}",
        "requests.num_requests=60",
        "requests.prompt_tokens={distribution: lognormal, mean: 60, cv: 0.3, max: 90}",
        "requests.output_tokens={distribution: lognormal, mean: 20, cv: 0.3, max: 60}",
    ]
    result = simulate(load_scenario(BASE, [*settings, *changes]))
    e = result.experts
    local = local_activation_rate(e.replay, result.outcome.requests.target, e.placement, result.layout)
    return local, result.to_json()["summary"]["links"]["nvlink"]["bytes"]


def test_a_run_has_more_local_activations_and_moves_fewer_bytes():
    plain = served("policies.balancer=least_loaded", "policies.placement=contiguous")
    for predict in ("tokens", "experts"):
        balancer = f"policies.balancer={{kind: semantic, predict: {predict}, slack: 40}}"
        local, moved = served(balancer, "policies.placement=semantic")
        assert local > plain[0] + 0.03
        assert moved < 0.97 * plain[1]


def test_count_fidelity_cannot_follow_requests():
    with pytest.raises(BadInput, match=r"routing\.fidelity to token"):
        served("policies.balancer=semantic", "routing.fidelity=count")
