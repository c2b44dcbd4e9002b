"""Claims about resident experts that cost little to check; results/validation/offload.md has all of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
TOYS = DATA / "published" / "moe_lrc_toy_throughput.csv"
ORDER = DATA / "routing" / "fiddler_mixtral_popularity_order.json"


@pytest.fixture(scope="module")
def toys() -> ModuleType:
    """A maintainers' script, imported where it lies."""
    for name in ("routing", "offload"):
        folder = str(ROOT / "benchmarks" / name)
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return importlib.import_module("toys")


@pytest.mark.skipif(not TOYS.exists(), reason=f"needs {TOYS}")
def test_one_cost_of_a_miss_gives_the_toys_throughput(toys: ModuleType) -> None:
    """Within 10 %, from one cell; top16 and top2 ask for other numbers of experts, 32expert for larger ones."""
    for toy in toys.toys():
        if toy.rho == 3 and toy.model in ("baseline", "32expert", "top16", "top2"):
            ours, hit = toys.run_toy(toy, toys.toy_miss_ms())
            assert ours == pytest.approx(toy.tokens_s, rel=0.1), toy
            assert hit == pytest.approx(toy.hit, abs=0.002), toy


@pytest.mark.skipif(not TOYS.exists(), reason=f"needs {TOYS}")
def test_without_load_balancing_a_pooled_hit_rate_says_too_little(toys: ModuleType) -> None:
    """The miss that the page reports: were it to vanish, the page would be wrong."""
    worst = next(toy for toy in toys.toys() if (toy.model, toy.rho) == ("nolb", 3))
    ours, _ = toys.run_toy(worst, toys.toy_miss_ms())
    assert ours / worst.tokens_s > 1.15


def test_three_bit_experts_follow_from_two_bit_ones(toys: ModuleType) -> None:
    """Table 2 of arXiv:2312.17238: own time and link rate from 2-bit cells, larger experts from the model sizes."""
    for variant in ("no pre-load", "no cache"):
        measured = toys.SPEED_3BIT["A100"][toys.VARIANTS.index(variant)]
        assert toys.mixtral_speed("A100", variant, 3) == pytest.approx(measured, rel=0.1)
    assert 16 < toys.mixtral_fitted("A100")[1] < 32  # GB/s of PCIe 4


@pytest.mark.skipif(not ORDER.exists(), reason=f"needs {ORDER}")
def test_fiddlers_popularity_gives_its_second_hit_rate(toys: ModuleType) -> None:
    assert toys.fiddler_hit(125) == pytest.approx(0.530, abs=0.01)


@pytest.mark.skipif(not ORDER.exists(), reason=f"needs {ORDER}")
def test_the_maximum_of_fiddlers_comment_beats_the_sum_of_its_code(toys: ModuleType) -> None:
    took = {o: toys.fiddler({"kind": "fiddler", "objective": o}, 56, 2, 64).ms for o in ("sum", "max")}
    assert took["max"] < took["sum"]


@pytest.mark.parametrize(("r_w", "layer_ms"), [(0.0, 50.0), (0.25, 150.0), (0.5, 150.0), (0.0, 400.0)])
def test_a_streamed_layer_takes_the_longer_of_link_and_device(toys: ModuleType, r_w: float, layer_ms: float) -> None:
    """Equation 12 of arXiv:2411.11217 without its CPU."""
    rule = max((1 - r_w) * toys.MIXTRAL_EXPERTS * toys.BF16 / 12e6, layer_ms)
    assert toys.lightning_layer_ms(r_w, layer_ms, 12.0) == pytest.approx(rule, rel=0.01)


@pytest.mark.parametrize("experts", [6, 8])
def test_one_socket_is_two_with_half_the_memory_rate(toys: ModuleType, experts: int) -> None:
    """DeepSeek-V3 on KTransformers: fitted to two sockets, held to one."""
    own, each = toys.kt_fitted()
    assert toys.kt_decode(own, 2 * each, experts) == pytest.approx(toys.KT_DECODE["single", experts], rel=0.05)
