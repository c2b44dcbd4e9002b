"""Contested spaces (`benchmarks/validate/spaces.py`): what is judged, by hand; the kept page is the kept figures'."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
OUT = ROOT / "results" / "validation"


def tool(name: str) -> ModuleType:
    """A maintainers' script, imported where it lies."""
    folder = str(ROOT / "benchmarks" / "validate")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def space(predicted: list[float], roofline: list[float], default: int) -> dict[str, Any]:
    made = tool("contested")
    candidates = tuple(
        made.Candidate(f"c{i}", {"knob": i}, p, r, i == default)
        for i, (p, r) in enumerate(zip(predicted, roofline, strict=True))
    )
    found: dict[str, Any] = made.Space("toy", "a toy", "a time", "Nothing real.", candidates).to_json()
    return found


def samples(ns_CR: list[list[float]], psi: float | None = 1.0, cpu: list[float] | None = None) -> list[list[Any]]:
    rounds = len(ns_CR[0])
    return [[r, c, ns_CR[c][r], cpu[c] if cpu else 0.0, psi] for r in range(rounds) for c in range(len(ns_CR))]


def test_regrets_by_hand() -> None:
    """Measured 100, 101, 130, 160 to a thousandth. The pick is the second, the default the fourth; a bare roofline
    sees no difference between the first and the third."""
    made = tool("contested")
    ns = [
        [base * (1 + 0.0005 * ((r + c) % 2)) for r in range(6)] for c, base in enumerate((100e6, 101e6, 130e6, 160e6))
    ]
    found = made.judge(space([99e6, 98e6, 140e6, 150e6], [5.0, 9.0, 5.0, 7.0], 3), samples(ns))
    assert (found["best"], found["pick"], found["default"]) == ("c0", "c1", "c3")
    assert found["roofline"] == ["c0", "c2"]
    regrets = {name: row["regret"] for name, row in found["regrets"].items()}
    assert regrets["pick"] == pytest.approx(0.01, abs=2e-3)
    assert regrets["default"] == pytest.approx(0.60, abs=2e-3)
    assert regrets["roofline"] == pytest.approx(0.15, abs=2e-3)
    assert regrets["random"] == pytest.approx((0 + 0.01 + 0.30 + 0.60) / 4, abs=2e-3)
    assert found["regrets"]["pick"]["apart"] == pytest.approx(0.01, abs=2e-3)
    assert found["met"] == {"regret": True, "share": True}
    assert not found["pick_ties_with_best"]
    assert found["tau"] == pytest.approx(4 / 6, abs=1e-4)  # one of six pairs in the wrong order
    assert found["clock"] == "wall"
    assert found["spread"] == pytest.approx(0.60, abs=2e-3)


def test_a_pick_within_the_noise_ties_and_a_bad_one_misses() -> None:
    made = tool("contested")
    rng = np.random.default_rng(5)
    noisy = (np.array([100.0, 101.0, 140.0])[:, None] * np.exp(rng.normal(0, 0.05, (3, 9)))).tolist()
    tie = made.judge(space([2.0, 1.0, 3.0], [1.0, 2.0, 3.0], 2), samples(noisy))
    assert tie["pick_ties_with_best"] or tie["pick"] == tie["best"]
    firm = [[100.0, 100.1] * 3, [120.0, 120.1] * 3, [125.0, 125.1] * 3]
    missed = made.judge(space([2.0, 1.0, 3.0], [1.0, 2.0, 3.0], 2), samples(firm))
    assert missed["regrets"]["pick"]["regret"] == pytest.approx(0.2, abs=5e-3)
    assert missed["met"] == {"regret": False, "share": False}
    assert "missed" in made.page(report(space([2.0, 1.0, 3.0], [1.0, 2.0, 3.0], 2), samples(firm)))


def test_the_best_of_noise_alone_is_not_taken_for_better() -> None:
    """Twelve equal candidates: the measured best looks better than the pick; judged on the other rounds it is not."""
    made = tool("contested")
    rng = np.random.default_rng(2)
    equal = (100.0 * np.exp(rng.normal(0, 0.05, (12, 8)))).tolist()
    found = made.judge(space(list(range(1, 13)), [1.0] * 12, 5), samples(equal))
    assert found["regrets"]["random"]["regret"] > 0.02
    assert abs(found["regrets"]["random"]["apart"]) < found["regrets"]["random"]["regret"] / 2


