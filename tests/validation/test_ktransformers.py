"""KTransformers' table of placements through our own objects; results/validation/offload.md has all columns."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
NEEDED = [
    ROOT.parent / "shared" / "data" / name
    for name in ("published/ktransformers_placement_table.csv", "routing/deepseek_v3_counts_l3_18.csv")
]
pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in NEEDED), reason=f"needs {' and '.join(map(str, NEEDED))}"
)


@pytest.fixture(scope="module")
def kt() -> ModuleType:
    """A maintainers' script, imported where it lies."""
    for name in ("routing", "offload"):
        folder = str(ROOT / "benchmarks" / name)
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return importlib.import_module("kt_table")


def errors(kt: ModuleType, strategy: str, ratios: Sequence[float]) -> dict[float, float]:
    """Of ms a token, by ratio."""
    return {
        ratio: abs(
            kt.published()[strategy][kt.RATIOS.index(ratio)] * kt.ms(kt.simulate(strategy, ratio, kt.fitted())) / 1e3
            - 1
        )
        for ratio in ratios
    }


def test_three_cells_of_the_random_column_give_others_of_it(kt: ModuleType) -> None:
    found = errors(kt, "random", (0.4, 0.6, 1.0))
    assert max(found[ratio] for ratio in (0.6, 1.0)) < 1e-3
    assert max(found.values()) <= 0.05


def test_and_the_worst_cell_of_the_uniform_column(kt: ModuleType) -> None:
    """At 0.9 it is 9.6 % slower than random, which it should equal."""
    assert errors(kt, "uniform", [0.9])[0.9] <= 0.12


@pytest.mark.slow
def test_the_whole_random_and_uniform_columns(kt: ModuleType) -> None:
    assert max(errors(kt, "random", kt.RATIOS).values()) <= 0.05
    uniform = list(errors(kt, "uniform", kt.RATIOS).values())
    assert np.median(uniform) <= 0.04
    assert max(uniform) <= 0.12


def test_a_step_is_what_its_routes_say(kt: ModuleType) -> None:
    """The hand-over comes out of the routes: layers with any chosen expert on the CPU, counted here by hand."""
    traffic = kt.requests()[:3]
    times = kt.Constants(own=1000.0, sync=100.0, cpu=10.0)
    on_gpu = int(0.9 * kt.EXPERTS * kt.LAYERS)
    each, more = divmod(on_gpu, kt.LAYERS)
    first = np.array([each + (layer < more) for layer in range(kt.LAYERS)])
    wanted = []
    for request in traffic:
        for step in request.answer:
            absent = step.expert_TLK[0] >= first[:, None]
            wanted.append(kt.LAYERS * 1000 + absent.any(axis=1).sum() * 100 + absent.sum() * 10)
    (ran,) = kt.simulate("uniform", 0.9, times, traffic)
    np.testing.assert_array_equal(ran.step_ns, wanted)


def test_front_loading_pays_only_in_layers_that_are_not_full(kt: ModuleType) -> None:
    """Half of the experts: 24 layers without any on the CPU, 24 with all ten there, whatever the routes."""
    times = kt.Constants(own=1000.0, sync=100.0, cpu=10.0)
    (ran,) = kt.simulate("front_loading", 0.5, times, kt.requests()[:2])
    assert set(ran.step_ns.tolist()) == {48 * 1000 + 24 * (100 + 10 * 10)}


@pytest.mark.slow
def test_front_loading_and_frequency_follow_with_nothing_more_fitted(kt: ModuleType) -> None:
    for strategy in ("front_loading", "frequency"):
        assert max(errors(kt, strategy, kt.RATIOS[1:-1]).values()) <= 0.05, strategy


@pytest.mark.slow
def test_strategies_are_in_the_right_order_where_the_table_can_tell(kt: ModuleType) -> None:
    """To the last digit it is 7 of 10, which the page calls a miss: two of the three are ties of the table."""
    assert sum(not wrong for _, wrong in kt.right_orders(kt.noise())) >= 8
    strict = [ratio for ratio, wrong in kt.right_orders() if wrong]
    assert strict == [0.6, 0.9, 1.0]


@pytest.mark.slow
def test_the_popularity_of_a_request_is_the_fitted_one(kt: ModuleType) -> None:
    assert kt.fit_dynamic() == (kt.TILT, kt.PROMPT)
