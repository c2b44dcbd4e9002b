"""Device memory once policies have planned, and links of one device that stands for several: by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.engine_spec import EngineSpec
from moesim.errors import Infeasible
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.offload import OffloadPlan
from moesim.scenario.load import load_model, load_profile
from moesim.tiers import LinkRates
from moesim.tiers.group import rates_of_one
from moesim.tiers.memory import Budget, budget_of, with_plans
from moesim.tiers_spec import TiersSpec

ROOT = Path(__file__).parents[2]
SIZE = 1 << 20


@pytest.fixture(scope="module")
def budget() -> Budget:
    model = load_model(ROOT / "workloads" / "models" / "deepseek-v2-lite.yaml")
    profile = load_profile(ROOT / "hw_profiles" / "h100_sxm_datasheet.yaml")
    cluster = Cluster.from_spec({"device": "h100_sxm_datasheet"}, profile)
    tiers = TiersSpec(kv_tokens=4096, staging=3)
    return budget_of(model, cluster, Layout.of(model, cluster, 1, 1, 1), EngineSpec(), tiers, SIZE)


def plan(fixed: int, cached: int) -> OffloadPlan:
    none = np.zeros((2, 8), bool)
    here = none.copy()
    here.reshape(-1)[:fixed] = True
    return OffloadPlan(np.array([cached * SIZE, 0]), here, none, none)


def test_what_a_plan_leaves_is_kv_cache(budget: Budget) -> None:
    size = np.full((2, 8), SIZE)
    assert budget.memory.expert_buffers == 3 * SIZE
    found = with_plans(budget, [plan(3, 4)], [size], [0])
    assert (found.expert_weights, found.expert_cache, found.expert_extra) == (3 * SIZE, 4 * SIZE, 0)
    unit = found.kv_unit * found.kv_copies
    assert found.kv_units == (budget.memory.usable - budget.memory.fixed - 7 * SIZE) // unit
    # what a precision policy keeps besides is as good as taken, and the fullest rank decides
    more = with_plans(budget, [plan(3, 4), plan(1, 1)], [size, size], [0, 9 * SIZE])
    assert (more.expert_weights, more.expert_cache, more.expert_extra) == (SIZE, SIZE, 9 * SIZE)
    assert more.kv_units == (budget.memory.usable - budget.memory.fixed - 11 * SIZE) // unit


def test_a_plan_beyond_the_budget_is_refused(budget: Budget) -> None:
    size = np.full((2, 8), SIZE)
    tight = replace(budget, expert_bytes=7 * SIZE)
    with_plans(tight, [plan(3, 4)], [size], [0])
    with pytest.raises(Infeasible, match="7,340,033 bytes of 7,340,032"):
        with_plans(tight, [plan(3, 4)], [size], [1])


def test_one_device_has_its_part_of_what_all_share() -> None:
    rates = LinkRates(10.0, 90.0, 12.0, domains=2)
    assert rates_of_one(rates, 4) == replace(rates, host=45.0, nvme=3.0, domains=1)
    assert rates_of_one(rates, 3) == replace(rates, host=45.0, nvme=4.0, domains=1)  # two of three in the fuller domain
    assert rates_of_one(rates, 1) == replace(rates, host=90.0, nvme=12.0, domains=1)