def test_a_busy_machine_is_judged_by_cpu_time_where_there_is_some_and_said_to_be() -> None:
    made = tool("contested")
    wall = [[100.0, 900.0, 100.0], [200.0, 150.0, 700.0]]
    toy = space([1.0, 2.0], [1.0, 2.0], 1)
    by_cpu = made.judge(toy, samples(wall, psi=90.0, cpu=[50.0, 80.0]))
    assert by_cpu["clock"] == "thread CPU"
    assert by_cpu["regrets"]["default"]["regret"] == pytest.approx(0.6)
    without = made.judge(toy, samples(wall, psi=90.0))
    assert (without["clock"], without["quiet"]) == ("wall", False)
    assert "contended" in made.page(report(toy, samples(wall, psi=90.0)))


def report(toy: dict[str, Any], found: list[list[Any]]) -> dict[str, Any]:
    about = {
        "command": "by hand", "date": "2026-01-01", "cpu": "a CPU", "cpus": 2, "torch": "2", "profile": "p",
        "seal": "0" * 64, "seconds": 1.0,
    }  # fmt: skip
    return {"about": about, "spaces": [toy], "samples": {"toy": found}}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 90))
def test_a_burst_computes_every_token_once_in_full_steps(prompts: list[int], most: int) -> None:
    made = tool("space_capacity")
    steps = made.burst_steps(prompts, most)
    done = dict.fromkeys(range(len(prompts)), 0)
    for step in steps:
        assert 0 < step.tokens <= most
        for request, before, tokens, rank, last in step.chunks:
            assert (before, rank) == (done[request], 0)
            done[request] += tokens
            assert last == (done[request] == prompts[request])
    assert list(done.values()) == prompts
    assert all(step.tokens == most for step in steps[:-1])
    assert len(steps) == -(-sum(prompts) // most)


def test_time_to_first_token_of_a_burst_by_hand() -> None:
    """Prompts of 3, 4 and 2 tokens, 5 a step: the first ends in step 0, the others in step 1."""
    made = tool("space_capacity")
    steps = made.burst_steps([3, 4, 2], 5, ("capacity.factor=2",))
    assert [step.chunks for step in steps] == [
        ((0, 0, 3, 0, 1), (1, 0, 2, 0, 0)),
        ((1, 2, 2, 0, 1), (2, 0, 2, 0, 1)),
    ]
    assert steps[0].overrides == ("capacity.factor=2",)
    assert made.mean_first_ns([10.0, 20.0], steps) == pytest.approx((10 + 30 + 30) / 3)


def test_sequences_and_experts_share_the_memory() -> None:
    made = tool("space_offload")
    sizes = made.SIZES
    kv = sizes.layers * 2 * sizes.kv_heads * sizes.max_context * sizes.head_dim * 4
    rooms = [made.cache_bytes(sizes, batch) for batch in made.BATCHES]
    assert [made.budget_bytes(sizes) - room for room in rooms] == [batch * kv for batch in made.BATCHES]
    least = max(made.BATCHES) * sizes.top_k * sizes.slot_bytes  # a step's experts of one layer at the most
    assert min(rooms) >= least // 2
    assert made.DEFAULT in {(batch, *policy) for batch in made.BATCHES for policy in made.POLICIES}


def test_placements_are_predicted_before_anything_runs() -> None:
    made = tool("space_placement")
    found, _ = made.predict(ROOT / "benchmarks/validate/contested.yaml", ROOT / "hw_profiles/cpu_epyc_1thread.yaml")
    names = [c.name for c in found.candidates]
    assert len(set(names)) == len(names) == len(made.PLACEMENTS)
    assert [c.name for c in found.candidates if c.default] == ["contiguous"]
    by_name = {c.name: c for c in found.candidates}
    assert by_name["eplb"].predicted_ns < by_name["contiguous"].predicted_ns  # under this skew
    assert all(c.roofline_ns < c.predicted_ns for c in found.candidates)
    for step in made.steps():
        assert {rank for _, _, rank in step.decode} | {c[3] for c in step.chunks} == {0, 1}


@pytest.mark.skipif(not (OUT / "contested.json").exists(), reason="the spaces have not been measured here")
def test_the_kept_page_is_made_of_the_kept_figures() -> None:
    kept = json.loads((OUT / "contested.json").read_text("utf-8"))
    assert (OUT / "contested.md").read_text("utf-8") == tool("contested").page(kept)
