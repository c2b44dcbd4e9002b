"""DeepEP's published tables, predicted from what others measured on H100: those cases that are quick to count."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    folder = str(ROOT / "benchmarks" / "placement")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("claims_comm")


@pytest.mark.parametrize("ranks", [8, 16, 32, pytest.param(64, marks=pytest.mark.slow)])
def test_normal_kernels_within_a_tenth(claims: ModuleType, ranks: int) -> None:
    ours, _ = claims.normal_rates(ranks)
    assert ours == pytest.approx(claims.NORMAL[ranks], rel=0.10)


@pytest.mark.parametrize("ranks", [8, 16, 32, 64, 128, 256])
def test_low_latency_kernels_within_a_quarter(claims: ModuleType, ranks: int) -> None:
    ours, grade = claims.quick_us(ranks)
    assert ours == pytest.approx(claims.QUICK[ranks], rel=0.25)
    assert grade in ("measured", "interpolated", "extrapolated")  # between nodes nothing is assumed


def test_a_gather_beats_both_where_four_ranks_hold_nearly_every_expert(claims: ModuleType) -> None:
    """vLLM #42254: 4 B200, long prompts."""
    cost = {}
    for how in ("allgather_reducescatter", "deepep_normal", "pairwise"):
        bench = claims.Bench("qwen3-30b-a3b", 4, how, "b200_sxm")
        cost[how] = bench.layer_ns(bench.send(2048), 2048)
    assert cost["allgather_reducescatter"] < min(cost["deepep_normal"], cost["pairwise"])
