"""Held-out traffic: a placement made for one recorded task, judged on another."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TRACE = ROOT.parent / "shared" / "data" / "routing" / "esft_dsv2lite_intent.npz"

pytestmark = pytest.mark.skipif(
    not TRACE.is_file(), reason="reads ESFT's traces from ../shared/data, which is not here"
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    folder = str(ROOT / "benchmarks" / "placement")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("claims_heldout")


def test_a_static_map_loses_most_of_its_gain_on_another_task_and_fresh_ones_win_it_back(tool: ModuleType) -> None:
    plain = np.mean([[tool.executed(tool.contiguous(), ids, "first") for ids in tool.batches(t)] for t in tool.TASKS])
    static, fresh = tool.both(16, "random"), tool.both(16, "random", 1)
    own = tool.both(16, "random", own=True)
    assert own < fresh < static < plain
    assert plain - static < 0.25 * (plain - own)
    assert static - fresh > 0.6 * (static - own)


def test_the_best_replica_for_every_batch_beats_a_random_one_on_the_same_map(tool: ModuleType) -> None:
    pytest.importorskip("moesim.dispatch.lp")
    assert tool.both(16, "lp") < 1 + 0.6 * (tool.both(16, "random") - 1)


def test_maps_come_from_steps_before_those_they_serve(tool: ModuleType) -> None:
    steps = tool.batches("summary")
    for at, (placement, ids) in enumerate(tool.maps("intent", "summary", 8, 2)):
        assert ids is steps[at]
        start = at // 2 * 2
        load = tool.counted(steps[start - 2 : start]) if start else tool.trace("intent").count_LE().astype(float)
        np.testing.assert_array_equal(placement.slot_to_expert_LS, tool.placed(load, 8).slot_to_expert_LS)
