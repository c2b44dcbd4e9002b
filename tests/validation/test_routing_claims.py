"""Claims of papers that cost little to check: identities, exact balance, shares of FLOP, and how far fitted ones carry.

The page results/validation/routing.md has all of them; `python benchmarks/routing/claims.py` writes it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moesim.model import ModelSpec
from moesim.model_changes import ModelChanges, change_model
from moesim.routing import NONE, RoutingContext
from moesim.routing.expert_choice import Policy as ExpertChoice
from moesim.scenario.load import load_model

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    """A maintainers' script, imported where it lies."""
    folder = str(ROOT / "benchmarks" / "routing")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


# ---- AdaMoE


@pytest.fixture(scope="module")
def expert_share() -> float:
    return float(
        tool("claims_counts").expert_flop_share(load_model(ROOT / "workloads" / "models" / "mixtral-8x7b.yaml"))
    )


def test_experts_do_88_percent_of_mixtral(expert_share: float) -> None:
    """The six rows of AdaMoE's table 1 lie at 0.8812 to 0.8818; without attention scores it is a little more."""
    assert expert_share == pytest.approx(0.8815, abs=0.004)
    model = load_model(ROOT / "workloads" / "models" / "mixtral-8x7b.yaml")
    # a sequence of 300 tokens, whose tokens see 150 in the mean
    assert tool("claims_counts").expert_flop_share(model, seen=150) == pytest.approx(0.8815, abs=0.0005)


@pytest.mark.parametrize("row", ["WINO", "HELLA", "PIQA", "SIQA", "OQA", "ARC-C"])
def test_saved_flop_follow_from_the_load(row: str, expert_share: float) -> None:
    """Within what two digits of the load leave open (0.22 points), and 0.1."""
    counts = tool("claims_counts")
    saved, load = counts.TABLE_1[row]
    assert counts.saved_percent(expert_share, load) == pytest.approx(saved, abs=0.32)


def test_one_null_logit_does_not_carry_over() -> None:
    """Table 2's other rows: what the page states, a mean error under 20 % and a row that misses by over a quarter."""
    counts = tool("claims_counts")
    logit, loads = counts.held_out_loads(counts.mixtral_scores()["gumbel"][:4096])
    assert loads[8, 3] == pytest.approx(1.63, abs=0.005)
    error = counts.errors(loads, {(8, 3)})
    assert error.mean() < 0.20
    assert error.max() > 0.25
    assert -1 < logit < 1


def test_more_null_experts_take_more() -> None:
    counts = tool("claims_counts")
    score = counts.mixtral_scores()["gumbel"][:2048]
    load = [counts.null_load(score, nulls, 6, 0.0) for nulls in (8, 16, 32, 64)]
    assert load == sorted(load, reverse=True)
    assert counts.null_load(score, 8, 3, -6) == pytest.approx(3, abs=0.02)


# ---- experts choose


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(8192, 64, 6), (1000, 64, 6), (4096, 8, 2), (513, 512, 20)])
def test_expert_choice_is_even(tokens: int, experts: int, top_k: int) -> None:
    score = np.random.default_rng(3).normal(size=(tokens, experts)).astype(np.float32) * 3
    score += np.linspace(0, 4, experts, dtype=np.float32)  # the last expert is everyone's favourite
    found = ExpertChoice().route(score, RoutingContext(top_k))
    load = np.bincount(found.expert_TK[found.expert_TK != NONE], minlength=experts)
    assert load.max() == load.min() == tokens * top_k // experts


@pytest.mark.parametrize("kind", ["linear", "linear_reverse", "cosine", "cosine_reverse"])
def test_schedules_cost_what_static_k_does(kind: str) -> None:
    """EC-DLM: k from 8 to 32 against a static 20."""
    policy = ExpertChoice.model_validate({"schedule": kind, "k_min": 8, "k_max": 32, **tool("claims_counts").EC_DLM})
    score = np.random.default_rng(4).normal(size=(512, 512)).astype(np.float32)
    k = [tool("claims_counts").ec_dlm_k(policy, score, r) for r in np.linspace(0, 1, 9)]
    assert np.mean(k) == pytest.approx(20, abs=1e-9)
    assert (k[0], k[-1]) == ((32, 8) if kind.endswith("reverse") else (8, 32))


# ---- Expert Upcycling


def test_savings_follow_from_two_step_times() -> None:
    """Expert Upcycling, section 6: 32, 24, 67, 50 %, within a point."""
    cost = tool("claims_cost")
    assert cost.savings(2.2, 4.2) == pytest.approx({"half": 32, "all": 24, "sunk, half": 67, "sunk, all": 50}, abs=1)
    # by hand: 1 + 0.5 * 2 against 1.5 * 2
    assert cost.savings(1, 2)["half"] == pytest.approx(100 / 3)


def test_upcycling_multiplies_experts_alone() -> None:
    cost = tool("claims_cost")
    model = ModelSpec.model_validate(cost.upcycling_dimensions()).build()
    twice = change_model(model, ModelChanges(upcycle=2))
    assert model.total_params() == pytest.approx(7.6e9, rel=0.01)
    assert twice.total_params() - model.total_params() == pytest.approx(10 * 32 * 3 * 2048 * 3072, rel=0.001)
    assert twice.top_k == model.top_k == 2


# ---- bytes and rows


def test_token_centric_reads_every_pairs_weights() -> None:
    """OmniMoE, section 2.3: T k rows against one for each expert in use."""
    body = tool("claims_cost").omni_row(32)
    assert body.token_bytes == 4096 * 32 * 2 * 1024 * 2
    assert body.expert_bytes == body.active * 2 * 1024 * 2
    assert body.token_ns > body.expert_ns


def test_more_capacity_costs_throughput() -> None:
    """The sign and the order of marin#4017 at one micro-batch; the page has the curve."""
    cost = tool("claims_cost")
    ms = cost.capacity_steps(cost.grug(1536, 2), "h100_sxm", 4, "full", (1.0, 1.25, 2.0))
    assert ms == sorted(ms)
    loss = cost.lost(ms, (1.0, 1.25, 2.0))
    assert loss[0] == 0
    assert 0 < loss[1] < 20  # 25 % more expert rows are 20 % of throughput at the very most
    assert loss[1] < loss[2] < 50


def test_the_page_holds_what_it_counts() -> None:
    text = (ROOT / "results" / "validation" / "routing.md").read_text("utf-8")
    page = tool("claim_page")
    told = next(line for line in text.splitlines() if " claims: " in line)
    for verdict in page.VERDICTS:
        number = sum(line.startswith(f"| **{verdict}** | ") for line in text.splitlines()) - 1  # the legend's own line
        assert number == 0 or f"{number} {verdict}" in told
    for picture in ("routing_balance.png", "routing_drops.png", "routing_capacity.png"):
        assert f"({picture})" in text
        assert 0 < (ROOT / "results" / "validation" / picture).stat().st_size < 150_000
