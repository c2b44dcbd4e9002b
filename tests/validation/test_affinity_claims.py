"""Claims about placements by affinity that cost little to check. results/validation/placement.md has all of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moesim.placement.crossings import contiguous_ranks, rank_of
from moesim.placement.exflow import Policy as ExFlow
from moesim.placement.semantic import Policy as Semantic

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    for folder in ("routing", "placement"):
        path = str(ROOT / "benchmarks" / folder)
        if path not in sys.path:
            sys.path.insert(0, path)
    return importlib.import_module("claims_affinity")


@pytest.mark.parametrize("name", ["intent", "summary"])
def test_exflows_40_percent_on_held_out_sequences(claims: ModuleType, name: str) -> None:
    """ExFlow: 40 % fewer crossings with 64 experts on 4 GPUs; within 10 points on recorded routing of another model."""
    path = claims.TRACES[name]
    if not path.exists():
        pytest.skip(claims.NO_TRACE)
    (fit, sequence, _), (score, *_) = claims.halves(path)
    weight, ctx = claims.told(fit, sequence, 64, 4)
    found = rank_of(ExFlow(starts=2).place(weight, ctx))
    before, after = (claims.share_apart(score, r, 64, 4) for r in (contiguous_ranks(26, 64, 4), found))
    assert before == pytest.approx(0.75, abs=0.005)
    assert 1 - after / before == pytest.approx(0.4, abs=0.1)


def test_activations_become_local_token_by_token(claims: ModuleType) -> None:
    """Speculative MoE's direction, on held-out sequences of the small model with vocabulary ids."""
    local = importlib.import_module("claims_local")
    fit, score = claims.halves(local.SMALL)
    plain, found = local.local_rate(fit, score, 16, 4, True, Semantic(starts=1))
    assert 0.25 < plain < found
    assert found > 0.44


def test_the_tables_shape_is_the_notes(claims: ModuleType) -> None:
    """64 experts on 8 ranks: alternating assignments leave about 0.5 of 0.87."""
    section = claims.affinity_table()
    assert [row.verdict for row in section.rows][1] == claims.SHAPE
    ours = np.array([float(x) for x in section.rows[1].ours.split(" (")[0].split(" -> ")])
    assert ours == pytest.approx([0.87, 0.53], abs=0.05)
