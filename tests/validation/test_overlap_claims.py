"""Published figures of FSMoE that the step programs give on a recalled grid: fitted, says the page of claims."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    folder = str(ROOT / "benchmarks" / "placement")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("claims_overlap")


def test_fsmoe_over_tutel_on_its_own_times(claims: ModuleType) -> None:
    """1.18x on testbed A over 1,458 layers, 912 of which want another degree backward than forward: with the reading of
    Tutel, the grid and the experts' times chosen as the page says."""
    found = claims.compare(claims.TESTBED_A)
    assert len(found.fsmoe) == 1458
    assert float(np.mean(found.tutel / found.fsmoe)) == pytest.approx(1.18, rel=0.05)
    assert int((found.forward != found.backward).sum()) == pytest.approx(912, rel=0.1)


def test_co_scheduling_never_loses_to_one_stream_and_the_experts_never_to_their_floor(claims: ModuleType) -> None:
    for bed in (claims.TESTBED_A, claims.TESTBED_B):
        found = claims.compare(bed)
        assert (found.fsmoe <= found.tutel * (1 + 1e-12)).all()
        assert (found.tutel <= found.tutel_waits).all()
        assert found.agree > 0.9
        assert found.below >= 0
